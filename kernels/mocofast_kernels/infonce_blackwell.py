"""Warp-specialised sweep of InfoNCE for Blackwell (compute capability 10.0), in Gluon.

A program has 128 queries, and three parts. A warp copies tiles of negatives into a ring in shared
memory. A warp issues products: scores and sums stay in tensor memory, two tiles of scores side by
side. Four warps turn the scores of a tile into weights, while the matrix unit computes the scores
of the next tile.

The sums are those of `mocofast_kernels.infonce_hopper`, for rows of 64 or 128 columns. No rule
chooses this kernel. A table of tiles can (`mocofast bench autotune --specialised`).
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import blackwell
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fence_async_shared,
    mbarrier,
    tcgen05_mma,
)
from triton.runtime.jit import constexpr_function

from mocofast_kernels.infonce_hopper import _copy_tiles, _load_queries, _reached, launch
from mocofast_kernels.infonce_sweep import LOG2_E


@constexpr_function
def _in_registers(element, shape, layout):
    """Returns the layout of values in tensor memory when four warps load them."""
    if hasattr(blackwell, "get_tmem_reg_layout"):
        return blackwell.get_tmem_reg_layout(element, shape, layout, 4)
    # Triton 3.9 asks the type of the memory.
    kind = blackwell.tensor_memory_descriptor_type(element, shape, layout, shape)
    return kind.get_reg_layout(4)


QUERIES = gl.constexpr(128)  # queries of a program: rows of tensor memory
FEW = gl.constexpr(24)  # registers of a thread that copies or issues products


@gluon.jit
def _add_tile(j, ring, weights, sums, weighed, BARRIERS, STAGES: gl.constexpr):
    """Adds weights x negatives of tile j to the sums. The barriers learn that it is done."""
    mbarrier.wait(weighed.index(j % 2), (j // 2) & 1)
    tcgen05_mma(
        weights.index(j % 2),
        ring.index(j % STAGES),
        sums,
        use_acc=j > 0,
        mbarriers=BARRIERS,
    )


@gluon.jit
def _multiply(
    query_tile,
    ring,
    scores,
    weights,
    sums,
    ready,
    free,
    scored,
    taken,
    weighed,
    spent,
    ends,
    tiles,
    STAGES: gl.constexpr,
):
    """Issues the products of the split. The sums of a tile follow the scores of the next tile."""
    mbarrier.wait(ends.index(0), 0)
    for j in range(tiles):
        place, side = j % STAGES, j % 2
        mbarrier.wait(ready.index(place), (j // STAGES) & 1)
        # The first two tiles find their sides free: they wait for the phase before the first.
        mbarrier.wait(taken.index(side), ((j // 2) & 1) ^ 1)
        tcgen05_mma(
            query_tile,
            ring.index(place).permute((1, 0)),
            scores.index(side),
            use_acc=False,
            mbarriers=[scored.index(side)],
        )
        if j > 0:
            last = j - 1
            done = [free.index(last % STAGES), spent.index(last % 2)]
            _add_tile(last, ring, weights, sums, weighed, done, STAGES)
    _add_tile(tiles - 1, ring, weights, sums, weighed, [ends.index(1)], STAGES)


@gluon.jit
def _weigh(
    j,
    total,
    positive_rank,
    tie,
    scores,
    weights,
    scored,
    taken,
    weighed,
    spent,
    remaining,
    scale,
    LAYOUT: gl.constexpr,
    BLOCK_K: gl.constexpr,
    RANK: gl.constexpr,
    LAST: gl.constexpr,
):
    """Turns the scores of tile j into weights, and takes them into the sums of rows.

    LAST: rows past the last negative count for nothing.
    """
    side, phase = j % 2, (j // 2) & 1
    mbarrier.wait(scored.index(side), phase)
    tile = scores.index(side).load(LAYOUT)
    mbarrier.arrive(taken.index(side), count=1)
    if LAST:
        columns = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, LAYOUT))
        tile = gl.where(columns[None, :] < remaining - j * BLOCK_K, tile, float("-inf"))
    if RANK:
        positive_rank += _reached(tile, tie)
    values = gl.exp2(tile * scale - scale)
    total += gl.sum(values, axis=1)
    mbarrier.wait(spent.index(side), phase ^ 1)
    weights.index(side).store(values.to(gl.bfloat16))
    mbarrier.arrive(weighed.index(side), count=1)
    return total, positive_rank


@gluon.jit
def _sum_tiles(
    query,
    positive,
    positive_scores,
    totals,
    positive_ranks,
    outs,
    query_tile,
    scores,
    weights,
    sums,
    scored,
    taken,
    weighed,
    spent,
    ends,
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
    SCORE_LAYOUT: gl.constexpr,
    OUT_LAYOUT: gl.constexpr,
):
    """Sums weights of the split for all queries, and writes the weighted negatives."""
    score_rows: gl.constexpr = gl.SliceLayout(1, SCORE_LAYOUT)
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
    mbarrier.arrive(ends.index(0), count=1)
    total = gl.zeros([QUERIES], gl.float32, layout=score_rows)
    positive_rank = gl.zeros([QUERIES], gl.int32, layout=score_rows)
    for j in range(tiles - 1):
        total, positive_rank = _weigh(
            j,
            total,
            positive_rank,
            tie,
            scores,
            weights,
            scored,
            taken,
            weighed,
            spent,
            remaining,
            scale,
            SCORE_LAYOUT,
            BLOCK_K,
            RANK,
            False,
        )
    total, positive_rank = _weigh(
        tiles - 1,
        total,
        positive_rank,
        tie,
        scores,
        weights,
        scored,
        taken,
        weighed,
        spent,
        remaining,
        scale,
        SCORE_LAYOUT,
        BLOCK_K,
        RANK,
        True,
    )

    # Write the split's sums.
    limit = N - first
    place = split.to(gl.int64) * N + first  # of the first row in the arrays (splits, N)
    own = gl.arange(0, QUERIES, layout=score_rows)
    gl.store(totals + place + own, total, mask=own < limit)
    if RANK:
        gl.store(positive_ranks + place + own, positive_rank, mask=own < limit)
    mbarrier.wait(ends.index(1), 0)
    out = sums.load(OUT_LAYOUT)
    rows = gl.arange(0, QUERIES, layout=gl.SliceLayout(1, OUT_LAYOUT))
    columns = gl.arange(0, C, layout=gl.SliceLayout(0, OUT_LAYOUT))
    pointers = outs + (place + rows)[:, None] * C + columns[None, :]
    gl.store(pointers, out, mask=(rows < limit)[:, None])


@gluon.jit
def _specialised_sweep_kernel(
    query,  # as in `mocofast_kernels.infonce_hopper`
    positive,
    negatives,
    positive_scores,
    totals,
    positive_ranks,
    outs,
    arrived,
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

    # Tensor memory has 512 columns of 32 bits: two tiles of scores, of weights in 16 bits, and the
    # sums.
    score_memory: gl.constexpr = TensorMemoryLayout([QUERIES, BLOCK_K], col_stride=1)
    out_memory: gl.constexpr = TensorMemoryLayout([QUERIES, C], col_stride=1)
    score_layout: gl.constexpr = _in_registers(gl.float32, (QUERIES, BLOCK_K), score_memory)
    out_layout: gl.constexpr = _in_registers(gl.float32, (QUERIES, C), out_memory)
    scores = allocate_tensor_memory(gl.float32, [2, QUERIES, BLOCK_K], score_memory)
    weights = allocate_tensor_memory(gl.bfloat16, [2, QUERIES, BLOCK_K], score_memory)
    sums = allocate_tensor_memory(gl.float32, [QUERIES, C], out_memory)

    # Barriers: places of the ring are ready and free. Scores are there and taken, weights are there
    # and spent, for both sides. Queries are there, and the sums are complete.
    query_tile = gl.allocate_shared_memory(gl.bfloat16, [QUERIES, C], negatives.layout)
    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_K, C], negatives.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    scored = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    weighed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    spent = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ends = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(scored.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
        mbarrier.init(weighed.index(i), count=1)
        mbarrier.init(spent.index(i), count=1)
        mbarrier.init(ends.index(i), count=1)
    fence_async_shared()
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
                    query_tile,
                    scores,
                    weights,
                    sums,
                    scored,
                    taken,
                    weighed,
                    spent,
                    ends,
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
                    score_layout,
                    out_layout,
                ),
            ),
            (
                _multiply,
                (
                    query_tile,
                    ring,
                    scores,
                    weights,
                    sums,
                    ready,
                    free,
                    scored,
                    taken,
                    weighed,
                    spent,
                    ends,
                    tiles,
                    STAGES,
                ),
            ),
            (_copy_tiles, (negatives, ring, ready, free, first_tile, tiles, BLOCK_K, STAGES)),
        ],
        [1, 1],
        [FEW, FEW],
    )


def specialised_sweep(*arguments: Any, **options: Any) -> None:
    """Launches the sweep for Blackwell. Arguments: as for `infonce_hopper.launch`."""
    launch(_specialised_sweep_kernel, *arguments, **options)
