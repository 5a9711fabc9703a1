"""Where the time of a training step goes: a table and a picture of one step beside what the machine could do, and a
trace.

Times: the mean of the middle half, by duration, of the steps that are timed part by part. "data wait" is the loop's
own; the all-reduce that DistributedDataParallel does during "backward" is in there, "communication" is what the step
itself waits for. A step launched as one CUDA graph is launched op by op while its parts are timed.

Floors: a part cannot be faster than its operations at the machine's rate, nor than its bytes at the machine's copy
bandwidth; both rates are the best of a few measurements in the same run. Of the encoders, every convolution, matrix
product, attention and normalisation counts by itself, with the longer of the two times: operations as torch's
FlopCounterMode counts them, bytes of everything that it takes and gives, once; all else is taken to be free (done on
the way by one of these). Of MoCo's loss: 4 N K C operations, and the queue once. Of the optimiser: parameters, their
state and average read and written, gradients read, copies written.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mocofast.config import Config
from mocofast.methods.base import Method
from mocofast.optim.fused import FusedOptimizer
from mocofast.step_parts import FORWARD, OTHER, OVERLAP, STEP, Recorder, Step

if TYPE_CHECKING:
    from mocofast.plots import Bar

# In the order of a step.
PARTS = (
    "data wait", "key forward", "query forward", "loss", "backward", "optimiser and EMA", "communication",
    OTHER, OVERLAP,
)  # fmt: skip
FILES = ("profile.txt", "profile.png", "trace.json.gz")
WARM_UP, WHOLE, TIMED, TRACED = (
    10,
    4,
    12,
    2,
)  # steps: not looked at, timed as a whole, by parts, and traced
STEPS = WARM_UP + WHOLE + TIMED + TRACED

# Operators that make the host wait for a GPU, as a CPU names them too; and CUDA's calls that wait or launch.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
WAITING_CALLS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
)
LAUNCHES = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")


class Work(NamedTuple):
    """What a layer has to do."""

    operations: int  # a multiply-add is two
    bytes: int


class Floor(NamedTuple):
    """What a part has to do, and the least time for it."""

    seconds: float
    operations: int
    bytes: int
    bandwidth: float  # bytes a second of a copy as large as its largest layer, read and written

    @classmethod
    def of(cls, layers: list[Work], rate: float, device: torch.device) -> Floor:
        """rate: operations a second. Measures the bandwidth."""
        bandwidth = copy_bandwidth(max(layer.bytes for layer in layers), device)
        seconds = sum(max(layer.operations / rate, layer.bytes / bandwidth) for layer in layers)
        return cls(
            seconds, sum(w.operations for w in layers), sum(w.bytes for w in layers), bandwidth
        )


class Part(NamedTuple):
    """A row of the table. Of one step."""

    name: str
    seconds: float
    floor: Floor | None  # None where nothing is said of it


class Profile(NamedTuple):
    """One step."""

    title: str
    parts: list[Part]  # in the order of the step; seconds add up to its time
    whole: float  # seconds of a step that was not timed by parts
    rate: float  # operations a second, in the better of a matrix product and a convolution
    launches: float | None  # of a step, on a GPU
    operators: float  # called by Python or autograd
    synchronisations: float  # of the host with the device

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def floor(self) -> float:
        return sum(part.floor.seconds for part in self.parts if part.floor is not None)

    def bars(self) -> list[Bar]:
        """For the picture."""
        from mocofast.plots import (
            Bar,
        )  # here, so that benchmarks' processes start without matplotlib

        return [Bar(p.name, 1e3 * p.seconds, p.floor and 1e3 * p.floor.seconds) for p in self.parts]

    def table(self) -> str:
        """For people."""
        lines = [self.title]
        lines.append(
            f"{'':18}{'ms':>10}{'share':>8}{'floor ms':>10}{'of it':>7}{'GFLOP':>9}{'MB':>9}{'copy GB/s':>11}"
        )
        for name, seconds, floor in self.parts:
            line = f"{name:18}{1e3 * seconds:10.3f}{seconds / self.seconds:8.1%}"
            if floor is not None:
                line += f"{1e3 * floor.seconds:10.3f}{floor.seconds / seconds:7.0%}{floor.operations / 1e9:9.2f}"
                line += f"{floor.bytes / 1e6:9.1f}{floor.bandwidth / 1e9:11.1f}"
            lines.append(line)
        line = f"{'step':18}{1e3 * self.seconds:10.3f}{1:8.1%}{1e3 * self.floor:10.3f}{self.floor / self.seconds:7.0%}"
        counted = (
            f"{self.operators:.0f} operators"
            if self.launches is None
            else f"{self.launches:.0f} launches"
        )
        return "\n".join(
            [
                *lines,
                line,
                f"steps not timed by parts: {1e3 * self.whole:.3f} ms",
                f"{counted}, {self.synchronisations:.0f} host synchronisations a step",
                f"matrix rate measured in this run: {self.rate / 1e9:.1f} GFLOP/s",
            ]
        )


class StepProfiler:
    """Profiles steps of a running loop, without a change to what they compute.

    The loop calls begin() where it asks for a batch, and end() after the step; after `WARM_UP` and the steps to look
    at, end() takes a few seconds for the machine's rates, and `profile` is there.
    method, optimizer, autocast: as the steps have them; config: what they were made of.
    """

    def __init__(
        self, method: Method, optimizer: FusedOptimizer, autocast: torch.autocast, config: Config
    ) -> None:
        self.profile: Profile | None = None
        self._method, self._optimizer, self._autocast, self._config = (
            method,
            optimizer,
            autocast,
            config,
        )
        self._device = next(method.parameters()).device
        self._recorder: Recorder | None = None
        self._traced: torch.profiler.profile | None = None
        self._count = 0
        self._steps: list[Step] = []  # those timed as a whole, and then those timed by parts

    def begin(self) -> None:
        """A step begins. One begun before and not ended is forgotten."""
        if self.profile is not None or self._count < WARM_UP:
            return
        if self._count in (WARM_UP, WARM_UP + WHOLE, WARM_UP + WHOLE + TIMED):
            self._recorder = Recorder(self._device, timing=self._count == WARM_UP + WHOLE)
        assert self._recorder is not None
        self._recorder.begin()

    def end(self) -> bool:
        """It ended; returns whether that completes the profile."""
        self._count += 1
        if self._recorder is None or self.profile is not None:
            return False
        step = self._recorder.end()
        if self._traced is None:
            self._steps.append(step)
        if self._count == WARM_UP + WHOLE + TIMED:
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

    def abandon(self) -> None:
        """The step that was begun does not take place."""
        if self._recorder is not None:
            self._recorder.end()

    def write(self, folder: Path) -> None:
        """`FILES`, of a profile that is there."""
        from mocofast.plots import plot_step

        assert self.profile is not None and self._traced is not None
        operators = self._traced.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
        (folder / FILES[0]).write_text(
            f"{self.profile.table()}\n\n{__doc__}\n{operators}\n", "utf-8"
        )
        plot_step(self.profile.bars(), self.profile.title).savefig(folder / FILES[1])
        self._traced.export_chrome_trace(str(folder / FILES[2]))

    def _profile(self, traced: torch.profiler.profile) -> Profile:
        steps = [seconds_by_part(step) for step in self._steps[WHOLE:]]
        middle = sorted(steps, key=lambda seconds: sum(seconds.values()))[
            TIMED // 4 : TIMED - TIMED // 4
        ]
        works = self._works(self._steps[-1].images)
        rate = matrix_rate(self._device, self._autocast)
        parts = []
        for name in PARTS:
            if any(seconds[name] for seconds in middle):
                floor = Floor.of(works[name], rate, self._device) if name in works else None
                parts.append(
                    Part(name, sum(seconds[name] for seconds in middle) / len(middle), floor)
                )
        return Profile(
            self._title(),
            parts,
            sorted(step.spans()[-1].end for step in self._steps[:WHOLE])[WHOLE // 2],
            rate,
            *counts(traced, self._device),
        )

    def _works(self, images: Mapping[str, int]) -> dict[str, list[Work]]:
        """By part, what it has to do, layer by layer where it has layers."""
        works: dict[str, list[Work]] = {}
        for encoder, name in FORWARD.items():
            count, module = images.get(name, 0), getattr(self._method, encoder, None)
            if not count or module is None:
                continue
            forward, backward = encoder_work(
                module, count, self._config.augment.size, self._autocast
            )
            works[name] = forward
            if encoder == "encoder_q":
                works["backward"] = backward
        queue = getattr(self._method, "queue", None)
        if isinstance(queue, Tensor) and queue.dim() == 2:
            queries = images.get(FORWARD["encoder_q"], 0)
            works["loss"] = [Work(4 * queries * queue.numel(), queue.numel() * queue.itemsize)]
        works["optimiser and EMA"] = [Work(0, self._optimizer.traffic())]
        return works

    def _title(self) -> str:
        c, threads = self._config, torch.get_num_threads()
        where = f"{threads} thread{'s' * (threads > 1)} of a CPU"
        if self._device.type == "cuda":
            where = torch.cuda.get_device_name(self._device)
        dtype = "bf16" if self._autocast._enabled else "fp32"
        return f"{c.model.arch}, {c.augment.size} px, batch {c.data.batch_size}, {dtype}, {where}"


def seconds_by_part(step: Step) -> Counter[str]:
    """Seconds of each part; they add up to the step."""
    seconds: Counter[str] = Counter()
    for name, start, end in step.spans():
        # On a GPU a span goes backwards where one stream's work began before another's ended.
        seconds[name if end >= start else OVERLAP] += end - start  # type: ignore[assignment]  # a float counts, too
    return seconds


def counts(
    traced: torch.profiler.profile, device: torch.device
) -> tuple[float | None, float, float]:
    """Launches (on a GPU), operators and waits of the host, in one of the steps that were traced."""
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
    return (
        sum(any(kind in name for kind in LAUNCHES) for name in names) / TRACED if cuda else None,
        sum(_is_operator(e) and not (e.cpu_parent and _is_operator(e.cpu_parent)) for e in called)
        / TRACED,
        sum(name in waits for name in names) / TRACED,
    )


def _is_operator(event: Any) -> bool:
    return event.name.startswith(("aten::", "mocofast::"))


# ---- floors ----


def encoder_work(
    encoder: nn.Module, images: int, size: int, autocast: torch.autocast
) -> tuple[list[Work], list[Work]]:
    """The layers of a forward pass for `images` images of size x size pixels, and of its backward pass, if it is
    trained. Nothing is computed, and the encoder stays as it is."""
    # In eval mode layers move the same bytes, and none of them exchanges statistics with other ranks.
    plain = copy.deepcopy(encoder).eval()
    device = next(plain.parameters()).device
    with FakeTensorMode() as fake, _Layers() as layers, autocast:
        tensors: dict[str, Tensor] = {
            name: fake.from_tensor(tensor)
            for name, tensor in plain.state_dict(keep_vars=True).items()
        }
        given = torch.empty(images, 3, size, size, device=device).to(
            memory_format=torch.channels_last
        )
        output = functional_call(plain, tensors, (given,))
        forward, layers.work = layers.work, []
        trained = [tensor for tensor in tensors.values() if tensor.requires_grad]
        if trained:
            torch.autograd.grad(output, trained, torch.empty_like(output), allow_unused=True)
    return forward, layers.work


class _Layers(TorchDispatchMode):
    """The work of every convolution, matrix product, attention and normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        count = flop_registry.get(function.overloadpacket)
        if count is not None or "_norm" in str(function):
            tensors = [
                leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)
            ]
            moved = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
            self.work.append(Work(count(*args, **kwargs, out_val=result) if count else 0, moved))
        return result


def matrix_rate(device: torch.device, autocast: torch.autocast) -> float:
    """Operations a second in the better of a matrix product and a convolution, of the type encoders compute in."""
    cuda = device.type == "cuda"
    dtype = autocast.fast_dtype if autocast._enabled else torch.float32
    side, images, pixels = (8192, 256, 28) if cuda else (1024, 8, 14)
    channels = 256
    # Random: zeros draw less power and run faster on GPUs. A generator of its own: the run's stays as it is.
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    a, b = random(side, side), random(side, side)
    x = random(images, channels, pixels, pixels).to(memory_format=torch.channels_last)
    weight = random(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    product = _best(lambda: a @ b, device)
    convolution = _best(lambda: nn.functional.conv2d(x, weight, padding=1), device)
    return max(2 * side**3 / product, 2 * images * pixels**2 * channels**2 * 9 / convolution)


def copy_bandwidth(size: int, device: torch.device) -> float:
    """Bytes a second that a copy reads and writes, `size` together, at most 1 GiB: what fits a cache is faster."""
    source = torch.ones(max(1, min(size, 2**30) // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / _best(lambda: target.copy_(source), device)


def _best(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(10):
        recorder = Recorder(device)
        recorder.begin()
        function()
        times.append(recorder.end().spans()[-1].end)
    return min(times)
