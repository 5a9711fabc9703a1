"""The device loader: a small set of small images, held where the training runs, so that nothing is fetched.

Image files are decoded once, at the start; all have to be of one size. On a GPU one launch of one kernel
(`mocofast_kernels.augment`) makes all views of a batch; elsewhere PyTorch makes them, as many at a time as a core's
cache holds. The parameters are those of `sample_view`, drawn for many steps at once, so the stream is that of the other
loaders. Normalising is left to the model, as with every loader.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mocofast.config import AugmentConfig, ConfigError
from mocofast.data.interface import Batch, BatchSlice, Source, no_image_decodes, source_order
from mocofast.data.sampling import Views, per_view, sample_views
from mocofast.data.sources import ArraySource
from mocofast.data.view_ops import apply_view_ops, box_radius
from mocofast.ops import backend

LARGEST, LARGEST_ROTATED = (
    64,
    32,
)  # sides of views, as in the kernel's module (which imports Triton)
LARGEST_SET = 8 * 2**30  # bytes of pixels: CIFAR has 150 MB, STL-10's unlabelled part 2.8 GB
SAMPLED_AT_ONCE = (
    4096  # views of which parameters are drawn in one go: 1 us each instead of 2 for 512
)
CACHED_PIXELS = 2**17  # of views that PyTorch makes at a time: 1.5 MB of float32


def why_not_device_loader(
    source: Source, augments: tuple[AugmentConfig, ...], device: torch.device
) -> str:
    """Why the device loader cannot serve, as far as can be told without decoding anything; "" if it can."""
    for augment in augments:
        largest = LARGEST_ROTATED if augment.rotate else LARGEST
        if augment.size > largest:
            return f"it makes{' rotated' * bool(augment.rotate)} views of up to {largest} pixels, not {augment.size}"
    return _too_large(source.images.nbytes, device) if isinstance(source, ArraySource) else ""


def _too_large(size: int, device: torch.device) -> str:
    room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else LARGEST_SET
    if size <= min(room, LARGEST_SET):
        return ""
    of = "a quarter of the GPU's free memory" if room < LARGEST_SET else "it holds"
    return f"{size / 2**30:.1f} GiB of pixels are more than {of}"


class LoadedImages(NamedTuple):
    """Every image of a source, decoded."""

    images: np.ndarray  # (N, H, W, 3) uint8
    shown: np.ndarray  # (N,) int64: a sample's own index, or that of its substitute
    skipped: dict[int, str]  # bad samples: why


def load_images(source: Source, device: torch.device) -> LoadedImages:
    """Decode every image; bad ones are replaced as `mocofast.data.interface` says.

    Raises ValueError where no image can be decoded, or they differ in size, or are too many.
    """
    every = np.arange(len(source))
    if isinstance(source, ArraySource):
        return LoadedImages(source.images, every, {})
    from mocofast.data.decoding import decode, describe

    images, skipped = np.zeros((0, 0, 0, 3), dtype=np.uint8), {}
    for index in every.tolist():
        try:
            pixels = np.asarray(decode(source.load(index)))
        except Exception as error:  # PIL's decoders raise nearly any on corrupt files
            skipped[index] = describe(error)
            continue
        if not len(images):
            if why := _too_large(len(source) * pixels.nbytes, device):
                raise ConfigError(f"data.loader=device cannot serve: {why}")
            images = np.zeros((len(source), *pixels.shape), dtype=np.uint8)
        if pixels.shape != images.shape[1:]:
            sizes = " and ".join(
                f"{width} x {height}" for height, width, _ in (images.shape[1:], pixels.shape)
            )
            raise ConfigError(
                f"data.loader=device needs images of one size, got {sizes} ({source.name(index)})"
            )
        images[index] = pixels
    good = np.setdiff1d(every, list(skipped))
    if not len(good):
        raise no_image_decodes(source, skipped)
    return LoadedImages(images, good[np.searchsorted(good, every) % len(good)], skipped)


class DeviceLoader:
    """See `mocofast.data.interface.Loader`."""

    name = "device"

    def __init__(
        self,
        source: Source,
        augments: tuple[AugmentConfig, ...],
        shard: BatchSlice,
        seed: int,
        device: torch.device,
    ) -> None:
        """augments: one per view. Decodes files, and copies the images to `device`."""
        if why := why_not_device_loader(source, augments, device):
            raise ConfigError(f"data.loader=device cannot serve: {why}")
        self.reason = ""
        self.steps_per_epoch = shard.steps(len(source))
        loaded = load_images(source, device)
        self.skipped = loaded.skipped
        self._labels = None if source.labels is None else torch.from_numpy(source.labels)
        self._source = source
        self._images = torch.from_numpy(np.ascontiguousarray(loaded.images)).to(device)
        self._shown = torch.from_numpy(loaded.shown)
        self._augments, self._slice, self._seed, self._device = augments, shard, seed, device
        self._running: Generator[Batch, None, None] | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Steps start .. steps_per_epoch - 1 of an epoch. Ends the iteration before, if one is under way."""
        self.close()
        self._running = self._iterate(epoch, start)
        return self._running

    def _iterate(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        size = np.array(self._images.shape[1:3])
        order = source_order(self._source, self._seed, epoch)
        make = (
            self._composed
            if backend.backend_for(self._device.type).augment is None
            else self._fused
        )
        per_step = len(self._augments) * self._slice.batch_size // self._slice.world_size
        chunk = max(1, SAMPLED_AT_ONCE // per_step)
        for first in range(start, self.steps_per_epoch, chunk):
            last = min(first + chunk, self.steps_per_epoch)
            slots = [self._slice.indices(order, step) for step in range(first, last)]
            index = np.concatenate(slots)
            sampled = [
                sample_views(augment, size, self._seed, epoch, index, view)
                for view, augment in enumerate(self._augments)
            ]
            shares = self._shown[torch.from_numpy(index)].split([len(slot) for slot in slots])
            for shown, views in zip(shares, make(shares, sampled)):
                batch = tuple(view.permute(0, 3, 1, 2) for view in views)
                yield Batch(batch, shown, None if self._labels is None else self._labels[shown])

    def _composed(
        self, shares: tuple[Tensor, ...], sampled: list[Views]
    ) -> Iterator[tuple[Tensor, ...]]:
        """The views of one step after the other, (B, S, S, 3) each, by PyTorch, which is faster on many at once."""
        index = torch.cat(shares)
        views = (
            compose(self._images, index, own, augment)
            for own, augment in zip(sampled, self._augments)
        )
        return zip(*(view.split([len(share) for share in shares]) for view in views))

    def _fused(
        self, shares: tuple[Tensor, ...], sampled: list[Views]
    ) -> Iterator[tuple[Tensor, ...]]:
        """The same by the kernel: one launch a step for all views of one size."""
        fused = backend.backend_for(self._device.type).augment
        assert fused is not None

        def moved(x: Tensor) -> Tensor:
            return (
                x.pin_memory().to(self._device, non_blocking=True)
                if self._device.type == "cuda"
                else x
            )

        sizes = [augment.size for augment in self._augments]
        grouped = {size: [view for view, own in enumerate(sizes) if own == size] for size in sizes}
        tables = [
            parameter_table(views, augment) for views, augment in zip(sampled, self._augments)
        ]
        stacked = {
            size: moved(torch.stack([tables[view] for view in views]))
            for size, views in grouped.items()
        }
        index, begin = moved(torch.cat(shares)), 0
        for share in shares:
            rows = slice(begin, begin := begin + len(share))
            made: dict[int, Tensor] = {}
            for size, views in grouped.items():
                rotate = any(self._augments[view].rotate for view in views)
                made |= zip(
                    views,
                    fused(self._images, index[rows], stacked[size][:, rows], size, rotate=rotate),
                )
            yield tuple(made[view] for view in range(len(sizes)))

    def close(self) -> None:
        """End the iteration that is under way."""
        if self._running is not None:
            self._running.close()
        self._running = None


def compose(images: Tensor, index: Tensor, views: Views, augment: AugmentConfig) -> Tensor:
    """(B, S, S, 3) uint8: `apply_view_ops` on `crop_and_resize`, a few images at a time.

    images: (M, H, W, 3) uint8; index: (B,) int64 on the CPU, the image of every view.
    """
    size = augment.size
    out = torch.empty((len(index), size, size, 3), dtype=torch.uint8, device=images.device)
    params = per_view(views)
    step = max(1, CACHED_PIXELS // size**2)
    for begin in range(0, len(index), step):
        rows = slice(begin, begin + step)
        boxes = torch.from_numpy(np.stack([column[rows] for column in views[:4]]))
        crops = crop_and_resize(
            images[index[rows].to(images.device)], boxes.to(images.device), size
        )
        apply_view_ops(crops, params[rows], augment, out[rows])
    return out


def crop_and_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """(n, size, size, 3) uint8: PIL's antialiased bilinear resize of a box of each image.

    images: (n, H, W, 3) uint8; boxes: (4, n) int64: top, left, height, width. A weighted sum along rows, rounded half
    up, then one along columns. Weights are integers and so are all sums (exact in float32 while 255 times their total
    stays below 2^24), which makes this exact; PIL rounds weights to 22 bits, which may turn a tie around.
    """
    top, left, height, width = boxes
    n, H, W, channels = images.shape
    x = images.permute(0, 1, 3, 2).reshape(n, H * channels, W).float()
    weights = _weights(left, width, W, size)
    x = _rounded(x @ weights, weights.sum(1, keepdim=True)).view(n, H, channels * size)
    weights = _weights(top, height, H, size)
    x = _rounded(weights.mT @ x, weights.sum(1).unsqueeze(2))
    return x.view(n, size, channels, size).permute(0, 1, 3, 2).byte()


def _weights(start: Tensor, length: Tensor, full: int, size: int) -> Tensor:
    """(n, full, size) float32 integers: a triangle about the centre of every pixel, as wide as a pixel of the larger
    side, in units of 1 / (2 max(length, size))."""
    at = torch.arange(full, device=start.device) - start.unsqueeze(1)
    place = (2 * torch.arange(size, device=start.device) + 1) * length.unsqueeze(1)
    reach = 2 * length.clamp(min=size)
    weights = (
        reach.view(-1, 1, 1) - ((2 * at + 1) * size).unsqueeze(2).sub(place.unsqueeze(1)).abs_()
    )
    outside = (at < 0) | (at >= length.unsqueeze(1))
    return weights.clamp_(min=0).masked_fill_(outside.unsqueeze(2), 0).float()


def _rounded(sums: Tensor, total: Tensor) -> Tensor:
    return sums.mul_(2).add_(total).div_(2 * total).floor_()


def parameter_table(views: Views, augment: AugmentConfig) -> Tensor:
    """(n, 20) float32: the parameters that `mocofast_kernels.augment.augment` documents."""
    radii = np.array([box_radius(sigma) for sigma in views.sigma.tolist()])
    reach = np.ceil(radii)
    inner = 1 / (2 * radii + 1)
    radians = views.angle.astype(np.float32) * np.float32(math.pi / 180)
    outer = (1 - (2 * reach - 1) * inner) / 2
    columns = (
        views.top, views.left, views.height, views.width, np.cos(radians), np.sin(radians),
        views.gray * (1 if augment.gray_first else 2), *views.order.T, views.brightness, views.contrast,
        views.saturation, views.hue, reach, inner, outer, views.solarize, views.flip,
    )  # fmt: skip
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))
