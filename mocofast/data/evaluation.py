"""Batches for evaluation: every good image once, in order, without randomness."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mocofast.data.arrays import PixelFormat, central_view, shorter_axis
from mocofast.data.deadline import in_time
from mocofast.data.decoding import decode
from mocofast.data.interface import Source, labels_of, read_seconds, to_device
from mocofast.data.ranges import range_of
from mocofast.data.threads import Threads
from mocofast.errors import describe_error
from mocofast.view_sizes import Size, height_width

LONG = 8  # longer side / shorter side, of views, from which only the crop is resized
AHEAD = 2  # batches that the threads work ahead


def center_view(image: Image.Image, size: Size) -> Image.Image:
    """Returns the central crop, of `size`, as the ImageNet protocol cuts it.

    The image is resized, with its aspect ratio, to just cover 256/224 of the view before the crop.
    If no side of the image is larger than the view, the image just covers the view, because there
    is no margin to crop. Of a very long image only the crop is resized, because the whole image
    would need seconds and gigabytes. The pixels differ by 1 of 255 then: PIL keeps the corners of a
    crop in float32.
    """
    full, shape = (image.height, image.width), height_width(size)
    short = shorter_axis(full, shape)
    small = all(side <= wanted for side, wanted in zip(full, shape))
    covered = shape[short] if small else round(shape[short] * 256 / 224)
    # The size after a resize, as torchvision rounds it.
    other = max(shape[1 - short], int(covered * full[1 - short] / full[short]))
    resized = (covered, other) if short == 0 else (other, covered)
    height, width = shape
    top, left = (round((side - wanted) / 2) for side, wanted in zip(resized, shape))
    if full[1 - short] * shape[short] <= LONG * full[short] * shape[1 - short]:
        if resized != full:
            image = image.resize(resized[::-1], Image.Resampling.BILINEAR)
        return image.crop((left, top, left + width, top + height))
    down, across = (side / made for side, made in zip(full, resized))
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


class EvalBatches:
    """Batches of all good images of a source, in order, cut by `center_view`.

    Yields (images, labels, index):
    images: (B, C, height, width), channels-last, on `device`: uint8 RGB, or the levels of `pixels`.
    labels: (B,) int64 on the CPU, or None for an unlabelled source.
    index: (B,) int64 on the CPU, the samples.

    Bad files are left out, so a batch may be smaller. `skipped` records bad files:
    {index: reason}.
    """

    def __init__(
        self,
        source: Source,
        size: Size,
        batch_size: int,
        workers: int,
        device: torch.device,
        pixels: PixelFormat | None = None,
    ) -> None:
        """Takes the arguments of `mocofast.data.loaders.eval_batches`, and:

        workers: number of threads. Threads are as fast as processes here. Processes
            would be forked from a process with many threads.
        pixels: how images are read that are not 8-bit RGB. `central_view` cuts these images.
        """
        self._pixels = pixels
        self.skipped: dict[int, str] = {}
        self._source, self._batch_size, self._device = source, batch_size, device
        self._size = size
        self._threads = workers
        self._range, self._seconds = range_of(source), read_seconds(source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        every = range(len(self._source))
        with Threads(self._threads, "mocofast-eval") as pool:
            made = zip(every, pool.map(self._center, every, AHEAD * self._batch_size))
            while results := dict(islice(made, self._batch_size)):
                yield from self._batch(results)

    def _center(self, index: int) -> np.ndarray | str:
        """Returns pixels (height, width, C), or the reason why the image is bad."""
        return in_time(self._seconds, self._decoded_center, index)

    def _decoded_center(self, index: int) -> np.ndarray | str:
        item = self._source.load(index)
        try:
            if self._pixels is not None:
                return central_view(self._pixels.load(item), self._size)
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
            index = torch.tensor(list(good), device="cpu")
            yield images.permute(0, 3, 1, 2), labels_of(self._source, index), index
