"""InfoNCE on a GPU in a single sweep over the negatives: loss, gradient and the positive's rank.

With h = q/|q|, scores s_j = h.n_j and p = softmax of [s_+; s_j] / T, the gradient needs only
sum_j p_j n_j. This sum is attention with keys = values = the negatives (loss: van den Oord
et al. 2018, arXiv:1807.03748, eq. 4, as used by He et al. 2020, arXiv:1911.05722; sweep:
Dao 2023, arXiv:2307.08691). Nothing of size N x K is stored. `backward` only multiplies by
the incoming gradient, so the negatives may be overwritten before `backward`.

`mocofast_kernels.infonce_sweep` sweeps, a program for a block of queries and a split of the
negatives. `_combine_kernel` adds the splits row by row, brings the positive in and finishes.
No sum depends on the order in which programs run: equal inputs give equal bits. The mean of the
losses, and the gradients of the mean in the dtypes of the inputs, come from the same two launches.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mocofast_kernels import cpu
from mocofast_kernels import tiles as tile_table
from mocofast_kernels.configs import (
    ALL_REGISTERS,
    TENSOR_MEMORY,
    Architecture,
    Tile,
    block_of,
    kernel_slots,
    row_warps,
    split_count,
)
from mocofast_kernels.cpu import InfoNCEForward
from mocofast_kernels.cpu_ranks import worst_rank
from mocofast_kernels.cpu_vectors import gradient_dtype
from mocofast_kernels.infonce_sweep import LOG2_E, _sweep_kernel, inverse_temperature
from mocofast_kernels.rows import (
    blocked_without_matrix_units,
    load_rows,
    narrow,
    precision_of,
    prepare_rows,
    through_unit,
    triton_dtype,
    unit_rows,
)
from mocofast_kernels.tiles import forward_products, rule, tile_of

MEAN_ROWS = 1024  # losses that the mean adds at a time
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _combine_kernel(
    query,  # (N, C)
    positive,  # (N, C)
    temperature,
    maxima,  # (splits, N), as totals and positive_ranks
    totals,
    positive_ranks,
    outs,  # (splits, N, C)
    loss,  # (N,), as lse and positive_rank
    lse,
    positive_rank,
    grad_query,  # (N, C)
    grad_positive,  # (N, C)
    grad_scale,  # (N,)
    mean_loss,  # (), or None: the mean over rows. All gradients are then gradients of the mean
    arrived,  # () int32 with the value 0, or None: programs that stored the loss of a row
    N,
    splits,
    worst_rank,  # where the loss is NaN
    query_stride_n,
    query_stride_c,
    positive_stride_n,
    positive_stride_c,
    C: tl.constexpr,
    TEMPERATURE_IS_POINTER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ONLINE: tl.constexpr,
    RANK: tl.constexpr,
    GRAD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Finishes a row: adds the splits and brings the positive in.

    Computes in float32 throughout, from the inputs as given.
    """
    # Load a query and its positive, both (1, C), and compute the positive's score.
    row = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    scale = inverse_temperature(temperature, TEMPERATURE_IS_POINTER)
    query += row * query_stride_n
    q = load_rows(query, one, 0, query_stride_n, query_stride_c, 1, C, BLOCK_C, False)
    q = q.to(tl.float32)
    positive += row * positive_stride_n
    k = load_rows(positive, one, 0, positive_stride_n, positive_stride_c, 1, C, BLOCK_C, False)
    k = k.to(tl.float32)
    h = q
    key = k
    if NORMALIZE:
        h = unit_rows(q)
        key = unit_rows(k)
    positive_score = tl.sum(h * key)

    # Sum of the weights over the splits. With ONLINE every split has a maximum of its own.
    split = tl.arange(0, SPLITS)
    inside = split < splits
    total = tl.load(totals + split * N + row, mask=inside, other=0.0)
    maximum = scale * LOG2_E
    if ONLINE:
        shifts = tl.load(maxima + split * N + row, mask=inside, other=float("-inf"))
        maximum = tl.max(shifts)
        total *= tl.exp2(shifts - maximum)
    total = tl.sum(total)

    # With d = log(sum over negatives) - s_+/T, the loss is log(1 + e^d), computed without
    # cancellation: an easy positive's loss of 1e-9 keeps its digits.
    d = (tl.fma(-positive_score, scale * LOG2_E, maximum) + tl.log2(total)) * LN_2
    x = tl.exp(-tl.abs(d))
    u = 1.0 + x
    log1p = tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))
    value = tl.maximum(d, 0.0) + log1p
    if RANK:  # a comparison with NaN counted nobody
        counts = tl.load(positive_ranks + split * N + row, mask=inside, other=0)
        tl.store(positive_rank + row, tl.where(value == value, tl.sum(counts), worst_rank))
    tl.store(loss + row, value)
    tl.store(lse + row, value + positive_score * scale)

    # Gradients, from the weighted mean of the negatives, (1, C).
    if GRAD:
        mean = tl.zeros([1, BLOCK_C], dtype=tl.float32)
        columns = tl.arange(0, BLOCK_C)
        for start in range(0, splits, BLOCK_SPLITS):
            some = start + tl.arange(0, BLOCK_SPLITS)
            place = outs + (some.to(tl.int64) * N + row)[:, None] * C + columns[None, :]
            mask = (some < splits)[:, None] & (columns < C)[None, :]
            tile = tl.load(place, mask=mask, other=0.0)
            if ONLINE:
                shift = tl.load(maxima + some * N + row, mask=some < splits, other=float("-inf"))
                tile *= tl.exp2(shift - maximum)[:, None]
            mean += tl.sum(tile, axis=0)[None, :]
        mean /= tl.where(total == 0.0, 1.0, total)  # a row without negatives has the total 0
        # d loss / d q = share (mean - key) / T, and d loss / d key = -share q / T.
        share = 1.0 / (1.0 + tl.exp(-d))  # the negatives' share of the softmax
        if mean_loss is not None:
            share /= N
        away = share * (mean - key)
        tl.store(grad_scale + row, tl.sum(h * away))
        to_query = scale * away
        to_positive = -scale * share * h
        if NORMALIZE:  # from gradients of unit vectors to gradients of the inputs
            to_query = through_unit(to_query, q)
            to_positive = through_unit(to_positive, k)
        within = (columns < C)[None, :]
        query_grad = to_query.to(grad_query.dtype.element_ty)
        positive_grad = to_positive.to(grad_positive.dtype.element_ty)
        tl.store(grad_query + row * C + columns[None, :], query_grad, mask=within)
        tl.store(grad_positive + row * C + columns[None, :], positive_grad, mask=within)

    # The program that comes last adds the losses of all rows, in the order of rows: equal inputs
    # give equal bits. Its loads bypass the first-level cache, which may hold older numbers.
    if mean_loss is not None:
        tl.debug_barrier()
        if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == N - 1:
            rows = tl.arange(0, BLOCK_ROWS)
            losses = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
            for start in range(0, N, BLOCK_ROWS):
                within_rows = start + rows < N
                losses += tl.load(
                    loss + start + rows, mask=within_rows, other=0.0, cache_modifier=".cg"
                )
            tl.store(mean_loss, tl.sum(losses) / N)


def _specialised(gpu: Architecture) -> Any:
    """Returns the module of a GPU's warp-specialised sweep. None: not with this Triton.

    Gluon is no part of older Tritons, and its functions change from release to release.
    """
    try:
        return import_module(
            f"mocofast_kernels.infonce_{'blackwell' if gpu.blackwell else 'hopper'}"
        )
    except ImportError:
        return None


@blocked_without_matrix_units(cpu.infonce_forward)
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
    mean: bool = False,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    mask: Tensor | None = None,
    num_splits: int | None = None,
    tile: Tile | None = None,
) -> InfoNCEForward:
    """Returns the loss of every row, the gradients and the positive's rank, from a single sweep.

    query, positive: (N, C), float32, bfloat16 or float16, any strides.
    negatives: (K, C), types and strides as query.
    temperature: float > 0, or a tensor () on the same device, read on the device.
    normalize: divide query and positive by max(|x|, 1e-12) inside the kernel.
    normalize_negatives: divide the negatives likewise.
    exclude_period: P > 0 leaves negative j out of row i where j % P == i % P.
    return_rank: count the negatives that score as high as the positive, to rounding, or higher.
    compute_grad: compute the gradients.
    dot_dtype: dtype of the operands of matrix products. Sums are float32 always.
    only_query: accepted for the CPU's sake. All gradients are by-products of the same kernel.
    mean: return the mean of the losses and its gradients, as `InfoNCEForward` says.
    query_ids: (N,) int64. key_ids: (K,) int64. Negative j is left out of row i where the ids are
        equal.
    mask: (N, K) bool, True leaves a negative out. With a mask the blocked PyTorch path runs.
    num_splits: number of groups of negatives, swept in parallel. None fills the GPU.
    tile: a tile that passes `tiles.check`. None takes the tile from the table or the rule.

    Returns loss = lse - s_+ / T and lse, (N,) float32. With return_rank: rank, (N,) int32, the
    positive's rank. With compute_grad, float32: the gradients of the loss by query and by
    positive (N, C), the second through the positive's score alone, and by 1 / T (N,).
    Fields not asked for are None. Does not synchronise with the host.

    GPUs without matrix units for dot_dtype take the blocked PyTorch path of `mocofast_kernels.cpu`,
    as rows of more than 8,192 columns do.
    """
    # Choose the variant of the kernel and the tile.
    N, C = query.shape
    K = negatives.shape[0]
    assert positive.shape == (N, C) and negatives.shape == (K, C), (N, K, C)
    query, positive, negatives = narrow(query), narrow(positive), narrow(negatives)
    is_pointer = isinstance(temperature, Tensor)
    products = forward_products(
        negatives,
        temperature,
        normalize=normalize,
        normalize_negatives=normalize_negatives,
        dot_dtype=dot_dtype,
        ids=key_ids is not None,
    )
    online = products.online
    gpu = tile_table.architecture(query.device)
    if tile is None:
        tile = tile_of(products, query.device)
        if gpu.blackwell and key_ids is not None and negatives.dtype != dot_dtype:
            # Ids and the conversion take registers: 64 negatives spill five words on a B200.
            tile = tile._replace(stream=min(32, tile.stream))
    specialised: Any = _specialised(gpu) if tile.specialised else None
    lacks = exclude_period or not compute_grad or negatives.data_ptr() % 16
    lacks = lacks or specialised is None or (gpu.blackwell and C not in TENSOR_MEMORY)
    if tile.specialised and lacks:
        tile = rule(products, gpu)  # the specialised sweep lacks such calls

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    with torch.cuda.device_of(query):
        # Divide the work: blocks of queries, chunks of columns, splits of the negatives.
        row_blocks = triton.cdiv(N, tile.stay)
        chunks = triton.cdiv(C, tile.out_c) if compute_grad else 1
        tiles = triton.cdiv(K, tile.stream)
        slots = kernel_slots(query.device, tile.warps)
        splits = num_splits or split_count(row_blocks * chunks, tiles, slots)
        tiles_per_split = triton.cdiv(tiles, splits)
        splits = triton.cdiv(tiles, tiles_per_split)  # no split without a tile

        # Sweep over the negatives. Every split writes its own sums.
        totals, maxima = empty(splits, N), empty(splits, N) if online else None
        positive_ranks = empty(splits, N, dtype=torch.int32) if return_rank else None
        outs = empty(splits, N, C) if compute_grad else None
        arrived = empty(dtype=torch.int32) if mean else None
        operand, positive_scores = query, None
        # Longer rows do not fit the registers while they are normalised. Chunks of rows are
        # read again for every tile.
        prepared = C > 128 or tile.block_c < C
        if prepared:
            operand, positive_scores = prepare_rows(query, positive, normalize, dot_dtype)
        if tile.specialised:
            specialised.specialised_sweep(
                operand,
                positive,
                negatives,
                temperature,
                positive_scores,
                totals,
                positive_ranks,
                outs,
                arrived,
                tiles_per_split,
                normalize=normalize,
                tile=tile,
            )
        else:
            _sweep_kernel[(row_blocks, splits, chunks)](
                operand,
                positive,
                negatives,
                temperature,
                positive_scores,
                maxima,
                totals,
                positive_ranks,
                outs,
                query_ids,
                key_ids,
                arrived,
                N,
                K,
                tiles_per_split,
                exclude_period,
                *operand.stride(),
                *positive.stride(),
                *negatives.stride(),
                C=C,
                TEMPERATURE_IS_POINTER=is_pointer,
                PREPARED=prepared,
                NORMALIZE=normalize,
                NORMALIZE_NEGATIVES=normalize_negatives,
                DOT=triton_dtype(dot_dtype),
                PRECISION=precision_of(dot_dtype, query.device),
                EXCLUDE=exclude_period > 0,
                ONLINE=online,
                RANK=return_rank,
                GRAD=compute_grad,
                BLOCK_N=tile.stay,
                BLOCK_K=tile.stream,
                BLOCK_C=tile.block_c,
                OUT_C=tile.out_c,
                num_warps=tile.warps,
                num_stages=tile.stages,
                **ALL_REGISTERS,
            )

        # Add the splits and finish.
        loss, lse = empty(N), empty(N)
        positive_rank = empty(N, dtype=torch.int32) if return_rank else None
        mean_loss = empty() if mean else None
        grad_query = grad_positive = grad_scale = None
        if compute_grad:
            kinds = [gradient_dtype(x.dtype) if mean else torch.float32 for x in (query, positive)]
            grad_query, grad_positive = (empty(N, C, dtype=kind) for kind in kinds)
            grad_scale = empty(N)
        _combine_kernel[(N,)](
            query,
            positive,
            temperature,
            maxima,
            totals,
            positive_ranks,
            outs,
            loss,
            lse,
            positive_rank,
            grad_query,
            grad_positive,
            grad_scale,
            mean_loss,
            arrived,
            N,
            splits,
            worst_rank(K, exclude_period),
            *query.stride(),
            *positive.stride(),
            C=C,
            TEMPERATURE_IS_POINTER=is_pointer,
            NORMALIZE=normalize,
            ONLINE=online,
            RANK=return_rank,
            GRAD=compute_grad,
            SPLITS=triton.next_power_of_2(splits),
            BLOCK_SPLITS=max(1, 4096 // block_of(C)),
            BLOCK_C=block_of(C),
            BLOCK_ROWS=MEAN_ROWS,
            num_warps=row_warps(C),
            **ALL_REGISTERS,
        )
    if mean_loss is not None:
        loss = mean_loss
    return InfoNCEForward(loss, lse, positive_rank, grad_query, grad_positive, grad_scale)
