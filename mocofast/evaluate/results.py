"""The files of an evaluation: results.json, per_class.csv and pictures; and its lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mocofast import __version__, files
from mocofast.evaluate.pictures import plot_confusion, plot_values
from mocofast.evaluate.targets import Targets
from mocofast.plots import save_figure

# Printed without the name of the command.
_PLAIN = ("train_top1", "train_map", "train_r2", "l2", "few_shot_top1")
_LISTS = ("per_class", "confusion", "intervals")  # figures that are no single numbers


def lines(command: str, figures: Mapping[str, Any]) -> list[str]:
    """Returns a line for every figure, its name and its value, and a line of 95 % intervals."""
    found = []
    for name, value in figures.items():
        if name not in (*_LISTS, "images"):
            shown = "undefined" if value is None else f"{value:.4g}"
            found.append(f"{name if name in _PLAIN else f'{command}_{name}'} {shown}")
    intervals = figures.get("intervals", {})
    if intervals:
        shown = ", ".join(
            f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in intervals.items()
        )
        found.append(f"95 % intervals over images: {shown}")
    return found


def write_results(
    folder: Path,
    command: str,
    figures: Mapping[str, Any],
    context: Mapping[str, Any],
    targets: Targets,
    scores: Tensor,
    labels: Tensor,
) -> list[str]:
    """Writes the files of an evaluation into `folder`. Returns their names.

    figures: of `mocofast.evaluate.metrics.measure`. context: what was evaluated, and how.
    scores (N, T), labels (N,): of the figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "mocofast": __version__, **context, "figures": dict(figures)}
    with files.atomic_write(folder / "results.json") as file:
        file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    written = ["results.json"]
    title = f"{command}: {context['checkpoint']}"
    if rows := figures.get("per_class"):
        with (
            files.atomic_write(folder / "per_class.csv") as file,
            file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out,
        ):
            table = csv.DictWriter(out, rows[0])
            table.writeheader()
            table.writerows(rows)
        written.append("per_class.csv")
    if "confusion" in figures:
        accuracy = f"accuracy {figures['top1']:.1%} of {figures['images']:,} images"
        names = targets.names
        picture = plot_confusion(figures["confusion"], names, f"{title}\n{accuracy}")
        save_figure(picture, folder / "confusion.png")
        written.append("confusion.png")
    if targets.kind == "number" and figures["r2"] is not None:
        true = targets.of(labels.cpu())[:, 0].numpy()
        quality = f"R² {figures['r2']:.3f}, mean absolute error {figures['mae']:.3g}"
        picture = plot_values(scores[:, 0].cpu().numpy(), true, f"{title}\n{quality}")
        save_figure(picture, folder / "values.png")
        written.append("values.png")
    return written


def folder_of(checkpoint: str, command: str) -> Path:
    """Returns the folder for the results of a command: COMMAND in the run folder.

    checkpoint: a run folder or a checkpoint of a run. Other files, and folders of transformers:
        runs/NAME-COMMAND.
    """
    path = Path(checkpoint)
    if (path / "checkpoints").is_dir():
        return path / command
    if path.parent.name == "checkpoints":
        return path.parent.parent / command
    return Path("runs") / f"{path.stem}-{command}"
