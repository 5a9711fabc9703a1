"""Loops over a loader's batches, timed in turns: what `mocofast bench train`, `data` and `data --tune` share."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import torch

from mocofast_bench import timing

WARM_UP_BATCHES = (
    6  # steps: what two workers, or DALI's queues, have made before the first batch is taken
)


class TimedLoop(NamedTuple):
    """A loop: how to start its loader (with `epoch(number)` and `close()`), and one step on a batch of it."""

    start: Callable[[], Any]
    step: Callable[[Any], Any]


class LoopRates(NamedTuple):
    """One round of one side."""

    images_per_second: float
    time_to_first_step: float  # seconds from the start of the loader to the end of a first step
    data_wait: float  # share of the time in which the host waited for a batch
    cores: (
        float  # CPU time of this process and its workers over the time that passed, start included
    )


def measure_in_turns(
    sides: Mapping[str, TimedLoop], repeats: int, steps: int, batch_size: int, device: torch.device
) -> dict[str, list[LoopRates]]:
    """By name, the rounds of every side: `repeats` times one of each."""
    rounds: dict[str, list[LoopRates]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            rounds[name].append(measure_loop(side, steps, batch_size, device))
    return rounds


def medians(rounds: Mapping[str, list[LoopRates]]) -> dict[str, LoopRates]:
    """Of each field over a side's rounds."""
    return {
        name: LoopRates(*map(statistics.median, zip(*values))) for name, values in rounds.items()
    }


def measure_loop(side: TimedLoop, steps: int, batch_size: int, device: torch.device) -> LoopRates:
    """Start, warm up, and time `steps` steps."""
    first = waited = counted_from = 0.0
    cpu, began = _cpu_seconds(), time.perf_counter()
    with closing(side.start()) as loader, closing(_endless(loader)) as batches:
        for i in range(WARM_UP_BATCHES + steps):
            if i == WARM_UP_BATCHES:
                timing.synchronize(device)
                waited, counted_from = 0.0, time.perf_counter()
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            side.step(batch)
            if i == 0:
                timing.synchronize(device)
                first = time.perf_counter() - began
        timing.synchronize(device)
        seconds = time.perf_counter() - counted_from
    whole = time.perf_counter() - began
    return LoopRates(
        steps * batch_size / seconds, first, waited / seconds, (_cpu_seconds() - cpu) / whole
    )


def _endless(loader: Any) -> Generator[Any, None, None]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def _cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    return sum(os.times()[:4])
