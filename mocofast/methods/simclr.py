"""SimCLR: Contrastive Learning of Visual Representations (Chen et al. 2020, arXiv:2002.05709).

A large batch, over all ranks together, holds two views of every image. A view must find the other
view of the same image among all views. One encoder is trained end to end on both views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from mocofast.config import Config
from mocofast.distributed import rank_and_world_size
from mocofast.methods.base import Method, MethodOutput, ranking_output
from mocofast.methods.heads import set_head
from mocofast.methods.options import SimCLROptions as Options
from mocofast.models.encoders import configured_encoder
from mocofast.models.pixels import pixel_statistics
from mocofast.ops import nt_xent


class SimCLR(Method):
    """An encoder with a projector.

    base_encoder: as for MoCo.
    dim: C, dimension of the embedding.
    hidden_dim: width of the projector's hidden layer. The paper takes the width of the features.
    temperature: T of NT-Xent.

    With gradient accumulation, a view meets the views of its own micro-batch only.
    """

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = Options.dim,
        hidden_dim: int = Options.hidden_dim,
        temperature: float = Options.temperature,
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
        """Returns the loss in a few words."""
        return "NT-Xent over the batch"

    def forward(
        self, im_a: Tensor, im_b: Tensor, *, update_keys: bool = True, enqueue: bool = True
    ) -> MethodOutput:
        """Computes NT-Xent of this rank's 2N views among the 2WN views of all ranks.

        im_a, im_b: (N, C, S, S), two views of the same images.
        update_keys, enqueue: ignored.
        `rank` of the output is (2N,), first the views of im_a. Gradients reach the views of every
        rank.
        """
        self.check_views(im_a=im_a, im_b=im_b)
        z_a, z_b = self.encode("encoder_q", torch.cat([im_a, im_b])).chunk(2)  # both (N, C)
        own_rows, pair = None, (z_a, z_b)
        rank, world_size = rank_and_world_size()
        if self.training and world_size > 1:
            own_rows = slice(rank * len(z_a), (rank + 1) * len(z_a))
            z_a, z_b = (torch.cat(all_gather(z)) for z in (z_a, z_b))  # (W*N, C), with gradients
        loss, positive_rank = nt_xent(
            z_a, z_b, temperature=self.temperature, return_rank=True, own_rows=own_rows
        )
        return ranking_output(loss, positive_rank, pair)


def build(config: Config, images: int = 0, classes: int = 0) -> SimCLR:
    """Returns SimCLR with the options of `config.model`."""
    m = cast(Options, config.model)
    mean, std = pixel_statistics(config.augment)
    return SimCLR(
        configured_encoder(config),
        m.dim,
        m.hidden_dim,
        m.temperature,
        pixel_mean=mean,
        pixel_std=std,
    )
