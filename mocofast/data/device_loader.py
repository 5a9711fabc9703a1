"""The device loader: holds a small set of small images in memory where the training runs.

Image files are decoded once, at the start. All files must have one size. On a GPU one
launch of one kernel (`mocofast_kernels.augment`) makes all views of a batch. On a CPU
PyTorch makes the views, as many at a time as fit into the cache of a core. The
parameters of the views are sampled for many steps at once and equal `sample_view`, so
the stream is the stream of the other loaders. The model normalises the views.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mocofast.config import AugmentConfig, ConfigError
from mocofast.data.arrays import PixelFormat
from mocofast.data.deadline import in_time
from mocofast.data.interface import (
    Batch,
    BatchSlice,
    Source,
    first_good,
    labels_of,
    no_image_decodes,
    read_seconds,
    source_order,
    to_device,
    view_sources,
)
from mocofast.data.photometric import make_views
from mocofast.data.ranges import range_of
from mocofast.data.sampling import Views, per_view, sample_views
from mocofast.data.sources import ArraySource
from mocofast.data.view_ops import box_radius
from mocofast.errors import describe_error
from mocofast.ops import backend
from mocofast.view_sizes import height_width, pixels_text

# Largest sides of views, as in mocofast_kernels.augment, which cannot be imported without
# Triton.
LARGEST, LARGEST_ROTATED = 64, 32
LARGEST_SET = 8 * 2**30  # bytes of pixels. CIFAR has 150 MB, the unlabelled part of STL-10 2.8 GB
SAMPLED_AT_ONCE = (
    4096  # views whose parameters are sampled together: 1 us a view, 2 us for 512 views
)
CACHED_PIXELS = 2**17  # pixels of the views that PyTorch makes together: 1.5 MB of float32


def why_not_device_loader(
    source: Source, augments: tuple[AugmentConfig, ...], device: torch.device
) -> str:
    """Returns why the device loader cannot serve, or "" if it can. Decodes no image."""
    for augment in augments:
        largest = LARGEST_ROTATED if augment.rotate else LARGEST
        for size in augment.training_sizes():
            if max(height_width(size)) > largest:
                kind = "rotated views" if augment.rotate else "views"
                return f"it makes {kind} of up to {largest} pixels, not {pixels_text(size)}"
    return _too_large(source.images.nbytes, device) if isinstance(source, ArraySource) else ""


def _too_large(size: int, device: torch.device) -> str:
    """Returns why `size` bytes of pixels do not fit on the device, or "" if they fit."""
    room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else LARGEST_SET
    if size <= min(room, LARGEST_SET):
        return ""
    limit = "a quarter of the GPU's free memory" if room < LARGEST_SET else "it holds"
    return f"{size / 2**30:.1f} GiB of pixels are more than {limit}"


def why_not_kernel(dtype: torch.dtype, augments: tuple[AugmentConfig, ...]) -> str:
    """Returns why PyTorch's operators make the views on every device, or "" if a kernel can.

    dtype: of the images.
    """
    if dtype != torch.uint8:
        return "the kernel is for 8 bits"
    late = ("vertical_flip", "quarter_turns", "hed", "noise")
    used = [name for a in augments for name in late if getattr(a, name)]
    used += ["channel_jitter" for a in augments if any(a.channel_jitter)]
    return f"the kernel has no {used[0]}" if used else ""


class LoadedImages(NamedTuple):
    """Every image of a source, decoded."""

    images: np.ndarray  # (N, H, W, C), uint8 or uint16
    shown: np.ndarray  # (N,) int64: the sample that fills every slot (`first_good`)
    skipped: dict[int, str]  # bad samples: {index: reason}


def load_images(
    source: Source, device: torch.device, pixels: PixelFormat | None = None
) -> LoadedImages:
    """Decodes every image of a source.

    pixels: how images are read that are not 8-bit RGB.

    Raises ValueError if no image can be decoded, and ConfigError (a ValueError) if the
    images differ in size or take too much memory.
    """
    count = len(source)
    shown = np.arange(count)
    if isinstance(source, ArraySource):
        return LoadedImages(source.images, shown, {})
    from mocofast.data.decoding import decode

    value_range = range_of(source)
    # Decode into one array, which is made when the size of the first good image is known.
    images, skipped = np.zeros((0, 0, 0, 3), dtype=np.uint8), {}
    read = pixels.load if pixels else lambda item: np.asarray(decode(item, value_range))
    seconds = read_seconds(source)

    def load(index: int) -> np.ndarray | str:
        item = source.load(index)
        try:
            return read(item)
        except Exception as error:  # PIL's decoders raise nearly any exception on corrupt files
            return describe_error(error)

    for index in range(count):
        image = in_time(seconds, load, index)
        if isinstance(image, str):
            skipped[index] = image
            continue
        if not len(images):
            if why := _too_large(count * image.nbytes, device):
                raise ConfigError(f"data.loader=device cannot serve: {why}")
            images = np.zeros((count, *image.shape), dtype=image.dtype)
        if image.shape != images.shape[1:]:
            first, other = (f"{w} x {h}" for h, w, _ in (images.shape[1:], image.shape))
            raise ConfigError(
                "data.loader=device needs images of one size, "
                f"got {first} and {other} ({source.name(index)})"
            )
        images[index] = image
    # Fill the slots of bad samples.
    for index in skipped:
        substitute = first_good(index, count, lambda sample: sample not in skipped)
        if substitute is None:
            raise no_image_decodes(source, skipped)
        shown[index] = substitute
    return LoadedImages(images, shown, skipped)


def load_views(
    source: Source, device: torch.device, pixels: PixelFormat | None = None
) -> LoadedImages:
    """Decodes the images of all views of a source. Arguments, errors: as for `load_images`.

    Of pairs of files all first files come first, then all second files. A pair with a bad file
    is a bad sample.
    """
    sources = view_sources(source)
    if len(sources) == 1:
        return load_images(source, device, pixels)
    loaded = [load_images(part, device, pixels) for part in sources]
    shapes = {part.images.shape[1:] for part in loaded}
    if len(shapes) > 1:
        raise ConfigError(f"data.loader=device needs images of one size, got {sorted(shapes)}")
    skipped = {index: reason for part in loaded for index, reason in part.skipped.items()}
    shown = np.arange(len(source))
    for index in skipped:
        found = first_good(index, len(source), lambda sample: sample not in skipped)
        if found is None:
            raise no_image_decodes(source, skipped)
        shown[index] = found
    return LoadedImages(np.concatenate([part.images for part in loaded]), shown, skipped)


class DeviceLoader:
    """A `mocofast.data.interface.Loader` without workers."""

    name = "device"

    def __init__(
        self,
        source: Source,
        augments: tuple[AugmentConfig, ...],
        batch_slice: BatchSlice,
        seed: int,
        device: torch.device,
        pixels: PixelFormat | None = None,
    ) -> None:
        """Takes the arguments of `mocofast.data.loaders.build_loader`, and:

        pixels: how images are read that are not 8-bit RGB.

        Decodes all files and copies the images to `device`.
        Raises ConfigError where the device loader cannot serve, and the errors of
        `load_images`.
        """
        if why := why_not_device_loader(source, augments, device):
            raise ConfigError(f"data.loader=device cannot serve: {why}")
        self.reason = ""
        self.steps_per_epoch = batch_slice.steps(len(source))
        loaded = load_views(source, device, pixels)
        self.skipped = loaded.skipped
        self._source, self._augments, self._slice = source, augments, batch_slice
        self._seed, self._device = seed, device
        self._images = torch.from_numpy(np.ascontiguousarray(loaded.images)).to(device)
        self._shown = torch.from_numpy(loaded.shown)
        # Where the images of every view begin
        files = len(view_sources(source))
        self._begin = [view % files * len(source) for view in range(len(augments))]
        # None: PyTorch makes the views.
        self._kernel = None
        if not why_not_kernel(self._images.dtype, augments):
            self._kernel = backend.backend_for(device.type).augment
        self._running: Generator[Batch, None, None] | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of steps start .. steps_per_epoch - 1. Ends the iterator
        of the call before.
        """
        self.close()
        self._running = self._iterate(epoch, start)
        return self._running

    def _iterate(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        size = np.array(self._images.shape[1:3])
        order = source_order(self._source, self._seed, epoch)
        augments = tuple(augment.at(epoch) for augment in self._augments)
        make = self._composed if self._kernel is None else self._fused
        chunk = max(1, SAMPLED_AT_ONCE // (len(augments) * self._slice.per_rank))
        for first in range(start, self.steps_per_epoch, chunk):
            # Sample the parameters of `chunk` steps at once.
            last = min(first + chunk, self.steps_per_epoch)
            slots = [self._slice.indices(order, step) for step in range(first, last)]
            index = np.concatenate(slots)
            sampled = [
                sample_views(augment, size, self._seed, epoch, index, view)
                for view, augment in enumerate(augments)
            ]
            # Make the views step by step.
            steps = self._shown[torch.from_numpy(index)].split([len(slot) for slot in slots])
            for shown, views in zip(steps, make(steps, sampled, augments)):
                batch = tuple(view.permute(0, 3, 1, 2) for view in views)
                yield Batch(batch, shown, labels_of(self._source, shown))

    def _composed(
        self, steps: tuple[Tensor, ...], sampled: list[Views], augments: tuple[AugmentConfig, ...]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yields the views of every step, (B, H, W, C) per view, made by PyTorch.

        steps: the images of every step, (B,) int64.
        sampled: the parameters of every view, for the images of all steps.
        augments: the augmentation of every view.

        PyTorch makes the views of all steps together, which is faster.
        """
        index = torch.cat(steps)
        views = (
            compose(self._images, index + begin, params, augment)
            for params, augment, begin in zip(sampled, augments, self._begin)
        )
        return zip(*(view.split([len(step) for step in steps]) for view in views))

    def _fused(
        self, steps: tuple[Tensor, ...], sampled: list[Views], augments: tuple[AugmentConfig, ...]
    ) -> Iterator[tuple[Tensor, ...]]:
        """As `_composed`, by the kernel: one launch per step for all views of one size."""
        assert self._kernel is not None
        # Group the views by size and file. Copy the parameters of a group to the device at once.
        groups: dict[tuple[tuple[int, int], int], list[int]] = {}
        for view, augment in enumerate(augments):
            groups.setdefault((augment.shape, self._begin[view]), []).append(view)
        tables = [parameter_table(params, augment) for params, augment in zip(sampled, augments)]
        stacked = {
            group: to_device(torch.stack([tables[view] for view in views]), self._device)
            for group, views in groups.items()
        }
        index, begin = to_device(torch.cat(steps), self._device), 0
        # Launch the kernel per step and group.
        for step in steps:
            rows = slice(begin, begin := begin + len(step))
            made: dict[int, Tensor] = {}
            for (shape, first), views in groups.items():
                rotate = any(augments[view].rotate for view in views)
                params = stacked[shape, first][:, rows]
                chosen = index[rows] + first if first else index[rows]
                made |= zip(views, self._kernel(self._images, chosen, params, shape, rotate=rotate))
            yield tuple(made[view] for view in range(len(augments)))

    def close(self) -> None:
        """Ends the iterator of the last `epoch`."""
        if self._running is not None:
            self._running.close()
        self._running = None


def compose(images: Tensor, index: Tensor, views: Views, augment: AugmentConfig) -> Tensor:
    """Returns (B, H, W, C): crops, resizes and augments, a few images at a time.

    images: (M, height, width, C), uint8 or uint16.
    index: (B,) int64 on the CPU, the image of every view.
    views: the parameters of B views.
    """
    shape = (len(index), *augment.shape, images.shape[3])
    out = torch.empty(shape, dtype=images.dtype, device=images.device)
    params = per_view(views)
    step = max(1, CACHED_PIXELS // math.prod(augment.shape))
    for begin in range(0, len(index), step):
        rows = slice(begin, begin + step)
        boxes = torch.from_numpy(np.stack([column[rows] for column in views[:4]]))
        chosen = rows_of(images, index[rows].to(images.device))
        crops = crop_and_resize(chosen, boxes.to(images.device), augment.shape)
        make_views(crops, params[rows], augment, out[rows])
    return out


def rows_of(images: Tensor, index: Tensor) -> Tensor:
    """Returns images[index]. PyTorch has few operators for uint16, so int16 is indexed there."""
    if images.dtype != torch.uint16:
        return images[index]
    return images.view(torch.int16)[index].view(torch.uint16)


def crop_and_resize(images: Tensor, boxes: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns (n, *shape, C): PIL's antialiased bilinear resize of a box of every image.

    images: (n, H, W, C), uint8 or uint16.
    boxes: (4, n) int64: top, left, height, width.

    Takes a weighted sum along rows, rounds half up, and does the same along columns.
    Weights are integers, so all sums are integers too, exact in float32 while 255 times
    the total weight stays below 2^24. The result is exact. PIL rounds weights to 22
    bits, which may round a tie the other way. For uint16 the sums are rounded to 24 bits.
    """
    top, left, height, width = boxes
    (n, H, W, channels), (tall, wide) = images.shape, shape
    x = images.permute(0, 1, 3, 2).reshape(n, H * channels, W).float()
    weights = _weights(left, width, W, wide)  # (n, W, wide)
    x = _rounded(x @ weights, weights.sum(1, keepdim=True)).view(n, H, channels * wide)
    weights = _weights(top, height, H, tall)  # (n, H, tall)
    x = _rounded(weights.mT @ x, weights.sum(1).unsqueeze(2))
    return x.view(n, tall, channels, wide).permute(0, 1, 3, 2).to(images.dtype)


def _weights(start: Tensor, length: Tensor, full: int, size: int) -> Tensor:
    """Returns (n, full, size) float32 integers: the weights of pixels in a crop's
    resized pixels.

    start, length: (n,) int64, the crop along one side of the image.
    full, size: pixels of this side of the image and of the resized crop.

    The weights of a resized pixel are a triangle about the centre of the pixel. The
    triangle is as wide as a pixel of the larger side. The unit is
    1 / (2 max(length, size)).
    """
    at = torch.arange(full, device=start.device) - start.unsqueeze(1)
    place = (2 * torch.arange(size, device=start.device) + 1) * length.unsqueeze(1)
    reach = 2 * length.clamp(min=size)
    distance = ((2 * at + 1) * size).unsqueeze(2).sub(place.unsqueeze(1)).abs_()
    weights = reach.view(-1, 1, 1) - distance
    outside = (at < 0) | (at >= length.unsqueeze(1))
    return weights.clamp_(min=0).masked_fill_(outside.unsqueeze(2), 0).float()


def _rounded(sums: Tensor, total: Tensor) -> Tensor:
    """Returns sums / total, rounded half up. Changes `sums`."""
    return sums.mul_(2).add_(total).div_(2 * total).floor_()


def parameter_table(views: Views, augment: AugmentConfig) -> Tensor:
    """Returns (n, 20) float32: the parameters as `mocofast_kernels.augment.augment`
    documents them.
    """
    radii = np.array([box_radius(sigma) for sigma in views.sigma.tolist()])
    reach = np.ceil(radii)
    inner = 1 / (2 * radii + 1)
    outer = (1 - (2 * reach - 1) * inner) / 2
    radians = views.angle.astype(np.float32) * np.float32(math.pi / 180)
    gray = views.gray * (1 if augment.gray_first else 2)
    crop = (views.top, views.left, views.height, views.width)
    factors = (views.brightness, views.contrast, views.saturation, views.hue)
    blur = (reach, inner, outer)
    columns = (
        *crop,
        np.cos(radians),
        np.sin(radians),
        gray,
        *views.order.T,
        *factors,
        *blur,
        views.solarize,
        views.flip,
    )
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))
