"""The torchvision loader: PIL decodes, `torchvision.transforms.v2.functional` augments, worker processes feed.

It is the reference for what the augmentations mean. Images stay PIL images until they are a view, which
reproduces the MoCo reference's own transforms bit for bit, given the same parameters; that includes its
blur, PIL's GaussianBlur (three box filters), from which a true Gaussian of the same sigma differs by up to 47
of 255 at edges, .3 to .5 on average. Tensors were as fast (decode 1.1 ms against PIL's 1.4, crop .15 against
.35, hue 2.0 against 1.3, blur .9 against 1.3, per 224-pixel view on one core) but differ by up to 11 in hue.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mocofast.config import AugmentConfig, DataConfig
from mocofast.data.decoding import decode, describe
from mocofast.data.interface import (
    Batch,
    BatchSlice,
    Source,
    ViewParams,
    no_image_decodes,
    sample_view,
    source_order,
)

# Odd EXIF data, many pixels, palettes: each is fine here. For good, since `catch_warnings` is not for threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def apply_view(image: Image.Image, params: ViewParams, augment: AugmentConfig) -> Image.Image:
    """One view, (augment.size, augment.size): executes `params` in the order that `ViewParams` documents."""
    side = [augment.size, augment.size]
    crop = (params.top, params.left, params.height, params.width)
    image = F.resized_crop(image, *crop, side, InterpolationMode.BILINEAR, antialias=True)
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
    return F.horizontal_flip(image) if params.flip else image


def _jitter(image: Image.Image, params: ViewParams) -> Image.Image:
    for operator in params.order:
        # A neutral value is left out as torchvision does: through HSV and back even no shift changes pixels.
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
    """What a worker makes of one slot of a batch."""

    views: list[np.ndarray]  # (S, S, 3) uint8 each; empty if no sample at all is good
    shown: int  # index of the sample
    skipped: dict[int, str]  # bad samples met on the way to it: why


class _Samples(Dataset[Sample]):
    """What a worker holds: (epoch, slot's index) -> the views of that sample, or of its substitute."""

    def __init__(self, source: Source, augments: tuple[AugmentConfig, ...], seed: int) -> None:
        self.source = source
        self.augments = augments
        self.seed = seed
        self.bad: dict[int, str] = {}  # spares decoding a bad sample again

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, slot = key
        skipped: dict[int, str] = {}
        for offset in range(len(self.source)):
            index = (slot + offset) % len(self.source)
            if index not in self.bad:
                item = self.source.load(index)
                try:
                    image = decode(item)
                # PIL's decoders raise nearly any exception on corrupt files (SyntaxError, struct.error, ...).
                except Exception as error:
                    self.bad[index] = describe(error)
                else:
                    return Sample(self._views(image, epoch, slot), index, skipped)
            skipped[index] = self.bad[index]
        return Sample([], slot, skipped)

    def _views(self, image: Image.Image, epoch: int, slot: int) -> list[np.ndarray]:
        size = (image.height, image.width)
        return [
            np.asarray(
                apply_view(image, sample_view(augment, size, self.seed, epoch, slot, view), augment)
            )
            for view, augment in enumerate(self.augments)
        ]


class _Steps(Sampler[list[tuple[int, int]]]):
    """Stateless: the (epoch, index) pairs of this rank's batches, from a step that is set before each pass."""

    def __init__(self, source: Source, shard: BatchSlice, seed: int) -> None:
        self.source, self.slice, self.seed = source, shard, seed
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = source_order(self.source, self.seed, epoch)
        for step in range(self.start, self.slice.steps(len(self.source))):
            yield [(epoch, int(index)) for index in self.slice.indices(order, step)]


def _collate(samples: list[Sample]) -> tuple[tuple[Tensor, ...], Tensor, dict[int, str]]:
    views = zip(*(sample.views for sample in samples))
    skipped = {index: reason for sample in samples for index, reason in sample.skipped.items()}
    index = torch.tensor([sample.shown for sample in samples])
    return (
        tuple(torch.from_numpy(np.stack(view)) for view in views),
        index,
        skipped,
    )  # views: (B, S, S, 3)


def leave_signals_to_main(worker: int) -> None:
    """Worker start-up: let the main process alone answer Ctrl-C, and a SIGTERM that reaches the whole process group.

    It then still gets its batches, finishes the step and writes a checkpoint. A SIGTERM from the main process
    itself, which ends its workers so at exit, is obeyed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # absent on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class TorchvisionLoader:
    """See `mocofast.data.interface.Loader`. Workers start with the first epoch and stay until `close`."""

    name = "torchvision"

    def __init__(
        self,
        source: Source,
        augments: tuple[AugmentConfig, ...],
        shard: BatchSlice,
        seed: int,
        device: torch.device,
        workers: int,
        data: DataConfig | None = None,
    ) -> None:
        """augments: one per view. workers: processes; 0 loads in this one. data: for `prefetch`."""
        self.reason = ""
        self.steps_per_epoch = shard.steps(len(source))
        self.skipped: dict[int, str] = {}
        self._labels = None if source.labels is None else torch.from_numpy(source.labels)
        self._device = device
        self._workers = workers
        self._prefetch = (data or DataConfig()).prefetch if workers else None
        self._samples = _Samples(source, augments, seed)
        self._steps = _Steps(source, shard, seed)
        self._batches: DataLoader[Any] | None = None
        self._running: Generator[Batch, None, None] | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Steps start .. steps_per_epoch - 1 of an epoch. Ends the iteration before, if one is under way."""
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
                # A generator of its own: else each pass would draw from the global one, and so change a run.
                generator=torch.Generator(),
                worker_init_fn=leave_signals_to_main,
            )
        self._steps.epoch, self._steps.start = epoch, start
        for views, index, skipped in self._batches:
            self.skipped.update(skipped)
            if not views:
                raise no_image_decodes(self._samples.source, self.skipped)
            on_device = (
                view.to(self._device, non_blocking=True).permute(0, 3, 1, 2) for view in views
            )
            yield Batch(
                tuple(on_device), index, None if self._labels is None else self._labels[index]
            )

    def close(self) -> None:
        """End the workers. A later epoch would start new ones."""
        if self._running is not None:
            self._running.close()
        self._running = self._batches = None
