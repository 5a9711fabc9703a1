"""The torchvision loader: PIL decodes, `torchvision.transforms.v2.functional` augments
in worker processes.

This loader defines what the augmentations mean. Images stay PIL images until they are
views. Given the same parameters, the views equal the views of facebookresearch/moco's
own transforms bit for bit.

The blur is PIL's GaussianBlur: three box filters. A true Gaussian of the same sigma
differs by up to 47 of 255 at edges, by .3 to .5 on average.

Tensor operators were as fast (per 224-pixel view on one core: decode 1.1 ms against
PIL's 1.4, crop .15 against .35, hue 2.0 against 1.3, blur .9 against 1.3), but differ
from PIL by up to 11 in hue.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mocofast.config import AugmentConfig, DataConfig
from mocofast.data.arrays import PixelFormat, as_tensor
from mocofast.data.crops import make_from_images
from mocofast.data.deadline import in_time
from mocofast.data.decoding import decode
from mocofast.data.interface import (
    Batch,
    BatchSlice,
    Source,
    ViewParams,
    first_good,
    labels_of,
    no_image_decodes,
    read_seconds,
    sample_view,
    source_order,
    to_device,
    view_sources,
)
from mocofast.data.items import Item
from mocofast.data.ranges import range_of
from mocofast.data.scaled import decode_scaled, scaled_factor, scaled_params
from mocofast.data.view_ops import apply_late_ops, has_late_ops
from mocofast.errors import describe_error


def apply_view(image: Image.Image, params: ViewParams, augment: AugmentConfig) -> Image.Image:
    """Returns one view, of `augment.shape`. Executes `params` in the order of
    `ViewParams`.
    """
    crop = (params.top, params.left, params.height, params.width)
    image = F.resized_crop(
        image, *crop, list(augment.shape), InterpolationMode.BILINEAR, antialias=True
    )
    if params.angle:
        image = F.rotate(image, params.angle, InterpolationMode.BILINEAR, fill=0)
    if params.gray and augment.gray_first:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    image = _jitter(image, params)
    if params.gray and not augment.gray_first:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if params.sigma:
        image = image.filter(ImageFilter.GaussianBlur(radius=params.sigma))
    if params.solarize:
        image = F.solarize(image, threshold=128)
    if params.flip:
        image = F.horizontal_flip(image)
    return _late_ops(image, params, augment) if has_late_ops(params) else image


def apply_view_to_levels(
    image: np.ndarray, params: ViewParams, augment: AugmentConfig
) -> np.ndarray:
    """Returns one view, (*augment.shape, C), of levels (H, W, C), uint8 or uint16."""
    shape = (1, *augment.shape, image.shape[2])
    view = torch.from_numpy(np.empty(shape, image.dtype))
    make_from_images([as_tensor(image)], [params], augment, view)
    return view[0].numpy()


def _late_ops(image: Image.Image, params: ViewParams, augment: AugmentConfig) -> Image.Image:
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().contiguous()
    apply_late_ops(x, [params], augment, 255)
    return Image.fromarray(x[0].permute(1, 2, 0).byte().numpy())


def _jitter(image: Image.Image, params: ViewParams) -> Image.Image:
    for operator in params.order:
        # Neutral values are left out, as in torchvision. A conversion to HSV and back
        # changes pixels even without a shift of the hue.
        if operator == 0 and params.brightness != 1:
            image = F.adjust_brightness(image, params.brightness)
        elif operator == 1 and params.contrast != 1:
            image = F.adjust_contrast(image, params.contrast)
        elif operator == 2 and params.saturation != 1:
            image = F.adjust_saturation(image, params.saturation)
        elif operator == 3 and params.hue:
            image = F.adjust_hue(image, params.hue)
    return image


class Sample(NamedTuple):
    """What a worker returns for one slot of a batch."""

    views: list[np.ndarray]  # (H, W, C) per view. Empty if all samples of the source are bad
    shown: int  # index of the sample in the slot
    skipped: dict[int, str]  # bad samples met on the way: {index: reason}


class _Decoded(NamedTuple):
    """An image file, decoded."""

    image: Image.Image | np.ndarray
    size: tuple[int, int]  # (height, width) of the image in full
    factor: int = 1  # the image is at 1 / factor of its size


class _Samples(Dataset[Sample]):
    """Makes the views of one slot. Keys are (epoch, slot)."""

    def __init__(
        self,
        source: Source,
        augments: tuple[AugmentConfig, ...],
        seed: int,
        pixels: PixelFormat | None = None,
        scaled: bool = False,
    ) -> None:
        self.source = source
        self.pixels = pixels
        self.scaled = scaled
        self.augments = augments
        self.seed = seed
        self.seconds = read_seconds(source)
        self.bad: dict[int, str] = {}  # bad samples that need not be decoded again: {index: reason}

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, slot = key
        skipped: dict[int, str] = {}
        decoded: dict[int, list[_Decoded]] = {}  # a file for every source

        def is_good(index: int) -> bool:
            if index not in self.bad:
                found = in_time(self.seconds, self._files, index, epoch, slot)
                if not isinstance(found, str):
                    decoded[index] = found
                    return True
                self.bad[index] = found
            skipped[index] = self.bad[index]
            return False

        shown = first_good(slot, len(self.source), is_good)
        if shown is None:
            return Sample([], slot, skipped)
        return Sample(self._views(decoded[shown], epoch, slot), shown, skipped)

    def _files(self, index: int, epoch: int, slot: int) -> list[_Decoded] | str:
        """Decodes the files of a sample, or returns why one is bad. Raises what `load` raises."""
        items = [source.load(index) for source in view_sources(self.source)]
        try:
            return [
                self._decode(item, epoch, slot, slice(first, None, len(items)))
                for first, item in enumerate(items)
            ]
        # PIL's decoders raise nearly any exception on corrupt files (SyntaxError, struct.error,
        # ...).
        except Exception as error:
            return describe_error(error)

    def _decode(
        self, item: str | bytes | np.ndarray | Item, epoch: int, slot: int, views: slice
    ) -> _Decoded:
        """Decodes a file. views: the views that show the file."""
        if self.pixels is not None:
            levels = self.pixels.load(item)
            return _Decoded(levels, levels.shape[:2])
        if self.scaled and isinstance(item, (str, bytes)):

            def choose(size: tuple[int, int]) -> int:
                params, augments = self._params(size, epoch, slot)
                return scaled_factor(params[views], augments[views])

            if found := decode_scaled(item, choose):
                return _Decoded(*found)
        image = decode(item, range_of(self.source))
        return _Decoded(image, (image.height, image.width))

    def _params(
        self, size: tuple[int, int], epoch: int, slot: int
    ) -> tuple[list[ViewParams], list[AugmentConfig]]:
        """Returns parameters and augmentation of every view. size: of the image, in full."""
        augments = [augment.at(epoch) for augment in self.augments]
        sampled = (
            sample_view(augment, size, self.seed, epoch, slot, view)
            for view, augment in enumerate(augments)
        )
        return list(sampled), augments

    def _views(self, files: list[_Decoded], epoch: int, slot: int) -> list[np.ndarray]:
        views = []
        sampled = [self._params(file.size, epoch, slot) for file in files]
        for view in range(len(self.augments)):
            image, size, factor = files[view % len(files)]
            params, augments = sampled[view % len(files)]
            apply: Any = apply_view_to_levels if isinstance(image, np.ndarray) else apply_view
            scaled = scaled_params(params[view], size, factor)
            views.append(np.asarray(apply(image, scaled, augments[view])))
        return views


class _Steps(Sampler[list[tuple[int, int]]]):
    """Yields the (epoch, slot) pairs of this rank's batches. `epoch` and `start` are
    set before a pass.
    """

    def __init__(self, source: Source, batch_slice: BatchSlice, seed: int) -> None:
        self.source, self.slice, self.seed = source, batch_slice, seed
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = source_order(self.source, self.seed, epoch)
        for step in range(self.start, self.slice.steps(len(self.source))):
            yield [(epoch, int(index)) for index in self.slice.indices(order, step)]


def _collate(samples: list[Sample]) -> tuple[tuple[Tensor, ...], Tensor, dict[int, str]]:
    """Returns views (B, H, W, C), the samples shown (B,), and the bad samples {index: reason}."""
    views = tuple(
        torch.from_numpy(_stacked(view)) for view in zip(*(sample.views for sample in samples))
    )
    skipped = {index: reason for sample in samples for index, reason in sample.skipped.items()}
    return views, torch.tensor([sample.shown for sample in samples], device="cpu"), skipped


def _stacked(views: Sequence[np.ndarray]) -> np.ndarray:
    """Returns B views (H, W, C) as (B, H, W, C) in C order, which `np.stack` alone may not keep."""
    out = np.empty((len(views), *views[0].shape), views[0].dtype)
    return np.stack(views, out=out)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM wait for the end of the block.

    A worker that starts in the block takes this over, until `leave_signals_to_main`: a signal in
    the first moments of a worker would end the worker.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_main(worker: int) -> None:
    """Start-up of a worker: lets only the main process answer Ctrl-C and a scheduler's SIGTERM.

    Both signals reach the whole process group. The main process still gets batches from
    the workers, finishes the step and writes a checkpoint. A worker obeys a SIGTERM
    from the main process, because the main process ends workers with SIGTERM when it
    exits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # absent on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class TorchvisionLoader:
    """A `mocofast.data.interface.Loader`. Workers start with the first epoch and stay
    until `close`.
    """

    name = "torchvision"

    def __init__(
        self,
        source: Source,
        augments: tuple[AugmentConfig, ...],
        batch_slice: BatchSlice,
        seed: int,
        device: torch.device,
        workers: int,
        data: DataConfig | None = None,
        pixels: PixelFormat | None = None,
    ) -> None:
        """Takes the arguments of `mocofast.data.loaders.build_loader`, and:

        workers: number of processes. 0 loads in the calling process.
        data: of these options `prefetch` and `decode` are used.
        pixels: how images are read that are not 8-bit RGB. PyTorch's operators make the views.
        """
        self.reason = ""
        self.steps_per_epoch = batch_slice.steps(len(source))
        self.skipped: dict[int, str] = {}
        self._source, self._device = source, device
        self._workers = workers
        data = data or DataConfig()
        self._prefetch = data.prefetch if workers else None
        self._samples = _Samples(source, augments, seed, pixels, data.decode == "scaled")
        self._steps = _Steps(source, batch_slice, seed)
        self._batches: DataLoader[Any] | None = None
        self._running: Generator[Batch, None, None] | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of steps start .. steps_per_epoch - 1. Ends the iterator
        of the call before.
        """
        if self._running is not None:
            self._running.close()
        self._running = self._iterate(epoch, start)
        return self._running

    def _iterate(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        if self._batches is None:
            self._batches = DataLoader(
                self._samples,
                batch_sampler=self._steps,
                collate_fn=_collate,
                num_workers=self._workers,
                prefetch_factor=self._prefetch,
                persistent_workers=self._workers > 0,
                pin_memory=self._device.type == "cuda",
                # Without this generator, a pass takes a seed from PyTorch's global
                # generator, which changes the random values of the training.
                generator=torch.Generator(),
                worker_init_fn=leave_signals_to_main,
            )
        self._steps.epoch, self._steps.start = epoch, start
        with _signals_wait():
            batches = iter(self._batches)  # starts the workers
        for views, index, skipped in batches:
            self.skipped.update(skipped)
            if not views:
                raise no_image_decodes(self._source, self.skipped)
            # (B, H, W, C) -> (B, C, H, W), channels-last
            moved = tuple(to_device(view, self._device).permute(0, 3, 1, 2) for view in views)
            yield Batch(moved, index, labels_of(self._source, index))

    def close(self) -> None:
        """Ends the workers. A later epoch starts new workers."""
        if self._running is not None:
            self._running.close()
        self._running = self._batches = None
