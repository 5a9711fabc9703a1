"""Random views of small images on a GPU: one Triton kernel makes the whole augmentation.

One program makes one view and keeps the view in registers from crop to flip. For images that do
not have three channels, one program makes one channel of a view. The arithmetic is
PIL's, as in `mocofast.data.view_ops`: values are integers between operators. Crop and resize
are exact rational arithmetic. PIL rounds weights to 22 bits, so ties may round differently
(never where a crop is enlarged to a power of two).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mocofast_kernels.configs import ALL_REGISTERS, block_of

# Largest side of a view without and with rotation, limited by the registers of 8 warps.
LARGEST, LARGEST_ROTATED = 64, 32
# Columns of `parameters`.
NAMES = (
    "top",  # the crop, in pixels
    "left",
    "height",
    "width",
    "cos",  # cosine and sine of the counter-clockwise rotation, read with `rotate`
    "sin",
    "gray",  # 0 never, 1 before the jitter, 2 after the jitter
    "order",  # the first of four jitter operators: 0 brightness, 1 contrast, 2 saturation, 3 hue,
    "order1",  # any other number none
    "order2",
    "order3",
    "brightness",  # factors of the jitter
    "contrast",
    "saturation",
    "hue",  # shift of the hue, as a fraction of the circle
    "reach",  # box filter of the blur: pixels at distance `reach` have the weight `outer`,
    "inner",  # nearer pixels have the weight `inner`. Reach 0 is no blur
    "outer",
    "solarize",  # unless 0, values of 128 and more are inverted
    "flip",  # unless 0, left and right are exchanged
)
# Kernels read constants of their module only as constexpr.
TOP, LEFT, HEIGHT, WIDTH, COS, SIN, GRAY, ORDER = (tl.constexpr(i) for i in range(8))
BRIGHTNESS, CONTRAST, SATURATION, HUE = (tl.constexpr(i) for i in range(11, 15))
REACH, INNER, OUTER, SOLARIZE, FLIP = (tl.constexpr(i) for i in range(15, 20))
STRIDE = tl.constexpr(len(NAMES))


@triton.jit
def _tap(at, place, size, larger, S: tl.constexpr):
    """Returns the weight of input pixel `at` (of `size`) in output pixel `place` (of S).

    The filter is a triangle. Weights are in units of 1 / (2 larger), larger = max(size, S).
    """
    weight = 2 * larger - tl.abs((2 * at + 1) * S - (2 * place + 1) * size)
    return tl.where(at < size, tl.maximum(weight, 0), 0).to(tl.float32)


@triton.jit
def _first(place, size, larger, S: tl.constexpr):
    """Returns the first input pixel whose `_tap` is positive."""
    return tl.maximum((2 * place + 1) * size - 2 * larger + S, 0) // (2 * S)


@triton.jit
def _mean(sums, total):
    """Returns sums / total, rounded half up.

    Arguments are integers below 2^24, so the rounding of the division never crosses an integer.
    """
    return tl.floor(tl.div_rn(2.0 * sums + total, 2.0 * total))


@triton.jit
def _crop(channel, W, height, width, i, j, TALL: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr):
    """Returns pixels (i, j) of one channel of the crop, resized to TALL x WIDE.

    channel: pointer to the crop's first pixel. W: width of the image. C: number of channels.
    The filter is antialiased and bilinear, along rows first.
    """
    taller, wider = tl.maximum(height, TALL), tl.maximum(width, WIDE)
    first_y, first_x = _first(i, height, taller, TALL), _first(j, width, wider, WIDE)
    sums, total = (i * j * 0).to(tl.float32), (i * 0).to(tl.float32)
    for tap_y in range((2 * taller + TALL - 1) // TALL):
        y = first_y + tap_y
        weight_y = _tap(y, i, height, taller, TALL)
        row_sums, row_total = (i * j * 0).to(tl.float32), (j * 0).to(tl.float32)
        for tap_x in range((2 * wider + WIDE - 1) // WIDE):
            x = first_x + tap_x
            weight = _tap(x, j, width, wider, WIDE)
            pixel = tl.load(channel + (y * W + x) * C, mask=(weight > 0) & (weight_y > 0), other=0)
            row_sums += weight * pixel.to(tl.float32)
            row_total += weight
        sums += weight_y * _mean(row_sums, row_total)
        total += weight_y
    return _mean(sums, total)


@triton.jit
def _rotated_crop(
    pixel, W, height, width, i, j, cos, sin, TALL: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr
):
    """Returns `_crop` rotated about the centre. pixel: the pointer `channel` of `_crop`.

    Bilinear between the pixels of `_crop`, black where a pixel's centre comes from outside.
    """
    # Where pixel (i, j) comes from, in [-1, 1) and then in pixels.
    x = (2 * j + 1) / WIDE - 1.0
    y = (2 * i + 1) / TALL - 1.0
    from_x = cos * x - sin * (TALL / WIDE) * y
    from_y = sin * (WIDE / TALL) * x + cos * y
    x = tl.minimum(tl.maximum(((from_x + 1.0) * WIDE - 1.0) * 0.5, 0.0), WIDE - 1.0)
    y = tl.minimum(tl.maximum(((from_y + 1.0) * TALL - 1.0) * 0.5, 0.0), TALL - 1.0)
    rotated = x * 0.0
    for corner in range(4):
        column, row = tl.floor(x) + corner % 2, tl.floor(y) + corner // 2
        weight = (1.0 - tl.abs(column - x)) * (1.0 - tl.abs(row - y))
        column = tl.minimum(column.to(tl.int32), WIDE - 1)
        row = tl.minimum(row.to(tl.int32), TALL - 1)
        rotated += weight * _crop(pixel, W, height, width, row, column, TALL, WIDE, C)
    inside = (from_x >= -1.0) & (from_x < 1.0) & (from_y >= -1.0) & (from_y < 1.0)
    # PIL truncates float64 values. Float32 may lie just below an integer, so add 1/1024 first.
    return tl.where(inside, tl.floor(rotated + 1.0 / 1024.0), 0.0)


@triton.jit
def _luma(r, g, b):
    """Returns the gray value by ITU-R BT.601, in PIL's fixed point, rounded."""
    return tl.floor(
        r * (19595.0 / 65536.0) + g * (38470.0 / 65536.0) + b * (7471.0 / 65536.0) + 0.5
    )


@triton.jit
def _blend(x, other, factor):
    """Returns other + factor (x - other), clamped to [0, 255] and truncated."""
    return tl.floor(tl.minimum(tl.maximum((x - other) * factor + other, 0.0), 255.0))


@triton.jit
def _hue_channel(hue, chroma, base, turn, pure: tl.constexpr):
    """Returns a channel after a shift of the hue. `view_ops.adjust_hue_` derives the formula."""
    offset = turn - pure + 3.0
    offset = offset - 6.0 * tl.floor(offset / 6.0) - 3.0
    near = tl.abs(tl.abs(hue + chroma * offset) - 3.0 * chroma)
    return tl.floor(tl.minimum(tl.maximum(near, chroma), 2.0 * chroma) + base + 0.5)


@triton.jit
def _jitter(r, g, b, operator, values, inside, PIXELS: tl.constexpr):
    """Applies jitter operator 0 to 3 (brightness, contrast, saturation, hue), or none."""
    if operator == 0:
        factor = tl.load(values + BRIGHTNESS)
        r, g, b = _blend(r, 0.0, factor), _blend(g, 0.0, factor), _blend(b, 0.0, factor)
    elif operator == 1:
        factor = tl.load(values + CONTRAST)
        gray = tl.where(inside, _luma(r, g, b), 0.0)
        sums = tl.sum(tl.sum(gray, axis=1), axis=0)  # below 2^24: exact
        mean = tl.floor(tl.div_rn(sums, PIXELS * 1.0) + 0.5)
        r, g, b = _blend(r, mean, factor), _blend(g, mean, factor), _blend(b, mean, factor)
    elif operator == 2:
        factor = tl.load(values + SATURATION)
        gray = _luma(r, g, b)
        r, g, b = _blend(r, gray, factor), _blend(g, gray, factor), _blend(b, gray, factor)
    elif operator == 3:
        turn = 6.0 * tl.load(values + HUE)
        low = tl.minimum(g, b)
        minimum = tl.minimum(low, r)
        maximum = tl.maximum(tl.maximum(g, b), r)
        chroma = maximum - minimum
        hue = tl.abs(g - b) + maximum - r + 2.0 * (low - minimum)
        hue = tl.where(g < b, -hue, hue)
        base = minimum - chroma
        r = _hue_channel(hue, chroma, base, turn, 0)
        g = _hue_channel(hue, chroma, base, turn, 2)
        b = _hue_channel(hue, chroma, base, turn, -2)
    return r, g, b


@triton.jit
def _box(to, source, reach, inner, outer, S: tl.constexpr):
    """Returns the weight of pixel `source` in pixel `to` of a box filter, as two float16 summands.

    Edges repeat: weights beyond the edge are added to the weight of the edge's pixel.
    """
    distance = tl.abs(to - source)
    weight = tl.where(distance < reach, inner, tl.where(distance == reach, outer, 0.0))
    before, after = reach - to, reach - (S - 1 - to)  # number of offsets beyond the edges
    weight += tl.where((source == 0) & (before > 0), outer + (before - 1) * inner, 0.0)
    weight += tl.where((source == S - 1) & (after > 0), outer + (after - 1) * inner, 0.0)
    weight = tl.where(source < S, weight, 0.0)
    high = weight.to(tl.float16)
    return high, (weight - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _product(a, b, c, d):
    """Returns a b + c d, rounded.

    The factors are pixels and the two summands of weights. Two float16 numbers hold a weight to
    22 bits (PIL: 24 bits).
    """
    total = tl.dot(c.to(tl.float16), d.to(tl.float16))
    return tl.floor(tl.dot(a.to(tl.float16), b.to(tl.float16), total) + 0.5)


@triton.jit
def _augment_kernel(
    images,  # (M, H, W, 3) uint8
    index,  # (B,) int64
    parameters,  # (V, B, 20) float32
    out,  # (V, B, TALL, WIDE, 3) uint8
    parameters_stride,  # elements from a view to the next
    H,
    W,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    # One view of one image: the parameters, the crop's corner, and the pixels of the tile.
    row, view = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    values = parameters + view * parameters_stride + row * STRIDE
    height, width = tl.load(values + HEIGHT).to(tl.int32), tl.load(values + WIDTH).to(tl.int32)
    corner = tl.load(values + TOP).to(tl.int32) * W + tl.load(values + LEFT).to(tl.int32)
    image = images + tl.load(index + row) * H * W * 3 + corner * 3
    rows, columns = tl.arange(0, BLOCK_Y)[:, None], tl.arange(0, BLOCK_X)[None, :]
    inside = (rows < TALL) & (columns < WIDE)
    # Pixels that pad the tile repeat the edge. They are never stored.
    i, j = tl.minimum(rows, TALL - 1), tl.minimum(columns, WIDE - 1)

    # Crop, resize, rotate.
    if not ROTATE:
        r = _crop(image, W, height, width, i, j, TALL, WIDE, 3)
        g = _crop(image + 1, W, height, width, i, j, TALL, WIDE, 3)
        b = _crop(image + 2, W, height, width, i, j, TALL, WIDE, 3)
    else:
        cos, sin = tl.load(values + COS), tl.load(values + SIN)
        r = _rotated_crop(image, W, height, width, i, j, cos, sin, TALL, WIDE, 3)
        g = _rotated_crop(image + 1, W, height, width, i, j, cos, sin, TALL, WIDE, 3)
        b = _rotated_crop(image + 2, W, height, width, i, j, cos, sin, TALL, WIDE, 3)
    # Gray before the jitter, the jitter's operators in their order, gray after the jitter.
    gray = tl.load(values + GRAY)
    if gray == 1.0:
        r = _luma(r, g, b)
        g, b = r, r
    for slot in range(4):
        r, g, b = _jitter(r, g, b, tl.load(values + ORDER + slot), values, inside, TALL * WIDE)
    if gray == 2.0:
        r = _luma(r, g, b)
        g, b = r, r
    # Blur.
    reach = tl.load(values + REACH).to(tl.int32)
    if reach > 0:
        inner, outer = tl.load(values + INNER), tl.load(values + OUTER)
        # Three box filters along rows, then three along columns, as products with a band matrix.
        place, source = tl.arange(0, BLOCK_X)[None, :], tl.arange(0, BLOCK_X)[:, None]
        high, low = _box(place, source, reach, inner, outer, WIDE)
        for _ in range(3):
            r = _product(r, high, r, low)
            g = _product(g, high, g, low)
            b = _product(b, high, b, low)
        place, source = tl.arange(0, BLOCK_Y)[:, None], tl.arange(0, BLOCK_Y)[None, :]
        high, low = _box(place, source, reach, inner, outer, TALL)
        for _ in range(3):
            r = _product(high, r, low, r)
            g = _product(high, g, low, g)
            b = _product(high, b, low, b)
    # Solarise, flip, store.
    if tl.load(values + SOLARIZE) != 0.0:
        r = tl.where(r < 128.0, r, 255.0 - r)
        g = tl.where(g < 128.0, g, 255.0 - g)
        b = tl.where(b < 128.0, b, 255.0 - b)
    to = tl.where(tl.load(values + FLIP) != 0.0, WIDE - 1 - columns, columns)
    target = out + (view * tl.num_programs(0) + row) * TALL * WIDE * 3 + (rows * WIDE + to) * 3
    tl.store(target, r.to(tl.uint8), mask=inside)
    tl.store(target + 1, g.to(tl.uint8), mask=inside)
    tl.store(target + 2, b.to(tl.uint8), mask=inside)


@triton.jit
def _augment_channels_kernel(
    images,  # (M, H, W, C) uint8
    index,  # (B,) int64
    parameters,  # (V, B, 20) float32
    out,  # (V, B, TALL, WIDE, C) uint8
    parameters_stride,  # elements from a view to the next
    H,
    W,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    C: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Makes one channel of one view. No operator mixes channels.

    Operators on colours (gray, saturation, hue, solarize) are left out.
    """
    row, view = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.program_id(2)
    values = parameters + view * parameters_stride + row * STRIDE
    height, width = tl.load(values + HEIGHT).to(tl.int32), tl.load(values + WIDTH).to(tl.int32)
    corner = tl.load(values + TOP).to(tl.int32) * W + tl.load(values + LEFT).to(tl.int32)
    image = images + tl.load(index + row) * H * W * C + corner * C + c
    rows, columns = tl.arange(0, BLOCK_Y)[:, None], tl.arange(0, BLOCK_X)[None, :]
    inside = (rows < TALL) & (columns < WIDE)
    i, j = tl.minimum(rows, TALL - 1), tl.minimum(columns, WIDE - 1)
    # Crop, resize, rotate.
    if not ROTATE:
        x = _crop(image, W, height, width, i, j, TALL, WIDE, C)
    else:
        cos, sin = tl.load(values + COS), tl.load(values + SIN)
        x = _rotated_crop(image, W, height, width, i, j, cos, sin, TALL, WIDE, C)
    # Brightness and contrast in their order.
    for slot in range(4):
        operator = tl.load(values + ORDER + slot)
        if operator == 0:
            x = _blend(x, 0.0, tl.load(values + BRIGHTNESS))
        elif operator == 1:
            sums = tl.sum(tl.sum(tl.where(inside, x, 0.0), axis=1), axis=0)
            mean = tl.floor(tl.div_rn(sums, TALL * WIDE * 1.0) + 0.5)
            x = _blend(x, mean, tl.load(values + CONTRAST))
    # Blur, as in `_augment_kernel`.
    reach = tl.load(values + REACH).to(tl.int32)
    if reach > 0:
        inner, outer = tl.load(values + INNER), tl.load(values + OUTER)
        place, source = tl.arange(0, BLOCK_X)[None, :], tl.arange(0, BLOCK_X)[:, None]
        high, low = _box(place, source, reach, inner, outer, WIDE)
        for _ in range(3):
            x = _product(x, high, x, low)
        place, source = tl.arange(0, BLOCK_Y)[:, None], tl.arange(0, BLOCK_Y)[None, :]
        high, low = _box(place, source, reach, inner, outer, TALL)
        for _ in range(3):
            x = _product(high, x, low, x)
    # Flip, store.
    to = tl.where(tl.load(values + FLIP) != 0.0, WIDE - 1 - columns, columns)
    target = out + (view * tl.num_programs(0) + row) * TALL * WIDE * C + (rows * WIDE + to) * C + c
    tl.store(target, x.to(tl.uint8), mask=inside)


def augment(
    images: Tensor, index: Tensor, parameters: Tensor, shape: tuple[int, int], *, rotate: bool
) -> Tensor:
    """Returns V views of B images, (V, B, height, width, C) uint8, from a single launch.

    images: (M, H, W, C) uint8, contiguous. If C is not 3, operators on colours are left out, and
        contrast is relative to the mean of every channel.
    index: (B,) int64, contiguous, numbers of images in [0, M).
    parameters: (V, B, 20) float32, contiguous in the last two dimensions. `NAMES` documents the
        columns.
    shape: height and width of a view, at most `LARGEST`, or `LARGEST_ROTATED` with rotate.
    rotate: rotate views by the columns cos and sin.
    All tensors are on the same device.
    """
    (_, H, W, channels), (V, B, columns) = images.shape, parameters.shape
    found = images.shape, images.dtype, index.shape, index.dtype, parameters.shape, parameters.dtype
    assert images.dtype == torch.uint8 and images.is_contiguous(), found
    assert columns == len(NAMES) and parameters.dtype == torch.float32, found
    assert parameters[0].is_contiguous(), found
    assert index.shape == (B,) and index.dtype == torch.int64 and index.is_contiguous(), found
    largest = LARGEST_ROTATED if rotate else LARGEST
    assert min(shape) > 0 and max(shape) <= largest, (shape, rotate)
    out = torch.empty((V, B, *shape, channels), dtype=torch.uint8, device=images.device)
    tall, wide = map(block_of, shape)
    rgb = channels == 3
    kernel = _augment_kernel if rgb else _augment_channels_kernel
    with torch.cuda.device_of(images):
        # No fused multiply-adds: a value just above an integer must not end just below.
        kernel[(B, V) if rgb else (B, V, channels)](
            images,
            index,
            parameters,
            out,
            parameters.stride(0),
            H,
            W,
            TALL=shape[0],
            WIDE=shape[1],
            **({} if rgb else {"C": channels}),
            ROTATE=rotate,
            BLOCK_Y=tall,
            BLOCK_X=wide,
            num_warps=8 if rotate or max(tall, wide) > 32 else 4,
            num_stages=1,
            **{**ALL_REGISTERS, "enable_fp_fusion": False},
        )
    return out
