"""Names for the parts of a training step, so that a profile can time them: `with step_part("backward"): ...`.

While nobody profiles, that costs a look at one variable. See mocofast.train.profile.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

STEP = "step"  # as torch.profiler shows a whole one
FORWARD = {
    "encoder_q": "query forward",
    "encoder_k": "key forward",
}  # by what a Method calls its encoders
OTHER = "other"  # what no part names
OVERLAP = "overlapped"  # counted twice above: what one stream of a GPU did beside another


class Span(NamedTuple):
    """A stretch of time in one part and in none inside it; seconds from the step's start."""

    name: str
    start: float
    end: float


class Step(NamedTuple):
    """A step that ended."""

    marks: list[
        tuple[str, Any, Any]
    ]  # part, and the moments between which it was the innermost one
    images: Counter[str]  # that each part worked on, where it says so

    def spans(self) -> list[Span]:
        """They follow each other, so their sum is the step. Waits for the GPU."""
        first, last = self.marks[0][1], self.marks[-1][2]
        if isinstance(last, float):
            return [Span(name, start - first, end - first) for name, start, end in self.marks]
        last.synchronize()
        return [
            Span(name, first.elapsed_time(start) / 1e3, first.elapsed_time(end) / 1e3)
            for name, start, end in self.marks
        ]


class Recorder:
    """Takes the time where a part starts or ends: the host's on a CPU; the stream's on a GPU, where work is queued.

    timing: False times steps only, and shows their parts to torch.profiler.
    """

    def __init__(self, device: torch.device, timing: bool = True) -> None:
        self.timing = timing
        self._cuda = device.type == "cuda"
        self._open: list[tuple[str, Any]] = []  # part, and since when it is the innermost one
        self._step = Step([], Counter())

    def begin(self) -> None:
        """A step begins."""
        _active[:] = [self]
        self._step = Step([], Counter())
        if not self.timing:
            self._range = torch.profiler.record_function(STEP)
            self._range.__enter__()
        self._open = [(OTHER, self._mark())]

    def end(self) -> Step:
        """It ends."""
        self._close(self._mark())
        if not self.timing:
            self._range.__exit__(None, None, None)
        _active.clear()
        return self._step

    @contextlib.contextmanager
    def part(self, name: str, images: int) -> Iterator[None]:
        """A part, inside the one that is open."""
        self._step.images[name] += images
        if not self.timing:
            with torch.profiler.record_function(name):
                yield
            return
        now = self._mark()
        outer = self._close(now)
        self._open.append((name, now))
        yield  # an exception ends the run, so nothing is put right after one
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


_active: list[Recorder] = []  # the one of the step under way, if it is looked at


def step_part(name: str, images: int = 0) -> AbstractContextManager[None]:
    """What is done inside is the part `name` of the step. images: how many it encodes."""
    return _active[0].part(name, images) if _active else contextlib.nullcontext()


def timed() -> bool:
    """Whether parts are timed, for which a step has to be launched part by part."""
    return bool(_active) and _active[0].timing
