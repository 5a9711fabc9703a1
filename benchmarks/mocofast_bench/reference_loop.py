"""Baselines of a training step: the reference's loop, and a strong loop in eager PyTorch.

`ReferenceMoCo`, `reference_step` and `ReferenceLoader` follow the public description and the
paper of facebookresearch/moco (He et al. 2020, arXiv:1911.05722), costs included: float32,
three gathers of whole batches and keys a step, a copy of the queue, a loop over the weights
of the key encoder, top-5 over K + 1 classes, and two waits for the device (the queue's
pointer and the loss).

`StrongMoCo` and `strong_step` are what a careful user of plain PyTorch would write today: no
copies, no waits, grouped updates. The caller adds autocast and channels-last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from mocofast.config import AugmentConfig, OptimConfig
from mocofast.data.decoding import open_image
from mocofast.data.interface import Source
from mocofast.data.items import Item
from mocofast.distributed import rank_and_world_size
from mocofast.methods.moco import MoCo
from mocofast.models.batch_norm import SplitBatchNorm


class ReferenceMoCo(nn.Module):
    """The reference's MoCo, with a queue (C, K). Copies encoders, queue and pointer of `model`.

    With a process group, wrap the module in DistributedDataParallel with default options. DDP
    then broadcasts all buffers from rank 0 before every forward, as in the reference. Without
    a process group gathering is left out, which makes the baseline a little faster than the
    reference. The reference itself needs a group.

    forward raises ValueError if the queue is not a multiple of the batch, as the reference does.
    """

    queue: Tensor  # (C, K)
    queue_ptr: Tensor  # (1,)

    def __init__(self, model: MoCo) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = (
            copy.deepcopy(model.encoder_q),
            copy.deepcopy(model.encoder_k),
        )
        self.momentum, self.temperature = model.momentum, model.temperature
        self.register_buffer("queue", model.queue.float().t().contiguous())
        self.register_buffer("queue_ptr", model.queue_ptr.clone())

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits and labels, and updates the key encoder and the queue.

        im_q, im_k: normalised float images, (N, 3, S, S).

        Returns:
            logits: (N, 1 + K), the positive in column 0.
            labels: (N,), zeros.
        """
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            for key, query in zip(self.encoder_k.parameters(), self.encoder_q.parameters()):
                key.data = self.momentum * key.data + (1 - self.momentum) * query.data
            images, order = self._shuffle(im_k)
            shuffled = F.normalize(self.encoder_k(images), dim=1)
            k = gather(shuffled)[order.argsort()][own_rows(len(q))]
        positive = (q * k).sum(1, keepdim=True)
        negatives = q @ self.queue.clone()  # the queue is written before backward reads it
        logits = torch.cat([positive, negatives], dim=1) / self.temperature
        self._enqueue(k)
        return logits, torch.zeros(len(q), dtype=torch.int64, device=q.device)

    @torch.no_grad()
    def _shuffle(self, im_k: Tensor) -> tuple[Tensor, Tensor]:
        images = gather(im_k)
        order = torch.randperm(len(images)).to(images.device)
        if dist.is_initialized():
            dist.broadcast(order, 0)
        return images[order[own_rows(len(im_k))]], order

    @torch.no_grad()
    def _enqueue(self, k: Tensor) -> None:
        keys = gather(k)  # the second gather of the same keys
        size, pointer = self.queue.shape[1], int(self.queue_ptr)
        if size % len(keys):
            raise ValueError(
                f"queue must be a multiple of the batch: got {size} keys and batches of {len(keys)}"
            )
        self.queue[:, pointer : pointer + len(keys)] = keys.t()
        self.queue_ptr[0] = (pointer + len(keys)) % size


def gather(x: Tensor) -> Tensor:
    """Concatenates the tensors of all ranks: (N, ...) -> (W*N, ...) for W ranks.

    Returns x itself without a process group.
    """
    if not dist.is_initialized():
        return x
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, x.contiguous())
    return torch.cat(gathered)


def own_rows(count: int) -> slice:
    """Returns the slice of this rank's `count` rows in a gathered batch."""
    rank, _ = rank_and_world_size()
    return slice(rank * count, (rank + 1) * count)


def reference_step(
    model: nn.Module, views: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer
) -> float:
    """Makes one training step and returns the loss. Waits for the device, as the reference does.

    model: ReferenceMoCo, or DistributedDataParallel around ReferenceMoCo.
    views: two batches of normalised float images, (N, 3, S, S).
    """
    logits, labels = model(*views)
    loss = F.cross_entropy(logits, labels)
    with torch.no_grad():
        hits = logits.topk(5, dim=1).indices == labels[:, None]
        # Acc@1 and Acc@5: computed in every step, read only by the log.
        _ = hits[:, :1].float().sum() / len(hits), hits.float().sum() / len(hits)
    value = loss.item()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return value


class StrongMoCo(nn.Module):
    """MoCo for one process, without the reference's copies and waits.

    Copies encoders, queue and pointer of `model`.
    """

    queue: Tensor  # (K, C)

    def __init__(self, model: MoCo) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = (
            copy.deepcopy(model.encoder_q),
            copy.deepcopy(model.encoder_k),
        )
        self.momentum, self.temperature = model.momentum, model.temperature
        self.register_buffer("queue", model.queue.clone())
        self.pointer = int(model.queue_ptr)
        # In one process the shuffle has an effect only with split BatchNorm.
        self.shuffles = any(isinstance(module, SplitBatchNorm) for module in self.modules())

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits and keys, and updates the key encoder.

        im_q, im_k: normalised float images, (N, 3, S, S).

        Returns:
            logits: (N, 1 + K), the positive in column 0.
            keys: (N, C), unit length. Pass keys to `enqueue` after backward.
        """
        q = F.normalize(self.encoder_q(im_q).float(), dim=1)
        with torch.no_grad():
            keys: list[Tensor] = list(self.encoder_k.parameters())
            queries: list[Tensor] = list(self.encoder_q.parameters())
            torch._foreach_lerp_(keys, queries, 1 - self.momentum)
            if self.shuffles:
                order = torch.randperm(len(im_k), device=im_k.device)
                k = self.encoder_k(im_k[order])[order.argsort()]
            else:
                k = self.encoder_k(im_k)
            k = F.normalize(k.float(), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.to(q.dtype).t()], dim=1)
        return logits / self.temperature, k

    def enqueue(self, keys: Tensor) -> None:
        """Replaces the oldest keys by keys (N, C). Call after backward, which reads the queue."""
        rows = torch.arange(self.pointer, self.pointer + len(keys), device=keys.device) % len(
            self.queue
        )
        self.queue[rows] = keys.to(self.queue.dtype)
        self.pointer = (self.pointer + len(keys)) % len(self.queue)


def strong_step(
    model: StrongMoCo,
    views: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    autocast: torch.autocast,
) -> Tensor:
    """Makes one training step without waiting for the device.

    views: two batches of normalised float images, (N, 3, S, S).
    autocast: context of the forward pass.

    Returns (3,) on the device: loss, Acc@1 and Acc@5.
    """
    with autocast:
        logits, keys = model(*views)
        loss = F.cross_entropy(
            logits, torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    model.enqueue(keys)
    with torch.no_grad():
        positive_rank = (logits[:, 1:] > logits[:, :1]).sum(1)  # (N,)
        hits = [(positive_rank < top).float().mean() for top in (1, 5)]
        return torch.stack([loss, *hits])


def plain_sgd(
    parameters: Iterable[nn.Parameter], config: OptimConfig, foreach: bool | None = None
) -> torch.optim.SGD:
    """Returns SGD on all trainable parameters.

    foreach: group the updates of tensors. None: PyTorch decides.
    """
    trainable = [p for p in parameters if p.requires_grad]
    return torch.optim.SGD(
        trainable, config.lr, config.momentum, weight_decay=config.weight_decay, foreach=foreach
    )


class ReferenceLoader:
    """The reference's loader: a DataLoader with torchvision's transforms on PIL images.

    Batches are pairs of normalised float32 images, (N, 3, S, S). Workers persist over epochs,
    unlike the reference's workers: on a small folder the start of workers would dominate.
    """

    def __init__(
        self,
        source: Source,
        augment: AugmentConfig,
        batch_size: int,
        workers: int,
        pairs: Callable[[Source, AugmentConfig], Dataset[tuple[Tensor, Tensor]]] | None = None,
    ) -> None:
        """Starts no worker yet: workers start with the first epoch.

        source: images.
        augment: parameters of the transforms.
        batch_size: pairs in a batch.
        workers: processes. 0: the calling process.
        pairs: data set of two views of every image. None: the reference's transforms.
        """
        self._batches: DataLoader[tuple[Tensor, Tensor]] | None = DataLoader(
            (pairs or _Pairs)(source, augment),
            batch_size,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates over every image once, in a new order."""
        assert self._batches is not None
        return iter(self._batches)

    def close(self) -> None:
        """Ends the workers."""
        self._batches = None


class _Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Two random views of every image, by the transforms of MoCo v1 or v2, as `augment` says."""

    def __init__(self, source: Source, augment: AugmentConfig) -> None:
        self._source = source
        jitter = transforms.RandomApply([transforms.ColorJitter(*augment.jitter)], augment.jitter_p)
        gray = transforms.RandomGrayscale(augment.gray)
        steps = [
            transforms.RandomResizedCrop(augment.shape, augment.crop_scale),
            *([transforms.RandomRotation(augment.rotate)] if augment.rotate else []),
            *((gray, jitter) if augment.gray_first else (jitter, gray)),
            *(
                [transforms.RandomApply([_Blur(augment.blur_sigma)], augment.blur)]
                if augment.blur
                else []
            ),
            transforms.RandomHorizontalFlip(augment.flip),
            transforms.ToTensor(),
            transforms.Normalize(augment.mean, augment.std),
        ]
        self._transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = pil_image(self._source, index)
        return self._transform(image), self._transform(image)


def pil_image(source: Source, index: int) -> Image.Image:
    """Returns an image of a source as the reference reads it."""
    item = source.load(index)
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    assert not isinstance(item, Item)
    with open_image(item) as file:
        return file.convert("RGB")


class _Blur:
    def __init__(self, sigma: tuple[float, float]) -> None:
        self._sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = float(torch.empty(()).uniform_(*self._sigma))
        return image.filter(ImageFilter.GaussianBlur(sigma))
