"""Positives from two files: two dates of a place, two views of a patient (`data.pairs`).

The first view of a sample is of the first file, the second view of the second file. Views of more
than two take turns. The evaluation sees the first files.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mocofast.config import ConfigError, DataConfig
from mocofast.data.finding import counted, shortened
from mocofast.data.interface import Source
from mocofast.data.items import Item
from mocofast.data.layout import grouped_holdout
from mocofast.data.lists import PATH, ImageList
from mocofast.data.names import digest, stratified_holdout
from mocofast.data.ranges import range_of

SECOND = ("path_2", "path2", "second", "file_2", "filename_2", "image_2")
# Returns some samples of a source: (source, (n,) int64).
Part = Callable[[Source, np.ndarray], Source]


class PairSource:
    """Samples of two files. `load` returns the first file."""

    def __init__(self, first: Source, second: Source) -> None:
        """first, second: N files of every view. The labels are those of `first`."""
        self.views = (first, second)
        self.value_range = range_of(first)
        self.labels, self.classes = first.labels, first.classes

    def __len__(self) -> int:
        return len(self.views[0])

    def name(self, index: int) -> str:
        """Returns the names of both files."""
        return " + ".join(view.name(index) for view in self.views)

    def load(self, index: int) -> str | bytes | np.ndarray | Item:
        """Returns the first file."""
        return self.views[0].load(index)

    def subset(self, index: np.ndarray, part: Part) -> PairSource:
        """Returns a source of some samples. index: (n,) int64."""
        first, second = (part(view, index) for view in self.views)
        return PairSource(first, second)

    def fingerprint(self) -> str:
        """Returns a hash of the fingerprints of both views."""
        both = "".join(view.fingerprint() for view in self.views)
        return digest(both.encode(), self.labels, self.classes)


class PairSets(NamedTuple):
    """The files of pairs."""

    train: tuple[np.ndarray, np.ndarray]  # (n,) int64 each: the first and the second file
    held_out: np.ndarray  # (m,) int64: first files of the pairs that are held out
    remarks: list[str]


def find_pairs(source: Source, data: DataConfig, seed: int) -> PairSets:
    """Returns the pairs among the files of a source.

    data: `pairs` and `holdout` are used.
    seed: of the held-out share. Pairs that share a file stay together.

    Raises ConfigError without a pair.
    """
    names = [source.name(index) for index in range(len(source))]
    if data.pairs == "folder":
        first, second, remarks = _neighbours(names)
    else:
        first, second, remarks = _listed(names, data.pairs)
    if not len(first):
        raise ConfigError(
            f"data.pairs: {data.pairs!r} gives no pair of {counted(len(names), 'file')}"
        )
    remarks.insert(0, f"{counted(len(names), 'file')} give {counted(len(first), 'pair')}")
    held_out = np.empty(0, dtype=np.int64)
    if source.labels is not None:
        labels = source.labels[first]
        usable = np.flatnonzero(labels >= 0)
        groups = _components(first, second, len(names))[first]
        if len(np.unique(groups)) == len(groups):
            chosen = stratified_holdout(labels[usable], data.holdout, seed)[1]
        else:
            chosen = grouped_holdout(groups[usable], data.holdout, seed)
        held_out = usable[chosen]
    kept = np.setdiff1d(np.arange(len(first)), held_out)
    return PairSets((first[kept], second[kept]), np.unique(first[held_out]), remarks)


def first_files(source: Source) -> np.ndarray:
    """Returns the first file of every folder, (n,) int64, ascending."""
    names = [source.name(index) for index in range(len(source))]
    first: dict[str, int] = {}
    for index in sorted(range(len(names)), key=names.__getitem__):
        first.setdefault(names[index].rpartition("/")[0], index)
    return np.array(sorted(first.values()), dtype=np.int64)


def _neighbours(names: list[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns pairs of files that follow one another in a folder, in the order of names."""
    folders: dict[str, list[int]] = {}
    for index in sorted(range(len(names)), key=names.__getitem__):
        folders.setdefault(names[index].rpartition("/")[0], []).append(index)
    pairs = [pair for files in folders.values() for pair in pairwise(files)]
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    alone = [folder for folder, files in folders.items() if len(files) == 1]
    remarks = []
    if alone:
        remarks = [f"{counted(len(alone), 'folder')} with one file left out: {shortened(alone)}"]
    return table[:, 0], table[:, 1], remarks


def _listed(names: list[str], file: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns the pairs of a list with two columns of paths."""
    images = ImageList(file, "data.pairs")
    second = images.find(SECOND)
    if second is None:
        raise ConfigError(
            f"data.pairs: {file!r} needs columns {PATH[0]} and {SECOND[0]} "
            f"({shortened(images.columns)})"
        )
    known = {name: index for index, name in enumerate(names)}
    first = images.paths(known.__contains__)
    # `paths` drops a folder at the start. The second column has the same folder.
    dropped = (images.find(PATH) or [""])[0].replace("\\", "/").removesuffix(first[0])
    other = [path.replace("\\", "/").removeprefix("./").removeprefix(dropped) for path in second]
    rows = [(a, b) for a, b in zip(first, other) if a in known and b in known]
    table = np.array([(known[a], known[b]) for a, b in rows], dtype=np.int64).reshape(-1, 2)
    missing = len(first) - len(rows)
    remarks = [f"{counted(missing, 'pair')} of {file} left out: no such files"] * bool(missing)
    return table[:, 0], table[:, 1], remarks


def _components(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Returns (count,) int64: files that pairs connect, also over other files, share a number."""
    root = list(range(count))

    def find(file: int) -> int:
        while root[file] != file:
            root[file] = root[root[file]]
            file = root[file]
        return file

    for a, b in zip(first.tolist(), second.tolist()):
        root[find(a)] = find(b)
    return np.array([find(file) for file in range(count)])
