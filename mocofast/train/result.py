"""How a run ended."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Result(NamedTuple):
    """How a run ended.

    folder: the run folder.
    step: optimiser steps done.
    interrupted: a signal ended the run; its checkpoint holds the state.
    before, after: kNN figures of the random and of the trained encoder, empty without labels.
    """

    folder: Path
    step: int
    interrupted: bool
    before: dict[str, float]
    after: dict[str, float]
