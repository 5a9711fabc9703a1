"""Files of other projects load, and their encoders give the features of the other project.

lightly and timm make their files themselves. The files of all others are made from names.
tests/test_other_projects.py takes the projects' own code (docs/checkpoints.md).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from mocofast import MoCo, cli
from mocofast.config import ConfigError
from mocofast.interop import to_reference_state_dict
from mocofast.interop.export import export
from mocofast.interop.reading import tensors_of
from mocofast.interop.reference_checkpoints import as_checkpoint, load_any
from mocofast.models.encoders import features
from mocofast.models.vit import sincos_position_embedding
from mocofast.train.checkpoint import load_checkpoint
from tests.runs import make_images

Weights = dict[str, Tensor]


def renewed(module: nn.Module) -> nn.Module:
    """Gives BatchNorm statistics and weights that a mistaken name would show."""
    torch.manual_seed(3)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.weight, 1, 0.1)
            nn.init.normal_(part.bias, 0, 0.1)
    return module.eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    return renewed(model)


def under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value.clone() for name, value in weights.items()}


def zeros(weights: Weights) -> Weights:
    return {name: torch.zeros_like(value) for name, value in weights.items()}


HEAD = {"weight": torch.zeros(128, 512), "bias": torch.zeros(128)}
LAYOUTS: dict[str, Callable[[Weights], Any]] = {
    "torchvision": lambda w: w | under("fc.", HEAD),
    "moco, published": lambda w: {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": under("module.encoder_q.", w | under("fc.", HEAD)),
    },
    "moco-v3": lambda w: {
        "arch": "resnet18",
        "state_dict": under("module.base_encoder.", w | under("fc.0.", HEAD))
        | under("module.momentum_encoder.", w),
    },
    "moco-v3, linear": lambda w: {"state_dict": under("module.", w | under("fc.", HEAD))},
    "solo-learn": lambda w: {
        "state_dict": under("backbone.", w)
        | under("momentum_backbone.", zeros(w))
        | under("projector.0.", HEAD)
        | {"queue": torch.zeros(2, 128, 64)}
    },
    "mmselfsup": lambda w: {"meta": {"epoch": 1}, "state_dict": under("backbone.", w)},
    "mmpretrain": lambda w: {
        "state_dict": under("backbone.", w)
        | under("encoder_k.module.0.", zeros(w))
        | {"queue": torch.zeros(128, 64), "queue_ptr": torch.zeros(1)}
    },
    "VISSL": lambda w: {
        "classy_state_dict": {
            "base_model": {
                "model": {"trunk": under("_feature_blocks.", w), "heads": under("0.clf.", HEAD)}
            }
        }
    },
    "DINO": lambda w: {
        "student": under("module.backbone.", zeros(w)),
        "teacher": under("backbone.", w) | under("head.mlp.0.", HEAD),
        "epoch": 3,
    },
    "wrappers": lambda w: {"model": under("_orig_mod.module.model.", w)},
    "wrappers, other order": lambda w: {"model_state_dict": under("module._orig_mod.", w)},
    "wrappers of parts": lambda w: {
        f"_fsdp_wrapped_module.{n.replace('.', '._checkpoint_wrapped_module.', 1)}": value
        for n, value in w.items()
    },
    "DDP of the encoders alone": lambda w: {
        "state_dict": under("encoder_q.module.", w) | under("encoder_k.module.", zeros(w))
    },
    "Lightning, DINO, compiled, with a loss": lambda w: {
        "state_dict": under("student._orig_mod.backbone.", zeros(w))
        | under("teacher._orig_mod.backbone.", w)
        | under("teacher._orig_mod.head.mlp.0.", HEAD)
        | {"loss.center": torch.zeros(1, 128)}
    },
    "Lightning, MoCo in a part, with a metric": lambda w: {
        "state_dict": under("model.encoder_q.", w)
        | under("model.encoder_k.", zeros(w))
        | {"accuracy.total": torch.zeros(1)}
    },
    "SwAV": lambda w: (
        under("module.", w | under("projection_head.0.", HEAD))
        | {"module.prototypes.weight": torch.zeros(30, 128)}
    ),
    "byol-pytorch": lambda w: (
        under("online_encoder.net.", w)
        | under("online_encoder.projector.0.", HEAD)
        | under("target_encoder.net.", zeros(w))
    ),
    "heads beside the encoder": lambda w: (
        w
        | under("projector.0.", HEAD)
        | under("predictor.0.", HEAD)
        | under("decoder_blocks.0.", HEAD)
    ),
    "torchvision's training, with averages": lambda w: {
        "model": zeros(w),
        "model_ema": under("module.", w) | {"n_averaged": torch.tensor(3)},
    },
    "argparse": lambda w: {"args": argparse.Namespace(lr=0.1), "model": w},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_features_of_its_encoder(
    layout: str, resnet: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "foreign.pth"
    torch.save(LAYOUTS[layout](dict(resnet.state_dict())), path)
    loaded = load_any(str(path))
    assert loaded.config.model.arch == "resnet18"
    assert_features(loaded.method.encoder_q, resnet, 64)


def test_wrappers_may_stand_in_any_order() -> None:
    weights = {"conv1.weight": torch.zeros(1), "layer1.0.bn1.bias": torch.ones(2)}
    for names in itertools.permutations(("module.", "_orig_mod.", "model.", "_forward_module.")):
        found = tensors_of({"state_dict": under("".join(names), weights)})
        assert found.keys() == weights.keys(), names


def assert_features(ours: nn.Module, theirs: Callable[[Tensor], Tensor], size: int) -> None:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = features(ours.eval(), images), theirs(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected.flatten(1), rtol=1e-5, atol=1e-5)


def test_solo_learns_stem_for_small_images_pads_two_pixels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    model.fc = model.maxpool = nn.Identity()
    model.conv1 = nn.Conv2d(3, 64, 3, padding=2, bias=False)
    weights = dict(renewed(model).state_dict())
    for other, arch in (
        (under("projector.0.", HEAD), "resnet18_solo_cifar"),
        ({}, "resnet18_cifar"),
    ):
        state = under("backbone.", weights) | under("classifier.", HEAD) | other
        torch.save({"state_dict": state}, tmp_path / "solo.ckpt")
        loaded = load_any(str(tmp_path / "solo.ckpt"))
        assert loaded.config.model.arch == arch
        if other:
            assert_features(loaded.method.encoder_q, model, 32)
    path, out = str(tmp_path / "solo.ckpt"), tmp_path / "out.pt"
    torch.save({"state_dict": under("backbone.", weights)}, path)
    named = ("--model.arch", "resnet18_solo_cifar")
    assert cli.main(["export", path, *named, "--format", "torchvision", str(out)]) == 0
    exported: dict[str, Any] = {}
    lines = export(as_checkpoint(load_any(path, named[1])), "torchvision", out).how_to_load
    exec(lines, exported)
    assert_features(model, exported["model"].eval(), 32)


def moco_v3_vit(rows: int, columns: int) -> Any:
    """A ViT of MoCo v3 in timm's words: 12 heads, fixed positions."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    size = (16 * rows, 16 * columns)
    model = timm.models.VisionTransformer(size, embed_dim=192, num_heads=12, num_classes=0)
    model.pos_embed.data = sincos_position_embedding(rows, columns, 192)
    return model.eval()


@pytest.mark.parametrize("names", ["timm", "mmpretrain"])
def test_fixed_positions_tell_the_heads_of_moco_v3(names: str, tmp_path: Path) -> None:
    model = moco_v3_vit(2, 2)
    weights = dict(model.state_dict())
    if names == "mmpretrain":
        mm = {".mlp.fc1.": ".ffn.layers.0.0.", ".mlp.fc2.": ".ffn.layers.1.", ".norm": ".ln"}
        mm |= {"blocks.": "layers.", "patch_embed.proj.": "patch_embed.projection."}
        for old, new in {**mm, "norm.": "ln1."}.items():
            weights = {name.replace(old, new): value for name, value in weights.items()}
        weights = under("backbone.", weights)
    torch.save({"state_dict": weights}, tmp_path / "vit.pth")
    loaded = load_any(str(tmp_path / "vit.pth"))
    assert loaded.config.model.arch == "vit_tiny" and loaded.config.augment.size == 32
    assert_features(loaded.method.encoder_q, model, 32)


def test_a_vit_of_deit_is_not_taken_for_moco_v3s(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).eval()
    path = str(tmp_path / "vit.pth")
    torch.save(model.state_dict(), path)
    with pytest.raises(ConfigError, match=r"12 heads.*--model.arch timm/vit_tiny_patch16_224"):
        load_any(path, "vit_tiny")
    assert_features(load_any(path, "timm/vit_tiny_patch16_224").method.encoder_q, model, 32)
    rounded = {n: t.bfloat16() for n, t in moco_v3_vit(2, 2).state_dict().items()}
    torch.save(rounded, path)
    assert load_any(path, "vit_tiny").config.model.arch == "vit_tiny"
    # The error about weights of another network is that of its entries.
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(ConfigError, match="entries are missing"):
        load_any(path, "vit_tiny")


def test_positions_that_are_no_square_need_the_size_of_the_images(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images = moco_v3_vit(2, 5), torch.randn(3, 3, 32, 80)
    path, out = str(tmp_path / "vit.pth"), tmp_path / "out.onnx"
    torch.save(model.state_dict(), path)
    arch = ("--model.arch", "vit_tiny")
    for size, status in (("48,80", 2), ("32,80", 0)):
        given = [*arch, "--augment.size", size]
        assert cli.main(["export", path, *given, "--format", "onnx", str(out)]) == status
    with pytest.raises(ConfigError, match=r"10 patches.*--augment.size HEIGHT,WIDTH"):
        load_any(path, "vit_tiny")
    session = onnxruntime.InferenceSession(out)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-5, atol=1e-5)


def test_registers_and_chunks_of_dinov2_load(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    name = "vit_small_patch14_reg4_dinov2"
    model = timm.create_model(name, num_classes=0, img_size=28, init_values=0.5).eval()
    model.cls_token.data.normal_()
    weights = dict(model.state_dict())
    position = torch.randn(1, 1, 384)
    weights["register_tokens"] = weights.pop("reg_token")
    weights["pos_embed"] = torch.cat([position, weights["pos_embed"]], dim=1)
    weights["cls_token"] = weights["cls_token"] - position
    weights["mask_token"] = torch.zeros(1, 384)
    for chunk in range(4):  # of three blocks each
        for block in range(3 * chunk, 3 * chunk + 3):
            old, new = f"blocks.{block}.", f"chunk.{chunk}.{block}."
            weights = {n.replace(old, new): v for n, v in weights.items()}
    weights = {n.replace("chunk.", "blocks."): v for n, v in weights.items()}
    torch.save({"teacher": under("backbone.", weights)}, tmp_path / "teacher.pth")
    loaded = load_any(str(tmp_path / "teacher.pth"))
    assert loaded.config.model.arch == f"timm/{name}"
    assert_features(loaded.method.encoder_q, model, 28)


def test_safetensors_and_other_families_are_told_from_their_weights(tmp_path: Path) -> None:
    for name in ("resnet34", "resnext50_32x4d", "wide_resnet50_2"):
        with torch.device("meta"):
            shapes = torchvision.models.get_model(name).state_dict()
        save_file({n: torch.zeros_like(t, device="cpu") for n, t in shapes.items()}, tmp_path / "a")
        (tmp_path / "a").rename(tmp_path / f"{name}.safetensors")
        assert load_any(str(tmp_path / f"{name}.safetensors")).config.model.arch == name


def test_a_module_of_lightly_loads(resnet: nn.Module, tmp_path: Path) -> None:
    modules = pytest.importorskip("lightly.models.modules")
    lightning = pytest.importorskip("pytorch_lightning")

    class Model(lightning.LightningModule):
        """MoCo as lightly's examples write it."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(*list(resnet.children())[:-1])
            self.projection_head = modules.MoCoProjectionHead(512, 512, 128)
            self.backbone_momentum = nn.Sequential(nn.Linear(2, 2))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Model().eval()
    trainer = lightning.Trainer(
        max_epochs=0,
        logger=False,
        accelerator="cpu",
        barebones=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.strategy.connect(model)
    path = tmp_path / "lightly.ckpt"
    trainer.save_checkpoint(path)
    loaded = load_any(str(path))
    assert loaded.config.model.arch == "resnet18"
    assert_features(loaded.method.encoder_q, model.backbone, 64)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_masked_vits_of_lightly_load(library: str, tmp_path: Path) -> None:
    modules = pytest.importorskip("lightly.models.modules")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for _ in ("student", "teacher"):
        if library == "timm":
            vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
            made.append(modules.MaskedVisionTransformerTIMM(vit=vit))
        else:
            vit = torchvision.models.vit_b_32(image_size=64)
            made.append(modules.MaskedVisionTransformerTorchvision(vit=vit))
    student, teacher = made
    # As lightly's examples of DINO and of MAE name the parts.
    both = nn.ModuleDict({"student_backbone": student, "teacher_backbone": teacher})
    for parts in (both, nn.ModuleDict({"backbone": teacher})):
        torch.save({"state_dict": parts.state_dict()}, tmp_path / "lightly.ckpt")
        loaded = load_any(str(tmp_path / "lightly.ckpt"))
        assert_features(loaded.method.encoder_q, teacher.eval(), 64)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "vit_base_patch16_224"])
def test_weights_of_timm_load(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"depth": 12} if "vit" in name else {}
    model = renewed(timm.create_model(name, num_classes=0, **options))
    path = tmp_path / "timm.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    loaded = load_any(str(path))
    assert loaded.layout == "torchvision or timm"
    assert_features(loaded.method.encoder_q, model, 224)


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema"])
def test_averages_of_a_training_with_timm_are_taken_as_timm_takes_them(
    name: str, resnet: nn.Module, tmp_path: Path
) -> None:
    helpers = pytest.importorskip("timm.models")
    weights = dict(resnet.state_dict())
    path = tmp_path / "model_best.pth.tar"
    torch.save({"arch": "resnet18", "state_dict": zeros(weights), name: weights}, path)
    timms = helpers.load_state_dict(str(path))
    ours = load_any(str(path)).method.encoder_q.state_dict()
    assert timms["conv1.weight"].std() > 0
    assert all(torch.equal(ours[n], value) for n, value in timms.items())


@pytest.mark.parametrize(
    ("name", "arch", "expected"),
    [
        ("resnetaa50", None, "timm/resnetaa50"),  # weights of resnet50, and other features
        ("convnext_atto", None, "timm/convnext_atto"),
        ("convnext_atto", "timm/convnext_atto", "timm/convnext_atto"),
        ("resnet18", None, "resnet18"),
        ("resnet18", "timm/resnet18", "timm/resnet18"),
        ("resnet18.a1_in1k", None, "resnet18"),
        ("our-resnet", "resnet18", "resnet18"),
    ],
)
def test_a_training_with_timm_names_its_encoder(
    name: str, arch: str | None, expected: str, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    library = name if timm.is_model(name.partition(".")[0]) else "resnet18"
    model = renewed(timm.create_model(library, num_classes=0))
    path = tmp_path / "model_best.pth.tar"
    torch.save({"epoch": 3, "arch": name, "state_dict": model.state_dict()}, path)
    loaded = load_any(str(path), arch)
    assert loaded.config.model.arch == expected
    assert_features(loaded.method.encoder_q, model, 64)
    with pytest.raises(ConfigError, match=r"is |not the weights"):
        load_any(str(path), "resnet34")


@pytest.mark.parametrize("kind", ["shards", "index", "pickle"])
def test_folders_of_accelerate_and_transformers_load(
    kind: str, resnet: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path
    if kind == "pickle":  # as old versions of transformers write
        torch.save(resnet.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        accelerate = pytest.importorskip("accelerate")
        accelerate.Accelerator(cpu=True).save_model(resnet, str(tmp_path), max_shard_size="20MB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) == 3
        path = tmp_path / "model.safetensors.index.json" if kind == "index" else tmp_path
    loaded = load_any(str(path))
    assert_features(loaded.method.encoder_q, resnet, 64)


def test_an_index_of_files_elsewhere_or_missing_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    maps = [{"a": "../b.safetensors"}, {"a": index.name}, {"a": "x.bin"}, {"a": ["x"]}, 3]
    torch.save([torch.zeros(3)], tmp_path / "x.bin")
    for content in (*({"weight_map": each} for each in maps), []):
        index.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match="expected an index of safetensors"):
            load_any(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {"conv1.weight": "1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*1\.safetensors"):
        load_any(str(tmp_path))


def test_a_folder_of_distributed_checkpoints_is_named_with_the_way_out(
    resnet: nn.Module, tmp_path: Path
) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    dcp.save({"model": resnet.state_dict()}, checkpoint_id=str(tmp_path / "dcp"))
    with pytest.raises(FileNotFoundError) as error:
        load_any(str(tmp_path / "dcp"))
    words = str(error.value).split("python -m ")[1].rstrip(")").split()
    file = str(tmp_path / words.pop())
    subprocess.run([sys.executable, "-m", *words, file], check=True, capture_output=True)
    assert_features(load_any(file).method.encoder_q, resnet, 64)


def test_a_complete_checkpoint_of_moco_keeps_its_queue(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MoCo(torchvision.models.resnet18, dim=16, queue_size=64, mlp=True)
    path = tmp_path / "moco.pth.tar"
    state = under("module.", to_reference_state_dict(model))
    torch.save({"arch": "resnet18", "state_dict": state}, path)
    loaded = load_any(str(path))
    assert loaded.is_complete and loaded.layout == "facebookresearch/moco"
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.method.state_dict()[name], value), name
    # And exports as a checkpoint of mocofast does.
    out = tmp_path / "out.pth"
    assert cli.main(["export", str(path), "--format", "reference", str(out)]) == 0
    assert torch.equal(
        torch.load(out, weights_only=True)["state_dict"]["module.queue"], state["module.queue"]
    )


def test_published_weights_probe_and_export(resnet: nn.Module, tmp_path: Path) -> None:
    path, out = tmp_path / "published.pth", tmp_path / "out.pt"
    torch.save(LAYOUTS["moco, published"](dict(resnet.state_dict())), path)
    assert cli.main(["export", str(path), "--format", "torchvision", str(out)]) == 0
    written = torch.load(out, weights_only=True)
    assert written.keys() == resnet.state_dict().keys()
    assert all(torch.equal(written[n], v) for n, v in resnet.state_dict().items())
    assert cli.main(["export", str(path), "--format", "reference", str(out)]) == 2


@pytest.mark.parametrize("layout", ["moco, published", "safetensors"])
def test_every_command_reads_the_file_of_another_project(
    layout: str,
    resnet: nn.Module,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # results of a file go into runs/
    weights, path = dict(resnet.state_dict()), tmp_path / "foreign.safetensors"
    if layout == "safetensors":
        save_file(weights, path)
    else:
        torch.save(LAYOUTS[layout](weights), path := tmp_path / "foreign.pth")
    images = make_images(tmp_path / "images", 24)
    for part in ("train", "val"):
        shutil.copytree(images, tmp_path / "imagenet" / part)
    small = ("--augment.size", "32")
    fixed = ("--data.path", str(images), "--device", "cpu", *small)
    run = ["--train.dir", str(tmp_path / "run"), "--model.arch", "resnet18", "--data.workers", "0"]
    run += ["--data.batch_size", "4", "--model.queue_size", "8", "--train.max_steps", "1"]
    run += ["--knn.start", "false", "--train.device", "cpu", "--optim.lr", "0"]
    probe = ["-a", "resnet18", "-b", "8", "--epochs", "1", "-j", "0", str(tmp_path / "imagenet")]
    for words in (
        ["knn", str(path), *fixed],
        ["linear", str(path), *fixed],
        ["finetune", str(path), *fixed, "--finetune.epochs", "1"],
        ["embed", str(path), str(images), str(tmp_path / "features.npz"), *small],
        ["export", str(path), "--format", "torchvision", str(tmp_path / "out.pt")],
        ["pretrain", str(images), "--init", str(path), *run, *small],
        ["main_lincls", "--pretrained", str(path), *probe],
    ):
        assert cli.main(words) == 0, (words[0], capsys.readouterr().err)
    # The weights of the file came through.
    for out, prefix in (("out.pt", ""), ("run", "encoder_q.")):
        found = tmp_path / out
        state = load_checkpoint(found)["model"] if found.is_dir() else torch.load(found)
        assert torch.equal(
            state[f"{prefix}layer3.0.conv1.weight"], weights["layer3.0.conv1.weight"]
        )
    embedded = np.load(tmp_path / "features.npz")
    assert embedded["features"].shape == (24, 512)


def test_errors_are_short_and_say_what_to_do(
    resnet: nn.Module,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "x.pth"
    weights = dict(resnet.state_dict())

    def error_of(content: Any) -> str:
        torch.save(content, path)
        with pytest.raises(ConfigError) as error:
            load_any(str(path))
        assert len(str(error.value)) < 700 and str(error.value).startswith(str(path))
        return str(error.value)

    renamed = {f"{n}.extra" if n.startswith("layer3") else n: v for n, v in weights.items()}
    assert "entries are missing" in error_of(renamed)
    assert " more" in error_of(renamed)
    assert "--model.arch" in error_of({f"block{i}.weight": torch.zeros(2) for i in range(900)})
    assert "expected a dictionary of tensors" in error_of({"epoch": 3})
    other = {n.replace("layer1.0.conv2", "layer1.0.other"): v for n, v in weights.items()}
    assert "a ResNet of" in error_of(other)
    cifar = {f"layer1.0.conv{i}.weight": torch.zeros(16, 16, 3, 3) for i in (1, 2)}
    assert "a ResNet of" in error_of({"conv1.weight": torch.zeros(16, 3, 3, 3), **cifar})
    spoiled = {n: v.clone() for n, v in weights.items()}
    spoiled["conv1.weight"][0] = math.nan
    assert "conv1.weight hold" in error_of(spoiled)
    monkeypatch.chdir(tmp_path)
    place = argparse.Namespace(output_dir=Path("x"))
    for content in (
        {"state_dict": weights, "path": Path("x")},
        {"model": weights, "args": place},
        {"student": zeros(weights), "teacher": under("backbone.", weights), "args": place},
        {"epoch": 3, "model": resnet},
        resnet,
    ):
        torch.save(content, path)
        with pytest.raises(ConfigError, match="save its weights alone") as error:
            load_any(str(path))
        exec(shlex.split(str(error.value).partition("python -c ")[2])[0])
        saved = load_any("weights.pt")[0].encoder_q.state_dict()["conv1.weight"]
        assert torch.equal(saved, weights["conv1.weight"])
    with pytest.raises(FileNotFoundError):
        load_any(str(tmp_path / "nowhere"))
    # The command line names the file, and has no traceback.
    assert cli.main(["knn", str(path)]) == 2
    assert "Traceback" not in capsys.readouterr().err
