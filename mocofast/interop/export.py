"""A trained query encoder for other software: torchvision, timm, detectron2, safetensors, and MoCo's own format.

The query encoder is the one to take: it is what gradients trained, and what the papers evaluate. The key encoder
is its moving average and only served the queue.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import list_models

from mocofast import files
from mocofast.config import Config, ConfigError
from mocofast.interop.weights import backbone_state_dict, to_reference_state_dict
from mocofast.methods.moco import MoCo
from mocofast.models.vit import SIZES
from mocofast.settings import nearest
from mocofast.train.checkpoint import model_from_checkpoint

FORMATS = ("torchvision", "timm", "detectron2", "reference", "safetensors")


class Exported(NamedTuple):
    """What was written."""

    path: Path
    tensors: int
    of: str  # which part of the model
    how_to_load: str  # Python lines

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.tensors} tensors, {self.of}. To load them:\n\n{self.how_to_load}\n"
        )


def export(checkpoint: Mapping[str, Any], format: str, out: str | Path) -> Exported:
    """Write the model of `checkpoint` (as `load_checkpoint` returns it) to `out` in another format.

    torchvision, safetensors: the query encoder without its head, a flat dict of tensors under torchvision's names.
        torchvision's and timm's are written with torch.save, or as safetensors where `out` ends in .safetensors.
    timm: likewise, for the ResNet family, whose names timm shares.
    detectron2: a pickle with the names of detectron2's ResNet backbone (the published R50 is used as R50-C4).
    reference: a whole checkpoint of facebookresearch/moco, both encoders and queue, from which it can train on.
    The file appears whole or not at all. Raises ConfigError (a ValueError) for an unknown format, a suffix that
    contradicts it, or an encoder that the format cannot express.
    """
    out = Path(out)
    if format not in FORMATS:
        raise ConfigError(
            f"format: expected one of {', '.join(FORMATS)}, got {format!r}{nearest(format, FORMATS)}"
        )
    is_safetensors = out.suffix == ".safetensors"
    if format == "safetensors" and not is_safetensors:
        raise ConfigError(f"out: expected a name ending in .safetensors, got {out}")
    if is_safetensors and format in ("detectron2", "reference"):
        raise ConfigError(f"out: format {format} has a file format of its own, got {out}")
    model, config = model_from_checkpoint(dict(checkpoint))
    _check_arch(format, config.model.arch)
    if format == "reference":
        if not isinstance(model, MoCo):
            raise ConfigError(
                f"format: reference is facebookresearch/moco's, got model.method {config.model.method}"
            )
        whole = _reference(model, config.model.arch, checkpoint)
        _write(out, lambda file: torch.save(whole, file))
        count = len(whole["state_dict"])
    else:
        # Contiguous, since safetensors knows no channels-last.
        backbone = {name: value.contiguous() for name, value in backbone_state_dict(model).items()}
        count = len(backbone)
        if format == "detectron2":
            _write(out, lambda file: file.write_bytes(pickle.dumps(_detectron2(backbone))))
        elif is_safetensors:
            _write(
                out,
                lambda file: save_file(backbone, file, {"format": "pt", "arch": config.model.arch}),
            )
        else:
            _write(out, lambda file: torch.save(backbone, file))
    part = (
        "both encoders and the queue"
        if format == "reference"
        else "the query encoder without its head"
    )
    return Exported(out, count, part, _how_to_load(format, config, out))


def _reference(model: MoCo, arch: str, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    state = {f"module.{name}": tensor for name, tensor in to_reference_state_dict(model).items()}
    content = {"epoch": checkpoint["epoch"], "arch": arch, "state_dict": state}
    if "optimizer" in checkpoint:
        optimizer = checkpoint["optimizer"]
        # Its optimiser also lists the key encoder's parameters, after the query encoder's, though they never move.
        (group,) = optimizer["param_groups"]
        whole = {**group, "params": list(range(2 * len(group["params"])))}
        content["optimizer"] = {"state": optimizer["state"], "param_groups": [whole]}
    return content


def _detectron2(backbone: dict[str, Tensor]) -> dict[str, Any]:
    """detectron2's file of a torchvision ResNet, as facebookresearch/moco's converter lays it out."""
    model = {}
    for name, tensor in backbone.items():
        name = name if name.startswith("layer") else f"stem.{name}"
        name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
        name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        model[name] = tensor.numpy()
    return {"model": model, "__author__": "MOCO", "matching_heuristics": True}


def _check_arch(format: str, arch: str) -> None:
    plain = arch.removesuffix("_cifar")
    is_resnet = re.fullmatch(r"(wide_resnet|resnext|resnet)\d\w*", plain) is not None
    if format == "timm" and not is_resnet:
        raise ConfigError(
            f"format: timm is for the ResNet family, got model.arch {arch}; torchvision works"
        )
    if format == "detectron2" and (not is_resnet or plain != arch):
        raise ConfigError(
            f"format: detectron2 is for ResNets with their 7x7 stem, got model.arch {arch}"
        )


def _how_to_load(format: str, config: Config, out: Path) -> str:
    arch, path, mean, std = config.model.arch, str(out), config.augment.mean, config.augment.std
    if format == "reference" and arch in list_models(module=torchvision.models):
        m = config.model
        mlp = " --mlp" if m.mlp else ""
        return (
            f"python main_moco.py --arch {arch} --resume {path} --moco-dim {m.dim} --moco-k {m.queue_size}{mlp} ..."
            "    # facebookresearch/moco"
        )
    if format == "reference":  # an encoder that the reference's own program cannot build
        return (
            f"import torch, mocofast.interop\n"
            f"mocofast.interop.load_reference_state_dict(model, torch.load({path!r}))    # model: a mocofast.MoCo"
        )
    if format == "detectron2":
        bytes_mean, bytes_std = ([round(255 * value, 3) for value in part] for part in (mean, std))
        return (
            f"MODEL.WEIGHTS {path} INPUT.FORMAT RGB MODEL.PIXEL_MEAN {bytes_mean} MODEL.PIXEL_STD {bytes_std} "
            "MODEL.RESNETS.STRIDE_IN_1X1 False    # options of detectron2"
        )
    plain = arch.removesuffix("_cifar")
    if format == "timm":
        library, make = "timm", f'model = timm.create_model("{plain}", num_classes=0)'
    elif arch == "resnet_tiny" or arch in SIZES:
        made = f'mocofast.models.encoders.build_encoder("{arch}", {config.augment.size})'
        library, make = "mocofast.models.encoders", f"model = {made}(num_classes=1)"
    else:
        size = f"image_size={config.augment.size}" if arch.startswith("vit_") else ""
        library, make = "torchvision", f"model = torchvision.models.{plain}({size})"
    lines = [f"import torch, {library}", make]
    if format != "timm":
        lines[-1] += f"; model.{'heads' if arch.startswith('vit_') else 'fc'} = torch.nn.Identity()"
    if plain != arch and arch not in SIZES:
        lines += [
            "model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False); model.maxpool = torch.nn.Identity()"
        ]
    if out.suffix == ".safetensors":
        lines[0] += ", safetensors.torch"
        lines += [f"model.load_state_dict(safetensors.torch.load_file({path!r}))"]
    else:
        lines += [f"model.load_state_dict(torch.load({path!r}))"]
    lines += [f"# images: RGB from 0 to 1, normalised with mean {list(mean)} and std {list(std)}"]
    return "\n".join(lines)


def _write(path: Path, save: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as file:
        save(file)
