"""Who decodes and augments: chosen once, with a reason for the log."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from mocofast.config import AugmentConfig, ConfigError, DataConfig
from mocofast.data.device_loader import DeviceLoader, why_not_device_loader
from mocofast.data.interface import BatchSlice, Loader, Source
from mocofast.data.sources import ArraySource

if TYPE_CHECKING:
    from mocofast.data.evaluation import EvalBatches

INSTALL = "pip install 'mocofast[cuda13]'"  # CUDA 13's DALI also runs where there is no GPU


def build_loader(
    source: Source,
    data: DataConfig,
    augments: tuple[AugmentConfig, ...],
    shard: BatchSlice,
    seed: int,
    device: torch.device,
) -> Loader:
    """The loader that `data.loader` asks for, with `reason` set.

    augments: one per view, so two for pretraining and one for a linear probe.
    Raises ValueError or ImportError where `data.loader` names one that cannot serve.
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
    """Every good image of `source` once, in order, resized and cropped at its centre to `size`.

    See EvalBatches for what it yields. workers: as data.workers, -1 for the cores there are.
    """
    from mocofast.data.evaluation import EvalBatches

    return EvalBatches(source, size, batch_size, count_workers(workers), torch.device(device))


def choose_loader(
    source: Source, asked: str, device: torch.device, augments: tuple[AugmentConfig, ...]
) -> tuple[str, str]:
    """("device", "dali" or "torchvision", why). asked: one of them or "auto"; device: where the batches go; augments:
    one per view."""
    if asked not in ("auto", "device", "dali", "torchvision"):
        raise ConfigError(f"data.loader must be auto, device, dali or torchvision, got {asked!r}")
    if asked in ("device", "torchvision"):  # the device loader says itself what it cannot do
        return asked, "asked for"
    in_memory = isinstance(source, ArraySource)
    if asked == "auto" and in_memory:
        obstacle = why_not_device_loader(source, augments, device)
        if not obstacle:
            return "device", "the images are in memory, and their views small"
        if device.type != "cuda":
            return (
                "torchvision",
                f"the images are in memory, so there is nothing to decode; device: {obstacle}",
            )
    missing = dali_missing()
    if asked == "dali":
        if missing:
            raise ConfigError(
                f"data.loader=dali, but DALI cannot be imported ({missing}); {INSTALL}"
            )
        return asked, "asked for"
    if missing:
        return "torchvision", f"DALI cannot be imported ({missing}); {INSTALL}"
    return (
        "dali",
        "the views are made on the GPU" if in_memory else "image files, and DALI is installed",
    )


def dali_missing() -> str:
    """Why `nvidia.dali` cannot be imported; "" if it can."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a shared library of it that does not load
        return str(error)
    return ""


def count_workers(workers: int) -> int:
    """data.workers with -1 resolved: the cores this process may use, shared by the ranks of this machine."""
    if workers < -1:
        raise ConfigError(f"data.workers must be -1 or more, got {workers}")
    if workers >= 0:
        return workers
    available = getattr(os, "sched_getaffinity", None)  # absent outside Linux
    cores = len(available(0)) if available else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
