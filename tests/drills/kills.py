"""Kills a run at random moments: `python -m tests.drills.kills [--count 100] [--ranks 2]`.

With one process, the drill starts the run again after every kill. With several ranks, one rank is
killed, and torchrun starts all ranks again by itself.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.drills.runs_to_kill import (
    STEPS,
    Figures,
    end,
    equal_to_the_bit,
    last_step,
    saved_step,
    start,
    wait_for_step,
    words,
    workers,
)

A_RUN = 4  # kills in one run
PATIENCE = 600.0  # seconds until a run that does not go on counts as lost, on a busy machine, too


def torchrun(ranks: int, restarts: int = A_RUN) -> list[str]:
    """Returns the words of Python that launch ranks which start again by themselves."""
    options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    return ["-m", "torch.distributed.run", *options] if ranks > 1 else []


def whole_run(folder: Path, ranks: int, steps: int = STEPS) -> Path:
    """Trains without a fault. Returns the folder."""
    process = start(words(folder, steps), folder.with_suffix(".log"), torchrun(ranks))
    if process.wait():
        raise RuntimeError(folder.with_suffix(".log").read_text())
    return folder


def kill(process: subprocess.Popen, folder: Path, ranks: int, rng: random.Random) -> int:
    """Kills the process or one of its ranks. Returns the step that was logged."""
    if ranks == 1:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    else:
        of_ranks = workers(process.pid)
        os.kill(of_ranks[rng.choice(sorted(of_ranks))], signal.SIGKILL)
    return last_step(folder)


def kill_a_run(
    folder: Path, whole: Path, ranks: int, count: int, seed: int, steps: int = STEPS
) -> Figures:
    """Kills a run `count` times, lets it end, and compares it with the run without a fault."""
    rng, figures, log = random.Random(seed), Figures(), folder.with_suffix(".log")
    process = start(words(folder, steps), log, torchrun(ranks, count))
    moments = sorted(rng.sample(range(10, steps - 10), count))
    try:
        for number, moment in enumerate(moments):
            if not wait_for_step(folder, moment, process, PATIENCE):
                break
            time.sleep(rng.uniform(0, 0.05))
            figures.faults += 1
            before = saved_step(folder)
            reached = kill(process, folder, ranks, rng)
            killed = time.monotonic()
            if ranks == 1:
                after = saved_step(folder)
                process = start(words(folder, steps), log)
                figures.beyond += after < before
                figures.most_lost = max(figures.most_lost, reached - after)
            if not wait_for_lines_after(log, number + 1, process):
                break
            at = continued_at(log)
            figures.beyond += at < before
            figures.most_lost = max(figures.most_lost, reached - at)
            figures.seconds.append(time.monotonic() - killed)
            figures.survived += 1
        if figures.survived == count and not process.wait(PATIENCE):
            figures.finished += 1
            figures.equal += equal_to_the_bit(folder, whole)
    except subprocess.TimeoutExpired:
        figures.finished += 1  # but is not equal
    finally:
        end(process)
    return figures


def continued(log: Path) -> list[int]:
    """Returns the steps at which a run said that it continues."""
    lines = log.read_text(errors="replace").splitlines()
    said = [line for line in lines if line.startswith("continuing at step ")]
    return [int(line.split()[3].rstrip(",")) for line in said]


def continued_at(log: Path) -> int:
    return continued(log)[-1]


def wait_for_lines_after(log: Path, number: int, process: subprocess.Popen) -> bool:
    """Waits until the run has continued for the `number`th time."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and len(continued(log)) < number:
        if process.poll() is not None:
            return len(continued(log)) >= number
        time.sleep(0.02)
    return len(continued(log)) >= number


def drill(count: int, ranks: int, place: Path, seed: int = 0) -> Figures:
    """Kills runs `count` times in all."""
    total, whole = Figures(), place / "whole"
    whole_run(whole, ranks)
    number = 0
    while total.faults < count:
        folder = place / f"killed{number}"
        part = kill_a_run(folder, whole, ranks, min(A_RUN, count - total.faults), seed + number)
        for name in ("faults", "survived", "equal", "finished", "beyond"):
            setattr(total, name, getattr(total, name) + getattr(part, name))
        total.most_lost = max(total.most_lost, part.most_lost)
        total.seconds += part.seconds
        if part.good():
            shutil.rmtree(folder)
        print(total.line(f"kills, {ranks} ranks" if ranks > 1 else "kills"), flush=True)
        number += 1
        if not part.faults:
            break
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    arguments = parser.parse_args()
    place = arguments.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    place.mkdir(parents=True, exist_ok=True)
    figures = drill(arguments.count, arguments.ranks, place, arguments.seed)
    return 0 if figures.good() else 1


if __name__ == "__main__":
    sys.exit(main())
