"""Ghost BatchNorm in NHWC memory on a GPU, by Triton: training-mode statistics over parts of a batch, with an
optional residual addition and ReLU in the pass that writes the output.

Sample n belongs to part n % parts, so that what lies together in memory is one sample of one part, of area = H W rows
of C values: row r of a part is row (r // area * parts + part) * area + r % area of memory.

Forward: statistics over chunks of rows, their combination, normalisation. Backward: sums over chunks, their
combination, the gradient. Chunks are combined in a fixed order, without atomics: equal inputs give equal bits. The
sweeps over chunks go up through memory and those after them go down, so that what the first read last is still in the
L2 cache.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mocofast_kernels.configs import REGISTERS, kernel_slots

WARPS = 4
TILE = 2048  # elements: 16 a thread
UNROLL = 4  # tiles whose loads are under way together where a sweep only reads
TILES = 4  # tiles a program of a sweep that writes takes, so that it reads the channels' numbers once for them all
CHUNKS = (
    32,
    128,
    512,
)  # most chunks of a part that a combining program takes: all of them, at once
COMBINED = 8  # columns a combining program takes: 32 bytes of a row, the least that memory delivers
WAVES = 4  # chunks for each program that a device runs at a time by configs.kernel_slots, whose programs are larger
LOOSE = [
    "area",
    "parts",
    "rows",
    "chunks",
]  # integers whose value must not choose another compiled kernel


class GhostBatchNorm(NamedTuple):
    """What the forward yields."""

    output: Tensor  # (N, C, H, W) of the input's type, channels-last
    statistics: Tensor  # (3, parts, C) float32: mean, biased variance, 1 / sqrt(variance + eps)


@triton.jit
def _place(C, parts, chunks, BLOCK_C: tl.constexpr):
    """This program's columns, part and chunk: neighbours share rows, then lie in the samples beside them."""
    program = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    columns = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return columns, program // blocks % parts, program // blocks // parts


@triton.jit
def _memory_rows(row, part, area, parts):
    """Rows of a part: their places in their samples, and their rows of memory."""
    within = row % area
    return within, (row // area * parts + part) * area + within


@triton.jit
def _advance(within, at, step, area, parts):
    """Both of the above `step` rows further on, without another division for every row."""
    within += step % area
    over = within >= area
    further = step // area * parts * area + step % area
    return tl.where(over, within - area, within), at + tl.where(
        over, further + (parts - 1) * area, further
    )


@triton.jit
def _rows_of_chunk(chunk, rows, chunks, BLOCK_R: tl.constexpr):
    """How many rows chunk number `chunk` has: every chunks-th tile is its own, and the last tile may be cut."""
    tiles = tl.cdiv(rows, BLOCK_R)
    cut = tl.where((tiles - 1) % chunks == chunk, tiles * BLOCK_R - rows, 0)
    return (tl.cdiv(tiles - chunk, chunks) * BLOCK_R - cut).to(tl.float32)


@triton.jit
def _rectified(value, sign):
    """value where sign > 0, else 0; a NaN passes, as in torch.relu and its gradient."""
    return tl.where(sign <= 0, 0.0, value)


@triton.jit(do_not_specialize=LOOSE)
def _statistics_kernel(
    x, partial, C, area, parts, rows, chunks, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    columns, part, chunk = _place(C, parts, chunks, BLOCK_C)
    inside = columns < C
    first = chunk * BLOCK_R
    if WIDE:
        first = first.to(tl.int64)
    row = first + tl.arange(0, BLOCK_R)
    within, at = _memory_rows(row, part, area, parts)
    # Sums are of differences from the mean of the chunk's first tile: with a mean far larger than the deviation, sums
    # of x and x^2 would leave nothing of the variance. Rows past the end count as that mean, in x's type, so as 0.
    offset = at.to(tl.int64)[:, None] * C + columns[None, :]
    tile = tl.load(x + offset, mask=(row < rows)[:, None] & inside[None, :], other=0.0).to(
        tl.float32
    )
    pivot = (tl.sum(tile, axis=0) / tl.minimum(rows - first, BLOCK_R)).to(x.dtype.element_ty)[
        None, :
    ]
    pivots = tl.broadcast_to(pivot, BLOCK_R, BLOCK_C)
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    step = chunks * BLOCK_R
    for _ in range(first, rows, step * UNROLL):
        for _ in tl.static_range(UNROLL):
            offset = at.to(tl.int64)[:, None] * C + columns[None, :]
            held = (row < rows)[:, None] & inside[None, :]
            difference = tl.load(x + offset, mask=held, other=pivots).to(tl.float32) - pivots.to(
                tl.float32
            )
            sums += difference
            squares += difference * difference
            row += step
            within, at = _advance(within, at, step, area, parts)
    total = tl.sum(sums, axis=0)
    shift = total / _rows_of_chunk(chunk, rows, chunks, BLOCK_R)
    place = (part * chunks + chunk).to(tl.int64) * C + columns
    tl.store(partial + place, tl.sum(pivot.to(tl.float32), axis=0) + shift, mask=inside)
    plane = parts.to(tl.int64) * chunks * C
    tl.store(partial + plane + place, tl.sum(squares, axis=0) - total * shift, mask=inside)


@triton.jit(do_not_specialize=LOOSE)
def _combine_statistics_kernel(
    partial, statistics, eps, C, parts, rows, chunks, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns, part, _ = _place(C, parts, 1, BLOCK_C)
    inside = columns < C
    chunk = tl.arange(0, BLOCK_P)[:, None]
    held = (chunk < chunks) & inside[None, :]
    at = (part * chunks + chunk).to(tl.int64) * C + columns[None, :]
    base = tl.load(partial + (part * chunks).to(tl.int64) * C + columns, mask=inside, other=0.0)[
        None, :
    ]
    count = tl.where(chunk < chunks, _rows_of_chunk(chunk, rows, chunks, BLOCK_R), 0.0)
    difference = tl.load(partial + at, mask=held, other=0.0) - base
    difference = tl.where(held, difference, 0.0)
    offset = tl.sum(count * difference, axis=0)[None, :] / rows
    difference -= offset
    plane = parts.to(tl.int64) * chunks * C
    squares = tl.load(partial + plane + at, mask=held, other=0.0) + count * difference * difference
    variance = tl.sum(squares, axis=0) / rows
    variance = tl.where(variance < 0, 0.0, variance)  # rounding, for a constant channel
    at = part.to(tl.int64) * C + columns
    plane = parts.to(tl.int64) * C
    tl.store(statistics + at, tl.sum(base + offset, axis=0), mask=inside)
    tl.store(statistics + plane + at, variance, mask=inside)
    tl.store(statistics + 2 * plane + at, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), mask=inside)


@triton.jit(do_not_specialize=LOOSE)
def _normalise_kernel(
    x, residual, output, statistics, weight, bias, running_mean, running_var, momentum, C, area, parts, rows, chunks,
    RELU: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    columns, part, chunk = _place(C, parts, chunks, BLOCK_C)
    chunk = chunks - 1 - chunk
    inside = columns < C
    plane = parts.to(tl.int64) * C
    place = part.to(tl.int64) * C + columns
    mean = tl.load(statistics + place, mask=inside, other=0.0)[None, :]
    scale = tl.load(statistics + 2 * plane + place, mask=inside, other=0.0)[None, :]
    scale *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if running_mean is not None and (part == 0) & (chunk == 0):
        means = tl.zeros([BLOCK_C], tl.float32)
        variances = tl.zeros([BLOCK_C], tl.float32)
        other = columns.to(tl.int64)
        for _ in range(parts):
            means += tl.load(statistics + other, mask=inside, other=0.0)
            variances += tl.load(statistics + plane + other, mask=inside, other=0.0)
            other += C
        unbiased = variances / parts * (rows / (rows - 1.0))
        old = tl.load(running_mean + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(running_mean + columns, old + momentum * (means / parts - old), mask=inside)
        old = tl.load(running_var + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(running_var + columns, old + momentum * (unbiased - old), mask=inside)
    if WIDE:
        chunk = chunk.to(tl.int64)
    row = chunk * TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    within, at = _memory_rows(row, part, area, parts)
    for _ in range(TILES):
        offset = at.to(tl.int64)[:, None] * C + columns[None, :]
        held = (row < rows)[:, None] & inside[None, :]
        value = (tl.load(x + offset, mask=held, other=0.0).to(tl.float32) - mean) * scale + shift
        if residual is not None:
            value += tl.load(residual + offset, mask=held, other=0.0).to(tl.float32)
        if RELU:
            value = _rectified(value, value)
        tl.store(output + offset, value, mask=held)
        row += BLOCK_R
        within, at = _advance(within, at, BLOCK_R, area, parts)


@triton.jit(do_not_specialize=LOOSE)
def _backward_sums_kernel(
    grad_output, x, output, rectified, statistics, weight, bias, partial, C, area, parts, rows, chunks,
    RELU: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    columns, part, chunk = _place(C, parts, chunks, BLOCK_C)
    inside = columns < C
    plane = parts.to(tl.int64) * C
    place = part.to(tl.int64) * C + columns
    mean = tl.load(statistics + place, mask=inside, other=0.0)[None, :]
    if RELU and output is None:
        scale = tl.load(statistics + 2 * plane + place, mask=inside, other=0.0)[None, :]
        scale *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    first = chunk * BLOCK_R
    if WIDE:
        first = first.to(tl.int64)
    row = first + tl.arange(0, BLOCK_R)
    within, at = _memory_rows(row, part, area, parts)
    step = chunks * BLOCK_R
    for _ in range(first, rows, step * UNROLL):
        for _ in tl.static_range(UNROLL):
            offset = at.to(tl.int64)[:, None] * C + columns[None, :]
            held = (row < rows)[:, None] & inside[None, :]
            grad = tl.load(grad_output + offset, mask=held, other=0.0).to(tl.float32)
            centred = tl.load(x + offset, mask=held, other=0.0).to(tl.float32) - mean
            if RELU:
                if output is None:
                    grad = _rectified(grad, centred * scale + shift)
                else:
                    grad = _rectified(
                        grad, tl.load(output + offset, mask=held, other=0.0).to(tl.float32)
                    )
                    tl.store(rectified + offset, grad, mask=held)
            sums += grad
            products += grad * centred
            row += step
            within, at = _advance(within, at, step, area, parts)
    place = (part * chunks + chunk).to(tl.int64) * C + columns
    plane = parts.to(tl.int64) * chunks * C
    tl.store(partial + place, tl.sum(sums, axis=0), mask=inside)
    tl.store(partial + plane + place, tl.sum(products, axis=0), mask=inside)


@triton.jit(do_not_specialize=LOOSE)
def _combine_sums_kernel(
    partial, statistics, sums, C, parts, chunks, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    columns, part, _ = _place(C, parts, 1, BLOCK_C)
    inside = columns < C
    chunk = tl.arange(0, BLOCK_P)[:, None]
    held = (chunk < chunks) & inside[None, :]
    at = (part * chunks + chunk).to(tl.int64) * C + columns[None, :]
    plane = parts.to(tl.int64) * chunks * C
    total = tl.sum(tl.load(partial + at, mask=held, other=0.0), axis=0)
    product = tl.sum(tl.load(partial + plane + at, mask=held, other=0.0), axis=0)
    at = part.to(tl.int64) * C + columns
    plane = parts.to(tl.int64) * C
    product *= tl.load(statistics + 2 * plane + at, mask=inside, other=0.0)
    tl.store(sums + at, total, mask=inside)
    tl.store(sums + plane + at, product, mask=inside)


@triton.jit(do_not_specialize=LOOSE)
def _grad_input_kernel(
    grad_output, x, statistics, weight, bias, sums, grad_input, grad_weight, grad_bias, C, area, parts, rows, chunks,
    RELU: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    columns, part, chunk = _place(C, parts, chunks, BLOCK_C)
    chunk = chunks - 1 - chunk
    inside = columns < C
    plane = parts.to(tl.int64) * C
    place = part.to(tl.int64) * C + columns
    mean = tl.load(statistics + place, mask=inside, other=0.0)[None, :]
    inverse_std = tl.load(statistics + 2 * plane + place, mask=inside, other=0.0)[None, :]
    scale = inverse_std * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    grad_mean = tl.load(sums + place, mask=inside, other=0.0)[None, :] / rows
    slope = tl.load(sums + plane + place, mask=inside, other=0.0)[None, :] * inverse_std / rows
    if (part == 0) & (chunk == 0):
        along_bias = tl.zeros([BLOCK_C], tl.float32)
        along_weight = tl.zeros([BLOCK_C], tl.float32)
        other = columns.to(tl.int64)
        for _ in range(parts):
            along_bias += tl.load(sums + other, mask=inside, other=0.0)
            along_weight += tl.load(sums + plane + other, mask=inside, other=0.0)
            other += C
        tl.store(grad_bias + columns, along_bias, mask=inside)
        tl.store(grad_weight + columns, along_weight, mask=inside)
    if WIDE:
        chunk = chunk.to(tl.int64)
    row = chunk * TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    within, at = _memory_rows(row, part, area, parts)
    for _ in range(TILES):
        offset = at.to(tl.int64)[:, None] * C + columns[None, :]
        held = (row < rows)[:, None] & inside[None, :]
        grad = tl.load(grad_output + offset, mask=held, other=0.0).to(tl.float32)
        centred = tl.load(x + offset, mask=held, other=0.0).to(tl.float32) - mean
        if RELU:
            grad = _rectified(grad, centred * scale + shift)
        tl.store(grad_input + offset, (grad - grad_mean - centred * slope) * scale, mask=held)
        row += BLOCK_R
        within, at = _advance(within, at, BLOCK_R, area, parts)


class _Plan(NamedTuple):
    """How a tensor is cut."""

    C: int
    area: int  # rows of C values that lie together in one part
    parts: int
    rows: int  # of a part
    block_r: int
    block_c: int
    sweep: int  # chunks of a part in a sweep that only reads
    write: int  # and in one that writes
    wide: bool  # rows need 64-bit numbers


@functools.lru_cache(maxsize=1024)
def _plan(shape: tuple[int, ...], parts: int, slots: int) -> _Plan:
    N, C, H, W = shape
    rows = N // parts * H * W
    # A power of two that divides C needs no mask and keeps loads 16 bytes wide.
    block_c = next((b for b in (64, 32) if C % b == 0), min(64, triton.next_power_of_2(C)))
    block_r = TILE // block_c
    tiles = triton.cdiv(rows, block_r)
    blocks = triton.cdiv(C, block_c) * parts
    sweep = max(1, min(triton.cdiv(tiles, UNROLL), WAVES * slots // blocks, CHUNKS[-1]))
    # Without parts all samples are one.
    area = rows if parts == 1 else H * W
    return _Plan(
        C,
        area,
        parts,
        rows,
        block_r,
        block_c,
        sweep,
        triton.cdiv(tiles, TILES),
        _is_wide(N * H * W),
    )


def _is_wide(rows: int) -> bool:
    """Whether numbers of rows, some of them a step past the last, leave 32 bits."""
    return rows + TILE * UNROLL * CHUNKS[-1] >= 2**31


def ghost_bn_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    parts: int,
    momentum: float,
    eps: float,
    relu: bool,
) -> GhostBatchNorm:
    """BatchNorm of sample n over the samples m with m % parts == n % parts, then + residual, then ReLU.

    x, residual: (N, C, H, W), channels-last, float32, bfloat16 or float16, N divisible by parts and more than one
    value a channel and part. weight, bias, running_mean, running_var: (C,), contiguous, any of these types. Running
    statistics, where given, move by `momentum` towards the parts' mean and the mean of their unbiased variances.
    """
    plan = _plan(tuple(x.shape), parts, kernel_slots(x.device))
    output = torch.empty_like(x, memory_format=torch.channels_last)
    partial = torch.empty((2, parts, plan.sweep, plan.C), dtype=torch.float32, device=x.device)
    statistics = torch.empty((3, parts, plan.C), dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(plan.C, plan.block_c) * parts
    with torch.cuda.device_of(x):
        _statistics_kernel[(blocks * plan.sweep,)](
            x, partial, plan.C, plan.area, parts, plan.rows, plan.sweep, WIDE=plan.wide,
            BLOCK_R=plan.block_r, BLOCK_C=plan.block_c, UNROLL=UNROLL, num_warps=WARPS,
        )  # fmt: skip
        _combine_statistics_kernel[(triton.cdiv(plan.C, COMBINED) * parts,)](
            partial, statistics, eps, plan.C, parts, plan.rows, plan.sweep, BLOCK_R=plan.block_r,
            BLOCK_P=_combined(plan), BLOCK_C=COMBINED, num_warps=WARPS,
        )  # fmt: skip
        _normalise_kernel[(blocks * plan.write,)](
            x, residual, output, statistics, weight, bias, running_mean, running_var, momentum, plan.C, plan.area,
            parts, plan.rows, plan.write, RELU=relu, WIDE=plan.wide, BLOCK_R=plan.block_r, BLOCK_C=plan.block_c,
            TILES=TILES, num_warps=WARPS,
        )  # fmt: skip
    return GhostBatchNorm(output, statistics)


def ghost_bn_backward(
    grad_output: Tensor,
    x: Tensor,
    output: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    *,
    parts: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual.

    grad_output, x: as in the forward, channels-last. output: the forward's where there was a residual and a ReLU
    (whose mask is else worked out from x), else None. statistics: the forward's. The gradients of weight and bias are
    float32, the residual's is grad_output itself where there was no ReLU.
    """
    plan = _plan(tuple(x.shape), parts, kernel_slots(x.device))
    rectified = grad_output if output is None else torch.empty_like(grad_output)
    grad_input = torch.empty_like(x, memory_format=torch.channels_last)
    partial = torch.empty((2, parts, plan.sweep, plan.C), dtype=torch.float32, device=x.device)
    sums = torch.empty((2, parts, plan.C), dtype=torch.float32, device=x.device)
    grad_weight, grad_bias = (
        torch.empty(plan.C, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    blocks = triton.cdiv(plan.C, plan.block_c) * parts
    with torch.cuda.device_of(x):
        _backward_sums_kernel[(blocks * plan.sweep,)](
            grad_output, x, output, rectified, statistics, weight, bias, partial, plan.C, plan.area, parts, plan.rows,
            plan.sweep, RELU=relu, WIDE=plan.wide, BLOCK_R=plan.block_r, BLOCK_C=plan.block_c, UNROLL=UNROLL // 2,
            num_warps=WARPS,
        )  # fmt: skip
        _combine_sums_kernel[(triton.cdiv(plan.C, COMBINED) * parts,)](
            partial, statistics, sums, plan.C, parts, plan.sweep, BLOCK_P=_combined(plan), BLOCK_C=COMBINED,
            num_warps=WARPS,
        )  # fmt: skip
        # ptxas would spill two words of the mask's work for one program more.
        limit = {"maxnreg": REGISTERS} if relu and output is None else {}
        _grad_input_kernel[(blocks * plan.write,)](
            rectified, x, statistics, weight, bias, sums, grad_input, grad_weight, grad_bias, plan.C, plan.area,
            parts, plan.rows, plan.write, RELU=relu and output is None, WIDE=plan.wide, BLOCK_R=plan.block_r,
            BLOCK_C=plan.block_c, TILES=TILES, num_warps=WARPS, **limit,
        )  # fmt: skip
    return grad_input, grad_weight, grad_bias, rectified


def _combined(plan: _Plan) -> int:
    return next(most for most in CHUNKS if plan.sweep <= most)
