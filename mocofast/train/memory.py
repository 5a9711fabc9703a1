"""Predicts the peak memory of a step, without the memory: fake tensors run the step of a method.

Every storage that an operator of the step makes is counted until nothing holds the storage. Sizes
are rounded up to BLOCK bytes, as PyTorch's allocator for GPUs does. Ranks exist as a process group
that sends nothing. For a CPU (`train.device cpu`), the copies inside the gradient of a convolution
are counted too.

Not modelled: workspaces of cuDNN and cuBLAS, fragmentation of the allocator, the context of the
driver, buffers of NCCL, compiled encoders, images that a loader keeps on the device, and the
evaluation.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mocofast.config import Config, ConfigError
from mocofast.data.interface import view_augments
from mocofast.device import choose_autocast
from mocofast.methods.base import Method
from mocofast.methods.build import build_method
from mocofast.models.encoders import untrained
from mocofast.models.recompute import recompute_blocks
from mocofast.ops.local import is_dtensor
from mocofast.optim.fused import FusedOptimizer
from mocofast.step_parts import FORWARD
from mocofast.train.encoder_run import encoder_run, make_shadows
from mocofast.train.sharding import Sharding, all_ranks, is_sharded
from mocofast.train.step import train_step
from mocofast.view_sizes import height_width

BLOCK = 512
STATE = {"sgd": 1, "lars": 1, "adamw": 2}  # tensors of an optimiser for every weight
CPU = torch.device("cpu")


def step_peak(config: Config, world_size: int = 1) -> int:
    """Returns the bytes that a rank needs at the most in a step, after the first step.

    config: `train.precision` is bf16, fp16 or fp32.
    world_size: number of ranks. Every rank has 1 / world_size of the batch.
    Raises ConfigError for a method that needs more than images.
    """
    with torch.device("meta"):
        method = build_method(untrained(config), 1, 2)
    fields = [*method.batch_fields, *(["captions"] if config.model.takes_captions else [])]
    if fields:
        raise ConfigError(
            f"model.method: fit knows methods that need images alone, and {config.model.method} "
            f"needs {', '.join(fields)}"
        )
    if hasattr(method, "shuffle"):
        method.shuffle = partial(_shuffled, world_size)  # type: ignore[assignment]
    sharded = is_sharded(config, world_size)
    if not sharded:
        method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    autocast = choose_autocast(config.train.precision, CPU)
    with _ranks(world_size), contextlib.ExitStack() as modes:
        mesh = all_ranks(CPU) if sharded else None
        modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        _give_values(method)
        if config.engine.checkpoint_activations:
            recompute_blocks(method.encoder_q)
        if sharded:
            Sharding(method, CPU, autocast, mesh)
        memory = modes.enter_context(Peak(config.train.device == "cpu"))
        for tensor in (*method.parameters(), *method.buffers()):
            memory.count(own_part(tensor))
        if not sharded:
            _use_shadows(method, autocast)
        optimizer = _Optimizer(method, config, in_buckets=world_size > 1 and not sharded)
        method._synchronized = True
        for _ in range(2):
            memory.peak = 0
            views = _views(config, method, world_size)
            train_step(method, views, optimizer, config.train.accumulate, autocast)
    return memory.peak


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that live, inside the block. peak: the most at a time.

    onednn: count what oneDNN, PyTorch's library on CPUs, holds inside an operator.
    """

    def __init__(self, onednn: bool) -> None:
        super().__init__()
        self._onednn = onednn
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.count(own_part(value))
        if self._onednn and function is torch.ops.aten.convolution_backward.default:
            # The weight's gradient in oneDNN's order, and another copy for the memory format.
            self.peak = max(self.peak, self.live + 2 * args[2].nbytes)
        return out

    def count(self, tensor: Tensor) -> None:
        """Counts the storage of a tensor, from now on."""
        self._count(tensor.untyped_storage())

    def __enter__(self) -> Any:
        resize = self._resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP2 frees whole weights
            result = resize(storage, size)
            self._count(storage)
            return result

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        if key not in self._sizes:
            weakref.finalize(storage, self._gone, key)
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def own_part(tensor: Any) -> Tensor:
    """Returns this rank's part of a sharded tensor, and other tensors unchanged."""
    own: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return own


def _shuffled(world_size: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the memory of `mocofast.distributed.BatchShuffle`."""
    return torch.empty_like(images), torch.empty(world_size * len(images), dtype=torch.int64)


@contextlib.contextmanager
def _ranks(world_size: int) -> Iterator[None]:
    """Inside the block, a process group of `world_size` ranks whose collectives send nothing."""
    if world_size == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _give_values(method: nn.Module) -> None:
    """Gives parameters and buffers of the device "meta" fake values on the CPU, in place."""
    made: dict[int, nn.Parameter] = {}  # weights may be tied
    for module in method.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in made:
                value = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype)
                made[id(p)] = nn.Parameter(value, p.requires_grad)
            module._parameters[name] = None if p is None else made[id(p)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _use_shadows(method: Method, autocast: torch.autocast) -> None:
    """Lets encoders run on low-precision copies of their weights, as the engine does."""
    for name in FORWARD:
        encoder = getattr(method, name, None)
        if isinstance(encoder, nn.Module) and (shadows := make_shadows(encoder, autocast)):
            method.run[name] = encoder_run(
                name, encoder, method.normalize_pixels, shadows, 1, None, in_place=False
            )


def _views(config: Config, method: Method, world_size: int) -> tuple[Tensor, ...]:
    """Returns the views of a rank's images, (N, C, H, W) uint8 each."""
    images = config.data.largest_batch() // world_size
    augments = view_augments(config.augment, method.num_views)
    sizes = [(images, config.data.channels, *height_width(augment.size)) for augment in augments]
    empty = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    return tuple(view.to(memory_format=torch.channels_last) for view in empty)


class _Optimizer(FusedOptimizer):
    """Steps that make the state of an optimiser, and compute nothing.

    in_buckets: DistributedDataParallel's buckets hold all gradients, also between the steps.
    """

    owns_ema = True

    def __init__(self, method: nn.Module, config: Config, in_buckets: bool) -> None:
        parameters = [p for p in method.parameters() if p.requires_grad]
        self.param_groups = [{"params": parameters}]
        self.clip_norm = config.optim.clip_norm
        self._copies = STATE[config.optim.name]
        self._made: dict[Tensor, list[Tensor]] = {}
        self._buckets: list[Tensor] = []
        if in_buckets:
            self._buckets = [torch.empty_like(p) for p in parameters]
            for p in parameters:
                p.register_post_accumulate_grad_hook(self._to_bucket)

    def _to_bucket(self, p: Tensor) -> None:
        self._make(p)
        p.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients."""
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Makes the state of all parameters with a gradient."""
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self._make(p)

    def _make(self, p: Tensor) -> None:
        if p not in self._made:
            self._made[p] = [torch.empty_like(p) for _ in range(self._copies)]
