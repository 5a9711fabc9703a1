"""What the guards cost, in CPU time: `python -m tests.drills.cost [--pairs 20] [--path PHOTOS]`.

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

import numpy as np
import torch
from PIL import Image

from mocofast import settings
from mocofast.config import AugmentConfig, DataConfig
from mocofast.data import dali_loader, decoding, planning
from mocofast.data.decoding import Header
from mocofast.data.interface import BatchSlice
from mocofast.data.loaders import build_loader
from mocofast.data.probing import FORMATS
from mocofast.data.sources import FolderSource, find_images
from mocofast.train.heartbeat import Heartbeat
from mocofast.train.loop import Run
from mocofast.train.run import train
from tests.pictures import photo

IMAGES = 96  # of an epoch
BLOCK = 50  # steps
VIEWS = (AugmentConfig(size=224),) * 2
FIRST = "the first epoch of the DALI loader"  # reads headers, once a run
Times = dict[str, list[tuple[float, float]]]  # ms (with guards, without), by what was measured


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


def epoch_seconds(source: FolderSource, place: Path, guarded: bool) -> list[float]:
    """Returns the CPU times of the first two epochs of a new DALI loader.

    The first reads headers. A guarded loader keeps a journal.
    """
    found = []
    with contextlib.nullcontext() if guarded else _loader_without_guards():
        data = DataConfig(loader="dali", workers=1)
        loader = build_loader(source, data, VIEWS, BatchSlice(16), 0, torch.device("cpu"))
        if guarded:
            loader.keep_journal(place / "decoding" / "rank-0")  # type: ignore[attr-defined]
        for epoch in range(2):
            begun = time.process_time()
            for _batch in loader.epoch(epoch):
                pass
            found.append(time.process_time() - begun)
        loader.close()
    return found


def loader_pairs(photos: str, place: Path, pairs: int) -> Times:
    """Returns CPU times of epochs. photos: a folder. Without a folder photos are made."""
    names = sorted(find_images(photos))[:IMAGES] if photos else []
    for i in range(0 if photos else IMAGES):
        grain = np.random.default_rng(i).integers(-20, 21, (375, 500, 3))
        pixels = np.clip(np.asarray(photo(i, (375, 500))) + grain, 0, 255).astype(np.uint8)
        names.append(f"{i:03}.jpg")
        Image.fromarray(pixels).save(place / names[-1])
    source = FolderSource(photos or place, names)
    times: Times = {FIRST: [], "a later epoch": []}
    for number in range(-1, pairs):  # the first pair warms up
        order = (True, False) if number % 2 else (False, True)
        seconds = {guarded: epoch_seconds(source, place, guarded) for guarded in order}
        for found, sides in zip(times.values(), zip(seconds[True], seconds[False])):
            found.append((1000 * sides[0] / len(names), 1000 * sides[1] / len(names)))
    return {what: found[1:] for what, found in times.items()}


class _Nothing(list[Any]):
    def append(self, _: Any) -> None:
        pass


def step_pairs(place: Path, pairs: int) -> Times:
    """Returns CPU times of steps of a run, from blocks.

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
    # Before come the time of the start, and four blocks to warm up.
    blocks = [1000 * seconds / BLOCK for seconds in found[5:]]
    halves = zip(blocks[::2], blocks[1::2])
    return {"a step": [pair if n % 2 == 0 else pair[::-1] for n, pair in enumerate(halves)]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--path", default="", help="a folder of photos")
    given = parser.parse_args()
    torch.set_num_threads(1)
    upper = []
    with tempfile.TemporaryDirectory() as name:
        all_times = loader_pairs(given.path, Path(name), given.pairs)
        all_times |= step_pairs(Path(name) / "run", given.pairs)
    for what, times in all_times.items():
        more = [100 * (guarded / plain - 1) for guarded, plain in times]
        mean, error = statistics.mean(more), statistics.stdev(more) / len(more) ** 0.5
        upper += [mean + 2 * error] * (what != FIRST)
        per = [statistics.mean(side) for side in zip(*times)]
        unit = "a step" if what == "a step" else "an image"
        print(
            f"{what}: {per[0]:.3f} ms of CPU time {unit}, {per[1]:.3f} without guards, which cost "
            f"{mean:.2f} % (95 % interval {mean - 2 * error:.2f} to {mean + 2 * error:.2f}, "
            f"{len(times)} pairs)",
            flush=True,
        )
    return int(max(upper) > 2)


if __name__ == "__main__":
    sys.exit(main())
