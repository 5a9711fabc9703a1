"""Tables of tensor addresses on the GPU, so that one launch updates many tensors.

A row holds tensors updated together, element by element: a parameter, the gradient,
the buffers. Rows of equal types go into one table.

Cache key: address, dtype, shape and stride of every tensor. New storage gives a new table.
A table that a CUDA graph captured is kept for ever: the graph reads the table at every replay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mocofast_kernels.cpu_parts import check_memory, same_layout

PLANS = 16  # sets of rows that a cache remembers
FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
WIDE = 8  # elements of a wide access: 16 bytes in 16-bit types, 32 bytes in float32

TensorRow = Sequence["Tensor | None"]  # tensors that are updated together


@triton.jit
def locate(sizes, owners, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the program's row, the offsets of the elements, and the mask of the elements."""
    owner = tl.load(owners + 2 * tl.program_id(0))
    offsets = tl.load(owners + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(sizes + owner)
    if WIDE:
        # Without this hint a row might end anywhere, and the compiler loads elements one by one.
        size = tl.multiple_of(size, 8)
    return owner, offsets, offsets < size


@triton.jit
def column(addresses, index, rows, owner, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """Returns the pointer to the tensor in column `index` of row `owner`.

    rows: number of rows of the table.
    """
    pointer = tl.load(addresses + index * rows + owner).to(tl.pointer_type(TYPE))
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


class AddressTable(NamedTuple):
    """n rows of equal types, and the block of a row that every program of a launch updates."""

    places: list[int]  # places of the rows in the caller's list
    dtypes: tuple[torch.dtype | None, ...]  # column by column, None for a column without tensors
    addresses: Tensor  # (columns, n) int64, 0 where there is no tensor
    sizes: Tensor  # (n,) int64: elements
    owners: Tensor  # (programs, 2) int32: row, block of the row
    starts: Tensor  # (n + 1,) int32: first program of every row, then the number of programs
    wide: bool  # wide loads fit: addresses are multiples of 16 bytes, sizes of 8 elements


class TablePlan(NamedTuple):
    """How a list of rows is updated."""

    tables: list[AddressTable]
    # Places of rows that no table can hold: other types, different strides, gaps.
    singly: list[int]
    upload: _Upload | None = None  # None on a CPU


class _Upload(NamedTuple):
    """The copy of a plan's tables to a GPU."""

    stream: int  # CUDA stream that copies
    done: torch.cuda.Event


class TableCache:
    """Keeps the plans of the sets of rows used last."""

    def __init__(self, block: int) -> None:
        """block: elements updated by a program."""
        self._block = block
        self._plans: OrderedDict[tuple[Hashable, ...], TablePlan] = OrderedDict()
        self._captured: dict[tuple[Hashable, ...], TablePlan] = {}

    def plan(self, rows: Sequence[TensorRow], elementwise: int) -> TablePlan:
        """Returns the plan for the rows, from the cache if possible.

        rows: tensors of one device. A row whose first tensor an earlier row holds as its first
            tensor (tied weights) is left out.
        elementwise: number of columns updated element by element. Later columns (a
            counter) may have any layout.

        A new set of rows uploads tables, and the host does not wait for the upload. Other CUDA
        streams wait for the upload. Raises RuntimeError where the upload falls into the capture of
        a CUDA graph, and ValueError for a tensor without memory.
        """
        key = tuple(
            None if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride())
            for row in rows
            for t in row
        )
        plan = self._captured.get(key) or self._plans.get(key)
        if plan is not None:
            if key in self._plans:
                self._plans.move_to_end(key)
            if plan.upload is not None and self._use(plan, plan.upload):
                self._captured[key] = plan
            return plan
        for place, row in enumerate(rows):
            check_memory(**{f"row {place}": row})
        groups: dict[tuple[Hashable, ...], list[int]] = {}
        singly = []
        seen = set()
        # Group the rows by types and width of loads.
        for place, row in enumerate(rows):
            present = [t for t in row[:elementwise] if t is not None]
            identity = (
                # Tensors on "meta", which mocofast_bench.inspect_code compiles for, have address 0.
                present[0].data_ptr() or -id(present[0]),
                present[0].dtype,
                present[0].shape,
                present[0].stride(),
            )
            if present[0].numel() == 0 or identity in seen:
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
        plan = self._plans[key] = TablePlan(tables, singly, _uploaded(tables))
        if len(self._plans) > PLANS:
            self._plans.popitem(last=False)
        return plan

    @staticmethod
    def _use(plan: TablePlan, upload: _Upload) -> bool:
        """Makes the current stream wait for the tables. Returns whether a graph is captured.

        A capture cannot wait for events outside the graph. `torch.cuda.graph` waits for the whole
        device before the capture starts.
        """
        if torch.cuda.is_current_stream_capturing():
            return True
        device = plan.tables[0].addresses.device
        stream = torch.cuda.current_stream(device)
        if stream.cuda_stream != upload.stream:
            stream.wait_event(upload.done)
            for table in plan.tables:
                for values in (table.addresses, table.sizes, table.owners, table.starts):
                    values.record_stream(stream)  # the memory is in use until the stream is done
        return False

    def _table(self, rows: Sequence[TensorRow], places: list[int], wide: bool) -> AddressTable:
        chosen = [rows[place] for place in places]
        tensors = [next(t for t in row if t is not None) for row in chosen]
        device = tensors[0].device
        addresses = [[0 if t is None else t.data_ptr() for t in column] for column in zip(*chosen)]
        sizes = torch.tensor([t.numel() for t in tensors], device="cpu")
        blocks = -(-sizes // self._block)
        starts = torch.cat([sizes.new_zeros(1), blocks.cumsum(0)])
        owners = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), blocks)
        within = torch.arange(len(owners), device="cpu") - starts[owners]
        return AddressTable(
            places,
            tuple(None if t is None else t.dtype for t in chosen[0]),
            _upload(torch.tensor(addresses, device="cpu"), device),
            _upload(sizes, device),
            _upload(torch.stack([owners, within], dim=1).int(), device),
            _upload(starts.int(), device),
            wide,
        )


def _uploaded(tables: list[AddressTable]) -> _Upload | None:
    """Records the uploads so far on the current stream of the tables' GPU."""
    if not tables or tables[0].addresses.device.type != "cuda":
        return None
    device = tables[0].addresses.device
    stream = torch.cuda.current_stream(device)
    done = torch.cuda.Event()
    done.record(stream)
    return _Upload(stream.cuda_stream, done)


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """Copies a table to the device without waiting. Raises RuntimeError under graph capture."""
    if device.type != "cuda":
        return values.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph capture met tensors that no table holds yet: before the capture, run a "
            "step with the same tensors, and keep gradients in place (zero_grad(set_to_none=False))"
        )
    return values.pin_memory().to(device, non_blocking=True)
