"""One optimiser step, and the device and precision it runs in. train.py prepares it, feeds it, and writes down what
it did."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mocofast.optim import FusedOptimizer
from mocofast.progress import step_metrics


def train_step(
    model: nn.Module,
    views: tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer,
    accumulate: int,
    autocast: torch.autocast,
    needed: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:
    """Forward, backward and update on this rank's part of a batch; returns its `step_metrics` without waiting.

    model: a method, or DistributedDataParallel around it. views: each (B, 3, S, S). needed: what else the method
    takes of a batch, by name, each (B,).
    The momentum encoder is averaged by the optimiser if it is one that does (see mocofast.optim), else by the method.
    With accumulate > 1, micro-batches see one state of the momentum encoder and of memories, so MoCo's result is that
    of the whole batch (BatchNorm apart, whose statistics are those of a micro-batch).
    """
    metrics = torch.zeros(3, device=views[0].device)
    average = not (isinstance(optimizer, FusedOptimizer) and optimizer.owns_ema)
    parts = list(zip(*(view.chunk(accumulate) for view in views)))
    needed_parts = {name: values.chunk(accumulate) for name, values in needed.items()}
    optimizer.zero_grad(set_to_none=True)
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        share = len(part[0]) / len(views[0])
        others = {name: values[i] for name, values in needed_parts.items()}
        # DDP reduces the gradients once, with the last micro-batch.
        hold = (
            model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()
        )
        with hold:
            with autocast:
                out = model(*part, update_keys=average and i == 0, enqueue=last, **others)
            (out.loss * share).backward()
        metrics += step_metrics(out.loss, out.rank) * share
    optimizer.step()
    return metrics


def choose_device(name: str) -> torch.device:
    """`train.device`: auto takes a GPU where there is one, and under torchrun this process's own."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_threads(cores: int) -> int:
    """Threads of a CPU's computation, of the `cores` this process may use: half; the other half decodes and augments.

    Threads that share cores wait for each other in every parallel region: on two busy cores the demo took 7.5 minutes
    with two threads, and 1 minute with one.
    """
    return max(1, cores // 2)


def choose_autocast(precision: str, device: torch.device) -> torch.autocast:
    """`train.precision`: auto is bf16 on GPUs that have it, else fp32 (bf16 products are very slow on most CPUs)."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    enabled = precision == "bf16" or (precision == "auto" and bf16)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
