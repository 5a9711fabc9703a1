"""The negatives' part of the sigmoid loss on a GPU, without a tensor of N x K.

`mocofast_kernels.cpu_sigmoid` states the formulas. A program takes a block of rows and a split of
the negatives, as in `mocofast_kernels.infonce_sweep`, and tiles come from the same rule. Every
program writes the sums of its split, without atomics: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mocofast_kernels import cpu_sigmoid
from mocofast_kernels.configs import (
    ALL_REGISTERS,
    LONGEST,
    Tile,
    has_matrix_units,
    kernel_slots,
    split_count,
)
from mocofast_kernels.cpu_sigmoid import SigmoidForward
from mocofast_kernels.exclusion import Exclusion
from mocofast_kernels.rows import (
    dot_kind,
    load_rows,
    narrow,
    precision_of,
    round_operand,
    triton_dtype,
)
from mocofast_kernels.tiles import Products, tile_of

# float16 loses what lies below 2^-24. Probabilities are at most 1, and a factor 2^10 on operands
# makes room for smaller ones. The sums are divided by the factor.
LIFT = tl.constexpr(1024.0)


@triton.jit
def _logits(
    stay,
    stream,
    stay_rows,
    stream_rows,
    stay_limit,
    stream_limit,
    scale,
    bias,
    stay_stride_r: tl.constexpr,
    stay_stride_c: tl.constexpr,
    stream_stride_r: tl.constexpr,
    stream_stride_c: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Returns t s + b for a block of rows that stay and a tile of rows that stream past."""
    scores = tl.zeros([stay_rows.shape[0], stream_rows.shape[0]], dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        a = load_rows(
            stay, stay_rows, c, stay_stride_r, stay_stride_c, stay_limit, C, BLOCK_C, True
        )
        b = load_rows(
            stream, stream_rows, c, stream_stride_r, stream_stride_c, stream_limit, C, BLOCK_C, True
        )
        a, b = round_operand(a, DOT, PRECISION), round_operand(b, DOT, PRECISION)
        scores = tl.dot(a, tl.trans(b), scores, input_precision=PRECISION)
    return scores * scale + bias


@triton.jit
def _sigmoid_sweep_kernel(
    query,  # (N, C)
    negatives,  # (K, C)
    scale,  # ()
    bias,  # ()
    losses,  # (splits, N)
    weights,  # (splits, N)
    outs,  # (splits, N, C)
    N,
    K,
    rows_per_split,
    period,
    query_stride_n: tl.constexpr,
    query_stride_c: tl.constexpr,
    stride_k: tl.constexpr,
    stride_c: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXCLUDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OUT_C: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    out_column = tl.program_id(2) * OUT_C
    own, rows = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    t, b = tl.load(scale).to(tl.float32), tl.load(bias).to(tl.float32)
    query += first.to(tl.int64) * query_stride_n
    loss = tl.zeros([BLOCK_N], dtype=tl.float32)
    weight = tl.zeros([BLOCK_N], dtype=tl.float32)
    out = tl.zeros([BLOCK_N, OUT_C], dtype=tl.float32)
    begin = split * rows_per_split
    negatives += begin.to(tl.int64) * stride_k
    for start in range(begin, tl.minimum(begin + rows_per_split, K), BLOCK_K):
        logits = _logits(
            query,
            negatives,
            own,
            rows,
            N - first,
            K - start,
            t,
            b,
            query_stride_n,
            query_stride_c,
            stride_k,
            stride_c,
            C,
            DOT,
            PRECISION,
            BLOCK_C,
        )
        counts = rows[None, :] < K - start
        if EXCLUDE:
            counts &= ((first + own) % period)[:, None] != ((start + rows) % period)[None, :]
        # log(1 + e^x) and 1 / (1 + e^-x), from e^-|x|. Its first powers keep the digits of the
        # logarithm near 1.
        small = tl.exp(-tl.abs(logits))
        sums = 1.0 + small
        powers = small * (1.0 - small * (0.5 - small * (1.0 / 3.0 - small * 0.25)))
        log1p = tl.where(small < 0.03125, powers, tl.log(sums))
        loss += tl.sum(tl.where(counts, tl.maximum(logits, 0.0) + log1p, 0.0), axis=1)
        shares = tl.where(counts, tl.where(logits < 0.0, small, 1.0) / sums, 0.0)
        weight += tl.sum(shares, axis=1)
        values = load_rows(
            negatives, rows, out_column, stride_k, stride_c, K - start, C, OUT_C, True
        )
        values = round_operand(values, DOT, PRECISION)
        shares = round_operand(shares * LIFT, DOT, PRECISION)
        out = tl.dot(shares, values, out, input_precision=PRECISION)
        negatives += BLOCK_K * stride_k
    place = split.to(tl.int64) * N + first
    inside = own < N - first
    if out_column == 0:
        tl.store(losses + place + own, loss, mask=inside)
        tl.store(weights + place + own, weight, mask=inside)
    columns = out_column + tl.arange(0, OUT_C)
    pointers = outs + (place + own)[:, None] * C + columns[None, :]
    tl.store(pointers, out / LIFT, mask=inside[:, None] & (columns < C)[None, :])


@triton.jit
def _sigmoid_grad_kernel(
    query,  # (N, C)
    negatives,  # (K, C)
    scale,  # ()
    bias,  # ()
    grad_loss,  # (N,) float32, at most 1 in magnitude
    grad,  # (K, C) float32
    N,
    K,
    period,
    query_stride_n: tl.constexpr,
    query_stride_c: tl.constexpr,
    stride_k: tl.constexpr,
    stride_c: tl.constexpr,
    C: tl.constexpr,
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
    own, rows = tl.arange(0, STAY), tl.arange(0, STREAM)
    t, b = tl.load(scale).to(tl.float32), tl.load(bias).to(tl.float32)
    negatives += first.to(tl.int64) * stride_k
    out = tl.zeros([STAY, OUT_C], dtype=tl.float32)
    for start in range(0, N, STREAM):
        logits = _logits(
            negatives,
            query,
            own,
            rows,
            K - first,
            N - start,
            t,
            b,
            stride_k,
            stride_c,
            query_stride_n,
            query_stride_c,
            C,
            DOT,
            PRECISION,
            BLOCK_C,
        )
        incoming = tl.load(grad_loss + start + rows, mask=rows < N - start, other=0.0)
        small = tl.exp(-tl.abs(logits))
        shares = tl.where(logits < 0.0, small, 1.0) / (1.0 + small) * incoming[None, :]
        if EXCLUDE:
            same = ((first + own) % period)[:, None] == ((start + rows) % period)[None, :]
            shares = tl.where(same, 0.0, shares)
        values = load_rows(
            query, rows, out_column, query_stride_n, query_stride_c, N - start, C, OUT_C, True
        )
        values = round_operand(values, DOT, PRECISION)
        shares = round_operand(shares * LIFT, DOT, PRECISION)
        out = tl.dot(shares, values, out, input_precision=PRECISION)
        query += STREAM * query_stride_n
    columns = out_column + tl.arange(0, OUT_C)
    pointers = grad + (first.to(tl.int64) + own)[:, None] * C + columns[None, :]
    mask = (own < K - first)[:, None] & (columns < C)[None, :]
    tl.store(pointers, out * (t / LIFT), mask=mask)


def _needs_blocks(query: Tensor, negatives: Tensor, excluded: Exclusion) -> bool:
    """Returns whether PyTorch's blocks must compute, because no kernel can."""
    dtype = torch.promote_types(query.dtype, negatives.dtype)
    unknown = excluded.query_ids is not None or excluded.mask is not None
    fits = query.shape[1] <= LONGEST and dtype != torch.float64
    return unknown or not fits or not has_matrix_units(query.device, dtype)


def _constants(
    query: Tensor, dtype: torch.dtype, excluded: Exclusion, tile: Tile
) -> dict[str, Any]:
    """Returns the constants and options of a launch that both kernels take."""
    return {
        "C": query.shape[1],
        "DOT": triton_dtype(dtype),
        "PRECISION": precision_of(dtype, query.device),
        "EXCLUDE": excluded.period > 0,
        "BLOCK_C": tile.block_c,
        "OUT_C": tile.out_c,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **ALL_REGISTERS,
    }


def _forward_tile(C: int, kind: str, device: torch.device) -> Tile:
    """Returns the tile of the sweep: InfoNCE's, as far as the registers hold the sigmoids."""
    tile = tile_of(Products("forward", C, kind, C % 8 == 0, False, True), device)
    # 64 negatives beside 128 columns of sums spill two words on a B200. With Triton 3.9 they spill
    # 36 on an H100, and 4 on an RTX 5090.
    return tile._replace(stream=min(tile.stream, 32)) if tile.out_c == 128 else tile


def sigmoid_forward(
    query: Tensor, bias: Tensor, negatives: Tensor, scale: Tensor, excluded: Exclusion
) -> SigmoidForward:
    """Returns the sums over all negatives that are not excluded, like `cpu_sigmoid`.

    query: (N, C), negatives: (K, C), float32, bfloat16 or float16, any strides. Products take the
    type that both promote to. Their sums are float32.
    scale: t, and bias: b, both () on the device. They are not read by the host.
    """
    if _needs_blocks(query, negatives, excluded):
        return cpu_sigmoid.sigmoid_forward(query, bias, negatives, scale, excluded)
    (N, C), K = query.shape, len(negatives)
    query, negatives = narrow(query), narrow(negatives)
    dtype = torch.promote_types(query.dtype, negatives.dtype)
    kind = dot_kind(dtype, query.device)
    tile = _forward_tile(C, kind, query.device)
    chunks = triton.cdiv(C, tile.out_c)
    blocks, tiles = triton.cdiv(N, tile.stay), triton.cdiv(K, tile.stream)
    splits = split_count(blocks * chunks, tiles, kernel_slots(query.device, tile.warps))
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)  # no split without a tile
    losses, weights = (
        torch.empty(splits, N, dtype=torch.float32, device=query.device) for _ in range(2)
    )
    outs = torch.empty(splits, N, C, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        _sigmoid_sweep_kernel[(blocks, splits, chunks)](
            query,
            negatives,
            scale,
            bias,
            losses,
            weights,
            outs,
            N,
            K,
            per_split * tile.stream,
            excluded.period,
            *query.stride(),
            *negatives.stride(),
            BLOCK_N=tile.stay,
            BLOCK_K=tile.stream,
            **_constants(query, dtype, excluded, tile),
        )
        return SigmoidForward(losses.sum(0), weights.sum(0), outs.sum(0))


def sigmoid_grad_negatives(
    query: Tensor,
    bias: Tensor,
    negatives: Tensor,
    scale: Tensor,
    excluded: Exclusion,
    grad_loss: Tensor,
) -> Tensor:
    """Returns the gradient by the negatives, (K, C) float32.

    grad_loss: (N,), incoming gradients of the rows. Further arguments: as for `sigmoid_forward`.
    """
    if _needs_blocks(query, negatives, excluded):
        return cpu_sigmoid.sigmoid_grad_negatives(
            query, bias, negatives, scale, excluded, grad_loss
        )
    (N, C), K = query.shape, len(negatives)
    query, negatives = narrow(query), narrow(negatives)
    dtype = torch.promote_types(query.dtype, negatives.dtype)
    tile = tile_of(Products("negatives", C, dot_kind(dtype, query.device)), query.device)
    # Operands of 16 bits hold shares of the largest incoming gradient.
    peak = grad_loss.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny)
    grad = torch.empty(K, C, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        _sigmoid_grad_kernel[(triton.cdiv(K, tile.stay), triton.cdiv(C, tile.out_c))](
            query,
            negatives,
            scale,
            bias,
            (grad_loss.float() / peak).contiguous(),
            grad,
            N,
            K,
            excluded.period,
            *query.stride(),
            *negatives.stride(),
            STAY=tile.stay,
            STREAM=tile.stream,
            **_constants(query, dtype, excluded, tile),
        )
        return grad.mul_(peak)
