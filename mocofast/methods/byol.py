"""BYOL: Bootstrap Your Own Latent (Grill et al. 2020, arXiv:2006.07733).

An encoder and a predictor learn to predict the output of a target network for another view of the
same image. The target network is a moving average of the encoder. There are no negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import Config
from mocofast.methods.base import MethodOutput
from mocofast.methods.heads import mlp_head, set_head
from mocofast.methods.options import BYOLOptions as Options
from mocofast.methods.predicting import PredictingMethod
from mocofast.models.encoders import configured_encoder
from mocofast.models.pixels import pixel_statistics


class BYOL(PredictingMethod):
    """Algorithm 1 of the paper (appendix A).

    base_encoder: as for MoCo. Its head becomes the projector.
    dim: C, width of the outputs of projector and predictor.
    hidden_dim: width of the hidden layers.
    momentum: tau of the target network `encoder_k`. A schedule may raise it to 1.
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
        """The loss of predictions that are unrelated to the targets: 4. A collapse reaches 0."""
        return 4.0

    def describe(self) -> str:
        """Returns the loss in a few words."""
        return "symmetric prediction of the target's output"

    def forward(
        self,
        im_1: Tensor,
        im_2: Tensor,
        *local_views: Tensor,
        update_keys: bool = True,
        enqueue: bool = True,
    ) -> MethodOutput:
        """Computes 4 - 2 cos(p_1, z_2) - 2 cos(p_2, z_1), the mean over images (eq. 2, both ways).

        im_1, im_2: (N, C, S, S), two views of the same images.
        local_views: small views, (N, C, s, s) each. The loss is then the mean over the pairs
            (p_1, p_2) and (p_l, p_l) of every small view l.
        update_keys: as for every Method. enqueue: ignored.
        """
        self.check_views(local_views, im_1=im_1, im_2=im_2)
        # Predictions p and targets z: all (N, C).
        (p_1, p_2, *local), (z_1, z_2) = self.outputs(
            im_1, im_2, local_views=local_views, update_keys=update_keys
        )
        cosines = _both_cosines(p_1, z_2, p_2, z_1)
        for p in local:
            cosines = cosines + _both_cosines(p, z_1, p, z_2)
        return MethodOutput(4 - 2 * cosines.mean() / (1 + len(local)), pair=(p_1, z_2))


def _both_cosines(p_a: Tensor, z_a: Tensor, p_b: Tensor, z_b: Tensor) -> Tensor:
    """Returns cos(p_a, z_a) + cos(p_b, z_b), (N,)."""
    cosines = F.cosine_similarity(p_a.float(), z_a.float())
    return cosines + F.cosine_similarity(p_b.float(), z_b.float())


def build(config: Config, images: int = 0, classes: int = 0) -> BYOL:
    """Returns BYOL with the options of `config.model`."""
    m = cast(Options, config.model)
    mean, std = pixel_statistics(config.augment)
    encoder = configured_encoder(config)
    model = BYOL(encoder, m.dim, m.hidden_dim, m.momentum, pixel_mean=mean, pixel_std=std)
    model.schedule_momentum(m.momentum_schedule)
    return model
