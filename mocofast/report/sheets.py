"""Sheets of a gallery as HTML: nearest neighbours before and after, and the map."""

from __future__ import annotations

import colorsys
import json
from html import escape

from mocofast.report.gallery import SPRITE_COLUMNS, Gallery

THUMB = 44  # pixels on the page, as in page.css
# Colours that colour-blind readers can tell apart (Okabe and Ito 2008), for light and dark.
COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#a89f00", "#7f7f7f"),
    *("#8c564b", "#9467bd"),
)
MOST_CLASSES = 40  # in the legend


def _sprite_rule(gallery: Gallery, number: int) -> str:
    return f"<style>.sprite{number}{{background-image:url({gallery.sprite})}}</style>"


def _name(gallery: Gallery, i: int) -> str:
    label = f", class {gallery.classes[i]}" if gallery.classes[i] else ""
    return gallery.names[i] + label


def _thumb(gallery: Gallery, number: int, i: int, kind: str = "") -> str:
    row, column = divmod(i, SPRITE_COLUMNS)
    rows = -(-len(gallery.names) // SPRITE_COLUMNS)
    name = escape(_name(gallery, i))
    tiny = " tiny" if gallery.side <= 16 else ""
    return (
        f'<span class="thumb sprite{number}{tiny}{kind}" role="img" aria-label="{name}" '
        f'title="{name}" style="background-size:{SPRITE_COLUMNS * THUMB}px {rows * THUMB}px;'
        f'background-position:{-column * THUMB}px {-row * THUMB}px"></span>'
    )


def neighbours_of(gallery: Gallery, number: int) -> str:
    """Returns the sheet: a row for a random image, its nearest images before and after.

    number: of the run on the page.
    """
    blocks = []
    for when, nearest in gallery.neighbours.items():
        rows = []
        for query, found in zip(gallery.queries, nearest.tolist()):
            cells = [_thumb(gallery, number, query)]
            for i in found:
                same = gallery.classes[i] == gallery.classes[query]
                cells.append(_thumb(gallery, number, i, "" if same else " other"))
            rows.append(f'<div class="row">{"".join(cells)}</div>')
        share = gallery.agreement.get(when)
        words = f"<b>{escape(when.capitalize())} training</b>"
        if share is not None:
            words += f": {share:.0%} of all neighbours have the class of their image"
        blocks.append(f"<figure><figcaption>{words}</figcaption>{''.join(rows)}</figure>")
    dashes = " A dashed frame marks another class." if any(gallery.classes) else ""
    return (
        _sprite_rule(gallery, number)
        + f"<p>{len(gallery.queries)} random images (first in a row) and their nearest among "
        f"{len(gallery.names)}, by cosine.{dashes} Before: the random weights that the run's seed "
        f'gives.</p><div class="sheet">{"".join(blocks)}</div>'
    )


def map_of(gallery: Gallery, number: int) -> str:
    """Returns the map, with thumbnails for pointer, finger and arrow keys.

    number: of the run on the page. The sheet of neighbours holds the thumbnails.
    """
    classes = sorted({name for name in gallery.classes if name}, key=_natural)
    colours = {name: _colour(i, len(classes)) for i, name in enumerate(classes)}
    dots = []
    for (x, y), name in zip(gallery.points.tolist(), gallery.classes):
        group = classes.index(name) if name else -1
        dots.append(
            f'<circle cx="{2 + 96 * x:.2f}" cy="{2 + 66 * y:.2f}" r=".9" data-c="{group}" '
            f'fill="{colours.get(name, COLOURS[0])}"/>'
        )
    names = json.dumps([_name(gallery, i) for i in range(len(gallery.names))])
    names = names.replace("<", "\\u003c")  # no name ends the script
    legend = "".join(
        f'<button type="button" aria-pressed="false" data-c="{i}"><i style="background:'
        f'{colours[name]}"></i>{escape(name)}</button>'
        for i, name in enumerate(classes[:MOST_CLASSES])
    )
    tiny = " tiny" if gallery.side <= 16 else ""
    return (
        f"<p>{len(gallery.names)} images by {gallery.method} of their embeddings after training, "
        f"{'coloured by class. A class button shows one class alone' if classes else 'no labels'}. "
        "Point at an image, or press the arrow keys on the map.</p>"
        + f'<div class="legend" id="legend{number}">{legend}</div>'
        * bool(legend)
        + f'<div class="map" tabindex="0" role="application" aria-label="Map of images: arrow keys '
        f'walk from image to image" aria-describedby="said{number}" data-said="said{number}" '
        f'data-names="names{number}" data-legend="legend{number}" data-columns="{SPRITE_COLUMNS}">'
        f'<svg viewBox="0 0 100 70" aria-hidden="true">{"".join(dots)}</svg>'
        f'<div class="popup sprite{number}{tiny}"></div></div>'
        f'<p class="said" id="said{number}" aria-live="polite"></p>'
        f'<script type="application/json" id="names{number}">{names}</script>'
    )


def _colour(i: int, count: int) -> str:
    if count <= len(COLOURS):
        return COLOURS[i]
    red, green, blue = colorsys.hls_to_rgb(i / count, 0.5, 0.6)
    return f"#{int(255 * red):02x}{int(255 * green):02x}{int(255 * blue):02x}"


def _natural(name: str) -> tuple[int, float, str]:
    """Sorts numbers by value, before words."""
    return (0, float(name), name) if name.isdigit() else (1, 0.0, name)
