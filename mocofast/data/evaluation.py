"""Batches for evaluation: every good image once, in order, without randomness."""

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
from mocofast.data.interface import Source, labels_of, to_device
from mocofast.data.ranges import range_of
from mocofast.data.threads import Threads
from mocofast.errors import describe_error

AHEAD = 2  # batches that the threads work ahead


def center_view(image: Image.Image, size: int) -> Image.Image:
    """Returns the central crop, (size, size), as the ImageNet protocol cuts it.

    The shorter side is resized to size * 256/224 before the crop. If neither side of
    the image is larger than `size`, the shorter side is resized to `size`, because
    there is no margin to crop.
    """
    small = max(image.size) <= size
    short = size if small else round(size * 256 / 224)
    if min(image.size) != short:
        image = F.resize(image, [short], InterpolationMode.BILINEAR, antialias=True)
    return F.center_crop(image, [size, size])


class EvalBatches:
    """Batches of all good images of a source, in order, cut by `center_view`.

    Yields (images, labels, index):
    images: (B, 3, size, size) uint8, RGB, channels-last, on `device`.
    labels: (B,) int64 on the CPU, or None for an unlabelled source.
    index: (B,) int64 on the CPU, the samples.

    Bad files are left out, so a batch may be smaller. `skipped` records bad files:
    {index: reason}.
    """

    def __init__(
        self, source: Source, size: int, batch_size: int, workers: int, device: torch.device
    ) -> None:
        """workers: number of threads. Threads are as fast as processes here. Processes
        would be forked from a process with many threads.
        """
        self.skipped: dict[int, str] = {}
        self._source, self._size, self._batch_size, self._device = source, size, batch_size, device
        self._threads = workers
        self._range = range_of(source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        every = range(len(self._source))
        with Threads(self._threads, "mocofast-eval") as pool:
            made = zip(every, pool.map(self._center, every, AHEAD * self._batch_size))
            while results := dict(islice(made, self._batch_size)):
                yield from self._batch(results)

    def _center(self, index: int) -> np.ndarray | str:
        """Returns pixels (size, size, 3) uint8, or the reason why the image is bad."""
        item = self._source.load(index)
        try:
            return np.asarray(center_view(decode(item, self._range), self._size))
        except Exception as error:  # PIL's decoders raise nearly any exception on corrupt files
            return describe_error(error)

    def _batch(
        self, results: dict[int, np.ndarray | str]
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Yields a batch, or nothing if all images are bad. results: {index: result of
        `_center`}.
        """
        good = {index: pixels for index, pixels in results.items() if not isinstance(pixels, str)}
        self.skipped.update({i: reason for i, reason in results.items() if isinstance(reason, str)})
        if good:
            images = to_device(torch.from_numpy(np.stack(list(good.values()))), self._device)
            index = torch.tensor(list(good))
            yield images.permute(0, 3, 1, 2), labels_of(self._source, index), index
