"""Colour jitter, grayscale, blur, solarize, rotation and flip of a batch of views, in plain PyTorch on any device.

The arithmetic is PIL's, which the MoCo reference uses through torchvision: values are integers between
operators, blends truncate, luma rounds, the blur is three box filters a direction. Hue is the exception: PIL
quantises hue and saturation to 8 bits on the way, here (as in torchvision's tensor operator) nothing is.

Why not DALI's operators: its colour operators rotate hue in YIQ and round where PIL truncates, and the exact
formulas cost several times as much in DALI's CPU arithmetic (`docs/log.md`, section DALI).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mocofast.config import AugmentConfig
from mocofast.data.interface import ViewParams

LUMA = (
    19595 / 65536,
    38470 / 65536,
    7471 / 65536,
)  # ITU-R BT.601 in PIL's fixed point: exact in float32


def apply_view_ops(
    crops: Tensor, params: Sequence[ViewParams], augment: AugmentConfig, out: Tensor
) -> None:
    """Everything of `params` after the crop, in the order that `ViewParams` documents.

    crops, out: (n, S, S, 3) uint8 on one device; out may be crops. params: n of them.
    """
    x = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    gray = [i for i, p in enumerate(params) if p.gray]
    _on_rows(x, [i for i, p in enumerate(params) if p.angle], rotate_, [p.angle for p in params])
    if augment.gray_first:
        _on_rows(x, gray, grayscale_)
    for slot in range(4):
        at_slot = [p.order[slot] if p.order else None for p in params]
        for operator, (adjust_, name) in enumerate(JITTER):
            rows = [i for i, chosen in enumerate(at_slot) if chosen == operator]
            _on_rows(x, rows, adjust_, [getattr(p, name) for p in params])
    if not augment.gray_first:
        _on_rows(x, gray, grayscale_)
    radii = [box_radius(p.sigma) for p in params]
    reaches = [math.ceil(radius) for radius in radii]
    for reach in sorted({*reaches} - {0}):
        _on_rows(
            x,
            [i for i, r in enumerate(reaches) if r == reach],
            partial(box_blur_, reach=reach),
            radii,
        )
    _on_rows(x, [i for i, p in enumerate(params) if p.solarize], solarize_)
    _on_rows(x, [i for i, p in enumerate(params) if p.flip], flip_)
    out.copy_(x.permute(0, 2, 3, 1))


def _on_rows(
    x: Tensor, rows: list[int], operator: Callable[..., None], values: Sequence[float] | None = None
) -> None:
    """Applies an in-place operator to some images of x, with each one's own value as a (rows, 1, 1, 1) tensor."""
    if not rows:
        return
    part, index = x, None
    if len(rows) < len(x):
        index = torch.tensor(rows).to(x.device, non_blocking=True)
        part = x[index]
    if values is None:
        operator(part)
    else:
        chosen = torch.tensor([values[i] for i in rows], dtype=torch.float32)
        operator(part, chosen.to(x.device, non_blocking=True).view(-1, 1, 1, 1))
    if index is not None:
        x[index] = part


# Below, x is (n, 3, S, S) float32 that holds integers 0..255, changed in place; factors are (n, 1, 1, 1).


def luma(x: Tensor) -> Tensor:
    """(n, 1, S, S): PIL's "L", rounded to integers."""
    r, g, b = x.unbind(1)
    gray = torch.mul(r, LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])
    return gray.add_(0.5).floor_().unsqueeze(1)


def grayscale_(x: Tensor) -> None:
    """All three channels become the luma."""
    x.copy_(luma(x).expand_as(x))


def _blend_(x: Tensor, other: Tensor, factor: Tensor) -> None:
    # In this form, not factor * x + (1 - factor) * other: there, rounding would put pixels with x == other
    # a hair below their integer, and truncation would darken them by 1.
    x.sub_(other).mul_(factor).add_(other).clamp_(0, 255).floor_()


def adjust_brightness_(x: Tensor, factor: Tensor) -> None:
    """Blend with black; 1 keeps."""
    x.mul_(factor).clamp_(max=255).floor_()


def adjust_contrast_(x: Tensor, factor: Tensor) -> None:
    """Blend with the mean of the image's own luma, rounded; 1 keeps."""
    _blend_(x, luma(x).mean((2, 3), keepdim=True).add_(0.5).floor_(), factor)


def adjust_saturation_(x: Tensor, factor: Tensor) -> None:
    """Blend with the luma; 1 keeps."""
    _blend_(x, luma(x), factor)


def adjust_hue_(x: Tensor, shift: Tensor) -> None:
    """Rotates the hue of HSV by `shift` of the circle, in [-0.5, 0.5], and rounds.

    With hue h in [-3, 3) sextants around red, minimum m and chroma C = max - min, a colour whose pure hue p is
    d sextants away from h has that channel at m + C clamp(2 - d, 0, 1), p = 0, 2, -2 for red, green, blue. And
    C |h| = |g - b| + (max - r) + 2 (min(g, b) - m), with the sign of g - b. So the products C h and C d can be
    had from differences alone: no division, no branch over sextants, which makes it 5 times as fast on a CPU.
    """
    r, g, b = x.unbind(1)
    low = torch.minimum(g, b)
    minimum = torch.minimum(low, r)
    maximum = torch.maximum(g, b)
    maximum = torch.maximum(maximum, r, out=maximum)
    chroma = maximum - minimum
    difference = g - b
    hue = (
        difference.abs()
        .add_(maximum)
        .sub_(r)
        .add_(low.sub_(minimum), alpha=2)
        .copysign_(difference)
    )
    twice = chroma * 2
    base = minimum.sub_(chroma)
    turn = shift.view(-1, 1, 1) * 6
    for channel, pure in enumerate((0, 2, -2)):
        offset = (turn - pure + 3).remainder_(6).sub_(3)
        # C (3 - d), where d is the distance on a circle of 6 sextants, so 3 - d = |3 - |h + offset||
        near = torch.addcmul(hue, chroma, offset).abs_().sub_(chroma, alpha=3).abs_()
        torch.add(torch.clamp(near, chroma, twice, out=near), base, out=x[:, channel])
    x.round_()


JITTER: tuple[tuple[Callable[..., None], str], ...] = (
    (adjust_brightness_, "brightness"),
    (adjust_contrast_, "contrast"),
    (adjust_saturation_, "saturation"),
    (adjust_hue_, "hue"),
)  # by the numbers of ViewParams.order


def box_radius(sigma: float) -> float:
    """Radius of the box filter that, applied 3 times, has the variance of a Gaussian; 0 for sigma 0.

    Its whole part counts pixels of full weight on either side, its fraction weighs one more. From Gwosdek et
    al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering", equations 7 to 14.
    """
    variance = sigma * sigma / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (
        (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    )
    return whole + fraction


def box_blur_(x: Tensor, radius: Tensor, reach: int) -> None:
    """PIL's GaussianBlur: 3 box filters along rows, then 3 along columns, edges repeated, rounded each time.

    radius: from `box_radius`; reach: the ceil of each, at least 1.
    """
    inner = 1 / (2 * radius + 1)  # weight of a pixel nearer than `reach`
    outer = (1 - (2 * reach - 1) * inner) / 2  # of the two at that distance
    size = x.shape[-1]
    for dim in (3, 2):
        shape = list(x.shape)
        shape[dim] += 2 * reach
        padded = x.new_empty(shape)
        window = [padded.narrow(dim, offset, size) for offset in range(2 * reach + 1)]
        centre = window[reach].copy_(x)
        for _ in range(3):
            padded.narrow(dim, 0, reach).copy_(centre.narrow(dim, 0, 1))
            padded.narrow(dim, reach + size, reach).copy_(centre.narrow(dim, size - 1, 1))
            body = centre if reach == 1 else sum(window[2:-1], start=window[1])
            blurred = (window[0] + window[-1]).mul_(outer).addcmul_(body, inner)
            torch.round(blurred, out=centre)
        x.copy_(centre)


def rotate_(x: Tensor, angle: Tensor) -> None:
    """Counter-clockwise by `angle` degrees about the centre, bilinear, black outside."""
    radians = angle.view(-1) * (math.pi / 180)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    theta = torch.stack((cos, -sin, zero, sin, cos, zero), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    # As PIL: a pixel whose centre comes from outside is black, any other is interpolated between real pixels.
    turned = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = ((grid >= -1) & (grid < 1)).all(dim=3).unsqueeze(1)
    # PIL truncates. The hair keeps what float32 put just below an integer (PIL has float64) from losing 1.
    torch.mul(turned.add_(2**-10).floor_(), inside, out=x)


def solarize_(x: Tensor) -> None:
    """Inverts values of 128 and more."""
    torch.where(x < 128, x, 255 - x, out=x)


def flip_(x: Tensor) -> None:
    """Mirrors left and right."""
    x.copy_(x.flip(3))
