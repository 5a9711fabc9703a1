"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (Caron et al. 2020,
arXiv:2006.09882), with two views of full size (its multi-crop of small ones is not here).

Views are compared with prototypes, not with each other: the batch is assigned to the prototypes in equal shares, and
one view is to predict the assignment ("code") of the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import Config, ModelConfig
from mocofast.distributed import rank_and_world_size
from mocofast.methods.base import Method, MethodOutput
from mocofast.methods.heads import set_head
from mocofast.models.encoders import build_encoder
from mocofast.models.pixels import pixel_statistics


class SwAV(Method):
    """An encoder with a projector, and prototypes.

    base_encoder: as MoCo's. dim: C, dimension of the embedding. hidden_dim: width of the projector's hidden layer.
    prototypes: K. temperature: T of the prediction. epsilon: smoothness of the codes.
    freeze_prototypes: optimiser steps at the start in which prototypes get no gradient. (Weight decay goes on, and
        shortens them only, which the normalisation undoes.)

    State dict: `encoder_q.*`, `prototypes.weight` (K, C), `steps` () int64, the optimiser steps so far.
    With gradient accumulation codes are those of a micro-batch.
    """

    steps: Tensor

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = ModelConfig.dim,
        hidden_dim: int = 2048,
        prototypes: int = ModelConfig.prototypes,
        temperature: float = 0.1,
        epsilon: float = ModelConfig.epsilon,
        freeze_prototypes: int = ModelConfig.freeze_prototypes,
        *,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
        self.temperature, self.epsilon, self.freeze_prototypes = (
            temperature,
            epsilon,
            freeze_prototypes,
        )
        self.encoder_q = base_encoder(num_classes=dim)
        set_head(self.encoder_q, hidden_dim, dim, bias=True)
        self.prototypes = nn.Linear(dim, prototypes, bias=False)
        # On the device, where a captured step can count and compare.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.keep_buffers_out_of_broadcasts()

    @property
    def chance_loss(self) -> float:
        """Cross entropy of a prediction that knows nothing: log(K)."""
        return math.log(len(self.prototypes.weight))

    def describe(self) -> str:
        """The number of prototypes."""
        return f"{len(self.prototypes.weight)} prototypes"

    def forward(
        self, im_a: Tensor, im_b: Tensor, *, update_keys: bool = True, enqueue: bool = True
    ) -> MethodOutput:
        """Cross entropy of this rank's N swapped predictions, both ways; (N, 3, S, S) each."""
        self.check_views(im_a=im_a, im_b=im_b)
        z = F.normalize(self.encode("encoder_q", torch.cat([im_a, im_b])).float(), dim=1)  # (2N, C)
        with torch.autocast(
            z.device.type, enabled=False
        ):  # exp(score / epsilon) shows every bit that is missing
            scores_a, scores_b = F.linear(z, self._unit_prototypes()).chunk(2)  # (N, K) each
        code_a, code_b = (
            sinkhorn(s.detach(), self.epsilon, self.training) for s in (scores_a, scores_b)
        )
        loss = (
            F.cross_entropy(scores_a / self.temperature, code_b)
            + F.cross_entropy(scores_b / self.temperature, code_a)
        ) / 2  # fmt: skip
        if self.training and enqueue:
            self.steps += 1
        return MethodOutput(loss, None)

    def _unit_prototypes(self) -> Tensor:
        """(K, C); in train mode the parameters themselves are normalised, as the paper's code does at every step."""
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
    """Soft assignments of N samples to K prototypes in equal shares over the batch, of all ranks if over_ranks (who
    then call it together): Sinkhorn-Knopp, arXiv:2006.09882, eq. 5. scores: (N, K), cosines; rows of the result sum
    to 1."""
    code = torch.exp(scores / epsilon)
    for _ in range(iterations):
        share = code.sum(0)  # of each prototype
        if over_ranks and rank_and_world_size()[1] > 1:
            dist.all_reduce(share)
        code = code / share
        code = code / code.sum(1, keepdim=True)
    return code


def build(config: Config) -> SwAV:
    """SwAV with the options of `config.model`."""
    m = config.model
    mean, std = pixel_statistics(config.augment)
    return SwAV(
        build_encoder(m.arch, config.augment.size),
        m.dim,
        m.hidden_dim,
        m.prototypes,
        m.temperature,
        m.epsilon,
        m.freeze_prototypes,
        pixel_mean=mean,
        pixel_std=std,
    )
