"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers (Chen et al. 2021, arXiv:2104.02057).

No queue: the keys of all ranks' batches are the negatives, which takes large batches. A predictor turns the queries,
the loss is symmetric, and BatchNorm in the heads and the encoder is over all ranks (model.sync_bn).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import Config
from mocofast.distributed import all_gather, rank_and_world_size
from mocofast.methods.base import MethodOutput
from mocofast.methods.heads import mlp_head, set_head
from mocofast.methods.predicting import PredictingMethod
from mocofast.models.encoders import build_encoder
from mocofast.models.pixels import pixel_statistics
from mocofast.ops import info_nce


class MoCoV3(PredictingMethod):
    """Algorithm 1 of the paper.

    base_encoder: as MoCo's; its head becomes the projector, of `projector_layers` linear layers. dim: C, dimension of
    the embedding; hidden_dim: width between layers. predictor_norm: end the predictor in BatchNorm. The paper's: 2
    layers without it for ResNets, 3 with it for ViTs. momentum: m, which the loop raises to 1. temperature: T.
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
        """The loss of an encoder that knows nothing: 4 T log(number of keys); None before the first step."""
        return 4 * self.temperature * math.log(self._num_keys) if self._num_keys else None

    def describe(self) -> str:
        """The loss in a few words."""
        return "symmetric loss over the keys of the batch"

    def forward(
        self, im_1: Tensor, im_2: Tensor, *, update_keys: bool = True, enqueue: bool = True
    ) -> MethodOutput:
        """Loss of this rank's images, whose keys all ranks gather; rank is (2N,), queries of im_1 first.

        With gradient accumulation a query meets the keys of its own micro-batch only. In eval mode nothing is
        updated or gathered.
        """
        self.check_views(im_1=im_1, im_2=im_2)
        (q_1, q_2), keys = self.outputs(im_1, im_2, update_keys=update_keys)  # each (N, C)
        k_1, k_2 = (F.normalize(k.float(), dim=1) for k in keys)
        loss_1, rank_1 = self._contrast(q_1, k_2)
        loss_2, rank_2 = self._contrast(q_2, k_1)
        return MethodOutput(2 * self.temperature * (loss_1 + loss_2), torch.cat([rank_1, rank_2]))

    def _contrast(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy () of each query with its own key among all ranks' keys, and its rank (N,)."""
        own_rows = None
        if self.training:
            rank, _ = rank_and_world_size()
            own_rows = slice(rank * len(k), (rank + 1) * len(k))
            k = all_gather(k)  # (W*N, C)
            self._num_keys = len(k)
        return info_nce(
            q,
            k,
            temperature=self.temperature,
            return_rank=True,
            negatives_normalized=True,
            own_rows=own_rows,
        )


def build(config: Config) -> MoCoV3:
    """MoCo v3 with the options of `config.model`, its heads as the paper has them for this kind of encoder."""
    m = config.model
    mean, std = pixel_statistics(config.augment)
    is_vit = m.arch.startswith("vit_")
    build_base = build_encoder(m.arch, config.augment.size)

    def base_encoder(num_classes: int) -> nn.Module:
        encoder = build_base(num_classes=num_classes)
        _start_blocks_as_identity(encoder)
        return encoder

    return MoCoV3(
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


def _start_blocks_as_identity(encoder: nn.Module) -> None:
    """Zeroes the last BatchNorm weight of every residual block, as the reference's ResNets start (Goyal et al. 2017,
    arXiv:1706.02677, section 5.1)."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    for block in encoder.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            nn.init.zeros_(last.weight)
