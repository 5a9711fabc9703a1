"""Warp-specialised sweep of InfoNCE for Hopper (compute capability 9.0), in Gluon.

A program has three parts. A warp copies tiles of negatives into a ring in shared memory, by the
tensor memory accelerator. Two warpgroups with 64 queries each read the same ring. While the matrix
unit computes the scores of the next tile, a warpgroup computes the exponentials of this tile (Shah
et al. 2024, arXiv:2407.08608, "intra-warpgroup overlap").

The sums are those of `mocofast_kernels.infonce_sweep`, for one case: bfloat16 negatives as stored,
rows of 64, 128 or 256 columns, a fixed maximum, and gradients. No rule chooses this kernel. A table
of tiles can (`mocofast bench autotune --specialised`).
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mocofast_kernels.configs import FUSED, Tile
from mocofast_kernels.infonce_sweep import LOG2_E
from mocofast_kernels.rows import positive_scores_of, round_operand, unit_rows

# Triton 3.9 has renamed the function.
_load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

QUERIES = gl.constexpr(64)  # queries of a warpgroup
# Registers of a thread that computes, and of a thread that copies. 168 is what the launch gives to
# each of 384 threads, 2 x 128 x 240 + 128 x 24 = 64,512 are no more.
COMPUTING, COPYING = gl.constexpr(240), gl.constexpr(24)


@gluon.jit
def _copy_tiles(
    negatives, ring, ready, free, first_tile, tiles, BLOCK_K: gl.constexpr, STAGES: gl.constexpr
):
    """Copies the tiles of the split, each when its place in the ring is free."""
    for j in range(tiles):
        place = j % STAGES
        # The first round finds all places free: it waits for the phase before the first.
        mbarrier.wait(free.index(place), ((j // STAGES) & 1) ^ 1)
        # Rows past the last negative arrive as zeros and count as copied.
        mbarrier.expect(ready.index(place), negatives.block_type.nbytes)
        _load_tile(
            negatives, [(first_tile + j) * BLOCK_K, 0], ready.index(place), ring.index(place)
        )


@gluon.jit
def _load_rows(base, rows, stride_r, stride_c, limit, C: gl.constexpr, LAYOUT: gl.constexpr):
    """Returns rows of C columns as stored. Rows from `limit` on are 0."""
    columns = gl.arange(0, C, layout=gl.SliceLayout(0, LAYOUT))
    pointers = base + (rows[:, None] * stride_r + columns[None, :] * stride_c)
    return gl.load(pointers, mask=(rows < limit)[:, None], other=0.0)


@gluon.jit
def _load_queries(
    query,
    positive,
    positive_scores,
    query_tile,
    first,
    N,
    query_stride_n: gl.constexpr,
    query_stride_c: gl.constexpr,
    positive_stride_n: gl.constexpr,
    positive_stride_c: gl.constexpr,
    C: gl.constexpr,
    PREPARED: gl.constexpr,
    NORMALIZE: gl.constexpr,
    RANK: gl.constexpr,
    ROWS: gl.constexpr,
    SCORE_ROWS: gl.constexpr,
):
    """Stores operands of ROWS queries. Returns the least scores that tie with the positives."""
    row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [4, 1], [1, 0])
    limit = N - first
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, row_layout))
    query += first.to(gl.int64) * query_stride_n
    q = _load_rows(query, rows, query_stride_n, query_stride_c, limit, C, row_layout)
    tie = gl.zeros([ROWS], gl.float32, layout=SCORE_ROWS)
    if PREPARED:
        if RANK:
            own = gl.arange(0, ROWS, layout=SCORE_ROWS)
            tie = gl.load(positive_scores + N + first + own, mask=own < limit, other=0.0)
    else:
        if NORMALIZE:
            q = unit_rows(q)
        q = round_operand(q, gl.bfloat16, "ieee")
        if RANK:
            positive += first.to(gl.int64) * positive_stride_n
            k = _load_rows(
                positive, rows, positive_stride_n, positive_stride_c, limit, C, row_layout
            )
            if NORMALIZE:
                k = unit_rows(k)
            k = round_operand(k, gl.bfloat16, "ieee").to(gl.float32)
            _, least = positive_scores_of(q.to(gl.float32), k)
            tie = gl.convert_layout(least, SCORE_ROWS)
    query_tile.store(q)
    fence_async_shared()
    return tie


@gluon.jit
def _reached(scores, tie):
    """Returns how many scores reach the positive's, (QUERIES,) int32."""
    return gl.sum(gl.where(scores >= tie[:, None], 1.0, 0.0), axis=1).to(gl.int32)


@gluon.jit
def _sum_tiles(
    query,
    positive,
    positive_scores,
    totals,
    positive_ranks,
    outs,
    query_tile,
    ring,
    ready,
    free,
    first,
    split,
    N,
    remaining,  # negatives from the first tile on
    scale,
    tiles,
    query_stride_n: gl.constexpr,
    query_stride_c: gl.constexpr,
    positive_stride_n: gl.constexpr,
    positive_stride_c: gl.constexpr,
    C: gl.constexpr,
    PREPARED: gl.constexpr,
    NORMALIZE: gl.constexpr,
    RANK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Sums weights and weighted negatives of the split, for QUERIES rows from `first` on."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, k_width=2)
    score_rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    limit = N - first
    own = gl.arange(0, QUERIES, layout=score_rows)
    tie = _load_queries(
        query,
        positive,
        positive_scores,
        query_tile,
        first,
        N,
        query_stride_n,
        query_stride_c,
        positive_stride_n,
        positive_stride_c,
        C,
        PREPARED,
        NORMALIZE,
        RANK,
        QUERIES,
        score_rows,
    )
    total = gl.zeros([QUERIES], gl.float32, layout=score_rows)
    positive_rank = gl.zeros([QUERIES], gl.int32, layout=score_rows)
    out = gl.zeros([QUERIES, C], gl.float32, layout=out_layout)
    nothing = gl.zeros([QUERIES, BLOCK_K], gl.float32, layout=score_layout)
    mbarrier.wait(ready.index(0), 0)
    token = warpgroup_mma(
        query_tile, ring.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    scores = warpgroup_mma_wait(0, deps=(token,))
    for j in range(tiles - 1):
        place, following = j % STAGES, (j + 1) % STAGES
        # The scores of the next tile, under the exponentials of this tile.
        mbarrier.wait(ready.index(following), ((j + 1) // STAGES) & 1)
        token = warpgroup_mma(
            query_tile, ring.index(following).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        if RANK:
            positive_rank += _reached(scores, tie)
        weights = gl.exp2(scores * scale - scale)
        total += gl.sum(weights, axis=1)
        operand = gl.convert_layout(weights.to(gl.bfloat16), weight_layout)
        sums = warpgroup_mma(operand, ring.index(place), out, is_async=True)
        scores, out = warpgroup_mma_wait(0, deps=(token, sums))
        mbarrier.arrive(free.index(place), count=1)
    # The last tile, where rows past the last negative count for nothing.
    last = tiles - 1
    columns = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, score_layout))
    inside = columns[None, :] < remaining - last * BLOCK_K
    scores = gl.where(inside, scores, float("-inf"))
    weights = gl.exp2(scores * scale - scale)
    total += gl.sum(weights, axis=1)
    if RANK:
        positive_rank += _reached(scores, tie)
    operand = gl.convert_layout(weights.to(gl.bfloat16), weight_layout)
    out = warpgroup_mma(operand, ring.index(last % STAGES), out)

    # Write the split's sums.
    place = split.to(gl.int64) * N + first  # of the first row in the arrays (splits, N)
    gl.store(totals + place + own, total, mask=own < limit)
    if RANK:
        gl.store(positive_ranks + place + own, positive_rank, mask=own < limit)
    rows = gl.arange(0, QUERIES, layout=gl.SliceLayout(1, out_layout))
    columns = gl.arange(0, C, layout=gl.SliceLayout(0, out_layout))
    pointers = outs + (place + rows)[:, None] * C + columns[None, :]
    gl.store(pointers, out, mask=(rows < limit)[:, None])


@gluon.jit
def _specialised_sweep_kernel(
    query,  # (N, C)
    positive,  # (N, C)
    negatives,  # descriptor of (K, C) bfloat16 in tiles (BLOCK_K, C)
    positive_scores,  # (2, N) if PREPARED
    totals,  # (splits, N)
    positive_ranks,  # (splits, N) int32 if RANK
    outs,  # (splits, N, C)
    arrived,  # () int32, or None: becomes 0, for the combination to count in
    N,
    K,
    tiles_per_split,
    temperature,
    query_stride_n: gl.constexpr,
    query_stride_c: gl.constexpr,
    positive_stride_n: gl.constexpr,
    positive_stride_c: gl.constexpr,
    C: gl.constexpr,
    PREPARED: gl.constexpr,
    NORMALIZE: gl.constexpr,
    RANK: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    first = gl.program_id(0) * BLOCK_N
    split = gl.program_id(1)
    if arrived is not None:  # noqa: SIM102 (known while compiling)
        if (first == 0) & (split == 0):
            gl.store(arrived, 0)
    first_tile = split * tiles_per_split
    remaining = K - first_tile * BLOCK_K
    tiles = gl.minimum(tiles_per_split, (remaining + BLOCK_K - 1) // BLOCK_K)
    scale = 1.0 / temperature * LOG2_E
    # Shared memory: the queries of both warpgroups, the ring, and barriers for its places.
    query_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, QUERIES, C], negatives.layout)
    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_K, C], negatives.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    # All arguments stand in the call: in a sum of tuples, Triton 3.9 takes constants for numbers.
    gl.warp_specialize(
        [
            (
                _sum_tiles,
                (
                    query,
                    positive,
                    positive_scores,
                    totals,
                    positive_ranks,
                    outs,
                    query_tiles.index(0),
                    ring,
                    ready,
                    free,
                    first,
                    split,
                    N,
                    remaining,
                    scale,
                    tiles,
                    query_stride_n,
                    query_stride_c,
                    positive_stride_n,
                    positive_stride_c,
                    C,
                    PREPARED,
                    NORMALIZE,
                    RANK,
                    BLOCK_K,
                    STAGES,
                ),
            ),
            (
                _sum_tiles,
                (
                    query,
                    positive,
                    positive_scores,
                    totals,
                    positive_ranks,
                    outs,
                    query_tiles.index(1),
                    ring,
                    ready,
                    free,
                    first + QUERIES,
                    split,
                    N,
                    remaining,
                    scale,
                    tiles,
                    query_stride_n,
                    query_stride_c,
                    positive_stride_n,
                    positive_stride_c,
                    C,
                    PREPARED,
                    NORMALIZE,
                    RANK,
                    BLOCK_K,
                    STAGES,
                ),
            ),
            (_copy_tiles, (negatives, ring, ready, free, first_tile, tiles, BLOCK_K, STAGES)),
        ],
        [4, 1],
        [COMPUTING, COPYING],
    )


def launch(
    kernel: Any,
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float | Tensor,
    positive_scores: Tensor | None,
    totals: Tensor,
    positive_ranks: Tensor | None,
    outs: Tensor | None,
    arrived: Tensor | None,
    tiles_per_split: int,
    *,
    normalize: bool,
    tile: Tile,
) -> None:
    """Launches a specialised sweep, which writes totals, positive_ranks and outs.

    kernel: the sweep's kernel.
    query, positive: (N, C). With positive_scores, query holds operands (`rows.prepare_rows`).
    negatives: (K, C) bfloat16 operands at an address divisible by 16.
    temperature: float.
    positive_scores: (2, N) float32, or None.
    totals, positive_ranks: (splits, N) float32 and int32. Without positive_ranks none are counted.
    outs: (splits, N, C) float32, not None.
    arrived: () int32, which becomes 0, or None.
    tiles_per_split: tiles of `tile.stream` negatives of a split, at least one.
    tile: one of `configs.SPECIALISED[C]`.
    """
    N, C = query.shape
    layout = gl.NVMMASharedLayout.get_default_for([tile.stream, C], gl.bfloat16)
    described = TensorDescriptor.from_tensor(negatives, [tile.stream, C], layout)
    kernel[(triton.cdiv(N, tile.stay), len(totals))](
        query,
        positive,
        described,
        positive_scores,
        totals,
        positive_ranks,
        outs,
        arrived,
        N,
        negatives.shape[0],
        tiles_per_split,
        temperature,
        *query.stride(),
        *positive.stride(),
        C=C,
        PREPARED=positive_scores is not None,
        NORMALIZE=normalize,
        RANK=positive_ranks is not None,
        BLOCK_N=tile.stay,
        BLOCK_K=tile.stream,
        STAGES=tile.stages,
        num_warps=4,  # of a warpgroup. The other parts have warps of their own
        **FUSED,
    )


def specialised_sweep(*arguments: Any, **options: Any) -> None:
    """Launches the sweep for Hopper. Arguments: as for `launch`, without the kernel."""
    launch(_specialised_sweep_kernel, *arguments, **options)
