"""Rotates views in plain PyTorch on any device: the rotation of `view_ops`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def rotate_(x: Tensor, angle: Tensor) -> None:
    """Rotates counter-clockwise about the centre, bilinear, with black outside.

    angle: (n, 1, 1, 1), in degrees.
    """
    columns, rows = turned_places(angle, *x.shape[2:])
    grid = x.new_empty((len(x), *x.shape[2:], 2))
    torch.add(columns.unsqueeze(2), rows.unsqueeze(3), out=grid.permute(0, 3, 1, 2))
    # As in PIL, a pixel is black if its centre comes from outside, and otherwise
    # interpolated between pixels of the image.
    turned = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = ((grid >= -1) & (grid < 1)).all(dim=3).unsqueeze(1)
    # PIL truncates float64. The small constant keeps values that float32 puts just below
    # an integer.
    torch.mul(turned.add_(2**-10).floor_(), inside, out=x)


def turned_places(angle: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns where pixels of turned images come from: parts of the columns, (n, 2, W), and of the
    rows, (n, 2, H).

    angle: n degrees.

    The sums of both parts are places across and down, from -1 to 1 at the edges of an image. They
    are those of PyTorch's `affine_grid`. But the rounding of its matrix product depends on the CPU.
    """
    radians = angle.view(-1) * (math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    across, down = -sin * (height / width), sin * (width / height)
    x, y = (
        torch.linspace(-1, 1, size, dtype=angle.dtype, device=angle.device) * (size - 1) / size
        for size in (width, height)
    )
    columns = torch.stack((cos, down), dim=1).unsqueeze(2) * x
    rows = torch.stack((across, cos), dim=1).unsqueeze(2) * y
    return columns, rows
