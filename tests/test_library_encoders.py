"""Encoders that timm builds, and encoders of functions of the user."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.video import r3d_18

from mocofast import MoCo, cli
from mocofast.config import Config, ConfigError
from mocofast.evaluate.features import evaluating
from mocofast.interop import backbone_state_dict
from mocofast.interop.reference_checkpoints import load_any
from mocofast.models.batch_norm import SplitBatchNorm, SplitBatchNorm1d, SplitBatchNorm3d
from mocofast.models.encoders import (
    build_encoder,
    configured_encoder,
    features,
    head_name,
    untrained,
)
from mocofast.models.heads import head_names, pooled, replace_head
from mocofast.train.checkpoint import load_checkpoint
from tests.runs import make_images, metrics

MODULE = """
from torch import nn

def plain(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(4))

class Wide(nn.Module):
    def __init__(self, num_classes, image_size, channels, pair=False):
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(channels, 6, 3), nn.Linear(6, num_classes)
        self.pair, self.image_size = pair, image_size

    def forward(self, images):
        out = self.classifier(self.conv(images).mean((2, 3)))
        return (out, out) if self.pair else out

class Bare(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3)

    def forward(self, images):
        return self.conv(images)

def headless(channels=3):
    return Bare(channels)

def unnamed(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 8), nn.Flatten())

def several():
    return nn.MaxPool2d(2, return_indices=True)

def pretrained(num_classes):
    return Wide(num_classes, 16, 3)

def paired(num_classes, image_size, channels=3):
    return Wide(num_classes, image_size, channels, pair=True)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_encoders.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_encoders", raising=False)
    return "users_encoders"


# The last linear layer, and the number of features before it.
@pytest.mark.parametrize(
    ("name", "head", "width"),
    [
        ("convnext_atto", "head.fc", 320),
        ("swin_tiny_patch4_window7_224", "head.fc", 768),
        ("regnetx_002", "head.fc", 368),
        ("mobilenetv3_small_050", "classifier", 1024),
        ("vit_tiny_patch16_224", "head", 192),
    ],
)
def test_models_of_timm_train_and_give_pooled_features(name: str, head: str, width: int) -> None:
    pytest.importorskip("timm")
    size = 224 if "swin" in name else 64
    torch.manual_seed(0)
    model = MoCo(build_encoder(f"timm/{name}", size, 2), dim=8, queue_size=16, mlp=True)
    assert head_name(model.encoder_q) == head
    images = torch.randn(2, 2, size, size)
    model(images, images).loss.backward()
    assert all(p.grad is not None for p in model.encoder_q.parameters() if p.requires_grad)
    with evaluating(model.encoder_q), torch.no_grad():
        found = features(model.encoder_q, images)
    assert found.shape == (2, width)
    assert not any(n.startswith(f"{head}.") for n in backbone_state_dict(model))
    replace_head(model.encoder_q, nn.Linear(width, 3))
    assert model.encoder_q(images).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("convnext_atto", 32),
        ("regnetx_002", 32),
        # The smallest Swin, whose windows fit images of 224 pixels.
        pytest.param("swin_tiny_patch4_window7_224", 224, marks=pytest.mark.slow),
    ],
)
def test_runs_of_timms_encoders_go_through_every_command(
    name: str, size: int, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    images, run = make_images(tmp_path / "images", 24), str(tmp_path / "run")
    words = ["pretrain", str(images), "--train.dir", run, "--model.arch", f"timm/{name}"]
    words += ["--augment.size", str(size), "--data.batch_size", "4", "--model.queue_size", "8"]
    words += ["--train.max_steps", "2", "--knn.start", "false", "--train.device", "cpu"]
    assert cli.main([*words, "--data.workers", "0", "--train.log_every", "1"]) == 0
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2] and all(0 < row["loss"] < 20 for row in rows)
    fixed = ("--data.path", str(images), "--device", "cpu")
    assert cli.main(["knn", run, *fixed]) == 0
    assert cli.main(["linear", run, *fixed]) == 0
    assert cli.main(["finetune", run, *fixed, "--finetune.epochs", "1"]) == 0
    assert cli.main(["export", run, "--format", "timm", str(tmp_path / "out.pt")]) == 0
    # timm's model with the exported weights has the features of the run.
    model = timm.create_model(name, num_classes=0).eval()
    model.load_state_dict(torch.load(tmp_path / "out.pt"))
    view = torch.randn(2, 3, size, size)
    encoder = load_any(run).method.encoder_q
    with evaluating(encoder), torch.no_grad():
        torch.testing.assert_close(model(view), features(encoder, view), rtol=1e-4, atol=1e-4)


def test_functions_of_the_user_build_encoders(module: str) -> None:
    encoder = build_encoder(f"{module}:Wide", 16, 5)(num_classes=7)
    assert encoder.image_size == 16 and head_name(encoder) == "classifier"
    assert features(encoder, torch.randn(2, 5, 16, 16)).shape == (2, 6)
    for name, said in (
        (f"{module}:paired", "returns tuple"),
        (f"{module}:plain", r"returns \(2, 4\)"),
        (f"{module}:nothing", "has no function 'nothing'"),
        ("no_such_module:build", "there is no module 'no_such_module'"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_encoder(name, 16)(num_classes=7)
    with pytest.raises(ConfigError, match="cannot take images of 2 x 2 pixels"):
        build_encoder(f"{module}:Wide", 2)(num_classes=7)
    with pytest.raises(ConfigError, match="channels"):
        build_encoder(f"{module}:plain", 16, 5)


def test_an_encoder_without_a_head_gets_a_head(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(f"{module}:headless", 16, 5)(num_classes=7)
    images = torch.randn(2, 5, 16, 16)
    assert head_name(encoder) == "fc" and encoder(images).shape == (2, 7)
    expected = encoder.get_submodule("body")(images).mean((2, 3))
    torch.testing.assert_close(features(encoder, images), expected)
    with pytest.raises(ConfigError, match="returns tuple"):
        build_encoder(f"{module}:several", 32, 3)(num_classes=7)
    run, out = str(tmp_path / "run"), str(tmp_path / "out.safetensors")
    words = ["pretrain", "digits", "--train.device", "cpu", "--data.workers", "0"]
    words += ["--train.max_steps", "1", "--knn.start", "false", "--train.dir", run]
    assert cli.main([*words, "--model.arch", f"{module}:headless"]) == 0
    assert cli.main(["linear", run, "--device", "cpu"]) == 0
    assert cli.main(["export", run, "--format", "safetensors", out]) == 0
    exported: dict[str, Any] = {}
    exec("import torch" + capsys.readouterr().out.partition("import torch")[2], exported)
    digits = torch.randn(2, 3, 8, 8)
    body = load_any(run).method.encoder_q.get_submodule("body")
    torch.testing.assert_close(exported["model"](digits), body(digits).mean((2, 3)))
    # A head of another name is refused in a line.
    assert cli.main([*words, "--train.dir", f"{run}2", "--model.arch", f"{module}:unnamed"]) == 2
    assert "ending in fc, head, heads, classifier" in capsys.readouterr().err


def test_a_function_may_be_called_pretrained(module: str) -> None:
    config = Config()
    config.model.arch = f"{module}:pretrained"
    encoder = configured_encoder(untrained(config))(num_classes=7)
    assert encoder(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    config.model.arch = "timm/resnet18:pretrained"
    assert untrained(config).model.arch == "timm/resnet18"


def test_unknown_models_of_timm_are_refused_with_the_nearest_name() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=r"nearest one is timm/convnext_"):
        build_encoder("timm/convnext_attto")
    with pytest.raises(ConfigError, match="expected timm/NAME or timm/NAME:pretrained"):
        build_encoder("timm/resnet18:weights")


def hub_of_timm(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Puts weights of timm's model into a cache of the Hugging Face Hub, and returns the model."""
    import timm
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = timm.get_pretrained_cfg(name).hf_hub_id.replace("/", "--")
    place, commit = folder / f"models--{repository}", "a" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots" / commit).mkdir(parents=True)
    torch.manual_seed(5)
    model = timm.create_model(name)
    save_file(model.state_dict(), place / "snapshots" / commit / "model.safetensors")
    return model


def test_weights_of_timm_on_the_disk_start_a_run_that_needs_them_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    hub, run, out = tmp_path / "hub", tmp_path / "run", tmp_path / "out.pt"
    theirs = hub_of_timm(hub, "resnet10t", monkeypatch)
    fixed = ["--train.device", "cpu", "--data.workers", "0", "--knn.start", "false"]
    options = [*fixed, "--model.queue_size", "64", "--data.batch_size", "8", "--augment.size", "32"]
    words = ["pretrain", "digits", *options, "--optim.lr", "0", "--train.max_steps", "1"]
    named = ("--train.dir", str(run), "--model.arch", "timm/resnet10t:pretrained")
    assert cli.main([*words, *named]) == 0
    state = load_checkpoint(run)["model"]
    for side in ("encoder_q", "encoder_k"):
        assert torch.equal(state[f"{side}.layer1.0.conv1.weight"], theirs.layer1[0].conv1.weight)
    assert json.loads((run / "signals.jsonl").read_text().splitlines()[0])["facts"]["pretrained"]
    # On another machine, without timm's file.
    shutil.rmtree(hub)
    assert f"next: mocofast export {run} --format timm" in capsys.readouterr().out
    assert cli.main(["export", str(run), "--format", "timm", str(out)]) == 0
    assert torch.equal(torch.load(out)["conv1.0.weight"], state["encoder_q.conv1.0.weight"])
    assert cli.main(["pretrain", "--resume", str(run), "--train.max_steps", "2"]) == 0
    assert load_checkpoint(run)["step"] == 2
    capsys.readouterr()
    for arch, said in (
        ("timm/resnet10t:pretrained", "no weights of timm for timm/resnet10t, on this disk"),
        ("timm/resnet10t.other:pretrained", r"Invalid pretrained tag \(other\)"),
        ("timm/test_vit4:pretrained", "No pretrained weights exist for test_vit4"),
    ):
        assert cli.main([*words, "--train.dir", str(tmp_path / "new"), "--model.arch", arch]) == 2
        error = capsys.readouterr().err
        assert re.search(said, error) and "model.arch" in error and "--init" in error


def test_a_trial_of_an_encoder_leaves_modes_and_random_numbers_as_they_are() -> None:
    pytest.importorskip("timm")
    import timm

    torch.manual_seed(0)
    encoder = build_encoder("timm/resnet18", 32)(num_classes=5)
    ours = torch.rand(3)
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=5, in_chans=3)
    assert torch.equal(ours, torch.rand(3))
    assert all(part.training for part in encoder.modules())
    for name, value in theirs.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value)


def test_tokens_and_maps_are_pooled() -> None:
    maps = torch.randn(2, 5, 3, 4)
    assert torch.equal(pooled(maps, channels_last=False), maps.mean((2, 3)))
    assert torch.equal(pooled(maps, channels_last=True), maps.mean((1, 2)))
    assert torch.equal(pooled(maps[..., 0], channels_last=True), maps[..., 0].mean(1))
    with pytest.raises(ValueError, match="features"):
        pooled(torch.zeros(2), channels_last=False)


def test_distilled_models_average_both_heads(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    name = "deit_tiny_distilled_patch16_224"
    model = MoCo(build_encoder(f"timm/{name}", 32), dim=8, queue_size=16)
    encoder, images = model.encoder_q.eval(), torch.randn(2, 3, 32, 32)
    theirs = timm.create_model(name, num_classes=0, img_size=32).eval()
    theirs.load_state_dict(backbone_state_dict(model))  # strict: without any head
    with torch.no_grad():
        torch.testing.assert_close(features(encoder, images), theirs(images), rtol=0, atol=1e-6)
        replace_head(encoder, nn.Linear(192, 3))
        assert encoder(images).shape == (2, 3)


@pytest.mark.parametrize(
    "name",
    [
        "caformer_s18",  # head.fc.fc2, without head.fc.fc1
        "cpubone_b0_bfrobust",  # head.classifier.linear
        "efficientvit_m0",  # head.linear
        "inception_next_atto",  # head.fc2, and head.fc1 stays
        "levit_128s",  # head.linear, head_dist.linear
        "repvit_m0_9",  # head.head.l, head.head_dist.l
        "shvit_s1",  # head.l
    ],
)
def test_heads_are_what_timm_leaves_out_without_classes(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model, theirs = timm.create_model(name), timm.create_model(name, num_classes=0)
    heads = tuple(f"{head}." for head in head_names(model))
    assert [n for n in model.state_dict() if not n.startswith(heads)] == list(theirs.state_dict())


def test_auxiliary_heads_do_not_count() -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder: Any = build_encoder("timm/volo_d1_224", 32)(num_classes=2).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = encoder.forward_head(encoder.forward_features(images), pre_logits=True)
        torch.testing.assert_close(features(encoder, images), expected, rtol=0, atol=0)


def test_heads_of_several_widths_are_trained_and_replaced_each() -> None:
    pytest.importorskip("timm")
    from mocofast.evaluate.finetune import _replace_head

    config = Config()
    config.augment.size = 240
    model = MoCo(build_encoder("timm/crossvit_tiny_240", 240), dim=8, queue_size=16, mlp=True)
    encoder, images = model.encoder_q, torch.randn(1, 3, 240, 240)
    with evaluating(encoder), torch.no_grad():
        assert features(encoder, images).shape == (1, 96 + 192)
        _replace_head(encoder, 3, config, torch.device("cpu"))
        assert encoder(images).shape == (1, 3)


@pytest.mark.parametrize("arch", ["vit_tiny_cifar", "timm/vit_tiny_patch16_224"])
def test_drop_path_drops_branches_of_the_query_encoder_alone(arch: str) -> None:
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = MoCo(build_encoder(arch, 32, drop_path=0.5, layer_scale=0.5), dim=8, queue_size=16)
    gammas = [p for n, p in model.encoder_q.named_parameters() if n.endswith("gamma")]
    assert len(gammas) == 2 * (6 if arch == "vit_tiny_cifar" else 12)
    assert all((gamma == 0.5).all() for gamma in gammas)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(model.encoder_q(images), model.encoder_q(images))
        assert torch.equal(model.encoder_k(images), model.encoder_k(images))
        model.eval()
        torch.testing.assert_close(model.encoder_q(images), model.encoder_k(images))


def test_layer_scale_of_ones_changes_nothing_and_zeros_leave_the_embedding() -> None:
    torch.manual_seed(0)
    plain = build_encoder("vit_micro_cifar", 32)(num_classes=5)
    torch.manual_seed(0)
    scaled = build_encoder("vit_micro_cifar", 32, layer_scale=1.0)(num_classes=5)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(images), scaled(images))
    with torch.no_grad():
        for name, parameter in scaled.named_parameters():
            if name.endswith("gamma"):
                parameter.zero_()
        token = (scaled.class_token + scaled.encoder.pos_embedding[:, :1])[:, 0]
        expected = scaled.heads(scaled.encoder.ln(token)).expand(2, -1)
        torch.testing.assert_close(scaled(images), expected)


def test_options_of_residual_branches_are_refused_where_there_are_none() -> None:
    for options, said in (({"drop_path": 0.1}, "drop_path"), ({"layer_scale": 0.1}, "layer_scale")):
        with pytest.raises(ConfigError, match=rf"model.{said}: expected 0 for model.arch resnet18"):
            build_encoder("resnet18", **options)
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=r"model.layer_scale: timm/resnet18 has no such option"):
        build_encoder("timm/resnet18", 32, layer_scale=0.1)(num_classes=3)


@pytest.mark.parametrize(
    ("arch", "width", "layers"), [("vit_large", 1024, 24), ("vit_huge", 1280, 32)]
)
def test_large_vits_have_moco_v3s_embedding_and_a_frozen_patch_projection(
    arch: str, width: int, layers: int
) -> None:
    with torch.device("meta"):
        encoder = build_encoder(arch)(num_classes=8)
    assert len(encoder.encoder.layers) == layers and encoder.hidden_dim == width
    assert not encoder.conv_proj.weight.requires_grad
    assert not encoder.encoder.pos_embedding.requires_grad
    assert encoder.encoder.pos_embedding.shape == (1, 1 + (224 // encoder.patch_size) ** 2, width)


class OfVectors(nn.Module):
    """An encoder of measured numbers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.net(x))


@pytest.mark.parametrize(
    ("encoder", "shape", "width", "kind"),
    [
        (r3d_18, (4, 3, 4, 16, 16), 512, SplitBatchNorm3d),
        (OfVectors, (8, 10), 12, SplitBatchNorm1d),
    ],
    ids=["video", "vectors"],
)
def test_videos_and_vectors_train_with_split_batch_norm(
    encoder: Callable[..., nn.Module],
    shape: tuple[int, ...],
    width: int,
    kind: type[SplitBatchNorm],
) -> None:
    torch.manual_seed(0)
    model = MoCo(encoder, dim=8, queue_size=16, mlp=True, bn_splits=2)
    norms = [m for m in model.encoder_q.modules() if isinstance(m, _BatchNorm)]
    assert norms and all(type(m) is kind for m in norms)
    view = torch.randn(shape)
    before = [p.detach().clone() for p in model.encoder_q.parameters()]
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.01)
    model(view, view + 0.1 * torch.randn(shape)).loss.backward()
    optimizer.step()
    for p, old in zip(model.encoder_q.parameters(), before):
        # A bias before BatchNorm has no gradient.
        assert p.isfinite().all() and (p.dim() == 1 or not torch.equal(p, old))
    assert (model.queue_ptr, features(model.encoder_q.eval(), view).shape) == (
        len(view),
        (len(view), width),
    )
