"""Runs side by side: their figures, the options that differ, and their curves in one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mocofast import settings
from mocofast.config import Config, ConfigError
from mocofast.plots import new_figure, read_metrics
from mocofast.train.sweep import figures_of

# Colours that people with colour blindness tell apart (Okabe and Ito 2008), and styles of lines.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_STYLES = ("-", "--", "-.", ":")
_PANELS = {
    "loss": "loss",
    "acc1": "pretext accuracy",
    "knn_top1": "kNN accuracy on held-out images",
    "lr": "learning rate",
}


class Run(NamedTuple):
    """A run folder. name: of the run, unlike those of the others."""

    name: str
    config: Config
    records: list[dict[str, Any]]
    figures: dict[str, Any]


def read_runs(folders: list[str]) -> list[Run]:
    """Reads run folders. Raises FileNotFoundError, and ConfigError for a folder without a run."""
    runs: list[Run] = []
    names = _names(folders)
    for folder, name in zip(folders, names):
        path = Path(folder)
        if not path.is_dir():
            raise FileNotFoundError(f"there is no run folder {folder!r}")
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{folder}: expected a run folder, with a config.yaml")
        metrics = path / "metrics.jsonl"
        try:
            records = read_metrics(metrics) if metrics.exists() else []
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{metrics}: damaged ({error})") from error
        config = settings.load_recipe(str(path / "config.yaml"))
        untrained = records[-1] if records and not config.train.epochs else {}
        figures = figures_of(records, untrained) | _evaluations(path)
        runs.append(Run(name, config, records, figures))
    return runs


def _names(folders: list[str]) -> list[str]:
    """Returns the shortest ends of paths that differ."""
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ConfigError("expected different run folders, got one twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _evaluations(run: Path) -> dict[str, Any]:
    """Returns the main figures that evaluations wrote into a run folder."""
    found = {}
    for path in sorted(run.glob("*/results.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            figures = content["figures"]
            for name in ("top1", "balanced_accuracy", "map", "r2"):
                if figures.get(name) is not None:
                    found[f"{path.parent.name} {name}"] = float(figures[name])
        except (ValueError, KeyError, TypeError):  # a file of another program
            continue
    return found


def differing(configs: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
    """Returns the options whose values differ among configurations, {option: {run: value}}.

    configs: {run: configuration}. A run whose method lacks an option has no entry.
    """
    every: dict[str, dict[str, Any]] = {}
    for run, config in configs.items():
        for group, values in settings.to_dict(config).items():
            if group == "recipe":
                every.setdefault("recipe", {})[run] = values
                continue
            for name, value in values.items():
                every.setdefault(f"{group}.{name}", {})[run] = value
    return {
        name: values
        for name, values in every.items()
        if name != "train.dir" and not _same(list(values.values()), len(configs))
    }


def _same(values: list[Any], count: int) -> bool:
    return len(values) == count and all(value == values[0] for value in values)


def table(runs: list[Run]) -> str:
    """Returns a Markdown table: runs are columns, figures and differing options are rows."""
    figures = dict.fromkeys(name for run in runs for name in run.figures)
    rows = [["", *(run.name for run in runs)], ["---"] * (len(runs) + 1)]
    for name in figures:
        values = (run.figures.get(name) for run in runs)
        rows.append([name, *("" if value is None else f"{value:.4g}" for value in values)])
    for name, by_run in differing({run.name: run.config for run in runs}).items():
        cells = (settings.shown(by_run[run.name]) if run.name in by_run else "" for run in runs)
        rows.append([f"--{name}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    widths = [max(3, width) for width in widths]
    lines = []
    for row in rows:
        pad = "-" if row[0] == "---" else " "
        lines.append("| " + " | ".join(c.ljust(w, pad) for c, w in zip(row, widths)) + " |")
    return "\n".join(lines) + "\n"


def plot_runs(runs: list[Run]) -> Figure:
    """Returns the curves of runs over epochs, a panel for every quantity that a run has."""
    panels = {
        key: title
        for key, title in _PANELS.items()
        if any(record.get(key) is not None for run in runs for record in run.records)
    }
    if not panels:
        raise ConfigError("metrics.jsonl: none of the runs has a line yet")
    rows = -(-len(panels) // 2)
    figure = new_figure(11, 3.75 * rows + 0.3 * len(runs), pad=0.12)
    every = figure.subplots(rows, min(2, len(panels)), squeeze=False).flat
    handles: list[Any] = []
    for axes, (key, title) in zip(every, panels.items()):
        handles = []
        for number, run in enumerate(runs):
            points = [(r["epoch"], r[key]) for r in run.records if r.get(key) is not None]
            x, y = zip(*points) if points else ((), ())
            style = {
                "color": _COLOURS[number % len(_COLOURS)],
                "linestyle": _STYLES[number // len(_COLOURS) % len(_STYLES)],
                "marker": "o" if key == "knn_top1" or len(points) == 1 else "",
            }
            handles += axes.plot(x, y, label=run.name, markersize=4, linewidth=1.6, **style)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("epoch (passes over the data)")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if key in ("acc1", "knn_top1"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
    for axes in list(every)[len(panels) :]:
        axes.remove()
    figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=9)
    return figure


def plot_sweep(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Returns the figures of a sweep: kNN accuracy, or else the loss. None without a figure.

    rows: of `mocofast.train.sweep.run_all`. One numeric option that varies is the horizontal axis,
    with a line for every choice of the other options. Otherwise every run is a bar.
    """
    key = "knn_top1" if any("knn_top1" in row["figures"] for row in rows) else "loss"
    rows = [row for row in rows if row["status"] == "done" and key in row["figures"]]
    if not rows:
        return None
    title = "kNN accuracy at the end" if key == "knn_top1" else "loss at the end"
    names = list(dict.fromkeys(name for row in rows for name in row["options"]))
    numeric = [
        name
        for name in names
        if len(values := {row["options"].get(name) for row in rows}) > 1
        and all(_is_number(value) for value in values)
    ]
    if not numeric:
        figure = new_figure(9, 1.4 + 0.4 * len(rows))
        axes = figure.subplots()
        labels = [
            ", ".join(f"{n.split('.')[-1]} {v}" for n, v in row["options"].items()) for row in rows
        ]
        axes.barh(labels, [row["figures"][key] for row in rows], color="#9db7d6", edgecolor="black")
        axes.invert_yaxis()
        axes.set_xlabel(title)
    else:
        x_name = max(numeric, key=lambda name: len({row["options"][name] for row in rows}))
        groups: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            others = (f"{n.split('.')[-1]} {v}" for n, v in row["options"].items() if n != x_name)
            point = (float(row["options"][x_name]), row["figures"][key])
            groups.setdefault(", ".join(others), []).append(point)
        figure = new_figure(8, 5)
        axes = figure.subplots()
        for number, (label, points) in enumerate(groups.items()):
            x, y = zip(*sorted(points))
            style = _STYLES[number // len(_COLOURS) % len(_STYLES)]
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(x, y, marker="o", linestyle=style, color=colour, label=label)
        every = [x for points in groups.values() for x, _ in points]
        if min(every) > 0 and max(every) >= 8 * min(every):
            axes.set_xscale("log")
        axes.set_xlabel(x_name)
        axes.set_ylabel(title)
        if len(groups) > 1:
            axes.legend(frameon=False, fontsize=9)
        axes.grid(color="#e6e8eb", linewidth=0.8)
    formatter = axes.xaxis if not numeric else axes.yaxis
    if key == "knn_top1":
        formatter.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return True
