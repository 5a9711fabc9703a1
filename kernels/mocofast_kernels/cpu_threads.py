"""Spreads the blocks of an op over threads that never wait for each other inside an operation.

PyTorch divides every operation over its threads, and all threads meet at the end of the operation.
Beside a busy process one thread waits for a core, and the other threads burn time in the meantime.
Here a thread takes whole blocks and computes a block alone. The threads meet once, at the end.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, ParamSpec, TypeVar

import torch

from mocofast_kernels.cpu_library import function_of_openmp

P = ParamSpec("P")
Item = TypeVar("Item")
Part = TypeVar("Part")
Result = TypeVar("Result")

AHEAD = 4  # blocks per thread whose results may wait for a slower thread
# Products that a thread computes in the time that a start of PyTorch's threads is worth: 3 ms
LONG = 2**27

_starting = threading.Lock()  # held while a thread sets its number of threads
# While a function of `one_fork` runs. count: threads for the blocks. left: an event, set when the
# caller was interrupted. cores: numbers of the cores that the threads keep to, or None.
_here = threading.local()


def one_fork(
    unless: Callable[..., bool], products: Callable[..., int] = lambda *_, **__: 0
) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Makes a function run on a thread of the pool, where every operation stays on one thread.

    `in_order` inside the function uses as many threads as PyTorch has in the calling thread.

    unless: takes the arguments of a call. True: the work is less than a change of threads costs.
    products: takes the arguments of a call, and returns how many products it computes. Long work
        ends PyTorch's threads, which otherwise wait without sleep on the cores of the pool.

    A call runs in the calling thread where `unless` says so, where PyTorch has one thread, on other
    devices, in a thread of the pool, and where operations are watched (a dispatch mode of PyTorch
    is active). The first argument of the function is a tensor.

    Ctrl-C in the calling thread ends `in_order` after the blocks that are being computed. No thread
    computes on behind the caller's back.
    """

    def forking(function: Callable[P, Result]) -> Callable[P, Result]:
        @functools.wraps(function)
        def forked(*args: P.args, **kwargs: P.kwargs) -> Result:
            threads = torch.get_num_threads()
            if (
                threads == 1
                or unless(*args, **kwargs)
                or args[0].device.type != "cpu"  # type: ignore[attr-defined]
                or torch._C._len_torch_dispatch_stack()
                or hasattr(_here, "count")
            ):
                return function(*args, **kwargs)

            left = threading.Event()
            cores = None

            def run() -> Result:
                _here.count, _here.left, _here.cores = threads, left, cores
                try:
                    with torch.no_grad():
                        return function(*args, **kwargs)
                finally:
                    del _here.count, _here.left, _here.cores

            late = False
            if products(*args, **kwargs) > LONG * threads:
                cores = _all_cores(threads)
                running = _running()
                if running > 1 and _others_run():
                    # Beside other processes a thread waits for a core before it ends: end it late.
                    late = running > (os.cpu_count() or 1)
                    if not late:
                        _end_openmp()
            future = _threads().submit(run)
            try:
                if late:
                    _end_openmp()
                return future.result()
            except BaseException:
                left.set()
                if not future.cancel():
                    wait([future])
                raise

        return forked

    return forking


def count() -> int:
    """Returns the number of threads that `in_order` uses here."""
    return getattr(_here, "count", 1)


def in_order(
    compute: Callable[[Item], Part], items: Sequence[Item], merge: Callable[[Item, Part], None]
) -> None:
    """Calls merge(item, compute(item)) for all items, merge in the order of the items.

    compute: runs on several threads at a time, inside `one_fork`. Otherwise in the calling thread.
    merge: runs on one thread at a time. The order makes sums bit-equal for any number of threads.
    """
    threads = min(count(), len(items))
    if threads == 1:
        for item in items:
            merge(item, compute(item))
        return
    run = _Run(compute, items, merge, AHEAD * threads, _here.left, _here.cores)
    pool = _threads()
    helpers = [pool.submit(run.help) for _ in range(threads - 1)]
    run.help()
    for helper in helpers:  # helpers that never got a thread
        helper.cancel()
    run.wait()


class _Run:
    """The state of a call of `in_order`, shared by its threads."""

    def __init__(
        self,
        compute: Callable[[Any], Any],
        items: Sequence[Any],
        merge: Callable[[Any, Any], None],
        ahead: int,
        left: threading.Event,
        cores: tuple[int, ...] | None,
    ) -> None:
        self.compute, self.items, self.merge, self.ahead = compute, items, merge, ahead
        self.left = left
        self.cores = iter(cores or ())
        self.changed = threading.Condition()  # guards all fields below
        self.taken = self.merged = self.active = 0
        self.merging = False
        self.parts: dict[int, Any] = {}  # computed, not merged
        self.error: BaseException | None = None

    def help(self) -> None:
        """Computes and merges until no item is left."""
        with _on_core(next(self.cores, None)), torch.no_grad():
            while (number := self._take()) is not None:
                try:
                    self._merge(number, self.compute(self.items[number]))
                except BaseException as error:
                    with self.changed:
                        self.error = self.error or error
                finally:
                    with self.changed:
                        self.active -= 1
                        self.changed.notify_all()

    def wait(self) -> None:
        """Waits for the other threads. Raises the error of a thread."""
        with self.changed:
            self.changed.wait_for(lambda: not self.active)
        if self.error is not None:
            raise self.error

    def _take(self) -> int | None:
        with self.changed:
            # The first item that is not merged is being computed by a thread, which goes on.
            self.changed.wait_for(
                lambda: self.error is not None or self.taken - self.merged < self.ahead
            )
            if self.left.is_set():
                self.error = self.error or KeyboardInterrupt()
            if self.error is not None or self.taken == len(self.items):
                return None
            self.taken += 1
            self.active += 1
            return self.taken - 1

    def _merge(self, number: int, part: Any) -> None:
        """Merges the part and all parts behind it, unless a thread is merging already."""
        with self.changed:
            self.parts[number] = part
            if self.merging:
                return
            self.merging = True
        while True:
            with self.changed:
                if self.merged not in self.parts:
                    self.merging = False
                    return
                part = self.parts.pop(self.merged)
            self.merge(self.items[self.merged], part)
            with self.changed:
                self.merged += 1


@functools.cache
def _pause_of_openmp() -> Any:
    """Returns OpenMP's function that ends threads, or None.

    None where the environment says how threads wait, and without OpenMP 5.0.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return None
    return function_of_openmp("omp_pause_resource_all")


def _others_run() -> bool:
    """Returns whether another thread of this process runs or waits for a core, as threads that spin
    do. False where the system does not tell.
    """
    own = str(threading.get_native_id())
    try:
        for name in reversed(os.listdir("/proc/self/task")):  # the youngest first
            if name != own:
                with open(
                    f"/proc/self/task/{name}/stat", encoding="utf-8", errors="replace"
                ) as file:
                    if file.read().rpartition(")")[2].split()[0] == "R":
                        return True
    except OSError:  # another system, or a thread ended
        pass
    return False


def _running() -> float:
    """Returns how many threads of the system have work. Infinity where the system does not tell."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            return int(file.read().split()[3].partition("/")[0])
    except OSError:
        return math.inf


def _all_cores(threads: int) -> tuple[int, ...] | None:
    """Returns a core for every thread. None where the threads are not as many as the cores: the
    system finds better places then.
    """
    if not hasattr(os, "sched_getaffinity"):  # Linux has it
        return None
    cores = tuple(os.sched_getaffinity(0))
    return cores if len(cores) == threads else None


@contextlib.contextmanager
def _on_core(core: int | None) -> Iterator[None]:
    """Keeps the thread to a core. None: to no core.

    Two threads that wake each other (Python's lock) share a core for milliseconds at times, while
    another core sleeps or runs one other process: every other call took 1.2 to 1.8 times as long.
    """
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):  # the process lost the core since
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the process lost all these cores, and has others
            os.sched_setaffinity(0, before)


def _end_openmp() -> None:
    """Ends the OpenMP threads of the calling thread.

    After an operation PyTorch's threads spin for milliseconds, half of the time of a core. The next
    operation starts others, in 40 us a thread. To end threads that sleep costs more than it gains.
    """
    pause = _pause_of_openmp()
    if pause is not None:
        pause(1)  # omp_pause_soft


def _before_fork() -> None:
    """A forked process has none of the threads, and none that could release the lock.

    OpenMP would wait for its threads there, in operations of PyTorch and in `_end_openmp`.
    """
    _starting.acquire()
    _end_openmp()


def _in_child() -> None:
    _threads.cache_clear()
    _starting.release()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Returns the pool of single-threaded threads, made at the first call."""
    return ThreadPoolExecutor(os.cpu_count() or 1, "mocofast-ops", compute_alone)


def compute_alone() -> None:
    """Sets the thread's own number of threads to 1, and no other thread's. (A thread that starts
    outside this function in the same instant takes 1, too.)

    Without it an operator of PyTorch starts a team of OpenMP for the thread alone. GNU OpenMP
    counts the threads of all teams: where they are more than the cores, every thread that waits
    sleeps at once if OMP_WAIT_POLICY is passive. A step of ResNet-18 then took 80 ms, not 62.
    """
    with _starting:  # a second thread would take 1 for the default
        default = torch.get_num_threads()  # a thread's first call sets the number to the default
        torch.set_num_threads(1)  # also sets the default of new threads
        restoring = threading.Thread(target=torch.set_num_threads, args=(default,))
        restoring.start()
        restoring.join()


if hasattr(os, "register_at_fork"):  # absent on Windows
    os.register_at_fork(
        before=_before_fork, after_in_parent=_starting.release, after_in_child=_in_child
    )
