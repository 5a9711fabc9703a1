"""The reference's views, written with torchvision's v2 transforms on tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from mocofast.config import AugmentConfig
from mocofast.data.interface import Source


class TensorPairs(Dataset[tuple[Tensor, Tensor]]):
    """Returns two views of every image, (3, S, S) float32, normalised.

    The transforms are those of MoCo v1 or v2, as `augment` says.
    """

    def __init__(self, source: Source, augment: AugmentConfig) -> None:
        """source: image files.
        augment: size, probabilities and strengths of the transforms.
        """
        self._source = source
        jitter = v2.RandomApply([v2.ColorJitter(*augment.jitter)], augment.jitter_p)
        gray = v2.RandomGrayscale(augment.gray)
        # Kernel of SimCLR (Chen et al. 2020, arXiv:2002.05709): a tenth of the size, 23 at 224 px.
        kernel = min(augment.shape) // 10 | 1
        blur = v2.GaussianBlur(kernel, augment.blur_sigma)
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop(augment.shape, augment.crop_scale, antialias=True),
                *([v2.RandomRotation(augment.rotate)] if augment.rotate else []),
                *((gray, jitter) if augment.gray_first else (jitter, gray)),
                *([v2.RandomApply([blur], augment.blur)] if augment.blur else []),
                v2.RandomHorizontalFlip(augment.flip),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(augment.mean, augment.std),
            ]
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = decode_image(str(self._source.load(index)), ImageReadMode.RGB)
        return self._transform(image), self._transform(image)
