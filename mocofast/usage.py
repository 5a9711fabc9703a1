"""How the cores of this machine are used, by this process and by others."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """Time since the start of the machine, in seconds of one core."""

    wall: float
    busy: float  # all processes
    own: float  # this process and the children that have ended
    stolen: float  # taken by the host of a virtual machine

    def since(self, before: Usage) -> Usage:
        """Returns what was used since another moment."""
        return Usage(*(late - early for early, late in zip(before, self)))

    @property
    def others(self) -> float:
        """The seconds of a core that other processes used, of a difference."""
        return max(0.0, self.busy - self.own)


def usage() -> Usage | None:
    """Returns the usage of the machine. None where the system does not tell."""
    try:
        text = Path("/proc/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, soft, stolen = (int(n) / tick for n in text.split()[1:9])
    own = sum(os.times()[:4])  # user and system, of this process and of its ended children
    return Usage(time.monotonic(), user + nice + system + irq + soft, own, stolen)


def cores_of_others(seconds: float) -> float:
    """Returns how many cores other processes use, on average of the next seconds, while this waits.

    0 where the system does not tell.
    """
    before = usage()
    time.sleep(seconds)
    after = usage()
    if before is None or after is None:
        return 0.0
    spent = after.since(before)
    return spent.others / spent.wall
