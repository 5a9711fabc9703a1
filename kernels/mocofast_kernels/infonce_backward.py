"""Gradient of InfoNCE by the negatives on a GPU, from probabilities recomputed block by block.

In-batch negatives (SimCLR, CLIP) need this gradient. MoCo's queue takes no gradient. A program
owns a block of negatives and streams all queries past the block, so sums have a fixed order:
equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mocofast_kernels import cpu
from mocofast_kernels.configs import ALL_REGISTERS, Tile
from mocofast_kernels.infonce_sweep import LOG2_E, inverse_temperature
from mocofast_kernels.rows import (
    blocked_without_matrix_units,
    dot_kind,
    load_rows,
    narrow,
    precision_of,
    prepare_rows,
    project_rows_,
    round_operand,
    triton_dtype,
)
from mocofast_kernels.tiles import Products, tile_of

# float16 holds weights down to 2^-24. Incoming gradients are scaled so that the largest is 2^10.
LIFT = 1024.0


@triton.jit
def _grad_negatives_kernel(
    operand,  # (N, C) queries of dtype DOT, contiguous
    negatives,  # (K, C) of dtype DOT, contiguous
    lse,  # (N,)
    grad_loss,  # (N,)
    temperature,
    query_ids,  # (N,) int64, or None
    key_ids,  # (K,) int64, or None
    grad,  # (K, C)
    N,
    K,
    period,
    C: tl.constexpr,
    TEMPERATURE_IS_POINTER: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXCLUDE: tl.constexpr,
    STAY: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OUT_C: tl.constexpr,
):
    first = tl.program_id(0) * STAY
    out_column = tl.program_id(1) * OUT_C
    own = tl.arange(0, STAY)
    limit = K - first
    scale = inverse_temperature(temperature, TEMPERATURE_IS_POINTER)
    negatives += first.to(tl.int64) * C
    residue = own
    if EXCLUDE:
        residue = (first + own) % period
    if key_ids is not None:
        own_ids = tl.load(key_ids + first + own, mask=own < limit, other=0)
    out = tl.zeros([STAY, OUT_C], dtype=tl.float32)
    own_block = None  # read again for every block of queries
    if C <= BLOCK_C:
        own_block = load_rows(negatives, own, 0, C, 1, limit, C, BLOCK_C, True)
    # Stream all queries past the block of negatives.
    for start in range(0, N, STREAM):
        rows = tl.arange(0, STREAM)
        inside = rows < N - start
        # scores: (STAY, STREAM), negatives x queries
        if C <= BLOCK_C:
            values = load_rows(operand, rows, 0, C, 1, N - start, C, BLOCK_C, True)
            scores = tl.dot(own_block, tl.trans(values), input_precision=PRECISION)
        else:
            scores = tl.zeros([STAY, STREAM], dtype=tl.float32)
            for c in range(0, C, BLOCK_C):
                n = load_rows(negatives, own, c, C, 1, limit, C, BLOCK_C, True)
                q = load_rows(operand, rows, c, C, 1, N - start, C, BLOCK_C, True)
                scores = tl.dot(n, tl.trans(q), scores, input_precision=PRECISION)
            values = load_rows(operand, rows, out_column, C, 1, N - start, C, OUT_C, True)
        # Probabilities times the incoming gradients.
        row_lse = tl.load(lse + start + rows, mask=inside, other=float("inf"))
        incoming = tl.load(grad_loss + start + rows, mask=inside, other=0.0)
        weights = tl.exp2((scores * scale - row_lse[None, :]) * LOG2_E) * incoming[None, :]
        if EXCLUDE:
            weights = tl.where(residue[:, None] == ((start + rows) % period)[None, :], 0.0, weights)
        if key_ids is not None:
            ids = tl.load(query_ids + start + rows, mask=inside, other=0)
            weights = tl.where(own_ids[:, None] == ids[None, :], 0.0, weights)
        out = tl.dot(round_operand(weights, DOT, PRECISION), values, out, input_precision=PRECISION)
        operand += STREAM * C
    columns = out_column + tl.arange(0, OUT_C)
    tl.store(
        grad + (first.to(tl.int64) + own)[:, None] * C + columns[None, :],
        out * scale,
        mask=(own < limit)[:, None] & (columns < C)[None, :],
    )


@blocked_without_matrix_units(cpu.infonce_grad_negatives)
def infonce_grad_negatives(
    grad_loss: Tensor,
    query: Tensor,
    negatives: Tensor,
    lse: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    normalize_negatives: bool,
    exclude_period: int,
    dot_dtype: torch.dtype,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    mask: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Returns the gradient of sum_i grad_loss_i loss_i by the negatives, (K, C) float32.

    For negative j the gradient is sum_i grad_loss_i p_ij h_i / T. With normalize_negatives
    this gradient is taken through the normalisation.

    grad_loss: (N,) float32.
    lse: (N,) float32, from `infonce_forward` with equal arguments.
    Further arguments: as for `infonce_forward`.
    """
    # Check shapes and choose the tile.
    N, C = query.shape
    K = negatives.shape[0]
    shapes = grad_loss.shape, lse.shape, negatives.shape
    assert shapes == ((N,), (N,), (K, C)), (N, K, C)
    grad_loss = grad_loss.float().contiguous()
    kind = dot_kind(dot_dtype, query.device)
    tile = tile or tile_of(Products("negatives", C, kind), query.device)
    with torch.cuda.device_of(query):
        if dot_dtype == torch.float16:
            peak = grad_loss.abs().amax().clamp_min(torch.finfo(torch.float32).tiny * LIFT)
            grad_loss = grad_loss * (LIFT / peak)
        # Operands are prepared once, since every block of queries is read many times.
        queries, _ = prepare_rows(narrow(query), None, normalize, dot_dtype)
        operands, _ = prepare_rows(narrow(negatives), None, normalize_negatives, dot_dtype)
        grad = torch.empty((K, C), dtype=torch.float32, device=query.device)
        _grad_negatives_kernel[(triton.cdiv(K, tile.stay), triton.cdiv(C, tile.out_c))](
            queries,
            operands,
            lse,
            grad_loss,
            temperature,
            query_ids,
            key_ids,
            grad,
            N,
            K,
            exclude_period,
            C=C,
            TEMPERATURE_IS_POINTER=isinstance(temperature, Tensor),
            DOT=triton_dtype(dot_dtype),
            PRECISION=precision_of(dot_dtype, query.device),
            EXCLUDE=exclude_period > 0,
            STAY=tile.stay,
            STREAM=tile.stream,
            BLOCK_C=tile.block_c,
            OUT_C=tile.out_c,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **ALL_REGISTERS,
        )
        if dot_dtype == torch.float16:
            grad *= peak / LIFT
        if normalize_negatives:
            project_rows_(grad, negatives)
    return grad
