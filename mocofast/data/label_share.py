"""Few labels: keeps the labels of a share of the training images, or of the images of a list."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import numpy as np

from mocofast.config import ConfigError
from mocofast.data.finding import counted
from mocofast.data.interface import Source
from mocofast.data.names import stratified_holdout


def asks_for_few(labels: str) -> bool:
    """Returns whether a value of data.labels is a share, or a list of images (.txt).

    Raises ConfigError for a number that is no share.
    """
    try:
        share = float(labels)
    except ValueError:
        return labels.lower().endswith(".txt")
    if not 0 < share <= 1:
        raise ConfigError(f"data.labels: expected a share above 0 and at most 1, got {labels}")
    return True


def keep_labels(source: Source, labels: str, seed: int) -> tuple[Source, str]:
    """Returns the source with fewer labels, and a line about the rest. All images stay.

    labels: a share such as 0.01: of every class this share of the labelled images, rounded, and at
        least one, chosen by `seed`. Or a text file with the name of an image in every line, as
        SimCLR's lists of 1 % and 10 % of ImageNet (Chen et al. 2020, arXiv:2002.05709): the last
        parts of a path, as many as make it unique.
    Images that lose their label have -1.
    Raises ConfigError for a source without labels, and for a list that fits no images.
    """
    if source.labels is None:
        raise ConfigError(f"data.labels: expected labelled images for {labels}, got none")
    usable = np.flatnonzero(source.labels >= 0)
    if labels.lower().endswith(".txt"):
        kept = usable[_listed(source, usable, labels)]
    else:
        kept = usable[stratified_holdout(source.labels[usable], 1 - float(labels), seed)[0]]
    fewer = copy.copy(source)
    fewer.labels = np.full_like(source.labels, -1)
    fewer.labels[kept] = source.labels[kept]
    classes = len(np.unique(fewer.labels[kept]))
    return fewer, f"data.labels {labels}: {len(kept)} of {len(usable)} labels, {classes} classes"


def _listed(source: Source, usable: np.ndarray, file: str) -> np.ndarray:
    """Returns whether the list names an image, (n,) bool. usable: (n,) images of the source."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.labels: there is no list {str(path)!r}")
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    lines = {os.path.normpath(line.strip()) for line in text.splitlines() if line.strip()}
    depths = {line.count("/") + 1 for line in lines}
    found: dict[str, str] = {}
    named = np.zeros(len(usable), dtype=bool)
    for place, index in enumerate(usable.tolist()):
        name = source.name(index)
        parts = name.split("/")
        for end in {"/".join(parts[-depth:]) for depth in depths} & lines:
            if end in found:
                raise ConfigError(
                    f"data.labels: {end!r} of {file} is the name of {found[end]} and of {name}; "
                    "write the folder before the name"
                )
            found[end] = name
            named[place] = True
    if not named.any():
        known = f"; the images have names such as {source.name(int(usable[0]))}" * bool(len(usable))
        raise ConfigError(
            f"data.labels: the {counted(len(lines), 'line')} of {file} name no labelled training "
            f"image{known}"
        )
    return named
