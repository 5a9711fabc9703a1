"""One optimiser step, and the device and precision it runs in. train.py prepares it, feeds it, and writes down what
it did."""

from __future__ import annotations

import contextlib

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
) -> Tensor:
    """Forward, backward and update on this rank's part of a batch; returns its `step_metrics` without waiting.

    model: MoCo, or DistributedDataParallel around it. views: (im_q, im_k), each (B, 3, S, S).
    The key encoder is averaged by the optimiser if it is one that does (see mocofast.optim), else by the model.
    With accumulate > 1, micro-batches see one state of the key encoder and of the queue, so the result is that
    of the whole batch (BatchNorm apart, whose statistics are those of a micro-batch).
    """
    im_q, im_k = views
    metrics = torch.zeros(3, device=im_q.device)
    average = not (isinstance(optimizer, FusedOptimizer) and optimizer.owns_ema)
    parts = list(zip(im_q.chunk(accumulate), im_k.chunk(accumulate)))
    optimizer.zero_grad(set_to_none=True)
    for i, (part_q, part_k) in enumerate(parts):
        last = i == len(parts) - 1
        share = len(part_q) / len(im_q)
        # DDP reduces the gradients once, with the last micro-batch.
        hold = (
            model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()
        )
        with hold:
            with autocast:
                out = model(part_q, part_k, update_keys=average and i == 0, enqueue=last)
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
