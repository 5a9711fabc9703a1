"""What every loader promises, and the one place where randomness enters the data.

A batch is a pure function of (seed, epoch, step, rank, world size, batch size): the order comes from
`epoch_order`, every random parameter of a view from `sample_view`. Loaders (device, DALI, torchvision) only execute
those parameters, so all give the same views up to their operators' arithmetic, any step can be resumed
without saving a stream's state, and a bad file cannot shift what other samples look like.

A sample that cannot be decoded is replaced by the next good one (index + 1, ..., modulo the number of
samples). The substitute's views are drawn with the index of the slot it fills and with its own size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from mocofast.config import AugmentConfig, ConfigError

CROP_ATTEMPTS = 10  # to find a random crop that fits into the image
CROP_RATIO = (3 / 4, 4 / 3)  # least and largest width / height of a crop


class Batch(NamedTuple):
    """One step's images on one rank. S is the side of a view.

    Views lie on the loader's device (copied without blocking the host); index and labels stay on the CPU.
    """

    views: tuple[Tensor, ...]  # each (B, 3, S, S) uint8, RGB, channels-last memory, not normalised
    index: Tensor  # type: ignore[assignment]  # (B,) int64: the samples shown, after substitution of bad ones
    labels: Tensor | None  # (B,) int64 of the samples shown, or None for an unlabelled source


class Source(Protocol):
    """A set of images. Files are decoded by the loader; arrays are (H, W, 3) uint8 already.

    All of a source's samples are of one kind. `load` raises only where going on would be wrong (a shard that cannot
    be reached): what a bad path or bad bytes do is the loader's to find.
    """

    labels: np.ndarray | None  # (N,) int64
    classes: tuple[str, ...]

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...  # what a log line calls the sample
    def load(
        self, index: int
    ) -> str | bytes | np.ndarray: ...  # a path, a file's content, or the pixels
    def fingerprint(
        self,
    ) -> str: ...  # hash of names (or pixels) and labels: a resumed run needs the same set


@runtime_checkable
class Ordered(Protocol):
    """A source with an order of its own."""

    def order(self, seed: int, epoch: int) -> np.ndarray: ...


class Loader(Protocol):
    """An endless, seekable stream of batches."""

    name: str  # "device", "dali" or "torchvision"
    reason: str  # why this loader was chosen, for the log; set by `build_loader`
    steps_per_epoch: int
    skipped: dict[int, str]  # bad samples met so far: index -> why

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Steps start .. steps_per_epoch - 1. A loader is one stream: a new epoch ends the one before."""
        ...

    def close(self) -> None: ...  # ends workers


@dataclass(frozen=True)
class BatchSlice:
    """This rank's part of every batch: ranks take consecutive slices, so that W ranks of B equal one of W*B."""

    batch_size: int  # images per step over all ranks
    rank: int = 0
    world_size: int = 1
    drop_last: bool = True

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ConfigError(
                f"data.batch_size must be a multiple of the number of ranks: got {self.batch_size} on "
                f"{self.world_size} ranks"
            )

    def steps(self, count: int) -> int:
        """Steps in an epoch of `count` samples."""
        steps = count // self.batch_size
        if not self.drop_last and count % self.batch_size >= self.world_size:
            steps += 1
        if steps == 0:
            raise ConfigError(
                f"data.batch_size must be at most the number of images: got {self.batch_size}, and {count} images"
            )
        return steps

    def indices(self, order: np.ndarray, step: int) -> np.ndarray:
        """The slice of `order` that this rank sees at `step`; all ranks get equally many."""
        whole = order[step * self.batch_size : (step + 1) * self.batch_size]
        per_rank = len(whole) // self.world_size
        return whole[self.rank * per_rank : (self.rank + 1) * per_rank]


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` samples in an epoch, (count,) int64; a new permutation each epoch, the first included."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def source_order(source: Source, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch shows a source's samples, (N,) int64: its own where it has one."""
    return (
        source.order(seed, epoch)
        if isinstance(source, Ordered)
        else epoch_order(len(source), seed, epoch)
    )


def no_image_decodes(source: Source, skipped: Mapping[int, str]) -> ValueError:
    """What a loader raises where no sample can be decoded; skipped: why, of each."""
    return ValueError(
        f"data: none of the {len(source)} images can be decoded; the first: {source.name(0)}: {skipped[0]}"
    )


def view_augments(augment: AugmentConfig, num_views: int) -> tuple[AugmentConfig, ...]:
    """The augmentation of each view: the second one's own probabilities in the places of `blur` and `solarize`."""
    second = replace(
        augment,
        blur=augment.blur_2 if augment.blur_2 >= 0 else augment.blur,
        solarize=augment.solarize_2 if augment.solarize_2 >= 0 else augment.solarize,
    )
    return tuple(second if view == 1 else augment for view in range(num_views))


class ViewParams(NamedTuple):
    """Everything random about one view of one image. Operators apply in the order of the fields,
    except that grayscale comes before the jitter where `AugmentConfig.gray_first` says so."""

    top: int  # crop, in pixels of the decoded image (EXIF orientation not applied)
    left: int
    height: int
    width: int
    angle: float  # counter-clockwise rotation of the resized crop about its centre, in degrees; 0 for none
    order: tuple[
        int, ...
    ]  # jitter: permutation of (0 brightness, 1 contrast, 2 saturation, 3 hue); () for none
    brightness: float  # factors; 1 keeps
    contrast: float
    saturation: float
    hue: float  # shift, as a share of the colour circle; 0 keeps
    gray: bool
    sigma: float  # of the Gaussian blur, in pixels; 0 for none
    solarize: bool
    flip: bool


def sample_view(
    augment: AugmentConfig, size: tuple[int, int], seed: int, epoch: int, index: int, view: int
) -> ViewParams:
    """Random parameters of one view, with the distributions of torchvision's transforms.

    size: (height, width) of the decoded image. The generator is keyed by (seed, epoch) and counts from
    (index, view), so a sample's views depend on nothing else, whoever computes them and in whatever order.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 1, index, view]))
    top, left, height, width = _random_resized_crop(rng, size, augment.crop_scale)
    angle = rng.uniform(-augment.rotate, augment.rotate) if augment.rotate else 0.0
    order: tuple[int, ...] = ()
    brightness = contrast = saturation = 1.0
    hue = 0.0
    if any(augment.jitter) and rng.random() < augment.jitter_p:
        order = tuple(int(i) for i in rng.permutation(4))
        brightness, contrast, saturation = (
            rng.uniform(max(0.0, 1 - s), 1 + s) for s in augment.jitter[:3]
        )
        hue = rng.uniform(-augment.jitter[3], augment.jitter[3])
    gray = rng.random() < augment.gray
    sigma = rng.uniform(*augment.blur_sigma) if rng.random() < augment.blur else 0.0
    solarize = augment.solarize > 0 and rng.random() < augment.solarize
    flip = rng.random() < augment.flip
    return ViewParams(
        top,
        left,
        height,
        width,
        angle,
        order,
        brightness,
        contrast,
        saturation,
        hue,
        gray,
        sigma,
        solarize,
        flip,
    )


def _random_resized_crop(
    rng: np.random.Generator, size: tuple[int, int], scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params with its default aspect ratios."""
    full_height, full_width = size
    for _ in range(CROP_ATTEMPTS):
        area = full_height * full_width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= full_width and 0 < height <= full_height:
            top = int(rng.integers(0, full_height - height + 1))
            left = int(rng.integers(0, full_width - width + 1))
            return top, left, height, width
    # No crop fitted: the largest central one of an allowed aspect.
    if full_width < CROP_RATIO[0] * full_height:
        width, height = full_width, round(full_width / CROP_RATIO[0])
    elif full_width > CROP_RATIO[1] * full_height:
        width, height = round(full_height * CROP_RATIO[1]), full_height
    else:
        width, height = full_width, full_height
    return (full_height - height) // 2, (full_width - width) // 2, height, width
