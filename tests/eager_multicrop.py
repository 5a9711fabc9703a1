"""Multi-crop of every method, written the plain way: loops over crops, masks and whole matrices.

SwAV follows the loop of facebookresearch/swav, and the other methods the definitions in their
docstrings. In one process, on the whole batch. Parameters have the names of the methods.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.methods.base import Method
from mocofast.methods.byol import BYOL
from mocofast.methods.moco import MoCo
from mocofast.methods.moco_v3 import MoCoV3
from mocofast.methods.simclr import SimCLR
from mocofast.methods.swav import SwAV
from tests.eager_methods import Batch, EagerSwAV

LARGE = 2  # views that give codes, keys or targets


def features(encoder: nn.Module, images: Tensor) -> Tensor:
    """Returns the input of the last layers, `fc`."""
    head, encoder.fc = encoder.fc, nn.Identity()
    found = encoder(images)
    encoder.fc = head
    return found


def through_one_head(encoder: nn.Module, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns the outputs of every view: the backbone size by size, the head over all."""
    sides = dict.fromkeys(view.shape[-1] for view in views)
    groups = [tuple(view for view in views if view.shape[-1] == side) for side in sides]
    found = torch.cat([features(encoder, torch.cat(group)) for group in groups])
    return encoder.fc(found).chunk(len(views))


class EagerMultiSwAV(EagerSwAV):
    """The loop of facebookresearch/swav's main_swav.py, with its queue of embeddings.

    The queue begins empty with the training, and is used when it is full.
    """

    def __init__(self, model: SwAV, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        length, dim = len(model.feature_queue), self.prototypes.in_features
        self.queue = [torch.zeros(length, dim, dtype=dtype) for _ in range(LARGE)]

    def forward(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        z = [F.normalize(out, dim=1) for out in through_one_head(self.encoder_q, batch.views)]
        scores = [self.prototypes(each) for each in z]
        loss, count = torch.zeros((), dtype=z[0].dtype), len(z[0])
        for large in range(LARGE):
            rows = scores[large].detach()
            if self.queue[large][-1].any():
                rows = torch.cat([self.prototypes(self.queue[large]).detach(), rows])
            self.queue[large] = torch.cat([z[large].detach(), self.queue[large][:-count]])
            code = self.code(rows)[-count:]
            terms = [
                -(code * F.log_softmax(scores[view] / self.temperature, dim=1)).sum(1).mean()
                for view in range(len(z))
                if view != large
            ]
            loss = loss + sum(terms) / len(terms)
        return loss / LARGE


class EagerMultiSimCLR(nn.Module):
    """A matrix of all views, with a mask of images. Every ordered pair of views has a term."""

    def __init__(self, model: SimCLR, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder_q = copy.deepcopy(model.encoder_q).to(dtype)
        self.temperature = model.temperature

    def forward(self, batch: Batch) -> Tensor:
        outputs = through_one_head(self.encoder_q, batch.views)
        z = F.normalize(torch.cat(outputs), dim=1)  # (V*N, C)
        weights = (z @ z.t() / self.temperature).exp()
        images = torch.arange(len(outputs[0])).repeat(len(outputs))
        same = images[:, None] == images[None]
        negatives = weights.masked_fill(same, 0).sum(1, keepdim=True)
        losses = -(weights / (weights + negatives)).log()
        return losses[same & ~torch.eye(len(z), dtype=torch.bool)].mean()


class EagerStudent(nn.Module):
    """What the methods with a momentum encoder share: every view is a query of every other key."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder_q = copy.deepcopy(model.encoder_q)
        self.encoder_k = copy.deepcopy(model.encoder_k)
        self.predictor = copy.deepcopy(getattr(model, "predictor", nn.Identity()))
        self.to(dtype)
        self.momentum = model.momentum
        self.keyed = (0, 1)  # large views that are keys

    def forward(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            for target, online in zip(self.encoder_k.parameters(), self.encoder_q.parameters()):
                target.copy_(self.momentum * target + (1 - self.momentum) * online)
            keys = {large: self.encoder_k(batch.views[large]) for large in self.keyed}
        views = batch.views
        queries = [
            self.predictor(self.encoder_q(views[view]))
            for view in range(LARGE)
            if self.keyed != (view,)
        ]
        if self.keyed == (1,):
            queries.append(queries[0])  # no query: view 1 is a key alone
        small = torch.cat(through_one_head(self.encoder_q, views[LARGE:]))
        queries += self.predictor(small).chunk(len(views) - LARGE)
        loss = torch.zeros((), dtype=queries[0].dtype)
        for large in self.keyed:
            terms = [
                self.compare(queries[view], keys[large])
                for view in range(len(views))
                if view != large
            ]
            loss = loss + sum(terms) / len(terms)
        self.remember(keys)
        return loss

    def remember(self, keys: dict[int, Tensor]) -> None:
        """Keeps the keys of a step, {view: (N, C)}."""

    def compare(self, query: Tensor, key: Tensor) -> Tensor:
        """Returns the loss of queries and keys of the same images, (N, C) each."""
        raise NotImplementedError


class EagerMultiBYOL(EagerStudent):
    def compare(self, query: Tensor, key: Tensor) -> Tensor:
        return (F.normalize(query, dim=1) - F.normalize(key, dim=1)).square().sum(1).mean()


class EagerMultiMoCoV3(EagerStudent):
    def __init__(self, model: MoCoV3, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self.temperature = model.temperature

    def compare(self, query: Tensor, key: Tensor) -> Tensor:
        logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).t() / self.temperature
        return 2 * self.temperature * F.cross_entropy(logits, torch.arange(len(query)))


class EagerMultiMoCo(EagerStudent):
    """The queue gets new keys at its start, and loses the oldest at its end."""

    def __init__(self, model: MoCo, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self.temperature = model.temperature
        self.keyed = (0, 1) if model.symmetric else (1,)
        self.negatives = model.queue.to(dtype).flip(0)

    def compare(self, query: Tensor, key: Tensor) -> Tensor:
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.negatives.t()], dim=1)
        return F.cross_entropy(
            logits / self.temperature, torch.zeros(len(query), dtype=torch.int64)
        )

    def remember(self, keys: dict[int, Tensor]) -> None:
        new = torch.cat([F.normalize(keys[large], dim=1) for large in sorted(keys)])
        self.negatives = torch.cat([new.flip(0), self.negatives])[: len(self.negatives)]


EAGER: dict[type[Method], Any] = {
    SwAV: EagerMultiSwAV,
    SimCLR: EagerMultiSimCLR,
    MoCo: EagerMultiMoCo,
    BYOL: EagerMultiBYOL,
    MoCoV3: EagerMultiMoCoV3,
}
