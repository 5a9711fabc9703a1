"""Finds and replaces the head of an encoder, and pools features that come unpooled."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

HEADS = ("fc", "head", "heads", "classifier")


def head_name(encoder: nn.Module) -> str:
    """Returns the path of the head: `fc`, `head`, `heads`, `classifier`, or as timm names it.

    timm names the last linear layer, `head.fc` for example: pooling and norm before it are part of
    the features. Raises ValueError if there is no head.
    """
    for name in (*_names_of_timm(encoder), *HEADS):
        try:
            found = encoder.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(getattr(found, "fc", None), nn.Linear):  # a head of timm's that pools
            return f"{name}.fc"
        return name
    raise ValueError(
        f"encoder: expected a module ending in {', '.join(HEADS)}; "
        f"{type(encoder).__name__} has none"
    )


def _names_of_timm(encoder: nn.Module) -> tuple[str, ...]:
    settings: Any = getattr(encoder, "pretrained_cfg", None)
    name = settings.get("classifier") if isinstance(settings, dict) else None
    return (name,) if isinstance(name, str) else ()


def replace_head(encoder: nn.Module, head: nn.Module) -> None:
    """Puts `head` in the place of the encoder's head."""
    parent, _, name = head_name(encoder).rpartition(".")
    setattr(encoder.get_submodule(parent), name, head)


def pooled(features: Tensor, channels_last: bool) -> Tensor:
    """Returns features (N, D) of feature maps: means over all places.

    features: (N, D), (N, L, D) tokens, or maps (N, D, H, W) or, with channels_last, (N, H, W, D).
    Raises ValueError for other shapes.
    """
    if features.dim() == 2:
        return features
    if features.dim() == 3:
        return features.mean(1)
    if features.dim() == 4:
        return features.mean((1, 2) if channels_last else (2, 3))
    raise ValueError(
        "encoder: expected features (N, D), tokens (N, L, D) or maps of 4 dimensions before the "
        f"head, got {tuple(features.shape)}"
    )
