"""Sources of images (a folder, a list, a zip archive, tables, tar shards, the embedded digits,
CIFAR), and their train and val sets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mocofast.config import SOURCES, TABLES, ConfigError, DataConfig
from mocofast.data.arrays import ArraySource as ArraySource
from mocofast.data.captions import with_captions
from mocofast.data.download import is_url
from mocofast.data.finding import Names
from mocofast.data.folder_index import kept_layout, list_folder
from mocofast.data.folders import FolderSource as FolderSource
from mocofast.data.folders import choose_tree, no_image, open_folder
from mocofast.data.interface import Source
from mocofast.data.items import Item
from mocofast.data.label_share import asks_for_few, keep_labels
from mocofast.data.layout import Layout, arrange, grouped_holdout
from mocofast.data.lists import ImageList, arrange_list, labels_of_list
from mocofast.data.names import NamedImages, digest, stratified_holdout
from mocofast.data.packed import PackedSource
from mocofast.data.pairs import PairSource, find_pairs, first_files
from mocofast.data.ranges import range_of, set_range
from mocofast.data.reading import ReadSource, read_as_asked
from mocofast.data.remarks import remarks
from mocofast.data.remote import RemoteSource, local_copy, names_below
from mocofast.data.shard_sets import open_shard_sets
from mocofast.data.shards import ShardSource
from mocofast.data.table_sets import holds_tables, open_tables
from mocofast.data.tables import ENDINGS
from mocofast.data.zips import ZipArchive, ZipSource
from mocofast.errors import list_choices
from mocofast.plugins import is_plugin, load_plugin

DIGITS_HOLDOUT = 0.2


class Subset:
    """Some samples of any source.

    `FolderSource.subset` also hashes its names faster. `ShardSource.subset` also keeps the
    windows of shards.
    """

    def __init__(self, source: Source, index: np.ndarray) -> None:
        """index: (n,) int64, the samples of `source`."""
        self._source, self._index = source, index
        self.value_range = range_of(source)
        self.labels = None if source.labels is None else source.labels[index]
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self._index)

    def name(self, index: int) -> str:
        """Returns the name of the sample in the whole source."""
        return self._source.name(int(self._index[index]))

    def load(self, index: int) -> str | bytes | np.ndarray | Item:
        """Returns what the whole source returns for the sample."""
        return self._source.load(int(self._index[index]))

    def fingerprint(self) -> str:
        """Returns a hash of names and labels, equal to the hash of a FolderSource of
        these images.
        """
        names = (os.fsencode(self.name(index)) for index in range(len(self)))
        return digest(b"\0".join(names), self.labels, self.classes)


class Datasets(NamedTuple):
    """The images of a run."""

    train: Source  # for training. Labels may be -1: unlabelled
    # for kNN and linear evaluation. None without labels, or if no images are held out
    val: Source | None
    note: str  # a line for the log: the numbers of images, and the origin of the val set
    remarks: tuple[str, ...] = ()  # more lines: what was left out, and what looks odd

    def lines(self) -> str:
        """Returns the note and the remarks, a line for every remark."""
        return "\n".join((self.note, *self.remarks))


def with_remarks(datasets: Datasets, channels: int) -> Datasets:
    """Returns the sets with remarks on a few images. channels: as `data.channels`."""
    lines = remarks(datasets.train, channels)
    return datasets._replace(remarks=(*datasets.remarks, *lines))


def labelled(source: Source) -> Source:
    """Returns the labelled samples of a source with labels."""
    if source.labels is None or not len(source) or source.labels.min() >= 0:
        return source
    return _part(source, np.flatnonzero(source.labels >= 0))


def _part(source: Source, index: np.ndarray) -> Source:
    """Returns some samples of a source. index: (n,) int64, ascending."""
    if isinstance(source, (FolderSource, ShardSource, PackedSource, ReadSource)):
        return source.subset(index)
    if isinstance(source, PairSource):
        return source.subset(index, _part)
    return Subset(source, index)


def load_datasets(data: DataConfig, seed: int = 0, captions: bool = False) -> Datasets:
    """Finds the images of `data` and makes a train and a val set.

    data: the options of DataConfig that say what is read. Loaders use the others.
    seed: seed of the held-out share.
    captions: the training images need captions. Images without a caption are left out.

    data.source=folder: image files below `path`. `mocofast.data.layout.set_folders`
        tells the folders of the train and the val set. Images are labelled if all images
        lie in two or more folders, see `mocofast.data.layout.classes_of`.
    data.source=zip: a zip archive of image files, arranged like a folder.
    data.source=list: a CSV or parquet file (`mocofast.data.lists`).
    data.source=parquet, hf: tables with image bytes (`mocofast.data.table_sets`). A table, and a
        folder of tables without images, is found under data.source=folder too.
    data.source=shards: a folder of tar files (`mocofast.data.shards`), a pattern, or URLs.
    data.source=digits: 1,797 grey images of 8 x 8 pixels, a part of mocofast, the same in
        all `data.channels`. The same 20% of every class are held out for any seed.
    data.source=cifar10, cifar100: torchvision's data sets, kept in `path`, downloaded
        only if absent. The val set is the test set. With several processes, one process
        must call this function first, so that only one process downloads.
    data.source=package.module: the result of the module's own `load_datasets(data, seed)`.

    If labelled images have no evaluation folder, the share `data.holdout` of every class is
    held out for the val set, or of the groups of `data.group`. The images are chosen by `seed`.

    Raises ConfigError, FileNotFoundError or NotADirectoryError with the name of the option.
    Decodes no image: loaders find and skip bad files.
    """
    if not 0 <= data.holdout < 1:
        raise ConfigError(f"data.holdout must be in [0, 1), got {data.holdout}")
    if is_plugin(data.source):
        module = load_plugin("data.source", data.source, "load_datasets")
        own: Datasets = module.load_datasets(data, seed)
        return with_captions(own, data, _part) if captions else own
    if data.source not in _LOAD:
        raise ConfigError(f"data.source must be {list_choices(SOURCES)}, got {data.source!r}")
    few = data.labels if asks_for_few(data.labels) else ""
    if data.pairs and few:
        raise ConfigError(f"data.labels: data.pairs takes no share of the labels, got {few}")
    if data.pairs:
        return _load_pairs(data, seed)
    if not captions:
        data = replace(data, captions="none")
    datasets = _LOAD[data.source](replace(data, labels="auto") if few else data, seed)
    if captions:
        datasets = with_captions(datasets, data, _part)
    if few:
        fewer, line = keep_labels(datasets.train, few, seed)
        datasets = datasets._replace(train=fewer, remarks=(*datasets.remarks, line))
    # After the split: slices of a volume, or windows of a scene, are in one set.
    train, remarks = as_asked(datasets.train, data)
    val = None if datasets.val is None else as_asked(datasets.val, data)[0]
    return datasets._replace(train=train, val=val, remarks=(*datasets.remarks, *remarks))


def as_asked(source: Source, data: DataConfig) -> tuple[Source, list[str]]:
    """Returns a source with the range and the readers of `data`, and remarks."""
    set_range(source, data.range, data.depth)
    return read_as_asked(source, data)


def _load_pairs(data: DataConfig, seed: int) -> Datasets:
    """Returns samples of two files. The evaluation sees the first file of every pair."""
    if data.group:
        raise ConfigError("data.group: data.pairs keeps the files of pairs together, and no groups")
    files = _LOAD[data.source](replace(data, holdout=0.0), seed)
    found = find_pairs(files.train, data if files.val is None else replace(data, holdout=0.0), seed)
    first, second = (as_asked(_part(files.train, rows), data)[0] for rows in found.train)
    train = PairSource(first, second)
    if any(len(view) != len(rows) for view, rows in zip(train.views, found.train)):
        raise ConfigError(
            "data.pairs: files that give several images (data.window, data.slices) make no pairs; "
            "--data.slices middle takes one slice of a volume"
        )
    val = files.val
    if val is not None and data.pairs == "folder":
        val = _part(val, first_files(val))
    elif val is None and len(found.held_out):
        val = _part(files.train, found.held_out)
    held_out = "" if val is None else f"; {len(val)} first files held out"
    note = f"{len(train)} pairs of files of {len(train.classes)} classes{held_out}"
    remarks = (*files.remarks, *found.remarks)
    val = None if val is None else as_asked(val, data)[0]
    return Datasets(train, val, note, remarks)


def find_images(folder: str | Path, channels: int = 3) -> list[str]:
    """Returns the names of all images below `folder`, relative to `folder` and sorted.

    channels: value of data.channels.

    An image is a file with an extension of EXTENSIONS, in any case. Files of FIELDS are images in
    a folder without images of EXTENSIONS, and .npy files if `channels` is not 3. Hidden files and
    folders are skipped. Symbolic links are followed (a link back to a folder above it
    only once). No file is decoded. Raises FileNotFoundError, NotADirectoryError, or
    ConfigError (a ValueError) if there is no image.
    """
    data = DataConfig(channels=channels)
    found = choose_tree(lambda extensions: open_folder(folder, extensions), data).find("")
    if not found.names:
        raise no_image(str(folder), found)
    return found.names


def _load_folder(data: DataConfig, seed: int) -> Datasets:
    path = _path(data)
    if is_url(path):
        return _load_url(path, data, seed)
    root = Path(path).expanduser()
    layout = kept_layout(root, data)
    if layout is None:
        if holds_tables(root):
            return _load_tables(data, seed)
        layout = list_folder(root, data)
    return _sets(layout, data, seed, lambda *columns: FolderSource(root, *columns))


def _load_url(path: str, data: DataConfig, seed: int) -> Datasets:
    """Loads the images below the URL of a folder."""
    if path.lower().endswith(ENDINGS):
        return _load_tables(data, seed)
    names = names_below(path)
    tree = choose_tree(lambda extensions: Names(names, extensions), data)
    ends = {os.path.splitext(name)[1].lower() for name in names}
    if ends & set(ENDINGS) and data.reader == "auto" and not tree.holds_image():
        return _load_tables(data, seed)
    layout = arrange(tree, data, path)
    return _sets(layout, data, seed, lambda *columns: RemoteSource(path, *columns))


def _load_zip(data: DataConfig, seed: int) -> Datasets:
    given = _path(data)
    path = local_copy(given) if is_url(given) else Path(given).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.path: there is no zip file {str(path)!r}")
    archive = ZipArchive(path)
    tree = choose_tree(lambda extensions: Names(archive.infos, extensions), data)
    layout = arrange(tree, data, str(path))
    layout = layout._replace(remarks=[*archive.remarks, *layout.remarks])
    return _sets(layout, data, seed, lambda *columns: ZipSource(archive, *columns))


# Makes a source of names, labels and classes.
_Make = Callable[[Sequence[str], "np.ndarray | None", tuple[str, ...]], Source]


def _sets(layout: Layout, data: DataConfig, seed: int, make: _Make) -> Datasets:
    """Returns the train and the val set of a layout. make: makes a source of names."""
    if data.source in ("folder", "zip") and data.labels not in ("auto", "none"):
        layout = labels_of_list(layout, data.labels, data.target)
    remarks = tuple(layout.remarks)
    train = make(layout.train, layout.labels, layout.classes)
    if layout.captions is not None and isinstance(train, NamedImages):
        train.captions = np.array(layout.captions, dtype=object)
    if len(layout.val):
        val = make(layout.val, layout.val_labels, layout.classes)
        note = f"{_summary(train, data)}; held out: {layout.val_folder}, {len(val)}"
        if data.group:
            remarks = (*remarks, f"data.group not used: {layout.val_folder} is held out already")
        return Datasets(train, val, note, remarks)
    why = f" ({layout.why})" if layout.why else ""
    return _hold_out(train, data, seed, why, layout.groups, remarks)


def _load_list(data: DataConfig, seed: int) -> Datasets:
    images = ImageList(_path(data))
    layout = arrange_list(images, data)
    if is_url(images.folder):
        folder = images.folder
        return _sets(layout, data, seed, lambda *columns: RemoteSource(folder, *columns))
    root = images.path.parent
    return _sets(layout, data, seed, lambda *columns: FolderSource(root, *columns))


def _load_tables(data: DataConfig, seed: int) -> Datasets:
    tables = open_tables(_path(data), data)
    return _sets(tables.layout, replace(data, source=TABLES[0]), seed, tables.source)


def _load_shards(data: DataConfig, seed: int) -> Datasets:
    sets = open_shard_sets(_path(data), data)
    if sets.val is None:
        return _hold_out(sets.train, data, seed, sets.why, None, sets.remarks)
    note = f"{_summary(sets.train, data)}; held out: {sets.val_folder}, {len(sets.val)}"
    return Datasets(sets.train, sets.val, note, sets.remarks)


def _load_digits(data: DataConfig, seed: int) -> Datasets:
    # "Optical Recognition of Handwritten Digits" (UCI, CC BY 4.0), the test set, as scikit-learn
    # has it: images (N, 8, 8) uint8 from 0 to 16, labels (N,).
    with (
        resources.as_file(resources.files("mocofast.data") / "digits.npz") as file,
        np.load(file) as digits,
    ):
        levels, labels = digits["images"], digits["labels"].astype(np.int64)
    gray = np.rint(levels * (255 / 16)).astype(np.uint8)
    images = np.repeat(gray[..., None], data.channels, axis=3)
    classes = tuple(str(digit) for digit in range(10))
    kept, held_out = stratified_holdout(labels, DIGITS_HOLDOUT, seed=0)
    train = ArraySource(images[kept], labels[kept], classes, "digits train")
    val = ArraySource(images[held_out], labels[held_out], classes, "digits val")
    return Datasets(train, val, f"{len(train)} digits of 8 x 8 pixels; {len(val)} held out")


def _load_cifar(data: DataConfig, seed: int) -> Datasets:
    from torchvision import datasets

    root = Path(_path(data)).expanduser()
    dataset = getattr(datasets, data.source.upper())
    parts: list[Any] = []
    try:
        for is_train in (True, False):
            try:
                parts.append(dataset(root, train=is_train))
            except RuntimeError:  # torchvision raises RuntimeError if the files are absent
                parts.append(dataset(root, train=is_train, download=True))
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"data.path: {data.source} is not in {str(root)!r} and could not be downloaded "
            f"({error}); put {dataset.url} there, unpacked to {dataset.base_folder}/"
        ) from error
    train, val = (
        ArraySource(part.data, np.array(part.targets), tuple(part.classes), f"{data.source} {name}")
        for part, name in zip(parts, ("train", "test"))
    )
    note = f"{data.source}: {len(train)} images; held out: its test set, {len(val)}"
    return Datasets(train, val, note)


# The function that loads a source, for every name of SOURCES.
_LOAD: dict[str, Callable[[DataConfig, int], Datasets]] = {
    "folder": _load_folder,
    "shards": _load_shards,
    "list": _load_list,
    "zip": _load_zip,
    "parquet": _load_tables,
    "hf": _load_tables,
    "digits": _load_digits,
    "cifar10": _load_cifar,
    "cifar100": _load_cifar,
}


def _path(data: DataConfig) -> str:
    if not data.path:
        raise ConfigError(f"data.path must name a folder for data.source={data.source}: got none")
    return data.path


def _hold_out(
    source: Source,
    data: DataConfig,
    seed: int,
    remark: str = "",
    groups: np.ndarray | None = None,
    remarks: tuple[str, ...] = (),
) -> Datasets:
    """Holds a share of labelled images out for the val set.

    remark: for the note, after the summary. remarks: of the result.
    groups: (N,) int64. Images of a group stay together.
    """
    if source.labels is None:
        return Datasets(source, None, f"{len(source)} images without labels", remarks)
    usable = np.flatnonzero(source.labels >= 0)
    if groups is None:
        strata = source.labels[usable] * (data.target == "class")
        held_out = stratified_holdout(strata, data.holdout, seed)[1]
    else:
        held_out = grouped_holdout(groups[usable], data.holdout, seed)
    held_out = usable[held_out]
    kept = np.setdiff1d(np.arange(len(source)), held_out)
    summary = _summary(source, data) + remark
    if not len(held_out):
        return Datasets(source, None, f"{summary}, none held out", remarks)
    summary += f"; {len(held_out)} of them held out"
    return Datasets(_part(source, kept), _part(source, held_out), summary, remarks)


def _summary(source: Source, data: DataConfig) -> str:
    kind = "of {} classes" if data.target == "class" else "with {} different labels"
    unlabelled = 0 if source.labels is None else int((source.labels < 0).sum())
    text = f"{len(source)} images {kind.format(len(source.classes))}"
    return f"{text}, {unlabelled} unlabelled" if unlabelled else text
