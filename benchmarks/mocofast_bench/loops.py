"""Times loops over a loader's batches, for `mocofast bench train`, `data` and `data --tune`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import torch

from mocofast_bench import timing

# Batches that are not timed: two workers, or DALI's queues, prepare this many in advance.
WARM_UP_BATCHES = 6


class TimedLoop(NamedTuple):
    """A loop to be timed."""

    start: Callable[[], Any]  # returns a new loader with `epoch(number)` and `close()`
    step: Callable[[Any], Any]  # one step on a batch


class LoopRates(NamedTuple):
    """Result of a round of a loop."""

    images_per_second: float
    time_to_first_step: float  # seconds from the start of the loader to the end of the first step
    data_wait: float  # share of the time in which the host waited for a batch
    cores: float  # CPU time of this process and its workers / elapsed time, start included


def measure_in_turns(
    loops: Mapping[str, TimedLoop],
    repeats: int,
    steps: int,
    batch_size: int,
    device: torch.device,
    seconds: float = 0.0,
) -> dict[str, list[LoopRates]]:
    """Measures every loop once a round, for `repeats` rounds.

    loops: {name: loop}.
    batch_size: images in a batch.
    steps, seconds: as for `measure_loop`.

    Returns {name: results of all rounds}. An exception leaves the rates so far in timing.SO_FAR.
    """
    rounds: dict[str, list[LoopRates]] = {name: [] for name in loops}
    try:
        for _ in range(repeats):
            for name, loop in loops.items():
                rounds[name].append(measure_loop(loop, steps, batch_size, device, seconds))
    except BaseException:
        found = medians({name: results for name, results in rounds.items() if results})
        timing.SO_FAR["images_per_second"] = {
            name: round(median.images_per_second, 1) for name, median in found.items()
        }
        raise
    return rounds


def medians(rounds: Mapping[str, list[LoopRates]]) -> dict[str, LoopRates]:
    """Returns the median of every field over the rounds, {name: medians}."""
    return {
        name: LoopRates(*map(statistics.median, zip(*values))) for name, values in rounds.items()
    }


def measure_loop(
    loop: TimedLoop, steps: int, batch_size: int, device: torch.device, seconds: float = 0.0
) -> LoopRates:
    """Starts the loop's loader, runs WARM_UP_BATCHES steps, then times steps.

    steps, seconds: the least number and the least time of timed steps. Batches in the making when
        the clock starts would make a short round too fast.
    """
    first = waited = elapsed = 0.0
    counted = 0
    cpu, began = _cpu_seconds(), time.perf_counter()
    with closing(loop.start()) as loader, closing(_endless(loader)) as batches:

        def step() -> float:
            """Makes a step and returns the seconds of the wait for its batch."""
            asked = time.perf_counter()
            batch = next(batches)
            wait = time.perf_counter() - asked
            loop.step(batch)
            return wait

        for i in range(WARM_UP_BATCHES):
            step()
            if i == 0:
                timing.synchronize(device)
                first = time.perf_counter() - began
        timing.synchronize(device)
        counted_from = time.perf_counter()
        while counted < steps or elapsed < seconds:
            waited += step()
            counted += 1
            elapsed = time.perf_counter() - counted_from
        timing.synchronize(device)
        elapsed = time.perf_counter() - counted_from
    whole = time.perf_counter() - began
    return LoopRates(
        counted * batch_size / elapsed, first, waited / elapsed, (_cpu_seconds() - cpu) / whole
    )


def _endless(loader: Any) -> Generator[Any, None, None]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def _cpu_seconds() -> float:
    """Returns user and system time of this process and of ended child processes, in seconds."""
    return sum(os.times()[:4])
