"""Exported files load strictly in the other software, and give the same features there."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mocofast import settings
from mocofast.config import Config
from mocofast.interop import load_reference_state_dict
from mocofast.interop.export import FORMATS, export
from mocofast.methods.build import build_method
from mocofast.models import encoders
from mocofast.optim.build import build_optimizer
from mocofast.settings import ConfigError
from mocofast.train.checkpoint import FORMAT


def trained(
    arch: str, options: dict[str, Any] | None = None, **model_options: Any
) -> dict[str, Any]:
    """A checkpoint with different encoders and with changed BatchNorm statistics.

    options: {"group.option": value}.
    """
    torch.manual_seed(1)
    config = Config()
    settings.apply(config, options or {})
    config.model.arch = arch
    config.model.dim, config.model.queue_size = 24, 31  # a prime
    for name, value in model_options.items():
        setattr(config.model, name, value)
    model = build_method(config)
    for encoder in (model.encoder_q, model.encoder_k):
        for buffer in encoder.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(model.parameters(), config.optim)
    for parameter in model.encoder_q.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer.step()
    state = {
        "config": settings.to_dict(config),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    return {**state, "format": FORMAT, "epoch": 7, "step": 70}


def query_features(checkpoint: dict[str, Any], images: Tensor) -> Tensor:
    model = build_method(settings.from_dict(checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    with torch.no_grad():
        return encoders.features(model.encoder_q.eval(), images)


def run(snippet: str) -> nn.Module:
    """Executes the printed lines as a user would. Returns their `model`."""
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    return scope["model"].eval()


@pytest.mark.parametrize(
    ("format", "suffix", "arch"),
    [
        ("torchvision", ".pt", "resnet50"),  # bottleneck blocks
        ("torchvision", ".safetensors", "resnet18"),
        ("torchvision", ".pt", "resnet18_cifar"),
        ("timm", ".pt", "resnet50"),
        ("timm", ".safetensors", "resnet18_cifar"),
        ("timm", ".pt", "vit_b_32"),
        ("timm", ".pt", "timm/convnext_atto"),
        ("safetensors", ".safetensors", "timm/vit_tiny_patch16_224"),
        ("safetensors", ".safetensors", "torchvision.models:mobilenet_v3_small"),
    ],
)
def test_the_printed_lines_load_the_query_encoder_with_equal_features(
    format: str, suffix: str, arch: str, tmp_path: Path
) -> None:
    if format == "timm":
        pytest.importorskip("timm")
    size = 224 if arch == "vit_b_32" else 64
    checkpoint = trained(arch, {"augment.size": size}, mlp=True)
    written = export(checkpoint, format, tmp_path / f"backbone{suffix}")
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = run(written.how_to_load)(images)
    # Only pooling may differ in rounding. Measured difference: 0 (torchvision), 1e-6 (timm).
    torch.testing.assert_close(features, query_features(checkpoint, images), rtol=1e-5, atol=1e-5)


def test_torchvisions_model_loads_strictly_apart_from_its_head(tmp_path: Path) -> None:
    export(trained("resnet50"), "torchvision", tmp_path / "r50.pt")
    state = torch.load(tmp_path / "r50.pt", weights_only=True)
    model = torchvision.models.resnet50()
    result = model.load_state_dict(state, strict=False)
    assert sorted(result.missing_keys) == ["fc.bias", "fc.weight"]
    assert result.unexpected_keys == []
    assert len(state) == 318  # 53 convolutions and 53 BatchNorms of 5 tensors


def test_the_query_encoder_is_exported_and_not_its_average(tmp_path: Path) -> None:
    checkpoint = trained("resnet18")
    written = export(checkpoint, "torchvision", tmp_path / "r18.pt")
    weight = torch.load(tmp_path / "r18.pt", weights_only=True)["conv1.weight"]
    assert torch.equal(weight, checkpoint["model"]["encoder_q.conv1.weight"])
    assert not torch.equal(weight, checkpoint["model"]["encoder_k.conv1.weight"])
    assert "the query encoder without its head" in str(written)
    assert f"{written.tensors} tensors" in str(written)


@pytest.mark.parametrize("arch", ["resnet_tiny", "vit_b_32"])
def test_other_encoders_load_through_the_printed_lines_too(arch: str, tmp_path: Path) -> None:
    checkpoint = trained(arch)
    size = 8 if arch == "resnet_tiny" else 224
    images = torch.randn(1, 3, size, size)
    model = run(export(checkpoint, "torchvision", tmp_path / "out.pt").how_to_load)
    with torch.no_grad():
        features = model(images)
    torch.testing.assert_close(features, query_features(checkpoint, images), rtol=1e-5, atol=1e-5)


def test_vits_with_layer_scale_get_timms_names(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    options = {"augment.size": 32, "model.layer_scale": 0.3, "model.drop_path": 0.1}
    checkpoint = trained("vit_tiny_cifar", options)
    images = torch.randn(2, 3, 32, 32)
    expected = query_features(checkpoint, images)
    for format, suffix in (("timm", ".pt"), ("safetensors", ".safetensors")):
        written = export(checkpoint, format, tmp_path / f"vit{suffix}")
        with torch.no_grad():
            found = run(written.how_to_load)(images)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    names = torch.load(tmp_path / "vit.pt", weights_only=True).keys()
    assert {"cls_token", "blocks.5.ls2.gamma", "patch_embed.proj.bias"} <= names


# Options of detectron2 (its config/defaults.py and modeling/backbone/resnet.py).
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("resnet50", {"DEPTH": 50}),
        ("resnet101", {"DEPTH": 101}),
        ("resnet34", {"DEPTH": 34, "RES2_OUT_CHANNELS": 64}),
        ("resnext101_32x8d", {"DEPTH": 101, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 8}),
        ("wide_resnet50_2", {"DEPTH": 50, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 128}),
    ],
)
def test_the_options_of_detectron2_describe_the_network(
    arch: str, options: dict[str, int], tmp_path: Path
) -> None:
    from mocofast.interop.loading_lines import how_to_load

    with torch.device("meta"):
        encoder = encoders.build_encoder(arch)(num_classes=8)
    config = Config()
    config.model.arch = arch
    line = how_to_load("detectron2", config, encoder, tmp_path / "backbone.pkl")
    found = dict(re.findall(r"MODEL\.RESNETS\.(\w+) (\d+)", line))
    assert found == {name: str(value) for name, value in options.items()}
    assert "STRIDE_IN_1X1 False" in line


def test_split_batch_norm_exports_as_ordinary_batch_norm(tmp_path: Path) -> None:
    checkpoint = trained("resnet18_cifar", bn_splits=4)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = run(export(checkpoint, "torchvision", tmp_path / "out.pt").how_to_load)(images)
    torch.testing.assert_close(features, query_features(checkpoint, images), rtol=1e-5, atol=1e-5)


def test_safetensors_hold_the_backbone_and_name_the_architecture(tmp_path: Path) -> None:
    checkpoint = trained("resnet18")
    export(checkpoint, "safetensors", tmp_path / "r18.safetensors")
    export(checkpoint, "torchvision", tmp_path / "r18.pt")
    ours, theirs = (
        load_file(tmp_path / "r18.safetensors"),
        torch.load(tmp_path / "r18.pt", weights_only=True),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with safe_open(tmp_path / "r18.safetensors", "pt") as file:
        assert file.metadata()["arch"] == "resnet18"


class ReferenceMoCo(nn.Module):
    """Modules and buffers of facebookresearch/moco, as in the published checkpoints."""

    def __init__(self, dim: int, queue_size: int) -> None:
        super().__init__()
        self.encoder_q = torchvision.models.resnet18(num_classes=dim)
        self.encoder_k = torchvision.models.resnet18(num_classes=dim)
        for encoder in (self.encoder_q, self.encoder_k):
            encoder.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), encoder.fc)
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", torch.zeros(dim, queue_size))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))


def test_a_reference_checkpoint_loads_into_a_reference_model_and_its_optimiser(
    tmp_path: Path,
) -> None:
    checkpoint = trained("resnet18", mlp=True)
    how_to_load = export(checkpoint, "reference", tmp_path / "checkpoint.pth.tar").how_to_load
    assert "main_moco.py --arch resnet18" in how_to_load
    assert "--moco-dim 24 --moco-k 31 --mlp" in how_to_load
    written = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert (written["epoch"], written["arch"]) == (7, "resnet18")
    model = ReferenceMoCo(24, 31)
    wrapped = nn.ModuleDict({"module": model})  # DistributedDataParallel's prefix
    wrapped.load_state_dict(written["state_dict"], strict=True)
    assert torch.equal(model.get_buffer("queue"), checkpoint["model"]["queue"].T)
    # The reference lists all parameters, the key encoder's included.
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    optimizer.load_state_dict(written["optimizer"])
    first, last = model.encoder_q.conv1.weight, list(model.encoder_q.parameters())[-1]
    momentum = checkpoint["optimizer"]["state"]
    assert torch.equal(optimizer.state[first]["momentum_buffer"], momentum[0]["momentum_buffer"])
    assert torch.equal(
        optimizer.state[last]["momentum_buffer"], momentum[len(momentum) - 1]["momentum_buffer"]
    )
    assert not any(parameter in optimizer.state for parameter in model.encoder_k.parameters())


def test_a_reference_checkpoint_comes_back_unchanged(tmp_path: Path) -> None:
    checkpoint = trained("resnet18")
    export(checkpoint, "reference", tmp_path / "checkpoint.pth.tar")
    model = build_method(settings.from_dict(checkpoint["config"]))
    load_reference_state_dict(model, torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True))
    state = model.state_dict()
    assert state.keys() == checkpoint["model"].keys()
    assert all(torch.equal(state[name], checkpoint["model"][name]) for name in state)


def test_an_encoder_unknown_to_the_references_program_is_loaded_by_our_own_lines(
    tmp_path: Path,
) -> None:
    checkpoint = trained("resnet_tiny")
    written = export(checkpoint, "reference", tmp_path / "checkpoint.pth.tar")
    assert "main_moco" not in written.how_to_load
    model = build_method(settings.from_dict(checkpoint["config"]))
    exec(written.how_to_load, {"model": model})
    assert torch.equal(model.queue, checkpoint["model"]["queue"])


def test_detectron2_names_and_values_follow_the_conversion_rules(tmp_path: Path) -> None:
    checkpoint = trained("resnet50")
    export(checkpoint, "detectron2", tmp_path / "r50.pkl")
    with open(tmp_path / "r50.pkl", "rb") as file:
        written = pickle.load(file)
    assert written["__author__"] == "MOCO"
    assert written["matching_heuristics"] is True
    pairs = {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.conv3.norm.bias": "layer1.0.bn3.bias",
        "res3.3.conv2.weight": "layer2.3.conv2.weight",
        "res4.5.conv1.norm.running_mean": "layer3.5.bn1.running_mean",
        "res5.0.shortcut.weight": "layer4.0.downsample.0.weight",
        "res5.0.shortcut.norm.weight": "layer4.0.downsample.1.weight",
    }
    for name, ours in pairs.items():
        assert torch.equal(
            torch.from_numpy(written["model"][name]), checkpoint["model"][f"encoder_q.{ours}"]
        ), name
    # All names are names of detectron2's ResNet.
    block = r"(conv[123]|shortcut)(\.norm)?"
    pattern = re.compile(
        rf"(stem\.conv1(\.norm)?|res[2-5]\.\d\.{block})\."
        r"(weight|bias|running_\w+|num_batches_tracked)"
    )
    assert all(pattern.fullmatch(name) for name in written["model"])
    assert len(written["model"]) == 318


@pytest.mark.parametrize("arch", ["resnet34", "resnet101", "resnext50_32x4d", "wide_resnet50_2"])
def test_timm_has_torchvisions_names_and_shapes_for_the_whole_family(arch: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model(arch, num_classes=0).state_dict()
        ours = torchvision.models.get_model(arch).state_dict()
    shapes = {name: tensor.shape for name, tensor in ours.items() if not name.startswith("fc.")}
    assert shapes == {name: tensor.shape for name, tensor in theirs.items()}


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r18.pt"
    out.write_text("old")

    def full_disk(content: Any, file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        export(trained("resnet18"), "torchvision", out)
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("arch", "format", "out", "message"),
    [
        (
            "resnet_tiny",
            "torchvison",
            "x.pt",
            "format: expected one of .*did you mean 'torchvision'",
        ),
        (
            "resnet_tiny",
            "safetensors",
            "x.pt",
            "out: expected a name ending in .safetensors, got .*x.pt",
        ),
        (
            "resnet_tiny",
            "reference",
            "x.safetensors",
            "out: format reference has a file format of its own",
        ),
        (
            "resnet_tiny",
            "timm",
            "x.pt",
            "format: timm is for ResNets, ViTs and models of timm, got model.arch resnet_tiny",
        ),
        (
            "resnet18_cifar",
            "detectron2",
            "x.pkl",
            "format: detectron2 is for ResNets with their 7x7 stem",
        ),
    ],
)
def test_what_cannot_be_exported_is_an_error_that_says_why(
    arch: str, format: str, out: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(trained(arch), format, tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_every_listed_format_is_written(tmp_path: Path) -> None:
    checkpoint = trained("resnet18")
    suffixes = {"safetensors": ".safetensors", "onnx": ".onnx", "torch_export": ".pt2"}
    for format in set(FORMATS) - {"text"}:  # a text tower: tests/test_clip.py
        if format in ("onnx", "transformers"):
            pytest.importorskip("onnxscript" if format == "onnx" else format)
        out = tmp_path / "new" / f"{format}{suffixes.get(format, '')}"
        assert export(checkpoint, format, out).path == out
        size = sum(f.stat().st_size for f in out.rglob("*")) if out.is_dir() else out.stat().st_size
        assert size > 40e6  # 11 million float32 weights
