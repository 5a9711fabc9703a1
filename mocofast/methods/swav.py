"""SwAV: Contrasting Cluster Assignments (Caron et al. 2020, arXiv:2006.09882).

Views are compared with prototypes instead of with other views. The batch is assigned to the
prototypes in equal shares. A view must predict the assignment ("code") of the other view.
There are two views of full size. The paper's multi-crop of small views is not implemented.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import Config
from mocofast.distributed import rank_and_world_size
from mocofast.methods.base import Method, MethodOutput
from mocofast.methods.heads import set_head
from mocofast.methods.options import SwAVOptions as Options
from mocofast.models.encoders import configured_encoder
from mocofast.models.pixels import pixel_statistics


class SwAV(Method):
    """An encoder with a projector, and prototypes.

    base_encoder: as for MoCo.
    dim: C, dimension of the embedding.
    hidden_dim: width of the projector's hidden layer.
    prototypes: K, number of prototypes.
    temperature: T of the prediction.
    epsilon: smoothness of the codes.
    freeze_prototypes: optimiser steps at the start in which the prototypes get no gradient. Weight
        decay goes on. It changes only their length, which the normalisation restores.

    State dict: `encoder_q.*`, `prototypes.weight` (K, C), `steps` () int64, the number of optimiser
    steps so far.
    With gradient accumulation, the codes are computed per micro-batch.
    """

    steps: Tensor

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = Options.dim,
        hidden_dim: int = Options.hidden_dim,
        prototypes: int = Options.prototypes,
        temperature: float = Options.temperature,
        epsilon: float = Options.epsilon,
        freeze_prototypes: int = Options.freeze_prototypes,
        *,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
        self.temperature, self.epsilon = temperature, epsilon
        self.freeze_prototypes = freeze_prototypes
        self.encoder_q = base_encoder(num_classes=dim)
        set_head(self.encoder_q, hidden_dim, dim, bias=True)
        self.prototypes = nn.Linear(dim, prototypes, bias=False)
        # On the device, so that a captured step can count and compare.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.keep_buffers_out_of_broadcasts()

    @property
    def chance_loss(self) -> float:
        """The cross entropy of equal probabilities: log(K)."""
        return math.log(len(self.prototypes.weight))

    def describe(self) -> str:
        """Returns the number of prototypes."""
        return f"{len(self.prototypes.weight)} prototypes"

    def forward(
        self, im_a: Tensor, im_b: Tensor, *, update_keys: bool = True, enqueue: bool = True
    ) -> MethodOutput:
        """Computes the mean cross entropy of this rank's swapped predictions.

        im_a, im_b: (N, C, S, S), two views of the same images.
        update_keys: ignored. enqueue: True counts an optimiser step.
        """
        self.check_views(im_a=im_a, im_b=im_b)
        z = F.normalize(self.encode("encoder_q", torch.cat([im_a, im_b])).float(), dim=1)  # (2N, C)
        # float32: exp(score / epsilon) magnifies the rounding errors of bf16.
        with torch.autocast(z.device.type, enabled=False):
            scores_a, scores_b = F.linear(z, self._unit_prototypes()).chunk(2)  # both (N, K)
        code_a = sinkhorn(scores_a.detach(), self.epsilon, self.training)
        code_b = sinkhorn(scores_b.detach(), self.epsilon, self.training)
        # Every view predicts the code of the other view.
        loss_a = F.cross_entropy(scores_a / self.temperature, code_b)
        loss_b = F.cross_entropy(scores_b / self.temperature, code_a)
        loss = (loss_a + loss_b) / 2
        if self.training and enqueue:
            self.steps += 1
        z_a, z_b = z.chunk(2)
        return MethodOutput(loss, pair=(z_a, z_b))

    def _unit_prototypes(self) -> Tensor:
        """Returns unit prototypes (K, C).

        In train mode the parameters themselves are normalised, as in the paper's code.
        """
        weight = self.prototypes.weight
        unit = F.normalize(weight.detach(), dim=1)
        if not self.training:
            return unit
        with torch.no_grad():
            weight.copy_(unit)
        return torch.where(self.steps >= self.freeze_prototypes, weight, unit)


@torch.no_grad()
def sinkhorn(
    scores: Tensor, epsilon: float, over_ranks: bool = False, iterations: int = 3
) -> Tensor:
    """Assigns N samples softly to K prototypes, in equal shares over the batch (Sinkhorn-Knopp).

    Source: arXiv:2006.09882, eq. 5.
    scores: (N, K), cosines.
    epsilon: smoothness.
    over_ranks: take the shares over the batches of all ranks. All ranks must call it.
    Returns (N, K). Every row sums to 1.
    """
    code = torch.exp(scores / epsilon)
    for _ in range(iterations):
        share = code.sum(0)  # (K,), of every prototype
        if over_ranks and rank_and_world_size()[1] > 1:
            dist.all_reduce(share)
        code = code / share
        code = code / code.sum(1, keepdim=True)
    return code


def build(config: Config, images: int = 0, classes: int = 0) -> SwAV:
    """Returns SwAV with the options of `config.model`."""
    m = cast(Options, config.model)
    mean, std = pixel_statistics(config.augment)
    return SwAV(
        configured_encoder(config),
        m.dim,
        m.hidden_dim,
        m.prototypes,
        m.temperature,
        m.epsilon,
        m.freeze_prototypes,
        pixel_mean=mean,
        pixel_std=std,
    )
