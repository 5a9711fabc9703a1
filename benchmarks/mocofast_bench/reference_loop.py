"""What a training step is measured against: the reference's loop written the plain way, and a strong eager baseline.

`ReferenceMoCo`, `reference_step` and `ReferenceLoader` do what facebookresearch/moco's public description and paper
(He et al. 2020, arXiv:1911.05722) say its loop does, its costs included: fp32, three gathers of whole batches and
keys a step, a copy of the queue, weights of the key encoder rebound one by one, top-5 over K + 1 classes, and two
waits for the device (the queue's pointer and the loss). `StrongMoCo` and `strong_step` are what a careful user of
plain PyTorch would write today: no copies, no waits, grouped updates, and autocast and channels-last by the caller.
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
from mocofast.distributed import rank_and_world_size
from mocofast.methods.moco import MoCo
from mocofast.models.batch_norm import SplitBatchNorm2d


class ReferenceMoCo(nn.Module):
    """MoCo with a (C, K) queue, starting from a copy of `model`'s encoders, queue and pointer.

    Under a process group it belongs into DistributedDataParallel with its defaults, which also broadcasts all buffers
    from rank 0 before every forward. Without one, gathering is left out (the reference itself cannot run so), which
    flatters it a little. ValueError unless every batch fits the queue a whole number of times, as in the reference.
    """

    queue: Tensor
    queue_ptr: Tensor

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
        """Normalised float images (N, 3, S, S), twice -> logits (N, 1 + K), the positive first, and labels (N,)."""
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
        keys = gather(k)  # the same keys for the second time
        size, pointer = self.queue.shape[1], int(self.queue_ptr)
        if size % len(keys):
            raise ValueError(
                f"queue must be a multiple of the batch: got {size} keys and batches of {len(keys)}"
            )
        self.queue[:, pointer : pointer + len(keys)] = keys.t()
        self.queue_ptr[0] = (pointer + len(keys)) % size


def gather(x: Tensor) -> Tensor:
    """(N, ...) of every rank -> (W*N, ...); x itself without a process group."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def own_rows(count: int) -> slice:
    """Where this rank's `count` rows stand in a gathered batch."""
    rank, _ = rank_and_world_size()
    return slice(rank * count, (rank + 1) * count)


def reference_step(
    model: nn.Module, views: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer
) -> float:
    """One step on normalised float views (N, 3, S, S) each; the loss, for which it waits as the reference does.

    model: ReferenceMoCo, or DistributedDataParallel around it.
    """
    logits, labels = model(*views)
    loss = F.cross_entropy(logits, labels)
    with torch.no_grad():
        hits = logits.topk(5, dim=1).indices == labels[:, None]
        _ = (
            hits[:, :1].float().sum() / len(hits),
            hits.float().sum() / len(hits),
        )  # Acc@1 and Acc@5, read when logged
    value = loss.item()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return value


class StrongMoCo(nn.Module):
    """The same method for one process, without the reference's copies and waits, from a copy of `model`."""

    queue: Tensor

    def __init__(self, model: MoCo) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = (
            copy.deepcopy(model.encoder_q),
            copy.deepcopy(model.encoder_k),
        )
        self.momentum, self.temperature = model.momentum, model.temperature
        self.register_buffer("queue", model.queue.clone())
        self.pointer = int(model.queue_ptr)
        # In one process only split BatchNorm gives the shuffle anything to hide.
        self.shuffles = any(isinstance(module, SplitBatchNorm2d) for module in self.modules())

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float images (N, 3, S, S), twice -> logits (N, 1 + K), the positive first, and keys (N, C)."""
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
        """Writes keys (N, C) in the place of the oldest. After backward, which still reads the queue."""
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
    """One step on normalised float views; (3,) loss, Acc@1 and Acc@5 on the device, without waiting."""
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
        rank = (logits[:, 1:] > logits[:, :1]).sum(1)
        return torch.stack([loss, (rank < 1).float().mean(), (rank < 5).float().mean()])


def plain_sgd(
    parameters: Iterable[nn.Parameter], config: OptimConfig, foreach: bool | None = None
) -> torch.optim.SGD:
    """SGD on all trainable parameters; foreach=None leaves to PyTorch whether it groups its updates."""
    trainable = [p for p in parameters if p.requires_grad]
    return torch.optim.SGD(
        trainable, config.lr, config.momentum, weight_decay=config.weight_decay, foreach=foreach
    )


class ReferenceLoader:
    """The reference's own way to images: a DataLoader of torchvision's transforms on PIL images.

    Batches are normalised float32 pairs (N, 3, S, S). Workers persist over epochs, which the reference's do not: on
    a small folder their start would hide everything else.
    """

    def __init__(
        self,
        source: Source,
        augment: AugmentConfig,
        batch_size: int,
        workers: int,
        pairs: Callable[[Source, AugmentConfig], Dataset[tuple[Tensor, Tensor]]] | None = None,
    ) -> None:
        """pairs: the data set of two views of each image, in place of the reference's."""
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
        """Every image once, in a new order."""
        assert self._batches is not None
        return iter(self._batches)

    def close(self) -> None:
        """Ends the workers."""
        self._batches = None


class _Pairs(Dataset[tuple[Tensor, Tensor]]):
    """MoCo v1's or v2's transforms, as `augment` says; two random views of each image."""

    def __init__(self, source: Source, augment: AugmentConfig) -> None:
        self._source = source
        jitter = transforms.RandomApply([transforms.ColorJitter(*augment.jitter)], augment.jitter_p)
        gray = transforms.RandomGrayscale(augment.gray)
        steps = [
            transforms.RandomResizedCrop(augment.size, augment.crop_scale),
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
        item = self._source.load(index)
        if isinstance(item, np.ndarray):
            image = Image.fromarray(item)
        else:
            with open_image(item) as file:
                image = file.convert("RGB")
        return self._transform(image), self._transform(image)


class _Blur:
    def __init__(self, sigma: tuple[float, float]) -> None:
        self._sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = float(torch.empty(()).uniform_(*self._sigma))
        return image.filter(ImageFilter.GaussianBlur(sigma))
