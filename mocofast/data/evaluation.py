"""Images as evaluation sees them: every sample once, in order, without randomness."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mocofast.data.decoding import decode
from mocofast.data.interface import Source
from mocofast.data.threads import Threads
from mocofast.errors import describe_error

AHEAD = 2  # batches in the making beside the one that is taken


def center_view(image: Image.Image, size: int) -> Image.Image:
    """(size, size): the shorter side resized to size * 256/224 (the ImageNet protocol), then the centre crop.

    An image no larger than `size` either way has no margin to crop: its shorter side becomes `size`.
    """
    small = max(image.size) <= size
    short = size if small else round(size * 256 / 224)
    if min(image.size) != short:
        image = F.resize(image, [short], InterpolationMode.BILINEAR, antialias=True)
    return F.center_crop(image, [size, size])


class EvalBatches:
    """Every good image of a source once, in order, as `center_view` cuts it.

    Yields (images, labels, index): images (B, 3, size, size) uint8, RGB, channels-last, on `device`; labels (B,)
    int64 or None, and index (B,) int64, both on the CPU. Bad files are left out, so a batch may be smaller;
    `skipped` records them: index -> why.
    """

    def __init__(
        self, source: Source, size: int, batch_size: int, workers: int, device: torch.device
    ) -> None:
        """workers: threads. They are as fast as processes, which would have to be forked from a process of many
        threads."""
        self.skipped: dict[int, str] = {}
        self._source, self._size, self._batch_size, self._device = source, size, batch_size, device
        self._threads = workers
        self._labels = None if source.labels is None else torch.from_numpy(source.labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        every = range(len(self._source))
        with Threads(self._threads, "mocofast-eval") as pool:
            made = zip(every, pool.map(self._center, every, AHEAD * self._batch_size))
            while results := dict(islice(made, self._batch_size)):
                yield from self._batch(results)

    def _center(self, index: int) -> np.ndarray | str:
        """The pixels (size, size, 3), or why there are none."""
        item = self._source.load(index)
        try:
            return np.asarray(center_view(decode(item), self._size))
        except Exception as error:  # as in training: PIL raises nearly anything on corrupt files
            return describe_error(error)

    def _batch(
        self, results: dict[int, np.ndarray | str]
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """One batch, or none where all its images are bad; results: what `_center` says of each."""
        good = {index: pixels for index, pixels in results.items() if not isinstance(pixels, str)}
        self.skipped.update(
            {index: reason for index, reason in results.items() if isinstance(reason, str)}
        )
        if good:
            images, index = (
                torch.from_numpy(np.stack(list(good.values()))),
                torch.tensor(list(good)),
            )
            if self._device.type == "cuda":
                images = images.pin_memory().to(self._device, non_blocking=True)
            yield (
                images.permute(0, 3, 1, 2),
                None if self._labels is None else self._labels[index],
                index,
            )
