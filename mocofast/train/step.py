"""One optimiser step, and the device and precision it runs in. train.py prepares it, feeds it, and writes down what
it did."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mocofast.distributed import rank_and_world_size
from mocofast.optim.fused import FusedOptimizer
from mocofast.step_parts import step_part
from mocofast.train.metrics import step_metrics


def train_step(
    model: nn.Module,
    views: tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer,
    accumulate: int,
    autocast: torch.autocast,
    fields: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    step_inputs: Sequence[tuple[Tensor, ...]] = (),
    gradients: FlatGradients | None = None,
) -> Tensor:
    """Forward, backward and update on this rank's part of a batch; returns its `step_metrics` without waiting.

    model: a method, or DistributedDataParallel around it. views: each (B, 3, S, S). needed: what else the method
    takes of a batch, by name, each (B,). arranged: what the method's `prepare_step` made of each micro-batch, where that
    is done already. gradients: where they are kept and averaged over ranks, in the place of DistributedDataParallel.
    The momentum encoder is averaged by the optimiser if it is one that does (see mocofast.optim), else by the method.
    With accumulate > 1, micro-batches see one state of the momentum encoder and of memories, so MoCo's result is that
    of the whole batch (BatchNorm apart, whose statistics are those of a micro-batch).
    """
    metrics = torch.zeros(3, device=views[0].device)
    average = not (isinstance(optimizer, FusedOptimizer) and optimizer.owns_ema)
    parts = list(zip(*(view.chunk(accumulate) for view in views)))
    field_parts = {name: values.chunk(accumulate) for name, values in fields.items()}
    if gradients is None:
        optimizer.zero_grad(set_to_none=True)
    else:
        gradients.zero_()
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        share = len(part[0]) / len(views[0])
        others: dict[str, Any] = {name: values[i] for name, values in field_parts.items()}
        if step_inputs and step_inputs[i]:
            others["arranged"] = step_inputs[i]
        # DDP reduces the gradients once, with the last micro-batch.
        hold = (
            model.no_sync()
            if isinstance(model, DistributedDataParallel) and not last
            else contextlib.nullcontext()
        )
        with hold:
            with autocast, step_part("loss"):  # what is left of it beside the encoders
                out = model(*part, update_keys=average and i == 0, enqueue=last, **others)
            with step_part("backward"):
                (out.loss * share).backward()
        metrics += step_metrics(out.loss, out.rank) * share
    if gradients is not None:
        gradients.average_()
    with step_part("optimiser and EMA"):
        optimizer.step()
    return metrics


class FlatGradients:
    """The gradients of parameters in one buffer a type, which stays where it is: a captured step needs that, clears
    them in one launch and averages them over ranks in one all-reduce.

    The buffers are made by the first `average_`, for the parameters that have a gradient then: an optimiser decays
    the others as little as without buffers.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._buffers: list[Tensor] = []

    def zero_(self) -> None:
        """Before a step's backward passes, which add to what is there."""
        for buffer in self._buffers:
            buffer.zero_()
        if not self._buffers:
            for p in self._parameters:
                p.grad = None

    @torch.no_grad()
    def average_(self) -> None:
        """After them."""
        if not self._buffers:
            self._bind()
        world_size = rank_and_world_size()[1]
        if world_size > 1:
            for buffer in self._buffers:
                buffer.div_(world_size)  # before the sum, as DistributedDataParallel does
                with step_part("communication"):
                    dist.all_reduce(buffer)

    def _bind(self) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for p in self._parameters:
            if p.grad is not None:
                groups.setdefault((p.dtype, p.device), []).append(p)
        for (dtype, device), parameters in groups.items():
            # Multiples of 8 elements: the optimiser's kernels read 16 bytes at a time.
            places = [0]
            for p in parameters:
                places.append(places[-1] + -(-p.numel() // 8) * 8)
            buffer = torch.zeros(places[-1], dtype=dtype, device=device)
            for p, place in zip(parameters, places):
                strides = torch.empty_like(p, device="meta").stride()  # those of its momentum, too
                view = torch.as_strided(buffer, p.shape, strides, place)
                assert p.grad is not None
                view.copy_(p.grad)
                p.grad = view
            self._buffers.append(buffer)
