"""Sums over a block of negatives on a CPU with AVX-512, by the compiled library (`sweep.c`).

PyTorch's operators need two products with a block of logits between them, which passes through
memory four times. The compiled sweep keeps the logits of 32 queries and 64 negatives (bfloat16:
128) in the first cache. Its products run at 93 % of the CPU's peak (docs/log.md).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from mocofast_kernels import cpu_products, cpu_ranks
from mocofast_kernels.cpu_library import addresses, function, is_watched, library
from mocofast_kernels.cpu_sums import Sums
from mocofast_kernels.cpu_vectors import unit_rows, wide
from mocofast_kernels.remembered import KINDS

LANES = 16  # rows of a panel, as in sweep.c
KEYS = 8  # keys at a time
PRODUCTS = 2**27  # most in the calling thread: 3 to 4 ms
TILE = 128  # bfloat16 keys whose weights are kept at a time
_INSTRUCTIONS = {torch.float32: "AVX-512", torch.bfloat16: "AVX512-BF16"}
_Sweep = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int,
    *[ctypes.c_void_p] * 2,
    *[ctypes.c_int64] * 4,
    ctypes.c_int,
    *[ctypes.c_void_p] * 5,
)
_Prepare = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int,
    *[ctypes.c_void_p] * 3,
    *[ctypes.c_int64] * 2,
    *[ctypes.c_float] * 2,
    *[ctypes.c_void_p] * 4,
)
_Finish = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    *[ctypes.c_int64] * 3,
    ctypes.c_float,
    ctypes.c_int,
    *[ctypes.c_void_p] * 8,
)


@functools.cache
def compiled(dtype: torch.dtype) -> tuple[ctypes.CDLL | None, str]:
    """Returns the library that sweeps with operands of the dtype, and the instructions.

    Without them, None and the reason.
    """
    found, why = library()
    if found is None:
        return None, why
    try:
        _Sweep(("sweep_keys", found))
        runs = found.sweep_runs(dtype == torch.bfloat16)
    except AttributeError as error:  # an older library
        return None, str(error)
    name = _INSTRUCTIONS[dtype]
    return (found, name) if runs else (None, f"this CPU or the C compiler does not know {name}")


def wide_function(prototype: Any, name: str) -> Any:
    """Returns a function of the library with AVX-512, None without the library or AVX-512."""
    runs = compiled(torch.float32)[0] is not None
    return function(prototype, name) if runs else None


def sweep_of(rows: Tensor) -> Sweep | None:
    """Returns the compiled sweep over blocks of keys, for rows (N, C), None where PyTorch serves.

    rows: operands, float32 or bfloat16.
    """
    found = _library_for(rows, rows.dtype)
    if found is None:
        return None
    depth = rows.shape[1] * rows.element_size() // 4
    # (A single row is contiguous with any stride, which a view of words must divide.)
    words = rows.contiguous().view(-1).view(torch.int32).view(len(rows), depth)
    padded = torch.nn.functional.pad(words, (0, 0, 0, -len(rows) % LANES))
    panels = padded.view(-1, LANES, depth).transpose(1, 2).contiguous()
    return Sweep(found, panels, len(rows), rows.dtype)


def _library_for(rows: Tensor, operand: torch.dtype) -> ctypes.CDLL | None:
    """Returns the library if it sweeps for rows (N, C) with operands of a dtype."""
    if (
        operand not in _INSTRUCTIONS
        or rows.device.type != "cpu"
        or rows.shape[1] * operand.itemsize % 4
        # PyTorch's products with AMX are several times as fast.
        or (operand == torch.bfloat16 and cpu_products.cpu_bf16() == "AMX")
        or is_watched()
    ):
        return None
    return compiled(operand)[0]


class Sweep:
    """Sums of w = exp2(row . key) and of w x key, for rows in panels of 16."""

    def __init__(self, found: ctypes.CDLL, panels: Tensor, count: int, dtype: torch.dtype) -> None:
        """panels: (P, words, 16) int32: float32, or two bfloat16. count: N. dtype: of the rows."""
        self._sweep = _Sweep(("sweep_keys", found))
        self.panels, self.count, self.dtype = panels, count, dtype
        self.depth = panels.shape[1]

    def sums(
        self,
        keys: Tensor,
        rows: slice,
        normalize: bool,
        tie: Tensor | None,
        output: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the sums over a block of keys for some rows.

        keys: (B, C), contiguous, of the rows' dtype.
        rows: R of the rows, from a multiple of 16 on.
        normalize: divide the keys by their norms.
        tie: (R, 1) float32, or None.
        output: compute sums of w x key.

        Returns the sum of w (R, 1), the sum of w x key (R, C) or None, and how many logits reach
        `tie`, (R,) int32 or None. Sums are float32.
        """
        count, width = rows.stop - rows.start, keys.shape[1]
        padded = -(-count // LANES) * LANES
        total = torch.zeros(padded, 1, dtype=torch.float32, device=keys.device)
        out = total.new_zeros(padded, width) if output else None
        above = None
        if tie is not None:
            above = total.new_zeros(padded, dtype=torch.int32)
            tie = torch.nn.functional.pad(tie, (0, 0, 0, padded - count))
        pairs = TILE // 2 * width if self.dtype == torch.bfloat16 else 0
        scratch = total.new_empty(KEYS * self.depth + pairs, dtype=torch.int32)
        self._sweep(
            self.dtype == torch.bfloat16,
            self.panels[rows.start // LANES :].data_ptr(),
            keys.data_ptr(),
            count,
            len(keys),
            self.depth,
            width,
            normalize,
            *addresses(tie, total, out, above, scratch),
        )
        return (
            total[:count],
            None if out is None else out[:count],
            None if above is None else above[:count],
        )


def equal_keys(
    positive: Tensor, negatives: Tensor, operand: torch.dtype, normalize_negatives: bool
) -> Tensor:
    """Returns the positives (N, C) as the sweep reads equal negatives, float32.

    The sweep rounds negatives to its operands, and then divides them by their norms if asked for.
    """
    if normalize_negatives:
        return unit_rows(positive.to(operand), True)[0]
    return wide(cpu_ranks.as_stored(unit_rows(positive, True)[0], negatives, False).to(operand))


def ends_of(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    inverse_t: float,
    operand: torch.dtype,
    normalize_negatives: bool,
    ranks: bool,
) -> Ends | None:
    """Returns the ends of the sweep for query and positive (N, C), None where PyTorch serves.

    operand: of the sweep. ranks: compute ranks.
    """
    found = _library_for(query, operand)
    if found is None or not all(type(x) in KINDS and not x.is_neg() for x in (query, positive)):
        return None
    calls = function(_Prepare, "sweep_prepare"), function(_Finish, "sweep_finish")
    if None in calls:  # an older library
        return None
    vectors = query.float().contiguous(), positive.float().contiguous()
    equal = None
    if ranks and not operand == negatives.dtype == positive.dtype == torch.float32:
        equal = equal_keys(positive, negatives, operand, normalize_negatives).contiguous()
    return Ends(found, *calls, *vectors, equal, inverse_t, operand, ranks)


class Ends:
    """What InfoNCE computes before and after a sweep, as MoCo calls it, by the compiled library.

    Unit vectors, logits without a shift, all negatives, and the gradient of the query alone.

    sweep: of the queries, times log2(e) / T.
    tie: (N, 1) float32, the least logit that ties with the positive's logit. None: no ranks.
    """

    def __init__(
        self,
        found: ctypes.CDLL,
        prepare: Any,
        finish: Any,
        query: Tensor,
        positive: Tensor,
        equal: Tensor | None,
        inverse_t: float,
        operand: torch.dtype,
        ranks: bool,
    ) -> None:
        """query, positive: (N, C) float32, contiguous.

        equal: (N, C) keys that tie with the positives. None: the positives' unit vectors.
        """
        count, width = query.shape
        self._finish, self._positive, self._inverse_t = finish, positive, inverse_t
        self._units, self._numbers = torch.empty_like(query), query.new_empty(3, count)
        self.tie = query.new_empty(count, 1) if ranks else None
        depth = width * operand.itemsize // 4
        panels = query.new_zeros(-(-count // LANES), depth, LANES, dtype=torch.int32)
        self.sweep = Sweep(found, panels, count, operand)
        given = addresses(query, positive, equal)
        outputs = addresses(self._units, self._numbers, panels, self.tie)
        options = count, width, inverse_t, cpu_ranks.tie_share(width)
        prepare(operand == torch.bfloat16, *given, *options, *outputs)

    def finish(self, sums: Sums, keys: int, mean: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns loss (N,), of the mean (); ranks (N,) int32 or None; and the gradient (N, C).

        sums: over all negatives, of all rows, contiguous. keys: how many negatives there are.
        """
        count, width = self._units.shape
        loss = self._units.new_empty(() if mean else count)
        grad = torch.empty_like(self._units)
        ranks = None if sums.above is None else torch.empty_like(sums.above)
        sizes = count, keys, width, self._inverse_t, mean
        given = addresses(self._units, self._numbers, sums.total, sums.output, sums.above)
        self._finish(*addresses(self._positive), *sizes, *given, *addresses(loss, grad, ranks))
        return loss, ranks, grad
