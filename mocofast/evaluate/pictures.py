"""Pictures of an evaluation: the confusion matrix, and predicted values against true values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from mocofast.plots import new_figure

MOST_CLASSES = 60  # classes with a row of their own
_WRITTEN = 20  # classes up to which every cell shows its number


def plot_confusion(confusion: Sequence[Sequence[int]], names: Sequence[str], title: str) -> Figure:
    """Returns a picture of a confusion matrix. Colours are shares of a row.

    confusion: (C, C) numbers of images: rows are true classes, columns predicted classes.
    names: of the C classes. Of more than MOST_CLASSES classes, those with most mistakes are shown.
    """
    counts = np.asarray(confusion)
    mistakes = counts.sum(1) + counts.sum(0) - 2 * counts.diagonal()
    shown = np.sort(np.argsort(-mistakes, kind="stable")[:MOST_CLASSES])
    if len(shown) < len(names):
        title += f"\nthe {len(shown)} of {len(names)} classes with most mistakes"
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    counts, shares = counts[np.ix_(shown, shown)], shares[np.ix_(shown, shown)]
    side = 2.6 + max(2.5, (0.52 if len(shown) <= _WRITTEN else 0.2) * len(shown))
    figure = new_figure(side + 0.6, side)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [_short(names[i]) for i in shown]
    size = 9 if len(shown) <= _WRITTEN else 6
    axes.set_xticks(range(len(shown)), labels, rotation=45, ha="right", fontsize=size)
    axes.set_yticks(range(len(shown)), labels, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=11)
    if len(shown) <= _WRITTEN:
        for row, column in np.argwhere(counts > 0):
            dark = shares[row, column] > 0.5
            axes.text(
                column,
                row,
                f"{counts[row, column]}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the true class")
    return figure


def plot_values(predicted: np.ndarray, true: np.ndarray, title: str) -> Figure:
    """Returns a picture of predicted values against true values. predicted, true: (N,)."""
    figure = new_figure(5.4, 5)
    axes = figure.subplots()
    axes.scatter(true, predicted, s=10, alpha=0.5, color="#1f6feb", edgecolors="none")
    ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
    axes.plot(ends, ends, color="#7a7f87", linewidth=1, label="exact")
    axes.set_xlabel("true value")
    axes.set_ylabel("predicted value")
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"
