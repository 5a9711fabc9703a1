"""Chooses the number of threads that compute on a CPU.

Threads that share a core with another process wait for one another at the end of every operator.
By default OpenMP's threads burn a core while they wait: on two busy cores the demo took 7.5 minutes
with two threads, and 1 minute with one thread. Threads that sleep while they wait leave the core
to the others. The `mocofast` command asks for such threads before PyTorch loads (`openmp`).

A thread that slept waits for its turn beside a busy process: on two cores, one of them busy, a step
of ResNet-18 took twice as long with two threads as with one. So only free cores get a thread.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mocofast.config import Config
from mocofast.data.loaders import count_workers
from mocofast.device import choose_threads
from mocofast.evaluate.features import evaluating
from mocofast.openmp import waits_briefly
from mocofast.train.work import Layers
from mocofast.usage import cores_of_others

# Operations of a forward pass on the batch: about 20 ms of a core. The operators of less work are
# so short that a second thread wakes too late.
WORTH = 2e9
LOOK = 0.2  # seconds in which other processes are watched
TOLERANCE = 0.3  # cores that other processes may use on a quiet machine


def set_threads(
    encoder: nn.Module,
    config: Config,
    device: torch.device,
    world_size: int = 1,
    saved: Mapping[str, Any] | None = None,
) -> list[str]:
    """Sets PyTorch's number of threads for a run on a CPU. Leaves a user's OMP_NUM_THREADS alone.

    encoder: the query encoder, on `device`.
    saved: content of the checkpoint to continue. The number stays, since sums of another number
        of threads differ by rounding. Older checkpoints hold no number: half of the cores.

    Returns lines for the log: one where other processes keep cores from the run.
    """
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:  # torchrun sets it, too
        return []
    if saved is not None and "threads" in saved:
        torch.set_num_threads(saved["threads"])
        return []
    sleeping = saved is None and world_size == 1 and waits_briefly()
    large = sleeping and is_large(encoder, config)
    cores = count_workers(-1)
    free = (os.cpu_count() or 1) - (cores_of_others(LOOK) if large and cores > 1 else 0.0)
    crowded = free < cores - TOLERANCE
    threads = choose_threads(cores, sleeping and not crowded, large)
    torch.set_num_threads(threads)
    if not crowded:
        return []
    return [
        f"computes on {threads} of {cores} cores: other processes use some of them "
        f"(OMP_NUM_THREADS={cores} takes all, and waits for these processes)"
    ]


def is_large(encoder: nn.Module, config: Config) -> bool:
    """Returns whether a forward pass has the operations of WORTH. Bounds spare the count."""
    if at_least(encoder, config) >= WORTH:
        return True
    return at_most(encoder, config) >= WORTH <= operations(encoder, config)


def at_least(encoder: nn.Module, config: Config) -> int:
    """Returns a bound of `operations` that costs no time: a weight works once for every image."""
    parts = (part for part in encoder.modules() if isinstance(part, nn.Conv2d | nn.Linear))
    return 2 * config.data.batch_size * sum(part.weight.numel() for part in parts)


def at_most(encoder: nn.Module, config: Config) -> int:
    """Returns a bound of `operations` that costs no time: a weight works once at every pixel."""
    height, width = config.augment.shape
    weights = sum(weight.numel() for weight in encoder.parameters())
    return 2 * config.data.batch_size * height * width * weights


def operations(encoder: nn.Module, config: Config) -> int:
    """Returns the operations of a forward pass on a batch of the run. Computes one empty image."""
    image = torch.zeros(1, config.data.channels, *config.augment.shape)
    with evaluating(encoder), torch.no_grad(), Layers() as layers:
        encoder(image)
    return config.data.batch_size * sum(layer.operations for layer in layers.work)
