"""Figures: curves of a run, time of a training step by part, comparison of a benchmark's sides.

Loads matplotlib with the first figure: a run starts without it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _GRAY = "#1f6feb", "#e8710a", "#188038", "#7a7f87"


def new_figure(width: float, height: float, pad: float | None = None) -> Figure:
    """Returns an empty figure.

    width, height: inches.
    pad: inches between the axes and the edge of the figure. None: matplotlib's default.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(
        figsize=(width, height), dpi=110, layout=ConstrainedLayoutEngine(w_pad=pad, h_pad=pad)
    )
    # Without pyplot there is no global state, and no display is needed.
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, out: Path | str) -> None:
    """Writes a figure. The suffix of `out` chooses the format.

    Names of classes and runs are shown as they are: a $ starts no formula. Signs that the font
    lacks become boxes, without a warning.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if "$" in text.get_text():
            text.set_parse_math(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(out)


def plot_curves(metrics: Path | str, out: Path | str) -> bool:
    """Writes the curves of a run as an image file.

    metrics: the run's metrics.jsonl.
    out: the image file. The suffix chooses the format.
    Returns whether `metrics` has any line. Without a line, no file is written.
    """
    records = read_metrics(metrics)
    if records:
        save_figure(plot_metrics(records), out)
    return bool(records)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, sorted by step.

    Leaves out an incomplete last line, which a crash can leave.
    Raises ValueError for an earlier line which is not JSON.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not JSON: {line[:80]!r}") from None
            continue
        records.append(record)
    return sorted(records, key=lambda record: record["step"])


def plot_metrics(records: list[dict[str, Any]]) -> Figure:
    """Returns panels over epochs: loss, pretext accuracy, kNN accuracy, learning rate.

    records: dicts with "step", "epoch" (progress, float) and any of "loss", "chance_loss",
        "acc1", "acc5", "knn_top1", "few_shot_top1", "lr". Accuracies are shares, 0 to 1.
        Another entry with a number is a metric of the method and has a panel of its own.
    A panel without data says "not measured in this run".
    """
    from matplotlib.ticker import PercentFormatter

    metrics = _method_metrics(records)
    rows = 2 + -(-len(metrics) // 2)
    figure = new_figure(11, 3.75 * rows, pad=0.12)
    loss, pretext, knn, rate, *panels = figure.subplots(rows, 2, sharex=True).flat

    # Loss, and the loss of random features.
    _plot_line(loss, records, "loss", _BLUE, "loss")
    chance = [record["chance_loss"] for record in records if record.get("chance_loss") is not None]
    if chance:
        loss.axhline(
            chance[-1], color=_GRAY, linestyle="--", label=f"chance, log(K + 1) = {chance[-1]:.2f}"
        )
    contrastive = any("acc1" in record for record in records)
    if contrastive or not metrics:
        loss.set(title="InfoNCE loss (may rise at first)", ylabel="loss, in nats")
    else:
        loss.set(title="Loss", ylabel="loss")

    # Accuracy in the pretext task.
    _plot_line(pretext, records, "acc1", _BLUE, "Acc@1: ranked first")
    _plot_line(pretext, records, "acc5", _ORANGE, "Acc@5: among the first five")
    pretext.set(
        title="Pretext task: find the other view among K + 1 keys", ylabel="share of the queries"
    )
    pretext.yaxis.set_major_formatter(PercentFormatter(1.0))

    # Accuracy on labelled images.
    _plot_line(knn, records, "knn_top1", _GREEN, "kNN top-1", evaluation=True)
    _plot_line(knn, records, "few_shot_top1", _ORANGE, "1-NN, few labels", evaluation=True)
    knn.set(title="What the features know: accuracy on held-out images", ylabel="accuracy")
    knn.yaxis.set_major_formatter(PercentFormatter(1.0))

    # Learning rate.
    _plot_line(rate, records, "lr", _GRAY, "learning rate")
    rate.set(title="Learning rate", ylabel="learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))

    # Metrics that the method names.
    for axes, name in zip(panels, metrics):
        _plot_line(axes, records, name, _BLUE, name)
        axes.set(title=name, ylabel=name)
    for axes in panels[len(metrics) :]:
        axes.remove()

    # Style and limits.
    for axes in (loss, pretext, knn, rate, *panels[: len(metrics)]):
        _style_axes(axes)
    for axes in (pretext, rate):
        axes.set_ylim(bottom=0)
    end = max(record["epoch"] for record in records)
    loss.set_xlim(-0.02 * (end or 1), 1.03 * (end or 1))
    return figure


# Entries of a line of metrics.jsonl that have a panel already, or need none.
_KNOWN = {
    *("step", "epoch", "loss", "chance_loss", "acc1", "acc5", "lr"),
    *("knn_top1", "knn_top5", "few_shot_top1"),
    *("images_per_second", "data_wait", "memory_gib"),
}


def _method_metrics(records: list[dict[str, Any]]) -> list[str]:
    """Returns the names of further metrics, in the order of their first appearance."""
    names = {name: None for record in records for name in record if name not in _KNOWN}
    return [name for name in names if any(_is_number(record.get(name)) for record in records)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Bar(NamedTuple):
    """A part of a training step, plotted as a bar."""

    name: str
    milliseconds: float
    floor: float | None  # least possible time, in milliseconds (None: unknown)


def plot_step(bars: Sequence[Bar], title: str) -> Figure:
    """Returns a figure of a training step: a bar for every part, in time order, its floor dark."""
    figure = new_figure(10, 1.6 + 0.5 * len(bars))
    _plot_bars(figure.subplots(), bars, title)
    return figure


def plot_sides(
    title: str, quantities: Mapping[str, Mapping[str, float]], bars: Sequence[Bar] = ()
) -> Figure:
    """Returns a figure of the sides of a benchmark, with a panel for every quantity.

    quantities: {label with unit: {side: value}}. The first side is ours and plotted dark.
    bars: the parts of our training step, plotted below the panels.
    """
    # Sizes of the figure, in inches.
    names = list(dict.fromkeys(name for values in quantities.values() for name in values))
    columns = min(3, len(quantities))
    rows = -(-len(quantities) // columns)
    above, below = rows * (0.9 + 0.34 * len(names)) + 0.4, (1.6 + 0.4 * len(bars)) * bool(bars)
    # The texts beside the bars need the width of three panels.
    figure = new_figure(3.9 * (3 if bars else columns) + 1, above + below)
    heights = [above, below] if bars else [above]
    first, *rest = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    first.suptitle(title, fontsize=11)
    # One panel for every quantity.
    for number, (label, values) in enumerate(quantities.items()):
        axes = first.add_subplot(rows, columns, number + 1)
        widths = [values.get(name, 0.0) for name in names]
        axes.barh(
            names,
            widths,
            color=["#5b6b7f", *["#c9d3e0"] * (len(names) - 1)],
            edgecolor="black",
            linewidth=0.8,
        )
        for row, name in enumerate(names):
            axes.text(
                widths[row],
                row,
                f" {values[name]:.4g}" if name in values else " not measured",
                va="center",
            )
        axes.set_xlim(0, 1.3 * max(widths) or 1)
        axes.set_xlabel(label)
        axes.locator_params(axis="x", nbins=4)
        axes.invert_yaxis()
        axes.tick_params(labelleft=number % columns == 0)
        axes.spines[["top", "right"]].set_visible(False)
    # The parts of our step.
    if bars:
        _plot_bars(rest[0].subplots(), bars, "our step")
    return figure


def _plot_bars(axes: Axes, bars: Sequence[Bar], title: str) -> None:
    """Plots the parts of a step. A bar begins where the previous bar ends."""
    total, began = sum(bar.milliseconds for bar in bars), 0.0
    for row, (_, width, floor) in enumerate(bars):
        axes.barh(
            row, width, left=began, height=0.66, color="#c9d3e0", edgecolor="black", linewidth=0.8
        )
        text = f"{width:.3g} ms, {width / total:.1%}"
        if floor is not None:
            axes.barh(
                row,
                floor,
                left=began,
                height=0.66,
                color="#5b6b7f",
                hatch="////",
                edgecolor="black",
            )
            text += f"; floor {floor:.3g} ms ({floor / width:.0%})"
        end = began + max(width, floor or 0.0)
        right = end < 0.6 * total  # text to the right of the bar, else to the left
        place = end + 0.01 * total if right else began - 0.01 * total
        axes.text(place, row, text, va="center", ha="left" if right else "right", fontsize=9)
        began += width
    least = sum(bar.floor or 0.0 for bar in bars)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02 * total)
    axes.set_xlabel(
        f"milliseconds; the step takes {total:.4g}; "
        f"dark: floors, together {least:.4g} ({least / total:.0%})"
    )
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _plot_line(
    axes: Axes,
    records: list[dict[str, Any]],
    key: str,
    color: str,
    label: str,
    evaluation: bool = False,
) -> None:
    """Plots records[key] over epochs.

    evaluation: marks every point (evaluations are rare), and writes the first and the last value.
    """
    points = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
    if not points:
        return
    x, y = zip(*points)
    dots = "o" if evaluation or len(points) == 1 else ""  # a line of one point is invisible
    axes.plot(x, y, color=color, marker=dots, markersize=4, linewidth=1.6, label=label)
    if evaluation:
        places = [(0, "left", (6, -13)), (len(points) - 1, "right", (0, 7))]
        for end, side, offset in places if len(points) > 1 else places[1:]:
            text = f"{y[end]:.1%}"
            axes.annotate(
                text, points[end], xytext=offset, textcoords="offset points", ha=side, color=color
            )


def _style_axes(axes: Axes) -> None:
    """Sets labels, grid and legend of a panel. An empty panel gets a note."""
    axes.set_xlabel("epoch (passes over the data)")
    axes.tick_params(labelbottom=True)
    axes.title.set_fontsize(11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    if axes.lines:
        axes.margins(y=0.12)
        axes.legend(frameon=False, fontsize=9)
    else:
        axes.set_yticks([])
        axes.text(
            0.5, 0.5, "not measured in this run", transform=axes.transAxes, ha="center", color=_GRAY
        )
