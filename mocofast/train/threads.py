"""Chooses the number of threads that compute on a CPU.

Threads that share a core with another process wait for one another at the end of every operator.
By default OpenMP's threads burn a core while they wait: on two busy cores the demo took 7.5 minutes
with two threads, and 1 minute with one thread. Threads that sleep while they wait leave the core
to the others. The `mocofast` command asks for sleeping threads before PyTorch loads.
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
from mocofast.train.work import Layers

# Operations of a forward pass on the batch: about 20 ms of a core. The operators of less work are
# so short that a second thread wakes too late.
WORTH = 2e9


def set_threads(
    encoder: nn.Module,
    config: Config,
    device: torch.device,
    world_size: int = 1,
    saved: Mapping[str, Any] | None = None,
) -> None:
    """Sets PyTorch's number of threads for a run on a CPU. Leaves a user's OMP_NUM_THREADS alone.

    encoder: the query encoder, on `device`.
    saved: content of the checkpoint to continue. The number stays, since sums of another number
        of threads differ by rounding. Older checkpoints hold no number: half of the cores.
    """
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:  # torchrun sets it, too
        return
    if saved is not None and "threads" in saved:
        torch.set_num_threads(saved["threads"])
        return
    sleeping = saved is None and world_size == 1 and waits_asleep()
    large = sleeping and at_most(encoder, config) >= WORTH <= operations(encoder, config)
    torch.set_num_threads(choose_threads(count_workers(-1), sleeping, large))


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


def waits_asleep() -> bool:
    """Returns whether the environment asks OpenMP for threads that sleep while they wait."""
    policy, spins = os.environ.get("OMP_WAIT_POLICY", ""), os.environ.get("GOMP_SPINCOUNT")
    return spins == "0" or (spins is None and policy.lower() == "passive")
