"""Tells whether other work on the machine makes a measurement meaningless."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mocofast.usage import Usage

OTHERS = 0.05  # share of all cores that other processes may use
STOLEN = 0.02  # share of all cores that the host may give to other machines
SPREAD = 0.25  # median of (third quartile - first quartile) / median, over all sides


class Neighbours(NamedTuple):
    """Shares of all cores that were not ours during a measurement."""

    others: float
    stolen: float


def between(before: Usage, after: Usage, untimed: Sequence[Usage] = ()) -> Neighbours:
    """Returns the shares of others between two moments.

    untimed: differences of usage in the meantime that do not count.
    """
    spent = after.since(before)
    for part in untimed:
        spent = spent.since(part)
    time_of_cores = max(1e-9, spent.wall) * (os.cpu_count() or 1)
    return Neighbours(spent.others / time_of_cores, max(0.0, spent.stolen) / time_of_cores)


def spread(row: Mapping[str, Any]) -> float:
    """Returns the median spread of the sides of a row, 0 for a row without quartiles.

    row: with "milliseconds" and "quartiles", {side: ...}, at any depth, also inside lists.
    """
    found = sorted(_spreads(row))
    return found[len(found) // 2] if found else 0.0


def _spreads(row: Any) -> list[float]:
    if isinstance(row, list):
        return [x for value in row for x in _spreads(value)]
    if not isinstance(row, Mapping):
        return []
    times, quartiles = row.get("milliseconds"), row.get("quartiles")
    if isinstance(times, Mapping) and isinstance(quartiles, Mapping):
        return [(high - low) / times[side] for side, (low, high) in quartiles.items()]
    return [x for value in row.values() for x in _spreads(value)]


def warnings(neighbours: Neighbours | None, row: Mapping[str, Any]) -> list[str]:
    """Returns why the row may be meaningless, [] for a quiet machine."""
    found = []
    if neighbours is not None and neighbours.others > OTHERS:
        found.append(f"other processes used {neighbours.others:.0%} of the cores")
    if neighbours is not None and neighbours.stolen > STOLEN:
        found.append(f"the host took {neighbours.stolen:.0%} of the cores (steal)")
    if (wide := spread(row)) > SPREAD:
        found.append(f"the quartiles of a side lie {wide:.0%} of its median apart")
    return found
