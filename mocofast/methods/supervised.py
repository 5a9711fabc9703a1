"""Supervised training of the same encoders, as a baseline: cross entropy on the labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import Config, ConfigError
from mocofast.methods.base import Method, MethodOutput, ranking_output
from mocofast.models.encoders import configured_encoder, head_name
from mocofast.models.pixels import pixel_statistics


class Supervised(Method):
    """A classifier: `encoder_q` with its own head sees one view of an image and the label.

    base_encoder: as for MoCo, with num_classes=classes.
    classes: number of classes.
    pixel_mean, pixel_std: as for every Method.
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
        head_name(self.encoder_q)  # raises if there is no head
        self.keep_buffers_out_of_broadcasts()

    @property
    def chance_loss(self) -> float:
        """The cross entropy of equal probabilities: log(classes)."""
        return math.log(self.classes)

    def describe(self) -> str:
        """Returns the number of classes."""
        return f"supervised, {self.classes} classes"

    def forward(
        self, images: Tensor, *, labels: Tensor, update_keys: bool = True, enqueue: bool = True
    ) -> MethodOutput:
        """Computes the cross entropy of images (N, C, S, S) and labels (N,) int64.

        `rank` of the output: how many other classes score above the right class, or
        as high.
        update_keys, enqueue: ignored.
        """
        self.check_views(images=images)
        logits = self.encode("encoder_q", images).float()  # (N, classes)
        # The right class loses a tie, and everything where a logit is NaN.
        positive_rank = (~(logits < logits.gather(1, labels[:, None]))).sum(1) - 1
        return ranking_output(F.cross_entropy(logits, labels), positive_rank.int())


def build(config: Config, images: int = 0, classes: int = 0) -> Supervised:
    """Returns a classifier of `classes` classes with the encoder of `config.model`."""
    if classes < 2:
        raise ConfigError(
            f"model.method: supervised needs images of two classes or more, got {classes} classes"
        )
    mean, std = pixel_statistics(config.augment)
    return Supervised(
        configured_encoder(config),
        classes,
        pixel_mean=mean,
        pixel_std=std,
    )
