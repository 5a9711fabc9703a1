"""Supervised training of the same encoders, the baseline of every comparison: cross entropy on the labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import Config, ConfigError
from mocofast.methods.base import Method, MethodOutput
from mocofast.models.encoders import build_encoder, head_name
from mocofast.models.pixels import pixel_statistics


class Supervised(Method):
    """A classifier: `encoder_q` with its own head, one view of an image, its label.

    base_encoder: as MoCo's, its `num_classes` being classes. pixel_mean, pixel_std: as Method's.
    """

    num_views = 1
    batch_fields = ("labels",)

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        classes: int,
        *,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
        self.classes = classes
        self.encoder_q = base_encoder(num_classes=classes)
        head_name(self.encoder_q)  # raises where there is no head
        self.keep_buffers_out_of_broadcasts()

    @property
    def chance_loss(self) -> float:
        """Cross entropy of equal probabilities: log(classes)."""
        return math.log(self.classes)

    def describe(self) -> str:
        """The number of classes."""
        return f"supervised, {self.classes} classes"

    def forward(
        self, images: Tensor, *, labels: Tensor, update_keys: bool = True, enqueue: bool = True
    ) -> MethodOutput:
        """Cross entropy of images (N, 3, S, S) with labels (N,) int64; rank: how many classes score above the right
        one. The two flags, which concern memories, change nothing."""
        self.check_views(images=images)
        logits = self.encode("encoder_q", images).float()  # (N, classes)
        rank = (logits > logits.gather(1, labels[:, None])).sum(1)
        return MethodOutput(F.cross_entropy(logits, labels), rank.int())


def build(config: Config, classes: int) -> Supervised:
    """A classifier of as many classes as the data have, with the encoder of `config.model`."""
    if classes < 2:
        raise ConfigError(
            f"model.method: supervised needs images of two classes or more, and these have {classes}"
        )
    mean, std = pixel_statistics(config.augment)
    return Supervised(
        build_encoder(config.model.arch, config.augment.size),
        classes,
        pixel_mean=mean,
        pixel_std=std,
    )
