"""InfoNCE in one sweep over the negatives: loss, gradient and rank together, on a GPU, by Triton.

With h = q/|q|, scores s_j = h.n_j and p = softmax of [s_+; s_j] / T, the gradient needs only sum_j p_j n_j, which is
attention with keys = values = the negatives (loss: van den Oord et al. 2018, arXiv:1807.03748, eq. 4, as He et al.
2020, arXiv:1911.05722, use it; sweep: Dao 2023, arXiv:2307.08691). Nothing of size N x K is stored, and the negatives
may be overwritten before `backward`, which is one multiplication by the incoming gradient.

A first kernel sweeps, one program per block of queries and part of the negatives; a second adds the parts up row by
row, brings the positive in and finishes. There are no atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mocofast_kernels.configs import REGISTERS, Tile, block_of, kernel_slots, split_count
from mocofast_kernels.cpu import InfoNCEForward
from mocofast_kernels.rows import (
    dot_kind,
    inverse_norm,
    load_rows,
    narrow,
    precision_of,
    prepare_rows,
    round_operand,
    through_unit,
    triton_dtype,
    unit_rows,
)
from mocofast_kernels.tiles import Products, tile_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# float16 loses what lies below 2^-24 of the largest probability; room for 2^10 more divides out in the end.
HALF_LIFT = tl.constexpr(10.0)


@triton.jit
def inverse_temperature(temperature, IS_POINTER: tl.constexpr):
    if IS_POINTER:
        return 1.0 / tl.load(temperature).to(tl.float32)
    else:
        return 1.0 / temperature


@triton.jit
def _sweep_step(
    maximum, total, rank, out, query_block, query, query_rows, query_limit, positive_score, scale, negatives,
    remaining, out_column, residue, period, query_stride_n: tl.constexpr, query_stride_c: tl.constexpr,
    stride_k: tl.constexpr, stride_c: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    NORMALIZE_NEGATIVES: tl.constexpr, EXCLUDE: tl.constexpr, ONLINE: tl.constexpr, RANK: tl.constexpr,
    GRAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, OUT_C: tl.constexpr,
):  # fmt: skip
    """Take one tile of negatives into the running sums. `negatives` points at its first row."""
    HALF: tl.constexpr = tl.float16 == DOT
    rows = tl.arange(0, BLOCK_K)
    if C <= BLOCK_C:
        values = load_rows(negatives, rows, 0, stride_k, stride_c, remaining, C, BLOCK_C, TAIL)
        if NORMALIZE_NEGATIVES:
            values = unit_rows(values)
        values = round_operand(values, DOT, PRECISION)
        scores = tl.dot(query_block, tl.trans(values), input_precision=PRECISION)
    else:
        if NORMALIZE_NEGATIVES:
            squares = tl.zeros([BLOCK_K], dtype=tl.float32)
            for c in range(0, C, BLOCK_C):
                part = load_rows(
                    negatives, rows, c, stride_k, stride_c, remaining, C, BLOCK_C, TAIL
                ).to(tl.float32)
                squares += tl.sum(part * part, axis=1)
            row_scale = inverse_norm(squares)[:, None]
        scores = tl.zeros([query_rows.shape[0], BLOCK_K], dtype=tl.float32)
        for c in range(0, C, BLOCK_C):
            q = load_rows(
                query, query_rows, c, query_stride_n, query_stride_c, query_limit, C, BLOCK_C, True
            )
            part = load_rows(negatives, rows, c, stride_k, stride_c, remaining, C, BLOCK_C, TAIL)
            if NORMALIZE_NEGATIVES:
                part = part.to(tl.float32) * row_scale
            part = round_operand(part, DOT, PRECISION)
            scores = tl.dot(q, tl.trans(part), scores, input_precision=PRECISION)
        if GRAD:
            values = load_rows(
                negatives, rows, out_column, stride_k, stride_c, remaining, C, OUT_C, TAIL
            )
            if NORMALIZE_NEGATIVES:
                values = values.to(tl.float32) * row_scale
            values = round_operand(values, DOT, PRECISION)

    if TAIL:
        scores = tl.where(rows[None, :] < remaining, scores, float("-inf"))
    if EXCLUDE:
        scores = tl.where((rows % period)[None, :] == residue[:, None], float("-inf"), scores)
    if RANK:
        rank += tl.sum(tl.where(scores > positive_score[:, None], 1.0, 0.0), axis=1).to(tl.int32)
    if ONLINE:
        # The maximum starts from the positive's finite score, so that no tile, however masked, leaves inf - inf.
        largest = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
        fade = tl.exp2(maximum - largest)
        maximum = largest
        total *= fade
        if GRAD:
            out *= fade[:, None]
    shift = maximum - HALF_LIFT if HALF else maximum
    weights = tl.exp2(scores * scale - (shift[:, None] if ONLINE else shift))
    total += tl.sum(weights, axis=1)
    if GRAD:
        out = tl.dot(round_operand(weights, DOT, PRECISION), values, out, input_precision=PRECISION)
    return maximum, total, rank, out


@triton.jit
def _sweep_kernel(
    query, positive, negatives, temperature, positive_scores, maxima, totals, ranks, outs, N, K, tiles_per_split,
    period, query_stride_n: tl.constexpr, query_stride_c: tl.constexpr, positive_stride_n: tl.constexpr,
    positive_stride_c: tl.constexpr, stride_k: tl.constexpr, stride_c: tl.constexpr, C: tl.constexpr,
    TEMPERATURE_IS_POINTER: tl.constexpr, PREPARED: tl.constexpr, NORMALIZE: tl.constexpr,
    NORMALIZE_NEGATIVES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, EXCLUDE: tl.constexpr,
    ONLINE: tl.constexpr, RANK: tl.constexpr, GRAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr, OUT_C: tl.constexpr,
):  # fmt: skip
    # Blocks of queries are the fastest axis: programs that run together read the same negatives, from the L2 cache.
    first = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    # A row of the accumulator longer than OUT_C is shared by programs that each repeat the scores: registers hold no
    # more than 64 x 256 of it.
    out_column = tl.program_id(2) * OUT_C
    rows = tl.arange(0, BLOCK_N)
    limit = N - first
    scale = inverse_temperature(temperature, TEMPERATURE_IS_POINTER) * LOG2_E
    query += first.to(tl.int64) * query_stride_n

    positive_score = tl.zeros([BLOCK_N], dtype=tl.float32)
    if ONLINE or RANK:
        # From rounded operands, as the negatives' scores are, so that a negative equal to the positive ties.
        if PREPARED:
            positive_score = tl.load(positive_scores + first + rows, mask=rows < limit, other=0.0)
        else:
            positive += first.to(tl.int64) * positive_stride_n
            k = load_rows(
                positive, rows, 0, positive_stride_n, positive_stride_c, limit, C, BLOCK_C, True
            )
            q = load_rows(query, rows, 0, query_stride_n, query_stride_c, limit, C, BLOCK_C, True)
            if NORMALIZE:
                k = unit_rows(k)
                q = unit_rows(q)
            k = round_operand(k, DOT, PRECISION).to(tl.float32)
            positive_score = tl.sum(round_operand(q, DOT, PRECISION).to(tl.float32) * k, axis=1)
    if C <= BLOCK_C:
        query_block = load_rows(
            query, rows, 0, query_stride_n, query_stride_c, limit, C, BLOCK_C, True
        )
        if not PREPARED:
            if NORMALIZE:
                query_block = unit_rows(query_block)
            query_block = round_operand(query_block, DOT, PRECISION)
    else:
        query_block = None  # read again for every tile

    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    rank = tl.zeros([BLOCK_N], dtype=tl.int32)
    out = tl.zeros([BLOCK_N, OUT_C], dtype=tl.float32)
    maximum = positive_score * scale if ONLINE else scale  # scores of unit vectors are at most 1

    tile = split * tiles_per_split
    full_tiles = tl.minimum(tiles_per_split, K // BLOCK_K - tile)
    negatives += tile.to(tl.int64) * BLOCK_K * stride_k
    TAIL_K: tl.constexpr = min(BLOCK_K, 32)
    HALF: tl.constexpr = tl.float16 == DOT
    query_residue = rows
    if EXCLUDE:
        query_residue = (first + rows) % period
    for _ in range(full_tiles):
        residue = query_residue
        if EXCLUDE:
            residue = query_residue - (tile * BLOCK_K) % period
            residue = tl.where(residue < 0, residue + period, residue)
        maximum, total, rank, out = _sweep_step(
            maximum, total, rank, out, query_block, query, rows, limit, positive_score, scale, negatives, BLOCK_K,
            out_column, residue, period, query_stride_n, query_stride_c, stride_k, stride_c, C, DOT, PRECISION,
            NORMALIZE_NEGATIVES, EXCLUDE, ONLINE, RANK, GRAD, False, BLOCK_K, BLOCK_C, OUT_C,
        )  # fmt: skip
        negatives += BLOCK_K * stride_k
        tile += 1
    # What is left of the last tile, out of the loop, so that whole tiles pay for no mask; in narrow tiles, which need
    # few registers.
    if full_tiles < tiles_per_split:
        for start in tl.range(tile * BLOCK_K, K, TAIL_K, num_stages=1):
            residue = query_residue
            if EXCLUDE:
                residue = query_residue - start % period
                residue = tl.where(residue < 0, residue + period, residue)
            maximum, total, rank, out = _sweep_step(
                maximum, total, rank, out, query_block, query, rows, limit, positive_score, scale, negatives,
                K - start, out_column, residue, period, query_stride_n, query_stride_c, stride_k, stride_c, C, DOT,
                PRECISION, NORMALIZE_NEGATIVES, EXCLUDE, ONLINE, RANK, GRAD, True, TAIL_K, BLOCK_C, OUT_C,
            )  # fmt: skip
            negatives += TAIL_K * stride_k

    if HALF:
        total *= tl.exp2(-HALF_LIFT)
        out *= tl.exp2(-HALF_LIFT)
    place = split.to(tl.int64) * N + first
    inside = rows < limit
    if out_column == 0:
        tl.store(totals + place + rows, total, mask=inside)
        if ONLINE:
            tl.store(maxima + place + rows, maximum, mask=inside)
        if RANK:
            tl.store(ranks + place + rows, rank, mask=inside)
    if GRAD:
        columns = out_column + tl.arange(0, OUT_C)
        tl.store(
            outs + (place + rows)[:, None] * C + columns[None, :],
            out,
            mask=inside[:, None] & (columns < C)[None, :],
        )


@triton.jit
def _combine_kernel(
    query, positive, temperature, maxima, totals, ranks, outs, loss, lse, rank, grad_query, grad_positive, grad_scale,
    N, splits, query_stride_n, query_stride_c, positive_stride_n, positive_stride_c,
    C: tl.constexpr, TEMPERATURE_IS_POINTER: tl.constexpr, NORMALIZE: tl.constexpr, ONLINE: tl.constexpr,
    RANK: tl.constexpr, GRAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row: add the parts up, bring the positive in, finish. Float32 throughout, from the inputs as given."""
    row = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    scale = inverse_temperature(temperature, TEMPERATURE_IS_POINTER)
    q = load_rows(
        query + row * query_stride_n, one, 0, query_stride_n, query_stride_c, 1, C, BLOCK_C, False
    ).to(tl.float32)  # fmt: skip
    k = load_rows(
        positive + row * positive_stride_n, one, 0, positive_stride_n, positive_stride_c, 1, C, BLOCK_C, False
    ).to(tl.float32)  # fmt: skip
    h = q
    key = k
    if NORMALIZE:
        h = unit_rows(q)
        key = unit_rows(k)
    positive_score = tl.sum(h * key)

    parts = tl.arange(0, SPLITS)
    inside = parts < splits
    total = tl.load(totals + parts * N + row, mask=inside, other=0.0)
    maximum = scale * LOG2_E
    if ONLINE:
        shifts = tl.load(maxima + parts * N + row, mask=inside, other=float("-inf"))
        maximum = tl.max(shifts)
        total *= tl.exp2(shifts - maximum)
    total = tl.sum(total)
    if RANK:
        tl.store(rank + row, tl.sum(tl.load(ranks + parts * N + row, mask=inside, other=0)))

    # With d = log(sum over negatives) - s_+/T, the loss is log(1 + e^d), computed without cancellation: an easy
    # positive's loss of 1e-9 keeps its digits.
    d = (tl.fma(-positive_score, scale * LOG2_E, maximum) + tl.log2(total)) * LN_2
    x = tl.exp(-tl.abs(d))
    u = 1.0 + x
    log1p = tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))
    value = tl.maximum(d, 0.0) + log1p
    tl.store(loss + row, value)
    tl.store(lse + row, value + positive_score * scale)

    if GRAD:
        mean = tl.zeros([1, BLOCK_C], dtype=tl.float32)
        columns = tl.arange(0, BLOCK_C)
        for start in range(0, splits, BLOCK_SPLITS):
            part = start + tl.arange(0, BLOCK_SPLITS)
            place = outs + (part.to(tl.int64) * N + row)[:, None] * C + columns[None, :]
            tile = tl.load(place, mask=(part < splits)[:, None] & (columns < C)[None, :], other=0.0)
            if ONLINE:
                shift = tl.load(maxima + part * N + row, mask=part < splits, other=float("-inf"))
                tile *= tl.exp2(shift - maximum)[:, None]
            mean += tl.sum(tile, axis=0)[None, :]
        mean /= tl.where(total == 0.0, 1.0, total)
        share = 1.0 / (1.0 + tl.exp(-d))  # the negatives' share of the softmax
        away = share * (mean - key)
        tl.store(grad_scale + row, tl.sum(h * away))
        to_query = scale * away
        to_positive = -scale * share * h
        if NORMALIZE:
            to_query = through_unit(to_query, q)
            to_positive = through_unit(to_positive, k)
        tl.store(grad_query + row * C + columns[None, :], to_query, mask=(columns < C)[None, :])
        tl.store(
            grad_positive + row * C + columns[None, :], to_positive, mask=(columns < C)[None, :]
        )


def forward_products(
    negatives: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    normalize_negatives: bool,
    dot_dtype: torch.dtype,
) -> Products:
    """What decides the tile of `infonce_forward`."""
    C = negatives.shape[1]
    aligned = C % 8 == 0 and negatives.stride(1) == 1 and negatives.stride(0) % 8 == 0
    plain = aligned and negatives.dtype == dot_dtype and not normalize_negatives
    # Scores of unit vectors lie in [-1, 1], so the largest logit is known, 1/T, and probabilities relative to it
    # reach down to e^(-2/T): float32 and bfloat16 hold that, float16 does not. Negatives that the caller need not
    # have normalised are unit vectors already (the queue).
    online = not normalize or isinstance(temperature, Tensor) or 2.0 / temperature >= 80.0
    online = online or dot_dtype == torch.float16
    return Products("forward", C, dot_kind(dot_dtype), aligned, plain, online)


def infonce_forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    normalize_negatives: bool,
    exclude_period: int,
    return_rank: bool,
    compute_grad: bool,
    dot_dtype: torch.dtype,
    only_query: bool = False,
    num_splits: int | None = None,
    tile: Tile | None = None,
) -> InfoNCEForward:
    """InfoNCE of every row and, in the same sweep, its gradients and the positive's rank.

    query, positive: (N, C); negatives: (K, C); float32, bfloat16 or float16 each, any strides, C up to 1024.
    temperature: float > 0, or a tensor () on the same device, read there. normalize: query and positive are
    divided by max(|x|, 1e-12) inside, normalize_negatives: so are the negatives. exclude_period P > 0 leaves negative
    j out of row i where j % P == i % P. dot_dtype: of the operands of matrix products; sums are float32 always.
    only_query (no gradient but the query's is needed) changes nothing: the others are by-products of the same kernel.
    num_splits forces how many parts the negatives are split into; the default fills the GPU. tile forces a tile that
    `tiles.check` lets pass.

    Returns, for each of the N rows: loss = lse - s_+ / T and lse (N,) float32; rank (N,) int32, how many negatives
    score above the positive, or None; and with compute_grad the loss's gradients by query, by positive (N, C)
    (through its own score alone) and by 1 / T (N,), float32, else None. No host synchronisation.
    """
    N, C = query.shape
    K = negatives.shape[0]
    assert positive.shape == (N, C) and negatives.shape == (K, C) and 1 <= C <= 1024, (N, K, C)
    query, positive, negatives = narrow(query), narrow(positive), narrow(negatives)
    is_pointer = isinstance(temperature, Tensor)
    products = forward_products(
        negatives,
        temperature,
        normalize=normalize,
        normalize_negatives=normalize_negatives,
        dot_dtype=dot_dtype,
    )
    online = products.online
    tile = tile or tile_of(products, query.device)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    with torch.cuda.device_of(query):
        row_blocks, chunks = (
            triton.cdiv(N, tile.stay),
            triton.cdiv(C, tile.out_c) if compute_grad else 1,
        )
        tiles = triton.cdiv(K, tile.stream)
        splits = num_splits or split_count(
            row_blocks * chunks, tiles, kernel_slots(query.device, tile.warps)
        )
        tiles_per_split = triton.cdiv(tiles, splits)
        splits = triton.cdiv(tiles, tiles_per_split)  # no split without a tile
        totals, maxima = empty(splits, N), empty(splits, N) if online else None
        ranks = empty(splits, N, dtype=torch.int32) if return_rank else None
        outs = empty(splits, N, C) if compute_grad else None
        operand, positive_scores = query, None
        # Longer rows do not fit the registers while they are normalised; chunks are read again for every tile.
        prepared = C > 128 or tile.block_c < C
        if prepared:
            operand, positive_scores = prepare_rows(query, positive, normalize, dot_dtype)
        _sweep_kernel[(row_blocks, splits, chunks)](
            operand, positive, negatives, temperature, positive_scores, maxima, totals, ranks, outs, N, K,
            tiles_per_split, exclude_period, *operand.stride(), *positive.stride(), *negatives.stride(), C=C,
            TEMPERATURE_IS_POINTER=is_pointer, PREPARED=prepared, NORMALIZE=normalize,
            NORMALIZE_NEGATIVES=normalize_negatives, DOT=triton_dtype(dot_dtype), PRECISION=precision_of(dot_dtype),
            EXCLUDE=exclude_period > 0, ONLINE=online, RANK=return_rank, GRAD=compute_grad, BLOCK_N=tile.stay,
            BLOCK_K=tile.stream, BLOCK_C=tile.block_c, OUT_C=tile.out_c, num_warps=tile.warps,
            num_stages=tile.stages, maxnreg=REGISTERS,
        )  # fmt: skip
        loss, lse = empty(N), empty(N)
        rank = empty(N, dtype=torch.int32) if return_rank else None
        grad_query, grad_positive, grad_scale = (
            (empty(N, C), empty(N, C), empty(N)) if compute_grad else (None, None, None)
        )
        _combine_kernel[(N,)](
            query, positive, temperature, maxima, totals, ranks, outs, loss, lse, rank, grad_query, grad_positive,
            grad_scale, N, splits, *query.stride(), *positive.stride(), C=C, TEMPERATURE_IS_POINTER=is_pointer,
            NORMALIZE=normalize, ONLINE=online, RANK=return_rank, GRAD=compute_grad,
            SPLITS=triton.next_power_of_2(splits), BLOCK_SPLITS=max(1, 4096 // block_of(C)), BLOCK_C=block_of(C),
            maxnreg=REGISTERS,
        )  # fmt: skip
    return InfoNCEForward(loss, lse, rank, grad_query, grad_positive, grad_scale)
