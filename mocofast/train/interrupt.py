"""Ctrl-C and SIGTERM: all ranks finish the same step, write a checkpoint, exit with status 75."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again", which schedulers can act on


class StopRequest:
    """Turns a signal into a request to stop: `with StopRequest() as stop: ... stop.agreed()`.

    A signal reaches ranks at different steps. A rank that stops alone leaves the other ranks
    waiting in a collective. So every rank's flag is reduced over a separate CPU group. The
    reduction starts at one step and is read at the next step, so nothing waits.
    A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self._requested = False
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python lets the main thread alone handle signals. A run on another thread (a notebook's
        # server, an actor) leaves signals to its host.
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        signal.signal(number, self._previous[number])

    def agreed(self) -> bool:
        """Returns whether all ranks stop after this step. Call it once a step on every rank."""
        if self._group is None:
            return self._requested
        known = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            known = bool(flag)
        flag = torch.tensor(int(self._requested), dtype=torch.int32)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None  # every member of the group gets a handle
        self._pending = (work, flag)
        return known
