"""Functions that the kernels share: load rows, normalise, round operands of matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import constexpr_function

from mocofast_kernels import configs
from mocofast_kernels.configs import ALL_REGISTERS, FUSED, block_of, row_warps
from mocofast_kernels.cpu_ranks import tie_share
from mocofast_kernels.tables import FLOATS

LAUNCHES = ("num_splits", "tile")  # arguments of launches alone
EPSILON = tl.constexpr(1e-12)  # of torch.nn.functional.normalize
_tie_share = constexpr_function(tie_share)


@triton.jit
def load_rows(
    base,
    rows,
    c,
    stride_r,
    stride_c,
    limit,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Returns columns c to c + BLOCK_C of some rows, as stored.

    Columns from C on are 0. With MASK_ROWS, rows from `limit` on are 0 too.
    """
    columns = c + tl.arange(0, BLOCK_C)
    pointers = base + (rows[:, None] * stride_r + columns[None, :] * stride_c)
    if C % BLOCK_C == 0:
        if MASK_ROWS:
            return tl.load(pointers, mask=rows[:, None] < limit, other=0.0)
        else:
            return tl.load(pointers)
    else:
        if MASK_ROWS:
            return tl.load(
                pointers, mask=(rows[:, None] < limit) & (columns[None, :] < C), other=0.0
            )
        else:
            return tl.load(pointers, mask=columns[None, :] < C, other=0.0)


@triton.jit
def inverse_norm(squares):
    """Returns 1 / max(|x|, 1e-12) from the sum of squares. Keeps NaN, which tl.maximum hides."""
    norm = tl.sqrt(squares)
    return 1.0 / tl.where(norm < EPSILON, EPSILON, norm)


@triton.jit
def unit_rows(x):
    """Returns x / max(|x|, 1e-12), row by row, float32."""
    x = x.to(tl.float32)
    return x * inverse_norm(tl.sum(x * x, axis=1))[:, None]


@triton.jit
def positive_scores_of(q, k):
    """Returns the score of every query and key, and the least score that ties with it.

    q, k: (R, C) float32, rounded as operands.
    """
    share: tl.constexpr = _tie_share(q.shape[1])
    terms = q * k
    score = tl.sum(terms, axis=1)
    return score, score - share * tl.sum(tl.abs(terms), axis=1)


@triton.jit
def through_unit(gradient, x):
    """Returns the gradient of x from the gradient g of u = x / max(|x|, eps), row by row.

    The result is (g - u (u.g)) / |x|, and g / eps where |x| < eps.
    """
    squares = tl.sum(x * x, axis=1)[:, None]
    scale = inverse_norm(squares)
    unit = x * scale
    along = tl.where(tl.sqrt(squares) < EPSILON, 0.0, tl.sum(unit * gradient, axis=1)[:, None])
    return (gradient - unit * along) * scale


@triton.jit
def round_operand(x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Returns x as an operand of tl.dot, of dtype DOT.

    Rounds to tf32 explicitly, since the matrix unit would truncate.
    """
    x = x.to(DOT)
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        # The carry could turn a NaN into a number.
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def _prepare_rows_kernel(
    query,  # (N, C)
    positive,  # (N, C), or None
    operand,  # (N, C) of dtype DOT, contiguous
    score,  # (2, N), or None: scores, and the least scores that tie with them
    N,
    query_stride_n,
    query_stride_c,
    positive_stride_n,
    positive_stride_c,
    C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    limit = N - first
    query += first * query_stride_n
    q = load_rows(query, rows, 0, query_stride_n, query_stride_c, limit, C, BLOCK_C, True)
    if NORMALIZE:
        q = unit_rows(q)
    q = round_operand(q, DOT, PRECISION)
    columns = tl.arange(0, BLOCK_C)[None, :]
    tl.store(
        operand + (first + rows[:, None]) * C + columns,
        q,
        mask=(rows[:, None] < limit) & (columns < C),
    )
    if score is not None:
        positive += first * positive_stride_n
        k = load_rows(
            positive, rows, 0, positive_stride_n, positive_stride_c, limit, C, BLOCK_C, True
        )
        if NORMALIZE:
            k = unit_rows(k)
        k = round_operand(k, DOT, PRECISION).to(tl.float32)
        own, tie = positive_scores_of(q.to(tl.float32), k)
        tl.store(score + first + rows, own, mask=rows < limit)
        tl.store(score + N + first + rows, tie, mask=rows < limit)


@triton.jit
def _project_rows_kernel(
    grad,  # (N, C) float32, contiguous
    x,  # (N, C)
    N,
    x_stride_n,
    x_stride_c,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    values = load_rows(
        x + first * x_stride_n, rows, 0, x_stride_n, x_stride_c, N - first, C, BLOCK_C, True
    )
    gradient = load_rows(grad + first * C, rows, 0, C, 1, N - first, C, BLOCK_C, True)
    columns = tl.arange(0, BLOCK_C)[None, :]
    inside = (rows[:, None] < N - first) & (columns < C)
    projected = through_unit(gradient, values.to(tl.float32))
    tl.store(grad + (first + rows[:, None]) * C + columns, projected, mask=inside)


def rows_per_program(C: int) -> int:
    """Returns how many rows a program of a row-wise kernel takes.

    4096 elements, 32 a thread, stay in registers.
    """
    return max(1, 4096 // block_of(C))


P = ParamSpec("P")
Result = TypeVar("Result")


def blocked_without_matrix_units(
    blocked: Callable[..., Result],
) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Makes a launching function call `blocked` on GPUs without matrix units for `dot_dtype`.

    It also calls `blocked` where there is a mask of excluded negatives, which no kernel reads, and
    for rows that no program can hold.

    launch: its third argument holds the negatives, (K, C).
    blocked: the same computation in PyTorch (`mocofast_kernels.cpu`), without options of launches.
    """

    def choosing(launch: Callable[P, Result]) -> Callable[P, Result]:
        @functools.wraps(launch)
        def chosen(*args: P.args, **kwargs: P.kwargs) -> Result:
            negatives: Any = args[2]
            dot_dtype: Any = kwargs["dot_dtype"]
            fits = negatives.shape[1] <= configs.LONGEST and kwargs.get("mask") is None
            if fits and configs.has_matrix_units(negatives.device, dot_dtype):
                return launch(*args, **kwargs)
            own = {name: value for name, value in kwargs.items() if name not in LAUNCHES}
            return blocked(*args, **own)

        return chosen

    return choosing


def precision_of(dot_dtype: torch.dtype, device: torch.device) -> str:
    """Returns how tl.dot multiplies: "ieee", or "tf32" where PyTorch may use tf32 for float32."""
    return "tf32" if dot_dtype == torch.float32 and _allows_tf32(device) else "ieee"


def _allows_tf32(device: torch.device) -> bool:
    """Returns whether PyTorch may multiply float32 matrices on a GPU as tf32.

    PyTorch raises an error where the older function is asked after the newer setting was written.
    """
    # Triton has no tf32 for AMD's GPUs. GPUs of NVIDIA have tf32 since they have bfloat16.
    if torch.version.hip or not configs.has_matrix_units(device, torch.bfloat16):
        return False
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":  # not set for products: the setting of all operations holds
        setting = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return setting == "tf32"


def dot_kind(dot_dtype: torch.dtype, device: torch.device) -> str:
    """Returns the kind of product that a tile is chosen for: "16bit", "tf32" or "ieee"."""
    return precision_of(dot_dtype, device) if dot_dtype == torch.float32 else "16bit"


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Returns Triton's type for float32, bfloat16 or float16. KeyError for others."""
    return FLOATS[dtype]


def narrow(x: Tensor) -> Tensor:
    """Returns x, or a contiguous copy where offsets in a tile (at most 2^8 rows) exceed 32 bits."""
    rows, columns = x.stride()
    return x.contiguous() if 2**8 * rows + x.shape[1] * columns >= 2**31 else x


def prepare_rows(
    query: Tensor, positive: Tensor | None, normalize: bool, dot_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Returns rows as operands of matrix products, (N, C) dot_dtype, and their positive scores.

    query, positive: (N, C), any strides.
    normalize: divide query and positive by max(|x|, 1e-12) first.

    The scores are (2, N) float32, computed from rounded operands, the least scores that tie with
    them in the second row. Without positive: None.
    """
    N, C = query.shape
    operand = torch.empty((N, C), dtype=dot_dtype, device=query.device)
    score = None
    if positive is not None:
        score = torch.empty((2, N), dtype=torch.float32, device=query.device)
    block_n = rows_per_program(C)
    _prepare_rows_kernel[(triton.cdiv(N, block_n),)](
        query,
        positive,
        operand,
        score,
        N,
        *query.stride(),
        *(query if positive is None else positive).stride(),
        C=C,
        NORMALIZE=normalize,
        DOT=triton_dtype(dot_dtype),
        PRECISION=precision_of(dot_dtype, query.device),
        BLOCK_N=block_n,
        BLOCK_C=block_of(C),
        num_warps=row_warps(C),
        **ALL_REGISTERS,
    )
    return operand, score


def project_rows_(grad: Tensor, x: Tensor) -> None:
    """Turns the gradient of x / |x| into the gradient of x, in place.

    grad: (N, C) float32, contiguous.
    x: (N, C), any strides.
    """
    N, C = x.shape
    block_n = rows_per_program(C)
    _project_rows_kernel[(triton.cdiv(N, block_n),)](
        grad,
        x,
        N,
        *x.stride(),
        C=C,
        BLOCK_N=block_n,
        BLOCK_C=block_of(C),
        num_warps=row_warps(C),
        **FUSED,
    )
