"""The page of one run or of several runs: one HTML file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mocofast import __version__, files, settings
from mocofast.config import ConfigError
from mocofast.health.folder import evidence_of, records_of
from mocofast.health.verdict import Evidence, diagnose, verdict
from mocofast.report.charts import Line, chart, line_of
from mocofast.report.gallery import Gallery, data_url
from mocofast.report.sheets import map_of, neighbours_of
from mocofast.view_sizes import height_width, pixels_text

MOST_SKIPPED = 20  # names of files on the page
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
    bad = folder / "skipped.jsonl"
    skipped = []
    for line in bad.read_text(encoding="utf-8").splitlines() if bad.exists() else ():
        try:
            entry = json.loads(line)
            skipped.append((str(entry["file"]), str(entry["reason"])))
        except (ValueError, KeyError, TypeError):  # a torn line
            continue
    records = records_of(folder)
    return Run(folder.resolve().name, folder, evidence, records, skipped)


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Writes the page. Several runs stand side by side, in the order given."""
    with files.atomic_write(path) as temporary:
        temporary.write_text(page(runs), encoding="utf-8", errors="backslashreplace")


def page(runs: Sequence[Run]) -> str:
    """Returns the HTML of the page."""
    title = "mocofast: " + ", ".join(run.name for run in runs)
    sections = {
        "verdict": ("Verdict", _verdicts(runs)),
        "curves": ("Curves", _curves(runs)),
        "signals": ("Health signals", _signals(runs)),
        "views": ("What the encoder sees", "".join(_views(run, runs) for run in runs)),
        "neighbours": ("Nearest neighbours", _of_galleries(runs, neighbours_of)),
        "map": ("Map of the embeddings", _of_galleries(runs, map_of)),
        "settings": ("Settings and machine", _settings(runs)),
    }
    links = "".join(f'<a href="#{key}">{name}</a>' for key, (name, _) in sections.items())
    body = "".join(
        f'<section id="{key}" aria-labelledby="h-{key}"><h2 id="h-{key}">{name}</h2>'
        f"{html}</section>"
        for key, (name, html) in sections.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_part('page.css')}</style></head><body>"
        f'<a class="skip" href="#verdict">Skip to the verdict</a>'
        f"<header><h1>{escape(title)}</h1>{_legend(runs)}<nav>{links}</nav></header>"
        f"<main>{body}</main><script>{_part('page.js')}</script></body></html>"
    )


def _part(name: str) -> str:
    return (resources.files("mocofast.report") / name).read_text(encoding="utf-8")


def _legend(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    keys = "".join(
        f'<li><span class="key" style="background:var(--c{i % 6})"></span>{escape(run.name)}</li>'
        for i, run in enumerate(runs)
    )
    return f'<ul style="list-style:none;padding:0">{keys}</ul>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """Returns a table that scrolls by itself. The first cell of a row is its header."""
    if not rows:
        return ""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


# ---- sections ----


def _heading(run: Run, runs: Sequence[Run]) -> str:
    """Returns the name of a run above its part of a section. "" on the page of one run."""
    return f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""


def _lines(
    runs: Sequence[Run],
    records: Sequence[Sequence[Mapping[str, Any]]],
    *keys: tuple[str, str],
    dots: bool = False,
) -> list[Line]:
    """Returns the lines of a chart. records: of every run. keys: (entry, words) of a quantity."""
    return [
        line_of(i, run.name if len(runs) > 1 else "", words, own, key, second=n > 0, dots=dots)
        for i, (run, own) in enumerate(zip(runs, records))
        for n, (key, words) in enumerate(keys)
    ]


def _verdicts(runs: Sequence[Run]) -> str:
    cards = []
    for run in runs:
        findings = diagnose(run.evidence)
        name = _heading(run, runs)
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
        kind = "verdict bad" if findings else "verdict"
        cards.append(f'<div>{name}<div class="{kind}">{text}</div></div>')
    return f'<div class="grid2">{"".join(cards)}</div>' + _figures(runs)


def _figures(runs: Sequence[Run]) -> str:
    """Returns the key figures, a column for a run."""
    names = {
        "recipe": lambda run: run.evidence.config.recipe,
        "encoder, method": lambda run: (
            f"{run.evidence.config.model.arch}, {run.evidence.config.model.method}"
        ),
        "images": lambda run: _text(run.evidence.facts.get("images")),
        "steps, epochs": lambda run: (
            f"{_last(run, 'step')}, {_last(run, 'epoch')} of {run.evidence.config.train.epochs}"
        ),
        "loss at the end (chance)": lambda run: (
            f"{_last(run, 'loss')} ({_last(run, 'chance_loss')})"
        ),
        "kNN before training": lambda run: _share(run.evidence.before.get("knn_top1")),
        "kNN after training": lambda run: _share(run.evidence.after.get("knn_top1")),
        "images a second": lambda run: _text(_median(run, "images_per_second")),
        "waiting for data": lambda run: _share(_median(run, "data_wait")),
        "peak memory, GiB": lambda run: _last(run, "memory_gib"),
    }
    rows = [[name, *(get(run) for run in runs)] for name, get in names.items()]
    return "<h3>Figures</h3>" + table(["", *(run.name for run in runs)], rows, "Figures")


def _curves(runs: Sequence[Run]) -> str:
    lines = partial(_lines, runs, [run.records for run in runs])
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
    lines = partial(_lines, runs, [run.evidence.lines for run in runs])
    drawn = [chart(title, lines(*keys)) for title, *keys in SIGNALS]
    if not any(drawn):
        return "<p>The run has no signals: it was made before signals were written.</p>"
    return (
        '<p class="soft">Measured on the last step of every log line.</p>'
        f'<div class="grid2">{"".join(drawn)}</div>'
    )


def _views(run: Run, runs: Sequence[Run]) -> str:
    head = _heading(run, runs)
    path = run.folder / "views.png"
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except OSError:
        return head + "<p>The folder has no views.png.</p>"
    size = run.evidence.config.augment.size
    tiny = max(height_width(size)) <= 32
    picture.thumbnail((VIEWS, VIEWS))
    url = data_url(picture, "PNG" if tiny else "JPEG")
    return (
        f"{head}<p>The first batch of the run. Views of one image stand one above the other.</p>"
        f'<img class="views" src="{url}" width="{picture.width}" height="{picture.height}" '
        f'alt="Views of {pixels_text(size)} pixels of the first images of {escape(run.name)}, '
        'augmented as in training">'
    )


def _of_galleries(runs: Sequence[Run], make: Any) -> str:
    parts = []
    for i, run in enumerate(runs):
        head = _heading(run, runs)
        found = make(run.gallery, i) if run.gallery else f"<p>{escape(run.note or 'None.')}</p>"
        parts.append(head + found)
    return "".join(parts)


def _settings(runs: Sequence[Run]) -> str:
    html = []
    for run in runs:
        config = run.evidence.config
        html.append(_heading(run, runs))
        try:
            base = settings.load_recipe(config.recipe)
        except ConfigError:  # a recipe file that is not here
            base = None
        if base is None:
            html.append(f"<p>The recipe {escape(config.recipe)} is not at hand.</p>")
        else:
            changed = settings.differences(config, base)
            rows = [
                [name, settings.shown(value), settings.shown(_value(base, name))]
                for name, value in changed.items()
                if name != "train.dir"
            ]
            html.append(f"<p>Options that differ from the recipe {escape(config.recipe)}:</p>")
            html.append(table(["option", "this run", "recipe"], rows, "Changed options"))
            html += ["<p>None.</p>"] * (not rows)
        machine = run.evidence.facts.get("machine", {})
        if isinstance(machine, Mapping):
            rows = [[str(key), str(value)] for key, value in machine.items()]
            html.append("<p>Machine and versions of the run:</p>" * bool(rows))
            html.append(table(["part", "of the run"], rows, "Machine and versions"))
        html.append(_skipped(run))
    html.append(f'<p class="soft">Written by mocofast {escape(__version__)}.</p>')
    return "".join(html)


def _skipped(run: Run) -> str:
    if not run.skipped:
        return "<p>Skipped files: none.</p>"
    rows = [list(entry) for entry in run.skipped[:MOST_SKIPPED]]
    more = len(run.skipped) - len(rows)
    return (
        f"<details><summary>Skipped files: {len(run.skipped)}</summary>"
        f"{table(['file', 'reason'], rows, 'Skipped files')}"
        + f"<p>and {more} more in skipped.jsonl</p>" * bool(more)
        + "</details>"
    )


# ---- values ----


def _value(config: Any, name: str) -> Any:
    group, key = name.split(".")
    return getattr(getattr(config, group), key, "")


def _last(run: Run, key: str) -> str:
    values = [r[key] for r in run.records if key in r]
    return _text(values[-1]) if values else "not known"


def _median(run: Run, key: str) -> float | None:
    values = sorted(r[key] for r in run.records if r.get(key) is not None)
    return values[len(values) // 2] if values else None


def _text(value: Any) -> str:
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"
