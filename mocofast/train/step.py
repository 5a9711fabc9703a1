"""One optimiser step: forward and backward passes, the average over ranks, the update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mocofast.distributed import rank_and_world_size, shares_of, sharing
from mocofast.ops.known_gradients import root_gradient
from mocofast.optim.fused import FusedOptimizer
from mocofast.shares import Shares
from mocofast.step_parts import step_part
from mocofast.train.metrics import StepMetrics, step_metrics


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
    update: bool = True,
    scaler: torch.amp.GradScaler | None = None,
    shares: Shares | None = None,
) -> StepMetrics:
    """Trains on this rank's slice of a batch. Returns the metrics without waiting for the device.

    model: a method, or DistributedDataParallel around a method.
    views: the views of the slice, every view (B, C, S, S).
    optimizer: updates the momentum encoder if it is an optimiser that averages (see
        mocofast.optim). Otherwise the method does.
    accumulate: number of micro-batches. All micro-batches see the same momentum encoder and the
        same memories, so MoCo's result equals the result of the whole batch, except for BatchNorm,
        which takes its statistics over a micro-batch.
    autocast: the precision of the forward passes.
    fields: the other entries of the batch that the method takes, {name: (B,)}.
    step_inputs: the results of the method's `prepare_step`, one per micro-batch, if done already.
    gradients: buffers that keep the gradients and average them over ranks, instead of
        DistributedDataParallel.
    update: False only lets the method see the views (a queue is filled), without gradients and
        without a step of the optimiser.
    scaler: scales the loss, and leaves out the step, average included, where a gradient overflows.
    shares: images of every rank in the batch. None: B on each. The mean over ranks, of gradients
        and of metrics, is then the mean over images.
    """
    # Micro-batches of the views and of the fields.
    averages_itself = not (isinstance(optimizer, FusedOptimizer) and optimizer.owns_ema)
    rank, shares = rank_and_world_size()[0], shares or shares_of(len(views[0]))
    parts = shares.micro_batches(accumulate)
    sizes = [part.counts[rank] for part in parts]
    micro_batches = list(zip(*(view.split(sizes) for view in views)))
    micro_fields = {name: values.split(sizes) for name, values in fields.items()}
    if gradients is None:
        optimizer.zero_grad(set_to_none=True)
    else:
        gradients.zero_()

    # Forward and backward passes.
    metrics: StepMetrics | None = None
    for i, micro_batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        share = len(micro_batch[0]) / len(views[0]) * shares.weight(rank)
        inputs: dict[str, Any] = {name: values[i] for name, values in micro_fields.items()}
        if step_inputs and step_inputs[i]:
            inputs["step_inputs"] = step_inputs[i]
        # DistributedDataParallel reduces the gradients once, with the last micro-batch.
        wait = isinstance(model, DistributedDataParallel) and not (last and update)
        paused = model.no_sync() if wait else contextlib.nullcontext()  # type: ignore[operator]
        with sharing(parts[i]), paused:
            with autocast, step_part("loss"):  # the encoders are parts of their own
                output = model(
                    *micro_batch,
                    update_keys=averages_itself and update and i == 0,
                    enqueue=last,
                    **inputs,
                )
            if update:
                with step_part("backward"):
                    loss = output.loss if scaler is None else scaler.scale(output.loss)
                    _backward(loss, share)
        own = step_metrics(output, share)
        metrics = own if metrics is None else own._replace(values=metrics.values + own.values)

    # Average over ranks and update.
    assert metrics is not None
    if not update:
        return metrics
    if gradients is not None:
        gradients.average_()
    with step_part("optimiser and EMA"):
        if clip_norm := getattr(optimizer, "clip_norm", 0.0):
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained, clip_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return metrics


def _backward(loss: Tensor, share: float) -> None:
    """Runs the backward pass of share x loss. The whole share launches nothing for the factor."""
    if share == 1 and loss.dtype == torch.float32 and loss.dim() == 0:
        loss.backward(gradient=root_gradient(loss.device))
    else:
        (loss * share).backward()


class FlatGradients:
    """The gradients of parameters in one buffer per type, at a fixed address.

    A captured step needs fixed addresses. It clears the gradients in one launch and averages them
    over ranks in one all-reduce.

    The first `average_` makes the buffers, for the parameters that have a gradient then. The
    optimiser leaves the other parameters alone, as it does without buffers.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._buffers: list[Tensor] = []

    def zero_(self) -> None:
        """Clears the gradients. Call it before the backward passes of a step, which add to them."""
        for buffer in self._buffers:
            buffer.zero_()
        if not self._buffers:
            for p in self._parameters:
                p.grad = None

    @torch.no_grad()
    def average_(self) -> None:
        """Averages the gradients over ranks. Call it after the backward passes of a step."""
        if not self._buffers:
            self._bind()
        world_size = rank_and_world_size()[1]
        if world_size > 1:
            for buffer in self._buffers:
                buffer.div_(world_size)  # before the sum, as DistributedDataParallel does
                with step_part("communication"):
                    dist.all_reduce(buffer)

    def _bind(self) -> None:
        """Makes the buffers and moves the present gradients into them."""
        groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for p in self._parameters:
            if p.grad is not None:
                groups.setdefault((p.dtype, p.device), []).append(p)
        for (dtype, device), parameters in groups.items():
            # Multiples of 8 elements, because the optimiser's kernels read 16 bytes at a time.
            offsets = [0]
            for p in parameters:
                offsets.append(offsets[-1] + -(-p.numel() // 8) * 8)
            buffer = torch.zeros(offsets[-1], dtype=dtype, device=device)
            for p, offset in zip(parameters, offsets):
                strides = torch.empty_like(p, device="meta").stride()  # equal to the momentum's
                view = torch.as_strided(buffer, p.shape, strides, offset)
                assert p.grad is not None
                view.copy_(p.grad)
                p.grad = view
            self._buffers.append(buffer)
