"""What the kernels share: loading rows, unit length, rounding to an operand of a matrix product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mocofast_kernels.configs import REGISTERS, block_of

EPSILON = tl.constexpr(1e-12)  # of torch.nn.functional.normalize


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
    """Columns c .. c + BLOCK_C of some rows, as stored; zeros beyond C and, if MASK_ROWS, from row `limit` on."""
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
    """1 / max(|x|, 1e-12) from the sum of squares. A NaN stays one, which tl.maximum alone would hide."""
    norm = tl.sqrt(squares)
    return 1.0 / tl.where(norm < EPSILON, EPSILON, norm)


@triton.jit
def unit_rows(x):
    """x / max(|x|, 1e-12), row by row, float32."""
    x = x.to(tl.float32)
    return x * inverse_norm(tl.sum(x * x, axis=1))[:, None]


@triton.jit
def through_unit(gradient, x):
    """Gradient of x from that of u = x / max(|x|, eps), row by row: (g - u (u.g)) / |x|, and g / eps below eps."""
    squares = tl.sum(x * x, axis=1)[:, None]
    scale = inverse_norm(squares)
    unit = x * scale
    along = tl.where(tl.sqrt(squares) < EPSILON, 0.0, tl.sum(unit * gradient, axis=1)[:, None])
    return (gradient - unit * along) * scale


@triton.jit
def round_operand(x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """x as an operand of tl.dot: in the type DOT, and for tf32 rounded, since the matrix unit would truncate."""
    x = x.to(DOT)
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        # The carry could turn a NaN into a number.
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def _prepare_rows_kernel(
    query, positive, operand, score, N, query_stride_n, query_stride_c, positive_stride_n, positive_stride_c,
    C: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
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
        tl.store(score + first + rows, tl.sum(q.to(tl.float32) * k, axis=1), mask=rows < limit)


@triton.jit
def _project_rows_kernel(
    grad,
    x,
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
    """Rows of a row-wise kernel's program: 4096 elements, 32 a thread, stay in registers."""
    return max(1, 4096 // block_of(C))


def precision_of(dot_dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 exactly, unless PyTorch's own products are allowed to be tf32."""
    if dot_dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def dot_kind(dot_dtype: torch.dtype) -> str:
    """The column of the tile table: "16bit", "tf32" or "ieee"."""
    return precision_of(dot_dtype) if dot_dtype == torch.float32 else "16bit"


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[
        dtype
    ]


def narrow(x: Tensor) -> Tensor:
    """x, or a contiguous copy where offsets inside one tile (at most 2^8 rows) might not fit 32 bits."""
    return x.contiguous() if max(x.stride()) >= 2**22 else x


def prepare_rows(
    query: Tensor, positive: Tensor | None, normalize: bool, dot_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Rows as operands of matrix products, (N, C) dot_dtype; queries also give their scores with the positives, (N,)
    float32, from operands rounded likewise."""
    N, C = query.shape
    operand = torch.empty((N, C), dtype=dot_dtype, device=query.device)
    score = None if positive is None else torch.empty(N, dtype=torch.float32, device=query.device)
    block_n = rows_per_program(C)
    _prepare_rows_kernel[(triton.cdiv(N, block_n),)](
        query, positive, operand, score, N, *query.stride(), *(query if positive is None else positive).stride(),
        C=C, NORMALIZE=normalize, DOT=triton_dtype(dot_dtype), PRECISION=precision_of(dot_dtype), BLOCK_N=block_n,
        BLOCK_C=block_of(C), maxnreg=REGISTERS,
    )  # fmt: skip
    return operand, score


def project_rows_(grad: Tensor, x: Tensor) -> None:
    """Turn the gradient of x / |x|, (N, C) float32 and contiguous, into that of x, in place."""
    N, C = x.shape
    block_n = rows_per_program(C)
    _project_rows_kernel[(triton.cdiv(N, block_n),)](
        grad, x, N, *x.stride(), C=C, BLOCK_N=block_n, BLOCK_C=block_of(C)
    )
