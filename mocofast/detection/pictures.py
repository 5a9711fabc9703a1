"""Pictures of a run: curves, and predictions beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from mocofast.detection.average_precision import Detections
from mocofast.detection.sets import IGNORED, Target
from mocofast.detection.tasks import Prediction
from mocofast.plots import new_figure, read_metrics, save_figure
from mocofast.train.metrics import RESERVED

SHOWN = 0.5  # least score of a box in a picture
_COLORS = colormaps["tab10"]


def plot_curves(metrics: Path, keys: Sequence[str], out: Path) -> None:
    """Writes panels over epochs: loss, parts of the loss, figures of `keys`, learning rate.

    metrics: a metrics.jsonl. Without a line, no file is written.
    """
    records = read_metrics(metrics)
    if not records:
        return
    parts = [name for name in records[0] if name not in RESERVED]
    figure = new_figure(10, 7)
    panels = {"loss": ["loss"], "parts of the loss": parts, "evaluation": keys, "rate": ["lr"]}
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, panels.items()):
        for number, name in enumerate(names):
            points = [(r["epoch"], r[name]) for r in records if r.get(name) is not None]
            if points:
                axes.plot(*zip(*points), color=_COLORS(number % 10), marker=".", label=name)
        axes.set(title=title, xlabel="epoch (passes over the data)")
        axes.grid(color="#e6e8eb", linewidth=0.8)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    save_figure(figure, out)


def plot_predictions(found: Sequence[Prediction], classes: Sequence[str], out: Path) -> None:
    """Writes a picture of every image: predictions above, the truth below."""
    if not found:
        return
    figure = new_figure(3.2 * len(found), 6)
    rows = figure.subplots(2, len(found), squeeze=False)
    for column, (image, truth, prediction) in enumerate(found):
        for axes, objects in zip(rows[:, column], (prediction, truth)):
            pixels = image.permute(1, 2, 0).numpy()
            axes.imshow(pixels[..., 0] if pixels.shape[2] == 1 else pixels, cmap="gray")
            axes.set_axis_off()
            if isinstance(objects, np.ndarray):
                _draw_pixels(axes, objects)
            else:
                _draw_boxes(axes, objects)
    rows[0, 0].set_title("predictions", loc="left", fontsize=10)
    rows[1, 0].set_title("truth", loc="left", fontsize=10)
    figure.legend(
        handles=[
            Rectangle((0, 0), 1, 1, color=_COLORS(i % 10), label=name)
            for i, name in enumerate(classes[:20])
        ],
        loc="outside lower center",
        ncols=min(10, len(classes)),
        frameon=False,
        fontsize=9,
    )
    save_figure(figure, out)


def _draw_boxes(axes: Axes, objects: Target | Detections) -> None:
    """Draws boxes of a Target, or of Detections with scores of at least SHOWN."""
    scores = None if isinstance(objects, Target) else objects.scores
    for i, (corners, label) in enumerate(zip(objects.boxes.tolist(), objects.labels.tolist())):
        x0, y0, x1, y1 = corners
        if scores is not None and scores[i] < SHOWN:
            continue
        color = _COLORS((label - 1) % 10)
        axes.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1.2)
        )
        if scores is not None:
            axes.text(x0, y0, f"{scores[i]:.2f}", color=color, fontsize=5, va="bottom")


def _draw_pixels(axes: Axes, numbers: np.ndarray) -> None:
    """Colours the pixels of the classes."""
    layer = np.zeros((*numbers.shape, 4))
    for label in np.unique(numbers[(numbers > 0) & (numbers != IGNORED)]):
        layer[numbers == label] = (*_COLORS((int(label) - 1) % 10)[:3], 0.55)
    axes.imshow(layer)
