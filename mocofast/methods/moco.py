"""MoCo: Momentum Contrast (He et al. 2020, arXiv:1911.05722).

A query must find its positive key, another view of the same image, among a queue of keys of earlier
batches. A second encoder makes the keys. Its weights are an exponential moving average of the query
encoder's weights.

MoCo v2 (Chen et al. 2020, arXiv:2003.04297): `mlp=True`, temperature 0.2, stronger augmentation and
a cosine schedule. MoCo v2+: also `symmetric=True`.

Small views (multi-crop) are queries only, as the student's crops of DINO (arXiv:2104.14294, eq. 3,
and appendix B, which trains MoCo v2 so): every small view must find the keys of the large views.
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
from mocofast.distributed import (
    BatchShuffle,
    gather_rows,
    in_order,
    own_numbers,
    rank_and_world_size,
    shares_of,
)
from mocofast.methods.base import MethodOutput, ranking_output
from mocofast.methods.momentum import MomentumMethod
from mocofast.methods.options import MoCoOptions as Options
from mocofast.models.batch_norm import split_batch_norm
from mocofast.models.encoders import add_mlp_head, configured_encoder, head_name
from mocofast.models.pixels import LEVELS, pixel_statistics, to_autocast_dtype
from mocofast.models.sizes import by_size
from mocofast.ops import enqueue_, info_nce
from mocofast.shares import parts_of_ranks

QUEUE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class MoCo(MomentumMethod):
    """Query encoder, momentum encoder and queue.

    base_encoder: `base_encoder(num_classes=dim)` returns a module whose last layers are `.fc`,
        `.head` or `.heads`, as in torchvision and timm (see `mocofast.models.encoders`).
    dim: C, dimension of the embedding.
    queue_size: K, number of keys. Any K goes with any batch size.
    momentum: m of the key encoder's moving average.
    temperature: T of InfoNCE.
    mlp: MoCo v2's projection head.
    shuffle_bn: redistribute the keys' images over ranks (with bn_splits: over the splits) before
        the key encoder, so that BatchNorm statistics do not betray the positive.
    bn_splits: compute BatchNorm of both encoders over this many splits of a rank's batch. The
        splits stand for GPUs.
    symmetric: both views are queries and keys, and the loss is the sum, as in the CIFAR-10 demo of
        MoCo's authors.
    queue_dtype: type of the stored keys: float32, bfloat16 or float16, as a name or as torch's.
    pixel_mean, pixel_std: as for every Method.

    State dict: `encoder_q.*`, `encoder_k.*`, `queue` (K, C), `queue_ptr` (1,) int64.
    `random_state()` is the state of the shuffle.
    After the first step only gradients, images and keys cross ranks.
    """

    takes_local_views = True
    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = Options.dim,
        queue_size: int = Options.queue_size,
        momentum: float = Options.momentum,
        temperature: float = Options.temperature,
        mlp: bool = Options.mlp,
        shuffle_bn: bool = Options.shuffle_bn,
        *,
        bn_splits: int = Options.bn_splits,
        symmetric: bool = Options.symmetric,
        queue_dtype: torch.dtype | str = Options.queue_dtype,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
        # Check everything before anything is built.
        for name, value in (("dim", dim), ("queue_size", queue_size), ("bn_splits", bn_splits)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1: got {value}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive: got {temperature}")
        dtype = QUEUE_DTYPES.get(queue_dtype) if isinstance(queue_dtype, str) else queue_dtype
        if dtype not in QUEUE_DTYPES.values():
            raise ValueError(
                f"queue_dtype must be one of {', '.join(QUEUE_DTYPES)}: got {queue_dtype}"
            )
        self.temperature = temperature
        self.symmetric = symmetric

        # The encoders.
        self.encoder_q = base_encoder(num_classes=dim)
        head_name(self.encoder_q)  # raises if there is no head
        if mlp:
            add_mlp_head(self.encoder_q)
        if bn_splits > 1:
            split_batch_norm(self.encoder_q, bn_splits)
        self.make_momentum_encoder(momentum)

        # The queue: (K, C), unit vectors.
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1).to(dtype))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        # Keys of earlier micro-batches of the same optimiser step.
        self._pending: list[Tensor] = []

        self._shuffles = shuffle_bn
        self._splits = bn_splits > 1
        self.shuffle = BatchShuffle()

        self.keep_buffers_out_of_broadcasts()

    @property
    def chance_loss(self) -> float:
        """The loss of an encoder that has learned nothing: log(K + 1), twice that if symmetric.

        A loss near this level, or above it, is no sign of failure.
        """
        return (1 + self.symmetric) * math.log(len(self.queue) + 1)

    def describe(self) -> str:
        """Returns the size of the queue."""
        return f"queue of {len(self.queue)} keys" + ", symmetric loss" * self.symmetric

    def forward(
        self,
        im_q: Tensor,
        im_k: Tensor,
        *local_views: Tensor,
        update_keys: bool = True,
        enqueue: bool = True,
        step_inputs: tuple[Tensor, ...] = (),
    ) -> MethodOutput:
        """Computes the loss of this rank's queries. In train mode, updates key encoder and queue.

        im_q, im_k: two views of the same images, with the channels of the encoder, (N, .., S, S).
            uint8 and uint16 pixels are normalised here by pixel_mean and pixel_std. Floats are
            taken as normalised. TypeError for uint8 and uint16 without pixel statistics.
        local_views: small views of the same images, (N, .., s, s) each, queries beside im_q. If
            symmetric, also beside im_k. The loss of a key is the mean over its queries. `rank` and
            the accuracies are those of the large views.
        update_keys: with gradient accumulation, True for the first micro-batch of an optimiser step
            only.
        enqueue: with gradient accumulation, True for the last micro-batch only. The keys of all
            micro-batches are then enqueued. Every micro-batch meets the same key encoder and the
            same queue, as one large batch would.
        step_inputs: the result of `prepare_step` on the same views, if the caller has called it.

        The moving average is updated here, before the keys, as in the paper's code. An optimiser of
        mocofast.optim may update it right after its step instead (see `trained_pairs`), with
        update_keys=False always. The trajectory is the same, because encoder_k starts as a copy of
        encoder_q.
        """
        self.check_views(local_views, im_q=im_q, im_k=im_k)
        if self.training and not step_inputs:
            step_inputs = self.prepare_step(im_q, im_k)
        if self.training and update_keys:
            self.update_momentum_encoder()
        local = self.encode("encoder_q", *by_size(local_views)) if local_views else None
        # Read the queue before the new keys enter: a positive is never among its own negatives.
        loss, positive_rank, keys, pair = self._contrast(im_q, im_k, step_inputs[:2], local)
        if self.symmetric:
            others = self._contrast(im_k, im_q, step_inputs[2:], local)
            swapped, swapped_rank, first_keys, _ = others
            loss, positive_rank = loss + swapped, torch.cat([positive_rank, swapped_rank])
            keys = torch.cat([first_keys, keys])  # the demo enqueues the first view's keys first
        if self.training:
            self._pending.append(keys)
            if enqueue:
                enqueue_(self.queue, self.queue_ptr, torch.cat(self._pending), normalize=False)
                self._pending.clear()
        return ranking_output(loss, positive_rank, pair)

    def prepare_step(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Shuffles the keys' images over ranks or splits (see BatchShuffle).

        Returns shuffled images and the index that restores their order, first for the second view
        and, if symmetric, then for the first view. Returns () without shuffling.
        """
        # One process whose BatchNorm sees the whole batch has nothing to hide.
        if not self._shuffles or (rank_and_world_size()[1] == 1 and not self._splits):
            return ()
        im_q, im_k, *_ = views
        step_inputs: tuple[Tensor, ...] = ()
        for images in (im_k, im_q) if self.symmetric else (im_k,):
            # Images cross ranks in the smallest form: pixels, or floats in the autocast type.
            small = images if images.dtype in LEVELS else to_autocast_dtype(images)
            step_inputs += self.shuffle(small)
        return step_inputs

    def _contrast(
        self, im_q: Tensor, im_k: Tensor, step_inputs: tuple[Tensor, ...], local: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Returns loss (), positive ranks (N,), the keys to enqueue, and queries and keys (N, C).

        local: (L*N, C), queries of L small views, which have the positives of im_q.
        To enqueue: in train mode the keys of all W ranks, (W*N, C), in eval mode this rank's keys.
        """
        with torch.no_grad(), self.side_stream() as join:
            if self.training:
                k, keys = self._encode_keys(im_k, step_inputs)  # (N, C), (W*N, C)
            else:
                k = keys = self.encode("encoder_k", im_k)  # (N, C)
        q = self.encode("encoder_q", im_q)  # (N, C), normalised inside info_nce
        join()
        queries, positives = q, k
        if local is not None:
            queries = torch.cat([q, local])
            positives = k.repeat(len(queries) // len(k), 1)
        loss, positive_rank = info_nce(
            queries,
            positives,
            self.queue.to(q.dtype) if q.dtype == torch.float64 else self.queue,
            temperature=self.temperature,
            negatives_normalized=True,
            return_rank=True,
        )
        return loss, positive_rank[: len(q)], keys, (q, k)

    def random_state(self) -> Tensor | None:
        """Returns the state of the shuffle, or None before the first shuffle."""
        return self.shuffle.state()

    def load_random_state(self, state: Tensor | None) -> None:
        """Continues the shuffle from `random_state()`. None starts it anew."""
        self.shuffle.load_state(state)

    def _encode_keys(self, im_k: Tensor, step_inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Encodes images, the second views, into keys.

        Returns this rank's keys (N, C), and the keys of all ranks in the order of the batch (T, C).
        """
        shuffled, restore = step_inputs or (im_k, None)
        k = F.normalize(wide(self.encode("encoder_k", shuffled)), dim=1)
        keys, shares = gather_rows(k), shares_of(len(k))
        if restore is None:
            return k, in_order(keys, shares)
        keys = keys[restore]  # one gather serves the un-shuffling and the queue
        return keys[own_numbers(len(k), keys.device)], keys


def _own_parts(parts: int) -> int:
    """Returns how many of the batch's parts of BatchNorm this rank has."""
    rank, world_size = rank_and_world_size()
    return parts_of_ranks(parts, world_size)[rank] if parts > 1 else 1


def build(config: Config, images: int = 0, classes: int = 0, kind: type[MoCo] = MoCo) -> MoCo:
    """Returns MoCo, or a subclass `kind`, with the options of `config.model`."""
    m = cast(Options, config.model)
    mean, std = pixel_statistics(config.augment)
    model = kind(
        configured_encoder(config),
        m.dim,
        m.queue_size,
        m.momentum,
        m.temperature,
        m.mlp,
        m.shuffle_bn,
        bn_splits=_own_parts(m.bn_splits),
        symmetric=m.symmetric,
        queue_dtype=m.queue_dtype,
        pixel_mean=mean,
        pixel_std=std,
    )
    model.schedule_momentum(m.momentum_schedule)
    model.filling_steps = m.queue_warmup
    return model
