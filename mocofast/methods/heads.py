"""Projection and prediction heads. The projector takes the place of an encoder's last layer, so that what comes
before it are the features, whatever the method."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from mocofast.models.encoders import head_name


def mlp_head(
    widths: Sequence[int], *, last_norm: bool = False, bias: bool = False
) -> nn.Sequential:
    """Linear-BatchNorm-ReLU for each width but the last, then Linear, as SimCLR, BYOL and MoCo v3 have it.

    widths: of the input, the hidden layers and the output. last_norm: end in a BatchNorm without weights.
    bias: of the last linear layer; the others stand before a BatchNorm, which would take it out again.
    """
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths[:-1]):
        layers += [
            nn.Linear(width_in, width_out, bias=False),
            nn.BatchNorm1d(width_out),
            nn.ReLU(inplace=True),
        ]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=bias))
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)


def set_head(encoder: nn.Module, *widths: int, last_norm: bool = False, bias: bool = False) -> None:
    """Replaces the encoder's head by `mlp_head` from its features to `widths`; ValueError where it has no linear
    layer that tells how many features there are."""
    name = head_name(encoder)
    linear = next(
        (m for m in encoder.get_submodule(name).modules() if isinstance(m, nn.Linear)), None
    )
    if linear is None:
        raise ValueError(f"encoder: expected a linear layer in its .{name}, and there is none")
    setattr(encoder, name, mlp_head([linear.in_features, *widths], last_norm=last_norm, bias=bias))
