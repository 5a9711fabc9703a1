"""Accuracy without training: weighted k nearest neighbours, and 1-NN with few labelled samples.

Neighbours are compared by cosine similarity. Functions run on the device of `train_features` and
do not change their inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mocofast_kernels import cpu_threads
from torch import Tensor

from mocofast.config import KNNConfig
from mocofast.device import wide

# Similarities are computed in tiles of rows x columns. A tile has at most _TILE elements (64 MiB in
# float32), for any number of images, and overwrites the tile before: pages of fresh memory took
# 40 % of a product's time. Every thread of a CPU has a tile of its own, of half of the rows for two
# threads, and a quarter for more.
_ROWS, _COLUMNS, _TILE = 512, 2**16, 2**24
# Fewer similarities: PyTorch's threads divide every operation. After an operation they spin for
# milliseconds, beside threads of our own.
_FEW = 2**22
_LEAST_PER_GROUP = 4  # columns, see `_largest`: smaller groups are no faster than one sort


class KNNResult(NamedTuple):
    """Shares of the validation samples, 0 to 1."""

    top1: float
    top5: float


class FewShotResult(NamedTuple):
    """Mean and standard deviation (n-1, 0 for a single choice) of the top-1 share.

    Taken over the random choices of labelled samples.
    """

    mean: float
    std: float


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    k: int = KNNConfig.k,
    temperature: float = KNNConfig.temperature,
    num_classes: int | None = None,
) -> KNNResult:
    """Weighted kNN classification (Wu et al. 2018, arXiv:1805.01978, section 3.4).

    The k most similar training samples vote for their classes with weight
    exp(cosine / temperature). The class with the largest sum wins, and the lowest class wins a tie.
    A class without a vote never counts as predicted, so top-5 does not profit from arbitrary
    classes if fewer than five classes have votes.

    train_features: (N, D), any float dtype, normalised here.
    train_labels: (N,) int64, in [0, num_classes).
    val_features: (M, D), any float dtype, normalised here.
    val_labels: (M,) int64, in [0, num_classes).
    k: number of neighbours, at most N are used.
    num_classes: default: the largest label + 1.
    Raises ValueError naming the argument for wrong shapes, empty sets, labels out of range,
    k < 1 or temperature <= 0.
    """
    _check(train_features, train_labels, val_features, val_labels)
    if k < 1:
        raise ValueError(f"k must be at least 1 neighbour: got {k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0: got {temperature}")
    classes = _class_count(train_labels, val_labels, num_classes)
    hits = _hits(train_features, train_labels, val_features, val_labels, k, temperature, classes)
    top1, top5 = (wide(hits) / len(val_features)).tolist()
    return KNNResult(top1, top5)


@torch.no_grad()  # for features that require grad, as threads of `one_fork` compute
@cpu_threads.one_fork(
    unless=lambda train, labels, val, *_: len(train) * len(val) <= _FEW,
    products=lambda train, labels, val, *_: len(val) * train.numel(),
)
def _hits(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    k: int,
    temperature: float,
    classes: int,
) -> Tensor:
    """Returns how many samples have their label among the top 1 and the top 5, (2,) int64.

    Arguments: as for `knn_accuracy`.
    """
    device = train_features.device
    train_labels = train_labels.to(device)
    bank = _Bank(train_features, min(k, len(train_features)))
    hits = torch.zeros(2, dtype=torch.int64, device=device)

    def of(part: tuple[Tensor, Tensor]) -> Tensor:
        rows, own = part
        similarity, neighbour = bank.nearest(F.normalize(rows.to(device).float(), dim=1))
        # float64, and relative to the nearest neighbour: exp(1 / 0.005) would overflow float32.
        weight = (wide(similarity - similarity.amax(1, keepdim=True)) / temperature).exp()
        where = weight.device
        votes = torch.zeros(len(rows), classes, dtype=torch.float64, device=where)
        votes.scatter_add_(1, train_labels[neighbour].to(where), weight)
        own = own.to(where)
        voted = votes.gather(1, own[:, None])[:, 0] > 0
        position = label_position(votes, own)
        return torch.stack([(voted & (position < top)).sum() for top in (1, 5)]).to(device)

    def add(part: tuple[Tensor, Tensor], found: Tensor) -> None:
        hits.add_(found)

    parts = [*zip(val_features.split(bank.rows), val_labels.split(bank.rows))]
    cpu_threads.in_order(of, parts, add)
    return hits


def knn_votes(
    bank: Iterable[tuple[Tensor, Tensor]],
    queries: Tensor,
    k: int,
    temperature: float,
    table: Tensor,
) -> Tensor:
    """Returns the weighted mean of the targets of the k nearest neighbours, (M, T) float64.

    Of classes these are the shares of the votes of `knn_accuracy`, and NaN for a class without a
    vote. The search is exact, and reads the bank once: its memory does not grow with the bank.

    bank: parts of the bank: features (n, D), any float dtype, normalised here, and labels (n,)
        int64. Any of them may be empty, but not all.
    queries: (M, D), any float dtype, normalised here, on the device of the parts.
    table: (L, T): the targets of every label, see `mocofast.evaluate.targets`.
    """
    similarity, labels = nearest_labels(bank, queries, k)
    return votes_of(similarity, labels, temperature, table)


def nearest_labels(
    bank: Iterable[tuple[Tensor, Tensor]], queries: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Returns similarities, descending, and labels of the k nearest neighbours: (M, k), (M, k).

    bank, queries: as for `knn_votes`.
    """
    device = queries.device
    queries = F.normalize(queries.float(), dim=1)
    best = torch.empty(len(queries), 0, dtype=torch.float32, device=device)
    best_labels = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    for part, labels in bank:
        if not len(part):
            continue
        labels = labels.to(device)
        values, index = _search(queries, part.to(device), min(k, len(part)))
        similarity = torch.cat([best, values], dim=1)
        merged = torch.cat([best_labels, labels[index]], dim=1)
        best, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
        best_labels = merged.gather(1, order)
    return best, best_labels


def votes_of(similarity: Tensor, labels: Tensor, temperature: float, table: Tensor) -> Tensor:
    """Returns (M, T) float64, see `knn_votes`, of neighbours as `nearest_labels` returns them."""
    weight = (wide(similarity - similarity[:, :1]) / temperature).exp()  # (M, k)
    labels = labels.to(weight.device)
    table = table.to(weight)
    outputs = table.shape[1]
    if len(table) == outputs and torch.equal(table, torch.eye(outputs).to(table)):
        votes = torch.zeros(len(labels), outputs, dtype=torch.float64, device=labels.device)
        votes.scatter_add_(1, labels, weight)
        return (votes / votes.sum(1, keepdim=True)).masked_fill(votes == 0, torch.nan)
    weight /= weight.sum(1, keepdim=True)
    parts = zip(weight.split(_ROWS), labels.split(_ROWS))
    return torch.cat([torch.einsum("bk,bkt->bt", w, table[own]) for w, own in parts])


def few_shot_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    shots: int,
    repeats: int = 10,
    seed: int = 0,
) -> FewShotResult:
    """Top-1 of the nearest neighbour among `shots` labelled training samples per class.

    Features and labels: as in `knn_accuracy`.
    shots: labelled samples of every class in train_labels, chosen at random.
    repeats: number of random choices, which depend only on the seed and the labels.
    Raises ValueError if a class has fewer than `shots` samples, or for shots or repeats < 1.
    """
    _check(train_features, train_labels, val_features, val_labels)
    for name, value in (("shots", shots), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1: got {value}")
    labels = train_labels.cpu()
    # The samples of a class are consecutive in `order`, and ascending.
    ordered, order = labels.sort(stable=True)
    members = order.split(ordered.unique_consecutive(return_counts=True)[1].tolist())
    smallest = min(members, key=len)
    if len(smallest) < shots:
        raise ValueError(
            "shots must be at most the number of training samples of every class: "
            f"got {shots}, and class {int(labels[smallest[0]])} has {len(smallest)}"
        )
    generator = torch.Generator().manual_seed(seed)
    device = train_features.device
    val_labels = val_labels.to(device)
    val = F.normalize(val_features.to(device).float(), dim=1)
    accuracies = []
    for _ in range(repeats):
        chosen = torch.cat(
            [m[torch.randperm(len(m), generator=generator, device="cpu")[:shots]] for m in members]
        )
        bank_labels = labels[chosen].to(device)
        nearest = _search(val, train_features[chosen.to(device)], 1)[1][:, 0]
        accuracies.append(wide(bank_labels[nearest] == val_labels).mean())
    shares = torch.stack(accuracies)
    return FewShotResult(shares.mean().item(), shares.std().item() if repeats > 1 else 0.0)


def label_position(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns how many classes score above the label: (B,) int64, 0 if the label scores highest.

    scores: (B, classes). labels: (B,).
    If scores are equal, the lower class comes first. A constant classifier is then right for one
    class only. If the score of the label is NaN, the position is the largest int64.
    """
    own = scores.gather(1, labels[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    position = ((scores > own) | ((scores == own) & lower)).sum(1)
    return position.masked_fill(own[:, 0].isnan(), torch.iinfo(torch.int64).max)


@torch.no_grad()
@cpu_threads.one_fork(
    unless=lambda queries, bank, k: len(queries) * len(bank) <= _FEW,
    products=lambda queries, bank, k: len(queries) * bank.numel(),
)
def _search(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest cosines of queries and bank, in any order, and the bank indices.

    queries: (M, D) float32, normalised. bank: (N, D), any float dtype, normalised here.
    Results: (M, k) and (M, k) int64.
    """
    tiles = _Bank(bank, k)
    found: list[tuple[Tensor, Tensor]] = []
    cpu_threads.in_order(
        tiles.nearest, queries.split(tiles.rows), lambda rows, part: found.append(part)
    )
    values, index = zip(*found)
    return torch.cat(values), torch.cat(index)


class _Bank:
    """A bank of features that threads search, every thread with memory of its own."""

    def __init__(self, features: Tensor, k: int) -> None:
        """Call it inside `one_fork`: beside the threads of the search no thread of PyTorch shall
        wait, which spins after an operation.

        features: (N, D), any float dtype, normalised here. k: neighbours, at most N.
        """
        self.features, self.k = F.normalize(features.float(), dim=1), k
        self.columns = min(len(features), _COLUMNS)
        # Rows that `nearest` takes at a time.
        self.rows = max(1, min(_ROWS, _TILE // self.columns) // min(cpu_threads.count(), 4))
        self._own = threading.local()

    def nearest(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the k largest cosines of rows and bank, in any order, and the bank indices.

        rows: (B, D) float32, normalised, B at most `self.rows`.
        Results: (B, k) and (B, k) int64.
        """
        bank, device = self.features, rows.device
        if not hasattr(self._own, "tile"):
            self._own.tile = bank.new_empty(self.rows * self.columns)
        best = bank.new_empty(len(rows), 0)
        index = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
        for start in range(0, len(bank), _COLUMNS):
            part = bank[start : start + _COLUMNS]
            tile = self._own.tile[: len(rows) * len(part)].view(len(rows), len(part))
            torch.mm(rows, part.T, out=tile)
            similarity, found = _largest(tile, min(self.k, len(part)))
            if not start:
                best, index = similarity, found
                continue
            similarity = torch.cat([best, similarity], 1)
            found = torch.cat([index, found + start], 1)
            best, order = similarity.topk(min(self.k, similarity.shape[1]), dim=1, sorted=False)
            index = found.gather(1, order)
        return best, index


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest values of every row, in any order, and their columns.

    values: (B, C). Results: (B, k) and (B, k) int64.

    Rows much longer than k are divided into groups of columns. The k groups with the largest
    maxima hold the k largest values, so a sort of maxima and a sort of these groups replace the
    sort of a row.
    """
    columns = values.shape[1]
    per_group = int((columns / k) ** 0.5)  # makes both sorts equally long
    if per_group < _LEAST_PER_GROUP:
        return values.topk(k, dim=1, sorted=False)
    groups = columns // per_group
    # Group j: columns j, j + groups, j + 2 groups, ... The last columns % groups are in no group.
    grouped = values[:, : groups * per_group].unflatten(1, (per_group, groups))
    chosen = grouped.amax(1).topk(k, dim=1, sorted=False).indices[:, None]  # (B, 1, k)
    steps = torch.arange(0, groups * per_group, groups, device=values.device)
    rest = torch.arange(groups * per_group, columns, device=values.device)
    candidates = torch.cat(
        [(chosen + steps[:, None]).flatten(1), rest.expand(len(values), -1)], dim=1
    )
    largest, place = values.gather(1, candidates).topk(k, dim=1, sorted=False)
    return largest, candidates.gather(1, place)


def _check(
    train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor
) -> None:
    for name, features, labels in (
        ("train", train_features, train_labels),
        ("val", val_features, val_labels),
    ):
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(
                f"{name}_features must be (samples, dimension), not empty: "
                f"got {tuple(features.shape)}"
            )
        if labels.shape != features.shape[:1]:
            raise ValueError(
                f"{name}_labels must hold one label for each of the {len(features)} rows "
                f"of {name}_features: got {tuple(labels.shape)}"
            )
        if labels.dtype != torch.int64:
            raise ValueError(f"{name}_labels must be int64: got {labels.dtype}")
        if labels.min() < 0:
            raise ValueError(f"{name}_labels must not be negative: got {int(labels.min())}")
    if train_features.shape[1] != val_features.shape[1]:
        raise ValueError(
            "train_features and val_features must have the same dimension: "
            f"got {train_features.shape[1]} and {val_features.shape[1]}"
        )


def _class_count(train_labels: Tensor, val_labels: Tensor, num_classes: int | None) -> int:
    largest = max(int(train_labels.max()), int(val_labels.max()))
    if num_classes is not None and num_classes <= largest:
        raise ValueError(
            f"num_classes must exceed every label: got {num_classes}, "
            f"and the labels reach {largest}"
        )
    return largest + 1 if num_classes is None else num_classes
