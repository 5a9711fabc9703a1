"""Accuracy without training anything: weighted k nearest neighbours, and 1-NN on a few labelled examples.

Both compare by cosine similarity; neither changes its inputs. They run on the device of `train_features`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Similarities are computed in tiles of this many rows by columns: at most 64 MiB in float32, whatever the set sizes.
_ROWS, _COLUMNS = 512, 32768


class KNNResult(NamedTuple):
    """Shares of the validation samples, 0 to 1."""

    top1: float
    top5: float


class FewShotResult(NamedTuple):
    """Mean and standard deviation (n-1; 0 for a single draw) of the top-1 share over the random draws."""

    mean: float
    std: float


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int | None = None,
) -> KNNResult:
    """Weighted kNN classification (Wu et al. 2018, arXiv:1805.01978, section 3.4).

    Each of the k most similar training samples votes for its class with weight exp(cosine / temperature);
    the class with the largest sum wins, the lowest class of equal ones. A class without any vote never counts
    as predicted, so with few classes in reach top-5 does not profit from arbitrary fillers.

    train_features (N, D), val_features (M, D): any float dtype, need not be normalised.
    train_labels (N,), val_labels (M,): integers in [0, num_classes); num_classes defaults to the largest label + 1.
    k is clipped to N. Raises ValueError, naming the argument, on wrong shapes, empty sets, labels out of range,
    k < 1 or temperature <= 0.
    """
    _check(train_features, train_labels, val_features, val_labels)
    if k < 1:
        raise ValueError(f"k must be at least 1 neighbour: got {k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0: got {temperature}")
    classes = _class_count(train_labels, val_labels, num_classes)
    device = train_features.device
    train = F.normalize(train_features.float(), dim=1)
    train_labels = train_labels.to(device)
    k = min(k, len(train))
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    for rows, own in zip(val_features.split(_ROWS), val_labels.split(_ROWS)):
        similarity, neighbour = _nearest(F.normalize(rows.to(device).float(), dim=1), train, k)
        # float64, and relative to the nearest neighbour: exp(1 / 0.005) would overflow float32.
        weight = ((similarity - similarity[:, :1]).double() / temperature).exp()
        votes = torch.zeros(len(rows), classes, dtype=torch.float64, device=device)
        votes.scatter_add_(1, train_labels[neighbour], weight)
        own = own.to(device)
        voted = votes.gather(1, own[:, None])[:, 0] > 0
        rank = label_rank(votes, own)
        hits += torch.stack([(voted & (rank < top)).sum() for top in (1, 5)])
    top1, top5 = (hits.double() / len(val_features)).tolist()
    return KNNResult(top1, top5)


def few_shot_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    shots: int,
    repeats: int = 10,
    seed: int = 0,
) -> FewShotResult:
    """1-nearest-neighbour top-1 with `shots` labelled training samples per class, over `repeats` random draws.

    Shapes as in `knn_accuracy`. The classes are those present in train_labels. Raises ValueError where a class
    has fewer than `shots` samples, or shots or repeats < 1. The draws depend on the seed and the labels alone.
    """
    _check(train_features, train_labels, val_features, val_labels)
    for name, value in (("shots", shots), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1: got {value}")
    labels = train_labels.cpu()
    members = [(labels == c).nonzero()[:, 0] for c in labels.unique().tolist()]
    smallest = min(members, key=len)
    if len(smallest) < shots:
        raise ValueError(
            f"shots must be at most the number of training samples of every class: got {shots}, and class "
            f"{int(labels[smallest[0]])} has {len(smallest)}"
        )
    generator = torch.Generator().manual_seed(seed)
    device = train_features.device
    val_labels = val_labels.to(device)
    val = F.normalize(val_features.to(device).float(), dim=1)
    accuracies = []
    for _ in range(repeats):
        drawn = torch.cat([m[torch.randperm(len(m), generator=generator)[:shots]] for m in members])
        bank = F.normalize(train_features[drawn.to(device)].float(), dim=1)
        bank_labels = labels[drawn].to(device)
        nearest = torch.cat([_nearest(rows, bank, 1)[1][:, 0] for rows in val.split(_ROWS)])
        accuracies.append((bank_labels[nearest] == val_labels).double().mean())
    shares = torch.stack(accuracies)
    return FewShotResult(shares.mean().item(), shares.std().item() if repeats > 1 else 0.0)


def label_rank(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the true one, (B,) int64. scores (B, classes), labels (B,).

    Of equal scores the lower class comes first, so that a constant classifier is right about one class only;
    a row whose own score is NaN ranks behind everything.
    """
    own = scores.gather(1, labels[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & lower)).sum(1)
    return rank.masked_fill(own[:, 0].isnan(), torch.iinfo(torch.int64).max)


def _nearest(rows: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest dot products of each row with the bank, descending, and whose they are: (B, k) twice."""
    best = torch.empty(len(rows), 0, device=rows.device)
    index = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    for start in range(0, len(bank), _COLUMNS):
        tile = rows @ bank[start : start + _COLUMNS].T
        similarity, found = tile.topk(min(k, tile.shape[1]), dim=1)
        similarity, found = torch.cat([best, similarity], 1), torch.cat([index, found + start], 1)
        best, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
        index = found.gather(1, order)
    return best, index


def _check(
    train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor
) -> None:
    for name, features, labels in (
        ("train", train_features, train_labels),
        ("val", val_features, val_labels),
    ):
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(
                f"{name}_features must be (samples, dimension), not empty: got {tuple(features.shape)}"
            )
        if labels.shape != features.shape[:1]:
            raise ValueError(
                f"{name}_labels must hold one label for each of the {len(features)} rows of {name}_features: "
                f"got {tuple(labels.shape)}"
            )
        if labels.dtype != torch.int64:
            raise ValueError(f"{name}_labels must be int64: got {labels.dtype}")
        if labels.min() < 0:
            raise ValueError(f"{name}_labels must not be negative: got {int(labels.min())}")
    if train_features.shape[1] != val_features.shape[1]:
        raise ValueError(
            f"train_features and val_features must have the same dimension: got {train_features.shape[1]} and "
            f"{val_features.shape[1]}"
        )


def _class_count(train_labels: Tensor, val_labels: Tensor, num_classes: int | None) -> int:
    needed = 1 + max(int(train_labels.max()), int(val_labels.max()))
    if num_classes is not None and num_classes < needed:
        raise ValueError(
            f"num_classes must exceed every label: got {num_classes}, and the labels reach {needed - 1}"
        )
    return needed if num_classes is None else num_classes
