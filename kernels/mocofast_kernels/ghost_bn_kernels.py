"""Triton kernels of ghost BatchNorm in NHWC memory, launched by `mocofast_kernels.ghost_bn`.

Sample n belongs to split n % num_splits. A row of a split is a pixel, with C values.
Row r of split s is row (r // area * num_splits + s) * area + r % area of memory, where
area = H W is the number of consecutive rows of memory in a split.

Forward: statistics of chunks of rows, combination of the chunks, normalisation.
Backward: sums of chunks of rows, combination of the chunks, gradient of the input.
Chunks are combined in a fixed order without atomics: equal inputs give equal bits.
The second pass over memory runs backwards and starts with what is still in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Integer arguments whose value must not choose another compiled kernel.
NOT_SPECIALISED = ["area", "num_splits", "rows", "chunks"]


@triton.jit
def _place(C, num_splits, chunks, BLOCK_C: tl.constexpr):
    """Returns this program's columns, split and chunk.

    Neighbouring programs share rows, then take neighbouring samples.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    columns = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return columns, program // blocks % num_splits, program // blocks // num_splits


@triton.jit
def _memory_rows(row, split, area, num_splits):
    """Returns, for rows of a split, their places in their samples and their rows of memory."""
    within = row % area
    return within, (row // area * num_splits + split) * area + within


@triton.jit
def _advance(within, at, step, area, num_splits):
    """Moves the results of `_memory_rows` on by `step` rows, without a division for every row."""
    within += step % area
    over = within >= area
    further = step // area * num_splits * area + step % area
    return tl.where(over, within - area, within), at + tl.where(
        over, further + (num_splits - 1) * area, further
    )


@triton.jit
def _rows_of_chunk(chunk, rows, chunks, BLOCK_R: tl.constexpr):
    """Returns how many rows a chunk has, float32.

    Chunk c takes the tiles c, c + chunks, c + 2 chunks, ... The last tile may be shorter.
    """
    tiles = tl.cdiv(rows, BLOCK_R)
    cut = tl.where((tiles - 1) % chunks == chunk, tiles * BLOCK_R - rows, 0)
    return (tl.cdiv(tiles - chunk, chunks) * BLOCK_R - cut).to(tl.float32)


@triton.jit
def _rectified(value, sign):
    """Returns value where sign > 0, else 0. NaN stays NaN, as in torch.relu and its gradient."""
    return tl.where(sign <= 0, 0.0, value)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _statistics_kernel(
    x,  # (N, C, H, W), channels-last
    partial,  # (2, num_splits, chunks, C): mean of a chunk, sum of squared deviations from it
    C,
    area,
    num_splits,
    rows,
    chunks,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    columns, split, chunk = _place(C, num_splits, chunks, BLOCK_C)
    inside = columns < C
    first = chunk * BLOCK_R
    if WIDE:
        first = first.to(tl.int64)
    row = first + tl.arange(0, BLOCK_R)
    within, at = _memory_rows(row, split, area, num_splits)
    # Add up differences from the mean of the chunk's first tile (the pivot). Where the mean is
    # far larger than the deviation, sums of x and x^2 would leave nothing of the variance.
    # Rows past the end load the pivot, in x's type, so their difference is 0.
    offset = at.to(tl.int64)[:, None] * C + columns[None, :]
    mask = (row < rows)[:, None] & inside[None, :]
    tile = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    pivot = tl.sum(tile, axis=0) / tl.minimum(rows - first, BLOCK_R)
    pivot = pivot.to(x.dtype.element_ty)[None, :]
    pivots = tl.broadcast_to(pivot, BLOCK_R, BLOCK_C)
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    step = chunks * BLOCK_R
    for _ in range(first, rows, step * UNROLL):
        for _ in tl.static_range(UNROLL):
            offset = at.to(tl.int64)[:, None] * C + columns[None, :]
            held = (row < rows)[:, None] & inside[None, :]
            value = tl.load(x + offset, mask=held, other=pivots).to(tl.float32)
            difference = value - pivots.to(tl.float32)
            sums += difference
            squares += difference * difference
            row += step
            within, at = _advance(within, at, step, area, num_splits)
    # Write the chunk's mean and its squared deviations from this mean.
    total = tl.sum(sums, axis=0)
    shift = total / _rows_of_chunk(chunk, rows, chunks, BLOCK_R)
    place = (split * chunks + chunk).to(tl.int64) * C + columns
    tl.store(partial + place, tl.sum(pivot.to(tl.float32), axis=0) + shift, mask=inside)
    plane = num_splits.to(tl.int64) * chunks * C
    tl.store(partial + plane + place, tl.sum(squares, axis=0) - total * shift, mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _combine_statistics_kernel(
    partial,  # (2, num_splits, chunks, C), written by _statistics_kernel
    statistics,  # (3, num_splits, C): mean, biased variance, 1 / sqrt(variance + eps)
    eps,
    C,
    num_splits,
    rows,
    chunks,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns, split, _ = _place(C, num_splits, 1, BLOCK_C)
    inside = columns < C
    chunk = tl.arange(0, BLOCK_P)[:, None]
    held = (chunk < chunks) & inside[None, :]
    at = (split * chunks + chunk).to(tl.int64) * C + columns[None, :]
    first = partial + (split * chunks).to(tl.int64) * C + columns
    # Mean over the chunks, from differences to the first chunk's mean.
    base = tl.load(first, mask=inside, other=0.0)[None, :]
    count = tl.where(chunk < chunks, _rows_of_chunk(chunk, rows, chunks, BLOCK_R), 0.0)
    difference = tl.load(partial + at, mask=held, other=0.0) - base
    difference = tl.where(held, difference, 0.0)
    offset = tl.sum(count * difference, axis=0)[None, :] / rows
    difference -= offset
    # Variance: within the chunks, and of the chunks' means.
    plane = num_splits.to(tl.int64) * chunks * C
    squares = tl.load(partial + plane + at, mask=held, other=0.0) + count * difference * difference
    variance = tl.sum(squares, axis=0) / rows
    variance = tl.where(variance < 0, 0.0, variance)  # rounding, for a constant channel
    at = split.to(tl.int64) * C + columns
    plane = num_splits.to(tl.int64) * C
    tl.store(statistics + at, tl.sum(base + offset, axis=0), mask=inside)
    tl.store(statistics + plane + at, variance, mask=inside)
    tl.store(statistics + 2 * plane + at, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _normalise_kernel(
    x,  # (N, C, H, W), channels-last, as residual and output
    residual,
    output,
    statistics,  # (3, num_splits, C)
    weight,  # (C,), as bias, running_mean and running_var
    bias,
    running_mean,
    running_var,
    momentum,
    C,
    area,
    num_splits,
    rows,
    chunks,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):
    columns, split, chunk = _place(C, num_splits, chunks, BLOCK_C)
    chunk = chunks - 1 - chunk  # backwards through memory
    inside = columns < C
    plane = num_splits.to(tl.int64) * C
    place = split.to(tl.int64) * C + columns
    mean = tl.load(statistics + place, mask=inside, other=0.0)[None, :]
    scale = tl.load(statistics + 2 * plane + place, mask=inside, other=0.0)[None, :]
    scale *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    # One program for each block of columns updates the running statistics.
    if running_mean is not None and (split == 0) & (chunk == 0):
        means = tl.zeros([BLOCK_C], tl.float32)
        variances = tl.zeros([BLOCK_C], tl.float32)
        other = columns.to(tl.int64)
        for _ in range(num_splits):
            means += tl.load(statistics + other, mask=inside, other=0.0)
            variances += tl.load(statistics + plane + other, mask=inside, other=0.0)
            other += C
        unbiased = variances / num_splits * (rows / (rows - 1.0))
        old = tl.load(running_mean + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(running_mean + columns, old + momentum * (means / num_splits - old), mask=inside)
        old = tl.load(running_var + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(running_var + columns, old + momentum * (unbiased - old), mask=inside)
    if WIDE:
        chunk = chunk.to(tl.int64)
    row = chunk * TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    within, at = _memory_rows(row, split, area, num_splits)
    # Normalise, add the residual, rectify.
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
        within, at = _advance(within, at, BLOCK_R, area, num_splits)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _backward_sums_kernel(
    grad_output,  # (N, C, H, W), channels-last, as x, output and rectified
    x,
    output,  # the forward's output, or None: compute the sign from x
    rectified,  # receives grad_output where output > 0, else 0; not written without output
    statistics,  # (3, num_splits, C)
    weight,  # (C,), as bias
    bias,
    partial,  # (2, num_splits, chunks, C): sums of grad, sums of grad (x - mean)
    C,
    area,
    num_splits,
    rows,
    chunks,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    columns, split, chunk = _place(C, num_splits, chunks, BLOCK_C)
    inside = columns < C
    plane = num_splits.to(tl.int64) * C
    place = split.to(tl.int64) * C + columns
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
    within, at = _memory_rows(row, split, area, num_splits)
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
                    sign = tl.load(output + offset, mask=held, other=0.0).to(tl.float32)
                    grad = _rectified(grad, sign)
                    tl.store(rectified + offset, grad, mask=held)
            sums += grad
            products += grad * centred
            row += step
            within, at = _advance(within, at, step, area, num_splits)
    place = (split * chunks + chunk).to(tl.int64) * C + columns
    plane = num_splits.to(tl.int64) * chunks * C
    tl.store(partial + place, tl.sum(sums, axis=0), mask=inside)
    tl.store(partial + plane + place, tl.sum(products, axis=0), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _combine_sums_kernel(
    partial,  # (2, num_splits, chunks, C), written by _backward_sums_kernel
    statistics,  # (3, num_splits, C)
    sums,  # (2, num_splits, C): gradients of the bias and of the weight, split by split
    C,
    num_splits,
    chunks,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns, split, _ = _place(C, num_splits, 1, BLOCK_C)
    inside = columns < C
    chunk = tl.arange(0, BLOCK_P)[:, None]
    held = (chunk < chunks) & inside[None, :]
    at = (split * chunks + chunk).to(tl.int64) * C + columns[None, :]
    plane = num_splits.to(tl.int64) * chunks * C
    total = tl.sum(tl.load(partial + at, mask=held, other=0.0), axis=0)
    product = tl.sum(tl.load(partial + plane + at, mask=held, other=0.0), axis=0)
    at = split.to(tl.int64) * C + columns
    plane = num_splits.to(tl.int64) * C
    product *= tl.load(statistics + 2 * plane + at, mask=inside, other=0.0)
    tl.store(sums + at, total, mask=inside)
    tl.store(sums + plane + at, product, mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _grad_input_kernel(
    grad_output,  # (N, C, H, W), channels-last, as x and grad_input
    x,
    statistics,  # (3, num_splits, C)
    weight,  # (C,), as bias, grad_weight and grad_bias
    bias,
    sums,  # (2, num_splits, C), written by _combine_sums_kernel
    grad_input,
    grad_weight,
    grad_bias,
    C,
    area,
    num_splits,
    rows,
    chunks,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):
    columns, split, chunk = _place(C, num_splits, chunks, BLOCK_C)
    chunk = chunks - 1 - chunk  # backwards through memory
    inside = columns < C
    plane = num_splits.to(tl.int64) * C
    place = split.to(tl.int64) * C + columns
    mean = tl.load(statistics + place, mask=inside, other=0.0)[None, :]
    inverse_std = tl.load(statistics + 2 * plane + place, mask=inside, other=0.0)[None, :]
    scale = inverse_std * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    grad_mean = tl.load(sums + place, mask=inside, other=0.0)[None, :] / rows
    slope = tl.load(sums + plane + place, mask=inside, other=0.0)[None, :] * inverse_std / rows
    # One program for each block of columns adds the splits' gradients of bias and weight.
    if (split == 0) & (chunk == 0):
        along_bias = tl.zeros([BLOCK_C], tl.float32)
        along_weight = tl.zeros([BLOCK_C], tl.float32)
        other = columns.to(tl.int64)
        for _ in range(num_splits):
            along_bias += tl.load(sums + other, mask=inside, other=0.0)
            along_weight += tl.load(sums + plane + other, mask=inside, other=0.0)
            other += C
        tl.store(grad_bias + columns, along_bias, mask=inside)
        tl.store(grad_weight + columns, along_weight, mask=inside)
    if WIDE:
        chunk = chunk.to(tl.int64)
    row = chunk * TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    within, at = _memory_rows(row, split, area, num_splits)
    for _ in range(TILES):
        offset = at.to(tl.int64)[:, None] * C + columns[None, :]
        held = (row < rows)[:, None] & inside[None, :]
        grad = tl.load(grad_output + offset, mask=held, other=0.0).to(tl.float32)
        centred = tl.load(x + offset, mask=held, other=0.0).to(tl.float32) - mean
        if RELU:
            grad = _rectified(grad, centred * scale + shift)
        tl.store(grad_input + offset, (grad - grad_mean - centred * slope) * scale, mask=held)
        row += BLOCK_R
        within, at = _advance(within, at, BLOCK_R, area, num_splits)
