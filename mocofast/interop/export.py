"""Exports the query encoder: torchvision, timm, detectron2, safetensors, facebookresearch/moco.

The query encoder is trained by gradients and evaluated in the papers. The key encoder is a moving
average, needed only for the queue.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from mocofast import files
from mocofast.config import ConfigError
from mocofast.interop.formats import FORMATS
from mocofast.interop.graphs import SUFFIXES, graph_lines, write_graph
from mocofast.interop.hugging_face import check_transformers, transformers_lines, write_folder
from mocofast.interop.layouts import timm_names
from mocofast.interop.loading_lines import how_to_load
from mocofast.interop.text_export import text_lines, write_texts
from mocofast.interop.weights import backbone_state_dict, to_reference_state_dict
from mocofast.interop.zero_shot import with_texts
from mocofast.methods.moco import MoCo
from mocofast.models.encoders import SOLO
from mocofast.models.libraries import TIMM
from mocofast.settings import nearest
from mocofast.train.checkpoint import model_from_checkpoint
from mocofast.train.checkpoint_writer import save_atomically
from mocofast.view_sizes import Size, pixels_text


class Exported(NamedTuple):
    """Describes the exported file."""

    path: Path
    tensors: int  # number of tensors
    content: str  # exported parts of the model
    how_to_load: str  # Python lines, or a command

    def __str__(self) -> str:
        content = f"{self.path}: {self.tensors} tensors, {self.content}"
        return f"{content}. To load them:\n\n{self.how_to_load}\n"


def export(checkpoint: Mapping[str, Any], format: str, out: str | Path, size: Size = 0) -> Exported:
    """Writes the model of a checkpoint in another format. The file is written atomically.

    checkpoint: as `load_checkpoint` returns.
    format:
        torchvision: the query encoder without head, a dict of tensors under torchvision's names.
            Written with torch.save, or as safetensors if `out` ends in .safetensors.
        timm: as torchvision, under timm's names: ResNets, ViTs, and models of timm.
        safetensors: as torchvision, `out` has to end in .safetensors.
        detectron2: a pickle under the names of detectron2's ResNet backbone (for R50: R50-C4).
        transformers: a folder of Hugging Face transformers with a model card: ResNets and ViTs.
        onnx: a graph of features for any number of images, `out` ends in .onnx.
        torch_export: the same for torch.export, `out` ends in .pt2.
        text: a folder of Hugging Face transformers with the text encoder of method clip.
        reference: a checkpoint of facebookresearch/moco (encoders, queue, optimiser), from which
            training can continue there.
    out: the file to write (transformers and text: the new folder). Missing folders are created.
    size: of the images of onnx and torch_export. 0: the size of training.
    Raises ConfigError (a ValueError) for an unknown format, a suffix that does not fit the format,
    an encoder that the format does not support, or a size for a format of weights.
    """
    out = Path(out)
    if format not in FORMATS:
        raise ConfigError(
            f"format: expected one of {', '.join(FORMATS)}, "
            f"got {format!r}{nearest(format, FORMATS)}"
        )
    is_safetensors = out.suffix == ".safetensors"
    if format == "safetensors" and not is_safetensors:
        raise ConfigError(f"out: expected a name ending in .safetensors, got {out}")
    if is_safetensors and format in ("detectron2", "reference"):
        raise ConfigError(f"out: format {format} has a file format of its own, got {out}")
    suffix = SUFFIXES.get(format, out.suffix)
    if out.suffix != suffix or (is_safetensors and format in ("transformers", "text")):
        raise ConfigError(f"out: format {format} expects a name ending in {suffix}, got {out}")
    files.require_writable(out.parent, "out")
    model, config = model_from_checkpoint(dict(checkpoint))
    _check_arch(format, config.model.arch)
    if size and size != config.augment.size:
        if format not in SUFFIXES:
            raise ConfigError(
                f"augment.size: format {format} has weights, which are of no size of images: got "
                f"{pixels_text(size)} pixels. Leave the option out, or take "
                f"{' or '.join(SUFFIXES)}"
            )
        config.augment.size = size
    if format == "reference":
        if not checkpoint.get("is_complete", True):
            raise ConfigError(
                "format: reference needs both encoders and the queue, and the file holds one "
                "encoder; torchvision or safetensors works"
            )
        if not isinstance(model, MoCo):
            raise ConfigError(
                "format: reference is facebookresearch/moco's, "
                f"got model.method {config.model.method}"
            )
        whole = _reference(model, config.model.arch, checkpoint)
        _save(out, whole)
        lines = how_to_load(format, config, model.encoder_q, out)
        return Exported(out, len(whole["state_dict"]), "both encoders and the queue", lines)
    if format == "text":
        texts = with_texts(model, config.model.method)
        count = write_texts(texts, out)
        return Exported(out, count, "the text encoder and both projections", text_lines(texts, out))
    # Contiguous, because safetensors does not support channels-last.
    backbone = {name: value.contiguous() for name, value in backbone_state_dict(model).items()}
    count = len(backbone)
    if format == "transformers":
        check_transformers(config.model.arch, config.model.layer_scale)
        count = write_folder(backbone, model.encoder_q, config, checkpoint, out)
        lines = transformers_lines(config, out)
    elif format in SUFFIXES:
        _write(out, lambda file: write_graph(format, model.encoder_q, config, file))
        lines = graph_lines(format, config, out)
    else:
        if format == "timm" and config.model.arch.startswith("vit_"):
            backbone = timm_names(backbone)
        if format == "detectron2":
            _write(out, lambda file: file.write_bytes(pickle.dumps(_detectron2(backbone))))
        elif is_safetensors:
            metadata = {"format": "pt", "arch": config.model.arch}
            packed = safetensors.torch.save(backbone, metadata)
            _write(out, lambda file: file.write_bytes(packed))
        else:
            _save(out, backbone)
        lines = how_to_load(format, config, model.encoder_q, out)
    return Exported(out, count, "the query encoder without its head", lines)


def _reference(model: MoCo, arch: str, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a checkpoint of facebookresearch/moco."""
    state = {f"module.{name}": tensor for name, tensor in to_reference_state_dict(model).items()}
    content = {"epoch": checkpoint["epoch"], "arch": arch, "state_dict": state}
    if "optimizer" in checkpoint:
        optimizer = checkpoint["optimizer"]
        # The optimiser there also lists the key encoder's parameters, which have no gradients,
        # after the query encoder's parameters.
        (group,) = optimizer["param_groups"]
        whole = {**group, "params": list(range(2 * len(group["params"])))}
        content["optimizer"] = {"state": optimizer["state"], "param_groups": [whole]}
    return content


def _detectron2(backbone: dict[str, Tensor]) -> dict[str, Any]:
    """Returns detectron2's content of a ResNet, laid out as by facebookresearch/moco."""
    model = {}
    for name, tensor in backbone.items():
        name = name if name.startswith("layer") else f"stem.{name}"
        name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
        name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        model[name] = tensor.numpy()
    return {"model": model, "__author__": "MOCO", "matching_heuristics": True}


def _check_arch(format: str, arch: str) -> None:
    plain = arch.replace(SOLO, "_cifar").removesuffix("_cifar")
    is_resnet = re.fullmatch(r"(wide_resnet|resnext|resnet)\d\w*", plain) is not None
    if format == "timm" and not (is_resnet or arch.startswith((TIMM, "vit_"))):
        raise ConfigError(
            "format: timm is for ResNets, ViTs and models of timm, "
            f"got model.arch {arch}; safetensors works"
        )
    if format == "torchvision" and arch.startswith(TIMM):
        raise ConfigError(f"format: torchvision has no {arch}; timm and safetensors work")
    if format == "detectron2" and (not is_resnet or plain != arch):
        raise ConfigError(
            f"format: detectron2 is for ResNets with their 7x7 stem, got model.arch {arch}"
        )


def _save(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(state, path)


def _write(path: Path, save: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as file:
        save(file)
