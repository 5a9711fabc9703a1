"""Images that tests of the data make for themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mocofast.data.sources import FolderSource, find_images


def photo(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth noise (height, width): JPEG keeps it well, and every operator changes it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


def save_photos(root: Path, count: int = 23) -> Path:
    """JPEG files of different sizes, so that a substitute's size matters."""
    root.mkdir(exist_ok=True)
    for i in range(count):
        photo(i, (30 + 3 * i, 90 - 2 * i)).save(root / f"{i:03}.jpg", quality=90)
    return root


def files(root: Path, labelled: bool = True) -> FolderSource:
    names = find_images(root)
    labels = np.arange(len(names)) % 3 if labelled else None
    return FolderSource(root, names, labels, ("a", "b", "c") if labelled else ())
