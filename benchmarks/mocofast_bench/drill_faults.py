"""Images and methods with a fault inside, for `mocofast_bench.health_drill`.

As `--data.source`, the module gives the digits with the fault that `data.path` names, or with
captions, which are no fault. As
`--model.method`, it gives BYOL without a predictor, whose gradient also reaches the targets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from mocofast.config import Config, DataConfig
from mocofast.data.sources import ArraySource, Datasets
from mocofast.data.sources import load_datasets as load_known
from mocofast.methods import byol
from mocofast.methods.base import MethodOutput
from mocofast.methods.options import BYOLOptions as Options

__all__ = ["Options", "build", "load_datasets"]


class CaptionedDigits(ArraySource):
    """Digits whose captions say their class, in three forms."""

    @property
    def has_caption(self) -> np.ndarray:
        """Tells which images have a caption: all, (N,) bool."""
        return np.ones(len(self), dtype=bool)

    def caption(self, index: int) -> str:
        """Returns the caption of an image."""
        assert self.labels is not None
        form = ("a photo of a {}.", "the digit {}", "{}, written by hand")[index % 3]
        return form.format(self.classes[self.labels[index]])


def load_datasets(data: DataConfig, seed: int) -> Datasets:
    """Returns the digits. data.path: constant, duplicates, labels (faults), or captions."""
    known = load_known(DataConfig(source="digits", channels=data.channels), seed)
    train, val = known.train, known.val
    assert isinstance(train, ArraySource)
    assert isinstance(val, ArraySource)
    assert train.labels is not None and val.labels is not None
    rng = np.random.default_rng(seed)
    images, labels, val_labels = train.images, train.labels, val.labels
    if data.path == "captions":
        captioned = CaptionedDigits(images, labels, train.classes, "digits, captions")
        return known._replace(train=captioned)
    if data.path == "constant":
        # Blank pages: every image has the colour of its mean.
        images = np.broadcast_to(images.mean((1, 2), keepdims=True), images.shape)
        images = images.astype(np.uint8)
    elif data.path == "duplicates":
        few = rng.permutation(len(images))[:100]
        chosen = few[np.arange(len(images)) % 100]
        images, labels = images[chosen], labels[chosen]
    elif data.path == "labels":
        labels, val_labels = rng.permutation(labels), rng.permutation(val_labels)
    else:
        raise ValueError(
            f"data.path: expected constant, duplicates, labels or captions, got {data.path!r}"
        )
    name = f"digits, {data.path}"
    return known._replace(
        train=ArraySource(images, labels, train.classes, name),
        val=ArraySource(val.images, val_labels, val.classes, f"{name}, val"),
    )


class NoStopGradient(byol.BYOL):
    """BYOL's loss where both sides are trained: one point for all images is its best answer."""

    def forward(self, im_1: Tensor, im_2: Tensor, *_: Tensor, **__: Any) -> MethodOutput:
        """Computes 2 - 2 cos(z_1, z_2). Arguments and result as for BYOL."""
        self.check_views(im_1=im_1, im_2=im_2)
        z_1, z_2 = (self.encode("encoder_q", images).float() for images in (im_1, im_2))
        return MethodOutput(
            2 - 2 * nn.functional.cosine_similarity(z_1, z_2).mean(), pair=(z_1, z_2)
        )


def build(config: Config, images: int = 0, classes: int = 0) -> byol.BYOL:
    """Returns NoStopGradient with the options of `config.model`."""
    model = byol.build(config, images, classes)
    model.__class__ = NoStopGradient
    model.predictor.requires_grad_(False)
    return model
