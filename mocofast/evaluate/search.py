"""kNN of a whole set: the bank is searched while its features are computed, on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import Config, ConfigError
from mocofast.data.interface import Source
from mocofast.data.sources import Datasets, Subset, labelled
from mocofast.device import knn_autocast
from mocofast.distributed import gather_objects, rank_and_world_size
from mocofast.evaluate.features import (
    check_finite,
    extract,
    extract_batches,
    extraction,
    image_batches,
    name_left_out,
)
from mocofast.evaluate.knn import nearest_labels, votes_of
from mocofast.evaluate.monitor import at_most, check_shots
from mocofast.evaluate.ranks import over_ranks
from mocofast.evaluate.targets import Targets, targets_of

_PART = 16384  # features of the bank that are searched at a time
MOST_KEPT = 100_000  # images up to which a bank is kept


class Search(NamedTuple):
    """Results of a search. M: queries, N: images of the bank.

    scores: (M, T) float32, see `mocofast.evaluate.knn.knn_votes`. labels: (M,) int64.
    queries: (M, D) float32.
    bank: features (N, D) float16, unit length, and labels (N,), or None for more than MOST_KEPT.
    """

    targets: Targets
    scores: Tensor
    labels: Tensor
    queries: Tensor
    bank: tuple[Tensor, Tensor] | None


def search(encoder: nn.Module, datasets: Datasets, config: Config, device: torch.device) -> Search:
    """Classifies the validation images by their nearest training images, see `knn_votes`.

    encoder: on `device`.
    config: `knn` and `data.target` are used, and what `image_batches` uses.
    Memory: the features of the queries, and of `_PART` images of the bank. The features of the
    whole bank are never in memory where there are more than MOST_KEPT images. Every rank searches a
    part of the bank. Call on every rank.
    Raises ConfigError without labelled images or validation images, and for `knn.shots` that the
    bank does not have.
    """
    if datasets.val is None or datasets.train.labels is None:
        raise ConfigError(
            f"data.path: kNN needs labelled images, some of them held out; got {datasets.note}"
        )
    knn, seed = config.knn, config.train.seed
    targets = targets_of(datasets.train.classes, config.data.target)
    train = at_most(knn.bank, labelled(datasets.train), np.random.default_rng(seed))
    val = at_most(knn.queries or len(datasets.val), datasets.val, np.random.default_rng([seed, 1]))
    if knn.shots:
        check_shots(knn.shots, train)
    if knn.shots and len(train) > MOST_KEPT:
        raise ConfigError(
            f"knn.shots: expected 0 with a bank of more than {MOST_KEPT:,} images, got {knn.shots}"
        )
    autocast = knn_autocast(config, encoder, device)
    how = extraction(config, device, autocast)

    def compute(part: Source) -> tuple[Tensor, ...]:
        batches = image_batches(part, config, device)
        found = extract(encoder, batches, device, knn.features, **how)
        name_left_out(part, batches.skipped)
        return found

    queries, labels = over_ranks(compute, val)
    check_finite(queries)
    kept: list[tuple[Tensor, Tensor]] = []

    def bank(source: Source) -> Iterator[tuple[Tensor, Tensor]]:
        batches = image_batches(source, config, device)
        waiting: list[tuple[Tensor, Tensor]] = []
        rows = 0
        for found, own, _ in extract_batches(encoder, batches, device, knn.features, **how):
            assert own is not None
            check_finite(found)
            if len(train) <= MOST_KEPT:
                kept.append((F.normalize(found, dim=1).half(), own))
            waiting.append((found, own))
            rows += len(own)
            if rows >= _PART:
                yield tuple(torch.cat(tensors) for tensors in zip(*waiting))  # type: ignore[misc]
                waiting, rows = [], 0
        name_left_out(source, batches.skipped)
        if waiting:
            yield tuple(torch.cat(tensors) for tensors in zip(*waiting))  # type: ignore[misc]

    rank, world_size = rank_and_world_size()
    part = Subset(train, np.arange(rank, len(train), world_size)) if world_size > 1 else train
    with torch.no_grad():
        similarity, neighbours = nearest_labels(bank(part), queries.to(device), knn.k)
    of_ranks = gather_objects((similarity.cpu(), neighbours.cpu(), kept))
    similarity, neighbours = (torch.cat([rows[i] for rows in of_ranks], 1) for i in (0, 1))
    if not similarity.shape[1]:
        raise ConfigError("data.path: none of the training images can be decoded")
    similarity, order = similarity.topk(min(knn.k, similarity.shape[1]), dim=1)
    votes = votes_of(similarity, neighbours.gather(1, order), knn.temperature, targets.table)
    parts = [pair for _, _, pairs in of_ranks for pair in pairs]
    features, bank_labels = zip(*parts) if parts else ((), ())
    whole = (torch.cat(features), torch.cat(bank_labels)) if parts else None
    return Search(targets, votes.float(), labels, queries, whole)
