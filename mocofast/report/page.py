"""The page of one run or of several runs: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mocofast import files, settings
from mocofast.config import ConfigError
from mocofast.health.folder import evidence_of, records_of
from mocofast.health.verdict import Evidence, diagnose, verdict
from mocofast.report.charts import chart
from mocofast.report.gallery import Gallery
from mocofast.report.parts import (
    card,
    changed_options,
    framed,
    heading,
    last,
    lines_of,
    number,
    picture,
    read_skipped,
    share,
    skipped_files,
    table,
)
from mocofast.report.sheets import map_of, neighbours_of
from mocofast.view_sizes import height_width, pixels_text

VIEWS = 1100  # pixels, width of the view pairs


class Run(NamedTuple):
    """What the page says about a run.

    records: lines of metrics.jsonl. skipped: (file, reason) in order. note: why there is no
    gallery.
    """

    name: str
    folder: Path
    evidence: Evidence
    records: list[dict[str, Any]]
    skipped: list[tuple[str, str]]
    gallery: Gallery | None = None
    note: str = ""


def load_run(folder: Path) -> Run:
    """Reads a run folder, without a gallery. Raises ConfigError if it is none."""
    evidence = evidence_of(folder)
    records = records_of(folder)
    return Run(folder.resolve().name, folder, evidence, records, read_skipped(folder))


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Writes the page. Several runs stand side by side, in the order given."""
    with files.atomic_write(path) as temporary:
        temporary.write_text(page(runs), encoding="utf-8", errors="backslashreplace")


def page(runs: Sequence[Run]) -> str:
    """Returns the HTML of the page."""
    sections = {
        "verdict": ("Verdict", _verdicts(runs)),
        "curves": ("Curves", _curves(runs)),
        "signals": ("Health signals", _signals(runs)),
        "views": ("What the encoder sees", "".join(_views(run, runs) for run in runs)),
        "neighbours": ("Nearest neighbours", _of_galleries(runs, neighbours_of)),
        "map": ("Map of the embeddings", _of_galleries(runs, map_of)),
        "settings": ("Settings and machine", _settings(runs)),
    }
    return framed(runs, sections)


# ---- sections ----


def _verdicts(runs: Sequence[Run]) -> str:
    cards = []
    for run in runs:
        findings = diagnose(run.evidence)
        if findings:
            first, *others = findings
            text = (
                f'<p><b class="word">Problem: {escape(first.title)}</b></p>'
                f"<p>{escape(first.reason)}.</p><p><b>What to do:</b> {escape(first.remedy)}.</p>"
            )
            if others:
                items = "".join(f"<li>{escape(str(finding))}</li>" for finding in others)
                text += f"<p>Also noticed, maybe as a consequence:</p><ul>{items}</ul>"
        else:
            word, _, rest = verdict(run.evidence).partition(": ")
            text = f'<p><b class="word">{escape(word.capitalize())}</b>: {escape(rest)}.</p>'
        cards.append(card(run, runs, text, bool(findings)))
    return f'<div class="grid2">{"".join(cards)}</div>' + _figures(runs)


def _figures(runs: Sequence[Run]) -> str:
    """Returns the key figures, a column for a run."""
    names = {
        "recipe": lambda run: run.evidence.config.recipe,
        "encoder, method": lambda run: (
            f"{run.evidence.config.model.arch}, {run.evidence.config.model.method}"
        ),
        "images": lambda run: number(run.evidence.facts.get("images")),
        "steps, epochs": lambda run: (
            f"{last(run.records, 'step')}, {last(run.records, 'epoch')} of "
            f"{run.evidence.config.train.epochs}"
        ),
        "loss at the end (chance)": lambda run: (
            f"{last(run.records, 'loss')} ({last(run.records, 'chance_loss')})"
        ),
        "kNN before training": lambda run: share(run.evidence.before.get("knn_top1")),
        "kNN after training": lambda run: share(run.evidence.after.get("knn_top1")),
        "images a second": lambda run: number(_median(run, "images_per_second")),
        "waiting for data": lambda run: share(_median(run, "data_wait")),
        "peak memory, GiB": lambda run: last(run.records, "memory_gib"),
    }
    rows = [[name, *(get(run) for run in runs)] for name, get in names.items()]
    return "<h3>Figures</h3>" + table(["", *(run.name for run in runs)], rows, "Figures")


def _curves(runs: Sequence[Run]) -> str:
    lines = partial(lines_of, runs, [run.records for run in runs])
    known_chances = {record.get("chance_loss") for run in runs for record in run.records}
    chances = [float(chance) for chance in known_chances if chance is not None]
    level = chances[0] if len(chances) == 1 else 0.0
    charts = [
        chart("Loss", lines(("loss", "")), level=level),
        chart("Pretext task", lines(("acc1", "first"), ("acc5", "first five")), percent=True),
        chart(
            "kNN accuracy on held-out images",
            lines(("knn_top1", "kNN"), ("few_shot_top1", "few labels"), dots=True),
            percent=True,
        ),
        chart("Learning rate", lines(("lr", ""))),
        chart("Images a second", lines(("images_per_second", ""))),
        chart("Waiting for data, share of the time", lines(("data_wait", "")), percent=True),
    ]
    known = {"loss", "chance_loss", "acc1", "acc5", "lr", "step", "epoch", "memory_gib"}
    known |= {"images_per_second", "data_wait", "knn_top1", "knn_top5", "few_shot_top1"}
    further = dict.fromkeys(
        key for run in runs for r in run.records for key in r if key not in known
    )
    charts += [chart(key, lines((key, ""))) for key in further]
    drawn = "".join(charts)
    return f'<div class="grid2">{drawn}</div>' if drawn else "<p>No log line yet.</p>"


SIGNALS = (
    ("Spread of the embeddings (1 spread, 0 collapsed)", ("embedding_std", "")),
    ("Effective rank of the embeddings", ("effective_rank", "")),
    ("Similarity", ("positive_similarity", "same image"), ("negative_similarity", "other images")),
    ("Alignment", ("alignment", "")),
    ("Uniformity", ("uniformity", "")),
    ("Gradient norm", ("gradient_norm", "")),
    ("Change of the weights in a step", ("weight_change", "encoder"), ("key_change", "keys")),
    ("Queue: newest keys nearer than oldest, deviations", ("queue_drift", "")),
    ("Views found by plain pixels", ("easy_views", "")),
)


def _signals(runs: Sequence[Run]) -> str:
    lines = partial(lines_of, runs, [run.evidence.lines for run in runs])
    drawn = [chart(title, lines(*keys)) for title, *keys in SIGNALS]
    if not any(drawn):
        return "<p>The run has no signals. Signals are written at log lines (train.log_every).</p>"
    return (
        '<p class="soft">Measured on the last step of every log line.</p>'
        f'<div class="grid2">{"".join(drawn)}</div>'
    )


def _views(run: Run, runs: Sequence[Run]) -> str:
    size = run.evidence.config.augment.size
    shown = picture(
        run.folder / "views.png",
        VIEWS,
        f"Views of {pixels_text(size)} pixels of the first images of {run.name}, augmented as in "
        "training",
        tiny=max(height_width(size)) <= 32,
    )
    if not shown:
        return heading(run, runs) + "<p>The folder has no views.png.</p>"
    return (
        f"{heading(run, runs)}<p>The first batch of the run. Views of one image stand one above "
        f"the other.</p>{shown}"
    )


def _of_galleries(runs: Sequence[Run], make: Any) -> str:
    parts = []
    for i, run in enumerate(runs):
        head = heading(run, runs)
        found = make(run.gallery, i) if run.gallery else f"<p>{escape(run.note or 'None.')}</p>"
        parts.append(head + found)
    return "".join(parts)


def _settings(runs: Sequence[Run]) -> str:
    html = []
    for run in runs:
        config = run.evidence.config
        html.append(heading(run, runs))
        try:
            base = settings.load_recipe(config.recipe)
        except ConfigError:  # a recipe file that is not here
            base = None
        if base is None:
            html.append(f"<p>The recipe {escape(config.recipe)} is not at hand.</p>")
        else:
            html.append(changed_options(config, base, f"the recipe {config.recipe}"))
        machine = run.evidence.facts.get("machine", {})
        if isinstance(machine, Mapping):
            rows = [[str(key), str(value)] for key, value in machine.items()]
            html.append("<p>Machine and versions of the run:</p>" * bool(rows))
            html.append(table(["part", "of the run"], rows, "Machine and versions"))
        html.append(skipped_files(run))
    return "".join(html)


# ---- values ----


def _median(run: Run, key: str) -> float | None:
    values = sorted(r[key] for r in run.records if r.get(key) is not None)
    return values[len(values) // 2] if values else None
