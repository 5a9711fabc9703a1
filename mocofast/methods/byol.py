"""BYOL: Bootstrap Your Own Latent (Grill et al. 2020, arXiv:2006.07733).

An encoder and a predictor learn to say what a moving average of the encoder, the target, makes of another view of the
same image. There are no negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import Config
from mocofast.methods.base import MethodOutput
from mocofast.methods.heads import mlp_head, set_head
from mocofast.methods.predicting import PredictingMethod
from mocofast.models.encoders import build_encoder
from mocofast.models.pixels import pixel_statistics


class BYOL(PredictingMethod):
    """Algorithm 1 of the paper (appendix A).

    base_encoder: as MoCo's; its head becomes the projector, to hidden_dim and on to dim, as the predictor's layers.
    momentum: tau of the target, encoder_k, which the loop raises to 1.
    """

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int,
        hidden_dim: int,
        momentum: float,
        *,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
    ) -> None:
        encoder = base_encoder(num_classes=dim)
        set_head(encoder, hidden_dim, dim)
        super().__init__(encoder, mlp_head([dim, hidden_dim, dim]), momentum, pixel_mean, pixel_std)

    @property
    def chance_loss(self) -> float:
        """The loss of predictions that have nothing to do with their targets: 4; a collapsed encoder reaches 0."""
        return 4.0

    def describe(self) -> str:
        """The loss in a few words."""
        return "symmetric prediction of the target's output"

    def forward(
        self, im_1: Tensor, im_2: Tensor, *, update_keys: bool = True, enqueue: bool = True
    ) -> MethodOutput:
        """Mean over this rank's images of 4 - 2 cos(p_1, z_2) - 2 cos(p_2, z_1) (equation 2, both ways)."""
        self.check_views(im_1=im_1, im_2=im_2)
        (p_1, p_2), (z_1, z_2) = self.outputs(
            im_1, im_2, update_keys=update_keys
        )  # online, target: (N, C)
        cosines = F.cosine_similarity(p_1.float(), z_2.float()) + F.cosine_similarity(
            p_2.float(), z_1.float()
        )
        return MethodOutput(4 - 2 * cosines.mean(), None)


def build(config: Config) -> BYOL:
    """BYOL with the options of `config.model`."""
    m = config.model
    mean, std = pixel_statistics(config.augment)
    encoder = build_encoder(m.arch, config.augment.size)
    return BYOL(encoder, m.dim, m.hidden_dim, m.momentum, pixel_mean=mean, pixel_std=std)
