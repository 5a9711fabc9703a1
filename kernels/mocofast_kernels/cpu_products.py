"""Matrix products on CPUs, by the faster library, in float32 or with bfloat16 operands."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from mocofast_kernels.cpu_vectors import wide, wide_dtype

# N K C of small problems: 16 queries, 1024 negatives, 64 dimensions. PyTorch keeps the operations
# of a small problem on one thread.
SMALL = 2**20
MM = 2**23  # N K C up to which `torch.mm` is as fast as oneDNN, or faster
FLAGS = 2**17  # logits compared at a time
# x @ weight.T by oneDNN, as torch.compile calls it. None in a build without oneDNN.
_ONEDNN_LINEAR = (
    getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
    if torch.backends.mkldnn.is_available()
    else None
)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x @ weight.T, float32, from the faster library. x: (M, C). weight: (P, C).

    x, weight: float32, or bfloat16, or float64 with a result in float64. oneDNN sums products of
    bfloat16 in float32, and rounds the sums to bfloat16 before they are converted. No operator of
    PyTorch 2.11 leaves out the rounding.
    """
    linear = _onednn_linear(x, weight)
    return wide(torch.mm(x, weight.t())) if linear is None else linear(x, weight)


def weighted_sums(weights: Tensor, rows: Tensor) -> Tensor:
    """Returns weights @ rows like `product`. weights: (M, P). rows: (P, C)."""
    linear = _onednn_linear(weights, rows)
    return wide(torch.mm(weights, rows)) if linear is None else linear(weights, rows.t())


def _onednn_linear(x: Tensor, other: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Returns oneDNN's x @ weight.T where this is faster than `torch.mm`. other: the operand."""
    if (
        _ONEDNN_LINEAR is not None
        and x.dtype == torch.float32
        and len(x) * other.numel() > MM
        and x.device.type == "cpu"
        and torch.backends.mkldnn.enabled
    ):
        return lambda x, weight: _ONEDNN_LINEAR(x, weight, None, "none", [], "")
    return None


class Scratch(threading.local):
    """Memory that a thread uses for all of its blocks: the system takes back what is freed.

    A result is valid until the next call of the same method.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._flags: Tensor | None = None

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Returns `product(x, weight)`, (M, P), which the caller may overwrite."""
        if x.dtype != torch.bfloat16:
            return product(x, weight)
        shape = len(x), len(weight)
        rounded = self._buffer(shape, x.dtype)
        torch.mm(x, weight.t(), out=rounded)
        return self._buffer(shape, torch.float32).copy_(rounded)

    def operand(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns x (M, P) in the dtype."""
        if x.dtype == dtype:
            return x
        return self._buffer((len(x), x.shape[1]), dtype).copy_(x)

    def count_reaching(self, logits: Tensor, tie: Tensor) -> Tensor:
        """Returns the number of logits (R, B) that reach `tie` (R, 1), (R,) int32.

        Float32 flags are several times as fast as booleans, and exact: a block has fewer than
        2**24 negatives.
        """
        counts = []
        step = max(1, FLAGS // logits.shape[1])
        for part, bound in zip(logits.split(step), tie.split(step)):
            if self._flags is None or self._flags.numel() < part.numel():
                self._flags = part.new_empty(part.numel(), dtype=torch.float32)
            flags = self._flags[: part.numel()].view_as(part)
            counts.append(torch.ge(part, bound, out=flags).sum(1).int())
        return counts[0] if len(counts) == 1 else torch.cat(counts)

    def _buffer(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Returns memory of shape and dtype, the same for every call with the dtype."""
        size = shape[0] * shape[1]
        if dtype not in self._buffers or self._buffers[dtype].numel() < size:
            self._buffers[dtype] = torch.empty(size, dtype=dtype, device="cpu")
        return self._buffers[dtype][:size].view(shape)


def cpu_bf16() -> str:
    """Returns the name of the CPU's instructions for products of bfloat16, "" if there are none.

    A CPU without such instructions computes in bfloat16 many times slower than in float32.
    """
    # oneDNN is the library that uses the instructions.
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return ""
    queries = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    for name, query in queries.items():
        if getattr(torch.cpu, query, lambda: False)():
            return name
    return ""


def operand_dtype(
    dot_dtype: torch.dtype, bounded: bool, query: Tensor, negatives: Tensor
) -> torch.dtype:
    """Returns the dtype of the operands of InfoNCE's products: bfloat16, float32 or float64.

    dot_dtype: the dtype that is asked for.
    bounded: query and negatives are unit vectors and 1 / T is bounded. Rounded logits then differ
        by at most 2^-7 / T. Logits without a bound stay float32.
    query: (N, C), as given. negatives: (K, C).

    bfloat16 where asked for, on a CPU with instructions for bfloat16, unless the problem is small.
    """
    fast = (
        dot_dtype == torch.bfloat16
        and bounded
        and len(query) * negatives.numel() > SMALL
        and query.device.type == "cpu"
        and cpu_bf16()
    )
    return torch.bfloat16 if fast else wide_dtype(query.dtype)
