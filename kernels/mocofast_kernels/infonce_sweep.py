"""Triton kernel of InfoNCE's sweep over the negatives, launched by `mocofast_kernels.infonce`.

A program takes a block of queries and a split of the negatives. Every program writes the
sums of the split, without atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mocofast_kernels.rows import (
    inverse_norm,
    load_rows,
    positive_scores_of,
    round_operand,
    unit_rows,
)

LOG2_E = tl.constexpr(1.4426950408889634)
# float16 loses what lies below 2^-24 of the largest probability. A factor 2^10 on all weights
# makes room for smaller ones, and is divided out at the end.
HALF_LIFT = tl.constexpr(10.0)


@triton.jit
def inverse_temperature(temperature, IS_POINTER: tl.constexpr):
    """Returns 1 / T, from the number or from the place in device memory."""
    if IS_POINTER:
        return 1.0 / tl.load(temperature).to(tl.float32)
    else:
        return 1.0 / temperature


@triton.jit
def _sweep_step(
    maximum,  # (BLOCK_N,) running maximum of the logits, log2 units
    total,  # (BLOCK_N,) running sum of the weights
    positive_rank,  # (BLOCK_N,) int32: negatives so far that reach the positive's score
    out,  # (BLOCK_N, OUT_C) running sum of weight x negative
    query_block,  # (BLOCK_N, C) operand, or None where a row is longer than BLOCK_C
    query,
    query_rows,
    query_limit,
    tie,  # (BLOCK_N,) least score that ties with the positive's
    scale,  # log2(e) / T
    negatives,  # pointer to the first row of the tile
    remaining,  # rows that the tile has
    out_column,  # first column of `out`
    residue,  # (BLOCK_N,) place in the tile, modulo period, of the excluded negatives
    period,
    own_ids,  # (BLOCK_N,) ids of the queries, or None
    key_ids,  # pointer to the id of the first row of the tile, or None
    query_stride_n: tl.constexpr,
    query_stride_c: tl.constexpr,
    stride_k: tl.constexpr,
    stride_c: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALIZE_NEGATIVES: tl.constexpr,
    EXCLUDE: tl.constexpr,
    ONLINE: tl.constexpr,
    RANK: tl.constexpr,
    GRAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OUT_C: tl.constexpr,
):
    """Takes a tile of negatives into the running sums."""
    # scores: (BLOCK_N, BLOCK_K), query x negatives. values: (BLOCK_K, OUT_C), columns of negatives.
    HALF: tl.constexpr = tl.float16 == DOT
    rows = tl.arange(0, BLOCK_K)
    if C <= BLOCK_C:
        # One load of the tile serves both products.
        values = load_rows(negatives, rows, 0, stride_k, stride_c, remaining, C, BLOCK_C, TAIL)
        if NORMALIZE_NEGATIVES:
            values = unit_rows(values)
        values = round_operand(values, DOT, PRECISION)
        scores = tl.dot(query_block, tl.trans(values), input_precision=PRECISION)
    else:
        # Long rows are read by chunks of columns: first for the norms,
        if NORMALIZE_NEGATIVES:
            squares = tl.zeros([BLOCK_K], dtype=tl.float32)
            for c in range(0, C, BLOCK_C):
                chunk = load_rows(
                    negatives, rows, c, stride_k, stride_c, remaining, C, BLOCK_C, TAIL
                ).to(tl.float32)
                squares += tl.sum(chunk * chunk, axis=1)
            row_scale = inverse_norm(squares)[:, None]
        # then for the scores,
        scores = tl.zeros([query_rows.shape[0], BLOCK_K], dtype=tl.float32)
        for c in range(0, C, BLOCK_C):
            q = load_rows(
                query, query_rows, c, query_stride_n, query_stride_c, query_limit, C, BLOCK_C, True
            )
            chunk = load_rows(negatives, rows, c, stride_k, stride_c, remaining, C, BLOCK_C, TAIL)
            if NORMALIZE_NEGATIVES:
                chunk = chunk.to(tl.float32) * row_scale
            chunk = round_operand(chunk, DOT, PRECISION)
            scores = tl.dot(q, tl.trans(chunk), scores, input_precision=PRECISION)
        # then the columns that this program adds to `out`.
        if GRAD:
            values = load_rows(
                negatives, rows, out_column, stride_k, stride_c, remaining, C, OUT_C, TAIL
            )
            if NORMALIZE_NEGATIVES:
                values = values.to(tl.float32) * row_scale
            values = round_operand(values, DOT, PRECISION)

    # Mask the negatives that do not count.
    if TAIL:
        scores = tl.where(rows[None, :] < remaining, scores, float("-inf"))
    if EXCLUDE:
        scores = tl.where((rows % period)[None, :] == residue[:, None], float("-inf"), scores)
    if key_ids is not None:
        if TAIL:
            ids = tl.load(key_ids + rows, mask=rows < remaining, other=0)
        else:
            ids = tl.load(key_ids + rows)
        scores = tl.where(own_ids[:, None] == ids[None, :], float("-inf"), scores)
    # Weights 2^(logit - shift), and their sums.
    if ONLINE:
        # The maximum starts from the positive's finite score. So a tile whose negatives are all
        # masked never gives inf - inf.
        largest = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
        fade = tl.exp2(maximum - largest)
        maximum = largest
        total *= fade
        if GRAD:
            out *= fade[:, None]
    shift = maximum - HALF_LIFT if HALF else maximum
    weights = tl.exp2(scores * scale - (shift[:, None] if ONLINE else shift))
    total += tl.sum(weights, axis=1)
    # Count the negatives that reach the positive's score. Before the weights, this count takes more
    # registers than there are: Triton 3.9 spills six words on sm_90.
    if RANK:
        reached = tl.where(scores >= tie[:, None], 1.0, 0.0)
        positive_rank += tl.sum(reached, axis=1).to(tl.int32)
    if GRAD:
        out = tl.dot(round_operand(weights, DOT, PRECISION), values, out, input_precision=PRECISION)
    return maximum, total, positive_rank, out


@triton.jit
def _sweep_kernel(
    query,  # (N, C)
    positive,  # (N, C)
    negatives,  # (K, C)
    temperature,
    positive_scores,  # (2, N) if PREPARED
    maxima,  # (splits, N) if ONLINE
    totals,  # (splits, N)
    positive_ranks,  # (splits, N) int32 if RANK
    outs,  # (splits, N, C) if GRAD
    query_ids,  # (N,) int64, or None
    key_ids,  # (K,) int64, or None: negatives with the query's id are left out
    arrived,  # () int32, or None: becomes 0, for the combination to count in
    N,
    K,
    tiles_per_split,
    period,
    query_stride_n: tl.constexpr,
    query_stride_c: tl.constexpr,
    positive_stride_n: tl.constexpr,
    positive_stride_c: tl.constexpr,
    stride_k: tl.constexpr,
    stride_c: tl.constexpr,
    C: tl.constexpr,
    TEMPERATURE_IS_POINTER: tl.constexpr,
    PREPARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORMALIZE_NEGATIVES: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXCLUDE: tl.constexpr,
    ONLINE: tl.constexpr,
    RANK: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OUT_C: tl.constexpr,
):
    # The work of this program. Blocks of queries are the fastest axis: programs that run at the
    # same time read the same negatives, from the L2 cache.
    first = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    # Several programs share an accumulator row longer than OUT_C, and each program repeats
    # the scores: registers hold no more than 64 x 256 of the accumulator.
    out_column = tl.program_id(2) * OUT_C
    rows = tl.arange(0, BLOCK_N)
    limit = N - first
    scale = inverse_temperature(temperature, TEMPERATURE_IS_POINTER) * LOG2_E
    query += first.to(tl.int64) * query_stride_n
    if arrived is not None:  # noqa: SIM102 (known while compiling)
        if (first == 0) & (split == 0) & (out_column == 0):
            tl.store(arrived, 0)

    # Positive scores, from rounded operands as the negatives' scores are: a negative that
    # equals the positive ties, in every type.
    positive_score = tl.zeros([BLOCK_N], dtype=tl.float32)
    tie = positive_score
    if ONLINE or RANK:
        if PREPARED:  # computed by `prepare_rows`
            place = positive_scores + first + rows
            positive_score = tl.load(place, mask=rows < limit, other=0.0)
            tie = tl.load(place + N, mask=rows < limit, other=0.0)
        else:
            positive += first.to(tl.int64) * positive_stride_n
            k = load_rows(
                positive, rows, 0, positive_stride_n, positive_stride_c, limit, C, BLOCK_C, True
            )
            q = load_rows(query, rows, 0, query_stride_n, query_stride_c, limit, C, BLOCK_C, True)
            if NORMALIZE:
                k = unit_rows(k)  # (BLOCK_N, C), as q
                q = unit_rows(q)
            k = round_operand(k, DOT, PRECISION).to(tl.float32)
            q = round_operand(q, DOT, PRECISION).to(tl.float32)
            positive_score, tie = positive_scores_of(q, k)
    # Queries stay in registers where a whole row fits.
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

    # Running sums. Scores of unit vectors are at most 1, so 1 is their fixed maximum.
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    positive_rank = tl.zeros([BLOCK_N], dtype=tl.int32)
    out = tl.zeros([BLOCK_N, OUT_C], dtype=tl.float32)
    maximum = positive_score * scale if ONLINE else scale

    # Whole tiles of the split. `residue`: the place, modulo period, of a query's excluded negatives
    # in the tile. The place moves from tile to tile unless the period divides BLOCK_K.
    tile = split * tiles_per_split
    full_tiles = tl.minimum(tiles_per_split, K // BLOCK_K - tile)
    negatives += tile.to(tl.int64) * BLOCK_K * stride_k
    own_ids = None
    if key_ids is not None:
        own_ids = tl.load(query_ids + first + rows, mask=rows < limit, other=0)
        key_ids += tile * BLOCK_K
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
        maximum, total, positive_rank, out = _sweep_step(
            maximum,
            total,
            positive_rank,
            out,
            query_block,
            query,
            rows,
            limit,
            tie,
            scale,
            negatives,
            BLOCK_K,
            out_column,
            residue,
            period,
            own_ids,
            key_ids,
            query_stride_n,
            query_stride_c,
            stride_k,
            stride_c,
            C,
            DOT,
            PRECISION,
            NORMALIZE_NEGATIVES,
            EXCLUDE,
            ONLINE,
            RANK,
            GRAD,
            False,
            BLOCK_K,
            BLOCK_C,
            OUT_C,
        )
        negatives += BLOCK_K * stride_k
        if key_ids is not None:
            key_ids += BLOCK_K
        tile += 1
    # The rest of the last tile, outside the loop, so that whole tiles pay for no mask. Its
    # tiles are narrow, which takes few registers.
    if full_tiles < tiles_per_split:
        for start in tl.range(tile * BLOCK_K, K, TAIL_K, num_stages=1):
            residue = query_residue
            if EXCLUDE:
                residue = query_residue - start % period
                residue = tl.where(residue < 0, residue + period, residue)
            maximum, total, positive_rank, out = _sweep_step(
                maximum,
                total,
                positive_rank,
                out,
                query_block,
                query,
                rows,
                limit,
                tie,
                scale,
                negatives,
                K - start,
                out_column,
                residue,
                period,
                own_ids,
                key_ids,
                query_stride_n,
                query_stride_c,
                stride_k,
                stride_c,
                C,
                DOT,
                PRECISION,
                NORMALIZE_NEGATIVES,
                EXCLUDE,
                ONLINE,
                RANK,
                GRAD,
                True,
                TAIL_K,
                BLOCK_C,
                OUT_C,
            )
            negatives += TAIL_K * stride_k
            if key_ids is not None:
                key_ids += TAIL_K

    # Write the split's sums, without the factor 2^HALF_LIFT.
    if HALF:
        total *= tl.exp2(-HALF_LIFT)
        out *= tl.exp2(-HALF_LIFT)
    place = split.to(tl.int64) * N + first  # of the first row in the arrays (splits, N)
    inside = rows < limit
    if out_column == 0:
        tl.store(totals + place + rows, total, mask=inside)
        if ONLINE:
            tl.store(maxima + place + rows, maximum, mask=inside)
        if RANK:
            tl.store(positive_ranks + place + rows, positive_rank, mask=inside)
    if GRAD:
        columns = out_column + tl.arange(0, OUT_C)
        tl.store(
            outs + (place + rows)[:, None] * C + columns[None, :],
            out,
            mask=inside[:, None] & (columns < C)[None, :],
        )
