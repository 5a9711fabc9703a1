"""MoCo v3: Training Self-Supervised Vision Transformers (Chen et al. 2021, arXiv:2104.02057).

There is no queue. The keys of all ranks' batches are the negatives, so batches must be large.
A predictor follows the query encoder, and the loss is symmetric. BatchNorm in the heads and in the
encoder takes its statistics over all ranks (model.sync_bn).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from mocofast_kernels.cpu_vectors import wide
from torch import Tensor, nn

from mocofast.config import Config
from mocofast.distributed import gather_rows, own_rows
from mocofast.methods.base import MethodOutput, ranking_output
from mocofast.methods.heads import mlp_head, set_head
from mocofast.methods.options import MoCoV3Options as Options
from mocofast.methods.predicting import PredictingMethod
from mocofast.models.encoders import configured_encoder
from mocofast.models.pixels import pixel_statistics
from mocofast.ops import info_nce


class MoCoV3(PredictingMethod):
    """Algorithm 1 of the paper.

    base_encoder: as for MoCo. Its head becomes the projector.
    dim: C, dimension of the embedding.
    hidden_dim: width of the hidden layers.
    momentum: m of the key encoder's moving average. A schedule may raise it to 1.
    temperature: T.
    projector_layers: number of linear layers. The paper has 2 for ResNets, 3 for ViTs.
    predictor_norm: end the predictor in a BatchNorm, as the paper does for ViTs.
    """

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int,
        hidden_dim: int,
        momentum: float,
        temperature: float,
        *,
        projector_layers: int = 2,
        predictor_norm: bool = False,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive: got {temperature}")
        encoder = base_encoder(num_classes=dim)
        set_head(encoder, *[hidden_dim] * (projector_layers - 1), dim, last_norm=True)
        predictor = mlp_head([dim, hidden_dim, dim], last_norm=predictor_norm)
        super().__init__(encoder, predictor, momentum, pixel_mean, pixel_std)
        self.temperature = temperature
        self._num_keys = 0

    @property
    def chance_loss(self) -> float | None:
        """The loss of an encoder that has learned nothing: 4 T log(number of keys).

        None before the first step.
        """
        return 4 * self.temperature * math.log(self._num_keys) if self._num_keys else None

    def describe(self) -> str:
        """Returns the loss in a few words."""
        return "symmetric loss over the keys of the batch"

    def forward(
        self,
        im_1: Tensor,
        im_2: Tensor,
        *local_views: Tensor,
        update_keys: bool = True,
        enqueue: bool = True,
    ) -> MethodOutput:
        """Computes the loss of this rank's images among the keys of all ranks.

        im_1, im_2: (N, C, S, S), two views of the same images.
        local_views: small views, (N, C, s, s) each, whose queries meet the keys of both views. The
            loss of a key is the mean over its queries.
        update_keys: as for every Method. enqueue: ignored.
        `rank` of the output is (2N,), first the queries of im_1.
        With gradient accumulation, a query meets the keys of its own micro-batch only. In eval mode
        nothing is updated or gathered.
        """
        self.check_views(local_views, im_1=im_1, im_2=im_2)
        (q_1, q_2, *local), keys = self.outputs(
            im_1, im_2, local_views=local_views, update_keys=update_keys
        )  # all (N, C)
        k_1, k_2 = (F.normalize(wide(k), dim=1) for k in keys)
        loss_1, positive_rank_1 = self._contrast([q_1, *local], k_2)
        loss_2, positive_rank_2 = self._contrast([q_2, *local], k_1)
        loss = 2 * self.temperature * (loss_1 + loss_2)
        return ranking_output(loss, torch.cat([positive_rank_1, positive_rank_2]), (q_1, k_2))

    def _contrast(self, queries: Sequence[Tensor], k: Tensor) -> tuple[Tensor, Tensor]:
        """Finds the key of every query among the keys of all ranks.

        queries: (N, C) each. k: (N, C).
        Returns the mean cross entropy (), and the positive ranks (N,) of the first queries: how
        many wrong keys score above the right key.
        """
        rows = None
        if self.training:
            rows = own_rows(len(k))
            k = gather_rows(k)  # (T, C)
            self._num_keys = len(k)
        found = [
            info_nce(
                q,
                k,
                temperature=self.temperature,
                return_rank=True,
                negatives_normalized=True,
                own_rows=rows,
            )
            for q in queries
        ]
        loss = torch.stack([loss for loss, _ in found]).mean() if len(found) > 1 else found[0][0]
        return loss, found[0][1]


def build(config: Config, images: int = 0, classes: int = 0) -> MoCoV3:
    """Returns MoCo v3 with the options of `config.model`, and the paper's heads for the encoder."""
    m = cast(Options, config.model)
    mean, std = pixel_statistics(config.augment)
    is_vit = m.arch.startswith("vit_")
    build_base = configured_encoder(config)

    def base_encoder(num_classes: int) -> nn.Module:
        encoder = build_base(num_classes=num_classes)
        _start_blocks_as_identity(encoder)
        return encoder

    model = MoCoV3(
        base_encoder,
        m.dim,
        m.hidden_dim,
        m.momentum,
        m.temperature,
        projector_layers=3 if is_vit else 2,
        predictor_norm=is_vit,
        pixel_mean=mean,
        pixel_std=std,
    )
    model.schedule_momentum(m.momentum_schedule)
    return model


def _start_blocks_as_identity(encoder: nn.Module) -> None:
    """Sets the last BatchNorm weight of every residual block to zero, as in the paper's code.

    Source: Goyal et al. 2017, arXiv:1706.02677, section 5.1.
    """
    from torchvision.models.resnet import BasicBlock, Bottleneck

    for block in encoder.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            nn.init.zeros_(last.weight)
