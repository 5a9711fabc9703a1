"""Times the fit of a linear probe beside scikit-learn's LogisticRegression, on equal features.

Two sets of features: Gaussian classes with independent features, and outputs of ReLU that depend
on 64 factors, as features of networks do. One fit has scikit-learn's default strength, C = 1. The
seven strengths of a probe are fitted one after the other. Times are seconds of CPU of one thread,
so other processes hardly matter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mocofast.evaluate.linear import LOOSE, STRENGTHS, TIGHT
from mocofast.evaluate.logistic import Features, fit_logistic
from mocofast_bench import timing

VAL = 10_000  # samples that measure the accuracy
Fit = Callable[[], "tuple[Tensor, Tensor]"]


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the shape of the features."""
    for name, default, text in (
        ("rows", 50_000, "training features"),
        ("dim", 512, "dimension of a feature"),
        ("classes", 10, "number of classes"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=default, help=f"{text} (default: %(default)s)"
        )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the table and returns the row."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sets = {
            name: _measure(make(arguments.rows + VAL, arguments.dim, arguments.classes), arguments)
            for name, make in (("gauss", gaussian), ("relu", relu))
        }
    finally:
        torch.set_num_threads(threads)
    print(f"{arguments.rows:,} x {arguments.dim} features, {arguments.classes} classes")
    print(f"{'':32}{'CPU s':>10}{'accuracy':>10}{'loss':>12}")
    for kind, sides in sets.items():
        for name, side in sides.items():
            shown = "".join(f"{side[key]:>{w}.4f}" for key, w in (("accuracy", 10), ("loss", 12)))
            print(f"{kind + ', ' + name:32}{side['seconds']:10.2f}{shown}")

    def ratio(kind: str, over: str, under: str) -> float:
        return round(sets[kind][over]["seconds"] / sets[kind][under]["seconds"], 3)

    return {
        "benchmark": "probe",
        **timing.environment(torch.device("cpu")),
        "threads": 1,
        "rows": arguments.rows,
        "dim": arguments.dim,
        "classes": arguments.classes,
        "repeats": arguments.repeats,
        "sets": sets,
        "speedup": {kind: ratio(kind, "scikit-learn", "mocofast") for kind in sets},
        "seven_over_one": {kind: ratio(kind, "seven strengths", "mocofast") for kind in sets},
    }


def _measure(
    data: tuple[Tensor, Tensor], arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Returns median CPU seconds, accuracy and training loss of every side, fitted in turns."""
    x, y = data
    std, mean = torch.std_mean(x[VAL:], 0, correction=0)
    x = (x - mean) / std
    train, labels, classes = x[VAL:].contiguous(), y[VAL:], arguments.classes
    strength = 1 / len(train)  # C = 1

    def ours() -> tuple[Tensor, Tensor]:
        return fit_logistic(train, labels, classes, strength, tolerance=TIGHT)

    def seven() -> tuple[Tensor, Tensor]:
        features, solution = Features.of(train), None
        for l2 in STRENGTHS:
            solution = fit_logistic(features, labels, classes, l2, solution, tolerance=LOOSE)
        assert solution is not None
        return solution

    def theirs() -> tuple[Tensor, Tensor]:
        fitted = LogisticRegression().fit(train.numpy(), labels.numpy())
        return torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()

    sides: dict[str, Fit] = {"mocofast": ours, "seven strengths": seven, "scikit-learn": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, dict[str, float]] = {}
    for _ in range(arguments.repeats):
        for name, fit in sides.items():
            start = time.process_time()
            weight, bias = fit()
            seconds[name].append(time.process_time() - start)
            accuracy = ((x[:VAL] @ weight.T + bias).argmax(1) == y[:VAL]).double().mean().item()
            loss = torch.nn.functional.cross_entropy(train @ weight.T + bias, labels).item()
            found[name] = {"accuracy": round(accuracy, 5), "loss": round(loss, 6)}
    for name, side in found.items():
        side["seconds"] = round(median(seconds[name]), 4)
        side["least"], side["most"] = round(min(seconds[name]), 4), round(max(seconds[name]), 4)
    return found


def gaussian(count: int, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    """Returns features (count, dim) float32 and labels (count,) int64 of Gaussian classes."""
    generator = torch.Generator().manual_seed(0)
    centres = 0.15 * torch.randn(classes, dim, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + torch.randn(count, dim, generator=generator), labels


def relu(count: int, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    """Returns correlated features of at least 0, and labels, shapes as `gaussian`."""
    generator = torch.Generator().manual_seed(0)
    factors = 64
    labels = torch.randint(classes, (count,), generator=generator)
    centres = 0.35 * torch.randn(classes, factors, generator=generator)
    hidden = (centres[labels] + torch.randn(count, factors, generator=generator)).tanh()
    mixed = hidden @ torch.randn(factors, dim, generator=generator) / 4
    noise = torch.randn(count, dim, generator=generator) * torch.rand(dim, generator=generator)
    return (mixed + 0.3 * noise).relu(), labels
