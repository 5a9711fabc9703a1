"""Metrics of a run: summed on the device, read once a log line, so that no step waits for the GPU."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

METRICS = ("loss", "acc1", "acc5")


def step_metrics(loss: Tensor, rank: Tensor | None) -> Tensor:
    """(3,) float32 on the device: loss, and the shares of queries whose positive scores first / in the first five;
    NaN for these where the method ranks nothing."""
    loss = loss.detach()
    shares = (
        [torch.full_like(loss, math.nan)] * 2
        if rank is None
        else [(rank < k).float().mean() for k in (1, 5)]
    )
    return torch.stack([loss, *shares]).float()


class Window:
    """Sums of `step_metrics` since the last log line, and the time they took."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(METRICS), device=device)
        self.steps = self.images = 0
        self._began = time.perf_counter()
        self._waited = 0.0

    def state(self) -> dict[str, Tensor | int]:
        """What a checkpoint keeps, so that a continued run logs the same averages."""
        return {"sums": self.sums.cpu(), "steps": self.steps}

    def load_state(self, state: dict[str, Tensor | int]) -> None:
        """Continues the averages of `state`; times start anew."""
        assert isinstance(state["sums"], Tensor) and isinstance(state["steps"], int)
        self.sums.copy_(state["sums"])
        self.steps = state["steps"]

    def add(self, metrics: Tensor, images: int, waited: float) -> None:
        """One step: its metrics on the device, images over all ranks, and seconds spent waiting for data."""
        self.sums += metrics
        self.steps += 1
        self.images += images
        self._waited += waited

    def means(self) -> Callable[[], dict[str, float]]:
        """A function that gives the means over the window and over ranks (which call `means` together), of what there
        is. Only that function waits for the device, and only for what was launched by now."""
        means = self.sums / self.steps
        if dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        copied = None
        if means.is_cuda:
            on_host = torch.empty(len(METRICS), pin_memory=True)
            means, copied = on_host.copy_(means, non_blocking=True), torch.cuda.Event()
            copied.record()

        def read() -> dict[str, float]:
            if copied is not None:
                copied.synchronize()
            values = dict(zip(METRICS, means.tolist()))
            # A loss that is not a number has to be seen; accuracies are only so where there are none.
            return {
                name: value
                for name, value in values.items()
                if name == "loss" or not math.isnan(value)
            }

        return read

    def flush(self) -> Callable[[], dict[str, float]]:
        """Starts the next window. A function that gives this one's `means` and rates; called after the next step's
        launch, it leaves the device something to do. The only place where a run waits for the device."""
        read, images, waited = self.means(), self.images, self._waited
        self.sums.zero_()
        self.steps = self.images = 0
        self._waited = 0.0

        def finished() -> dict[str, float]:
            values = read()
            # From one reading to the next, since what the host has launched is not done.
            now = time.perf_counter()
            seconds = now - self._began
            self._began = now
            return {**values, "images_per_second": images / seconds, "data_wait": waited / seconds}

        return finished

    def leave_out(self, seconds: float) -> None:
        """Leaves so much out of the time that passes."""
        self._began += seconds

    def restart_clock(self) -> None:
        """Leaves out what has passed since the last step (an evaluation, say) from the rates."""
        self._began, self._waited = time.perf_counter(), 0.0


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: the GPU's allocations, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
