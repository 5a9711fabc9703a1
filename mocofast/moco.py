"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning (He et al. 2020, arXiv:1911.05722).

A query is matched with its positive key, another view of the same image, against a queue of keys of earlier batches.
Keys come from a second encoder whose weights are an exponential moving average of the query encoder's. `mlp=True`,
with temperature 0.2, stronger augmentation and a cosine schedule, is MoCo v2 (Chen et al. 2020, arXiv:2003.04297).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import ModelConfig
from mocofast.distributed import BatchShuffle, all_gather, rank_and_world_size
from mocofast.encoders import add_mlp_head, head_name, prepare_images, split_batch_norm, to_autocast_dtype
from mocofast.ops import ema_update_, enqueue_, info_nce

QUEUE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class MoCoOutput(NamedTuple):
    """What a forward pass yields, over this rank's own queries."""

    loss: Tensor  # () float32, differentiable: mean InfoNCE
    rank: Tensor  # (N,) int32: how many negatives score above the positive; Acc@k is mean(rank < k)


class MoCo(nn.Module):
    """Query encoder, momentum encoder and queue.

    base_encoder: `base_encoder(num_classes=dim)` returns a module that ends in `.fc`, `.head` or `.heads`, as
        torchvision's and timm's do (see `mocofast.encoders.build_encoder`).
    dim: C, dimension of the embedding. queue_size: K, any number of keys for any batch size.
    momentum: m of the key encoder's moving average. temperature: T of InfoNCE.
    mlp: MoCo v2's projection head.
    shuffle_bn: the keys' images are re-distributed over ranks (with bn_splits, over parts) before their encoder, so
        that BatchNorm statistics cannot betray the positive.
    bn_splits: BatchNorm of both encoders over this many parts of a rank's batch, to stand in for as many GPUs.
    queue_dtype: how the queue is stored: float32, bfloat16 or float16, by name or as torch's.
    pixel_mean, pixel_std: the three channels' statistics on the 0..255 scale, needed for uint8 images only.

    State dict: `encoder_q.*`, `encoder_k.*`, `queue` (K, C), `queue_ptr` (1,) int64. The state of the shuffle's
    generator is `shuffle.state()`. Wrapped in DistributedDataParallel, every rank has the same batch size; nothing
    but gradients, images and keys crosses ranks after the first step: buffers are kept out of DDP's broadcasts and
    taken from rank 0 once, so each rank keeps its own BatchNorm running statistics; those of rank 0 are the model's.
    """

    queue: Tensor
    queue_ptr: Tensor
    pixel_mean: Tensor | None
    pixel_std: Tensor | None

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
        queue_dtype: torch.dtype | str = ModelConfig.queue_dtype,
        pixel_mean: Sequence[float] | Tensor | None = None,
        pixel_std: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("queue_size", queue_size), ("bn_splits", bn_splits)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1: got {value}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1]: got {momentum}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive: got {temperature}")
        dtype = QUEUE_DTYPES.get(queue_dtype) if isinstance(queue_dtype, str) else queue_dtype
        if dtype not in QUEUE_DTYPES.values():
            raise ValueError(f"queue_dtype must be one of {', '.join(QUEUE_DTYPES)}: got {queue_dtype}")
        if (pixel_mean is None) != (pixel_std is None):
            raise ValueError("pixel_mean and pixel_std belong together: got one of them only")
        self.momentum = momentum
        self.temperature = temperature

        self.encoder_q = base_encoder(num_classes=dim)
        head_name(self.encoder_q)  # raises where there is no head
        if mlp:
            add_mlp_head(self.encoder_q)
        if bn_splits > 1:
            split_batch_norm(self.encoder_q, bn_splits)
        self.encoder_k = copy.deepcopy(self.encoder_q)
        self.encoder_k.requires_grad_(False)

        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1).to(dtype))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self._pending: list[Tensor] = []  # keys of micro-batches that wait for their optimiser step's last one

        # One process whose BatchNorm sees the whole batch has nothing to hide by shuffling.
        self._shuffles = shuffle_bn
        self._splits = bn_splits > 1
        self.shuffle = BatchShuffle()

        for name, statistics in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            pixels = None if statistics is None else torch.as_tensor(statistics, dtype=torch.float32).reshape(3, 1, 1)
            self.register_buffer(name, pixels, persistent=False)
        # Read by DistributedDataParallel, which would otherwise broadcast the queue at every step.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self._synchronized = False

    def forward(self, im_q: Tensor, im_k: Tensor, *, update_keys: bool = True, enqueue: bool = True) -> MoCoOutput:
        """Loss of this rank's queries; in train mode also updates the key encoder and the queue.

        im_q, im_k: (N, 3, S, S), two views of the same images: uint8 pixels, normalised here with pixel_mean and
        pixel_std, or floats, taken as normalised already. TypeError for uint8 without pixel statistics.
        For gradient accumulation, update_keys=True with the first micro-batch of an optimiser step only and
        enqueue=True with the last only, which enqueues the keys of them all: every micro-batch then meets the same
        key encoder and the same queue, as one large batch would.

        The moving average is taken here, before the keys, as the paper's code does. Taken right after the optimiser
        step it gives the same trajectory, since encoder_k starts as a copy of encoder_q: an optimiser of
        mocofast.optim can do it (see `trained_pairs`), and update_keys is then False always.
        """
        self._check_images(im_q, im_k)
        if self.training and not self._synchronized:
            self._synchronize()
        q = self.encoder_q(self._prepare(im_q))  # queries: (N, C), normalised inside info_nce

        with torch.no_grad():
            if not self.training:
                k = self.encoder_k(self._prepare(im_k))  # keys: (N, C)
            else:
                if update_keys:
                    ema_update_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), self.momentum)
                k, keys = self._encode_keys(im_k)  # own keys (N, C), and those of all W ranks (W*N, C)

        # The queue is read before these keys enter it: a positive is never among its own negatives.
        loss, rank = info_nce(
            q, k, self.queue, temperature=self.temperature, negatives_normalized=True, return_rank=True
        )
        if self.training:
            self._pending.append(keys)
            if enqueue:
                enqueue_(self.queue, self.queue_ptr, torch.cat(self._pending), normalize=False)
                self._pending.clear()
        return MoCoOutput(loss, rank)

    def trained_pairs(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters of encoder_q that are trained, and those of encoder_k that follow them.

        For an optimiser that averages: FusedSGD(queries, ..., ema=(keys, model.momentum)).
        """
        pairs = zip(self.encoder_q.parameters(), self.encoder_k.parameters())
        trained = [(q, k) for q, k in pairs if q.requires_grad]
        return [q for q, _ in trained], [k for _, k in trained]

    def _encode_keys(self, im_k: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, S, S) -> the keys of these images (N, C), and all ranks' keys in the order of ranks (W*N, C)."""
        rank, world_size = rank_and_world_size()
        if not self._shuffles or (world_size == 1 and not self._splits):
            k = F.normalize(self.encoder_k(self._prepare(im_k)).float(), dim=1)
            return k, all_gather(k)
        # Images cross ranks in the smallest form there is: uint8, or what autocast would make of floats anyway.
        shuffled, restore = self.shuffle(im_k if im_k.dtype == torch.uint8 else to_autocast_dtype(im_k))
        k = F.normalize(self.encoder_k(self._prepare(shuffled)).float(), dim=1)
        keys = all_gather(k)[restore]  # one gather serves both un-shuffling and the queue
        return keys[rank * len(im_k) : (rank + 1) * len(im_k)], keys

    def _prepare(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        return prepare_images(images, cast(Tensor, self.pixel_mean), cast(Tensor, self.pixel_std))

    def _check_images(self, im_q: Tensor, im_k: Tensor) -> None:
        if im_q.shape != im_k.shape:
            raise ValueError(f"im_k must have the shape of im_q: got {tuple(im_k.shape)} and {tuple(im_q.shape)}")
        if self.pixel_mean is None and torch.uint8 in (im_q.dtype, im_k.dtype):
            raise TypeError(
                "im_q, im_k: got uint8 images, and this MoCo has no pixel statistics to normalise them with; pass "
                "pixel_mean and pixel_std (on the 0..255 scale) to MoCo, or normalised float images to forward"
            )

    def _synchronize(self) -> None:
        """Takes rank 0's buffers, once. DistributedDataParallel does so for the parameters."""
        if rank_and_world_size()[1] > 1:
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)
        self._synchronized = True
