"""The page of one run or of several runs of `mocofast detect` and `mocofast segment`.

One HTML file that needs no network: verdict and figures, curves, predictions beside the truth,
classes, options.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mocofast import files
from mocofast.detection.options import KINDS, TaskConfig, read_yaml
from mocofast.health.folder import records_of
from mocofast.report.charts import chart
from mocofast.report.parts import (
    card,
    changed_options,
    framed,
    heading,
    last,
    lines_of,
    picture,
    read_skipped,
    share,
    skipped_files,
    table,
)
from mocofast.train.metrics import RESERVED

PICTURE = 1800  # pixels, width of the predictions
NOTHING = 0.01  # AP50 or mean IoU of objects below which a model finds nothing
# Figures of an evaluation, of all classes together.
FIGURES = {
    **{"ap": "AP", "ap50": "AP50", "ap75": "AP75"},
    **{"voc07_ap": "VOC07 AP", "voc07_ap50": "VOC07 AP50", "voc07_ap75": "VOC07 AP75"},
    **{"mask_ap": "mask AP", "mask_ap50": "mask AP50", "mask_ap75": "mask AP75"},
    **{"miou": "mean IoU", "pixel_accuracy": "pixel accuracy"},
}
# Figures of a class: the beginning of the entry's name.
OF_CLASS = {
    **{"ap50": "AP50", "ap": "AP", "mask_ap50": "mask AP50", "mask_ap": "mask AP"},
    "iou": "IoU",
}


class TaskRun(NamedTuple):
    """What the page says about a run.

    records: lines of metrics.jsonl. values: figures of the last evaluation, {name: share}.
    skipped: (file, reason) in order.
    """

    name: str
    folder: Path
    config: TaskConfig
    records: list[dict[str, Any]]
    values: dict[str, float]
    skipped: list[tuple[str, str]]


def task_of_folder(folder: Path) -> str:
    """Returns detect or segment for a run folder of the command, else ""."""
    try:
        content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        task, options = content["recipe"], content["model"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return ""
    return str(task) if task in KINDS and "init" in options else ""


def load_task_run(folder: Path) -> TaskRun:
    """Reads the run folder of a task. Raises ConfigError if it is none, or is damaged."""
    config = read_yaml(task_of_folder(folder), folder / "config.yaml")
    records = records_of(folder)
    measured = [record for record in records if not record.keys().isdisjoint(FIGURES)]
    values = {name: value for name, value in (measured or [{}])[-1].items() if name not in RESERVED}
    name = folder.resolve().name
    return TaskRun(name, folder, config, records, values, read_skipped(folder))


def write_task_page(runs: Sequence[TaskRun], path: Path) -> None:
    """Writes the page. Several runs stand side by side, in the order given."""
    sections = {
        "verdict": ("Verdict", _verdicts(runs)),
        "curves": ("Curves", _curves(runs)),
        "predictions": ("Predictions and truth", "".join(_predictions(run, runs) for run in runs)),
        "classes": ("Classes", _classes(runs)),
        "settings": ("Settings", _settings(runs)),
    }
    with files.atomic_write(path) as temporary:
        text = framed(runs, sections)
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def verdict(run: TaskRun) -> tuple[bool, str]:
    """Returns whether a run has a problem, and the verdict in words."""
    train, values = run.config.train, run.values
    steps = [record for record in run.records if "loss" in record]
    if not steps:
        return False, "too early to tell: no log line yet (--train.log_every)"
    if steps[-1]["loss"] is None:
        return True, "diverged: the loss is not finite. Take a lower --optim.lr, and more warm-up"
    epoch = f"{last(run.records, 'epoch')} of {train.epochs} epochs"
    if not values:
        return False, f"not evaluated: {epoch}. mocofast {run.config.recipe} --resume RUN continues"
    main = "ap50" if "ap50" in values else "miou"
    objects = [v for name, v in values.items() if name.startswith("iou_")][1:]  # no background
    found = values[main] if main == "ap50" else sum(objects) / max(1, len(objects))
    figures = ", ".join(f"{FIGURES[n]} {share(values[n])}" for n in FIGURES if n in values)
    loss = f"loss {last(steps[:1], 'loss')} at first, {last(steps, 'loss')} at the end"
    if found < NOTHING:
        remedy = (
            "Look whether boxes are right, take more epochs, and --model.anchor near the side of "
            "the smallest objects"
            if main == "ap50"
            else "Look whether masks are right, and take more epochs"
        )
        return True, f"finds nothing: {figures}, {loss}, {epoch}. {remedy}"
    learns = "learns" if len(steps) > 1 else "too early to tell, one log line (--train.log_every)"
    return False, f"{learns}: {figures}, {loss}, {epoch}"


def _verdicts(runs: Sequence[TaskRun]) -> str:
    cards = []
    for run in runs:
        bad, text = verdict(run)
        word, _, rest = text.partition(": ")
        head = f"Problem: {word}" if bad else word.capitalize()
        text = f'<p><b class="word">{escape(head)}</b>: {escape(rest)}.</p>'
        cards.append(card(run, runs, text, bad))
    rows = [
        ["model, encoder", *(f"{r.config.model.name}, {r.config.model.arch}" for r in runs)],
        ["start", *(r.config.model.init or "scratch" for r in runs)],
        ["seed", *(str(r.config.train.seed) for r in runs)],
        ["steps", *(last(r.records, "step") for r in runs)],
    ]
    for name, words in FIGURES.items():
        if any(name in run.values for run in runs):
            rows.append([words, *(share(run.values.get(name)) for run in runs)])
    figures = table(["", *(run.name for run in runs)], rows, "Figures")
    return f'<div class="grid2">{"".join(cards)}</div><h3>Figures</h3>{figures}'


def _curves(runs: Sequence[TaskRun]) -> str:
    lines = partial(lines_of, runs, [run.records for run in runs])
    parts = dict.fromkeys(
        name
        for run in runs
        for record in run.records
        if "loss" in record
        for name in record
        if name not in RESERVED
    )
    charts = [
        chart("Loss", lines(("loss", ""))),
        chart("AP50 (dashed: AP)", lines(("ap50", "AP50"), ("ap", "AP"), dots=True), percent=True),
        chart("Mean IoU", lines(("miou", ""), dots=True), percent=True),
        *(chart(name.replace("_", " "), lines((name, ""))) for name in parts),
        chart("Learning rate", lines(("lr", ""))),
        chart("Images a second", lines(("images_per_second", ""))),
        chart("Waiting for data, share of the time", lines(("data_wait", "")), percent=True),
    ]
    drawn = "".join(charts)
    return f'<div class="grid2">{drawn}</div>' if drawn else "<p>No log line yet.</p>"


def _predictions(run: TaskRun, runs: Sequence[TaskRun]) -> str:
    alt = f"Images of the evaluation set: predictions of {run.name} above, the truth below"
    shown = picture(run.folder / "predictions.png", PICTURE, alt)
    return heading(run, runs) + (shown or "<p>The folder has no predictions.png.</p>")


def _classes(runs: Sequence[TaskRun]) -> str:
    """Returns the figures of every class, a column for a figure of a run."""
    names = dict.fromkeys(
        figure.removeprefix(f"{start}_")
        for start in OF_CLASS
        for run in runs
        for figure in run.values
        if figure.startswith(f"{start}_")
    )
    columns = [
        (run, start, words)
        for start, words in OF_CLASS.items()
        for run in runs
        if any(f"{start}_{name}" in run.values for name in names)
    ]
    if not columns:
        return "<p>Not measured yet.</p>"
    head = [f"{words}, {run.name}" if len(runs) > 1 else words for run, _, words in columns]
    rows = [
        [name, *(share(run.values.get(f"{start}_{name}")) for run, start, _ in columns)]
        for name in names
    ]
    return table(["class", *head], rows, "Figures of every class")


def _settings(runs: Sequence[TaskRun]) -> str:
    html = []
    for run in runs:
        base = KINDS[run.config.recipe]()
        options = changed_options(run.config, base, "the default")
        html += [heading(run, runs), options, skipped_files(run)]
    return "".join(html)
