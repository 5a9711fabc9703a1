"""Recipe `auto`: fits encoder, views, batch, queue, rate and epochs to a set and a machine."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from mocofast import distributed, settings
from mocofast.config import Config
from mocofast.data.decoding import image_size
from mocofast.data.interface import Source
from mocofast.data.loaders import pixels_of
from mocofast.data.remarks import images_to_look_at
from mocofast.methods.options import MomentumOptions
from mocofast.models.encoders import build_encoder
from mocofast.train.estimate import seconds_per_sample
from mocofast.view_sizes import Size, height_width, pixels_text

BUDGET = {"cpu": 30 * 60, "cuda": 8 * 3600}  # seconds that the epochs may take
LARGEST_VIEW = {"cpu": 64, "cuda": 224}  # pixels
EPOCHS = (10, 20, 30, 50, 100, 200, 400, 800)
MOST_KEYS = 65536  # MoCo's queue on ImageNet
# How far the key encoder may move while a key is in the queue, as a share of the distance to the
# query encoder. Beyond, the age of keys tells the positive: features of images are not learned.
LARGEST_DRIFT = 0.04
SHORT_DRIFT = 0.02  # in a run of few steps, whose encoder moves faster
FEW_STEPS = 10_000  # of a run, in which SGD at MoCo's rate does not get far
FEWEST_OF_A_PART = 16  # images: fewer make statistics of BatchNorm too noisy
FEWEST_STEPS = 8  # an epoch: a larger batch would see too few other batches


class Choice(NamedTuple):
    """A value of an option, and the reason."""

    option: str
    value: Any
    why: str


def fit_on_all_ranks(
    config: Config,
    source: Source,
    kept: Collection[str],
    device: torch.device,
    world_size: int,
) -> list[Choice]:
    """Fits `config` in place, equally on all ranks. Arguments and result as for `fit`."""
    is_first = distributed.is_main()  # the ranks would measure different times
    own = fit(config, source, kept, device, world_size) if is_first else []
    choices: list[Choice] = distributed.from_main(own)
    settings.apply(config, {choice.option: choice.value for choice in choices})
    settings.validate(config)
    return choices


def fit(
    config: Config,
    source: Source,
    kept: Collection[str],
    device: torch.device,
    world_size: int,
    rate: Callable[[str, int], float] | None = None,
) -> list[Choice]:
    """Returns the options that fit a set of images and a machine.

    config: the recipe, with the options that the user gave.
    source: N training images.
    kept: the names of the given options, which keep their values.
    world_size: number of ranks, which divides the batch.
    rate: returns the seconds of training on an image, for an encoder and a size of views. None
        measures the seconds.
    """
    choices: list[Choice] = []
    kept = set(kept)

    def take(option: str, value: Any, why: str) -> Any:
        """Records a choice. Returns the given value of a kept option."""
        if option in kept:
            group, key = option.split(".")
            return getattr(getattr(config, group), key)
        choices.append(Choice(option, value, why))
        return value

    count, side = len(source), short_side(source, config.data.channels)
    largest = LARGEST_VIEW[device.type]
    where = "a GPU" if device.type == "cuda" else "a CPU"
    why = f"the images' short side is {side} pixels"
    size = take(
        "augment.size", view_size(side, largest), f"{why}; at most {largest} pixels on {where}"
    )

    @functools.cache
    def measured(arch: str) -> float:
        encoder = build_encoder(arch, size, config.data.channels)(num_classes=config.model.dim)
        augment = replace(config.augment, size=size)
        return seconds_per_sample(encoder, augment, config.data.channels, device)

    def seconds(arch: str) -> float:
        return (rate(arch, size) if rate else measured(arch)) / world_size

    names = encoders(size, count, device.type)
    budget = BUDGET[device.type]
    arch = names[-1]
    for name in names[:-1]:
        if 50 * count * seconds(name) <= budget:
            arch = name
            break
    views = f"views of {pixels_text(size)} pixels"
    arch = take("model.arch", arch, f"{count:,} images, {views}, on {where}")

    power = 2 ** int(np.log2(max(1, min(256, count // FEWEST_STEPS))))
    least = 2 * world_size  # BatchNorm needs two images on every rank
    batch = take(
        "data.batch_size",
        max(least, power // world_size * world_size),
        f"at least {FEWEST_STEPS} steps an epoch, at most 256 images",
    )
    batch = min(batch, max(1, count))
    take("train.log_every", max(1, min(50, count // batch)), "a line an epoch, or more")
    wanted = min(800, max(200, 200 * (10_000 / max(1, count)) ** 0.5))
    each = seconds(arch)
    fits = [n for n in EPOCHS if n <= wanted and n * count * each <= budget] or [EPOCHS[0]]
    minutes = fits[-1] * count * each / 60
    epochs = take(
        "train.epochs",
        fits[-1],
        f"about {minutes:.0f} minutes of computation (an image takes {1000 * each:.3g} ms); "
        f"up to {budget // 60} minutes and {wanted:.0f} epochs are chosen by itself",
    )
    take("knn.every", max(1, epochs // 10), "about 10 evaluations, where there are labels")
    steps = epochs * max(1, count // batch)
    momentum = 0.0
    if isinstance(config.model, MomentumOptions):
        momentum = 0.99 if count < 100_000 else 0.999
        momentum = take("model.momentum", momentum, f"{count // batch:,} steps an epoch")
    if "model.queue_size" not in kept and hasattr(config.model, "queue_size"):
        most, why = count // 2, "half of the images at most, so few keys are of the query"
        if momentum:
            drift = SHORT_DRIFT if steps < FEW_STEPS else LARGEST_DRIFT
            age = max(1, round(drift / max(1e-6, 1 - momentum)))
            if age * batch < most:
                most, why = age * batch, f"keys of {age} steps: older keys would be told by age"
        take("model.queue_size", 2 ** int(np.log2(max(2, min(MOST_KEYS, most)))), why)
    if hasattr(config.model, "bn_splits") and world_size == 1:
        parts = next((n for n in (8, 4, 2) if batch % n == 0 and batch // n >= FEWEST_OF_A_PART), 1)
        why = f"{batch // parts} images share BatchNorm, or statistics would betray the positive"
        take("model.bn_splits", parts, why)
    if steps < FEW_STEPS and config.optim.name == "sgd" and not {"optim.name", "optim.lr"} & kept:
        take("optim.name", "adamw", f"SGD needs more steps than {steps:,}")
        scaled = 1.4e-3 * (batch / 256) ** 0.5
        take(
            "optim.lr",
            rounded(scaled),
            f"0.0014 for 256 images, by the root of the batch of {batch}",
        )
        take("optim.weight_decay", 0.05, "usual with AdamW")
        take(
            "optim.warmup_epochs",
            rounded(min(1.0, 0.1 * epochs)),
            "AdamW's averages start from nothing",
        )
    elif config.optim.name == "sgd":
        take(
            "optim.lr",
            rounded(0.06 * batch / 256),
            f"0.06 for 256 images, and the batch has {batch}",
        )
    return choices


def rounded(value: float) -> float:
    """Returns a value to 3 significant digits: what the log says is what the run computes with."""
    return float(f"{value:.3g}")


def view_size(side: int, largest: int) -> int:
    """Returns the side of views of images with short side `side`, in pixels."""
    if side >= largest:
        return largest
    return side if side < 16 else side // 8 * 8


def encoders(size: Size, count: int, device: str) -> tuple[str, ...]:
    """Returns encoders for views of a size, the preferred one first."""
    side = math.sqrt(math.prod(height_width(size)))
    if side <= 16:
        return ("resnet_tiny",)
    if side <= 48:
        return ("resnet18_cifar",) if device == "cuda" else ("resnet18_cifar", "resnet_tiny")
    large = device == "cuda" and side >= 128 and count >= 20_000
    return ("resnet50",) if large else ("resnet18",)


def short_side(source: Source, channels: int = 3) -> int:
    """Returns the median short side of a few images, in pixels. 224 if no header can be read.

    channels: of an image, as `data.channels`.
    """
    pixels = pixels_of(source, channels)
    first = source.load(0)
    if isinstance(first, np.ndarray):
        return min(first.shape[:2])
    size: Any = image_size if pixels is None else pixels.size
    sides = []
    for index in images_to_look_at(source):
        try:
            sides.append(min(size(source.load(index))))
        except Exception:  # PIL raises nearly any exception on corrupt headers
            continue
    return int(np.median(sides)) if sides else 224
