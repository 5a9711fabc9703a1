"""Metrics of a run: summed on the device, read once a log line, so that no step waits for the GPU."""

from __future__ import annotations

import math
import resource
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor

METRICS = ("loss", "acc1", "acc5")


def step_metrics(loss: Tensor, rank: Tensor | None) -> Tensor:
    """(3,) float32 on the device: loss, and the shares of queries whose positive scores first / in the first five;
    NaN for these where the method ranks nothing."""
    nothing = torch.full_like(loss.detach(), math.nan)
    shares = [nothing if rank is None else (rank < k).float().mean() for k in (1, 5)]
    return torch.stack([loss.detach(), *shares]).float()


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

    def means(self) -> dict[str, float]:
        """Means over the window and over ranks (which call it together), of what there is. Waits for the device."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
            sums /= dist.get_world_size()
        means = dict(zip(METRICS, (sums / self.steps).tolist()))
        # A loss that is not a number has to be seen; accuracies are only so where there are none.
        return {name: value for name, value in means.items() if name == "loss" or not math.isnan(value)}

    def flush(self) -> dict[str, float]:
        """`means` and rates; starts the next window. The only place where a run waits for the device."""
        values = self.means()
        seconds = time.perf_counter() - self._began
        values["images_per_second"] = self.images / seconds
        values["data_wait"] = self._waited / seconds
        self.restart()
        return values

    def restart(self) -> None:
        """Empties the window and restarts its clock."""
        self.sums.zero_()
        self.steps = self.images = 0
        self.restart_clock()

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
