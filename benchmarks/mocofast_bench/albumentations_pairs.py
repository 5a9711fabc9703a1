"""The reference's views by Albumentations on OpenCV images."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mocofast.config import AugmentConfig
from mocofast.data.interface import Source


def why_not() -> str:
    """Returns why Albumentations cannot be measured, or ""."""
    missing = [name for name in ("albumentations", "cv2") if not importlib.util.find_spec(name)]
    return f"{', '.join(missing)} not installed; pip install albumentations" if missing else ""


class AlbumentationsPairs(Dataset[tuple[Tensor, Tensor]]):
    """Returns two views of every image, (3, S, S) uint8, not normalised, as our loaders do.

    The operators are those of MoCo v1 or v2 with Albumentations' arithmetic: the resize takes no
    antialiasing, and the blur is a Gaussian.
    """

    def __init__(self, source: Source, augment: AugmentConfig) -> None:
        """source: image files.
        augment: size, probabilities and strengths of the transforms.
        """
        import albumentations as A

        self._source = source
        jitter = A.ColorJitter(*augment.jitter, p=augment.jitter_p)
        gray = A.ToGray(p=augment.gray)
        self._transform = A.Compose(
            [
                A.RandomResizedCrop(augment.shape, scale=augment.crop_scale),
                *([A.Rotate(augment.rotate, p=1.0)] if augment.rotate else []),
                *((gray, jitter) if augment.gray_first else (jitter, gray)),
                A.GaussianBlur(blur_limit=0, sigma_limit=augment.blur_sigma, p=augment.blur),
                A.HorizontalFlip(p=augment.flip),
            ]
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        import cv2

        cv2.setNumThreads(0)  # the processes of the DataLoader use the cores
        image = cv2.imread(str(self._source.load(index)), cv2.IMREAD_COLOR_RGB)
        views = (self._transform(image=image)["image"] for _ in range(2))
        first, second = (torch.from_numpy(view).permute(2, 0, 1) for view in views)
        return first, second
