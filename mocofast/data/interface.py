"""The interface of sources and loaders, and the only place where randomness enters the data.

A batch is a pure function of (seed, epoch, step, rank, world size, batch size).
`source_order` gives the order of the samples, `sample_view` gives every random
parameter of a view. The loaders (device, DALI, torchvision) execute the parameters and
take no random values of their own. Therefore

- all loaders give the same views up to the arithmetic of their operators,
- a run can resume at any step without the saved state of a stream,
- a bad file does not change the views of good files.

A sample that cannot be decoded is bad. The next good sample (`first_good`) fills the
slot of a bad sample. The views of the substitute are sampled with the index of the slot
and the size of the substitute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mocofast.config import AugmentConfig, ConfigError
from mocofast.data import deadline
from mocofast.data.items import Item
from mocofast.errors import NothingDecodedError
from mocofast.shares import Shares, share

CROP_ATTEMPTS = 10  # attempts to find a random crop that fits into the image


class Batch(NamedTuple):
    """The images of one step on one rank. B: images. H, W: height and width of a view, in pixels.

    The views lie on the loader's device. Copies to a GPU do not block the host. The
    index and the labels stay on the CPU.
    """

    # (B, C, H, W) per view, channels-last, not normalised: uint8 RGB, or uint8 or uint16 levels
    views: tuple[Tensor, ...]
    # (B,) int64: the samples shown, after the substitution of bad samples
    index: Tensor  # type: ignore[assignment]
    labels: Tensor | None  # (B,) int64: labels of the samples shown. None for an unlabelled source


class Source(Protocol):
    """A set of N images. Image files are decoded by the loader.

    All samples of a source are of one kind: paths, contents of files, or pixels. `load`
    may raise only where training must stop, for example if a shard cannot be fetched. A
    loader finds bad files.
    """

    # (N,) int64, -1 for unlabelled samples, or None for an unlabelled source
    labels: np.ndarray | None
    classes: tuple[str, ...]  # names of the labels

    def __len__(self) -> int:
        """Returns the number of samples."""
        ...

    def name(self, index: int) -> str:
        """Returns the name of a sample for log lines."""
        ...

    def load(self, index: int) -> str | bytes | np.ndarray | Item:
        """Returns the path of a file, the content of a file, pixels (H, W, C), uint8 or
        uint16, or an Item, which has a reader of its own.
        """
        ...

    def fingerprint(self) -> str:
        """Returns a hash of names (or pixels) and labels. A resumed run needs an equal
        fingerprint.
        """
        ...


@runtime_checkable
class Ordered(Protocol):
    """A source that chooses the order of its samples."""

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Returns a permutation of the samples, (N,) integers."""
        ...


class Loader(Protocol):
    """An endless stream of batches that can start at any step."""

    name: str  # "device", "dali" or "torchvision"
    reason: str  # why this loader was chosen, for the log. Set by `build_loader`
    steps_per_epoch: int
    skipped: dict[int, str]  # bad samples found until now: {index: reason}

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of steps start .. steps_per_epoch - 1.

        A loader is a single stream: a call ends the iterator of the call before.
        """
        ...

    def close(self) -> None:
        """Ends the workers."""
        ...


@dataclass(frozen=True)
class BatchSlice:
    """The slice of every batch that a rank loads.

    W ranks together see the batches of one process, whose images `Shares` divides over the ranks.
    """

    batch_size: int  # images per step over all ranks
    rank: int = 0
    world_size: int = 1
    drop_last: bool = True  # leave out the last batch of an epoch where it is smaller
    # repeat the first images of the last batch, where ranks cannot share it equally. Otherwise the
    # images that are over are left out
    pad: bool = False
    # ranks may have different numbers of images, so no image of a batch is left out
    uneven: bool = False
    parts: int = 1  # of an uneven batch: BatchNorm's parts, of which a rank has whole ones

    def __post_init__(self) -> None:
        if self.uneven:
            share(self.batch_size, self.world_size, self.parts)
        elif self.batch_size % self.world_size:
            raise ConfigError(
                "data.batch_size must be a multiple of the number of ranks: "
                f"got {self.batch_size} on {self.world_size} ranks"
            )

    @property
    def per_rank(self) -> int:
        """Images per step on this rank."""
        if self.uneven:
            return share(self.batch_size, self.world_size, self.parts).counts[self.rank]
        return self.batch_size // self.world_size

    def shares(self, count: int, step: int) -> Shares:
        """Returns the images of every rank at a step of an epoch of `count` samples."""
        images = min(self.batch_size, count - step * self.batch_size)
        return share(images, self.world_size, self.parts)

    def steps(self, count: int) -> int:
        """Returns the number of steps in an epoch of `count` samples. Raises
        ConfigError for none.
        """
        steps = count // self.batch_size
        least = 1 if self.pad else max(self.world_size, self.parts)
        if not self.drop_last and count % self.batch_size >= least:
            steps += 1
        if steps == 0:
            raise ConfigError(
                "data.batch_size must be at most the number of images: "
                f"got {self.batch_size}, and {count} images"
            )
        return steps

    def indices(self, order: np.ndarray, step: int) -> np.ndarray:
        """Returns the slice of `order` for this rank at `step`, int64. Unless the slice is uneven,
        all ranks get equally many samples.
        """
        whole = order[step * self.batch_size : (step + 1) * self.batch_size].astype(np.int64)
        if self.uneven:
            return whole[self.shares(len(order), step).rows(self.rank)]
        if self.pad and len(whole) % self.world_size:
            whole = np.resize(whole, -(-len(whole) // self.world_size) * self.world_size)
        per_rank = len(whole) // self.world_size
        return whole[self.rank * per_rank : (self.rank + 1) * per_rank]


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns a permutation of `count` samples, (count,) integers. Epochs differ, the
    first is shuffled too.
    """
    order = np.arange(count, dtype=order_type(count))
    np.random.Generator(np.random.Philox(key=[seed, epoch])).shuffle(order)
    return order


def order_type(count: int) -> type[np.int32] | type[np.int64]:
    """Returns the smallest type for the order of `count` samples."""
    return np.int32 if count <= np.iinfo(np.int32).max else np.int64


def source_order(source: Source, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of a source's samples in an epoch, (N,) integers. Asks the source
    if it is Ordered.
    """
    if isinstance(source, Ordered):
        return source.order(seed, epoch)
    return epoch_order(len(source), seed, epoch)


def view_sources(source: Source) -> tuple[Source, ...]:
    """Returns the sources of the files of a sample: `source`, or two for pairs of files.

    View v shows a file of source v, modulo the number of sources.
    """
    return getattr(source, "views", (source,))


def inner_sources(source: Source) -> tuple[Source, ...]:
    """Returns the sources from which a source takes its items: none for a source of files."""
    inner = (getattr(source, "_source", None), *getattr(source, "views", ()))
    return tuple(each for each in inner if each is not None)


def downloads(source: Source) -> bool:
    """Returns whether `load` may download, which takes any time. Downloads have own deadlines."""
    return getattr(source, "downloads", False) or any(map(downloads, inner_sources(source)))


def read_seconds(source: Source) -> float:
    """Returns the seconds in which an image must be read and decoded: infinite for downloads."""
    return math.inf if downloads(source) else deadline.READ_SECONDS


def first_good(slot: int, count: int, is_good: Callable[[int], bool]) -> int | None:
    """Returns the sample that fills a slot of a batch: the first good sample from `slot` on.

    Asks is_good(slot), is_good(slot + 1), ..., modulo `count`, until a sample is good.
    Returns None if all `count` samples are bad.
    """
    tried = ((slot + offset) % count for offset in range(count))
    return next(filter(is_good, tried), None)


def no_image_decodes(source: Source, skipped: Mapping[int, str]) -> NothingDecodedError:
    """Returns the error for a source without a good sample. skipped: {index: reason},
    every sample.
    """
    return NothingDecodedError(
        f"data: none of the {len(source)} images can be decoded; "
        f"the first: {source.name(0)}: {skipped[0]}"
    )


def labels_of(source: Source, index: Tensor) -> Tensor | None:
    """Returns the labels of some samples, (B,) int64, or None for an unlabelled source.

    index: (B,) int64 on the CPU.
    """
    return None if source.labels is None else torch.from_numpy(source.labels[index.numpy()])


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to `device`. A copy to a GPU does not block the host."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def view_augments(augment: AugmentConfig, num_views: int) -> tuple[AugmentConfig, ...]:
    """Returns the augmentation of every view: `num_views` views, then `local_crops` small views.

    `blur_2` and `solarize_2` apply to the second view.
    """
    second = replace(
        augment,
        blur=augment.blur_2 if augment.blur_2 >= 0 else augment.blur,
        solarize=augment.solarize_2 if augment.solarize_2 >= 0 else augment.solarize,
    )
    views = tuple(second if view == 1 else augment for view in range(num_views))
    return views + (augment.local(),) * augment.local_crops


class ViewParams(NamedTuple):
    """The random parameters of one view of one image.

    Operators apply in the order of the fields. Exception: with
    `AugmentConfig.gray_first` the grayscale comes before the jitter.
    """

    top: int  # the crop, in pixels of the decoded image (EXIF orientation not applied)
    left: int
    height: int
    width: int
    angle: float  # counter-clockwise rotation of the resized crop about its centre, in degrees
    # order of the jitter: a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue,
    # or () for none
    order: tuple[int, ...]
    brightness: float  # a factor, as contrast and saturation. 1 keeps the image
    contrast: float
    saturation: float
    hue: float  # shift, as a fraction of the colour circle. 0 keeps the image
    gray: bool
    sigma: float  # standard deviation of the Gaussian blur, in pixels. 0 for no blur
    solarize: bool
    flip: bool
    vertical_flip: bool = False
    turns: int = 0  # counter-clockwise turns by 90 degrees
    # 32 random bits, from which come the factors of channels and of stains
    # (`AugmentConfig.channel_jitter` and `hed`), and the noise. 0 for a view without the three
    key: int = 0
    noise: float = 0.0  # standard deviation of Gaussian noise, as a share of the range of pixels


def sample_view(
    augment: AugmentConfig, size: tuple[int, int], seed: int, epoch: int, index: int, view: int
) -> ViewParams:
    """Samples the parameters of one view, with the distributions of torchvision's transforms.

    size: (height, width) of the decoded image.
    index: the slot, equal to the index of the sample unless the sample is a substitute.

    The key of the generator is (seed, epoch). The counter starts at (index, view). The
    parameters depend on nothing else, so any process can compute any view in any order.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 1, index, view]))
    top, left, height, width = _random_resized_crop(rng, size, augment)
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
    # These operators come last, so that views without these operators have the stream of older
    # versions.
    vertical_flip = augment.vertical_flip > 0 and rng.random() < augment.vertical_flip
    turns = key = 0
    if augment.quarter_turns and rng.random() < augment.quarter_turns:
        turns = int(4 * rng.random())
    if augment.noise or augment.hed or any(augment.channel_jitter):
        key = 1 + int((2**32 - 1) * rng.random())
    noise = rng.uniform(0.0, augment.noise) if augment.noise else 0.0
    colour = (order, brightness, contrast, saturation, hue, gray)
    late = (vertical_flip, turns, key, noise)
    return ViewParams(top, left, height, width, angle, *colour, sigma, solarize, flip, *late)


def _random_resized_crop(
    rng: np.random.Generator, size: tuple[int, int], augment: AugmentConfig
) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params: scale and ratio are of the crop in the image."""
    (narrowest, widest), scale = augment.crop_ratio, augment.crop_scale
    full_height, full_width = size
    for _ in range(CROP_ATTEMPTS):
        area = full_height * full_width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= full_width and 0 < height <= full_height:
            top = int(rng.integers(0, full_height - height + 1))
            left = int(rng.integers(0, full_width - width + 1))
            return top, left, height, width
    # No crop fitted. Take the largest central crop of an allowed aspect ratio.
    if full_width < narrowest * full_height:
        width, height = full_width, max(1, round(full_width / narrowest))
    elif full_width > widest * full_height:
        width, height = max(1, round(full_height * widest)), full_height
    else:
        width, height = full_width, full_height
    return (full_height - height) // 2, (full_width - width) // 2, height, width
