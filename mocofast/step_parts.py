"""Marks the parts of a training step for the profiler: `with step_part("backward"): ...`.

Without a profiler, the cost is a look at a variable. See mocofast.train.profile.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocofast.view_sizes import Size, as_size

STEP = "step"  # name of a whole step in torch.profiler
FORWARD = {"encoder_q": "query forward", "encoder_k": "key forward"}  # {encoder of a Method: part}
OTHER = "other"  # time outside of all parts
OVERLAP = "overlapped"  # negative: time in which two streams of a GPU worked, counted twice


class Span(NamedTuple):
    """An interval in the innermost open part. Times in seconds from the start of the step."""

    name: str
    start: float
    end: float


class Step(NamedTuple):
    """Recorded times of a step."""

    # (part, start, end) of intervals in the innermost open part: seconds (CPU) or events (GPU).
    marks: list[tuple[str, Any, Any]]
    images: Counter[tuple[str, Size]]  # {(part, size): images encoded}

    def spans(self) -> list[Span]:
        """Returns the intervals without gaps: their sum is the step. Waits for the GPU."""
        first, last = self.marks[0][1], self.marks[-1][2]
        if isinstance(last, float):
            return [Span(name, start - first, end - first) for name, start, end in self.marks]
        last.synchronize()
        return [
            Span(name, first.elapsed_time(start) / 1e3, first.elapsed_time(end) / 1e3)
            for name, start, end in self.marks
        ]


class Recorder:
    """Records when parts of a step start and end: host time on a CPU, stream time on a GPU.

    timing: False records whole steps only, and passes parts to torch.profiler.
    """

    def __init__(self, device: torch.device, timing: bool = True) -> None:
        self.timing = timing
        self._cuda = device.type == "cuda"
        self._open: list[tuple[str, Any]] = []  # (part, start of the interval)
        self._step = Step([], Counter())

    def begin(self) -> None:
        """Begins a step."""
        _active[:] = [self]
        self._step = Step([], Counter())
        if not self.timing:
            self._range = torch.profiler.record_function(STEP)
            self._range.__enter__()
        self._open = [(OTHER, self._mark())]

    def end(self) -> Step:
        """Ends the step and returns the recorded times."""
        self._close(self._mark())
        if not self.timing:
            self._range.__exit__(None, None, None)
        _active.clear()
        return self._step

    @contextlib.contextmanager
    def part(self, name: str, images: Sequence[Tensor]) -> Iterator[None]:
        """Records the block as a part inside the open part."""
        for same in images:
            height, width = same.shape[-2:]
            self._step.images[name, as_size(height, width)] += len(same)
        if not self.timing:
            with torch.profiler.record_function(name):
                yield
            return
        now = self._mark()
        outer = self._close(now)
        self._open.append((name, now))
        yield  # no try: after an exception the run ends
        now = self._mark()
        self._close(now)
        self._open.append((outer, now))

    def _close(self, now: Any) -> str:
        name, since = self._open.pop()
        self._step.marks.append((name, since, now))
        return name

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


_active: list[Recorder] = []  # the recorder of the current step, or empty


def step_part(name: str, images: Sequence[Tensor] = ()) -> AbstractContextManager[None]:
    """Marks the block as the part `name` of the step. images: encoded, every size (N, C, S, S)."""
    return _active[0].part(name, images) if _active else contextlib.nullcontext()


def timed() -> bool:
    """Returns whether parts are timed. A step then has to be launched part by part."""
    return bool(_active) and _active[0].timing
