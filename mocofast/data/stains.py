"""Jitter of the stains of slides, in plain PyTorch on any device.

late_body.h repeats it to the bit, so powers are single operators, each of which rounds as IEEE 754
says. Logarithms are PyTorch's: late_body.h takes them from the table `logarithms`.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mocofast.data.random_numbers import polynomial

# Optical densities of red, green and blue that a stain adds, for haematoxylin, eosin and DAB:
# Ruifrok and Johnston 2001, "Quantification of histochemical staining by color deconvolution".
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
# 2^x for x from -1/2 to 1/2: coefficients of powers of x, of the least relative error (9.1e-8).
_POWER = (1.0, 0.693147, 0.24022242, 0.055507337, 0.0096715128, 0.0013264727)
# Sums with it are rounded to whole numbers, which stand in the lower bits.
_WHOLE = 12582912.0
_LEAST = -30.0  # 2^-30 of any range is black


def jitter_stains_(x: Tensor, factor: Tensor, offset: Tensor, top: int) -> None:
    """Scales and shifts the densities of haematoxylin, eosin and DAB, as Tellez et al. 2018.

    x: (n, 3, H, W), red, green and blue of a stained slide.
    factor, offset: (n, 3), of every stain. Offsets are decimal optical densities.

    The paper is "Whole-slide mitosis detection in H&E breast histology using PHH3 as a reference".
    """
    matrix, shift = colour_map(factor, offset)
    logs = _logarithms(x.flatten(2), top)
    jittered = logs[:, :1] * matrix[:, :, :1]
    for colour in (1, 2):
        jittered.addcmul_(logs[:, colour, None], matrix[:, :, colour, None])
    jittered.add_(shift.unsqueeze(2)).clamp_(_LEAST, 0)
    x.copy_(power_of_two_(jittered).mul_(top).round_().view_as(x))


def colour_map(factor: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what jitter does to the logarithms of red, green and blue: a matrix, (n, 3, 3), and
    a shift, (n, 3), both float32.

    factor, offset: as for `jitter_stains_`.
    """
    stains = np.array(STAINS)
    # Of every stain: what a colour gains for the logarithm of a colour if the factor grows by 1,
    # and if the offset does.
    parts = factor.new_tensor(stains[:, :, None] * np.linalg.inv(stains).T[:, None])
    colours = factor.new_tensor(-math.log2(10) * stains)
    matrix = torch.eye(3, dtype=factor.dtype, device=factor.device).repeat(len(factor), 1, 1)
    shift = torch.zeros_like(offset)
    for stain in range(3):
        matrix += (factor[:, stain, None, None] - 1) * parts[stain]
        shift += offset[:, stain, None] * colours[stain]
    return matrix, shift


@cache
def logarithms(top: int) -> Tensor:
    """Returns the binary logarithm of the share of every level of the range, (top + 1,) float32, on
    the CPU.
    """
    return _logarithms(torch.arange(top + 1, dtype=torch.float32, device="cpu"), top)


def _logarithms(x: Tensor, top: int) -> Tensor:
    # Black counts as half a level.
    return x.clamp(min=0.5).div_(top).log2_()


def power_of_two_(x: Tensor) -> Tensor:
    """Returns 2^x in new memory, for x from -30 to 0. Changes x."""
    whole = x + _WHOLE
    places = whole.view(torch.int32) << 23
    power = polynomial(x.sub_(whole.sub_(_WHOLE)), _POWER)
    power.view(torch.int32).add_(places)
    return power
