"""Sums over a block of negatives on a CPU with AVX-512, by the compiled library (`sweep.c`).

PyTorch's operators need two products with a block of logits between them, which passes through
memory four times. The compiled sweep keeps the logits of 32 queries and 64 negatives (bfloat16:
128) in the first cache. Its products run at 93 % of the CPU's peak (docs/log.md).
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from mocofast_kernels import cpu_products
from mocofast_kernels.cpu_library import is_watched, library

LANES = 16  # rows of a panel, as in sweep.c
KEYS = 8  # keys at a time
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


def sweep_of(rows: Tensor) -> Sweep | None:
    """Returns the compiled sweep over blocks of keys, for rows (N, C), None where PyTorch serves.

    rows: operands, float32 or bfloat16.
    """
    if (
        rows.dtype not in _INSTRUCTIONS
        or rows.device.type != "cpu"
        or rows.shape[1] * rows.element_size() % 4
        # PyTorch's products with AMX are several times as fast.
        or (rows.dtype == torch.bfloat16 and cpu_products.cpu_bf16() == "AMX")
        or is_watched()
    ):
        return None
    found = compiled(rows.dtype)[0]
    return None if found is None else Sweep(found, rows)


class Sweep:
    """Sums of w = exp2(row . key) and of w x key, for rows in panels of 16."""

    def __init__(self, found: ctypes.CDLL, rows: Tensor) -> None:
        """rows: (N, C) float32, or bfloat16 with an even C."""
        self._sweep = _Sweep(("sweep_keys", found))
        self.count, self.dtype = len(rows), rows.dtype
        self.depth = rows.shape[1] * rows.element_size() // 4  # words, of bfloat16 two numbers
        # (A single row is contiguous with any stride, which a view of words must divide.)
        words = rows.contiguous().view(-1).view(torch.int32).view(len(rows), self.depth)
        padded = torch.nn.functional.pad(words, (0, 0, 0, -len(rows) % LANES))
        self.panels = padded.view(-1, LANES, self.depth).transpose(1, 2).contiguous()

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
            *(None if x is None else x.data_ptr() for x in (tie, total, out, above)),
            scratch.data_ptr(),
        )
        return (
            total[:count],
            None if out is None else out[:count],
            None if above is None else above[:count],
        )
