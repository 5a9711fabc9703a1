"""Two views of every image by lightly's transforms, for lightly's loop in `bench train`."""

from __future__ import annotations

import importlib.util

from torch import Tensor
from torch.utils.data import Dataset

from mocofast.config import AugmentConfig
from mocofast.data.interface import Source
from mocofast_bench.reference_loop import pil_image


def why_not(augment: AugmentConfig) -> str:
    """Returns why lightly's transforms cannot be measured, or ""."""
    if importlib.util.find_spec("lightly") is None:
        return "lightly not installed; pip install lightly"
    height, width = augment.shape
    if height != width or augment.gray_first or augment.solarize:
        return "MoCoV2Transform has square views, jitter before grayscale, and no solarize"
    return ""


class LightlyPairs(Dataset[tuple[Tensor, Tensor]]):
    """Returns two views of every image, (3, S, S) float32, normalised, by MoCoV2Transform."""

    def __init__(self, source: Source, augment: AugmentConfig) -> None:
        """augment: size, probabilities and strengths of the transforms."""
        from lightly.transforms import MoCoV2Transform

        brightness, contrast, saturation, hue = augment.jitter
        self._source = source
        self._transform = MoCoV2Transform(
            input_size=augment.shape[0],
            cj_prob=augment.jitter_p,
            cj_bright=brightness,
            cj_contrast=contrast,
            cj_sat=saturation,
            cj_hue=hue,
            min_scale=augment.crop_scale[0],
            random_gray_scale=augment.gray,
            gaussian_blur=augment.blur,
            sigmas=augment.blur_sigma,
            hf_prob=augment.flip,
            rr_prob=1.0 if augment.rotate else 0.0,
            rr_degrees=augment.rotate or None,
            normalize={"mean": list(augment.mean), "std": list(augment.std)},
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        first, second = self._transform(pil_image(self._source, index))
        return first, second
