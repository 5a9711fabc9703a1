"""Loaders of other packages for images of many channels: torchgeo's and LightlyTrain's.

Every loader makes two views of every image: a random resized crop, a horizontal and a vertical
flip. The peers work in the processes of PyTorch's DataLoader, as our torchvision loader does.

torchgeo: `rasterio_loader` reads the file, and Kornia's operators make the views of every sample
(as `transforms` of a torchgeo data set).
lightly-train: `ImageDataset` with `ViewTransform` (Albumentations). Version 0.18 opens TIFF with
PIL, which reads at most 4 channels, so tifffile reads the files here. Its normalisation takes 8
bits or floats, so the numbers become floats.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mocofast.config import AugmentConfig

SIDE, BANDS = 264, 13


def write_geotiffs(folder: Path, count: int) -> None:
    """Writes images like Sentinel-2 scenes: (264, 264, 13), uint16, reflectance times 10,000."""
    import tifffile

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        random = np.random.default_rng(i)
        coarse = random.integers(0, 10000, (12, 12, BANDS)).astype(np.float32)
        pixels = np.kron(coarse, np.ones((SIDE // 12, SIDE // 12, 1), np.float32))
        pixels += random.normal(0, 300, pixels.shape).astype(np.float32)
        # The tags that make a TIFF a GeoTIFF: size of a pixel in metres, and the corner.
        tags = [
            (33550, "d", 3, (10.0, 10.0, 0.0), True),
            (33922, "d", 6, (0.0, 0.0, 0.0, 4e5, 5e6, 0.0), True),
            (34735, "H", 8, (1, 1, 0, 1, 3072, 0, 1, 32633), True),
        ]
        tifffile.imwrite(
            folder / f"{i:05}.tif",
            pixels.clip(0, 65535).astype(np.uint16),
            photometric="minisblack",
            planarconfig="contig",
            extratags=tags,
        )


class BandLoader:
    """A DataLoader of pairs of float views (B, C, S, S), with `epoch` and `close`."""

    def __init__(self, pairs: Dataset[list[Tensor]], batch_size: int, workers: int) -> None:
        self._batches: DataLoader[Any] = DataLoader(
            pairs,
            batch_size,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            persistent_workers=workers > 0,
        )

    def epoch(self, epoch: int) -> Iterator[list[Tensor]]:
        """Yields the batches of an epoch: two views."""
        yield from self._batches

    def close(self) -> None:
        """Ends the workers."""
        del self._batches


class TorchgeoPairs(Dataset[list[Tensor]]):
    """Pairs of views as torchgeo reads and Kornia augments."""

    def __init__(self, files: list[str], augment: AugmentConfig) -> None:
        import kornia.augmentation as K

        self._files = files
        self._views = K.AugmentationSequential(
            K.RandomResizedCrop(augment.shape, scale=augment.crop_scale),
            K.RandomHorizontalFlip(p=augment.flip),
            K.RandomVerticalFlip(p=augment.vertical_flip),
            data_keys=["input"],
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> list[Tensor]:
        from torchgeo.datasets.utils import rasterio_loader

        pixels = np.asarray(rasterio_loader(self._files[index]))  # (H, W, C)
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()
        return [self._views(image[None])[0] for _ in range(2)]


def _lightly_pairs(files: list[str], augment: AugmentConfig) -> Dataset[list[Tensor]]:
    """Returns pairs of views of LightlyTrain."""
    import tifffile
    from lightly_train._data import file_helpers
    from lightly_train._data.image_dataset import ImageDataset
    from lightly_train._transforms.transform import (
        NormalizeArgs,
        RandomFlipArgs,
        RandomResizedCropArgs,
    )
    from lightly_train._transforms.view_transform import ViewTransform, ViewTransformArgs

    low, high = augment.crop_scale
    bands = (0.5,) * BANDS
    view = ViewTransform(
        ViewTransformArgs(
            image_size=augment.shape,
            channel_drop=None,
            random_resized_crop=RandomResizedCropArgs(min_scale=low, max_scale=high),
            random_flip=RandomFlipArgs(
                horizontal_prob=augment.flip, vertical_prob=augment.vertical_flip
            ),
            random_rotation=None,
            color_jitter=None,
            random_gray_scale=None,
            gaussian_blur=None,
            solarize=None,
            normalize=NormalizeArgs(mean=bands, std=bands),
        )
    )
    file_helpers.open_image_numpy = lambda path, mode: (
        tifffile.imread(path).astype(np.float32) / 65535
    )
    images = ImageDataset(None, files, lambda image: [view(image), view(image)], BANDS)
    return _Views(images)


class _Views(Dataset[list[Tensor]]):
    """The views of a data set of LightlyTrain."""

    def __init__(self, images: Any) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> list[Tensor]:
        views: list[Tensor] = self._images[index]["views"]
        return views


def band_loaders(
    files: list[str], augment: AugmentConfig, batch_size: int, workers: int
) -> tuple[dict[str, Callable[[], BandLoader]], dict[str, str]]:
    """Returns the peers that are installed, {name: start}, and why others are left out.

    files: paths of TIFF files of BANDS channels.
    """
    every: dict[str, tuple[tuple[str, ...], Callable[[], Dataset[list[Tensor]]]]] = {
        "torchgeo": (("torchgeo", "kornia", "rasterio"), lambda: TorchgeoPairs(files, augment)),
        "lightly-train": (("lightly_train", "tifffile"), lambda: _lightly_pairs(files, augment)),
    }
    starts: dict[str, Callable[[], BandLoader]] = {}
    absent = {}
    for name, (modules, pairs) in every.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            absent[name] = f"{', '.join(missing)} not installed; pip install {name}"
        else:
            starts[name] = lambda pairs=pairs: BandLoader(  # type: ignore[misc]
                pairs(), batch_size, workers
            )
    return starts, absent
