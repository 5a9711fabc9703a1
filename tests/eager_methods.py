"""SimCLR, memory bank, SwAV and supervised training, written the plain way.

Follows the pseudo-code and the definitions of the papers, in one process, on the whole batch. The
methods must give equal results on any number of ranks.

Parameters and buffers have the same names as in the methods.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mocofast.methods.base import Method
from mocofast.methods.clip import CLIP
from mocofast.methods.memory_bank import MemoryBank
from mocofast.methods.simclr import SimCLR
from mocofast.methods.supervised import Supervised
from mocofast.methods.swav import SwAV


class Batch(NamedTuple):
    """A batch of N images."""

    views: tuple[Tensor, ...]  # every view (N, 3, 8, 8), float
    index: Tensor  # (N,), numbers of the images
    labels: Tensor  # (N,)

    def rank_slice(self, rank: int, ranks: int) -> Batch:
        """Returns the slice of one rank."""
        views = tuple(view.chunk(ranks)[rank] for view in self.views)
        return Batch(views, self.index.chunk(ranks)[rank], self.labels.chunk(ranks)[rank])


class EagerSimCLR(nn.Module):
    """The mean over views i of -log(exp(s_ij / T) / sum over k != i of exp(s_ik / T)).

    View j shows the same image as view i.
    """

    def __init__(self, model: SimCLR, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder_q = copy.deepcopy(model.encoder_q).to(dtype)
        self.temperature = model.temperature

    def forward(self, batch: Batch) -> Tensor:
        z = F.normalize(self.encoder_q(torch.cat(batch.views)), dim=1)  # (2N, C)
        logits = (z @ z.t() / self.temperature).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


class EagerMemoryBank(nn.Module):
    """Updates the bank slot by slot, and picks the negatives from a list of slots."""

    def __init__(self, model: MemoryBank, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder_q = copy.deepcopy(model.encoder_q).to(dtype)
        self.register_buffer("bank", model.bank.to(dtype))
        self.temperature, self.momentum = model.temperature, model.momentum
        self.negatives = model.negatives

    def forward(self, batch: Batch) -> Tensor:
        v = F.normalize(self.encoder_q(batch.views[0]), dim=1)  # (N, C)
        # Negatives (K, C): slots of images outside the batch.
        outside = [slot for slot in range(len(self.bank)) if slot not in batch.index.tolist()]
        numbers = torch.randint(len(self.bank) - len(v), (self.negatives,)).tolist()
        negatives = self.bank[[outside[number] for number in numbers]]
        positive = (v * self.bank[batch.index]).sum(1, keepdim=True)
        logits = torch.cat([positive, v @ negatives.t()], dim=1) / self.temperature
        # For a repeated image the last embedding counts.
        before = self.bank.clone()
        for slot, embedding in zip(batch.index.tolist(), v.detach()):
            self.bank[slot] = F.normalize(
                self.momentum * before[slot] + (1 - self.momentum) * embedding, dim=0
            )
        return F.cross_entropy(logits, torch.zeros(len(v), dtype=torch.int64))


class EagerSwAV(nn.Module):
    """SwAV with the transport plan of the paper, (K, N).

    The plan is scaled to the sum 1. Then, three times, rows are scaled to the sum 1 / K and columns
    to the sum 1 / N.
    """

    def __init__(self, model: SwAV, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder_q = copy.deepcopy(model.encoder_q)
        self.prototypes = copy.deepcopy(model.prototypes)
        self.to(dtype)
        self.temperature, self.epsilon = model.temperature, model.epsilon
        self.frozen = model.freeze_prototypes  # steps that the prototypes still stay

    def forward(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        z = F.normalize(self.encoder_q(torch.cat(batch.views)), dim=1)
        scores = self.prototypes(z).chunk(2)  # two of (N, K)
        codes = [self.code(s.detach()) for s in scores]
        losses = [
            -(code * F.log_softmax(s / self.temperature, dim=1)).sum(1).mean()
            for code, s in zip(codes, scores[::-1])
        ]
        return (losses[0] + losses[1]) / 2

    def code(self, scores: Tensor) -> Tensor:
        """Returns the codes (N, K) of scores (N, K). Every row sums to 1."""
        plan = (scores / self.epsilon).exp().t()
        plan /= plan.sum()
        for _ in range(3):
            plan /= plan.sum(1, keepdim=True) * len(plan)
            plan /= plan.sum(0, keepdim=True) * plan.shape[1]
        return (plan * plan.shape[1]).t()

    def after_backward(self) -> None:
        """Drops the gradient of frozen prototypes."""
        if self.frozen:
            self.frozen -= 1
            self.prototypes.weight.grad = None


class EagerSupervised(nn.Module):
    """Cross entropy by definition, log(sum of exp(logits)) - logit of the label."""

    def __init__(self, model: Supervised, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder_q = copy.deepcopy(model.encoder_q).to(dtype)

    def forward(self, batch: Batch) -> Tensor:
        logits = self.encoder_q(batch.views[0])
        return (logits.exp().sum(1).log() - logits[torch.arange(len(logits)), batch.labels]).mean()


class EagerCLIP(nn.Module):
    """CLIP by the pseudo-code of the paper, fig. 3; SigLIP by its; and CLIP with queues.

    Texts are those of `Captions`.
    """

    def __init__(self, model: CLIP, dtype: torch.dtype) -> None:
        super().__init__()
        for name, module in model.named_children():
            setattr(self, name, copy.deepcopy(module))
        for name, parameter in model.named_parameters(recurse=False):
            setattr(self, name, nn.Parameter(parameter.detach().clone()))
        for name, buffer in model.named_buffers(recurse=False):
            if buffer is not None and buffer.is_floating_point():
                self.register_buffer(name, buffer.clone())
        self.to(dtype)
        self.loss, self.momentum, self.filled = model.loss, model.momentum, 0
        self.tokenize = model.tokenize

    def forward(self, batch: Batch) -> Tensor:
        tokens = self.tokenize([Captions().caption(i) for i in batch.index.tolist()])
        with torch.no_grad():
            self.logit_scale.copy_(self.logit_scale.clamp(max=math.log(100)))
        images = F.normalize(self.encoder_q(batch.views[0]), dim=1)
        texts = F.normalize(self.text_q(tokens), dim=1)
        if hasattr(self, "queue"):
            return self.with_queues(images, texts, batch.views[0], tokens)
        logits = images @ texts.t() * self.logit_scale.exp()
        here = torch.arange(len(images))
        if self.loss == "sigmoid":
            signs = 2 * torch.eye(len(images)) - 1
            return -F.logsigmoid(signs * (logits + self.logit_bias)).sum() / len(images)
        return (F.cross_entropy(logits, here) + F.cross_entropy(logits.t(), here)) / 2

    def with_queues(self, images: Tensor, texts: Tensor, view: Tensor, tokens: Tensor) -> Tensor:
        """Returns the loss, and moves the momentum towers and the queues."""
        with torch.no_grad():
            for query, key in ((self.encoder_q, self.encoder_k), (self.text_q, self.text_k)):
                for q, k in zip(query.parameters(), key.parameters()):
                    k.copy_(self.momentum * k + (1 - self.momentum) * q)
            image_keys = F.normalize(self.encoder_k(view), dim=1)
            text_keys = F.normalize(self.text_k(tokens), dim=1)
        losses = []
        for query, key, queue in (
            (images, text_keys, self.queue),
            (texts, image_keys, self.image_queue),
        ):
            positive = (query * key).sum(1, keepdim=True)
            logits = torch.cat([positive, query @ queue.t().clone()], 1) * self.logit_scale.exp()
            losses.append(-F.log_softmax(logits, 1)[:, 0].mean())
        for i in range(len(images)):
            row = (self.filled + i) % len(self.queue)
            self.queue[row], self.image_queue[row] = text_keys[i], image_keys[i]
        self.filled += len(images)
        return (losses[0] + losses[1]) / 2


class Captions:
    """Stands for a source of images: the caption of an image says its number."""

    def caption(self, index: int) -> str:
        return f"image {index}"


EAGER: dict[type[Method], Any] = {
    CLIP: EagerCLIP,
    SimCLR: EagerSimCLR,
    MemoryBank: EagerMemoryBank,
    SwAV: EagerSwAV,
    Supervised: EagerSupervised,
}


def random_batches(steps: int, size: int, images: int, classes: int, views: int) -> list[Batch]:
    """Returns batches in which images come back. One image comes twice in every batch."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(steps):
        index = torch.randperm(images, generator=generator)[:size]
        index[-1] = index[0]
        labels = torch.randint(classes, (size,), generator=generator)
        pixels = torch.randn(views, size, 3, 8, 8, generator=generator)
        batches.append(Batch(tuple(pixels), index, labels))
    return batches


def trajectory(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Trains in place, under DistributedDataParallel if there is a process group.

    There is no weight decay, because weight decay changes the length of SwAV's frozen prototypes.

    Returns, in float64, "losses": (steps,), the mean loss over ranks of every step, and by name all
    parameters and floating buffers at the end.
    """
    dtype = next(model.parameters()).dtype
    trained = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(7)  # seeds the sampling of a memory bank's negatives
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        if isinstance(model, Method):
            loss = trained(*batch.views, **model.batch_inputs(batch, Captions())).loss
        else:
            views = tuple(view.to(dtype) for view in batch.views)
            loss = trained(batch._replace(views=views))
        loss.backward()
        if hasattr(model, "after_backward"):
            model.after_backward()
        optimizer.step()
        losses.append(loss.detach())
    mean = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    return {
        name: value.detach().double().clone() for name, value in {"losses": mean, **state}.items()
    }
