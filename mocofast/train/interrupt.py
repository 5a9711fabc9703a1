"""A request to stop: all ranks finish the same step and write a checkpoint."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist

from mocofast import interrupts


class StopRequest:
    """Turns a signal into a request to stop: `with StopRequest() as stop: ... stop.agreed()`.

    A signal reaches ranks at different steps. A rank that stops alone leaves the other ranks
    waiting in a collective. So every rank's flag is reduced over a separate CPU group. The
    reduction starts at one step and is read at the next step, so nothing waits.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> StopRequest:
        self._watch = self._opened.enter_context(interrupts.watching())
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def after_steps(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block a signal is a request. Outside it raises `interrupts.Stopped`."""
        return self._watch.after_steps()

    def requested(self) -> bool:
        """Returns whether this rank has got a signal."""
        return self._watch.requested

    def agreed(self) -> bool:
        """Returns whether all ranks stop after this step. Call it once a step on every rank."""
        if self._group is None:
            return self.requested()
        known = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            known = bool(flag)
        flag = torch.tensor(int(self.requested()), dtype=torch.int32)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None  # every member of the group gets a handle
        self._pending = (work, flag)
        return known
