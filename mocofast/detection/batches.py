"""Batches: order of the images, reading in threads, flips, crops.

The stream is a function of seed, epoch and step, as in pretraining, so a continued run sees the
images that a run never stopped would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mocofast.config import ConfigError
from mocofast.data.loaders import count_workers
from mocofast.data.threads import Threads
from mocofast.detection.options import SegmentData
from mocofast.detection.sets import IGNORED, AnnotatedSet, Target, read_image
from mocofast.errors import describe_error

T = TypeVar("T")
AHEAD = 2  # batches that are read while a step computes


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Returns an image (C, H, W) float32, 0 to 1. pixels: (H, W, C) uint8."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)


class Reader:
    """Reads images and annotations. Notes unreadable files.

    skipped: {index: reason}. An unreadable image of training is replaced by the next image.
    """

    def __init__(self, images: AnnotatedSet, channels: int, kind: str) -> None:
        self.images, self.channels, self.kind = images, channels, kind
        self.skipped: dict[int, str] = {}

    def read(self, index: int) -> tuple[Tensor, Any] | None:
        """Returns image (C, H, W) and annotations, or None for an unreadable image."""
        item = self.images.items[index]
        try:
            pixels = read_image(item.image, self.channels)
        except Exception as error:  # PIL raises nearly any exception
            self.skipped[index] = describe_error(error)
            return None
        if item.size not in (None, pixels.shape[:2]):
            raise ConfigError(
                f"{item.image}: {pixels.shape[:2]} pixels, and its annotations are of {item.size}; "
                "boxes would lie in other places. Resize annotations and images together"
            )
        if self.kind == "boxes":
            return to_tensor(pixels), item.target
        found = item.masks() if self.kind == "masks" else item.pixels()
        shape = found.masks.shape[1:] if isinstance(found, Target) else found.shape
        if shape != pixels.shape[:2]:
            raise ConfigError(f"{item.image}: {pixels.shape[:2]} pixels, and {shape} in its masks")
        return to_tensor(pixels), found

    def read_or_next(self, index: int) -> tuple[Tensor, Any]:
        """Returns image and annotations of `index`, or of the next usable image.

        Raises ConfigError if there is none.
        """
        for step in range(len(self.images)):
            found = self.read((index + step) % len(self.images))
            if found is not None and (self.kind == "pixels" or found[1].trained.any()):
                return found
        raise ConfigError(
            f"data.train: no image can be read and has an object, such as {self.images.name(index)}"
        )


def prefetched(
    read: Callable[[int], T], indices: list[list[int]], threads: int
) -> Iterator[list[T]]:
    """Yields lists of read(index), for all lists of indices. Threads read ahead."""
    ahead = AHEAD * max(map(len, indices), default=0)
    with Threads(threads, "images") as pool:
        found = pool.map(read, chain.from_iterable(indices), ahead)
        for batch in indices:
            yield list(islice(found, len(batch)))


class TrainingBatches:
    """The batches of this rank. augment: turns image and annotations into a sample, at random."""

    def __init__(
        self,
        reader: Reader,
        augment: Callable[[Tensor, Any, torch.Generator], Any],
        batch_size: int,
        workers: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.reader, self._augment, self._seed = reader, augment, seed
        self._own = slice(rank, None, world_size)
        self.batch_size = min(batch_size, len(reader.images))
        self._threads = count_workers(workers)
        self.steps_per_epoch = len(reader.images) // self.batch_size

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Any]]:
        """Yields the samples of this rank for every step of an epoch, from `first_step` on."""
        order = self._generator(epoch, 0)
        permutation = torch.randperm(len(self.reader.images), generator=order).tolist()
        size = self.batch_size
        batches = [
            permutation[step * size : (step + 1) * size][self._own]
            for step in range(first_step, self.steps_per_epoch)
        ]

        def read(index: int) -> Any:
            image, annotations = self.reader.read_or_next(index)
            return self._augment(image, annotations, self._generator(epoch, 1 + index))

        return prefetched(read, batches, self._threads)

    def _generator(self, epoch: int, number: int) -> torch.Generator:
        words = np.random.SeedSequence((self._seed, epoch, number)).generate_state(2, np.uint32)
        return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Returns boxes (n, 4) of the image flipped horizontally."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


def detection_sample(
    image: Tensor, target: Target, generator: torch.Generator, flip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns an image and targets as torchvision's detectors take them, maybe flipped."""
    keep = torch.from_numpy(target.trained)
    boxes = torch.from_numpy(target.boxes)[keep]
    found = {"boxes": boxes, "labels": torch.from_numpy(target.labels)[keep]}
    if target.masks is not None:
        found["masks"] = torch.from_numpy(target.masks)[keep].to(torch.uint8)
    if torch.rand((), generator=generator) < flip:
        image = image.flip(2)
        found["boxes"] = flip_boxes(boxes, image.shape[2])
        if "masks" in found:
            found["masks"] = found["masks"].flip(2)
    return image, found


def resized(image: Tensor, labels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns image (C, H, W), bilinear, and labels (H, W), nearest, in another size."""
    size = (height, width)
    image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    labels = F.interpolate(labels[None, None].float(), size, mode="nearest-exact")[0, 0]
    return image, labels.to(torch.uint8)


def at_val_size(image: Tensor, labels: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Returns image and labels with a shorter side of `side` pixels. 0: as they are."""
    height, width = image.shape[1:]
    factor = side / min(height, width)
    if not side or factor == 1:
        return image, labels
    return resized(image, labels, round(height * factor), round(width * factor))


def segmentation_sample(
    image: Tensor, pixels: np.ndarray, generator: torch.Generator, data: SegmentData
) -> tuple[Tensor, Tensor]:
    """Returns a random crop (C, S, S) and labels (S, S) uint8, scaled and flipped at random.

    Pixels beyond the image are gray, and do not count.
    """
    image, labels = at_val_size(image, torch.from_numpy(pixels), data.val_size)
    low, high = data.scale
    factor = low + (high - low) * float(torch.rand((), generator=generator))
    height, width = (max(1, round(side * factor)) for side in image.shape[1:])
    image, labels = resized(image, labels, height, width)
    if torch.rand((), generator=generator) < data.flip:
        image, labels = image.flip(2), labels.flip(1)
    below, right = max(0, data.crop - height), max(0, data.crop - width)
    image = F.pad(image, (0, right, 0, below), value=0.5)
    labels = F.pad(labels, (0, right, 0, below), value=IGNORED)
    y, x = (
        int(torch.randint(side - data.crop + 1, (), generator=generator)) for side in labels.shape
    )
    side = data.crop
    return image[:, y : y + side, x : x + side], labels[y : y + side, x : x + side]
