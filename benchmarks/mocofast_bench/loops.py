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

WARM_UP = 6  # steps: what two workers, or DALI's queues, have made before the first batch is taken


class Side(NamedTuple):
    """A loop: how to start its loader (with `epoch(number)` and `close()`), and one step on a batch of it."""

    start: Callable[[], Any]
    step: Callable[[Any], Any]


class Measured(NamedTuple):
    """One round of one side."""

    images_per_second: float
    time_to_first_step: float  # seconds from the start of the loader to the end of a first step
    data_wait: float  # share of the time in which the host waited for a batch
    cores: (
        float  # CPU time of this process and its workers over the time that passed, start included
    )


def in_turns(
    sides: Mapping[str, Side], repeats: int, steps: int, batch_size: int, device: torch.device
) -> dict[str, list[Measured]]:
    """By name, the rounds of every side: `repeats` times one of each."""
    rounds: dict[str, list[Measured]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            rounds[name].append(measure(side, steps, batch_size, device))
    return rounds


def medians(rounds: Mapping[str, list[Measured]]) -> dict[str, Measured]:
    """Of each field over a side's rounds."""
    return {
        name: Measured(*map(statistics.median, zip(*values))) for name, values in rounds.items()
    }


def measure(side: Side, steps: int, batch_size: int, device: torch.device) -> Measured:
    """Start, warm up, and time `steps` steps."""
    first = waited = counted_from = 0.0
    cpu, began = _cpu_seconds(), time.perf_counter()
    with closing(side.start()) as loader, closing(_endless(loader)) as batches:
        for i in range(WARM_UP + steps):
            if i == WARM_UP:
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
    return Measured(
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
