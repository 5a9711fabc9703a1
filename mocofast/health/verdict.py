"""The verdict on a run in words: whether it learns, why, and what to do.

Rules look at the signals of the log lines (mocofast.health.signals), at the options and at facts
about the images. They stand in the order from causes to effects, and the first finding is the
verdict. docs/doctor.md has the measured rates of right names and of false alarms.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mocofast.config import Config

FEWEST_LINES = 3  # log lines before the first verdict
# Methods of the rule on a low rate. BYOL and the memory bank learn with small changes of weights.
CONTRASTIVE = ("moco", "moco_v3", "simclr")


class Finding(NamedTuple):
    """What is wrong with a run.

    name: a short fixed name. title, reason, remedy: in words.
    """

    name: str
    title: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.title}: {self.reason}. {self.remedy}"


class Evidence(NamedTuple):
    """What a verdict is made of.

    facts: numbers about images and queue, see `mocofast.health.facts`. lines: a dict per log line,
    with "step", "loss" (None: not finite), "chance_loss", "acc1" and signals, where known.
    before, after: figures of the kNN monitor, or empty.
    """

    config: Config
    facts: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    before: Mapping[str, float]
    after: Mapping[str, float]

    def recent(self, name: str) -> float | None:
        """Returns the median of a signal over the later half of the lines. None: not known."""
        return _median(self.lines[len(self.lines) // 2 :], name)

    def overall(self, name: str) -> float | None:
        """Returns the median of a signal over all lines. None: not known."""
        return _median(self.lines, name)


def _median(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return statistics.median(values) if values else None


def diagnose(evidence: Evidence) -> list[Finding]:
    """Returns what is wrong, causes first. Empty: nothing was noticed."""
    if any(line.get("loss", 0.0) is None for line in evidence.lines):
        return [_diverged(evidence)]
    if len(evidence.lines) < FEWEST_LINES:
        return []
    return [finding for rule in RULES if (finding := rule(evidence)) is not None]


def verdict(evidence: Evidence) -> str:
    """Returns the verdict in one or two sentences, for a run without findings too."""
    if findings := diagnose(evidence):
        return str(findings[0])
    if len(evidence.lines) < FEWEST_LINES:
        return f"too early to tell: fewer than {FEWEST_LINES} log lines (train.log_every)"
    parts, word = [], "healthy: nothing wrong was noticed"
    if (top1 := evidence.after.get("knn_top1")) is not None:
        start = evidence.before.get("knn_top1")
        first = "weights before" if evidence.facts.get("pretrained") else "random weights"
        rise = "" if start is None else f" ({first}: {start:.1%})"
        parts.append(f"kNN accuracy {top1:.1%}{rise}")
        if start is not None and top1 <= start:
            word = "no gain yet: nothing wrong was noticed, train longer (--train.epochs)"
    if (rank := evidence.recent("effective_rank")) is not None:
        parts.append(f"embeddings fill {rank:.0f} of {evidence.config.model.dim} dimensions")
    loss, chance = evidence.recent("loss"), evidence.recent("chance_loss")
    if loss is not None:
        parts.append(f"loss {loss:.3g}" + (f" (chance {chance:.3g})" if chance else ""))
    return f"{word}. {', '.join(parts)}".rstrip(" .")


# ---- rules, causes before effects ----


def _diverged(e: Evidence) -> Finding:
    last = next(line["step"] for line in e.lines if line.get("loss", 0.0) is None)
    norms = [n for line in e.lines if (n := line.get("gradient_norm")) is not None]
    grew = f"; the gradient norm was {norms[-1]:.3g} at the last line" if norms else ""
    return Finding(
        "diverged",
        "the run diverged",
        f"the loss is not finite in the line of step {last}{grew}",
        "Lower --optim.lr, add --optim.warmup_epochs, or limit gradients with --optim.clip_norm 1; "
        "NaN at the very first steps points at the images or --augment.std",
    )


def _normalisation(e: Evidence) -> Finding | None:
    mean, std = e.overall("pixel_mean"), e.overall("pixel_std")
    if mean is None or std is None or (abs(mean) <= 4 and 0.1 <= std <= 6):
        return None
    if (e.overall("flat_views") or 0.0) > 0.5:
        return None  # images of one colour have no deviation
    return Finding(
        "normalisation",
        "the pixels are normalised wrongly",
        f"after normalisation their mean is {mean:.3g} and their deviation {std:.3g}, where 0 and "
        "1 are meant",
        "Set --augment.mean and --augment.std to what `mocofast stats PATH` prints (shares of the "
        "range, from 0 to 1)",
    )


def _constant(e: Evidence) -> Finding | None:
    flat = e.overall("flat_views")
    if flat is None or flat <= 0.4:
        return None
    return Finding(
        "constant images",
        "most views show one colour",
        f"{flat:.0%} of the views looked at have no contrast",
        "Look at views.png; leave blank files out (--data.exclude), scale files of more than 8 "
        "bits (--data.range), or take larger crops (--augment.crop_scale)",
    )


def _duplicates(e: Evidence) -> Finding | None:
    copies, looked = e.facts.get("copies", 0), e.facts.get("looked_at", 0)
    if looked < 20 or copies < 0.3 * looked:
        return None
    return Finding(
        "duplicate images",
        "many images are exact copies",
        f"{copies} of {looked} images looked at are copies of another image, so queries meet their "
        "own image among the negatives",
        "Remove the copies (fdupes or rdfind list them), or leave them out with --data.exclude",
    )


def _augmentation_off(e: Evidence) -> Finding | None:
    same, easy = e.overall("same_views"), e.overall("easy_views")
    if same is None or easy is None or (same <= 0.5 and easy < 0.97):
        return None
    if same <= 0.5 and e.config.data.batch_size < 16:
        return None  # a view is found among few by chance
    return Finding(
        "augmentation off",
        "the two views of an image are too alike",
        f"{same:.0%} of the pairs are equal, and {easy:.0%} are found by comparing plain pixels",
        "Look at views.png; lower the first number of --augment.crop_scale, and turn on "
        "--augment.jitter and --augment.blur",
    )


def _queue_too_large(e: Evidence) -> Finding | None:
    keys, images = e.facts.get("queue", 0), e.facts.get("images", 0)
    if not images or keys <= images:
        return None
    return Finding(
        "queue beyond the set",
        "the queue is larger than the set",
        f"{keys} keys of {images} images: every image meets its own old keys as negatives, of "
        f"{keys / images:.3g} epochs",
        f"Set --model.queue_size to {2 ** int(math.log2(max(2, images // 2)))} or less",
    )


def _frozen_keys(e: Evidence) -> Finding | None:
    keys, weights = e.overall("key_change"), e.overall("weight_change")
    if keys is None or not weights or keys > 1e-5 * weights:
        return None
    return Finding(
        "frozen key encoder",
        "the momentum encoder does not move",
        f"its weights change by {keys:.1g} of their norm a step, those of the encoder by "
        f"{weights:.1g}",
        "Set --model.momentum below 1: 0.99 for short runs, 0.999 for ImageNet",
    )


def _stale_queue(e: Evidence) -> Finding | None:
    """Queries that know the age of keys, or an encoder that follows within a part of a key's life.

    The age of a key is what its encoder has moved since. Where age tells the positive from the
    negatives, nothing else needs to be learned.
    """
    told = e.overall("queue_drift") or 0.0
    if told >= TOLD_BY_AGE:
        return Finding(
            "stale queue",
            "the age of the keys tells the positive",
            f"queries were {told:.2g} deviations nearer to the newest keys than to the oldest "
            "(median of the log lines), so the encoder tells when a key was made instead of what "
            "it shows",
            "Lower --model.queue_size to 4 batches, or raise --model.momentum",
        )
    lags = [
        line["key_distance"] / line["weight_change"]
        for line in e.lines
        if line.get("weight_change") and line.get("key_distance") is not None
    ]
    life = e.facts.get("queue", 0) / e.config.data.batch_size
    if not lags or life < 2 or (lag := statistics.median(lags)) >= LAG * life:
        return None
    # Steps of a random walk measure a shorter lag than the average has.
    momentum = e.config.model.momentum
    if momentum >= 1 or momentum / (1 - momentum) >= LAG * life:
        return None
    return Finding(
        "stale queue",
        "the keys of the queue are of different encoders",
        f"the momentum encoder follows within {lag:.2g} steps, and a key stays in the queue for "
        f"{life:.3g} steps",
        "Raise --model.momentum towards 0.99 or 0.999, or lower --model.queue_size",
    )


def _leak(e: Evidence) -> Finding | None:
    tests = [line for line in e.lines[len(e.lines) // 3 :] if "acc1_shuffled" in line]
    if not tests:
        return None
    plain, shuffled = (
        statistics.fmean(line[name] or 0.0 for line in tests)
        for name in ("acc1_as_trained", "acc1_shuffled")
    )
    # Three deviations of a difference of shares of this many images.
    noise = 3 * math.sqrt((plain + shuffled) / (len(tests) * e.config.data.batch_size))
    if plain - shuffled <= max(noise, 0.02) or plain < 2 * shuffled:
        return None
    return Finding(
        "BatchNorm leak",
        "BatchNorm betrays the positive",
        f"the encoder finds {plain:.1%} of the positives, and {shuffled:.1%} when the keys' images "
        "are shuffled over the splits of BatchNorm",
        "Set --model.shuffle_bn true (in MoCo v3 and SimCLR: --model.sync_bn true)",
    )


def _collapse(e: Evidence) -> Finding | None:
    std, rank = e.recent("embedding_std"), e.recent("effective_rank")
    if std is None or rank is None or e.lines[-1]["step"] < FEWEST_STEPS / 2:
        return None
    if std >= 0.2 and rank >= min(2.5, e.config.model.dim / 8):
        return None
    return Finding(
        "collapse",
        "the embeddings have collapsed",
        f"all images get nearly the same embedding: deviation {std:.2g} (1 is spread, 0 is one "
        f"point), effective rank {rank:.1f} of {e.config.model.dim}",
        "Check that no gradient reaches the targets and that a predictor or negatives exist; raise "
        "--model.momentum, lower --optim.lr, add --optim.warmup_epochs, or take --optim.name adamw "
        "--optim.lr 0.001 for a run of few steps",
    )


def _rate_too_high(e: Evidence) -> Finding | None:
    """Weights that leave their start at once, and features that are lost by it."""
    change = next((c for line in e.lines[:1] if (c := line.get("weight_change"))), 0.0)
    if change < FIRST_CHANGE:
        return None
    figures = [values.get("knn_top1") for values in (e.before, e.after)]
    forgot = None not in figures and figures[1] < figures[0] - 0.03  # type: ignore[operator]
    lines = [line for line in e.lines if line.get("loss") and line.get("chance_loss")]
    lost = sum(line["loss"] > 0.985 * line["chance_loss"] for line in lines)
    flat = sum((line.get("effective_rank") or 9.0) < 2 for line in e.lines)
    if not forgot and max(lost, flat) < len(e.lines) / 4:
        return None
    parts = [f"the first steps changed the weights by {change:.1%} of their norm each"]
    parts += [f"the loss stood at chance in {lost} of {len(lines)} log lines"] * bool(lost)
    parts += [f"embeddings had one direction in {flat} of {len(e.lines)} log lines"] * bool(flat)
    if forgot:
        parts.append(f"kNN accuracy fell from {figures[0]:.1%} to {figures[1]:.1%}")
    return Finding(
        "rate too high",
        "the learning rate is too high",
        ", ".join(parts),
        f"Lower --optim.lr (now {e.config.optim.lr:g}) to a tenth, or warm up "
        "(--optim.warmup_epochs)",
    )


def _rate_too_low(e: Evidence) -> Finding | None:
    """Weights from scratch that hardly leave their start."""
    if e.facts.get("pretrained") or e.lines[-1]["step"] < FEWEST_STEPS:
        return None
    if e.config.model.method not in CONTRASTIVE:
        return None
    if e.lines[-1].get("epoch", 0.0) < 0.8 * e.config.train.epochs:
        return None
    path, before = 0.0, 0
    for line in e.lines:
        path += (line.get("weight_change") or 0.0) * (line["step"] - before)
        before = line["step"]
    if path >= SHORTEST_PATH:
        return None
    return Finding(
        "rate too low",
        "the weights hardly moved",
        f"all steps together moved them by {path:.2g} of their norm, where runs that learn from "
        f"random weights move by more than {SHORTEST_PATH}",
        f"Raise --optim.lr (now {e.config.optim.lr:g}; the linear rule is 0.03 for 256 images with "
        "sgd), or train longer",
    )


def _labels(e: Evidence) -> Finding | None:
    """Features that solve the pretext task, and labels that no neighbour can tell."""
    chance, held = e.facts.get("chance_knn"), e.facts.get("held_out", 0)
    figures = [values.get("knn_top1") for values in (e.before, e.after)]
    if chance is None or not held or None in figures:
        return None
    # Neighbours vote, so the share of the largest class is chance.
    deviation = math.sqrt(chance * (1 - chance) / held)
    if 4 * deviation > max(0.05, min(chance, 1 - chance)):
        return None  # so few images cannot tell guesses from features of twice the chance
    limit = chance + max(min(0.05, chance), 2 * deviation)
    if max(figure for figure in figures if figure is not None) > limit:
        return None
    return Finding(
        "labels",
        "the labels do not go with the images",
        f"kNN accuracy is {figures[0]:.1%} with random weights and {figures[1]:.1%} after "
        f"training, about the {chance:.1%} of guessing, while the encoder does its task",
        "Check the labels: folder names, the rows of the list, a shuffled column. Features are "
        "learned without labels and may be good",
    )


LAG = 0.1  # of a key's life in the queue
# Deviations, median of the log lines. Sound runs have 0.4 or less, and up to 0.9 in their first
# lines, when the encoder moves fast. A stale run has 1.3.
TOLD_BY_AGE = 0.9
FIRST_CHANGE = 0.03  # of the norm of the weights, in a step
SHORTEST_PATH = 0.4  # of the norm of the weights
FEWEST_STEPS = 300  # before weights must have moved: a sound run of 285 steps moved them by 0.33

RULES: tuple[Callable[[Evidence], Finding | None], ...] = (
    *(_normalisation, _constant, _duplicates, _augmentation_off, _queue_too_large),
    *(_frozen_keys, _rate_too_high, _stale_queue, _leak, _collapse, _rate_too_low, _labels),
)
