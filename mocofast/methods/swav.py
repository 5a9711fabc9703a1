"""SwAV: Contrasting Cluster Assignments (Caron et al. 2020, arXiv:2006.09882).

Views are compared with prototypes instead of with other views. The batch is assigned to the
prototypes in equal shares. A view must predict the assignment ("code") of the other view.
Small views (multi-crop) predict the codes of both large views, and have no codes themselves.
A queue keeps embeddings of earlier batches, with which a small batch is assigned together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import Config
from mocofast.distributed import gather_rows, rank_and_world_size
from mocofast.methods.base import Method, MethodOutput
from mocofast.methods.heads import set_head
from mocofast.methods.options import SwAVOptions as Options
from mocofast.models.encoders import configured_encoder
from mocofast.models.pixels import pixel_statistics
from mocofast.models.sizes import by_size
from mocofast.ops import enqueue_


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
    feature_queue: M, number of earlier images, of all ranks, whose embeddings join the assignment.

    State dict: `encoder_q.*`, `prototypes.weight` (K, C), `steps` () int64, the number of optimiser
    steps so far. With a queue also `feature_queue` (M, 2C), an image's embeddings of both views,
    equal on all ranks, and `feature_queue_ptr` (1,) int64.
    With gradient accumulation, the codes are computed per micro-batch.
    """

    takes_local_views = True
    joins_sizes = True
    queue_weight = 1.0  # 0 keeps the queue out of the assignment. `build` schedules it
    writes_weights = True
    steps: Tensor
    feature_queue: Tensor
    feature_queue_ptr: Tensor

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = Options.dim,
        hidden_dim: int = Options.hidden_dim,
        prototypes: int = Options.prototypes,
        temperature: float = Options.temperature,
        epsilon: float = Options.epsilon,
        freeze_prototypes: int = Options.freeze_prototypes,
        feature_queue: int = Options.feature_queue,
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
        self._has_queue = feature_queue > 0
        if self._has_queue:
            self.register_buffer("feature_queue", torch.zeros(feature_queue, 2 * dim))
            self.register_buffer("feature_queue_ptr", torch.zeros(1, dtype=torch.int64))
        # Embeddings of earlier micro-batches of the same optimiser step.
        self._pending: list[Tensor] = []
        self.keep_buffers_out_of_broadcasts()

    @property
    def chance_loss(self) -> float:
        """The cross entropy of equal probabilities: log(K)."""
        return math.log(len(self.prototypes.weight))

    def describe(self) -> str:
        """Returns the number of prototypes, and the size of the queue."""
        words = f"{len(self.prototypes.weight)} prototypes"
        return f"{words}, queue of {len(self.feature_queue)} images" if self._has_queue else words

    def forward(
        self,
        im_a: Tensor,
        im_b: Tensor,
        *local_views: Tensor,
        update_keys: bool = True,
        enqueue: bool = True,
    ) -> MethodOutput:
        """Computes the mean cross entropy of this rank's swapped predictions.

        im_a, im_b: (N, C, S, S), two views of the same images.
        local_views: small views of the same images, (N, C, s, s) each. All pairs of a code and
            another view have the same weight.
        update_keys: ignored. enqueue: True counts an optimiser step, and fills the queue.
        """
        self.check_views(local_views, im_a=im_a, im_b=im_b)
        output = self.encode("encoder_q", torch.cat([im_a, im_b]), *by_size(local_views))
        z = F.normalize(output.float(), dim=1)  # (V*N, C)
        # float32: exp(score / epsilon) magnifies the rounding errors of bf16.
        with torch.autocast(z.device.type, enabled=False):
            unit = self._unit_prototypes()
            scores_a, scores_b, *local = F.linear(z, unit).chunk(2 + len(local_views))  # (N, K)
            earlier_a, earlier_b = self._earlier_scores(unit.detach())
        code_a = self._code(scores_a.detach(), earlier_a)
        code_b = self._code(scores_b.detach(), earlier_b)
        # Every view predicts the code of the other view.
        loss_a = F.cross_entropy(scores_a / self.temperature, code_b)
        loss_b = F.cross_entropy(scores_b / self.temperature, code_a)
        loss = (loss_a + loss_b) / 2
        if local:
            # The cross entropy is linear in the code, so the mean code stands for both.
            code = (code_a + code_b) / 2
            for scores in local:
                loss = loss + F.cross_entropy(scores / self.temperature, code)
            loss = loss / (1 + len(local))
        z_a, z_b = z[: 2 * len(im_a)].chunk(2)
        if self.training:
            self._remember(z_a.detach(), z_b.detach(), enqueue)
        return MethodOutput(loss, pair=(z_a, z_b))

    def _earlier_scores(self, unit: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Returns the scores (m, K) of this rank's share of the queue, for every view.

        unit: (K, C), the prototypes. (None, None): there is no queue, or the mode is eval.
        """
        if not self._has_queue or not self.training:
            return None, None
        rank, world_size = rank_and_world_size()
        z_a, z_b = self.feature_queue[rank::world_size].chunk(2, dim=1)
        return F.linear(z_a, unit), F.linear(z_b, unit)

    def _code(self, scores: Tensor, earlier: Tensor | None) -> Tensor:
        """Returns the codes (N, K) of scores (N, K), assigned together with the earlier scores."""
        if earlier is None:
            return sinkhorn(scores, self.epsilon, self.training)
        # The queue counts when it is full: its last row is written last, and was zero before.
        weight = self.feature_queue[-1].any() * self.queue_weight
        weights = torch.cat([scores.new_ones(len(scores)), weight.expand(len(earlier))])
        both = torch.cat([scores, earlier])
        return sinkhorn(both, self.epsilon, True, weights=weights)[: len(scores)]

    def _remember(self, z_a: Tensor, z_b: Tensor, last: bool) -> None:
        """Counts an optimiser step, and fills the queue, with the step's last micro-batch."""
        if self._has_queue:
            self._pending.append(gather_rows(torch.cat([z_a, z_b], dim=1)))  # (T, 2C)
        if not last:
            return
        self.steps += 1
        if self._has_queue:
            rows = torch.cat(self._pending)
            enqueue_(self.feature_queue, self.feature_queue_ptr, rows, normalize=False)
            self._pending.clear()

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
    scores: Tensor,
    epsilon: float,
    over_ranks: bool = False,
    iterations: int = 3,
    weights: Tensor | None = None,
) -> Tensor:
    """Assigns N samples softly to K prototypes, in equal shares over the batch (Sinkhorn-Knopp).

    Source: arXiv:2006.09882, eq. 5.
    scores: (N, K), cosines.
    epsilon: smoothness.
    over_ranks: take the shares over the batches of all ranks. All ranks must call it.
    weights: (N,), how often every sample counts in the shares. None: once.
    Returns (N, K). Every row sums to 1.
    """
    code = torch.exp(scores / epsilon)
    for _ in range(iterations):
        share = code.sum(0) if weights is None else weights @ code  # (K,), of every prototype
        if over_ranks and rank_and_world_size()[1] > 1:
            dist.all_reduce(share)
        code = code / share
        code = code / code.sum(1, keepdim=True)
    return code


def build(config: Config, images: int = 0, classes: int = 0) -> SwAV:
    """Returns SwAV with the options of `config.model`."""
    m = cast(Options, config.model)
    mean, std = pixel_statistics(config.augment)
    model = SwAV(
        configured_encoder(config),
        m.dim,
        m.hidden_dim,
        m.prototypes,
        m.temperature,
        m.epsilon,
        m.freeze_prototypes,
        m.feature_queue,
        pixel_mean=mean,
        pixel_std=std,
    )
    if m.feature_queue:
        # The paper's code fills the queue from this epoch on, and uses it when it is full.
        filling = math.ceil(m.feature_queue / config.data.batch_size)
        share = m.feature_queue_epoch / max(1, config.train.epochs)
        model.schedules["queue_weight"] = partial(_queue_weight, share, filling)
    return model


def _queue_weight(share: float, filling: int, step: int, total_steps: int) -> float:
    """Returns 1 from `filling` steps after a share of the run on, 0 before."""
    return float(step >= round(share * total_steps) + filling)
