"""Makes checkpoints of other projects by their own code, and features of their own encoders.

    PYTHONPATH=PROJECT python tests/other_projects.py NAME FILE

writes FILE, and FILE.features with images and features. `tests/other_projects.sh` installs the
projects, with versions.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

SMALL, LARGE = (3, 64, 64), (3, 224, 224)


class Made(NamedTuple):
    """The project's own encoder in eval mode, and the shape (C, H, W) of its images."""

    features: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int]


def renewed(model: nn.Module) -> nn.Module:
    """Gives statistics, scales and tokens values that a mistaken name would show."""
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
    for name, weight in model.named_parameters():
        if weight.requires_grad and name.endswith(("gamma", "pos_embed", "token", "tokens")):
            nn.init.normal_(weight, 0, 0.5)
    return model.eval()


def wrapped(model: nn.Module) -> nn.Module:
    """Wraps by DistributedDataParallel, whose checkpoints have the prefix `module.`."""
    if not dist.is_initialized():
        store = f"file://{tempfile.mkdtemp()}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


def save_by_lightning(module: Any, path: Path) -> None:
    import lightning.pytorch as pl

    trainer = pl.Trainer(
        max_epochs=0,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


def moco(path: Path, published: bool) -> Made:
    """published: the query encoder alone, as in the published files."""
    import main_moco
    import moco.builder
    import torchvision

    model = renewed(moco.builder.MoCo(torchvision.models.resnet18, 16, 64, 0.999, 0.07, True))
    weights = wrapped(model).state_dict()
    if published:
        weights = {n: t for n, t in weights.items() if n.startswith("module.encoder_q.")}
    state = {"epoch": 3, "arch": "resnet18", "state_dict": weights}
    main_moco.save_checkpoint({**state, "optimizer": {}}, is_best=False, filename=path)
    model.encoder_q.fc = nn.Identity()
    return Made(model.encoder_q, SMALL)


def moco_v3(path: Path, arch: str) -> Made:
    import main_moco
    import moco.builder
    import torchvision
    import vits

    if arch.startswith("vit"):
        encoder = functools.partial(vits.__dict__[arch], stop_grad_conv1=True)
        model = renewed(moco.builder.MoCo_ViT(encoder, 32, 64, 0.2))
    else:
        model = renewed(moco.builder.MoCo_ResNet(torchvision.models.__dict__[arch], 32, 64, 1.0))
    state = {"epoch": 3, "arch": arch, "state_dict": wrapped(model).state_dict()}
    main_moco.save_checkpoint(
        {**state, "optimizer": {}, "scaler": {}}, is_best=False, filename=path
    )
    setattr(model.base_encoder, "head" if arch.startswith("vit") else "fc", nn.Identity())
    return Made(model.base_encoder, LARGE if arch.startswith("vit") else SMALL)


def moco_v3_linear(path: Path, arch: str) -> Made:
    """A linear classifier as `main_lincls.py` builds and saves it."""
    import main_lincls
    import torchvision
    import vits

    is_vit = arch.startswith("vit")
    model = renewed((vits if is_vit else torchvision.models).__dict__[arch]())
    state = {"epoch": 3, "arch": arch, "state_dict": wrapped(model).state_dict()}
    whole = {**state, "best_acc1": 0.0, "optimizer": {}}
    main_lincls.save_checkpoint(whole, is_best=False, filename=path)
    setattr(model, "head" if is_vit else "fc", nn.Identity())
    return Made(model, LARGE if is_vit else SMALL)


def solo_learn(path: Path, method: str, backbone: str, dataset: str = "custom") -> Made:
    import solo.methods
    from omegaconf import OmegaConf

    is_vit = backbone.startswith("vit")
    sizes = {"proj_hidden_dim": 64, "proj_output_dim": 32, "pred_hidden_dim": 64}
    optimizer = {"name": "sgd", "batch_size": 8, "lr": 0.1, "classifier_lr": 0.1}
    config = {
        "name": "test",
        "method": method,
        "backbone": {"name": backbone, "kwargs": {"img_size": 224} if is_vit else {}},
        "data": {
            "dataset": dataset,
            "num_large_crops": 2,
            "num_small_crops": 0,
            "num_classes": 10,
        },
        "method_kwargs": {**sizes, "temperature": 0.2, "queue_size": 128},
        "optimizer": {**optimizer, "weight_decay": 0.0},
        "scheduler": {"name": "none"},
        "max_epochs": 1,
        "momentum": {"base_tau": 0.99, "final_tau": 1.0},
    }
    model = renewed(solo.methods.METHODS[method](OmegaConf.create(config)))
    save_by_lightning(model, path)
    return Made(model.backbone, LARGE if is_vit else SMALL)


def torchgeo(path: Path, version: int, channels: int) -> Made:
    from torchgeo.trainers import MoCoTask

    sizes = {"layers": 2, "hidden_dim": 64, "output_dim": 32, "memory_bank_size": 64}
    task = MoCoTask(model="resnet18", in_channels=channels, version=version, **sizes)
    save_by_lightning(renewed(task), path)
    return Made(task.backbone, (channels, 64, 64))


def vissl(path: Path) -> Made:
    import vissl
    import yaml
    from classy_vision.generic.util import get_checkpoint_dict
    from vissl.config import AttrDict
    from vissl.models.base_ssl_model import BaseSSLMultiInputOutputModel

    defaults = Path(vissl.__file__).parent / "config" / "defaults.yaml"
    config = AttrDict(yaml.safe_load(defaults.read_text()))["config"]
    config.MODEL.TRUNK.NAME = "resnet"
    config.MODEL._MODEL_INIT_SEED = 0
    config.MODEL.HEAD.PARAMS = [["mlp", {"dims": [2048, 64, 32]}]]
    model = renewed(BaseSSLMultiInputOutputModel(config.MODEL, config.OPTIMIZER))

    class Task:
        def get_classy_state(self, deep_copy: bool = False) -> dict[str, Any]:
            return {"train": True, "base_model": model.get_classy_state(deep_copy)}

    torch.save(get_checkpoint_dict(Task(), None), path)
    return Made(lambda images: model.trunk(images, ["flatten"])[0], SMALL)


def mmpretrain(path: Path, config: dict[str, Any], package: str = "mmpretrain") -> nn.Module:
    """package: mmpretrain, or mmselfsup, its older name."""
    from mmengine.runner.checkpoint import save_checkpoint

    importlib.import_module(f"{package}.utils").register_all_modules()
    model = importlib.import_module(f"{package}.registry").MODELS.build(config)
    model.init_weights()
    renewed(model)
    save_checkpoint({"meta": {"epoch": 3}, "state_dict": model.state_dict()}, str(path))
    return model


def mmpretrain_moco(path: Path, package: str) -> Made:
    losses = {"mmpretrain": "CrossEntropyLoss", "mmselfsup": "mmcls.CrossEntropyLoss"}
    backbones = {"mmpretrain": "ResNet", "mmselfsup": "mmcls.ResNet"}
    loss = {"type": losses[package], "loss_weight": 1.0}
    neck = {"type": "MoCoV2Neck", "in_channels": 512, "hid_channels": 64, "out_channels": 16}
    config = {
        "type": "MoCo",
        "queue_len": 64,
        "feat_dim": 16,
        "backbone": {"type": backbones[package], "depth": 18, "norm_cfg": {"type": "BN"}},
        "neck": neck,
        "head": {"type": "ContrastiveHead", "loss": loss, "temperature": 0.2},
    }
    model = mmpretrain(path, config, package)
    return Made(lambda images: model.backbone(images)[-1].mean((2, 3)), SMALL)


def mmpretrain_vit(path: Path) -> Made:
    loss = {"type": "CrossEntropyLoss", "loss_weight": 1.0}
    neck = {"type": "NonLinearNeck", "hid_channels": 64, "out_channels": 32, "with_bias": False}
    head = {"type": "MoCoV3Head", "loss": loss, "temperature": 0.2}
    size = {"img_size": 224, "patch_size": 16}
    config = {
        "type": "MoCoV3",
        "backbone": {"type": "MoCoV3ViT", "arch": "mocov3-small", **size},
        "neck": {**neck, "in_channels": 384, "with_avg_pool": False},
        "head": {**head, "predictor": {**neck, "in_channels": 32, "with_avg_pool": False}},
    }
    model = mmpretrain(path, config)
    return Made(lambda images: model.backbone(images)[-1], LARGE)


def dino(path: Path, arch: str) -> Made:
    import torchvision
    import utils
    import vision_transformer

    is_vit = arch.startswith("vit")
    models = []
    for _ in ("student", "teacher"):
        kind = vision_transformer if is_vit else torchvision.models
        encoder = kind.__dict__[arch]()
        dim = encoder.embed_dim if is_vit else encoder.fc.in_features
        head = vision_transformer.DINOHead(dim, 32)
        models.append(renewed(utils.MultiCropWrapper(encoder, head)))
    student, teacher = models
    state = {"student": wrapped(student).state_dict(), "teacher": teacher.state_dict()}
    args = argparse.Namespace(arch=arch, patch_size=16)
    utils.save_on_master({**state, "optimizer": {}, "epoch": 4, "args": args}, path)
    return Made(teacher.backbone, LARGE if is_vit else SMALL)


def dinov2(path: Path, registers: int) -> Made:
    """The hub's model, and its weights as they are published."""
    from dinov2.hub.backbones import _make_dinov2_model

    model = _make_dinov2_model(
        arch_name="vit_small", img_size=224, pretrained=False, num_register_tokens=registers
    )
    torch.save(renewed(model).state_dict(), path)
    return Made(model, LARGE)


def dinov2_teacher(path: Path, registers: int) -> Made:
    """The teacher's file of a training, whose blocks come in chunks."""
    from dinov2.models.vision_transformer import vit_small

    options = {"init_values": 1e-5, "block_chunks": 4, "num_register_tokens": registers}
    model = renewed(vit_small(img_size=224, patch_size=14, **options))
    torch.save({"teacher": nn.ModuleDict({"backbone": model}).state_dict()}, path)
    return Made(model, LARGE)


# {name: (folder of the project, maker)}
MAKERS: dict[str, tuple[str, Callable[[Path], Made]]] = {
    "moco": ("moco", functools.partial(moco, published=False)),
    "moco-published": ("moco", functools.partial(moco, published=True)),
    "moco-v3-vit": ("moco-v3", functools.partial(moco_v3, arch="vit_small")),
    "moco-v3-resnet": ("moco-v3", functools.partial(moco_v3, arch="resnet50")),
    "moco-v3-linear-vit": ("moco-v3", functools.partial(moco_v3_linear, arch="vit_small")),
    "moco-v3-linear-resnet": ("moco-v3", functools.partial(moco_v3_linear, arch="resnet50")),
    "solo-learn": ("solo-learn", lambda path: solo_learn(path, "mocov2plus", "resnet18")),
    "solo-learn-cifar": (
        "solo-learn",
        lambda path: solo_learn(path, "mocov2plus", "resnet18", "cifar10"),
    ),
    "solo-learn-vit": ("solo-learn", lambda path: solo_learn(path, "mocov3", "vit_tiny")),
    "torchgeo": ("torchgeo", functools.partial(torchgeo, version=2, channels=13)),
    "torchgeo-v1": ("torchgeo", functools.partial(torchgeo, version=1, channels=2)),
    "vissl": ("vissl", vissl),
    "mmpretrain": ("mmpretrain", functools.partial(mmpretrain_moco, package="mmpretrain")),
    "mmselfsup": ("mmselfsup", functools.partial(mmpretrain_moco, package="mmselfsup")),
    "mmpretrain-vit": ("mmpretrain", mmpretrain_vit),
    "dino-vit": ("dino", functools.partial(dino, arch="vit_small")),
    "dino-resnet": ("dino", functools.partial(dino, arch="resnet50")),
    "dinov2": ("dinov2", functools.partial(dinov2, registers=0)),
    "dinov2-registers": ("dinov2", functools.partial(dinov2, registers=4)),
    "dinov2-teacher": ("dinov2", functools.partial(dinov2_teacher, registers=0)),
    "dinov2-teacher-registers": ("dinov2", functools.partial(dinov2_teacher, registers=4)),
}


if __name__ == "__main__":
    torch.manual_seed(0)
    made = MAKERS[sys.argv[1]][1](Path(sys.argv[2]))
    images = torch.randn(2, *made.shape)
    with torch.no_grad():
        torch.save({"images": images, "features": made.features(images)}, f"{sys.argv[2]}.features")
