"""Computes the values of Gluon kernels on the CPU. Triton's interpreter cannot.

`run(modules)` replaces what the kernels of modules use: a thread of Python runs each partition of
warps, barriers have arrivals, bytes and phases, and copies arrive some time after they are issued.
Shared and tensor memory start as NaN. An asynchronous product reads its operands when it is waited
for (Hopper), or some time after the products issued before it (Blackwell). So a
place of the ring that is read too soon, or freed too soon, gives wrong values, and a wait that
nobody ends is an error after 20 seconds. Layouts, registers and rates have no meaning here.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.language import constexpr
from triton.runtime.jit import JITFunction

PATIENCE = 20  # seconds that a wait may take
LAUNCH_OPTIONS = ("num_warps", "enable_fp_fusion")


class Pointer:
    """Places in memory. Loads and stores outside the memory are errors unless masked."""

    def __init__(self, memory: Tensor, places: Any = 0) -> None:
        self.memory, self.places = memory, places

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.places + offset)

    def _masked(self, mask: Any) -> tuple[Tensor, Tensor]:
        places, mask = torch.broadcast_tensors(
            torch.as_tensor(self.places), torch.as_tensor(True if mask is None else mask)
        )
        inside = places[mask]
        assert not inside.numel() or (inside.min() >= 0 and inside.max() < len(self.memory))
        return places, mask

    def load(self, mask: Any = None, other: float = 0.0) -> Tensor:
        places, mask = self._masked(mask)
        return torch.where(mask, self.memory[torch.where(mask, places, 0)], other).to(
            self.memory.dtype
        )

    def store(self, values: Any, mask: Any = None) -> None:
        places, mask = self._masked(mask)
        values = torch.as_tensor(values).to(self.memory.dtype).expand(places.shape)
        self.memory[places[mask]] = values[mask]


class Shared:
    """A block of shared memory, or of tensor memory."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def index(self, place: Any) -> Shared:
        return Shared(self.values[int(place)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.values.permute(order))

    def store(self, values: Tensor) -> None:
        self.values.copy_(values)

    def load(self, layout: Any) -> Tensor:
        return self.values.clone()


class Barrier:
    """A phase ends when `count` arrivals have come, and all bytes that were announced."""

    def __init__(self, changed: threading.Condition) -> None:
        self.changed, self.count, self.missing, self.bytes, self.phase = changed, 0, 0, 0, 0

    def change(self, arrivals: int, size: int) -> None:
        """Takes arrivals, and announced (positive) or copied (negative) bytes."""
        with self.changed:
            self.missing -= arrivals
            self.bytes += size
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == 0 and self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.changed.notify_all()

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def wait(self, parity: Any) -> None:
        with self.changed:
            ended = self.changed.wait_for(lambda: self.phase & 1 != int(parity), PATIENCE)
            assert ended, "a wait that nobody ends"


def _nothing(*_: Any, **__: Any) -> None:
    """Stands for layouts."""


class Program:
    """The functions of Gluon, for one program."""

    def __init__(self, place: tuple[int, int]) -> None:
        self.changed = threading.Condition()
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.product: threading.Thread | None = None  # issued last
        self.mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: Barrier,
            init=lambda barrier, count: barrier.init(count),
            wait=lambda barrier, parity: barrier.wait(parity),
            expect=lambda barrier, size: barrier.change(1, size),
            arrive=lambda barrier, count: barrier.change(count, 0),
        )
        self.gl = SimpleNamespace(
            **{name: getattr(torch, name) for name in ("float32", "bfloat16", "int32", "int64")},
            **dict.fromkeys(("SliceLayout", "BlockedLayout", "DotOperandLayout"), _nothing),
            NVMMADistributedLayout=_nothing,
            program_id=lambda axis: torch.tensor(place[axis]),
            arange=lambda first, end, layout: torch.arange(first, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            sum=lambda x, axis: x.sum(axis),
            minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            convert_layout=lambda x, layout: x,
            static_range=range,
            where=torch.where,
            exp2=torch.exp2,
            load=lambda pointer, mask=None, other=0.0: pointer.load(mask, other),
            store=lambda pointer, values, mask=None: pointer.store(values, mask),
            allocate_shared_memory=self.allocate,
            warp_specialize=self.specialize,
        )

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        if layout is Barrier:
            barriers = [Barrier(self.changed) for _ in range(shape[0])]
            return SimpleNamespace(index=lambda place: barriers[int(place)])
        return Shared(torch.full(shape, torch.nan, dtype=dtype))

    def start(self, task: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                task()
            except BaseException as error:  # reported by `finish`
                self.errors.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        self.threads.append(thread)  # now `finish` can join the thread
        return thread

    def specialize(self, parts: list[Any], warps: list[int], registers: list[Any]) -> None:
        assert len(parts) == len(warps) + 1 == len(registers) + 1
        for function, arguments in parts:
            self.start(lambda function=function, arguments=arguments: function(*arguments))

    def multiply(
        self, a: Shared, b: Shared, sums: Shared, use_acc: Any, mbarriers: list[Barrier]
    ) -> None:
        """Issues a product. Products of a program end in order."""
        before = self.product

        def compute() -> None:
            if before is not None:
                before.join()
            time.sleep(random.random() * 2e-3)
            found = a.values.float() @ b.values.float()
            sums.store(sums.values + found if use_acc else found)
            for barrier in mbarriers:
                barrier.change(1, 0)

        self.product = self.start(compute)

    def finish(self) -> None:
        while any(thread.is_alive() for thread in self.threads):
            for thread in list(self.threads):
                thread.join()
        for error in self.errors:
            raise error

    def copy(self, source: Any, place: list[Any], barrier: Barrier, target: Shared) -> None:
        first, rows = int(place[0]), target.values.shape[0]
        assert place[1] == 0 and first < len(source.base)

        def arrive() -> None:
            time.sleep(random.random() * 2e-3)
            block = torch.zeros_like(target.values)
            some = source.base[first : first + rows]
            block[: len(some)] = some
            target.store(block)
            barrier.change(0, -block.numel() * block.element_size())

        self.start(arrive)


def _multiply(
    a: Any, b: Shared, sums: Tensor, use_acc: bool = True, is_async: bool = False
) -> Tensor | Callable[[], Tensor]:
    def value() -> Tensor:
        left = a.values if isinstance(a, Shared) else a
        product_ = left.float() @ b.values.float()
        return sums + product_ if use_acc else product_

    return value if is_async else value()


def _wait(outstanding: int, deps: tuple[Callable[[], Tensor], ...]) -> Any:
    assert outstanding == 0
    values = tuple(value() for value in deps)
    return values if len(values) > 1 else values[0]


def _argument(value: Any) -> Any:
    """Returns a launch's argument as a program sees it."""
    if isinstance(value, Tensor):
        extent = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride()))
        return Pointer(value.as_strided((extent,), (1,)))
    if hasattr(value, "block_shape"):
        rows, columns = value.block_shape
        size = rows * columns * value.base.element_size()
        return SimpleNamespace(
            base=value.base, layout=value.layout, block_type=SimpleNamespace(nbytes=size)
        )
    return value


@contextmanager
def run(
    modules: list[ModuleType], kernel: str, **others: Callable[..., Any]
) -> Iterator[list[Any]]:
    """Makes launches of the first module's kernel compute on the CPU. Yields their grids.

    modules: of the kernel and of jitted functions that it calls.
    others: functions that stand for jitted functions from further modules, by their names.
    """
    grids: list[Any] = []
    plain = [
        {
            name: value.fn if isinstance(value, JITFunction) else value.value
            for name, value in vars(module).items()
            if isinstance(value, JITFunction | constexpr)
        }
        for module in modules
    ]

    class Launcher:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, **options: Any) -> None:
                grids.append(grid)
                for name in LAUNCH_OPTIONS:
                    options.pop(name)
                for x, y in product(*map(range, grid)):
                    program = Program((x, y))
                    parts = {
                        "gl": program.gl,
                        "mbarrier": program.mbarrier,
                        "_load_tile": program.copy,
                        "warpgroup_mma": _multiply,
                        "warpgroup_mma_wait": _wait,
                        "fence_async_shared": lambda: None,
                        "allocate_tensor_memory": program.allocate,
                        "tcgen05_mma": program.multiply,
                        **dict.fromkeys(("TensorMemoryLayout", "_in_registers"), _nothing),
                    }
                    with ExitStack() as stack:
                        for module, own in zip(modules, plain):
                            values = {**own, **others, **parts}
                            known = {n: v for n, v in values.items() if hasattr(module, n)}
                            stack.enter_context(mock.patch.multiple(module, **known))
                        plain[0][kernel](*map(_argument, arguments), **options)
                        program.finish()

            return launch

    with mock.patch.object(modules[0], kernel, Launcher()):
        yield grids
