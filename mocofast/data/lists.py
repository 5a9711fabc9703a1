"""Lists of images: CSV or parquet files with a row for every image.

A list has a column of paths (PATH), and may have columns of labels (LABEL), of splits (SPLIT) and
of groups. Names of columns match in any case of letters.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mocofast.config import ConfigError, DataConfig
from mocofast.data import remote
from mocofast.data.captions import CAPTION
from mocofast.data.download import is_url
from mocofast.data.finding import Names, Patterns, counted, shortened
from mocofast.data.folders import choose_tree, no_image
from mocofast.data.layout import EVALUATION, TRAIN, UNLABELLED, Layout, groups_of
from mocofast.data.remote import joined, local_copy, parent
from mocofast.data.shard_samples import LONGEST_LABEL

PATH = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path")
LABEL = ("label", "class", "target", "category", "label_name", "class_name")
SPLIT = ("split", "subset", "set", "partition", "part")
FIRST = 100  # paths of which one must be there
ENDINGS = (".csv", ".tsv", ".parquet")


class ImageList:
    """The columns of a list, as text. Empty cells are ""."""

    def __init__(self, path: str | Path, option: str = "data.path") -> None:
        """path: a file with an ending of ENDINGS. option: for errors.

        Raises FileNotFoundError or ConfigError.
        """
        self.path, self._option = Path(path).expanduser(), option
        self.folder = str(self.path.parent)  # of the list: a path, or a URL
        if is_url(str(path)):
            self.path, self.folder = local_copy(str(path)), parent(str(path))
        if not self.path.is_file():
            raise FileNotFoundError(f"{option}: there is no list {str(self.path)!r}")
        read = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
        if self.path.suffix.lower() not in read:
            raise ConfigError(
                f"{option}: expected a list with an ending of {', '.join(ENDINGS)}, "
                f"got {str(self.path)!r}"
            )
        self.columns = read[self.path.suffix.lower()](self.path, option)
        if not self.columns or not next(iter(self.columns.values())):
            raise ConfigError(f"{option}: no rows in {str(self.path)!r}")

    def find(self, names: Sequence[str]) -> list[str] | None:
        """Returns the first column with a name of `names`, in any case of letters, or None."""
        lower = {name.strip().lower(): name for name in self.columns}
        found = next((lower[name] for name in names if name in lower), None)
        return None if found is None else self.columns[found]

    def column(self, name: str, option: str) -> list[str]:
        """Returns a column. Raises ConfigError that names `option` and the columns."""
        column = self.find([name.lower()])
        if column is None:
            raise ConfigError(
                f"{option}: no column {name!r} in {str(self.path)!r} ({shortened(self.columns)})"
            )
        return column

    def paths(self, exists: Callable[[str], bool] | None = None) -> list[str]:
        """Returns the column of paths, relative to the folder of the list.

        exists: tells whether there is an image at a path. None looks into the folder.

        Folders at the start of all paths that do not lead to the first file are dropped
        (lists often begin with the name of the set).
        """
        paths = self.find(PATH)
        if paths is None:
            raise ConfigError(
                f"{self._option}: no column of paths in {str(self.path)!r} "
                f"({shortened(self.columns)}); expected a column named {PATH[0]}"
            )
        paths = [path.replace("\\", "/").removeprefix("./") for path in paths]
        folder = self.folder
        if is_url(folder):
            exists = exists or (lambda path: remote.exists(joined(folder, path)))
        exists = exists or (lambda path: Path(folder, path).is_file())
        for path in paths[:FIRST]:
            if is_url(path):
                return paths
            parts = path.split("/")
            for depth in range(len(parts)):
                if exists("/".join(parts[depth:])):
                    start = "".join(f"{part}/" for part in parts[:depth])
                    return [path.removeprefix(start) for path in paths]
        place = folder if self._option == "data.path" else "data.path"
        raise FileNotFoundError(
            f"{self._option}: {paths[0]!r} of {str(self.path)!r} is not below {place}"
        )


def _read_csv(path: Path, option: str) -> dict[str, list[str]]:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = file.readlines()
    # The most frequent separator of the header.
    delimiter = max(",;\t|", key=lines[0].count) if lines else ","
    rows, start = csv.reader(lines, delimiter=delimiter), 0  # start: lines before the row
    names: list[str] = []
    table: list[list[str]] = []
    try:
        for row in rows:
            if rows.line_num == len(lines):
                _check_closed(lines[start:], delimiter)
            if not start:
                names = row
            elif any(row):
                table.append([*row, *[""] * (len(names) - len(row))])
            start = rows.line_num
    except csv.Error as error:
        raise ConfigError(f"{option}: {str(path)!r}, line {start + 1}: {error}") from None
    return {name: [row[i].strip() for row in table] for i, name in enumerate(names)}


def _check_closed(row: Sequence[str], delimiter: str) -> None:
    """Raises csv.Error for the lines of a last row whose quote is not closed: Python takes all
    lines of the file after the quote for a cell.
    """
    try:
        list(csv.reader(row, delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "end of data" in str(error):
            raise csv.Error("a quote that is not closed") from None


def _read_parquet(path: Path, option: str) -> dict[str, list[str]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{option}: {str(path)!r} needs pyarrow ({error}); pip install 'mocofast[parquet]'"
        ) from error
    schema = pyarrow.parquet.read_schema(path)
    simple = [name for name in schema.names if _is_text_or_number(schema.field(name).type)]
    table = pyarrow.parquet.read_table(path, columns=simple)
    if len(simple) < len(schema.names) and not {name.lower() for name in simple} & set(PATH):
        bytes_of = shortened(name for name in schema.names if name not in simple)
        raise ConfigError(
            f"{option}: {str(path)!r} has no column of paths ({shortened(simple)}); "
            f"--data.source parquet reads columns of image bytes ({bytes_of})"
        )
    return {
        name: ["" if value is None else str(value) for value in table[name].to_pylist()]
        for name in simple
    }


def _is_text_or_number(kind: Any) -> bool:
    """Returns whether a type of pyarrow is text, an integer, or a dictionary of texts."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind))


def number_column(
    texts: Sequence[str], classes: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Returns the class names and labels, (N,) int64, of a column of labels.

    texts: N labels. "" is no label, -1.
    classes: names of known classes. Other labels are -1. () numbers the labels that
        occur, integers in their order.

    Returns ((), None) if fewer than two labels occur.
    """
    names = {text for text in texts if text}
    if not classes:
        integers = all(name.isdecimal() and len(name) <= LONGEST_LABEL for name in names)
        classes = tuple(sorted(names, key=int) if integers else sorted(names))
    if len(classes) < 2:
        return (), None
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number.get(text, -1) for text in texts], dtype=np.int64)


def _all_texts(train: Sequence[str], val: Sequence[str], target: str) -> tuple[str, ...]:
    """Returns the texts of all labels where evaluation images may have labels of their own."""
    return () if target == "class" else number_column([*train, *val])[0]


def labels_of_list(layout: Layout, option: str, target: str = "class") -> Layout:
    """Returns a layout with the labels of a list, by path.

    option, target: the values of `data.labels` and `data.target`.
    """
    file, _, column = option.partition(":")
    images = ImageList(file, "data.labels")
    texts = images.column(column, "data.labels") if column else images.find(LABEL)
    if texts is None:
        raise ConfigError(
            f"data.labels: no column {LABEL[0]} in {file!r} ({shortened(images.columns)}); "
            f"--data.labels {file}:COLUMN names the column"
        )
    names = {*layout.train, *layout.val}
    paths = images.paths(names.__contains__)
    by_path = dict(zip(paths, texts))
    every = [by_path.get(name, "") for name in layout.train]
    held = [by_path.get(name, "") for name in layout.val]
    classes = _all_texts(every, held, target)
    classes, labels = number_column(every, classes)
    if labels is None:
        raise ConfigError(
            f"data.labels: {file!r} labels no two classes of the images below data.path; "
            f"the list has {paths[0]}, the folder {layout.train[0]}"
        )
    missing = every.count("")
    remarks = [f"{counted(missing, 'image')} without a label in {file}"] * bool(missing)
    layout = layout._replace(labels=labels, classes=classes, remarks=[*layout.remarks, *remarks])
    known = number_column(held, classes)[1]
    if known is None or not (known >= 0).any():
        return layout._replace(val=[])
    val = [name for name, label in zip(layout.val, known) if label >= 0]
    return layout._replace(val=val, val_labels=known[known >= 0])


def arrange_list(images: ImageList, data: DataConfig) -> Layout:
    """Returns the training and evaluation images of a list.

    data: `train`, `val`, `include`, `exclude`, `labels` and `group` are used.
    """
    paths = images.paths()
    # A list names its images: those of hidden folders, and of folders above (..), count, too.
    tree = choose_tree(lambda extensions: Names(paths, extensions, hidden=True), data)
    names = tree.find("", Patterns(data.include, data.exclude))
    usable = set(names.names)
    remarks = [line for line in (names.left_out(),) if line] + names.warnings()
    count = len(paths)
    rows = np.array([i for i, path in enumerate(paths) if path in usable], dtype=np.int64)
    if not len(rows):
        raise no_image(str(images.path), names)
    texts = [""] * count if data.labels == "none" else images.find(LABEL)
    if data.labels not in ("auto", "none"):
        texts = images.column(data.labels, "data.labels")
    train, val, parts = _splits_of_list(images, data, rows)
    remarks += [parts] if parts else []

    def column(rows: np.ndarray, cells: Sequence[str]) -> list[str]:
        return [cells[row] for row in rows]

    classes: tuple[str, ...] = ()
    labels = None
    if texts:
        classes = _all_texts(column(train, texts), column(val, texts), data.target)
        classes, labels = number_column(column(train, texts), classes)
    groups = None
    if data.group.isdecimal():
        groups = groups_of(column(train, paths), ("",), data.group)
    elif data.group:
        cells = column(train, images.column(data.group, "data.group"))
        groups = np.unique(np.array(cells), return_inverse=True)[1].astype(np.int64)
    captions = None
    if data.captions == "auto":
        captions = images.find(CAPTION)
    elif data.captions != "none":
        captions = images.column(data.captions, "data.captions")
    captions = None if captions is None else column(train, captions)
    kept = Layout(column(train, paths), labels, classes, groups, [], None, "", "", remarks)
    layout = kept._replace(captions=captions)
    if labels is None or texts is None or not len(val):
        return layout
    known = number_column(column(val, texts), classes)[1]
    assert known is not None
    if (known < 0).any():
        unknown = counted(int((known < 0).sum()), "image")
        remarks.append(f"{unknown} of the evaluation not evaluated: no class of the training")
    return layout._replace(
        val=column(val[known >= 0], paths),
        val_labels=known[known >= 0],
        val_folder="the list's evaluation images",
    )


def _splits_of_list(
    images: ImageList, data: DataConfig, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns the rows of training and evaluation images, and a remark about other rows.

    rows: of the images that are used.
    """
    cells = images.find(SPLIT)
    none = np.empty(0, dtype=np.int64)
    if cells is None:
        if data.train or data.val:
            images.column("split", "data.train" if data.train else "data.val")  # raises
        return rows, none, ""
    train, val, remark = sets_of_column([cells[row] for row in rows], data)
    return rows[train], rows[val], remark


def sets_of_column(cells: Sequence[str], data: DataConfig) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns the places of training and of evaluation images, and a remark on the rest.

    cells: the sets of n images, as a column of SPLIT names the sets.
    data: `train` and `val` are used.
    Raises ConfigError for a set without an image.
    """
    split = np.array([cell.lower() for cell in cells])
    there = sorted(set(split.tolist()))
    train = [name.lower() for name in data.train]
    train = train or [name for name in (*TRAIN, *UNLABELLED) if name in there]
    val = data.val.lower() or next((name for name in EVALUATION if name in there), "")
    for option, names in (("train", train), ("val", [val] if val else [])):
        for name in set(names) - set(there):
            raise ConfigError(f"data.{option}: no row of split {name!r} ({shortened(there)})")
    held = split == val if val else np.zeros(len(split), dtype=bool)
    if not train:
        return np.flatnonzero(~held), np.flatnonzero(held), ""
    beside = [name or '""' for name in there if name not in {*train, val}]
    remark = f"rows of split {shortened(beside)} not used" if beside else ""
    return np.flatnonzero(np.isin(split, train)), np.flatnonzero(held), remark
