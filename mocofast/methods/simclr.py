"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (Chen et al. 2020, arXiv:2002.05709).

Two views of every image of a large batch, of all ranks together: each view is to find the other one of its image
among all views. One encoder, trained end to end on both views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from mocofast.config import Config, ModelConfig
from mocofast.distributed import rank_and_world_size
from mocofast.methods.base import Method, MethodOutput
from mocofast.methods.heads import set_head
from mocofast.models.encoders import build_encoder
from mocofast.models.pixels import pixel_statistics
from mocofast.ops import nt_xent


class SimCLR(Method):
    """An encoder with a projector.

    base_encoder: as MoCo's. dim: C, dimension of the embedding. hidden_dim: width of the projector's hidden layer, as
    wide as the features in the paper. temperature: T of NT-Xent.

    With gradient accumulation a view meets those of its micro-batch only.
    """

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = ModelConfig.dim,
        hidden_dim: int = 2048,
        temperature: float = 0.1,
        *,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
        self.temperature = temperature
        self.encoder_q = base_encoder(num_classes=dim)
        set_head(self.encoder_q, hidden_dim, dim)
        self.keep_buffers_out_of_broadcasts()

    def describe(self) -> str:
        """The loss, whose negatives are the batch."""
        return "NT-Xent over the batch"

    def forward(
        self, im_a: Tensor, im_b: Tensor, *, update_keys: bool = True, enqueue: bool = True
    ) -> MethodOutput:
        """NT-Xent of this rank's 2N views, (N, 3, S, S) each, among the 2WN of all ranks; rank: (2N,), those of im_a
        first. Gradients reach every rank's views. The two flags, which concern memories, change nothing."""
        self.check_views(im_a=im_a, im_b=im_b)
        z_a, z_b = self.encode("encoder_q", torch.cat([im_a, im_b])).chunk(2)  # (N, C) each
        own_rows = None
        rank, world_size = rank_and_world_size()
        if self.training and world_size > 1:
            own_rows = slice(rank * len(z_a), (rank + 1) * len(z_a))
            z_a, z_b = (torch.cat(all_gather(z)) for z in (z_a, z_b))  # (W*N, C), with gradients
        loss, positive_rank = nt_xent(
            z_a, z_b, temperature=self.temperature, return_rank=True, own_rows=own_rows
        )
        return MethodOutput(loss, positive_rank)


def build(config: Config) -> SimCLR:
    """SimCLR with the options of `config.model`."""
    m = config.model
    mean, std = pixel_statistics(config.augment)
    return SimCLR(
        build_encoder(m.arch, config.augment.size),
        m.dim,
        m.hidden_dim,
        m.temperature,
        pixel_mean=mean,
        pixel_std=std,
    )
