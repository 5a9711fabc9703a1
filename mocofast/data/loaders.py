"""Chooses the loader of a source, with a reason for the log, and builds it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mocofast.config import LOADERS, AugmentConfig, ConfigError, DataConfig
from mocofast.data.arrays import PixelFormat
from mocofast.data.device_loader import DeviceLoader, why_not_device_loader
from mocofast.data.finding import counted
from mocofast.data.interface import BatchSlice, Loader, Source
from mocofast.data.items import Item
from mocofast.data.numpy_files import MAGIC, NPY
from mocofast.data.ranges import range_of
from mocofast.data.scaled import check_scaled
from mocofast.data.shards import ShardSource
from mocofast.data.sources import ArraySource
from mocofast.errors import list_choices
from mocofast.view_sizes import Size

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
    pixels = pixels_of(source, data.channels)
    augments = tuple(checked_augment(augment, data.channels) for augment in augments)
    choice, reason = choose_loader(source, data.loader, device, augments, pixels)
    if data.decode == "scaled":
        of_type = range_of(source).of_type
        check_scaled(choice, device.type == "cuda", pixels is None, of_type)
    workers = count_workers(data.workers)
    loader: Loader
    if choice == "device":
        loader = DeviceLoader(source, augments, shard, seed, device, pixels)
    elif choice == "dali":
        from mocofast.data.dali_loader import DaliLoader

        loader = DaliLoader(source, augments, shard, seed, device, workers, data, pixels)
    else:
        from mocofast.data.torchvision_loader import TorchvisionLoader

        loader = TorchvisionLoader(source, augments, shard, seed, device, workers, data, pixels)
    loader.reason = reason
    return loader


def eval_batches(
    source: Source,
    size: Size,
    batch_size: int,
    workers: int,
    device: torch.device | str = "cpu",
    channels: int = 3,
) -> EvalBatches:
    """Returns batches of all good images of `source`, in order, as EvalBatches describes.

    size: of the central crop.
    workers: number of threads, as `data.workers`. -1 takes all cores.
    channels: of an image, as `data.channels`.
    """
    from mocofast.data.evaluation import EvalBatches

    threads, pixels = count_workers(workers), pixels_of(source, channels)
    return EvalBatches(source, size, batch_size, threads, torch.device(device), pixels)


def pixels_of(source: Source, channels: int) -> PixelFormat | None:
    """Returns how the pixels of a source are read. None: as 8-bit RGB.

    channels: value of data.channels.

    The first image decides whether a set consists of arrays.
    Raises ConfigError for arrays in memory with another number of channels.
    """
    deep = PixelFormat(channels, np.dtype(np.uint16), range_of(source))
    photos = isinstance(source, ShardSource) and source.photos
    eight = channels == 3 and deep.value_range.depth == 8
    if photos or not len(source):
        return None if eight else deep
    first = source.load(0)
    if isinstance(first, np.ndarray):
        if first.shape[2] != channels:
            raise ConfigError(
                f"data.channels: expected {first.shape[2]}, as the images in memory have, "
                f"got {channels}"
            )
        return (
            None
            if channels == 3 and first.dtype == np.uint8
            else PixelFormat(channels, first.dtype)
        )
    return None if eight and not _loses_levels(first) else deep


def _loses_levels(first: str | bytes | Item) -> bool:
    """Returns whether a set of three channels keeps 16 bits: arrays of more than 8 bits do.

    first: the first image of the set. Arrays come from .npy files and from data.reader.
    """
    if isinstance(first, str):
        return first.lower().endswith(NPY)
    if isinstance(first, bytes):
        return first.startswith(MAGIC)
    if not getattr(first.reading, "function", None):
        return False
    try:
        return first.extent(3).deep
    except Exception:  # a bad file, which the loader skips and names
        return True


def checked_augment(augment: AugmentConfig, channels: int) -> AugmentConfig:
    """Returns the augmentation for images of `channels` channels.

    With augment.color_ops=auto, operators on colours are turned off unless `channels` is 3. With
    augment.color_ops=on, operators on colours raise ConfigError there.
    """
    if channels == 3:
        return augment
    brightness, contrast, saturation, hue = augment.jitter
    if augment.color_ops == "auto":
        jitter = (brightness, contrast, 0.0, 0.0)
        return replace(augment, jitter=jitter, gray=0.0, solarize=0.0, hed=0.0)
    asked = {
        "jitter (saturation and hue)": saturation or hue,
        "gray": augment.gray,
        "solarize": augment.solarize,
        "hed": augment.hed,
    }
    for name, value in asked.items():
        if value:
            raise ConfigError(
                f"augment.{name}: expected 0, got {value}: the images have {channels} channels "
                "(data.channels), and operators on colours need 3; --augment.color_ops auto turns "
                "these operators off"
            )
    return augment


def choose_loader(
    source: Source,
    asked: str,
    device: torch.device,
    augments: tuple[AugmentConfig, ...],
    pixels: PixelFormat | None = None,
) -> tuple[str, str]:
    """Returns the loader ("device", "dali" or "torchvision") and the reason.

    asked: the value of `data.loader`.
    device: where the views go.
    augments: the augmentation of every view.
    pixels: the result of `pixels_of`.

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
    if asked == "auto" and pixels is not None and device.type != "cuda":
        kind = f"{counted(pixels.channels, 'channel')} of {8 * pixels.dtype.itemsize} bits"
        return "torchvision", f"{kind}, which DALI does not decode"
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
