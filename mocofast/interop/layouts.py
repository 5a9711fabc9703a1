"""Finds the encoder in weights of other projects, and its architecture.

docs/checkpoints.md lists the layouts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mocofast.config import ConfigError
from mocofast.interop.reading import WRAPPERS, described_names, without_wrappers
from mocofast.models.vit import sincos_position_embedding

BACKBONE = "a backbone (lightly, mmselfsup, torchgeo, DINO)"
# Prefixes of the encoder that is evaluated, in the order of search, with the project's name.
ENCODERS = (
    ("encoder_q.", "facebookresearch/moco"),
    ("base_encoder.", "facebookresearch/moco-v3"),
    ("trunk._feature_blocks.", "VISSL"),
    ("_feature_blocks.", "VISSL"),
    ("trunk.", "VISSL"),
    ("backbone.", BACKBONE),
    ("teacher_backbone.", "lightly"),
    ("student_backbone.", "lightly"),
    ("vit.", "lightly"),  # inside MaskedVisionTransformer
    ("resnet.", "transformers"),
    ("encoder.", "an encoder (old solo-learn)"),
    ("query_encoder.", "a query encoder"),
    ("online_encoder.", "byol-pytorch"),
    ("teacher.", "DINO"),
    ("student.", "DINO"),
    # The wrapper's name does not stand before entries of losses and metrics.
    *((wrapper, "a wrapped model") for wrapper in WRAPPERS),
)
# Prefixes of momentum encoders: mmselfsup, facebookresearch/moco, moco-v3, solo-learn, lightly,
# byol-pytorch.
MOMENTUM = (
    *("encoder_k.module.0.", "encoder_k.", "momentum_encoder."),
    *("momentum_backbone.", "backbone_momentum.", "target_encoder."),
)
# Children of nn.Sequential(*list(resnet.children())[:-1]), as lightly's examples write it.
SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# (blocks of the four stages, bottleneck, width of the first bottleneck / 64, groups): name.
_RESNETS: dict[tuple[tuple[int, ...], bool, int, int], str] = {
    ((2, 2, 2, 2), False, 1, 1): "resnet18",
    ((3, 4, 6, 3), False, 1, 1): "resnet34",
    ((3, 4, 6, 3), True, 1, 1): "resnet50",
    ((3, 4, 23, 3), True, 1, 1): "resnet101",
    ((3, 8, 36, 3), True, 1, 1): "resnet152",
    ((3, 4, 6, 3), True, 2, 1): "wide_resnet50_2",
    ((3, 4, 23, 3), True, 2, 1): "wide_resnet101_2",
    ((3, 4, 6, 3), True, 2, 32): "resnext50_32x4d",
    ((3, 4, 23, 3), True, 4, 32): "resnext101_32x8d",
    ((3, 4, 23, 3), True, 4, 64): "resnext101_64x4d",
}
# (width, layers): size. The number of heads, which no weight shows, is that of DeiT's ViTs.
_VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}
_VITS[(1280, 32)] = "huge"


# (pattern, replacement), as re.sub takes them.
Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


class Found(NamedTuple):
    """An encoder in a file."""

    weights: dict[str, Tensor]  # of the backbone, under the encoder's own names
    arch: str  # model.arch
    channels: int
    positions: int  # places of the patches that position embeddings are for. 0: no embeddings
    patch: int  # side of a patch in pixels, of an encoder with position embeddings
    layout: str  # the project


def find_encoder(weights: Mapping[str, Tensor], arch: str | None) -> Found:
    """Returns the encoder in the flat weights of a file.

    arch: `model.arch` of the encoder. None: told from names and shapes.
    Raises ConfigError if no encoder is known.
    """
    part, layout = _part(weights)
    if layout == BACKBONE and _is_solo_learn(weights):
        layout = "solo-learn"
    if "patch_embed.projection.weight" in part:
        part = renamed(part, _MMSELFSUP)
    if "cls_token" in part:
        part = _of_dinov2(part)
    if all(name.split(".")[0].isdigit() for name in part) and "0.weight" in part:
        part = {
            ".".join((SEQUENTIAL.get(name.split(".")[0], ""), *name.split(".")[1:])): value
            for name, value in part.items()
        }
    first = next((part[n] for n in _FIRST if n in part), None)
    if first is None or first.dim() != 4:
        if arch is None:
            names = described_names(sorted(weights))
            raise ConfigError(
                f"no known encoder among the entries {names}; expected the names of "
                "facebookresearch/moco (encoder_q.*), moco-v3 (base_encoder.*) or another project "
                "of docs/checkpoints.md, or the encoder's name (--model.arch, main_lincls: -a)"
            )
        return Found(dict(part), arch, 3, 0, 0, layout)
    positions = _positions(part)
    is_resnet = any(name.startswith("layer1.") for name in part)
    solo = layout == "solo-learn"
    found = arch or (_resnet_of(part, first, solo) if is_resnet else _vit_of(part, first, layout))
    if arch in ("vit_tiny", "vit_small") and layout != "facebookresearch/moco-v3":
        _check_heads(part, arch, first, layout)
    if "patch_embed.proj.weight" in part and not found.startswith("timm/"):
        part = torchvision_names(part)
    return Found(dict(part), found, first.shape[1], positions, first.shape[-1], layout)


_FIRST = ("conv1.weight", "patch_embed.proj.weight", "conv_proj.weight", "conv1.0.weight")

_FIRST_OF_TRANSFORMERS = (
    "embedder.embedder.convolution.weight",
    "embeddings.patch_embeddings.projection.weight",
)


def _part(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Returns the entries of the evaluated encoder, without their prefix, and the project."""
    if any(name in weights for name in ("class_token", "cls_token", *_FIRST)):
        return dict(weights), "torchvision or timm"
    if any(name in weights for name in _FIRST_OF_TRANSFORMERS):
        return _of_transformers(weights), "transformers"
    for prefix, layout in ENCODERS:
        part = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
        if part:
            inner, further = _part(without_wrappers(part))
            return inner, layout if further == "torchvision or timm" else further
    return dict(weights), "torchvision or timm"


def method_part(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the entries of a method with a momentum encoder, without the names of its wrappers.

    Another loop's module may have losses and metrics beside the method. Entries without a momentum
    encoder come back as they are.
    """
    if not any(name.startswith(MOMENTUM) for name in weights):
        for wrapper in WRAPPERS:
            part = {n.removeprefix(wrapper): v for n, v in weights.items() if n.startswith(wrapper)}
            inner = method_part(without_wrappers(part)) if part else part
            if any(name.startswith(MOMENTUM) for name in inner):
                return inner
    return dict(weights)


def _is_solo_learn(weights: Mapping[str, Tensor]) -> bool:
    """Returns whether a Lightning module has the parts that every method of solo-learn has."""
    parts = {name.split(".")[0] for name in weights}
    return "classifier" in parts and not parts.isdisjoint(("projector", "momentum_backbone"))


def _positions(part: Mapping[str, Tensor]) -> int:
    """Returns for how many patches an encoder has position embeddings, 0 for none."""
    position = part.get("pos_embed", part.get("encoder.pos_embedding"))
    if position is None or position.dim() != 3:
        return 0
    # timm's models with registers have no position of the class token.
    tokens = () if "reg_token" in part else ("cls_token", "class_token", "dist_token")
    return position.shape[1] - sum(token in part for token in tokens)


def _resnet_of(part: Mapping[str, Tensor], first: Tensor, solo: bool) -> str:
    blocks = tuple(
        len({n.split(".")[1] for n in part if n.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    if "layer1.conv1.weight" in part:  # a stage is one block, without a number in its name
        return "resnet_tiny"
    second = part.get("layer1.0.conv2.weight")
    name = None
    if second is not None:
        groups = second.shape[0] // second.shape[1]
        key = blocks, "layer1.0.conv3.weight" in part, second.shape[0] // 64, groups
        name = _RESNETS.get(key)
    if name is None:
        raise ConfigError(
            f"a ResNet of {blocks} blocks that no name is known for; name it by --model.arch"
        )
    small = "_solo_cifar" if solo else "_cifar"
    return f"{name}{small}" if first.shape[-1] == 3 else name


def _vit_of(part: Mapping[str, Tensor], first: Tensor, layout: str) -> str:
    of_timm = "patch_embed.proj.weight" in part
    pattern = r"blocks\.(\d+)\." if of_timm else r"encoder\.layers\.encoder_layer_(\d+)"
    layers = len({m[1] for name in part if (m := re.match(pattern, name))})
    width, patch = first.shape[0], first.shape[-1]
    size = _VITS.get((width, layers))
    of_moco_v3 = layout == "facebookresearch/moco-v3" or _has_sincos_positions(part)
    if of_moco_v3 and size in ("tiny", "small", "base") and patch == 16:
        return f"vit_{size}"  # with 12 heads
    is_torchvision = "class_token" in part or size in ("base", "large", "huge")
    scaled = "blocks.0.ls1.gamma" in part
    if size and is_torchvision and not scaled and patch in (14, 16, 32):
        name = f"vit_{size[0]}_{patch}"
        if name in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"):
            return name
    if size and scaled and patch == 14:
        registers = "_reg4" if "register_tokens" in part or "reg_token" in part else ""
        return f"timm/vit_{size}_patch14{registers}_dinov2"
    if size:
        return f"timm/vit_{size}_patch{patch}_224"
    raise ConfigError(
        f"a ViT of width {width} and {layers} layers that no name is known for; name it by "
        "--model.arch timm/NAME"
    )


def _has_sincos_positions(part: Mapping[str, Tensor]) -> bool:
    """Returns whether a ViT has MoCo v3's position embeddings, which are never trained."""
    position = part.get("pos_embed")
    side = math.isqrt(_positions(part))
    if position is None or position.shape[1] != 1 + side**2 or position.shape[2] % 4:
        return False
    expected = sincos_position_embedding(side, side, position.shape[2])
    return torch.allclose(position.float(), expected, atol=5e-3)  # bfloat16 rounds by 2e-3


def _check_heads(part: Mapping[str, Tensor], arch: str, first: Tensor, layout: str) -> None:
    """Raises ConfigError for a ViT of DeiT or DINO under the name of MoCo v3's ViT of this width.

    Weights have equal shapes, and MoCo v3's ViT has two or four times as many heads.
    """
    square = math.isqrt(_positions(part)) ** 2 == _positions(part)
    if "pos_embed" in part and square and not _has_sincos_positions(part):
        raise ConfigError(
            f"{arch} is MoCo v3's ViT with 12 heads and fixed positions, and the file has other "
            f"positions; the weights tell --model.arch {_vit_of(part, first, layout)}, with the "
            "heads of DeiT and DINO"
        )


def _of_dinov2(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights of a ViT under timm's names. part: under timm's or DINOv2's names.

    DINOv2 may keep blocks in chunks. timm's models with registers have the position of the class
    token in the token.
    """
    part = renamed(part, ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),))
    if (registers := part.pop("register_tokens", None)) is not None:
        position = part["pos_embed"]
        token = part["cls_token"] + position[:, :1]
        part |= {"reg_token": registers, "cls_token": token, "pos_embed": position[:, 1:]}
    return part


def renamed(weights: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Returns weights under other names. Every rule applies to every name, in order."""
    found = {}
    for name, value in weights.items():
        for pattern, other in rules:
            name = re.sub(pattern, other, name)
        found[name] = value
    return found


# From the names of a ViT of mmselfsup and mmpretrain to timm's names.
_MMSELFSUP = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^ln1\.", "norm."),
    (r"^layers\.", "blocks."),
    (r"\.ln(\d)\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
# From the names of ResNets and ViTs of transformers, as its files have them, to torchvision's names
# of a ResNet and timm's names of a ViT. (In memory, its ViTs have other names.)
_TRANSFORMERS: Rules = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d)\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def _of_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights of a ResNet or a ViT of transformers under torchvision's or timm's names.

    Query, key and value become one projection. A pooler, which no feature depends on, is left out.
    """
    part = renamed(weights, _TRANSFORMERS)
    part = {name: value for name, value in part.items() if not name.startswith("pooler.")}
    for name in [name for name in part if ".attn.query." in name]:
        three = [name.replace("query", other) for other in ("query", "key", "value")]
        if all(other in part for other in three):  # BEiT has no bias of keys
            part[name.replace("query", "qkv")] = torch.cat([part.pop(other) for other in three])
    return part


# From timm's names of a ViT's parameters (moco-v3, DINO) to torchvision's names.
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


def torchvision_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights of a ViT under torchvision's names. weights: under timm's names."""
    return renamed(weights, _TIMM)


_TORCHVISION = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_", "blocks."),
    (r"^encoder\.ln\.", "norm."),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"\.dropout\.1\.gamma$", ".ls1.gamma"),
    (r"\.mlp\.5\.gamma$", ".ls2.gamma"),
)


def timm_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights of a ViT under timm's names, which are moco-v3's and DINO's, too.

    weights: under torchvision's names.
    """
    return renamed(weights, _TORCHVISION)
