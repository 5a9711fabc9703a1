"""Where many tensors lie, as tables on the GPU, so that one launch updates them all.

A row holds tensors that are updated together, element by element: a parameter, its gradient, its buffers. Rows of
equal types go into one table. Tables are found again by all they hold, addresses first, so that a storage which was
replaced gets a new table, never a write to where it was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mocofast_kernels.cpu_optim import same_layout

PLANS = 16  # sets of rows that a cache remembers
FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
WIDE = 8  # elements: two loads of 16 bytes in float32, one in 16 bits

TensorRow = Sequence["Tensor | None"]


@triton.jit
def locate(sizes, owners, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row, the offsets of its elements, and which of them exist."""
    owner = tl.load(owners + 2 * tl.program_id(0))
    offsets = tl.load(owners + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(sizes + owner)
    if WIDE:
        # Without this the compiler must expect a row's end anywhere, and loads its elements one by one.
        size = tl.multiple_of(size, 8)
    return owner, offsets, offsets < size


@triton.jit
def column(addresses, index, rows, owner, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """Pointer to the tensor in column `index` of a row."""
    pointer = tl.load(addresses + index * rows + owner).to(tl.pointer_type(TYPE))
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


class AddressTable(NamedTuple):
    """n rows of equal types, and which part of which row each program of a launch updates."""

    places: list[int]  # of its rows in the caller's list
    dtypes: tuple[
        torch.dtype | None, ...
    ]  # of the columns; None where the rows have no such tensor
    addresses: Tensor  # (columns, n) int64; 0 where there is no tensor
    sizes: Tensor  # (n,) int64: elements
    owners: Tensor  # (programs, 2) int32: which row, which block of it
    starts: Tensor  # (n + 1,) int32: first program of each row, and their number
    wide: bool  # addresses are multiples of 16 bytes and sizes of 8 elements, so memory may be read in wide steps


class TablePlan(NamedTuple):
    """What is done with a list of rows."""

    tables: list[AddressTable]
    singly: list[
        int
    ]  # places of rows that no table can hold: other types, other strides, gaps between elements


class TableCache:
    """Tables of the rows met last; `block`: elements of a program."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._plans: OrderedDict[tuple[Hashable, ...], TablePlan] = OrderedDict()

    def plan(self, rows: Sequence[TensorRow], elementwise: int) -> TablePlan:
        """The plan for these rows, all of one device; columns from `elementwise` on are not updated element by
        element (a counter), so they have no part in the layout. A row whose first tensor was met in another row
        already (tied weights) is left out.

        A new set of rows uploads tables, without waiting for them; that cannot be captured in a CUDA graph, so
        RuntimeError is raised there.
        """
        key = tuple(
            None if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride())
            for row in rows
            for t in row
        )
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        groups: dict[tuple[Hashable, ...], list[int]] = {}
        singly = []
        seen = set()
        for place, row in enumerate(rows):
            present = [t for t in row[:elementwise] if t is not None]
            identity = (
                present[0].data_ptr(),
                present[0].dtype,
                present[0].shape,
                present[0].stride(),
            )
            # Tensors without storage, which `static` compiles for, are all at address 0.
            if present[0].numel() == 0 or (identity in seen and present[0].device.type != "meta"):
                continue
            seen.add(identity)
            if all(t.dtype in FLOATS for t in present) and same_layout(present):
                wide = present[0].numel() % WIDE == 0 and all(
                    t.data_ptr() % 16 == 0 for t in present
                )
                groups.setdefault(
                    (wide, *(None if t is None else t.dtype for t in row)), []
                ).append(place)
            else:
                singly.append(place)
        tables = [self._table(rows, places, bool(wide)) for (wide, *_), places in groups.items()]
        plan = self._plans[key] = TablePlan(tables, singly)
        if len(self._plans) > PLANS:
            self._plans.popitem(last=False)
        return plan

    def _table(self, rows: Sequence[TensorRow], places: list[int], wide: bool) -> AddressTable:
        chosen = [rows[place] for place in places]
        tensors = [next(t for t in row if t is not None) for row in chosen]
        device = tensors[0].device
        addresses = [[0 if t is None else t.data_ptr() for t in column] for column in zip(*chosen)]
        sizes = torch.tensor([t.numel() for t in tensors])
        blocks = -(-sizes // self._block)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), blocks.cumsum(0)])
        owners = torch.repeat_interleave(torch.arange(len(sizes)), blocks)
        within = torch.arange(len(owners)) - starts[owners]
        return AddressTable(
            places,
            tuple(None if t is None else t.dtype for t in chosen[0]),
            _upload(torch.tensor(addresses), device),
            _upload(sizes, device),
            _upload(torch.stack([owners, within], dim=1).int(), device),
            _upload(starts.int(), device),
            wide,
        )


def _upload(values: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return values.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "tensors that no table is made of yet, in a CUDA graph capture: run a step with these very tensors "
            "before it, and keep gradients in place (zero_grad(set_to_none=False))"
        )
    return values.pin_memory().to(device, non_blocking=True)
