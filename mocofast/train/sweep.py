"""Sweeps: a run for every combination of options, resumable, with a table and a plot."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mocofast import files, settings
from mocofast.config import ConfigError
from mocofast.errors import DivergedError
from mocofast.health.folder import records_of

RESULTS, TABLE, PLOT = "sweep.json", "table.md", "sweep.png"
Trial = dict[str, str]  # {"group.option": text} of a run


def grid(axes: Mapping[str, Sequence[str]]) -> list[Trial]:
    """Returns every combination of values, {"group.option": values}. The last option varies first.

    Raises ConfigError for an option without values, or with equal values.
    """
    for name, values in axes.items():
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"--grid {name}: expected different values, got {' '.join(values)}")
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def read_list(path: str) -> list[Trial]:
    """Returns the runs of a YAML file: a list of {"group.option": value}. Raises ConfigError."""
    import yaml

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--list: there is no file {path!r}")
    try:
        rows = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--list {path}: not a YAML file: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"--list {path}: expected a list of options, such as - optim.lr: 0.1")
    return [{str(name): settings.shown(value) for name, value in row.items()} for row in rows]


def name_of(trial: Trial) -> str:
    """Returns the name of a run's folder: lr=0.06,temperature=0.2."""
    parts = (f"{name.split('.')[-1]}={value}" for name, value in trial.items())
    name = ",".join(parts).replace("/", "_").replace(" ", "")
    return name[:150] or "base"


def run_all(
    folder: Path,
    trials: Sequence[Trial],
    base: Mapping[str, Any],
    run: Callable[[Trial, Path], Mapping[str, float] | None],
    say: Callable[[str], None],
    write: bool = True,
) -> list[dict[str, Any]]:
    """Runs the trials that have no result in `folder` yet. Returns a row for every trial.

    base: what all runs have in common, as JSON holds it. Raises ConfigError if the results of
        `folder` are of another base.
    run: runs a trial in a folder. Returns the kNN figures at the end, or None if a signal ended the
        run, which ends the sweep.
    say: prints a line.
    write: whether this process writes the results (rank 0).
    A row has entries options, folder, status (done or diverged) and figures. A trial that was
    interrupted has no row.
    """
    names = [name_of(trial) for trial in trials]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--grid, --list: two runs have the same options {name}")
    path = folder / RESULTS
    rows: dict[str, dict[str, Any]] = {}
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["base"] != base:
            raise ConfigError(
                f"--dir: {folder} holds a sweep with other options; name another folder"
            )
        rows = {row["folder"]: row for row in saved["runs"]}
    for number, (name, trial) in enumerate(zip(names, trials), 1):
        if name in rows:
            say(f"run {number} of {len(trials)}, {name}: done before")
            continue
        say(f"run {number} of {len(trials)}: {name}")
        status, after = "done", None
        try:
            after = run(trial, folder / name)
            if after is None:
                break
        except DivergedError as error:
            status = "diverged"
            say(f"{name}: {error}")
        if write:
            figures = figures_of(records_of(folder / name), after or {})
            rows[name] = {"options": trial, "folder": name, "status": status, "figures": figures}
            folder.mkdir(parents=True, exist_ok=True)
            with files.atomic_write(path) as file:
                content = {"base": dict(base), "runs": list(rows.values())}
                file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        else:
            rows[name] = {"options": trial, "folder": name, "status": status, "figures": {}}
    return [rows[name] for name in names if name in rows]


def figures_of(records: Sequence[Mapping[str, Any]], after: Mapping[str, float]) -> dict[str, Any]:
    """Returns the figures of a run: last loss, first, last and best kNN accuracy, epochs.

    records: the lines of its metrics.jsonl. after: the kNN figures at the end, where known: a run
        that `train.max_steps` ended has no line of them, and its random encoder is no result.
    """

    def column(name: str) -> list[float]:
        return [record[name] for record in records if record.get(name) is not None]

    knn, loss, epoch, speed = map(column, ("knn_top1", "loss", "epoch", "images_per_second"))
    found: dict[str, Any] = {}
    if epoch:
        found["epochs"] = max(epoch)
    if loss:
        found["loss"] = loss[-1]
    if knn:
        found["knn_first"] = knn[0]
    trained = [r["knn_top1"] for r in records if r["step"] and r.get("knn_top1") is not None]
    last = after.get("knn_top1")
    if results := trained + ([] if last is None else [last]):
        found |= {"knn_top1": results[-1], "knn_best": max(results)}
    if speed:
        found["images_per_second"] = sorted(speed)[len(speed) // 2]
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows of a sweep as a Markdown table, the best kNN accuracy (or loss) first."""

    def rank(row: Mapping[str, Any]) -> tuple[bool, float, float]:
        figures = row["figures"]
        knn, loss = figures.get("knn_top1", -1.0), figures.get("loss", float("inf"))
        return row["status"] != "done", -knn, loss

    names = list(dict.fromkeys(name for row in rows for name in row["options"]))
    figures = ["knn_top1", "knn_best", "loss", "epochs", "images_per_second"]
    figures = [name for name in figures if any(name in row["figures"] for row in rows)]
    lines = [[*names, *figures, "status"], ["---"] * (len(names) + len(figures) + 1)]
    for row in sorted(rows, key=rank):
        shown = [
            f"{row['figures'][name]:.4g}" if name in row["figures"] else "" for name in figures
        ]
        lines.append([*(row["options"].get(name, "") for name in names), *shown, row["status"]])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
