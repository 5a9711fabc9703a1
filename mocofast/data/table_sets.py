"""The training and evaluation images of parquet and Arrow files: a file, files, or a folder that
`datasets.save_to_disk` or the Hugging Face Hub made.
"""

from __future__ import annotations

import copy
import fnmatch
import glob
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mocofast.config import ConfigError, DataConfig
from mocofast.data.braces import expand_braces
from mocofast.data.captions import CAPTION
from mocofast.data.download import is_url
from mocofast.data.finding import Disk, Patterns, counted, shortened
from mocofast.data.layout import EVALUATION, TRAIN, UNLABELLED, Layout
from mocofast.data.lists import LABEL, SPLIT, number_column, sets_of_column
from mocofast.data.names import EXTENSIONS
from mocofast.data.packed import PackedSource
from mocofast.data.remote import joined, local_copy, matching, names_below
from mocofast.data.tables import (
    ENDINGS,
    Table,
    class_names,
    image_columns,
    open_table,
    read_schema,
)

# Files of `datasets.save_to_disk`: names of sets, and names of the files of a set.
SETS, STATE = "dataset_dict.json", "state.json"
MORE_LABELS = ("labels", "fine_label", "coarse_label")


class TableSets(NamedTuple):
    """What the tables of a run hold."""

    layout: Layout
    files: tuple[Path, ...]
    places: dict[str, tuple[int, int, int]]  # {name of an image: (file, offset, size)}

    def source(
        self, names: Sequence[str], labels: np.ndarray | None, classes: tuple[str, ...]
    ) -> PackedSource:
        """Returns a source of some images."""
        places = np.array([self.places[name] for name in names], dtype=np.int64).reshape(-1, 3)
        return PackedSource(self.files, places, names, labels, classes)


def holds_tables(path: Path) -> bool:
    """Returns whether a path is a table with images, or a folder of such tables without images.

    Looks through a folder until the first image or table.
    """
    if path.is_file():
        return path.suffix.lower() in ENDINGS and bool(image_columns(read_schema(path)))
    if any((path / name).is_file() for name in (SETS, STATE)):
        return True
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        endings = {os.path.splitext(name)[1].lower(): name for name in names if name[0] != "."}
        if endings.keys() & EXTENSIONS:
            return False
        found = [Path(folder, endings[end]) for end in ENDINGS if end in endings]
        # A broken table, or one without pyarrow to read it, may lie beside folders of images.
        with suppress(ConfigError):
            if any(image_columns(read_schema(file)) for file in found):
                return True
    return False


def find_tables(path: str) -> list[tuple[str, Path]]:
    """Returns the table files of `data.path` as (name, file), sorted by name.

    path: a file, a pattern with * or {a,b}, or a folder with files at any depth.

    Of a folder of `datasets.save_to_disk`, files that its state does not name are left out.
    Raises FileNotFoundError or ConfigError if there is no table.
    """
    if is_url(path):
        return _stored_tables(path)
    root = Path(path).expanduser()
    if root.is_dir():
        names = Disk(root, set(ENDINGS)).find("").names
        names = [name for name in names if _is_used(root / name)]
        if not names:
            raise ConfigError(f"data.path: no {' or '.join(ENDINGS)} file below {str(root)!r}")
        return [(name, root / name) for name in names]
    patterns = expand_braces(str(root))
    files = [Path(file) for part in patterns for file in sorted(glob.glob(part)) or [part]]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"data.path: there is no table {str(file)!r}")
        if file.suffix.lower() not in ENDINGS:
            raise ConfigError(
                f"data.path: expected a table with an ending of {', '.join(ENDINGS)}, "
                f"got {str(file)!r}"
            )
    return [(file.name, file) for file in files]


def _stored_tables(path: str) -> list[tuple[str, Path]]:
    """Returns copies of the table files of a URL, as `find_tables` does."""
    urls = [url for part in expand_braces(path) for url in matching(part)]
    if urls == [path] and not path.lower().endswith(ENDINGS):
        names = [name for name in names_below(path) if name.lower().endswith(ENDINGS)]
        names = [name for name in names if not name.rpartition("/")[2].startswith("cache-")]
        urls = [joined(path, name) for name in names]
    else:
        names = [url.rpartition("/")[2] for url in urls]
    if not urls:
        raise ConfigError(f"data.path: no {' or '.join(ENDINGS)} file at {path}")
    return [(name, local_copy(url)) for name, url in zip(names, urls)]


def _is_used(file: Path) -> bool:
    """Returns whether the state of a set, if there is a state, names a file."""
    try:
        state = json.loads((file.parent / STATE).read_text(encoding="utf-8"))
        return file.name in {entry["filename"] for entry in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        # Files of this name are made by `Dataset.map`.
        return not file.name.startswith("cache-")


def set_of(name: str) -> str:
    """Returns the set that the name of a file or of its folders says, in lower case, or "".

    name: a path, such as "data/train-00000-of-00005.parquet".
    """
    *folders, file = name.lower().split("/")
    for part in (file, *reversed(folders)):
        words = re.split(r"[^a-z]+", part)
        found = next((w for w in words if w in (*TRAIN, *UNLABELLED, *EVALUATION)), "")
        if found:
            return found
    return ""


def open_tables(path: str, data: DataConfig) -> TableSets:
    """Opens the tables of `data` and tells training from evaluation images.

    path: as for `find_tables`.
    data: `column`, `train`, `val`, `include`, `exclude`, `labels` and `group` are used.

    The set of an image is named by the file or its folders (train-00000.parquet,
    validation/0000.parquet), or else by a column of SPLIT.
    """
    files = find_tables(path)
    names = [name for name, _ in files]
    train, val, beside = _sets_of_files(names, data)
    remarks = [f"{shortened(beside)} not used"] if beside else []
    tables = {name: open_table(name, file, data.column) for name, file in files if name in train}
    rows = _Rows(list(tables.values()), data)
    by_file = bool(val) or len(train) < len(names) or any(map(set_of, names))
    by_row = None if by_file else _sets_of_rows(rows, data)
    tables |= {name: open_table(name, file, data.column) for name, file in files if name in val}
    evaluation = _Rows([tables[name] for name in val], replace(data, captions="none"))
    val_folder = "the evaluation tables"
    if by_row is not None:
        kept, held, unused = by_row
        remarks += [unused] if unused else []
        rows, evaluation = rows.part(kept), rows.part(held)
        val_folder = "the table's evaluation images"
    elif val:
        val_folder = set_of(val[0]) or data.val
    if not rows.names:
        raise ConfigError(f"data.path: no image in {path!r}" + rows.left_out())
    remarks += rows.remarks()
    opened = [tables[name] for name in tables]
    number = {table.name: i for i, table in enumerate(opened)}
    places = {
        name: (number[table], offset, size)
        for part in (rows, evaluation)
        for name, (table, offset, size) in zip(part.names, part.places)
    }
    layout = _labelled(rows, evaluation, val_folder, remarks)
    return TableSets(layout, tuple(table.file for table in opened), places)


def _sets_of_files(names: list[str], data: DataConfig) -> tuple[list[str], list[str], list[str]]:
    """Returns the files of training and evaluation images, and the rest."""
    sets = {name: set_of(name) for name in names}
    there = set(sets.values())

    def named(option: str, words: Sequence[str]) -> list[str]:
        found = [name for name in names if any(_matches(name, sets[name], w) for w in words)]
        if words and not found and (there != {""} or len(names) > 1):
            raise ConfigError(
                f"data.{option}: no table of {', '.join(words)} "
                f"({shortened(sorted(there - {''}) or names)})"
            )
        return found

    train = named("train", data.train)
    val = [name for name in named("val", [data.val] if data.val else []) if name not in train]
    if not val and not data.val:
        chosen = next((word for word in EVALUATION if word in there), "")
        val = [name for name in names if chosen and sets[name] == chosen and name not in train]
    if not train:
        train = [name for name in names if sets[name] in (*TRAIN, *UNLABELLED)]
        if not train:
            train, val = (names, []) if not data.val else (names, val)
            train = [name for name in train if name not in val]
    used = {*train, *val}
    return train, val, [name for name in names if name not in used]


def _matches(name: str, word: str, asked: str) -> bool:
    """Returns whether an option names the set of a file, its folder, or the file by a pattern."""
    asked = asked.rstrip("/")
    return word == asked.lower() or any(
        fnmatch.fnmatch(name, form) for form in (asked, f"{asked}/*", f"*/{asked}/*")
    )


class _Rows:
    """The images of several tables: names, places and columns."""

    def __init__(self, tables: list[Table], data: DataConfig) -> None:
        self.names: list[str] = []
        self.places: list[tuple[str, int, int]] = []  # (name of the table, offset, size)
        self.split: list[str] | None = None
        self.label: list[str] | None = None
        self.group: list[str] | None = None
        self.caption: list[str] | None = None
        self.classes: tuple[str, ...] = ()
        self._empty = self._excluded = 0
        self._first = tables[0] if tables else None
        patterns = Patterns(data.include, data.exclude)
        wanted = LABEL + MORE_LABELS
        for table in tables:
            keep = []
            for row, (path, size) in enumerate(zip(table.paths, table.sizes.tolist())):
                if not size:
                    self._empty += 1
                elif patterns and not patterns.keeps(f"{table.name}/{path or row}"):
                    self._excluded += 1
                else:
                    keep.append(row)
                    self.names.append(f"{table.name}:{row}" + f" {path}" * bool(path))
                    self.places.append((table.name, int(table.offsets[row]), size))
            if data.labels == "auto":
                name = _find(table, wanted)
            else:
                name = "" if data.labels == "none" else _column(table, data.labels, "labels")
            self.classes = self.classes or (class_names(table.columns.schema, name) if name else ())
            group = _column(table, data.group, "group") if data.group else ""
            kept = table, keep, len(self.names)
            self.label = _extended(self.label, name, *kept)
            self.split = _extended(self.split, _find(table, SPLIT), *kept)
            self.group = _extended(self.group, group, *kept)
            named = _caption_column(table, data)
            self.caption = _extended(self.caption, named, *kept)

    def part(self, rows: np.ndarray) -> _Rows:
        """Returns some of the images. rows: (n,) int64."""
        part = copy.copy(self)
        for key in ("names", "places", "split", "label", "group", "caption"):
            values = getattr(self, key)
            if values is not None:
                setattr(part, key, [values[row] for row in rows.tolist()])
        return part

    def left_out(self) -> str:
        """Returns words on the rows that are left out, "" for none."""
        return "".join(f"; {line}" for line in self.remarks())

    def remarks(self) -> list[str]:
        """Returns lines on rows that are left out, and on columns that are not used."""
        lines = []
        if self._empty:
            lines.append(f"{counted(self._empty, 'row')} without the bytes of an image left out")
        if self._excluded:
            lines.append(
                f"{counted(self._excluded, 'image')} left out by data.include and data.exclude"
            )
        if self._first is not None and self._first.others:
            others = self._first.others
            lines.append(
                f"images of column {self._first.column} used, {shortened(others)} not; "
                f"--data.column {others[0]} makes the other choice"
            )
        return lines


def _extended(
    before: list[str] | None, column: str, table: Table, rows: list[int], total: int
) -> list[str] | None:
    """Returns the cells of the tables so far, with the cells of one more table.

    before: the cells of earlier tables. None: no earlier table has the column.
    column: of `table`, "" where the table lacks the column.
    rows: of `table` that are used. total: number of rows of all tables so far.
    """
    if not column:
        return None if before is None else before + [""] * len(rows)
    cells = table.texts(column)
    if before is None:
        before = [""] * (total - len(rows))
    return before + [cells[row] for row in rows]


def _find(table: Table, names: Sequence[str]) -> str:
    """Returns the first column with a name of `names`, in any case of letters, or ""."""
    lower = {name.lower(): name for name in table.columns.column_names}
    return next((lower[name] for name in names if name in lower), "")


def _column(table: Table, name: str, option: str) -> str:
    """Returns a column. Raises ConfigError that names the option and the columns."""
    found = _find(table, [name.lower()])
    if not found:
        there = shortened(table.columns.column_names)
        raise ConfigError(f"data.{option}: no column {name!r} in {table.name} ({there})")
    return found


def _caption_column(table: Table, data: DataConfig) -> str:
    """Returns the name of the column of captions, "" for none."""
    if data.captions == "none":
        return ""
    if data.captions == "auto":
        return _find(table, CAPTION)
    return _column(table, data.captions, "captions")


def _sets_of_rows(rows: _Rows, data: DataConfig) -> tuple[np.ndarray, np.ndarray, str] | None:
    """Returns the rows of training and of evaluation images, and a remark, by a column of SPLIT.

    Returns None without such a column.
    """
    if rows.split is None:
        for option, value in (("train", data.train), ("val", data.val)):
            if value:
                raise ConfigError(
                    f"data.{option}: neither a name of a table nor a column {SPLIT[0]} names sets"
                )
        return None
    return sets_of_column(rows.split, data)


def _labelled(rows: _Rows, evaluation: _Rows, val_folder: str, remarks: list[str]) -> Layout:
    """Returns the images with their classes, and the evaluation images of these classes."""
    classes: tuple[str, ...] = ()
    labels = groups = None
    if rows.label is not None and any(rows.label):
        classes, labels = number_column(rows.label, rows.classes)
    if rows.group is not None:
        groups = np.unique(np.array(rows.group), return_inverse=True)[1].astype(np.int64)
    layout = Layout(rows.names, labels, classes, groups, [], None, "", "", remarks, rows.caption)
    if labels is None or not evaluation.names:
        return layout
    known = number_column(evaluation.label or [""] * len(evaluation.names), classes)[1]
    assert known is not None
    good = np.flatnonzero(known >= 0)
    if not len(good):
        return layout._replace(why=f"{val_folder} has no labels")
    if len(good) < len(known):
        count = counted(len(known) - len(good), "image")
        remarks.append(f"{count} of {val_folder} not evaluated: no class of the training")
    names = [evaluation.names[i] for i in good.tolist()]
    return layout._replace(val=names, val_labels=known[good], val_folder=val_folder)
