"""SimCLR: Contrastive Learning of Visual Representations (Chen et al. 2020, arXiv:2002.05709).

A large batch, over all ranks together, holds two views of every image. A view must find the other
view of the same image among all views. One encoder is trained end to end on both views.

With small views (multi-crop, Caron et al. 2020, arXiv:2006.09882), every ordered pair of views of
an image is a query and its positive, and all views of other images are negatives, as in
facebookresearch/vissl's multi-crop SimCLR, but with the negatives of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from mocofast.config import Config
from mocofast.distributed import cut, own_rows, padded, rank_and_world_size, shares_of
from mocofast.methods.base import Method, MethodOutput, ranking_output
from mocofast.methods.heads import set_head
from mocofast.methods.options import SimCLROptions as Options
from mocofast.models.encoders import configured_encoder
from mocofast.models.pixels import pixel_statistics
from mocofast.models.sizes import by_size
from mocofast.ops import info_nce, nt_xent
from mocofast.shares import Shares


class SimCLR(Method):
    """An encoder with a projector.

    base_encoder: as for MoCo.
    dim: C, dimension of the embedding.
    hidden_dim: width of the projector's hidden layer. The paper takes the width of the features.
    temperature: T of NT-Xent.

    With gradient accumulation, a view meets the views of its own micro-batch only.
    """

    takes_local_views = True
    joins_sizes = True

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
        self,
        im_a: Tensor,
        im_b: Tensor,
        *local_views: Tensor,
        update_keys: bool = True,
        enqueue: bool = True,
    ) -> MethodOutput:
        """Computes NT-Xent of this rank's 2N views among the 2T views of all ranks.

        im_a, im_b: (N, C, S, S), two views of the same images.
        local_views: small views of the same images, (N, C, s, s) each.
        update_keys, enqueue: ignored.
        `rank` of the output is (2N,), first im_a's views for im_b's. Gradients reach the views of
        every rank.
        """
        self.check_views(local_views, im_a=im_a, im_b=im_b)
        z = self.encode("encoder_q", torch.cat([im_a, im_b]), *by_size(local_views))
        if local_views:
            return self._among_all_views(z, 2 + len(local_views))
        z_a, z_b = z.chunk(2)  # both (N, C)
        rows, pair = None, (z_a, z_b)
        if self.training and rank_and_world_size()[1] > 1:
            rows = own_rows(len(z_a))
            shares = shares_of(len(z_a))
            z_a, z_b = (_of_all_ranks(z, shares) for z in (z_a, z_b))  # (T, C)
        loss, positive_rank = nt_xent(
            z_a, z_b, temperature=self.temperature, return_rank=True, own_rows=rows
        )
        return ranking_output(loss, positive_rank, pair)

    def _among_all_views(self, z: Tensor, count: int) -> MethodOutput:
        """Computes the loss of all ordered pairs of views. z: (V*N, C) of V views. count: V."""
        views = z.view(count, -1, z.shape[1])
        number = torch.arange(views.shape[1], device=z.device)
        ids = own_ids = number.repeat(count)  # an image is no negative of its own views
        keys = z
        rank, world_size = rank_and_world_size()
        if self.training and world_size > 1:
            counts = shares_of(len(number)).counts
            keys = _of_all_ranks(z, Shares(tuple(count * n for n in counts)))  # (V*T, C)
            of_ranks = torch.arange(sum(counts), device=z.device).split(counts)
            ids = torch.cat([numbers.repeat(count) for numbers in of_ranks])
            own_ids = of_ranks[rank].repeat(count)
        found = [
            info_nce(
                z,
                views.roll(-offset, 0).flatten(0, 1),
                keys,
                temperature=self.temperature,
                return_rank=True,
                query_ids=own_ids,
                key_ids=ids,
            )
            for offset in range(1, count)
        ]
        loss = torch.stack([loss for loss, _ in found]).mean()
        # View b follows a, and view a is the last that follows b.
        a_for_b, b_for_a = found[0][1][: len(number)], found[-1][1][len(number) : 2 * len(number)]
        return ranking_output(loss, torch.cat([a_for_b, b_for_a]), (views[0], views[1]))


def _of_all_ranks(rows: Tensor, shares: Shares) -> Tensor:
    """Returns the rows (T, C) of all ranks, with gradients. rows: (N, C), as `shares` tells."""
    return cut(torch.cat(all_gather(padded(rows, shares))), shares)


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
