"""What the drills share: a short run of the digits, its figures, and the line that they print."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mocofast.train.checkpoint import load_checkpoint
from tests import runs

# A step takes a hundredth of a second, so a few hundred steps give a kill room. The evaluation at
# the end is part of the comparison.
STEPS = 330
EVERY = 10  # steps between checkpoints
SOON = 20.0  # seconds in which a run should be back at work
OPTIONS = {
    "train.log_every": 1,
    "train.device": "cpu",
    "data.workers": 0,
    "model.queue_size": 300,
    "checkpoint.every_steps": EVERY,
    "knn.every": 0,
    "knn.start": "false",
}


@dataclass
class Figures:
    """What a drill counts."""

    faults: int = 0
    survived: int = 0
    equal: int = 0  # finished runs that equal the run without a fault, to the bit
    finished: int = 0
    most_lost: int = 0  # steps after the last whole checkpoint at the kill, which are made again
    beyond: int = 0  # faults after which the run went back further than to the last checkpoint
    seconds: list[float] = field(default_factory=list)  # from the fault to the next step

    def line(self, name: str) -> str:
        slowest = ""
        if self.seconds:
            soon = sum(seconds < SOON for seconds in self.seconds)
            slowest = (
                f"; back at work after {statistics.median(self.seconds):.1f} s (median), at most "
                f"{max(self.seconds):.1f} s, "
                f"{soon} of {len(self.seconds)} times within {SOON:.0f} s"
            )
        return (
            f"{name}: {self.faults} faults, {self.survived} survived; at most {self.most_lost} "
            f"steps made again, {self.beyond} times further back than the last checkpoint; "
            f"{self.equal} of {self.finished} finished runs equal to the bit{slowest}"
        )

    def good(self) -> bool:
        whole = self.equal == self.finished > 0
        return self.survived == self.faults > 0 and whole and not self.beyond


def words(folder: Path, steps: int = STEPS, **more: object) -> list[str]:
    """Returns the arguments of `mocofast` for the run of the drills in `folder`.

    steps: a multiple of 11, the steps of an epoch.
    """
    options = {**OPTIONS, "train.epochs": steps // 11, "train.dir": folder, **more}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["pretrain", "digits", *flags, "--resume", "auto"]


def start(arguments: list[str], log: Path, launcher: list[str] | None = None) -> subprocess.Popen:
    """Starts mocofast in a session of its own. Its output goes to the end of `log`."""
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, *(launcher or []), "-m", "mocofast", *arguments],
            env=runs.environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=runs.ROOT,
            start_new_session=True,
        )


def last_step(folder: Path) -> int:
    """Returns the step of the last whole line of metrics.jsonl, 0 without a line."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (FileNotFoundError, IndexError, json.JSONDecodeError):
        return 0


def saved_step(folder: Path) -> int:
    """Returns the step of the checkpoint from which `--resume auto` would go on."""
    try:
        return int(load_checkpoint(folder)["step"])
    except FileNotFoundError:
        return 0


def wait_for_step(folder: Path, step: int, process: subprocess.Popen, seconds: float) -> bool:
    """Waits until a run has logged `step`. False if the process ends or the time passes first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if last_step(folder) >= step:
            return True
        if process.poll() is not None:
            return last_step(folder) >= step
        time.sleep(0.02)
    return False


def workers(agent: int) -> dict[int, int]:
    """Returns the processes that torchrun's agent has started, {rank: process id}."""
    found = {}
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    for child in map(int, children):
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile
            continue
        for variable in environment:
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = child
    return found


def end(process: subprocess.Popen) -> None:
    """Ends a process, and the ranks that it has started."""
    ranks = workers(process.pid).values() if process.poll() is None else ()
    for each in (process.pid, *ranks):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    process.wait()


def equal_to_the_bit(folder: Path, whole: Path) -> bool:
    """Returns whether weights, optimiser and metrics of two finished runs are equal."""
    ours, theirs = load_checkpoint(folder), load_checkpoint(whole)
    same = ours["step"] == theirs["step"] and runs.metrics(folder) == runs.metrics(whole)
    for part in ("model", "optimizer"):
        same = same and _equal(ours[part], theirs[part])
    return same


def _equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b
