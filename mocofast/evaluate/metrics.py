"""Figures of a classifier on held-out images, with confidence intervals, by scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from sklearn import metrics
from torch import Tensor

from mocofast.evaluate.targets import Targets

MOST_IN_MATRIX = 1000  # classes up to which results hold the confusion matrix


def measure(
    scores: Tensor,
    labels: Tensor,
    targets: Targets,
    resamples: int,
    seed: int,
    logits: bool = False,
) -> dict[str, Any]:
    """Returns the figures of predictions, as JSON holds them.

    scores: (N, T) float32 on the CPU: a higher score is a more likely class or tag. Of numbers: the
        predicted values.
    labels: (N,) int64, see `Targets`.
    resamples: of the bootstrap. 0: no intervals.
    seed: of the bootstrap.
    logits: the scores are logits of classes or tags. AUROC compares images by the probability of a
        class, and logits of a class do not have the same order: an image adds what it likes to
        all its logits.

    class: top1, top5, balanced_accuracy (mean recall of the classes), auroc (one class against the
        rest, mean over the classes that occur), per_class (precision, recall, f1, images) and
        confusion (rows: true classes, columns: predicted classes).
    tags: map (mean average precision over the tags that occur), auroc, per_class (average
        precision, images).
    number: r2, mae, rmse.
    intervals: {figure: [low, high]}: 95 % percentile intervals over resampled images. They say
        nothing about other seeds of the training.
    Shares are from 0 to 1. A figure that is not defined is None.
    """
    scores = scores.float().cpu()
    if targets.kind == "class":
        found, statistics = _of_classes(scores, labels.cpu(), targets, logits)
    elif targets.kind == "tags":
        found, statistics = _of_tags(scores.numpy(), targets.of(labels.cpu()).numpy(), targets)
    else:
        found, statistics = _of_numbers(
            scores[:, 0].numpy(), targets.of(labels.cpu())[:, 0].numpy()
        )
    if resamples:
        found["intervals"] = {
            name: interval
            for name, statistic in statistics.items()
            if (interval := _interval(statistic, len(scores), resamples, seed))
        }
    return found


def top_accuracies(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Returns the shares of images whose class scores highest, and among the five highest.

    scores: (N, C), any float dtype. labels: (N,) int64.
    The lower class comes first where scores are equal, as the votes of kNN often are. A class
    without a score (NaN) is never right.
    """
    scores = scores.cpu().to(torch.promote_types(scores.dtype, torch.float32))  # for NumPy
    labels = labels.cpu()
    true, count = labels.numpy(), scores.shape[1]
    scored = ~scores.gather(1, labels[:, None])[:, 0].isnan().numpy()
    top1, top5 = float(metrics.accuracy_score(true, _predicted(scores))), float(scored.mean())
    if count > 5 and scored.any():
        # scikit-learn puts the higher class first where scores are equal.
        finite = scores.nan_to_num(torch.finfo(scores.dtype).min).flip(1).numpy()[scored]
        reversed_labels = count - 1 - true[scored]
        hits = metrics.top_k_accuracy_score(
            reversed_labels, finite, k=5, labels=np.arange(count), normalize=False
        )
        top5 = float(hits) / len(true)
    return top1, top5


def _predicted(scores: Tensor) -> np.ndarray:
    """Returns the classes (N,) int64 of the highest scores. -1: an image without scores."""
    found = scores.nan_to_num(-torch.inf).argmax(1)
    return found.masked_fill(scores.isnan().all(1), -1).numpy()


Statistics = dict[str, Callable[[np.ndarray], float]]  # of the images with these indices


def _of_classes(
    scores: Tensor, labels: Tensor, targets: Targets, logits: bool
) -> tuple[dict[str, Any], Statistics]:
    true, predicted = labels.numpy(), _predicted(scores)
    numbers = np.arange(len(targets.names))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        true, predicted, labels=numbers, zero_division=0
    )
    hits, occurs = predicted == true, support > 0
    top1, top5 = top_accuracies(scores, labels)
    shares = scores.double().softmax(1) if logits else scores

    def balanced(index: np.ndarray) -> float:
        """Returns metrics.balanced_accuracy_score, in a fiftieth of its time, for resamples."""
        count = np.bincount(true[index], minlength=len(numbers))
        right = np.bincount(true[index], weights=hits[index], minlength=len(numbers))
        return float((right[count > 0] / count[count > 0]).mean())

    found: dict[str, Any] = {
        "images": len(true),
        "top1": top1,
        "top5": top5,
        "balanced_accuracy": float(recall[occurs].mean()),
        "auroc": _auroc(_comparable(shares.numpy()), np.eye(len(numbers), dtype=bool)[true]),
        "per_class": [
            {"name": name, "precision": p, "recall": r if there else None, "f1": f, "images": n}
            for name, p, r, f, n, there in zip(
                targets.names,
                *(values.tolist() for values in (precision, recall, f1, support)),
                occurs,
            )
        ],
    }
    if len(numbers) <= MOST_IN_MATRIX:
        found["confusion"] = metrics.confusion_matrix(true, predicted, labels=numbers).tolist()
    share = lambda index: float(hits[index].mean())  # noqa: E731
    return found, {"top1": share, "balanced_accuracy": balanced}


def _of_tags(
    scores: np.ndarray, true: np.ndarray, targets: Targets
) -> tuple[dict[str, Any], Statistics]:
    lowest = float(np.finfo(np.float32).min)
    scores = np.nan_to_num(scores, nan=lowest, neginf=lowest)

    def precisions(index: np.ndarray) -> np.ndarray:
        there = true[index].any(0)
        values = np.full(true.shape[1], np.nan)
        if there.any():
            values[there] = metrics.average_precision_score(
                true[index][:, there], scores[index][:, there], average=None
            )
        return values

    def mean(index: np.ndarray) -> float:
        values = precisions(index)
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    every = np.arange(len(true))
    by_tag = precisions(every)
    found = {
        "images": len(true),
        "map": _or_none(mean(every)),
        "auroc": _auroc(scores, true > 0),
        "per_class": [
            {"name": name, "average_precision": _or_none(value), "images": int(count)}
            for name, value, count in zip(targets.names, by_tag.tolist(), true.sum(0))
        ],
    }
    return found, {"map": mean}


def _of_numbers(predicted: np.ndarray, true: np.ndarray) -> tuple[dict[str, Any], Statistics]:
    predicted, true = predicted.astype(np.float64), true.astype(np.float64)
    if not np.isfinite(predicted).all():
        return {"images": len(true), "r2": None, "mae": None, "rmse": None}, {}

    def r2(index: np.ndarray) -> float:
        if len(index) < 2 or np.ptp(true[index]) == 0:
            return float("nan")
        return float(metrics.r2_score(true[index], predicted[index]))

    def mae(index: np.ndarray) -> float:
        return float(metrics.mean_absolute_error(true[index], predicted[index]))

    every = np.arange(len(true))
    found = {
        "images": len(true),
        "r2": _or_none(r2(every)),
        "mae": mae(every),
        "rmse": float(metrics.root_mean_squared_error(true, predicted)),
    }
    return found, {"r2": r2, "mae": mae}


def _comparable(scores: np.ndarray) -> np.ndarray:
    """Returns scores (N, C) in which classes without a score (NaN) have the lowest."""
    finite = scores[np.isfinite(scores)]
    usable = np.isfinite(scores).any(1)
    if not len(finite) or not usable.all():
        return scores
    return np.where(np.isnan(scores), finite.min() - 1, scores)


def _auroc(scores: np.ndarray, true: np.ndarray) -> float | None:
    """Returns the mean area under the ROC curve over columns that hold both values."""
    if not np.isfinite(scores).all():
        return None
    usable = true.any(0) & ~true.all(0)
    areas = [metrics.roc_auc_score(true[:, i], scores[:, i]) for i in np.flatnonzero(usable)]
    return float(np.mean(areas)) if areas else None


def _interval(
    statistic: Callable[[np.ndarray], float], count: int, resamples: int, seed: int
) -> list[float] | None:
    """Returns the 95 % percentile interval of a statistic of `count` images, by scipy."""
    if count < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a statistic that does not vary
        result = bootstrap(
            (np.arange(count),),
            statistic,
            vectorized=False,
            n_resamples=resamples,
            batch=1,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    low, high = map(float, result.confidence_interval)
    return [low, high] if np.isfinite([low, high]).all() else None


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
