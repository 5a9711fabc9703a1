"""Metrics of a run, summed on the device and read once a log line: no step waits for the GPU."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mocofast.methods.base import MethodOutput

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None  # type: ignore[assignment]

LOSS = "loss"
RATES = ("images_per_second", "data_wait")  # entries of a line that the method does not compute
# Entries of metrics.jsonl that are no metrics of the method.
RESERVED = {LOSS, "step", "epoch", "lr", "chance_loss", "memory_gib", *RATES}


class StepMetrics(NamedTuple):
    """The metrics of a step, on the device.

    names: "loss", then the metrics that the method names.
    values: (len(names),) float32, means over the images of this rank.
    pair: of the last micro-batch, as in MethodOutput, without gradients.
    """

    names: tuple[str, ...]
    values: Tensor
    pair: tuple[Tensor, Tensor] | None = None

    @property
    def loss(self) -> Tensor:
        """The loss, () float32."""
        return self.values[0]


def step_metrics(output: MethodOutput, share: float = 1.0) -> StepMetrics:
    """Collects the metrics of a forward pass without waiting for the device.

    share: weight of a micro-batch in its step. The values are multiplied by it.
    """
    values = torch.stack([x.detach() for x in (output.loss, *output.metrics.values())]).float()
    pair = output.pair and (output.pair[0].detach(), output.pair[1].detach())
    return StepMetrics((LOSS, *output.metrics), values * share, pair)


class Moment:
    """The moment at which a device ends the work launched so far."""

    def __init__(self, device: torch.device) -> None:
        self.on_host = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        """Waits for the work launched before this moment, and for nothing later."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: Moment) -> float:
        """Returns the seconds that the device took. Both moments must have passed."""
        if self._event is None or earlier._event is None:
            return self.on_host - earlier.on_host
        return earlier._event.elapsed_time(self._event) / 1000


class PendingMeans:
    """Means that the device still computes, and the losses of single steps.

    means: (M + L,) float32, of the metrics `names` and of the losses of `steps`.
    """

    def __init__(self, names: tuple[str, ...], means: Tensor, steps: tuple[int, ...] = ()) -> None:
        self._names, self._means, self._steps = names, means, steps
        self.moment = Moment(means.device)
        if means.is_cuda:
            on_host = torch.empty(len(means), pin_memory=True)
            self._means = on_host.copy_(means, non_blocking=True)
            self.moment = Moment(means.device)

    def wait(self) -> dict[str, float]:
        """Waits for the work launched before the means, and for nothing later.

        Returns {metric: mean}.
        """
        self.moment.wait()
        return dict(zip(self._names, self._means.tolist()))

    def first_wrong(self) -> int | None:
        """Returns the first step whose loss is not finite, or None. Call it after `wait`."""
        losses = self._means.tolist()[len(self._names) :]
        wrong = (step for step, loss in zip(self._steps, losses) if not math.isfinite(loss))
        return next(wrong, None)


class PendingWindow(NamedTuple):
    """A window that has ended, and whose means the device still computes."""

    means: PendingMeans
    images: int  # over all ranks
    waited: float  # seconds spent waiting for data
    began: Moment
    left_out: float  # seconds between `began` and the end that belong to no step

    def wait(self) -> dict[str, float]:
        """Returns the means, images_per_second, and data_wait (share of the time spent waiting).

        Call it after launching the next step, so that the GPU stays busy while the host waits.
        """
        values = self.means.wait()
        ended = self.means.moment
        # The device may end the steps long after the host has launched them. Data are waited for
        # by the host.
        on_device, on_host = (
            max(seconds - self.left_out, 1e-9)
            for seconds in (ended.since(self.began), ended.on_host - self.began.on_host)
        )
        rates = {"images_per_second": self.images / on_device, "data_wait": self.waited / on_host}
        return {**values, **rates}


class Window:
    """Sums of the step metrics since the last log line, and the time of these steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: tuple[str, ...] = (LOSS,)
        self._sums = torch.zeros(1, device=device)
        self._continued = False  # the sums come from a checkpoint
        self.steps = self._images = 0
        self._losses: list[tuple[int, Tensor]] = []  # of single steps, () float32
        self._began = Moment(device)
        self._waited = self._left_out = 0.0

    def state(self) -> dict[str, Any]:
        """Returns the sums for a checkpoint, so that a continued run logs the same averages."""
        return {"sums": dict(zip(self._names, self._sums.tolist())), "steps": self.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues the sums of `state()`. Times start anew."""
        sums = state["sums"]
        if isinstance(sums, Tensor):  # as checkpoints of mocofast 0.1 hold them
            sums = dict(zip((LOSS, "acc1", "acc5"), sums.tolist()))
        self._names = tuple(sums)
        self._sums = torch.tensor(list(sums.values()), device=self._device)
        self.steps, self._continued = state["steps"], True

    def add(self, metrics: StepMetrics, images: int, waited: float, step: int = 0) -> None:
        """Adds a step.

        images: number over all ranks. waited: seconds spent waiting for data. step: its number.
        Raises ValueError if the method names other metrics than at the steps before.
        """
        if metrics.names != self._names and (not self.steps or self._continued):
            self._rename(metrics.names)
        if metrics.names != self._names:
            raise ValueError(
                "a method must name the same metrics at every step: got "
                f"{', '.join(metrics.names)} after {', '.join(self._names)}"
            )
        self._continued = False
        self._sums += metrics.values
        # A captured step writes its metrics to the same address every time.
        self._losses.append((step, metrics.loss.clone()))
        self.steps += 1
        self._images += images
        self._waited += waited

    def _rename(self, names: tuple[str, ...]) -> None:
        """Takes the metrics of the first step, or of a method that has changed its metrics."""
        if reserved := RESERVED & {*names[1:]}:
            raise ValueError(
                f"a method cannot name a metric {', '.join(sorted(reserved))}: "
                "the lines of metrics.jsonl have an entry of this name"
            )
        if set(names) <= set(self._names):
            self._sums = self._sums[[self._names.index(name) for name in names]]
        else:  # earlier steps have no values of a new metric, so the window starts anew
            self._sums, self.steps = torch.zeros(len(names), device=self._device), 0
        self._names = names

    def start_means(self) -> PendingMeans:
        """Starts computing the means over steps and ranks. All ranks call it together."""
        steps = tuple(step for step, _ in self._losses)
        means = self._sums / self.steps
        if steps:
            means = torch.cat([means, torch.stack([loss for _, loss in self._losses])])
        if dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        return PendingMeans(self._names, means, steps)

    def flush(self) -> PendingWindow:
        """Ends this window and starts the next window. All ranks call it together."""
        means = self.start_means()
        ended = PendingWindow(means, self._images, self._waited, self._began, self._left_out)
        self._sums = torch.zeros_like(self._sums)
        self.steps = self._images = 0
        self._losses = []
        self._began, self._waited, self._left_out = means.moment, 0.0, 0.0
        return ended

    def start_clock(self) -> None:
        """Lets the window begin now. Call it before the first step."""
        self._began, self._left_out = Moment(self._device), 0.0

    def leave_out(self, seconds: float) -> None:
        """Leaves `seconds` out of the time that counts for rates."""
        self._left_out += seconds

    def pause(self) -> Moment:
        """Returns the moment at which a pause (an evaluation, for example) begins."""
        return Moment(self._device)

    def end_pause(self, began: Moment) -> None:
        """Leaves the time since `began` out of the rates. Waits for the device."""
        ended = Moment(self._device)
        ended.wait()
        self.leave_out(ended.since(began))


def mean_window(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the mean of the `Window.state()` of several ranks."""
    first = states[0]
    if isinstance(first["sums"], Tensor):  # as checkpoints of mocofast 0.1 hold them
        return dict(first)
    sums = {
        name: sum(each["sums"][name] for each in states) / len(states) for name in first["sums"]
    }
    return {**first, "sums": sums}


def memory_gib(device: torch.device) -> float:
    """Returns the peak memory of this process in GiB: on a GPU allocated, on a CPU resident.

    0 where the system does not say (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS: bytes, Linux: KiB


def duration(seconds: float) -> str:
    """Formats seconds as h:mm:ss, or as m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
