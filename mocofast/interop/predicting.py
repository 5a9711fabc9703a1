"""Predictions for single images: by a classifier, and by the nearest images of a set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocofast.config import Config, ConfigError
from mocofast.data.folders import FolderSource
from mocofast.data.sources import Datasets, as_asked, find_images
from mocofast.device import run_autocast
from mocofast.evaluate.features import (
    check_finite,
    extract_batches,
    extraction,
    image_batches,
)
from mocofast.evaluate.knn import nearest_labels, votes_of
from mocofast.evaluate.targets import Targets, targets_of
from mocofast.interop.classifiers import Classifier
from mocofast.models.convolutions import compiled_convolutions
from mocofast.models.pixels import pixel_statistics


def predict(
    images: Sequence[str],
    encoder: nn.Module,
    config: Config,
    device: torch.device,
    classifier: Classifier | None,
    bank: Datasets | None,
    neighbours: int,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Returns a row for every image, and the images that are missing or cannot be read.

    The latter are {name: reason}. Raises FileNotFoundError if all are missing.

    images: files and folders.
    encoder: on `device`: the classifier's, if there is one.
    classifier: None predicts by the votes of neighbours, if the bank has labels.
    bank: the training images are searched for neighbours. None: no neighbours.
    neighbours: number of the nearest images.
    A row has entries image, predictions (name and score, the best first; of several tags and
    classes all) and, with a bank, neighbours (name, label, similarity; the nearest first).
    """
    found_images, missing = _source(images)
    source, _ = as_asked(found_images, config.data)
    autocast = run_autocast(config, encoder, device)
    scores: list[Tensor] = []
    features: list[Tensor] = []
    seen: list[int] = []
    batches = image_batches(source, config, device)
    statistics = pixel_statistics(config.augment)
    with compiled_convolutions(encoder):
        for pixels, _, index in batches:
            seen += index.tolist()
            if classifier is not None:
                with autocast:
                    scores.append(classifier.scores(pixels).float().cpu())
            if bank is not None:
                every = [(pixels, None, index)]
                found = extract_batches(
                    encoder, every, device, "backbone", *statistics, autocast=autocast
                )
                features += [values for values, _, _ in found]
    skipped = missing | {source.name(i): reason for i, reason in batches.skipped.items()}
    rows: list[dict[str, Any]] = [{"image": source.name(i), "predictions": []} for i in seen]
    if scores:
        assert classifier is not None
        _add_predictions(rows, torch.cat(scores), classifier.targets)
    if features and bank is not None:
        queries = torch.cat(features)
        check_finite(queries)
        _add_neighbours(rows, queries, encoder, bank, config, device, neighbours, not scores)
    return rows, skipped


def _source(images: Sequence[str]) -> tuple[FolderSource, dict[str, str]]:
    """Returns the images, and what is missing, {name: reason}.

    Raises FileNotFoundError if there is none.
    """
    names, missing = [], {}
    for name in images:
        path = Path(name)
        if path.is_dir():
            names += [str(path / found) for found in find_images(path)]
        elif path.is_file():
            names.append(name)
        else:
            missing[name] = "there is no such image"
    if not names:
        raise FileNotFoundError(f"there is no image {images[0]!r}")
    return FolderSource("", names), missing


def _add_predictions(rows: list[dict[str, Any]], scores: Tensor, targets: Targets) -> None:
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    for row, best, values in zip(rows, order.tolist(), scores.tolist()):
        row["predictions"] = [{"name": targets.names[i], "score": values[i]} for i in best]


def _add_neighbours(
    rows: list[dict[str, Any]],
    queries: Tensor,
    encoder: nn.Module,
    bank: Datasets,
    config: Config,
    device: torch.device,
    count: int,
    votes: bool,
) -> None:
    """Adds the nearest training images of `bank`, and the classes that they vote for.

    queries: (M, D). votes: whether to add predictions by the votes.
    """
    source = bank.train
    how = extraction(config, device, run_autocast(config, encoder, device))

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        batches = image_batches(source, config, device)
        for found, _, index in extract_batches(encoder, batches, device, "backbone", **how):
            yield found, index

    with torch.no_grad():
        similarity, index = nearest_labels(parts(), queries.to(device), count)
    if not index.shape[1]:
        raise ConfigError(f"data.path: none of the {len(source)} images can be decoded")
    similarity, index = similarity.cpu(), index.cpu()
    labels = None if source.labels is None else torch.from_numpy(source.labels)[index]
    for place, row in enumerate(rows):
        row["neighbours"] = [
            {
                "name": source.name(i),
                "label": "" if labels is None or label < 0 else source.classes[label],
                "similarity": cosine,
            }
            for i, cosine, label in zip(
                index[place].tolist(),
                similarity[place].tolist(),
                [-1] * count if labels is None else labels[place].tolist(),
            )
        ]
    if votes and labels is not None and bool((labels >= 0).all()):
        targets = targets_of(source.classes, config.data.target)
        found = votes_of(similarity, labels, config.knn.temperature, targets.table)
        _add_predictions(rows, found.nan_to_num(0).float(), targets)
