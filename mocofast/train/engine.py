"""The step engine: how encoders are run and how a step is launched, which `engine.mode` chooses.

eager: op by op. compile: each encoder, with the normalisation of its images, by torch.compile, as code of its own.
graph: besides, the whole step (every micro-batch, the average over ranks, optimiser, momentum encoder, queue) is one
CUDA graph, launched at once; what needs the host (MoCo's shuffle, the rates) is done before it, into tensors that
stay where they are. All modes give one trajectory, to rounding.

Under bf16 autocast, in any mode, encoders read bf16 shadows of their weights, which the optimiser writes when it
updates these, where autocast would convert every weight at every step.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import types
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel

from mocofast import step_parts
from mocofast.config import ConfigError
from mocofast.distributed import rank_and_world_size
from mocofast.methods.base import Method
from mocofast.optim.fused import FusedOptimizer
from mocofast.train.step import FlatGradients, train_step

WARM_UP = 3  # steps before a capture: libraries choose algorithms and allocate, kernels are loaded
# Pixels of a micro-batch up to which keys are encoded beside queries: above, either one fills a GPU alone.
BESIDE = 64 * 224 * 224

# Modules whose weights autocast converts wherever they are used, and the names of these.
_CONVERTED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Linear,
    NonDynamicallyQuantizableLinear,
    nn.MultiheadAttention,
)
_WEIGHTS = ("weight", "bias", "in_proj_weight", "in_proj_bias")


def choose_mode(name: str, device: torch.device, world_size: int) -> tuple[str, str]:
    """The mode that `engine.mode` means on this device, and why; ConfigError for one that it cannot take."""
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
        return (
            "eager",
            "compiling takes a minute, which only a long run on a CPU wins back (--engine.mode compile)",
        )
    if not compiles:
        return "eager", "Triton is missing, which compiles encoders: pip install triton"
    if world_size > 1:
        return "compile", "DistributedDataParallel sends gradients while others are computed"
    # A step that cannot be captured ends the run, and no GPU has run this one yet: nobody gets it unasked.
    return "compile", "compiled encoders; --engine.mode graph also makes the step one launch"


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """No garbage collection by itself inside: it stops the host for longer than a step takes. Call gc.collect() where
    waiting does not matter."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is there by now stays; later collections need not look at it
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


class Engine:
    """Steps of a method.

    mode: "eager", "compile" or "graph" (on a CPU the very step that would be captured, launched op by op).
    method: on its device, with the weights to start from; the engine chooses how its encoders are run and, where
    there are ranks, wraps it in DistributedDataParallel (graph: averages gradients itself). optimizer: of
    `optimizer_of`; no state may be loaded into it or the method from here on. accumulate: micro-batches a step.
    images: of one of them on this rank; nothing is compiled or captured for an epoch's smaller last batch. backend:
    torch.compile's; None leaves encoders as they are.
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
    ) -> None:
        self.mode, self.method, self.optimizer, self.autocast = mode, method, optimizer, autocast
        self._accumulate, self._images = accumulate, images
        self._device = next(method.parameters()).device
        self._model: nn.Module = method
        self._gradients = FlatGradients(method.parameters()) if mode == "graph" else None
        if rank_and_world_size()[1] > 1:
            self._join_ranks()
        for name in step_parts.FORWARD:
            if isinstance(getattr(method, name, None), nn.Module):
                self._replace_run(name, None if mode == "eager" else backend)
        self._static: _Batch | None = None
        self._numbers = [
            torch.zeros((), dtype=torch.float64, device=self._device) for _ in self._host_numbers()
        ]
        self._known: list[float] = [0.0] * len(self._numbers)
        self._stream = (
            torch.cuda.Stream() if mode == "graph" and self._device.type == "cuda" else None
        )
        self._warmed = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._metrics: Tensor | None = None

    def step(
        self, views: tuple[Tensor, ...], fields: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Tensor:
        """One optimiser step on this rank's part of a batch, as `train_step` has it, with the optimiser's present
        rates and momentum; returns its metrics (3,), which the next step may overwrite."""
        static = self._gradients is not None
        batch = _Batch(views, dict(fields), self._step_inputs(views) if static else [])
        if not static or len(views[0]) != self._images * self._accumulate:
            return self._train(batch)
        if self._static is None:
            self._static = batch.empty_like()
            if self._stream is not None and views[0][:, 0].numel() <= BESIDE * self._accumulate:
                self.method.second_stream = torch.cuda.Stream()
        for fixed, tensor in zip(self._static.tensors(), batch.tensors()):
            fixed.copy_(tensor, non_blocking=True)
        self._set_numbers()
        if self._stream is None:
            return self._train_static()
        # Inside a graph nothing can be timed; but ranks launch collectives all captured or all not.
        if self._warmed >= WARM_UP and (rank_and_world_size()[1] > 1 or not step_parts.timed()):
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()
            assert self._metrics is not None
            return self._metrics
        self._warmed += 1
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(
            self._stream
        ):  # where the capture will be: memory and libraries know streams
            metrics = self._train_static()
        current.wait_stream(self._stream)
        return metrics

    # ---- encoders ----

    def _shadows(self, encoder: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """By path, the weights that autocast would convert, and copies in its type; none without autocast."""
        if not self.autocast._enabled:
            return {}
        return {
            f"{path}.{name}".lstrip("."): (weight, weight.detach().to(self.autocast.fast_dtype))
            for path, module in encoder.named_modules()
            if type(module) in _CONVERTED
            for name, weight in module.named_parameters(recurse=False)
            if name in _WEIGHTS and weight.dtype == torch.float32
        }

    def _replace_run(self, name: str, backend: str | Callable[..., Any] | None) -> None:
        """How the encoder `name` is run on images (N, 3, S, S), uint8 or normalised."""
        encoder, prepared, full = getattr(self.method, name), self.method.prepared, self._images
        shadows, in_place = self._shadows(encoder), self._gradients is not None
        self.optimizer.write_shadows(dict(shadows.values()))
        if not shadows and backend is None:
            return  # as the method has it

        def call(weights: dict[str, Tensor], images: Tensor) -> Tensor:
            return functional_call(encoder, weights, (prepared(images),))

        compiled = call
        if backend is not None:
            # torch.compile keeps what it compiled by code object, and both encoders would share this one.
            own = types.FunctionType(
                call.__code__.replace(co_name=f"run_{name}"),
                call.__globals__,
                f"run_{name}",
                None,
                call.__closure__,
            )
            compiled = torch.compile(own, backend=backend, dynamic=False)

        def run(images: Tensor) -> Tensor:
            tracked = torch.is_grad_enabled()
            weights = {
                path: _Shadow.apply(weight, shadow, in_place)
                if tracked and weight.requires_grad
                else shadow
                for path, (weight, shadow) in shadows.items()
            }
            return (call if len(images) % full else compiled)(weights, images)

        self.method.run[name] = run

    def _join_ranks(self) -> None:
        if self._gradients is not None:
            for p in self.method.parameters():
                dist.broadcast(p.detach(), 0)
            return
        # Buffers: BatchNorm statistics stay each rank's own, and the queue is equal everywhere already.
        self._model = DistributedDataParallel(
            self.method,
            device_ids=[self._device.index] if self._device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    # ---- the captured step ----

    def _step_inputs(self, views: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        with torch.no_grad(), self.autocast:
            return [
                self.method.prepare_step(*part)
                for part in zip(*(view.chunk(self._accumulate) for view in views))
            ]

    def _train(self, batch: _Batch) -> Tensor:
        return train_step(
            self._model,
            batch.views,
            self.optimizer,
            self._accumulate,
            self.autocast,
            batch.fields,
            step_inputs=batch.step_inputs,
            gradients=self._gradients,
        )

    def _train_static(self) -> Tensor:
        """Nothing that it launches depends on what the host knows."""
        assert self._static is not None
        numbers = self._host_numbers()
        self._give_numbers(self._numbers)
        try:
            return self._train(self._static)
        finally:
            self._give_numbers(numbers)  # a state dict holds floats

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (loaders that pin memory, NCCL's watchdog) may use the GPU meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._metrics = self._train_static()
        except (
            RuntimeError
        ) as error:  # the end of a capture raises, too, and hides what went wrong inside
            raise ConfigError(
                "engine.mode: this step cannot be captured in a CUDA graph; --engine.mode compile does without one "
                f"({error.__context__ or error})"
            ) from error
        return graph

    def _host_numbers(self) -> list[float | Tensor]:
        return [
            *(group["lr"] for group in self.optimizer.param_groups),
            self.optimizer.ema_momentum,
        ]

    def _give_numbers(self, numbers: list[Any]) -> None:
        for group, rate in zip(self.optimizer.param_groups, numbers):
            group["lr"] = rate
        self.optimizer.ema_momentum = numbers[-1]

    def _set_numbers(self) -> None:
        """To the device, if they changed: most schedules do so once an epoch."""
        numbers = [float(number) for number in self._host_numbers()]
        for fixed, number, known in zip(self._numbers, numbers, self._known):
            if number != known:
                fixed.fill_(number)
        self._known = numbers


class _Batch(NamedTuple):
    """What a step reads."""

    views: tuple[Tensor, ...]
    fields: dict[str, Tensor]
    step_inputs: list[
        tuple[Tensor, ...]
    ]  # of each micro-batch; empty where the forward pass arranges

    def tensors(self) -> list[Tensor]:
        return [
            *self.views,
            *self.fields.values(),
            *(tensor for part in self.step_inputs for tensor in part),
        ]

    def empty_like(self) -> _Batch:
        """Of the same shapes, types and memory formats."""
        return _Batch(
            tuple(map(torch.empty_like, self.views)),
            {name: torch.empty_like(tensor) for name, tensor in self.fields.items()},
            [tuple(map(torch.empty_like, part)) for part in self.step_inputs],
        )


class _Shadow(torch.autograd.Function):
    """A copy of a weight in the place of the weight, which gets the gradient.

    in_place: added to a gradient that is there, one launch instead of a conversion and an addition. What waits for
    gradients at the weight, as DistributedDataParallel does, would not see that.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shadow: Tensor, in_place: bool) -> Tensor:
        ctx.weight, ctx.in_place = weight, in_place
        return shadow

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        if ctx.in_place and ctx.weight.grad is not None:
            ctx.weight.grad.add_(grad)
            return None, None, None
        return grad, None, None  # which autograd converts to the weight's type
