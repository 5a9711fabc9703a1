"""How OpenMP's threads wait for work: read from the environment when PyTorch loads.

A waiting thread burns its core (OpenMP's default, for milliseconds), or sleeps, or burns its core
for some microseconds and then sleeps. Threads that burn for long stop other processes, and a
process with busy neighbours. Threads that sleep at once wake late: small operators of a quiet
machine take a fifth longer.
"""

from __future__ import annotations

import os

SPINS = 1000  # rounds of GNU OpenMP, some microseconds


def wait_briefly() -> None:
    """Sets a short wait, unless the user chose a wait."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def waits_briefly() -> bool:
    """Returns whether the environment asks for threads that sleep at once or soon."""
    policy, spins = os.environ.get("OMP_WAIT_POLICY", ""), os.environ.get("GOMP_SPINCOUNT")
    if spins is None:
        return policy.lower() == "passive"
    return spins.isdecimal() and int(spins) <= SPINS
