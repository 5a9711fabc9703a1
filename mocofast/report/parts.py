"""Parts of a page: its frame, tables, lines of charts, pictures, and the list of skipped files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from mocofast import __version__, settings
from mocofast.report.charts import Line, line_of
from mocofast.report.gallery import data_url

PAGE = "report.html"  # name of the page in a run folder
MOST_SKIPPED = 20  # names of files on the page


class ShownRun(Protocol):
    """A run of a page. skipped: (file, reason) in order."""

    @property
    def name(self) -> str: ...
    @property
    def skipped(self) -> list[tuple[str, str]]: ...


def framed(runs: Sequence[ShownRun], sections: Mapping[str, tuple[str, str]]) -> str:
    """Returns a whole page. sections: {id: (title, HTML)} in order. The first is `verdict`."""
    title = "mocofast: " + ", ".join(run.name for run in runs)
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
        f'<main>{body}<p class="soft">Written by mocofast {escape(__version__)}.</p></main>'
        f"<script>{_part('page.js')}</script></body></html>"
    )


def _part(name: str) -> str:
    return (resources.files("mocofast.report") / name).read_text(encoding="utf-8")


def _legend(runs: Sequence[ShownRun]) -> str:
    if len(runs) < 2:
        return ""
    keys = "".join(
        f'<li><span class="key" style="background:var(--c{i % 6})"></span>{escape(run.name)}</li>'
        for i, run in enumerate(runs)
    )
    return f'<ul style="list-style:none;padding:0">{keys}</ul>'


def heading(run: ShownRun, runs: Sequence[ShownRun]) -> str:
    """Returns the name of a run above its part of a section. "" on the page of one run."""
    return f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""


def card(run: ShownRun, runs: Sequence[ShownRun], text: str, bad: bool) -> str:
    """Returns the verdict on a run. text: in HTML. bad: draw it as a problem."""
    kind = "verdict bad" if bad else "verdict"
    return f'<div>{heading(run, runs)}<div class="{kind}">{text}</div></div>'


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


def lines_of(
    runs: Sequence[ShownRun],
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


def picture(path: Path, width: int, alt: str, tiny: bool = False) -> str:
    """Returns a picture of the run folder, or "" without the file.

    width: in pixels, at most. alt: in words. tiny: of pixels that one can count: no JPEG.
    """
    try:
        with Image.open(path) as file:
            shown = file.convert("RGB")
    except OSError:
        return ""
    shown.thumbnail((width, width))
    url = data_url(shown, "PNG" if tiny else "JPEG")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(path.stem)}">'
        f'<img class="views" src="{url}" width="{shown.width}" height="{shown.height}" '
        f'alt="{escape(alt)}"></div>'
    )


def read_skipped(folder: Path) -> list[tuple[str, str]]:
    """Returns (file, reason) of the lines of a run folder's skipped.jsonl."""
    path = folder / "skipped.jsonl"
    skipped = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            skipped.append((str(entry["file"]), str(entry["reason"])))
        except (ValueError, KeyError, TypeError, RecursionError):  # a torn line
            continue
    return skipped


def skipped_files(run: ShownRun) -> str:
    """Returns the list of skipped files, folded up."""
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


def changed_options(config: Any, base: Any, what: str) -> str:
    """Returns a table of the options of a run that differ. base, what: from which, and its name."""
    changed = settings.differences(config, base)
    before = settings.differences(base, config)
    rows = [
        [name, *(_option(each) for each in (value, before.get(name, "")))]
        for name, value in changed.items()
        if name != "train.dir"
    ]
    found = table(["option", "this run", what], rows, "Changed options")
    return f"<p>Options that differ from {escape(what)}:</p>{found or '<p>None.</p>'}"


def _option(value: Any) -> str:
    return "none" if value == () else settings.shown(value)


# ---- values ----


def last(records: Sequence[Mapping[str, Any]], key: str) -> str:
    """Returns the last value of an entry in words."""
    values = [record[key] for record in records if key in record]
    return number(values[-1]) if values else "not known"


def number(value: Any) -> str:
    """Returns a number in words."""
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def share(value: float | None) -> str:
    """Returns a share in words."""
    return "not measured" if value is None else f"{value:.1%}"
