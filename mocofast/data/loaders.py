"""Chooses the loader of a source, with a reason for the log, and builds it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from mocofast.config import LOADERS, AugmentConfig, ConfigError, DataConfig
from mocofast.data.device_loader import DeviceLoader, why_not_device_loader
from mocofast.data.interface import BatchSlice, Loader, Source
from mocofast.data.sources import ArraySource
from mocofast.errors import list_choices

if TYPE_CHECKING:
    from mocofast.data.evaluation import EvalBatches

INSTALL = "pip install 'mocofast[cuda13]'"  # DALI for CUDA 13 also runs without a GPU


def build_loader(
    source: Source,
    data: DataConfig,
    augments: tuple[AugmentConfig, ...],
    shard: BatchSlice,
    seed: int,
    device: torch.device,
) -> Loader:
    """Builds the loader of option `data.loader` and sets `reason`.

    augments: the augmentation of every view: two for pretraining, one for a linear probe.
    shard: the slice of every batch for this rank.
    seed: seed of the order and of the views.
    device: where the views go.

    Raises ValueError or ImportError if the loader of `data.loader` cannot serve.
    """
    choice, reason = choose_loader(source, data.loader, device, augments)
    workers = count_workers(data.workers)
    loader: Loader
    if choice == "device":
        loader = DeviceLoader(source, augments, shard, seed, device)
    elif choice == "dali":
        from mocofast.data.dali_loader import DaliLoader

        loader = DaliLoader(source, augments, shard, seed, device, workers, data)
    else:
        from mocofast.data.torchvision_loader import TorchvisionLoader

        loader = TorchvisionLoader(source, augments, shard, seed, device, workers, data)
    loader.reason = reason
    return loader


def eval_batches(
    source: Source, size: int, batch_size: int, workers: int, device: torch.device | str = "cpu"
) -> EvalBatches:
    """Returns batches of all good images of `source`, in order, as EvalBatches describes.

    size: side of the central crop, in pixels.
    workers: number of threads, as `data.workers`. -1 takes all cores.
    """
    from mocofast.data.evaluation import EvalBatches

    return EvalBatches(source, size, batch_size, count_workers(workers), torch.device(device))


def choose_loader(
    source: Source, asked: str, device: torch.device, augments: tuple[AugmentConfig, ...]
) -> tuple[str, str]:
    """Returns the loader ("device", "dali" or "torchvision") and the reason.

    asked: the value of `data.loader`.
    device: where the views go.
    augments: the augmentation of every view.

    Raises ConfigError for an unknown loader, or if DALI is asked for and missing.
    """
    if asked not in LOADERS:
        raise ConfigError(f"data.loader must be {list_choices(LOADERS)}, got {asked!r}")
    if asked in ("device", "torchvision"):  # DeviceLoader raises if it cannot serve
        return asked, "asked for"
    in_memory = isinstance(source, ArraySource)
    # Images in memory need no decoding.
    if asked == "auto" and in_memory:
        obstacle = why_not_device_loader(source, augments, device)
        if not obstacle:
            return "device", "the images are in memory, and their views small"
        if device.type != "cuda":
            reason = "the images are in memory, so there is nothing to decode"
            return "torchvision", f"{reason}; device: {obstacle}"
    # Image files, or views on a GPU: DALI if it is installed.
    missing = dali_missing()
    if asked == "dali":
        if missing:
            raise ConfigError(
                f"data.loader=dali, but DALI cannot be imported ({missing}); {INSTALL}"
            )
        return asked, "asked for"
    if missing:
        return "torchvision", f"DALI cannot be imported ({missing}); {INSTALL}"
    if in_memory:
        return "dali", "the views are made on the GPU"
    return "dali", "image files, and DALI is installed"


def dali_missing() -> str:
    """Returns why `nvidia.dali` cannot be imported, or "" if it can."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a shared library does not load
        return str(error)
    return ""


def count_workers(workers: int) -> int:
    """Returns the number of workers for the value of `data.workers`.

    -1 becomes the number of cores for this process, divided by the ranks of the machine.
    """
    if workers < -1:
        raise ConfigError(f"data.workers must be -1 or more, got {workers}")
    if workers >= 0:
        return workers
    available = getattr(os, "sched_getaffinity", None)  # absent outside Linux
    cores = len(available(0)) if available else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
