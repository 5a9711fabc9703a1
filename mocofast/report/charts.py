"""Charts of runs as SVG inside HTML: colours of the page, readable in words, no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

WIDTH, HEIGHT = 360, 200  # units of the picture. The page scales it
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 26
POINTS = 240  # of a line, at most


class Line(NamedTuple):
    """A line of a chart.

    run: number of the run, which chooses the colour. name: of the run, "" if there is one run.
    quantity: in words, or "" where the title says it. points: (x, y) in order.
    second: draw dashes, for a second quantity of the same run. dots: mark every point.
    """

    run: int
    name: str
    quantity: str
    points: list[tuple[float, float]]
    second: bool = False
    dots: bool = False


def line_of(
    run: int,
    name: str,
    quantity: str,
    records: Sequence[Mapping[str, Any]],
    key: str,
    **style: bool,
) -> Line:
    """Returns the line of records[key] over epochs.

    Leaves out records without an epoch, and numbers that are not finite.
    """
    points = [
        (float(record["epoch"]), float(value))
        for record in records
        if isinstance(value := record.get(key), (int, float))
        and math.isfinite(value)
        and "epoch" in record
    ]
    if len(points) > POINTS:  # means of parts, so that no spike decides by chance
        part = -(-len(points) // POINTS)
        groups = [points[i : i + part] for i in range(0, len(points), part)]
        points = [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]
    return Line(run, name, quantity, points, **style)


def chart(title: str, lines: Sequence[Line], *, percent: bool = False, level: float = 0.0) -> str:
    """Returns a figure over epochs, or "" without a point.

    percent: values are shares. level: value of a dotted horizontal line, chance for example. 0:
    no line.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([level] if level else [])
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(0.0, *xs), max(*xs, 1e-9)
    y_low, y_high = min(*ys, *y_ticks), max(*ys, *y_ticks)
    y_high += (y_high == y_low) * (abs(y_high) or 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low or 1.0) * (WIDTH - LEFT - RIGHT),
            TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for y in y_ticks:
        _, top = place(x_low, y)
        parts.append(f'<path class="grid" d="M{LEFT} {top:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 5}" y="{top + 4:.1f}" class="y">{_number(y, percent)}</text>'
        )
    for x in x_ticks:
        if x_low <= x <= x_high:
            left, _ = place(x, y_low)
            parts.append(f'<text x="{left:.1f}" y="{HEIGHT - 8}" class="x">{_number(x)}</text>')
    if level:
        parts.append(f'<path class="level" d="M{LEFT} {place(0, level)[1]:.1f}H{WIDTH - RIGHT}"/>')
    for line in lines:
        places = [place(x, y) for x, y in line.points]
        kind = f"run{line.run % 6}{' second' if line.second else ''}"
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line {kind}" d="M{path}"/>')
        if line.dots or len(places) == 1:
            parts += [
                f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places
            ]
    described = ". ".join(
        " ".join(filter(None, (line.name, line.quantity, "(dashed)" * line.second)))
        + f" from {_number(line.points[0][1], percent)} to {_number(line.points[-1][1], percent)}"
        for line in lines
    ).strip()
    quantities = {line.second: line.quantity for line in lines}
    parts_of_caption = [f"{described}."] if len(lines) <= 2 else []
    if len(quantities) == 2 and len(lines) > 2:
        parts_of_caption.append(f"Solid: {quantities[False]}. Dashed: {quantities[True]}.")
    if level:
        parts_of_caption.append(f"Dotted: chance, {_number(level, percent)}.")
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> '
        f"<span>{escape(' '.join(parts_of_caption))}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="'
        f'{escape(title)} over epochs. {escape(described)}">{"".join(parts)}</svg></figure>'
    )


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns about `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float, percent: bool = False) -> str:
    return f"{100 * value:.4g}%" if percent else f"{value:.4g}"
