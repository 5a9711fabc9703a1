"""Images as evaluation sees them: every sample once, in order, without randomness."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mocofast.data.interface import Source
from mocofast.data.torchvision_loader import decode, describe, leave_signals_to_main


def center_view(image: Image.Image, size: int) -> Image.Image:
    """(size, size): the shorter side resized to size * 256/224 (the ImageNet protocol), then the centre crop.

    An image no larger than `size` either way has no margin to crop: its shorter side becomes `size`.
    """
    small = max(image.size) <= size
    short = size if small else round(size * 256 / 224)
    if min(image.size) != short:
        image = F.resize(image, [short], InterpolationMode.BILINEAR, antialias=True)
    return F.center_crop(image, [size, size])


class _Centers(Dataset[Any]):
    def __init__(self, source: Source, size: int) -> None:
        self.source = source
        self.size = size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | str]:
        """index and the pixels (size, size, 3), or why there are none."""
        item = self.source.load(index)
        try:
            image = decode(item)
        except Exception as error:  # as in training: PIL raises nearly anything on corrupt files
            return index, describe(error)
        return index, np.asarray(center_view(image, self.size))


def _collate(samples: list[tuple[int, np.ndarray | str]]) -> tuple[Tensor | None, Tensor, dict[int, str]]:
    pixels = [sample for _, sample in samples if isinstance(sample, np.ndarray)]
    index = torch.tensor([i for i, sample in samples if isinstance(sample, np.ndarray)], dtype=torch.int64)
    bad = {i: sample for i, sample in samples if isinstance(sample, str)}
    return torch.from_numpy(np.stack(pixels)) if pixels else None, index, bad


class EvalBatches:
    """Every good image of a source once, in order, as `center_view` cuts it.

    Yields (images, labels, index): images (B, 3, size, size) uint8, RGB, channels-last, on `device`; labels (B,)
    int64 or None, and index (B,) int64, both on the CPU. Bad files are left out, so a batch may be smaller;
    `skipped` records them: index -> why.
    """

    def __init__(self, source: Source, size: int, batch_size: int, workers: int, device: torch.device) -> None:
        """workers: processes; 0 loads in this one."""
        self.skipped: dict[int, str] = {}
        self._labels = None if source.labels is None else torch.from_numpy(source.labels)
        self._device = device
        self._batches = DataLoader(
            _Centers(source, size),
            batch_size=batch_size,
            collate_fn=_collate,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # evaluating must not draw from the global one
            worker_init_fn=leave_signals_to_main,
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        for pixels, index, bad in self._batches:
            self.skipped.update(bad)
            if pixels is not None:
                images = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
                yield images, None if self._labels is None else self._labels[index], index
