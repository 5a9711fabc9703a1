"""Ranks that hang, and ranks without their launcher: `python -m tests.drills.ranks`."""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.drills.kills import PATIENCE, continued, torchrun, wait_for_lines_after, whole_run
from tests.drills.runs_to_kill import (
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

HANG_AFTER = 8.0  # seconds, in the drills


def is_alive(process: int) -> bool:
    """Returns whether a process runs. A zombie does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def hang(folder: Path, whole: Path, victim: int, moment: int, figures: Figures) -> str:
    """Stops one of two ranks for ever (SIGSTOP). Returns the line that names a rank."""
    log = folder.with_suffix(".log")
    process = start(words(folder, **{"train.hang_after": HANG_AFTER}), log, torchrun(2))
    try:
        if not wait_for_step(folder, moment, process, PATIENCE):
            return "no step"
        figures.faults += 1
        before, reached = saved_step(folder), last_step(folder)
        os.kill(workers(process.pid)[victim], signal.SIGSTOP)
        stopped = time.monotonic()
        if wait_for_lines_after(log, 1, process):
            figures.survived += 1
            figures.seconds.append(time.monotonic() - stopped)
            figures.beyond += continued(log)[0] < before
            figures.most_lost = max(figures.most_lost, reached - continued(log)[0])
            figures.finished += 1
            figures.equal += not process.wait(PATIENCE) and equal_to_the_bit(folder, whole)
    finally:
        end(process)
    said = [line for line in log.read_text().splitlines() if "hanging: " in line]
    return said[0] if said else "no rank named"


def orphans(folder: Path, moment: int) -> float:
    """Kills torchrun's agent. Returns the seconds until both ranks have ended, or infinity."""
    process, ranks = start(words(folder), folder.with_suffix(".log"), torchrun(2)), {}
    try:
        if not wait_for_step(folder, moment, process, PATIENCE):
            return float("inf")
        ranks = workers(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed = time.monotonic()
        while any(map(is_alive, ranks.values())):
            if time.monotonic() - killed > PATIENCE:
                return float("inf")
            time.sleep(0.05)
        return time.monotonic() - killed
    finally:
        end(process)
        for rank in filter(is_alive, ranks.values()):
            os.kill(rank, signal.SIGKILL)


def stopped(folder: Path, moment: int, whom: str) -> tuple[int, int, int]:
    """Sends SIGTERM to "agent" or to "rank", once.

    Returns the status of torchrun, how often ranks started again, and the steps that were logged
    but are in no checkpoint.
    """
    log = folder.with_suffix(".log")
    process = start(words(folder), log, torchrun(2))
    try:
        if not wait_for_step(folder, moment, process, PATIENCE):
            return -1, -1, -1
        os.kill(process.pid if whom == "agent" else workers(process.pid)[1], signal.SIGTERM)
        status = process.wait(PATIENCE)
    finally:
        end(process)
    return status, len(continued(log)), last_step(folder) - saved_step(folder)


def main() -> int:
    count, place, rng = (
        int(sys.argv[1]) if len(sys.argv) > 1 else 6,
        Path(tempfile.mkdtemp(prefix="ranks-", dir=os.environ.get("DRILLS"))),
        random.Random(0),
    )
    whole = place / "whole"
    whole_run(whole, 2)
    figures, named = Figures(), 0
    for number in range(count):
        victim = number % 2
        said = hang(place / f"hung{number}", whole, victim, rng.randrange(10, 300), figures)
        named += f"hanging: rank {victim} at" in said
        print(figures.line("hung rank"), f"; named {named} times", sep="", flush=True)
    ended = 0
    for number in range(count):
        seconds = orphans(place / f"orphans{number}", rng.randrange(10, 250))
        ended += seconds < PATIENCE
        print(f"killed agent: {number + 1} faults, ranks ended {ended} times, {seconds:.1f} s")
    return 0 if figures.good() and named == ended == count else 1


if __name__ == "__main__":
    sys.exit(main())
