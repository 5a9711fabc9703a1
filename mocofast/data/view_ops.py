"""Augments a batch of views in plain PyTorch on any device: jitter, grayscale, blur,
solarize, rotation, flip.

The arithmetic is PIL's, which facebookresearch/moco uses through torchvision. Values
are integers between operators, blends truncate, luma rounds, and the blur is three box
filters in every direction. The hue is the exception: PIL quantises hue and saturation
to 8 bits. Here nothing is quantised, as in torchvision's tensor operator.

Images of 16 bits and of any number of channels go through the same operators, on integers
up to 65535. Operators on colours need three channels. Where there are not three, contrast
blends every channel with the mean of the channel.

DALI's operators are not used. Their colour operators rotate the hue in YIQ and round
where PIL truncates. The exact formulas take several times as long in DALI's CPU
arithmetic (`docs/log.md`, section DALI).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from mocofast.config import AugmentConfig
from mocofast.data.interface import ViewParams
from mocofast.data.random_numbers import normal_numbers, uniform_numbers
from mocofast.data.rotation import rotate_
from mocofast.data.stains import jitter_stains_

# Weights of red, green and blue: ITU-R BT.601 in PIL's fixed point, exact in float32.
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)


def apply_view_ops(
    crops: Tensor, params: Sequence[ViewParams], augment: AugmentConfig, out: Tensor
) -> None:
    """Applies all operators of `params` after the crop, in the order of `ViewParams`.

    crops, out: (n, H, W, C), uint8 or uint16 on one device. `out` may be `crops`.
    params: the parameters of n views.
    """
    top = 255 if crops.dtype == torch.uint8 else 65535  # the largest level
    is_colour = crops.shape[-1] == 3
    # x: (n, C, H, W) float32
    x = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    gray = [i for i, p in enumerate(params) if p.gray]
    _on_rows(x, [i for i, p in enumerate(params) if p.angle], rotate_, [p.angle for p in params])
    if augment.gray_first:
        _on_rows(x, gray, grayscale_)
    # Jitter. The operators have another order in every view: go through the four places of
    # the order.
    for slot in range(4):
        at_slot = [p.order[slot] if p.order else None for p in params]
        for operator, (adjust_, name) in enumerate(JITTER if is_colour else JITTER[:2]):
            rows = [i for i, chosen in enumerate(at_slot) if chosen == operator]
            adjust = partial(adjust_, top=top)
            _on_rows(x, rows, adjust, [getattr(p, name) for p in params])
    if not augment.gray_first:
        _on_rows(x, gray, grayscale_)
    # Blur: views with an equal reach together.
    radii = [box_radius(p.sigma) for p in params]
    reaches = [math.ceil(radius) for radius in radii]
    for reach in sorted({*reaches} - {0}):
        rows = [i for i, r in enumerate(reaches) if r == reach]
        _on_rows(x, rows, partial(box_blur_, reach=reach), radii)
    _on_rows(x, [i for i, p in enumerate(params) if p.solarize], partial(solarize_, top=top))
    _on_rows(x, [i for i, p in enumerate(params) if p.flip], flip_)
    if any(has_late_ops(p) for p in params):
        apply_late_ops(x, params, augment, top)
    out.copy_(x.permute(0, 2, 3, 1))


def _on_rows(
    x: Tensor, rows: list[int], operator: Callable[..., None], values: Sequence[float] | None = None
) -> None:
    """Applies an in-place operator to some images of x.

    x: (n, C, H, W) float32.
    rows: the images.
    operator: takes images (r, C, H, W) and, if `values` is given, their values (r, 1,
        1, 1) float32.
    values: a value for every image of x.
    """
    if not rows:
        return
    part, index = x, None
    if len(rows) < len(x):
        index = torch.tensor(rows, device="cpu").to(x.device, non_blocking=True)
        part = x[index]
    if values is None:
        operator(part)
    else:
        chosen = torch.tensor([values[i] for i in rows], dtype=torch.float32, device="cpu")
        operator(part, chosen.to(x.device, non_blocking=True).view(-1, 1, 1, 1))
    if index is not None:
        x[index] = part


# In all functions below, x is (n, C, H, W) float32 with integers 0..top, and C is 3 for
# operators on colours. Functions with a trailing underscore change x. Factors are (n, 1, 1, 1),
# or (n, C, 1, 1) for a factor per channel.


def luma(x: Tensor) -> Tensor:
    """Returns the luma, (n, 1, H, W), rounded to integers: PIL's mode "L"."""
    r, g, b = x.unbind(1)
    gray = torch.mul(r, LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])
    return gray.add_(0.5).floor_().unsqueeze(1)


def grayscale_(x: Tensor) -> None:
    """Sets all three channels to the luma."""
    x.copy_(luma(x).expand_as(x))


def _blend_(x: Tensor, other: Tensor, factor: Tensor, top: int) -> None:
    # Not factor * x + (1 - factor) * other: rounding would put pixels with x == other
    # slightly below their integer, and truncation would darken them by 1.
    x.sub_(other).mul_(factor).add_(other).clamp_(0, top).floor_()


def adjust_brightness_(x: Tensor, factor: Tensor, top: int = 255) -> None:
    """Blends with black. A factor of 1 keeps the image."""
    x.mul_(factor).clamp_(max=top).floor_()


def adjust_contrast_(x: Tensor, factor: Tensor, top: int = 255) -> None:
    """Blends with the mean luma of the image, rounded. A factor of 1 keeps the image.

    Without three channels, every channel is blended with the mean of the channel.
    """
    gray = luma(x) if x.shape[1] == 3 else x
    _blend_(x, gray.mean((2, 3), keepdim=True).add_(0.5).floor_(), factor, top)


def adjust_saturation_(x: Tensor, factor: Tensor, top: int = 255) -> None:
    """Blends with the luma. A factor of 1 keeps the image."""
    _blend_(x, luma(x), factor, top)


def adjust_hue_(x: Tensor, shift: Tensor, top: int = 255) -> None:
    """Rotates the hue of HSV and rounds.

    shift: fraction of the colour circle, in [-0.5, 0.5].
    top: not used. The result stays in the range of the channels.

    Let h in [-3, 3) be the hue in sextants around red, m the minimum of the channels
    and C = max - min the chroma. A channel with pure hue p (0, 2, -2 for red, green,
    blue), d sextants away from h, has the value m + C clamp(2 - d, 0, 1). Also C |h| =
    |g - b| + (max - r) + 2 (min(g, b) - m), and h has the sign of g - b. The products C
    h and C d need differences only, no division and no branch over sextants. This is 5
    times as fast on a CPU.
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
        # C (3 - d), where d is the distance on a circle of 6 sextants: 3 - d = |3 - |h +
        # offset||
        near = torch.addcmul(hue, chroma, offset).abs_().sub_(chroma, alpha=3).abs_()
        torch.add(torch.clamp(near, chroma, twice, out=near), base, out=x[:, channel])
    x.round_()


# The operators by their numbers in ViewParams.order, and their fields in ViewParams.
JITTER: tuple[tuple[Callable[..., None], str], ...] = (
    (adjust_brightness_, "brightness"),
    (adjust_contrast_, "contrast"),
    (adjust_saturation_, "saturation"),
    (adjust_hue_, "hue"),
)


def box_radius(sigma: float) -> float:
    """Returns the radius of a box filter: three applications have the variance of the Gaussian.

    sigma: standard deviation of the Gaussian, in pixels. 0 gives 0.

    The whole part of the radius counts the pixels of full weight on every side. The
    fraction is the weight of the next pixel. From Gwosdek et al. 2011, "Theoretical
    foundations of Gaussian convolution by extended box filtering", equations 7 to 14.
    """
    variance = sigma * sigma / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (
        (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    )
    return whole + fraction


def box_blur_(x: Tensor, radius: Tensor, reach: int) -> None:
    """Blurs as PIL's GaussianBlur: 3 box filters along rows, then 3 along columns.

    radius: (n, 1, 1, 1), from `box_radius`.
    reach: the ceiling of all radii, at least 1.

    Pixels at the edges are repeated outside. Every filter rounds to integers.
    """
    inner = 1 / (2 * radius + 1)  # weight of a pixel nearer than `reach`
    outer = (1 - (2 * reach - 1) * inner) / 2  # weight of the two pixels at distance `reach`
    for dim in (3, 2):
        size = x.shape[dim]
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


def solarize_(x: Tensor, top: int = 255) -> None:
    """Inverts the upper half of the levels: values of 128 and more of 255."""
    torch.where(x < (top + 1) // 2, x, top - x, out=x)


def flip_(x: Tensor) -> None:
    """Exchanges left and right."""
    x.copy_(x.flip(3))


# The late operators: vertical flip, quarter turns, jitter by channel, jitter of stains, noise.


def has_late_ops(p: ViewParams) -> bool:
    """Returns whether a view has an operator of `apply_late_ops`."""
    return bool(p.vertical_flip or p.turns or p.key)


def only_moves(p: ViewParams) -> bool:
    """Returns whether flips and turns are all operators of a view after the crop."""
    changes = p.order or p.gray or p.solarize or p.key
    return not (changes or p.angle or p.sigma or p.noise)


def apply_late_ops(
    x: Tensor, params: Sequence[ViewParams], augment: AugmentConfig, top: int
) -> None:
    """Applies the operators of the last fields of `ViewParams`, in the order of the fields.

    x: (n, C, H, W) float32, integers 0..top. Changed in place.
    params: the parameters of n views.
    """
    _on_rows(x, [i for i, p in enumerate(params) if p.vertical_flip], vertical_flip_)
    for turns in (1, 2, 3):
        _on_rows(x, [i for i, p in enumerate(params) if p.turns == turns], partial(turn_, turns))
    if not any(p.key for p in params):  # all views of a batch have a key, or none
        return
    keys = signed_keys(params, x.device)
    if any(augment.channel_jitter):
        brightness, contrast = channel_factors(keys, augment, x.shape[1])
        adjust_brightness_(x, brightness[:, :, None, None], top)
        adjust_channel_contrast_(x, contrast[:, :, None, None], top)
    if augment.hed:
        jitter_stains_(x, *stain_jitter(keys, augment), top)
    if augment.noise:
        normal = normal_numbers(keys, 2, x[0].numel())
        sigma = noise_deviations(params, top).to(x.device, non_blocking=True)
        x.addcmul_(normal.view_as(x), sigma.view(-1, 1, 1, 1)).round_().clamp_(0, top)


def signed_keys(params: Sequence[ViewParams], device: torch.device) -> Tensor:
    """Returns the 32 bits of every key as a signed number, (n,) int32."""
    words = torch.tensor([p.key for p in params], device="cpu").to(torch.uint32).view(torch.int32)
    return words.to(device, non_blocking=True)


def channel_factors(keys: Tensor, augment: AugmentConfig, channels: int) -> tuple[Tensor, Tensor]:
    """Returns the factors of brightness and of contrast, (n, channels) float32.

    keys: (n,) int32, the result of `signed_keys`.
    """
    brightness, contrast = (
        (1 + strength * (2 * uniform_numbers(keys, stream, channels) - 1)).clamp_(min=0)
        for stream, strength in enumerate(augment.channel_jitter)
    )
    return brightness, contrast


def stain_jitter(keys: Tensor, augment: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Returns the factors and the offsets of three stains, (n, 3) float32.

    keys: (n,) int32, the result of `signed_keys`.
    """
    uniform = uniform_numbers(keys, 4, 6).mul_(2).sub_(1).mul_(augment.hed)
    return 1 + uniform[:, :3], uniform[:, 3:]


def noise_deviations(params: Sequence[ViewParams], top: int) -> Tensor:
    """Returns the standard deviations of the noise, (n,) float32 on the CPU, in levels."""
    return torch.tensor([p.noise * top for p in params], dtype=torch.float32, device="cpu")


def vertical_flip_(x: Tensor) -> None:
    """Exchanges top and bottom."""
    x.copy_(x.flip(2))


def turn_(turns: int, x: Tensor) -> None:
    """Turns square images counter-clockwise, `turns` times by 90 degrees."""
    x.copy_(x.rot90(turns, (2, 3)))


def adjust_channel_contrast_(x: Tensor, factor: Tensor, top: int) -> None:
    """Blends every channel with the mean of the channel, rounded."""
    _blend_(x, x.mean((2, 3), keepdim=True).add_(0.5).floor_(), factor, top)
