"""What the guards cost, in CPU time: `python -m tests.drills.cost [--pairs 20]`.

Both sides take turns in one process: epochs of the DALI loader, and blocks of steps of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mocofast import settings
from mocofast.config import AugmentConfig, DataConfig
from mocofast.data import dali_loader, decoding, planning
from mocofast.data.decoding import Header
from mocofast.data.interface import BatchSlice
from mocofast.data.loaders import build_loader
from mocofast.data.probing import FORMATS
from mocofast.data.sources import FolderSource
from mocofast.train.heartbeat import Heartbeat
from mocofast.train.loop import Run
from mocofast.train.run import train
from tests.pictures import photo

IMAGES = 96  # of an epoch
BLOCK = 50  # steps
VIEWS = (AugmentConfig(size=224),) * 2


class _Unguarded:
    """Threads that read files, without a deadline."""

    def __init__(self, count: int, *_: Any) -> None:
        self._pool = ThreadPoolExecutor(count)
        self.submit = self._pool.submit

    def result(self, future: Future[Any]) -> Any:
        return future.result()

    def close(self) -> None:
        self._pool.shutdown()


def _accepts_all(_: Any, header: Header) -> bool:
    return header.plain and header.format in FORMATS


@contextlib.contextmanager
def _loader_without_guards() -> Iterator[None]:
    """Leaves out the look into headers, the deadline of reads, and the check at the opening."""
    with (
        mock.patch.object(dali_loader, "Readers", _Unguarded),
        mock.patch.object(planning, "accepts", _accepts_all),
        mock.patch.object(decoding, "opened", lambda file: open(file, "rb")),
    ):
        yield


def epoch_seconds(source: FolderSource, place: Path, guarded: bool) -> float:
    """Returns the CPU time of the first epoch of a new DALI loader, with a journal if guarded."""
    with contextlib.nullcontext() if guarded else _loader_without_guards():
        data = DataConfig(loader="dali", workers=1)
        loader = build_loader(source, data, VIEWS, BatchSlice(16), 0, torch.device("cpu"))
        if guarded:
            loader.keep_journal(place / "decoding" / "rank-0")  # type: ignore[attr-defined]
        begun = time.process_time()
        for _batch in loader.epoch(0):
            pass
        seconds = time.process_time() - begun
        loader.close()
    return seconds


def loader_pairs(place: Path, pairs: int) -> list[tuple[float, float]]:
    """Returns CPU times of epochs, (with guards, without)."""
    for i in range(IMAGES):
        photo(i, (375, 500)).save(place / f"{i:03}.jpg", quality=90)
    source = FolderSource(place, [f"{i:03}.jpg" for i in range(IMAGES)])
    found = []
    for number in range(-1, pairs):  # the first pair warms up
        order = (True, False) if number % 2 else (False, True)
        seconds = {guarded: epoch_seconds(source, place, guarded) for guarded in order}
        found.append((seconds[True], seconds[False]))
    return found[1:]


class _Nothing(list[Any]):
    def append(self, _: Any) -> None:
        pass


def step_pairs(place: Path, pairs: int) -> list[tuple[float, float]]:
    """Returns CPU times of blocks of steps of one run, (with guards, without).

    Without guards no progress is told, and no loss of a single step is kept.
    """
    found: list[float] = []
    step, at, begun = Run._step, Heartbeat.at, [0.0]

    def timed(run: Run) -> None:
        number, first = divmod(run.state.step, BLOCK)
        if not first:
            found.append(time.process_time() - begun[0])
            guarded = number % 4 in (0, 3)
            Heartbeat.at = at if guarded else lambda *_: None  # type: ignore[method-assign]
            begun[0] = time.process_time()
        if number % 4 in (1, 2):
            run.state.window._losses = _Nothing()
        step(run)

    config = settings.load_recipe("digits")
    steps = BLOCK * (2 * pairs + 5)
    values = {"train.dir": str(place), "train.epochs": steps // 11 + 1, "train.max_steps": steps}
    values |= {"checkpoint.every_epochs": 10**6, "knn.every": 0, "knn.start": False}
    settings.apply(config, {**values, "train.device": "cpu", "train.log_every": BLOCK})
    with mock.patch.object(Run, "_step", timed), mock.patch.object(Heartbeat, "at", at):
        train(config)
    blocks = found[5:]  # the time before the first block, and four blocks to warm up
    halves = zip(blocks[::2], blocks[1::2])
    return [each if number % 2 == 0 else each[::-1] for number, each in enumerate(halves)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    upper = []
    for what, measure in {
        "an epoch of the DALI loader": loader_pairs,
        "a step": step_pairs,
    }.items():
        with tempfile.TemporaryDirectory() as name:
            times = measure(Path(name), pairs)
        more = [100 * (guarded / plain - 1) for guarded, plain in times]
        mean, error = statistics.mean(more), statistics.stdev(more) / len(more) ** 0.5
        upper.append(mean + 2 * error)
        unit = IMAGES if measure is loader_pairs else BLOCK
        per = [1000 * statistics.mean(side) / unit for side in zip(*times)]
        print(
            f"{what}: {per[0]:.3f} ms of CPU time with guards, {per[1]:.3f} without; guards cost "
            f"{mean:.2f} % (95 % interval {mean - 2 * error:.2f} to {mean + 2 * error:.2f}, "
            f"{len(times)} pairs)",
            flush=True,
        )
    return int(max(upper) > 2)


if __name__ == "__main__":
    sys.exit(main())
