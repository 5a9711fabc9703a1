"""Files of other projects load, and their encoders give the features of the other project.

lightly and timm make their files themselves. The files of all others are made from the names that
the projects document (docs/checkpoints.md).
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from mocofast import MoCo, cli
from mocofast.config import ConfigError
from mocofast.interop import to_reference_state_dict
from mocofast.interop.reference_checkpoints import load_any
from mocofast.models.encoders import features

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
        | under("momentum_backbone.", {n: torch.zeros_like(v) for n, v in w.items()})
        | under("projector.0.", HEAD)
        | {"queue": torch.zeros(2, 128, 64)}
    },
    "mmselfsup": lambda w: {"meta": {"epoch": 1}, "state_dict": under("backbone.", w)},
    "VISSL": lambda w: {
        "classy_state_dict": {
            "base_model": {
                "model": {"trunk": under("_feature_blocks.", w), "heads": under("0.clf.", HEAD)}
            }
        }
    },
    "DINO": lambda w: {
        "student": under("module.backbone.", {n: torch.zeros_like(v) for n, v in w.items()}),
        "teacher": under("backbone.", w) | under("head.mlp.0.", HEAD),
        "epoch": 3,
    },
    "wrappers": lambda w: {"model": under("_orig_mod.module.model.", w)},
    "wrappers, other order": lambda w: {"model_state_dict": under("module._orig_mod.", w)},
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


def assert_features(ours: nn.Module, theirs: Callable[[Tensor], Tensor], size: int) -> None:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = features(ours.eval(), images), theirs(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected.flatten(1), rtol=1e-5, atol=1e-5)


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
    for content in ({"state_dict": weights, "path": Path("x")}, resnet):
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
