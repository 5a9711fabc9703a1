"""Loads checkpoint files of facebookresearch/moco and facebookresearch/moco-v3 as models."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from mocofast import settings
from mocofast.config import Config, ConfigError
from mocofast.interop.weights import PREFIX, backbone_state_dict, load_reference_state_dict
from mocofast.methods.base import Method
from mocofast.methods.build import build_method
from mocofast.methods.moco import MoCo
from mocofast.train.checkpoint import checked, model_from_checkpoint, read_file

# From timm's names of a ViT's parameters (moco-v3 uses timm) to torchvision's names.
_TIMM = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm(\d)\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)


def load_pretrained(path: str, arch: str | None) -> tuple[Method, Config, bool]:
    """Returns the model of a checkpoint (on the CPU), its configuration, and whether it is ours.

    path: a run folder or checkpoint of mocofast, or a checkpoint of facebookresearch/moco or
        facebookresearch/moco-v3. For moco-v3, only the query encoder without head is loaded.
    arch: the expected encoder. None: the encoder that the file names.
    Raises FileNotFoundError, and ConfigError for an unknown file or an unexpected encoder.
    """
    content, file = read_file(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        model, config = model_from_checkpoint(checked(content, file))
        _check(arch, config.model.arch, path)
        return model, config, True
    _check(arch, content.get("arch", arch), path)
    arch = arch or content.get("arch", Config().model.arch)
    weights = {name.removeprefix(PREFIX): value for name, value in content["state_dict"].items()}
    try:
        if any(name.startswith("base_encoder.") for name in weights):
            return *_moco_v3(weights, arch), False
        return *_moco(weights, arch), False
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _check(expected: str | None, found: str | None, path: str) -> None:
    if expected and found != expected:
        raise ConfigError(f"-a {expected}: the encoder of {path} is {found}")


def _moco(weights: dict[str, Tensor], arch: str) -> tuple[Method, Config]:
    if "queue" not in weights:
        raise ConfigError(
            "expected the names of facebookresearch/moco (encoder_q.*, queue) "
            "or moco-v3 (base_encoder.*)"
        )
    config = settings.load_recipe("moco_v1_r50")
    config.model.arch, config.model.mlp = arch, "encoder_q.fc.2.weight" in weights
    config.model.dim, config.model.queue_size = weights["queue"].shape
    model = build_method(config)
    assert isinstance(model, MoCo)
    load_reference_state_dict(model, weights)
    return model, config


def _moco_v3(weights: dict[str, Tensor], arch: str) -> tuple[Method, Config]:
    config = settings.load_recipe("moco_v3_r50")
    config.model.arch = arch
    model = build_method(config)
    # The weights of the query encoder's backbone, under torchvision's names.
    given = {}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        if part == "base_encoder" and not rest.startswith(("fc.", "head.")):
            for pattern, ours in _TIMM if arch.startswith("vit_") else ():
                rest = re.sub(pattern, ours, rest)
            given[rest] = value
    wanted = backbone_state_dict(model)
    wrong = sorted(
        name for name in given.keys() | wanted.keys() if _shape(given, name) != _shape(wanted, name)
    )
    if wrong:
        raise ConfigError(
            f"not the weights of {arch}: missing, unknown or of another shape: "
            f"{', '.join(wrong[:5])}"
        )
    model.encoder_q.load_state_dict(given, strict=False)
    return model, config


def _shape(tensors: dict[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
