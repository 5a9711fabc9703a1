"""Enqueue on a GPU: one Triton kernel normalises keys and writes them into the queue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mocofast_kernels.configs import FUSED, block_of, row_warps
from mocofast_kernels.rows import load_rows, narrow, rows_per_program, unit_rows


@triton.jit
def _enqueue_kernel(
    queue,  # (K, C)
    pointer,  # (1,) int64
    keys,  # (B, C)
    B,
    K,
    queue_stride_k,
    queue_stride_c,
    keys_stride_b,
    keys_stride_c,
    C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Write only the last K keys of a longer batch, so that no row is written twice.
    first = tl.maximum(B - K, 0).to(tl.int64) + tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = tl.arange(0, BLOCK_B)
    limit = B - first
    x = load_rows(
        keys + first * keys_stride_b, rows, 0, keys_stride_b, keys_stride_c, limit, C, BLOCK_C, True
    )
    if NORMALIZE:
        x = unit_rows(x)
    target = (tl.load(pointer) + first + rows) % K
    columns = tl.arange(0, BLOCK_C).to(tl.int64)
    tl.store(
        queue + target[:, None] * queue_stride_k + columns[None, :] * queue_stride_c,
        x.to(queue.dtype.element_ty),
        mask=(rows < limit)[:, None] & (columns < C)[None, :],
    )


def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, *, normalize: bool) -> None:
    """Writes key i at row (pointer + i) % K of the queue, then advances the pointer by B, modulo K.

    queue: (K, C) float32, bfloat16 or float16, any strides.
    pointer: (1,) int64 on the same device, read on the device: no host synchronisation.
    keys: (B, C). Where B > K, only the last K keys are written, at the rows of the formula.
    normalize: divide keys by max(|x|, 1e-12) first, in float32.
    """
    (K, C), B = queue.shape, keys.shape[0]
    assert keys.shape == (B, C) and pointer.shape == (1,) and pointer.dtype == torch.int64, (
        keys.shape,
        pointer,
    )
    if B == 0:
        return
    block_b = rows_per_program(C)
    keys = narrow(keys)
    with torch.cuda.device_of(queue):
        _enqueue_kernel[(triton.cdiv(min(B, K), block_b),)](
            queue,
            pointer,
            keys,
            B,
            K,
            *queue.stride(),
            *keys.stride(),
            C=C,
            NORMALIZE=normalize,
            BLOCK_B=block_b,
            BLOCK_C=block_of(C),
            num_warps=row_warps(C),
            **FUSED,
        )
        # A separate operation, since every program of the kernel must read the old value.
        pointer.add_(B).remainder_(K)
