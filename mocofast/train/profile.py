"""Profiles a training step: a table and a picture of all parts and their floors, and a trace.

Times: mean over the middle half (by duration) of the steps that are timed part by part.
"data wait" is the loop's wait for a batch. "backward" includes the all-reduce of gradients by
DistributedDataParallel. "communication" is all other waiting for ranks. While parts are timed, a
CUDA graph of the step is launched op by op instead.

Floors: the longer of operations / matrix rate and bytes / bandwidth of memory. Both rates are
measured in the same run, best of a few repeats.
Encoders: sum over convolutions, matrix products, attentions and normalisations. Operations are
counted by torch's registry of flops. Bytes are the inputs and outputs of the layer, once.
Element-wise operations count as zero: they could be fused.
Loss of MoCo: 4 N K C operations, and the queue is read once.
Optimiser: parameters, optimiser state and average are read and written, gradients are read, copies
are written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from mocofast.config import Config
from mocofast.device import short_name
from mocofast.methods.base import Method
from mocofast.optim.fused import FusedOptimizer
from mocofast.step_parts import FORWARD, OTHER, OVERLAP, STEP, Recorder, Step
from mocofast.train.work import Work, encoder_work
from mocofast.view_sizes import Size, pixels_text

if TYPE_CHECKING:
    from mocofast.plots import Bar

# The parts of a step, in time order.
PARTS = (
    *("data wait", "key forward", "query forward", "loss", "backward"),
    *("optimiser and EMA", "communication", OTHER, OVERLAP),
)
FILES = ("profile.txt", "profile.png", "trace.json.gz")
# Numbers of steps: ignored at the start, timed as a whole, timed by parts, traced.
SKIPPED, TIMED_WHOLE, TIMED_BY_PARTS, TRACED = 10, 4, 12, 2
STEPS = SKIPPED + TIMED_WHOLE + TIMED_BY_PARTS + TRACED

# Operators for which the host waits for a GPU (a CPU has the same names), and CUDA calls that wait
# or launch.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
WAITING_CALLS = (
    *("cudaStreamSynchronize", "cudaDeviceSynchronize"),
    *("cudaEventSynchronize", "cudaMemcpy"),
)
LAUNCHES = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")


class Floor(NamedTuple):
    """Work of a part, and the least time for the work."""

    seconds: float
    operations: int
    bytes: int
    bandwidth: float  # of memory at the size of the largest layer, bytes a second (read + written)

    @classmethod
    def measure(cls, layers: list[Work], rate: float, device: torch.device) -> Floor:
        """Returns the floor of layers. Measures the bandwidth. rate: operations a second."""
        bandwidth = memory_bandwidth(max(layer.bytes for layer in layers), device)
        seconds = sum(max(layer.operations / rate, layer.bytes / bandwidth) for layer in layers)
        return cls(
            seconds, sum(w.operations for w in layers), sum(w.bytes for w in layers), bandwidth
        )


class Part(NamedTuple):
    """A part of a step: a row of the table."""

    name: str
    seconds: float
    floor: Floor | None  # None: unknown


class Profile(NamedTuple):
    """Profile of a training step. Counts are per step."""

    title: str
    parts: list[Part]  # in time order. The seconds add up to a step.
    whole: float  # seconds of a step that is not timed by parts
    rate: float  # operations a second of a matrix product or a convolution, the faster
    launches: float | None  # kernels, graphs and copies launched on a GPU, None on a CPU
    operators: float  # called by Python or autograd
    synchronisations: float  # waits of the host for the device

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def floor(self) -> float:
        return sum(part.floor.seconds for part in self.parts if part.floor is not None)

    def bars(self) -> list[Bar]:
        """Returns the bars of the picture."""
        # Imported here, because benchmarks start many processes, and matplotlib is slow to import.
        from mocofast.plots import Bar

        return [Bar(p.name, 1e3 * p.seconds, p.floor and 1e3 * p.floor.seconds) for p in self.parts]

    def table(self) -> str:
        """Returns the profile as text."""
        head = ("ms", "share", "floor ms", "of it", "GFLOP", "MB", "GB/s")
        widths = (10, 8, 10, 7, 9, 9, 11)
        lines = [self.title]
        lines.append(" " * 18 + "".join(f"{name:>{width}}" for name, width in zip(head, widths)))
        # A row for every part, and a row for the step.
        for name, seconds, floor in self.parts:
            line = f"{name:18}{1e3 * seconds:10.3f}{seconds / self.seconds:8.1%}"
            if floor is not None:
                line += f"{1e3 * floor.seconds:10.3f}{floor.seconds / seconds:7.0%}"
                line += f"{floor.operations / 1e9:9.2f}{floor.bytes / 1e6:9.1f}"
                line += f"{floor.bandwidth / 1e9:11.1f}"
            lines.append(line)
        line = f"{'step':18}{1e3 * self.seconds:10.3f}{1:8.1%}"
        lines.append(f"{line}{1e3 * self.floor:10.3f}{self.floor / self.seconds:7.0%}")
        # What is measured without parts.
        counted = f"{self.operators:.0f} operators"
        if self.launches is not None:
            counted = f"{self.launches:.0f} launches"
        lines += [
            f"steps not timed by parts: {1e3 * self.whole:.3f} ms",
            f"{counted}, {self.synchronisations:.0f} host synchronisations a step",
            f"matrix rate measured in this run: {self.rate / 1e9:.1f} GFLOP/s",
        ]
        return "\n".join(lines)


class StepProfiler:
    """Profiles steps of a running training loop. Results of the loop stay the same.

    The loop calls begin() before it asks for a batch, and end() after the step. After `STEPS` steps
    end() measures the machine's rates, which takes a few seconds, and sets `profile`.

    method, optimizer, autocast: as used by the loop.
    config: the configuration of the method.
    """

    def __init__(
        self, method: Method, optimizer: FusedOptimizer, autocast: torch.autocast, config: Config
    ) -> None:
        self.profile: Profile | None = None
        self._method, self._optimizer = method, optimizer
        self._autocast, self._config = autocast, config
        self._device = next(method.parameters()).device
        self._recorder: Recorder | None = None
        self._traced: torch.profiler.profile | None = None
        self._count = 0
        self._steps: list[Step] = []  # timed as a whole, then timed by parts

    def begin(self) -> None:
        """Begins a step. Forgets a step that was begun and not ended."""
        if self.profile is not None or self._count < SKIPPED:
            return
        if self._count in (SKIPPED, SKIPPED + TIMED_WHOLE, SKIPPED + TIMED_WHOLE + TIMED_BY_PARTS):
            self._recorder = Recorder(self._device, timing=self._count == SKIPPED + TIMED_WHOLE)
        assert self._recorder is not None
        self._recorder.begin()

    def end(self) -> bool:
        """Ends the step. Returns whether the profile is now complete."""
        self._count += 1
        if self._recorder is None or self.profile is not None:
            return False
        step = self._recorder.end()
        if self._traced is None:
            self._steps.append(step)
        if self._count == SKIPPED + TIMED_WHOLE + TIMED_BY_PARTS:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._traced = torch.profiler.profile(activities=kinds, acc_events=True)
            self._traced.start()
        elif self._count == STEPS:
            assert self._traced is not None
            self._traced.stop()
            self.profile = self._profile(self._traced)
        return self.profile is not None

    def write(self, folder: Path) -> None:
        """Writes `FILES` into `folder`. Call after the profile is complete."""
        from mocofast.plots import plot_step, save_figure

        assert self.profile is not None and self._traced is not None
        operators = self._traced.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
        (folder / FILES[0]).write_text(
            f"{self.profile.table()}\n\n{__doc__}\n{operators}\n", "utf-8"
        )
        save_figure(plot_step(self.profile.bars(), self.profile.title), folder / FILES[1])
        self._traced.export_chrome_trace(str(folder / FILES[2]))

    def _profile(self, traced: torch.profiler.profile) -> Profile:
        """Returns the profile. traced: the profiler that traced the last steps."""
        # The middle half, by duration, of the steps that were timed by parts.
        steps = [seconds_by_part(step) for step in self._steps[TIMED_WHOLE:]]
        quarter = TIMED_BY_PARTS // 4
        middle = sorted(steps, key=lambda seconds: sum(seconds.values()))[quarter:-quarter]
        # Floors.
        works = self._works(self._steps[-1].images)
        rate = matrix_rate(self._device, self._autocast)
        parts = []
        for name in PARTS:
            if any(seconds[name] for seconds in middle):
                floor = Floor.measure(works[name], rate, self._device) if name in works else None
                mean = sum(seconds[name] for seconds in middle) / len(middle)
                parts.append(Part(name, mean, floor))
        # Steps that were timed as a whole.
        whole = sorted(step.spans()[-1].end for step in self._steps[:TIMED_WHOLE])
        calls = count_calls(traced, self._device)
        return Profile(self._title(), parts, whole[TIMED_WHOLE // 2], rate, *calls)

    def _works(self, images: Mapping[tuple[str, Size], int]) -> dict[str, list[Work]]:
        """Returns {part: work}, layer by layer. images: {(part, size): images encoded}."""
        works: dict[str, list[Work]] = {}
        channels, queries = self._config.data.channels, 0
        encoders: dict[str, nn.Module | None] = {
            name: getattr(self._method, encoder, None) for encoder, name in FORWARD.items()
        }
        for (name, size), count in images.items():
            if not count or (encoder := encoders.get(name)) is None:
                continue
            forward, backward = encoder_work(encoder, count, size, self._autocast, channels)
            works.setdefault(name, []).extend(forward)
            if name == FORWARD["encoder_q"]:
                works.setdefault("backward", []).extend(backward)
                queries += count
        queue = getattr(self._method, "queue", None)
        if isinstance(queue, Tensor) and queue.dim() == 2:
            works["loss"] = [Work(4 * queries * queue.numel(), queue.numel() * queue.itemsize)]
        works["optimiser and EMA"] = [Work(0, self._optimizer.traffic())]
        return works

    def _title(self) -> str:
        c, threads = self._config, torch.get_num_threads()
        where = f"{threads} thread{'s' * (threads > 1)} of a CPU"
        if self._device.type == "cuda":
            where = torch.cuda.get_device_name(self._device)
        dtype = short_name(self._autocast)
        size = pixels_text(c.augment.size)
        return f"{c.model.arch}, {size} px, batch {c.data.batch_size}, {dtype}, {where}"


def seconds_by_part(step: Step) -> Counter[str]:
    """Returns {part: seconds}. The sum is the time of the step."""
    seconds: Counter[str] = Counter()
    for name, start, end in step.spans():
        # On a GPU, two streams can work at once: a span is negative if a stream started before
        # the previous part on the other stream ended.
        part = name if end >= start else OVERLAP
        seconds[part] += end - start  # type: ignore[assignment]  # a Counter of floats
    return seconds


def count_calls(
    traced: torch.profiler.profile, device: torch.device
) -> tuple[float | None, float, float]:
    """Returns launches (None on a CPU), operators and waits of the host, per traced step."""
    events = traced.events()
    assert events is not None
    called = [event for event in events if event.device_type == DeviceType.CPU]
    steps = [event.time_range for event in called if event.name == STEP]
    called = [
        e for e in called if any(step.start <= e.time_range.start <= step.end for step in steps)
    ]
    names = [event.name for event in called]
    cuda = device.type == "cuda"
    waits = WAITING_CALLS if cuda else tuple(f"aten::{name}" for name in WAITING)
    launches = sum(any(kind in name for kind in LAUNCHES) for name in names)
    # An operator called by another operator does not count.
    operators = sum(
        _is_operator(e) and not (e.cpu_parent and _is_operator(e.cpu_parent)) for e in called
    )
    waited = sum(name in waits for name in names)
    return launches / TRACED if cuda else None, operators / TRACED, waited / TRACED


def _is_operator(event: Any) -> bool:
    return event.name.startswith(("aten::", "mocofast::"))


# ---- floors ----


def matrix_rate(device: torch.device, autocast: torch.autocast) -> float:
    """Returns operations a second of a matrix product or a convolution: the higher rate.

    autocast: the precision of the encoders, which gives the dtype.
    """
    cuda = device.type == "cuda"
    dtype = autocast.fast_dtype if autocast._enabled else torch.float32
    side, images, pixels = (8192, 256, 28) if cuda else (1024, 8, 14)
    channels = 256
    # The operands are random, because zeros need less power and run faster on GPUs. A separate
    # generator leaves the run's generator unchanged.
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    a, b = random(side, side), random(side, side)
    x = random(images, channels, pixels, pixels).to(memory_format=torch.channels_last)
    weight = random(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    product = _best(lambda: a @ b, device)
    convolution = _best(lambda: nn.functional.conv2d(x, weight, padding=1), device)
    return max(2 * side**3 / product, 2 * images * pixels**2 * channels**2 * 9 / convolution)


def memory_bandwidth(size: int, device: torch.device) -> float:
    """Returns bytes a second, read + written, of a copy or an update in place: the higher rate.

    Small passes are faster: they fit a cache.

    size: bytes read + written, at most 1 GiB.
    """
    passes = memory_passes(max(8, min(size, 2**30)), device)
    return max(moved / _best(function, device) for function, moved in passes.values())


def memory_passes(size: int, device: torch.device) -> dict[str, tuple[Callable[[], Any], int]]:
    """Returns passes over `size` bytes of memory, and the bytes that a call reads and writes.

    A CPU reads the lines that a copy writes, too. So an update in place moves more bytes a second.
    """
    values = torch.ones(2, size // 8, device=device)
    return {
        "copy": (lambda: values[1].copy_(values[0]), 4 * values.numel()),
        "update": (lambda: values.mul_(1.0), 8 * values.numel()),
    }


def _best(function: Callable[[], Any], device: torch.device) -> float:
    """Returns the seconds of the fastest of 10 calls."""
    times = []
    for _ in range(10):
        recorder = Recorder(device)
        recorder.begin()
        function()
        times.append(recorder.end().spans()[-1].end)
    return min(times)
