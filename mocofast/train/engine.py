"""The step engine runs the encoders and launches the steps, as `engine.mode` chooses.

eager: op by op.
compile: torch.compile compiles every encoder together with the normalisation of its images.
    Views of every size that a run makes are compiled once, small views together with the large.
graph: as compile, and the whole step (all micro-batches, average over ranks, optimiser, momentum
    encoder, queue) is one CUDA graph with one launch. Work that needs the host (MoCo's shuffle,
    scheduled numbers) is done before the step, into fixed buffers. Another size of the views
    makes another graph.
All modes give the same trajectory, to rounding.

Under bf16 autocast, in every mode, encoders read bf16 shadows of their weights. The optimiser
writes the shadows when it updates the weights. Without shadows autocast converts every weight at
every step.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from mocofast_kernels.cpu_convolution import convolves
from mocofast_kernels.cpu_ghost_bn import normalises
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mocofast import step_parts
from mocofast.config import ConfigError
from mocofast.distributed import rank_and_world_size, shares_of, sharing
from mocofast.methods.base import Method
from mocofast.ops.local import is_dtensor
from mocofast.optim.fused import FusedOptimizer
from mocofast.shares import Shares
from mocofast.train.encoder_run import encoder_run, make_shadows
from mocofast.train.metrics import StepMetrics
from mocofast.train.step import FlatGradients, train_step

# Steps before a capture, in which libraries choose algorithms and allocate, and kernels are loaded.
STEPS_BEFORE_CAPTURE = 3
# Below this many pixels of a micro-batch both encoders run on two streams. Above it one encoder
# fills the GPU.
TWO_STREAMS = 64 * 224 * 224


def choose_mode(
    name: str, device: torch.device, world_size: int, sharded: bool = False
) -> tuple[str, str]:
    """Returns the mode that `engine.mode` means on this device, and the reason.

    sharded: the model is sharded over the ranks.
    Raises ConfigError for a mode that the device or a sharded model cannot take.
    """
    if sharded:
        if name in ("compile", "graph"):
            raise ConfigError(
                f"engine.mode: {name} does not know the parts of a sharded model; "
                "--engine.mode eager works, and so does --engine.parallel ddp"
            )
        return (
            "eager",
            f"weights, momentum encoder and optimiser are sharded over {world_size} ranks",
        )
    compiles = device.type != "cuda" or importlib.util.find_spec("triton") is not None
    if name == "graph" and device.type != "cuda":
        raise ConfigError(
            f"engine.mode: graph is a CUDA graph and needs a GPU; {device} takes eager or compile"
        )
    if name in ("compile", "graph") and not compiles:
        raise ConfigError(
            f"engine.mode: {name} needs Triton (pip install triton), which is not installed"
        )
    if name != "auto":
        return name, "as asked"
    if device.type != "cuda":
        if convolves(torch.float32):
            layers = "convolutions" + " and BatchNorm" * normalises(torch.float32)
            return "eager", (
                f"{layers} run in C, which torch.compile would replace (--engine.mode compile)"
            )
        return "eager", (
            "compiling takes a minute, which pays only in a long run on a CPU "
            "(--engine.mode compile)"
        )
    if not compiles:
        return "eager", "Triton, which compiles encoders, is missing: pip install triton"
    if world_size > 1:
        return "compile", "DistributedDataParallel sends gradients while the rest is computed"
    # A failed capture ends the run, and no GPU has run this step yet: graph is not the default.
    return "compile", "compiled encoders; --engine.mode graph also makes the step one launch"


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Stops automatic garbage collection inside the block.

    A collection stops the host for longer than a step takes. Call gc.collect() where a pause does
    not matter.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # later collections skip the objects of the set-up
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


class Engine:
    """Steps of a method.

    mode: "eager", "compile" or "graph". On a CPU "graph" runs the step that would be captured.
    method: a method on its device. The engine chooses how its encoders run and, with several ranks,
        wraps it in DistributedDataParallel (graph: averages the gradients itself). A method of
        `mocofast.train.sharding` runs as it is, in the mode "eager".
    optimizer: made by `optimizer_of`. Load the state of method and optimiser before.
    autocast: the precision of the forward passes.
    accumulate: micro-batches per step.
    images: images per micro-batch on this rank. A smaller last batch of an epoch is neither
        compiled nor captured.
    backend: torch.compile's backend. None leaves the encoders as they are.
    scaler: of the loss, see `mocofast.device.loss_scaler`. Not with "graph".
    shares: images of every rank in a whole batch. None: equally many.
    """

    def __init__(
        self,
        mode: str,
        method: Method,
        optimizer: FusedOptimizer,
        autocast: torch.autocast,
        accumulate: int,
        images: int,
        backend: str | Callable[..., Any] | None = "inductor",
        scaler: torch.amp.GradScaler | None = None,
        shares: Shares | None = None,
    ) -> None:
        self.mode, self.method, self.optimizer, self.autocast = mode, method, optimizer, autocast
        self._accumulate, self._images, self._scaler = accumulate, images, scaler
        self._shares = shares or Shares((images * accumulate,) * rank_and_world_size()[1])
        self._device = next(method.parameters()).device
        self._model: nn.Module = method
        # ViTs that leave out patches.
        self._dropping: list[Any] = [
            module for module in method.modules() if getattr(module, "token_dropout", 0)
        ]
        self._gradients = FlatGradients(method.parameters()) if mode == "graph" else None
        sharded = is_dtensor(next(method.parameters()))  # FSDP2 joins the ranks
        if rank_and_world_size()[1] > 1 and not sharded:
            self._join_ranks()
        for name in () if sharded else step_parts.FORWARD:
            if isinstance(getattr(method, name, None), nn.Module):
                self._choose_run(name, None if mode == "eager" else backend)
        self._buffers: _Batch | None = None  # the fixed buffers that a captured step reads
        # A captured step reads the numbers of schedules on the device.
        self._numbers = _Numbers(method, optimizer, self._device) if mode == "graph" else None
        self._stream = (
            torch.cuda.Stream() if mode == "graph" and self._device.type == "cuda" else None
        )
        self._warmed = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._metrics: StepMetrics | None = None

    def set_scheduled(self, step: int, total_steps: int, rate: float) -> None:
        """Sets the numbers of the next step: the learning rate, and what the method schedules.

        step: number of the step, from 0.
        """
        for encoder in self._dropping:
            encoder.begin_step(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for name, schedule in self.method.schedules.items():
            setattr(self.method, name, schedule(step, total_steps))
        self.optimizer.ema_momentum = self.method.momentum

    def step(
        self,
        views: tuple[Tensor, ...],
        fields: Mapping[str, Tensor] = MappingProxyType({}),
        update: bool = True,
        shares: Shares | None = None,
    ) -> StepMetrics:
        """Makes one optimiser step on this rank's slice of a batch (see `train_step`).

        update: False only fills the queue.
        shares: images of every rank. None: as in a whole batch, or equally many.
        Returns the metrics. The next step may overwrite them.
        """
        fixed = self._gradients is not None
        if shares is None:
            whole = len(views[0]) == self._images * self._accumulate
            shares = self._shares if whole else shares_of(len(views[0]))
        batch = _Batch(views, dict(fields), self._step_inputs(views, shares) if fixed else [])
        if not fixed or not update or shares != self._shares:
            return self._train(batch, shares, update)
        # Copy everything that the step reads into the fixed buffers. Views of another size need
        # other buffers and another capture.
        shapes = [view.shape for view in views]
        if self._buffers is None or [view.shape for view in self._buffers.views] != shapes:
            self._graph = self._metrics = None  # before the new buffers, to free the memory
            self._warmed, self._buffers = 0, batch.empty_like()
            small = views[0][:, 0].numel() <= TWO_STREAMS * self._accumulate
            two = self._stream is not None and small
            self.method.second_stream = torch.cuda.Stream() if two else None
        for buffer, tensor in zip(self._buffers.tensors(), batch.tensors()):
            buffer.copy_(tensor, non_blocking=True)
        assert self._numbers is not None
        self._numbers.to_device()
        if self._stream is None:
            return self._train_on_buffers()
        # Parts of a graph cannot be timed, so a timed step runs without the graph. With several
        # ranks the graph stays, because all ranks must launch collectives in the same way.
        timed = step_parts.timed() and rank_and_world_size()[1] == 1
        if self._warmed >= STEPS_BEFORE_CAPTURE and not timed:
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()
            assert self._metrics is not None
            return self._metrics
        # Warm up on the stream of the capture, because memory and libraries belong to streams.
        self._warmed += 1
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            metrics = self._train_on_buffers()
        current.wait_stream(self._stream)
        return metrics

    def _choose_run(self, name: str, backend: str | Callable[..., Any] | None) -> None:
        """Chooses how the encoder `name` runs in training."""
        encoder = getattr(self.method, name)
        shadows = make_shadows(encoder, self.autocast)
        self.optimizer.write_shadows(dict(shadows.values()))
        if shadows or backend is not None:
            self.method.run[name] = encoder_run(
                name,
                encoder,
                self.method.normalize_pixels,
                shadows,
                self._images,
                backend,
                in_place=self._gradients is not None,
            )

    def _join_ranks(self) -> None:
        """Takes rank 0's parameters, and makes ranks average their gradients."""
        if self._gradients is not None:
            for p in self.method.parameters():
                dist.broadcast(p.detach(), 0)
            return
        # No broadcast of buffers: every rank keeps own BatchNorm statistics, and all queues are
        # equal already.
        self._model = DistributedDataParallel(
            self.method,
            device_ids=[self._device.index] if self._device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    # ---- the captured step ----

    def _step_inputs(self, views: tuple[Tensor, ...], shares: Shares) -> list[tuple[Tensor, ...]]:
        """Does the host-side work of a step. Returns the results, one per micro-batch."""
        parts, inputs = shares.micro_batches(self._accumulate), []
        sizes = [part.counts[rank_and_world_size()[0]] for part in parts]
        for part, micro_batch in zip(parts, zip(*(view.split(sizes) for view in views))):
            with torch.no_grad(), self.autocast, sharing(part):
                inputs.append(self.method.prepare_step(*micro_batch))
        return inputs

    def _train(self, batch: _Batch, shares: Shares, update: bool = True) -> StepMetrics:
        return train_step(
            self._model,
            batch.views,
            self.optimizer,
            self._accumulate,
            self.autocast,
            batch.fields,
            step_inputs=batch.step_inputs,
            gradients=self._gradients,
            update=update,
            scaler=self._scaler,
            shares=shares,
        )

    def _train_on_buffers(self) -> StepMetrics:
        """Trains on the fixed buffers. No launch depends on a value that only the host knows."""
        assert self._buffers is not None and self._numbers is not None
        with self._numbers.on_device():
            return self._train(self._buffers, self._shares)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Captures the step on the fixed buffers, without running the step."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (loaders that pin memory, NCCL's watchdog) may use the GPU meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._metrics = self._train_on_buffers()
        except RuntimeError as error:
            # The end of the capture raises, too. The context is the first error, the cause.
            raise ConfigError(
                "engine.mode: this step cannot be captured in a CUDA graph; "
                "--engine.mode compile needs no graph "
                f"({error.__context__ or error})"
            ) from error
        return graph


class _Numbers:
    """The numbers that schedules change: learning rates, EMA momentum, and the method's numbers.

    The device copies are 0-d tensors at fixed addresses, which a captured step reads.
    """

    def __init__(self, method: Method, optimizer: FusedOptimizer, device: torch.device) -> None:
        self._method, self._optimizer = method, optimizer
        optimizer_numbers = len(optimizer.param_groups) + 1
        types = [torch.float64] * optimizer_numbers + [torch.float32] * len(method.schedules)
        self._tensors = [torch.zeros((), dtype=dtype, device=device) for dtype in types]
        self._known: list[float] = [0.0] * len(self._tensors)

    def to_device(self) -> None:
        """Copies the numbers that changed. Most schedules change once an epoch."""
        numbers = [float(number) for number in self._read()]
        for tensor, number, known in zip(self._tensors, numbers, self._known):
            if number != known:
                tensor.fill_(number)
        self._known = numbers

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Puts the device copies in the place of the numbers inside the block."""
        numbers = self._read()
        self._write(self._tensors)
        try:
            yield
        finally:
            self._write(numbers)  # a state dict holds floats

    def _read(self) -> list[Any]:
        rates = [group["lr"] for group in self._optimizer.param_groups]
        scheduled = [getattr(self._method, name) for name in self._method.schedules]
        return [*rates, self._optimizer.ema_momentum, *scheduled]

    def _write(self, numbers: Sequence[Any]) -> None:
        rates = len(self._optimizer.param_groups)
        for group, rate in zip(self._optimizer.param_groups, numbers):
            group["lr"] = rate
        self._optimizer.ema_momentum = numbers[rates]
        for name, number in zip(self._method.schedules, numbers[rates + 1 :]):
            setattr(self._method, name, number)


class _Batch(NamedTuple):
    """The inputs of a step."""

    views: tuple[Tensor, ...]
    fields: dict[str, Tensor]
    step_inputs: list[tuple[Tensor, ...]]  # one per micro-batch; empty if forward() prepares them

    def tensors(self) -> list[Tensor]:
        inputs = [tensor for micro_batch in self.step_inputs for tensor in micro_batch]
        return [*self.views, *self.fields.values(), *inputs]

    def empty_like(self) -> _Batch:
        """Makes buffers of the same shapes, types and memory formats."""
        return _Batch(
            tuple(map(torch.empty_like, self.views)),
            {name: torch.empty_like(tensor) for name, tensor in self.fields.items()},
            [tuple(map(torch.empty_like, inputs)) for inputs in self.step_inputs],
        )
