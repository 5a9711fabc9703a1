"""Spoiled checkpoints, full disks, two starts: `python -m tests.drills.files [--count 20]`."""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mocofast import settings
from mocofast.train.run import train
from tests.drills.kills import PATIENCE, whole_run
from tests.drills.runs_to_kill import (
    STEPS,
    Figures,
    equal_to_the_bit,
    last_step,
    start,
    wait_for_step,
    words,
)


def short_run(folder: Path, steps: int, resume: str = "") -> int:
    """Trains the digits in this process, up to a step of 33, with a checkpoint every 5 steps."""
    config = settings.load_recipe("digits")
    values = {"train.dir": str(folder), "train.epochs": 3, "train.max_steps": steps}
    values |= {"train.log_every": 1, "train.device": "cpu", "data.workers": 0, "knn.every": 0}
    values |= {"knn.start": False, "checkpoint.every_steps": 5, "checkpoint.keep": 4}
    settings.apply(config, values)
    return train(config, resume).step


def flip(content: bytearray, rng: random.Random) -> bytearray:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def tear(content: bytearray, rng: random.Random) -> bytearray:
    return content[: rng.randrange(len(content))]


def spoiled_checkpoints(place: Path, count: int, seed: int = 0) -> dict[str, Figures]:
    """Spoils last.pt, and in half of the cases the next older file, too. Then continues."""
    rng, whole, half = random.Random(seed), place / "whole", place / "half"
    short_run(whole, 33)
    short_run(half, 20)
    figures = {"torn": Figures(), "flipped": Figures()}
    for number in range(count):
        name, spoil = ("torn", tear) if number % 2 else ("flipped", flip)
        folder, found = place / f"spoiled{number}", figures[name]
        shutil.copytree(half, folder)
        newest = sorted((folder / "checkpoints").glob("step_*.pt"))
        victims = [folder / "checkpoints" / "last.pt", *newest[-1 - number % 4 // 2 :][:1]]
        for victim in victims:
            content = spoil(bytearray(victim.read_bytes()), rng)
            victim.unlink()  # last.pt and a step file are one file of two names
            victim.write_bytes(content)
        found.faults += 1
        with contextlib.suppress(ValueError):
            found.survived += short_run(folder, 33, "auto") == 33
        found.finished += 1
        found.equal += equal_to_the_bit(folder, whole)
        shutil.rmtree(folder)
    return figures


def fill(folder: Path) -> Path:
    """Fills a disk to the last byte. Returns the file to remove."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (2**16, 2**10, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return filler


def full_disk(
    place: Path, whole: Path, count: int, seed: int = 0, steps: int = STEPS
) -> Figures | None:
    """Fills a small disk `count` times while a run writes to it. None if none can be mounted."""
    disk, rng, figures = place / "disk", random.Random(seed), Figures()
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        return None
    try:
        folder = disk / "run"
        process = start(words(folder, steps), place / "full.log")
        for _ in range(count):
            if not wait_for_step(folder, last_step(folder) + 20, process, PATIENCE):
                break
            filler = fill(disk)
            figures.faults += 1
            time.sleep(rng.uniform(0.3, 1.0))
            figures.survived += process.poll() is None
            filler.unlink()
        figures.finished += 1
        figures.equal += not process.wait(PATIENCE) and equal_to_the_bit(folder, whole)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    return figures


def two_starts(place: Path, whole: Path, count: int, steps: int = STEPS) -> Figures:
    """Starts two runs in one folder at once. One must win, and the other say so."""
    figures = Figures()
    for number in range(count):
        folder = place / f"two{number}"
        logs = [place / f"two{number}-{name}.log" for name in "ab"]
        figures.faults += 1
        processes = [start(words(folder, steps), log) for log in logs]
        statuses = [process.wait(PATIENCE) for process in processes]
        refused = [log.read_text() for log, status in zip(logs, statuses) if status == 2]
        figures.survived += sorted(statuses) == [0, 2] and "is in use by process" in refused[0]
        figures.finished += 1
        figures.equal += equal_to_the_bit(folder, whole)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="files-") as name:
        place = Path(name)
        for part in ("spoiled", "disk", "starts"):
            (place / part).mkdir()
        found = {
            f"{kind} checkpoints": figures
            for kind, figures in spoiled_checkpoints(
                place / "spoiled", arguments.count, arguments.seed
            ).items()
        }
        whole = whole_run(place / "whole", 1)
        full = full_disk(place / "disk", whole, 5, arguments.seed)
        if full is None:
            print("full disk: not run, because this user may mount no file system")
        else:
            found["full disk"] = full
        found["two starts"] = two_starts(place / "starts", whole, 5)
    for kind, figures in found.items():
        print(figures.line(kind))
    return 0 if all(figures.good() for figures in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
