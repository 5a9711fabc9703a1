"""Memory, descriptors and threads of long runs, which must stay flat.

python -m tests.drills.endurance [--steps 50000] [--restarts 500]
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import torch

from mocofast import settings
from mocofast.config import DataConfig
from mocofast.data.interface import BatchSlice, view_augments
from mocofast.data.loaders import build_loader, dali_missing
from mocofast.data.sources import load_datasets
from mocofast.train.loop import Run
from mocofast.train.run import train
from tests import runs

SAMPLES = 10


class Use(NamedTuple):
    """What a process holds: resident memory in MiB, descriptors, threads."""

    memory: float
    descriptors: int
    threads: int

    def __str__(self) -> str:
        return f"{self.memory:.0f} MiB, {self.descriptors} descriptors, {self.threads} threads"


def use() -> Use:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    descriptors = len(os.listdir("/proc/self/fd"))
    return Use(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, descriptors, threading.active_count())


def of_steps(folder: Path, steps: int) -> list[Use]:
    """Trains the digits, with a checkpoint every 500 steps. Returns samples over the run.

    Batches are small, so that a step takes milliseconds.
    """
    found: list[Use] = []
    step = Run._step

    def sampled(run: Run) -> None:
        step(run)
        if run.state.step % max(1, steps // SAMPLES) == 0:
            found.append(use())

    config = settings.load_recipe("digits")
    values = {"train.dir": str(folder), "train.epochs": -(-steps // 11), "train.max_steps": steps}
    values |= {"data.batch_size": 32, "model.queue_size": 256, "optim.lr": 0.03}
    values |= {"checkpoint.every_steps": 500, "checkpoint.every_epochs": 10**6, "knn.every": 0}
    settings.apply(config, {**values, "train.device": "cpu", "train.log_every": 50})
    Run._step = sampled  # type: ignore[method-assign]
    try:
        train(config)
    finally:
        Run._step = step  # type: ignore[method-assign]
    return found


def of_restarts(folder: Path, restarts: int, kind: str) -> list[Use]:
    """Starts an epoch of a loader of files again and again, in the middle of the epoch before.

    kind: "torchvision" or "dali".
    """
    images = runs.make_images(folder, 64)
    data = DataConfig(source="folder", path=str(images), batch_size=16, workers=2)
    data.loader = kind
    config = settings.load_recipe("digits")
    config.augment.size = 16
    source = load_datasets(data, 0).train
    augments = view_augments(config.augment, 2)
    found = []
    for number in range(restarts):
        loader = build_loader(source, data, augments, BatchSlice(16), 0, torch.device("cpu"))
        next(loader.epoch(0, 1))
        next(loader.epoch(1))
        loader.close()
        if (number + 1) % max(1, restarts // SAMPLES) == 0:
            found.append(use())
    return found


def is_flat(found: list[Use]) -> bool:
    """Returns whether the last sample holds no more than the samples after the first third.

    Memory may differ by 3 %.
    """
    settled, last = found[len(found) // 3 : -1], found[-1]
    return (
        last.memory <= 1.03 * max(each.memory for each in settled)
        and last.descriptors <= max(each.descriptors for each in settled)
        and last.threads <= max(each.threads for each in settled)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--restarts", type=int, default=500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="endurance-") as name:
        all_found = {
            f"{arguments.restarts} restarts of the {kind} loader": of_restarts(
                Path(name) / kind, arguments.restarts, kind
            )
            for kind in ["torchvision"] + ["dali"] * (not dali_missing())
        }
        all_found[f"{arguments.steps} steps"] = of_steps(Path(name) / "run", arguments.steps)
    for what, found in all_found.items():
        third = found[len(found) // 3]
        print(f"{what}: {third} after a third, {found[-1]} at the end; flat: {is_flat(found)}")
    return 0 if all(map(is_flat, all_found.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
