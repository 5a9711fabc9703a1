"""Ghost BatchNorm on a GPU: training-mode BatchNorm over splits of a batch, in NHWC memory.

The pass that writes the output can also add a residual and apply ReLU. The kernels, and the
order in which they read memory, are in `mocofast_kernels.ghost_bn_kernels`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mocofast_kernels.configs import ALL_REGISTERS, FUSED, kernel_slots
from mocofast_kernels.cpu_ghost_bn import GhostBatchNorm
from mocofast_kernels.ghost_bn_kernels import (
    _backward_sums_kernel,
    _combine_statistics_kernel,
    _combine_sums_kernel,
    _grad_input_kernel,
    _normalise_kernel,
    _statistics_kernel,
)

WARPS = 4
TILE = 2048  # elements of a tile: 16 a thread
UNROLL = 4  # tiles whose loads overlap in a pass that only reads
TILES = 4  # tiles of a program that writes, which loads the channels' statistics once for all
CHUNKS = (32, 128, 512)  # possible sizes of a combining program's block of chunks
COMBINED = 8  # columns of a combining program: 32 bytes of a row, the least that memory delivers
# Chunks for each program slot of configs.kernel_slots. Its programs need more registers than
# these, so a device runs several of these in a slot.
WAVES = 4


class _Chunking(NamedTuple):
    """How the rows and columns of a tensor are divided among programs."""

    C: int
    area: int  # consecutive rows of memory that belong to one split
    rows: int  # rows of a split
    block_r: int  # rows of a tile
    block_c: int  # columns of a tile
    read_chunks: int  # chunks of a split in a pass that only reads
    write_chunks: int  # chunks of a split in a pass that writes
    wide: bool  # row numbers need 64 bits


@functools.lru_cache(maxsize=1024)
def _chunking(shape: tuple[int, ...], num_splits: int, slots: int) -> _Chunking:
    N, C, H, W = shape
    rows = N // num_splits * H * W
    # A power of two that divides C needs no mask and keeps loads 16 bytes wide.
    block_c = next((b for b in (64, 32) if C % b == 0), min(64, triton.next_power_of_2(C)))
    block_r = TILE // block_c
    tiles = triton.cdiv(rows, block_r)
    blocks = triton.cdiv(C, block_c) * num_splits
    return _Chunking(
        C=C,
        # A single split owns all rows, so all of them are consecutive.
        area=rows if num_splits == 1 else H * W,
        rows=rows,
        block_r=block_r,
        block_c=block_c,
        read_chunks=max(1, min(triton.cdiv(tiles, UNROLL), WAVES * slots // blocks, CHUNKS[-1])),
        write_chunks=triton.cdiv(tiles, TILES),
        wide=_is_wide(N * H * W),
    )


def _is_wide(rows: int) -> bool:
    """Returns whether row numbers, including those a step past the last row, leave 32 bits."""
    return rows + TILE * UNROLL * CHUNKS[-1] >= 2**31


def _combined_chunks(cut: _Chunking) -> int:
    """Returns the block size of a combining program, which takes all chunks of a split at once."""
    return next(size for size in CHUNKS if cut.read_chunks <= size)


def ghost_bn_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    num_splits: int,
    momentum: float,
    eps: float,
    relu: bool,
) -> GhostBatchNorm:
    """Normalises sample n over the samples m with m % num_splits == n % num_splits.

    The output is relu(batch_norm(x) + residual). Residual and ReLU are optional.

    x, residual: (N, C, H, W), channels-last, float32, bfloat16 or float16. num_splits divides N.
        Every channel has more than one value in a split.
    weight, bias: (C,), contiguous, float32, bfloat16 or float16.
    running_mean, running_var: (C,), types as weight, or None. Updated in place with `momentum`:
        towards the splits' mean, and towards the mean of their unbiased variances.
    num_splits: number of groups of samples, normalised separately.
    """
    # Divide the work, and allocate results and partial sums.
    cut = _chunking(tuple(x.shape), num_splits, kernel_slots(x.device))
    output = torch.empty_like(x, memory_format=torch.channels_last)
    partial_shape = (2, num_splits, cut.read_chunks, cut.C)
    partial = torch.empty(partial_shape, dtype=torch.float32, device=x.device)
    statistics = torch.empty((3, num_splits, cut.C), dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(cut.C, cut.block_c) * num_splits
    with torch.cuda.device_of(x):
        # First pass over x: partial sums of every chunk of a split.
        _statistics_kernel[(blocks * cut.read_chunks,)](
            x,
            partial,
            cut.C,
            cut.area,
            num_splits,
            cut.rows,
            cut.read_chunks,
            WIDE=cut.wide,
            BLOCK_R=cut.block_r,
            BLOCK_C=cut.block_c,
            UNROLL=UNROLL,
            num_warps=WARPS,
            **FUSED,
        )
        # Mean, variance and inverse deviation of every split, from the partial sums.
        _combine_statistics_kernel[(triton.cdiv(cut.C, COMBINED) * num_splits,)](
            partial,
            statistics,
            eps,
            cut.C,
            num_splits,
            cut.rows,
            cut.read_chunks,
            BLOCK_R=cut.block_r,
            BLOCK_P=_combined_chunks(cut),
            BLOCK_C=COMBINED,
            num_warps=WARPS,
            **FUSED,
        )
        # Second pass over x: write the output, and update the running statistics.
        _normalise_kernel[(blocks * cut.write_chunks,)](
            x,
            residual,
            output,
            statistics,
            weight,
            bias,
            running_mean,
            running_var,
            momentum,
            cut.C,
            cut.area,
            num_splits,
            cut.rows,
            cut.write_chunks,
            RELU=relu,
            WIDE=cut.wide,
            BLOCK_R=cut.block_r,
            BLOCK_C=cut.block_c,
            TILES=TILES,
            num_warps=WARPS,
            **FUSED,
        )
    return GhostBatchNorm(output, statistics)


def ghost_bn_backward(
    grad_output: Tensor,
    x: Tensor,
    output: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    *,
    num_splits: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight, bias and residual.

    grad_output, x: (N, C, H, W), channels-last, as in the forward.
    output: the forward's output after a residual and a ReLU, else None. Without a residual
        the sign of the ReLU's input is computed from x.
    statistics: (3, num_splits, C), from the forward.

    The gradients of weight and bias are float32. Without a ReLU the residual's gradient is
    grad_output itself.
    """
    # Divide the work, and allocate results and partial sums. `rectified`: the residual's gradient,
    # which is grad_output where the ReLU let the value pass.
    cut = _chunking(tuple(x.shape), num_splits, kernel_slots(x.device))
    rectified = grad_output if output is None else torch.empty_like(grad_output)
    grad_input = torch.empty_like(x, memory_format=torch.channels_last)
    partial_shape = (2, num_splits, cut.read_chunks, cut.C)
    partial = torch.empty(partial_shape, dtype=torch.float32, device=x.device)
    sums = torch.empty((2, num_splits, cut.C), dtype=torch.float32, device=x.device)
    grad_weight, grad_bias = (
        torch.empty(cut.C, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    blocks = triton.cdiv(cut.C, cut.block_c) * num_splits
    with torch.cuda.device_of(x):
        # First pass: partial sums of the gradients, and `rectified` if there is an output.
        _backward_sums_kernel[(blocks * cut.read_chunks,)](
            grad_output,
            x,
            output,
            rectified,
            statistics,
            weight,
            bias,
            partial,
            cut.C,
            cut.area,
            num_splits,
            cut.rows,
            cut.read_chunks,
            RELU=relu,
            WIDE=cut.wide,
            BLOCK_R=cut.block_r,
            BLOCK_C=cut.block_c,
            UNROLL=UNROLL // 2,
            num_warps=WARPS,
            **FUSED,
        )
        # Sums of every split, from the partial sums.
        _combine_sums_kernel[(triton.cdiv(cut.C, COMBINED) * num_splits,)](
            partial,
            statistics,
            sums,
            cut.C,
            num_splits,
            cut.read_chunks,
            BLOCK_P=_combined_chunks(cut),
            BLOCK_C=COMBINED,
            num_warps=WARPS,
            **FUSED,
        )
        # Second pass: the gradients of x, weight and bias.
        # Without this limit ptxas spills two words of the ReLU's mask to fit one more program.
        limit = ALL_REGISTERS if relu and output is None else FUSED
        _grad_input_kernel[(blocks * cut.write_chunks,)](
            rectified,
            x,
            statistics,
            weight,
            bias,
            sums,
            grad_input,
            grad_weight,
            grad_bias,
            cut.C,
            cut.area,
            num_splits,
            cut.rows,
            cut.write_chunks,
            RELU=relu and output is None,
            WIDE=cut.wide,
            BLOCK_R=cut.block_r,
            BLOCK_C=cut.block_c,
            TILES=TILES,
            num_warps=WARPS,
            **limit,
        )
    return grad_input, grad_weight, grad_bias, rectified
