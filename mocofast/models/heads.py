"""Finds and replaces the head of an encoder, and pools features that come unpooled."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.errors import ConfigError

HEADS = ("fc", "head", "heads", "classifier")


class CosineHead(nn.Module):
    """A head of zero-shot classifiers: cosines of images with an embedding of every class.

    width: D, of the features. dim: C, of the embedding. classes: T.
    classes.weight: (T, C), unit embeddings times the scale of logits.
    """

    def __init__(self, width: int, dim: int, classes: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, dim, bias=False)
        self.classes = nn.Linear(dim, classes, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits (N, T) of features (N, D)."""
        logits: Tensor = self.classes(F.normalize(self.projection(features).float(), dim=1))
        return logits


class WithHead(nn.Module):
    """An encoder without a head, and a linear head on its pooled outputs.

    body: returns features, tokens or maps, see `pooled`. width: D, of the features.
    """

    def __init__(self, body: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns (N, num_classes) of images."""
        outputs: Tensor = self.fc(pooled(self.body(images), channels_last=False))
        return outputs


def head_name(encoder: nn.Module) -> str:
    """Returns the path of the head: `fc`, `head`, `heads`, `classifier`, or as timm names it.

    timm names the last linear layer, `head.fc` for example: pooling and norm before it are part of
    the features. Raises ConfigError (a ValueError) if there is no head.
    """
    for name in (*_names_of_timm(encoder), *HEADS):
        try:
            found = encoder.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(getattr(found, "fc", None), nn.Linear):  # a head of timm's that pools
            return f"{name}.fc"
        return name
    raise ConfigError(
        f"encoder: expected a module ending in {', '.join(HEADS)}; "
        f"{type(encoder).__name__} has none"
    )


def _names_of_timm(encoder: nn.Module) -> tuple[str, ...]:
    settings: Any = getattr(encoder, "pretrained_cfg", None)
    name = settings.get("classifier") if isinstance(settings, dict) else None
    names = (name,) if isinstance(name, str) else tuple(name or ())
    # A norm, a hidden layer and the last layer are one head: without classes timm has none of them.
    # (MetaNeXt keeps the hidden layer of its `head.fc2`, CAFormer not the one of `head.fc.fc2`.)
    return tuple(re.sub(r"(\.linear|\.l|(?<=\.fc)\.fc2)$", "", name) for name in names)


def head_names(encoder: nn.Module) -> tuple[str, ...]:
    """Returns the paths of all heads, first `head_name`: distilled models of timm have two."""
    first, *others = head_name(encoder), *_names_of_timm(encoder)
    return (first, *(name for name in others if name != first))


def replace_head(encoder: nn.Module, head: nn.Module) -> None:
    """Puts `head` in the place of the encoder's head, and copies in the place of further heads."""
    first, *others = head_names(encoder)
    put(encoder, first, head)
    for path in others:
        put(encoder, path, copy.deepcopy(head))


def put(encoder: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule `path`."""
    parent, _, name = path.rpartition(".")
    setattr(encoder.get_submodule(parent), name, module)


def pooled(features: Tensor, channels_last: bool) -> Tensor:
    """Returns features (N, D) of feature maps: means over all places.

    features: (N, D), (N, L, D) tokens, or maps (N, D, H, W) or, with channels_last, (N, H, W, D).
    Raises ConfigError (a ValueError) for other shapes.
    """
    if features.dim() == 2:
        return features
    if features.dim() == 3:
        return features.mean(1)
    if features.dim() == 4:
        return features.mean((1, 2) if channels_last else (2, 3))
    raise ConfigError(
        "encoder: expected features (N, D), tokens (N, L, D) or maps of 4 dimensions before the "
        f"head, got {tuple(features.shape)}"
    )
