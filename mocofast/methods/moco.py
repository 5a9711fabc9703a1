"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning (He et al. 2020, arXiv:1911.05722).

A query is matched with its positive key, another view of the same image, against a queue of keys of earlier batches.
Keys come from a second encoder whose weights are an exponential moving average of the query encoder's. `mlp=True`,
with temperature 0.2, stronger augmentation and a cosine schedule, is MoCo v2 (Chen et al. 2020, arXiv:2003.04297);
with `symmetric=True` besides, MoCo v2+.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import Config, ModelConfig
from mocofast.distributed import BatchShuffle, all_gather, rank_and_world_size
from mocofast.methods.base import MethodOutput
from mocofast.methods.momentum import MomentumMethod
from mocofast.models.batch_norm import split_batch_norm
from mocofast.models.encoders import add_mlp_head, build_encoder, head_name
from mocofast.models.pixels import pixel_statistics, to_autocast_dtype
from mocofast.ops.losses import info_nce
from mocofast.ops.memory import enqueue_

QUEUE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class MoCo(MomentumMethod):
    """Query encoder, momentum encoder and queue.

    base_encoder: `base_encoder(num_classes=dim)` returns a module that ends in `.fc`, `.head` or `.heads`, as
        torchvision's and timm's do (see `mocofast.models.encoders.build_encoder`).
    dim: C, dimension of the embedding. queue_size: K, any number of keys for any batch size.
    momentum: m of the key encoder's moving average. temperature: T of InfoNCE.
    mlp: MoCo v2's projection head.
    shuffle_bn: the keys' images are re-distributed over ranks (with bn_splits, over parts) before their encoder, so
        that BatchNorm statistics cannot betray the positive.
    bn_splits: BatchNorm of both encoders over this many parts of a rank's batch, to stand in for as many GPUs.
    symmetric: both views are queries and keys, and the loss is the sum of both (the CIFAR-10 demo of MoCo's authors).
    queue_dtype: how the queue is stored: float32, bfloat16 or float16, by name or as torch's.
    pixel_mean, pixel_std: the three channels' statistics on the 0..255 scale, needed for uint8 images only.

    State dict: `encoder_q.*`, `encoder_k.*`, `queue` (K, C), `queue_ptr` (1,) int64; `random_state` is the shuffle's.
    Nothing but gradients, images and keys crosses ranks after the first step.
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = ModelConfig.dim,
        queue_size: int = ModelConfig.queue_size,
        momentum: float = ModelConfig.momentum,
        temperature: float = ModelConfig.temperature,
        mlp: bool = ModelConfig.mlp,
        shuffle_bn: bool = ModelConfig.shuffle_bn,
        *,
        bn_splits: int = ModelConfig.bn_splits,
        symmetric: bool = ModelConfig.symmetric,
        queue_dtype: torch.dtype | str = ModelConfig.queue_dtype,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
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

        self.encoder_q = base_encoder(num_classes=dim)
        head_name(self.encoder_q)  # raises where there is no head
        if mlp:
            add_mlp_head(self.encoder_q)
        if bn_splits > 1:
            split_batch_norm(self.encoder_q, bn_splits)
        self.make_momentum_encoder(momentum)

        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1).to(dtype))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self._pending: list[
            Tensor
        ] = []  # keys of micro-batches that wait for their optimiser step's last one

        self._shuffles = shuffle_bn
        self._splits = bn_splits > 1
        self.shuffle = BatchShuffle()

        self.keep_buffers_out_of_broadcasts()

    @property
    def chance_loss(self) -> float:
        """InfoNCE of an encoder that knows nothing: log(K + 1), twice if symmetric. A loss near it, or above, is no
        sign of failure."""
        return (1 + self.symmetric) * math.log(len(self.queue) + 1)

    def describe(self) -> str:
        """The size of the queue."""
        return f"queue of {len(self.queue)} keys" + ", symmetric loss" * self.symmetric

    def forward(
        self,
        im_q: Tensor,
        im_k: Tensor,
        *,
        update_keys: bool = True,
        enqueue: bool = True,
        step_inputs: tuple[Tensor, ...] = (),
    ) -> MethodOutput:
        """Loss of this rank's queries; in train mode also updates the key encoder and the queue.

        im_q, im_k: (N, 3, S, S), two views of the same images: uint8 pixels, normalised here with pixel_mean and
        pixel_std, or floats, taken as normalised already. TypeError for uint8 without pixel statistics.
        For gradient accumulation, update_keys=True with the first micro-batch of an optimiser step only and
        enqueue=True with the last only, which enqueues the keys of them all: every micro-batch then meets the same
        key encoder and the same queue, as one large batch would.

        The moving average is taken here, before the keys, as the paper's code does. Taken right after the optimiser
        step it gives the same trajectory, since encoder_k starts as a copy of encoder_q: an optimiser of
        mocofast.optim can do it (see `trained_pairs`), and update_keys is then False always.

        arranged: what `prepare_step` made of these views, where the caller has called it.
        """
        self.check_views(im_q=im_q, im_k=im_k)
        if self.training and not step_inputs:
            step_inputs = self.prepare_step(im_q, im_k)
        if self.training and update_keys:
            self.update_momentum_encoder()
        # The queue is read before these keys enter it: a positive is never among its own negatives.
        loss, rank, keys = self._contrast(im_q, im_k, step_inputs[:2])
        if self.symmetric:
            swapped_loss, swapped_rank, first_keys = self._contrast(im_k, im_q, step_inputs[2:])
            loss, rank = loss + swapped_loss, torch.cat([rank, swapped_rank])
            keys = torch.cat(
                [first_keys, keys]
            )  # as the demo enqueues them: those of the first view first
        if self.training:
            self._pending.append(keys)
            if enqueue:
                enqueue_(self.queue, self.queue_ptr, torch.cat(self._pending), normalize=False)
                self._pending.clear()
        return MethodOutput(loss, rank)

    def prepare_step(self, *views: Tensor) -> tuple[Tensor, ...]:
        """The shuffled images of the keys and the index that restores their order, as BatchShuffle has them; if
        symmetric, those of the first view as keys after those of the second. Nothing without shuffling."""
        # One process whose BatchNorm sees the whole batch has nothing to hide by shuffling.
        if not self._shuffles or (rank_and_world_size()[1] == 1 and not self._splits):
            return ()
        im_q, im_k = views
        step_inputs: tuple[Tensor, ...] = ()
        for images in (im_k, im_q) if self.symmetric else (im_k,):
            # Images cross ranks in the smallest form there is: uint8, or what autocast would make of floats anyway.
            step_inputs += self.shuffle(
                images if images.dtype == torch.uint8 else to_autocast_dtype(images)
            )
        return step_inputs

    def _contrast(
        self, im_q: Tensor, im_k: Tensor, step_inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (), ranks (N,), and the keys of all W ranks (W*N, C), in eval mode of this one only."""
        with torch.no_grad(), self.side_stream() as join:
            if self.training:
                k, keys = self._encode_keys(
                    im_k, step_inputs
                )  # own keys (N, C), and those of all ranks
            else:
                k = keys = self.encode("encoder_k", im_k)
        q = self.encode("encoder_q", im_q)  # queries: (N, C), normalised inside info_nce
        join()
        loss, rank = info_nce(
            q,
            k,
            self.queue,
            temperature=self.temperature,
            negatives_normalized=True,
            return_rank=True,
        )
        return loss, rank, keys

    def random_state(self) -> Tensor | None:
        """The shuffle's; None before the first one."""
        return self.shuffle.state()

    def load_random_state(self, state: Tensor | None) -> None:
        """Shuffles on from `random_state()`, afresh from None."""
        self.shuffle.load_state(state)

    def _encode_keys(self, im_k: Tensor, step_inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(N, 3, S, S) -> the keys of these images (N, C), and all ranks' keys in the order of ranks (W*N, C)."""
        shuffled, restore = step_inputs or (im_k, None)
        k = F.normalize(self.encode("encoder_k", shuffled).float(), dim=1)
        keys = all_gather(k)
        if restore is None:
            return k, keys
        keys = keys[restore]  # one gather serves both un-shuffling and the queue
        rank = rank_and_world_size()[0]
        return keys[rank * len(im_k) : (rank + 1) * len(im_k)], keys


def build(config: Config) -> MoCo:
    """MoCo with the options of `config.model`."""
    m = config.model
    mean, std = pixel_statistics(config.augment)
    return MoCo(
        build_encoder(m.arch, config.augment.size),
        m.dim,
        m.queue_size,
        m.momentum,
        m.temperature,
        m.mlp,
        m.shuffle_bn,
        bn_splits=m.bn_splits,
        symmetric=m.symmetric,
        queue_dtype=m.queue_dtype,
        pixel_mean=mean,
        pixel_std=std,
    )
