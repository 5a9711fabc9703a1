"""Projection and prediction heads.

A projector takes the place of an encoder's last layer. The features are then, for every method,
the input of that layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from mocofast.models.heads import head_names, put


def mlp_head(
    widths: Sequence[int], *, last_norm: bool = False, bias: bool = False
) -> nn.Sequential:
    """Returns the multi-layer perceptron of SimCLR, BYOL and MoCo v3.

    Every layer but the last is Linear-BatchNorm-ReLU. The last layer is Linear.

    widths: widths of the input, the hidden layers and the output.
    last_norm: append a BatchNorm without weights.
    bias: give the last linear layer a bias. The other linear layers stand before a BatchNorm,
        which would remove a bias.
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
    """Replaces the encoder's head by an `mlp_head` from its features to `widths`.

    Raises ValueError if the head has no linear layer, whose width tells the number of features.
    """
    for name in head_names(encoder):
        linear = next(
            (m for m in encoder.get_submodule(name).modules() if isinstance(m, nn.Linear)), None
        )
        if linear is None:
            raise ValueError(f"encoder: expected a linear layer in its .{name}, and there is none")
        head = mlp_head([linear.in_features, *widths], last_norm=last_norm, bias=bias)
        put(encoder, name, head)
