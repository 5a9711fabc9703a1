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

HANG_AFTER = 8.0  # seconds, in the drills


def is_alive(process: int) -> bool:
    """Returns whether a process runs. A zombie does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def hang(
    folder: Path,
    whole: Path,
    moments: dict[int, int],
    figures: Figures,
    steps: int = STEPS,
    kill: bool = False,
) -> list[str]:
    """Stops ranks of a run of two ranks for ever (SIGSTOP), in turns.

    moments: {rank: step}, in the order of the steps.
    kill: ends a stopped rank at the end of its partner. torchrun waits 30 s before.
    Returns the log's lines about hangs.
    """
    log = folder.with_suffix(".log")
    process = start(words(folder, steps, **{"train.hang_after": HANG_AFTER}), log, torchrun(2))
    try:
        for victim, moment in moments.items():
            if not wait_for_step(folder, moment, process, PATIENCE):
                break
            figures.faults += 1
            before, reached, ranks = saved_step(folder), last_step(folder), workers(process.pid)
            starts = len(continued(log))
            os.kill(ranks[victim], signal.SIGSTOP)
            stopped = time.monotonic()
            if kill and wait_for_end(ranks[1 - victim]):
                os.kill(ranks[victim], signal.SIGKILL)
            if not wait_for_lines_after(log, starts + 1, process):
                break
            figures.survived += 1
            figures.seconds.append(time.monotonic() - stopped)
            figures.beyond += continued(log)[-1] < before
            figures.most_lost = max(figures.most_lost, reached - continued(log)[-1])
        else:
            figures.finished += 1
            figures.equal += not process.wait(PATIENCE) and equal_to_the_bit(folder, whole)
    finally:
        end(process)
    return [line for line in log.read_text().splitlines() if "hanging: " in line]


def wait_for_end(process: int) -> bool:
    """Waits until a process has ended. False if it does not end in time."""
    deadline = time.monotonic() + PATIENCE
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(process)


def orphans(folder: Path, moment: int) -> float:
    """Kills torchrun's agent. Returns the seconds until both ranks have ended, or infinity."""
    # A run of minutes, so that ranks do not end by themselves.
    process, ranks = start(words(folder, 100 * STEPS), folder.with_suffix(".log"), torchrun(2)), {}
    try:
        if not wait_for_step(folder, moment, process, PATIENCE):
            return float("inf")
        ranks = workers(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed = time.monotonic()
        ended = all(map(wait_for_end, ranks.values()))
        return time.monotonic() - killed if ended else float("inf")
    finally:
        end(process)
        for rank in filter(is_alive, ranks.values()):
            os.kill(rank, signal.SIGKILL)


def stopped(folder: Path, moment: int, whom: str, steps: int = STEPS) -> tuple[int, int, int]:
    """Sends SIGTERM to "agent" or to "rank", once.

    Returns the status of torchrun, how often ranks started again, and the steps that were logged
    but are in no checkpoint.
    """
    log = folder.with_suffix(".log")
    process = start(words(folder, steps), log, torchrun(2))
    try:
        if not wait_for_step(folder, moment, process, PATIENCE):
            return -1, -1, -1
        starts = len(continued(log))  # the run may continue an earlier one
        os.kill(process.pid if whom == "agent" else workers(process.pid)[1], signal.SIGTERM)
        status = process.wait(PATIENCE)
    finally:
        end(process)
    return status, len(continued(log)) - starts, last_step(folder) - saved_step(folder)


def main() -> int:
    count, place, rng = (
        int(sys.argv[1]) if len(sys.argv) > 1 else 6,
        Path(tempfile.mkdtemp(prefix="ranks-", dir=os.environ.get("DRILLS"))),
        random.Random(0),
    )
    whole, figures, named = whole_run(place / "whole", 2), Figures(), 0
    for number in range(count):
        victim, moment = number % 2, rng.randrange(10, 300)
        said = hang(place / f"hung{number}", whole, {victim: moment}, figures)
        named += f"hanging: rank {victim} at" in "".join(said[:1])
        print(figures.line("hung rank"), f"; named {named} times", sep="", flush=True)
    ended = 0
    for number in range(count):
        seconds = orphans(place / f"orphans{number}", rng.randrange(10, 250))
        ended += seconds < PATIENCE
        print(f"killed agent: {number + 1} faults, ranks ended {ended} times, {seconds:.1f} s")
    return 0 if figures.good() and named == ended == count else 1


if __name__ == "__main__":
    sys.exit(main())
