"""The training and the evaluation shards of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mocofast.config import ConfigError, DataConfig
from mocofast.data.download import is_http, is_url
from mocofast.data.finding import Disk, Patterns, counted, shortened
from mocofast.data.layout import SetFolders, set_folders
from mocofast.data.names import EVERY, EXTENSIONS, FIELDS
from mocofast.data.remote import tree_below
from mocofast.data.shard_places import TarShard, find_shards, packed_shards
from mocofast.data.shard_samples import NoImageError, Numbering
from mocofast.data.shards import ShardSource, open_shards


class ShardSets(NamedTuple):
    """Training and evaluation samples."""

    train: ShardSource
    val: ShardSource | None
    val_folder: str
    why: str  # why there is no `val` beside labelled samples, in brackets, or ""
    remarks: tuple[str, ...]


def open_shard_sets(path: str, data: DataConfig) -> ShardSets:
    """Opens the shards of `data`.

    path: a folder, a file, a pattern or a URL, see `find_shards`.
    data: `train`, `val`, `include`, `exclude`, `labels` and `shuffle_window` are used.
    """
    root = Path(path).expanduser()
    patterns = Patterns(data.include, data.exclude)
    sets = SetFolders(data.train or ("",), data.val or None)
    if not is_url(path) and root.is_dir() and not _names_shards((*data.train, data.val)):
        sets = set_folders(Disk(root, {".tar"}), data)
    elif is_url(path) and not is_http(path) and not _names_shards((path, *data.train, data.val)):
        sets = set_folders(tree_below(path, frozenset({".tar"})), data)
    if data.group:
        raise ConfigError("data.group: shards have no folders or columns that are groups")
    if data.labels not in ("auto", "none"):
        raise ConfigError(
            f"data.labels: shards hold their labels, expected auto or none, got {data.labels!r}"
        )
    shards = [shard for part in sets.train for shard in find_shards(path, part)]
    unlabelled = Numbering((), {}) if data.labels == "none" else None
    train, extensions = _open_first(shards, data, unlabelled, patterns)
    remarks = (*packed_shards(path, sets.train[0]), *train.remarks)
    if sets.beside:
        remarks = (*remarks, f"{shortened(sets.beside)} not used")
    if train.labels is None or sets.val is None:
        return ShardSets(train, None, "", "", remarks)
    val_shards = find_shards(path, sets.val)
    val = open_shards(val_shards, 0, train.numbering, patterns, extensions)
    assert val.labels is not None
    known = np.flatnonzero(val.labels >= 0)
    if not len(known):
        return ShardSets(train, None, "", f" ({sets.val} has no labels)", remarks)
    if len(known) < len(val):
        count = counted(len(val) - len(known), "image")
        remarks = (*remarks, f"{count} of {sets.val} not evaluated: no class of the training")
        val = val.subset(known)
    return ShardSets(train, val, sets.val, "", remarks)


def _open_first(
    shards: Sequence[TarShard], data: DataConfig, numbering: Numbering | None, patterns: Patterns
) -> tuple[ShardSource, frozenset[str]]:
    """Returns the samples of shards, and the extensions of the images: the first that occur."""
    tries = (EVERY,) if data.reader != "auto" else (EXTENSIONS, FIELDS)
    error: NoImageError | None = None
    for extensions in tries:
        try:
            captions = data.captions != "none"
            return open_shards(
                shards, data.shuffle_window, numbering, patterns, extensions, captions
            ), extensions
        except NoImageError as found:
            error = error or found
    assert error is not None
    raise error


def _names_shards(parts: Sequence[str]) -> bool:
    """Returns whether parts of a set are named as files or patterns."""
    return any(part.endswith(".tar") or set(part) & set("*?{[") for part in parts)
