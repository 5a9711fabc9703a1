"""Normalise keys and write them into the ring of negatives, in one pass, on a GPU, by Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mocofast_kernels.configs import block_of
from mocofast_kernels.rows import load_rows, narrow, rows_per_program, unit_rows


@triton.jit
def _enqueue_kernel(
    queue, pointer, keys, B, K, queue_stride_k, queue_stride_c, keys_stride_b, keys_stride_c, C: tl.constexpr,
    NORMALIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Of more keys than the ring holds, only the last K are written: no row is written twice.
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
    """Write keys at rows (pointer + i) % K of the queue, then advance the pointer by their number, modulo K.

    queue: (K, C) float32, bfloat16 or float16, any strides; pointer: (1,) int64 on the same device; keys: (B, C),
    divided by max(|x|, 1e-12) first if normalize, in float32. Of more than K keys the last K stay, where they would
    have ended. The pointer is read on the device: no host synchronisation.
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
            queue, pointer, keys, B, K, *queue.stride(), *keys.stride(), C=C, NORMALIZE=normalize, BLOCK_B=block_b,
            BLOCK_C=block_of(C),
        )  # fmt: skip
        pointer.add_(B).remainder_(
            K
        )  # an operation of its own: every program must have read the old value
