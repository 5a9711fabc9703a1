"""Blocks of an op on threads of their own: values, order, errors, forks and numbers of threads."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mocofast_kernels import cpu, cpu_memory, cpu_products, cpu_threads
from torch import Tensor

from mocofast import ops

WORKERS = os.cpu_count() or 1  # threads of the pool


def never(*_: object) -> bool:
    return False


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(
    threads: int,
    temperature: float,
    dot_dtype: torch.dtype = torch.float32,
    exclude_period: int = 40,
) -> list[Tensor]:
    """Returns all fields of a forward pass, and the negatives' gradient."""
    torch.set_num_threads(threads)
    query, positive, negatives = features(0, 40, 24), features(1, 40, 24), features(2, 5000, 24)
    sides = {
        "normalize": True,
        "normalize_negatives": True,
        "exclude_period": exclude_period,
    }
    result = cpu.infonce_forward(
        query,
        positive,
        negatives,
        temperature,
        **sides,
        return_rank=True,
        compute_grad=True,
        only_query=False,
        dot_dtype=dot_dtype,
    )
    grad = cpu.infonce_grad_negatives(
        torch.ones(40), query, negatives, result.lse, temperature, **sides, dot_dtype=dot_dtype
    )
    return [*result, grad]


@pytest.mark.parametrize("dot_dtype", [torch.float32, torch.bfloat16])
# With a maximum, without, and by the compiled sweep where there is one
@pytest.mark.parametrize(("temperature", "exclude_period"), [(0.005, 40), (0.2, 40), (0.2, 0)])
def test_results_are_bit_equal_for_any_number_of_threads(
    temperature: float,
    exclude_period: int,
    dot_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_products, "cpu_bf16", lambda: "AVX512-BF16")
    monkeypatch.setattr(cpu, "ROWS", 16)
    monkeypatch.setattr(cpu, "LOGITS", 2**13)
    one = gradients(1, temperature, dot_dtype, exclude_period)
    for threads in (2, 3):
        for got, want in zip(gradients(threads, temperature, dot_dtype, exclude_period), one):
            assert torch.equal(got, want)


@pytest.mark.parametrize("momentum", [0.99, 0.25])
def test_averages_are_those_of_lerp_to_the_bit_for_any_number_of_threads(
    momentum: float,
) -> None:
    shapes = [(5000,), (7,), (cpu_memory.GRAIN + 9,), (33, 17), (12, 8, 3, 3)]
    sources = [features(i, *shape) for i, shape in enumerate(shapes)]
    before = [features(10 + i, *shape) for i, shape in enumerate(shapes)]
    before[-1] = before[-1].contiguous(memory_format=torch.channels_last)
    want = [target.lerp(source, 1 - momentum) for target, source in zip(before, sources)]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        targets = [target.clone() for target in before]
        cpu_memory.ema_update_(targets, sources, momentum)
        assert all(torch.equal(got, expected) for got, expected in zip(targets, want))
        targets = [target.clone() for target in before[:-1]]  # all contiguous
        ops.ema_update_(targets, sources[:-1], momentum)
        assert all(torch.equal(got, expected) for got, expected in zip(targets, want))
    tied = before[0].clone()
    cpu_memory.ema_update_([tied, tied], [sources[0], sources[0]], momentum)
    assert torch.equal(tied, want[0])


def test_neither_the_caller_nor_a_new_thread_changes_its_number_of_threads() -> None:
    cpu_threads._threads.cache_clear()  # the next call makes new threads
    gradients(2, 0.2)
    pool = cpu_threads._threads()
    begun = threading.Barrier(pool._max_workers + 1)
    for _ in range(pool._max_workers):
        pool.submit(begun.wait)
    begun.wait()  # while a thread of the pool starts, the default is 1 for an instant
    seen: list[int] = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert (torch.get_num_threads(), seen) == (2, [2])


@cpu_threads.one_fork(unless=never)
def numbers_of_threads(x: Tensor) -> list[tuple[str, int]]:
    """Returns name and number of threads of the thread that computes an item, for 4 items."""
    merged: list[tuple[str, int]] = []

    def compute(item: int) -> tuple[str, int]:
        return threading.current_thread().name, torch.get_num_threads()

    cpu_threads.in_order(compute, range(4), lambda _, part: merged.append(part))
    return merged


def test_every_thread_of_the_pool_computes_alone() -> None:
    names, numbers = zip(*numbers_of_threads(torch.zeros(1)))
    assert set(numbers) == {1}
    assert threading.current_thread().name not in names
    torch.set_num_threads(1)
    names, _ = zip(*numbers_of_threads(torch.zeros(1)))
    assert set(names) == {threading.current_thread().name}


@cpu_threads.one_fork(unless=never)
def delayed(delays: Tensor, computed: list[int]) -> list[int]:
    """Returns the order in which the items were merged. Item i takes delays[i] seconds."""
    order: list[int] = []

    def compute(item: int) -> int:
        time.sleep(float(delays[item]))
        computed.append(item)
        return -item

    def merge(item: int, part: int) -> None:
        assert part == -item
        order.append(item)

    cpu_threads.in_order(compute, range(len(delays)), merge)
    return order


@pytest.mark.skipif(WORKERS < 2, reason="needs two threads")
def test_a_slow_item_is_merged_first_and_few_results_wait_for_it() -> None:
    delays = torch.zeros(30)
    delays[0] = 0.3
    computed: list[int] = []
    assert delayed(delays, computed) == list(range(30))
    assert computed.index(0) == 2 * cpu_threads.AHEAD - 1


@cpu_threads.one_fork(unless=never)
def failing(x: Tensor, where: str) -> None:
    def compute(item: int) -> int:
        if where == "compute" and item == 3:
            raise ZeroDivisionError("item 3")
        return item

    def merge(item: int, part: int) -> None:
        if where == "merge" and item == 3:
            raise ZeroDivisionError("item 3")

    cpu_threads.in_order(compute, range(50), merge)


@pytest.mark.parametrize("where", ["compute", "merge"])
def test_an_error_of_a_thread_reaches_the_caller_and_the_next_call_works(where: str) -> None:
    with pytest.raises(ZeroDivisionError, match="item 3"):
        failing(torch.zeros(1), where)
    assert len(numbers_of_threads(torch.zeros(1))) == 4


@cpu_threads.one_fork(unless=never)
def interrupted(x: Tensor, caller: int, computed: list[int]) -> None:
    """Computes 300 items, for more than a second. Item 5 presses Ctrl-C."""

    def compute(item: int) -> None:
        if item == 5:
            signal.pthread_kill(caller, signal.SIGINT)
        time.sleep(0.01)
        computed.append(item)

    cpu_threads.in_order(compute, range(300), lambda item, part: None)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals for threads")
def test_no_thread_computes_on_after_ctrl_c() -> None:
    computed: list[int] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted(torch.zeros(1), threading.get_ident(), computed)
    finally:
        signal.signal(signal.SIGINT, before)
    count = len(computed)
    time.sleep(0.1)
    assert 4 < count == len(computed) < 300
    assert len(numbers_of_threads(torch.zeros(1))) == 4


def test_several_callers_at_a_time_get_their_own_results() -> None:
    want = gradients(2, 0.2)
    with ThreadPoolExecutor(4) as callers:
        for result in callers.map(lambda _: gradients(2, 0.2), range(8)):
            for got, expected in zip(result, want):
                assert torch.equal(got, expected)


def _spun(products: int) -> int:
    """Returns how many threads end during a call of one_fork with so many products."""

    @cpu_threads.one_fork(unless=never, products=lambda x: products)
    def call(x: Tensor) -> None:
        time.sleep(0.3)

    torch.ones(1000, 1000).mul_(2)
    before = len(os.listdir("/proc/self/task"))
    call(torch.zeros(1))
    return before - len(os.listdir("/proc/self/task"))


SPIN = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from tests.test_ops_threads import _spun
from mocofast_kernels import cpu_threads
torch.set_num_threads(2)
_spun(0)  # the pool's thread starts
print(_spun(0), _spun(2 * cpu_threads.LONG), _spun(2 * cpu_threads.LONG + 1), _spun(0))
x = torch.ones(1000, 1000)
print(torch.get_num_threads(), float(x.mul_(2).sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("policy", ["", "passive"])
def test_long_work_ends_threads_that_spin(policy: str) -> None:
    """The other tests of this file run where the environment may say how threads wait."""
    variables = {
        k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    variables["PYTHONPATH"] = os.pathsep.join(sys.path)
    if policy:
        variables["OMP_WAIT_POLICY"] = policy
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", SPIN, root]
    out = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    ended = "0" if policy else "1"
    assert out.split() == ["0", "0", ended, "0", "2", "2000000.0"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs cores by number")
@pytest.mark.parametrize(("products", "apart"), [(cpu_threads.LONG + 1, True), (1, False)])
def test_every_thread_keeps_to_a_core_during_long_work(products: int, apart: bool) -> None:
    every = os.sched_getaffinity(0)
    if len(every) == 1:
        pytest.skip("needs two cores")
    torch.set_num_threads(len(every))
    meeting = threading.Barrier(len(every), timeout=60)
    cores: dict[int, set[int]] = {}  # of a thread, while it computes

    def compute(_: int) -> None:
        cores[threading.get_native_id()] = os.sched_getaffinity(0)
        meeting.wait()

    @cpu_threads.one_fork(unless=never, products=lambda x: len(every) * products)
    def call(x: Tensor) -> None:
        cpu_threads.in_order(compute, range(len(every)), lambda _, part: None)

    call(torch.zeros(1))
    if apart:
        assert sorted(map(sorted, cores.values())) == [[core] for core in sorted(every)]
    else:
        assert list(cores.values()) == [every] * len(every)
    assert [os.sched_getaffinity(thread) for thread in cores] == [every] * len(every)


def _child(connection: multiprocessing.connection.Connection) -> None:
    count = len(numbers_of_threads(torch.zeros(1)))
    loss = float(ops.info_nce(torch.ones(8, 8), torch.ones(8, 8), torch.eye(8)))
    cpu_threads._end_openmp()
    connection.send((count, loss, float(torch.ones(1000, 1000).sum())))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_makes_threads_of_its_own() -> None:
    numbers_of_threads(torch.zeros(1))
    torch.ones(1000, 1000).mul_(2)  # threads of OpenMP
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(there,))
    child.start()
    try:
        assert here.poll(60), "the forked process waits for threads that it does not have"
        count, loss, total = here.recv()
        assert (count, total) == (4, 1e6)
        assert loss == float(ops.info_nce(torch.ones(8, 8), torch.ones(8, 8), torch.eye(8)))
    finally:
        child.kill()
        child.join()
