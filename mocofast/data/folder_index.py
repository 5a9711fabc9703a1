"""The kept list of the images of a large folder, so that a start need not list the folder again.

The list is kept in the cache folder of the user. It is used only if it is of this version, of this
user, and if every folder that was looked into is unchanged: a folder has another time of
modification after a name in it was added, removed or changed. The content of image files is not
part of the list.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from mocofast import __version__, files
from mocofast.config import ConfigError, DataConfig
from mocofast.data.download import cache_folder
from mocofast.data.finding import Seen, state_of
from mocofast.data.folders import choose_tree, open_folder
from mocofast.data.layout import Layout, arrange
from mocofast.data.names import encoded
from mocofast.data.numpy_files import read_arrays

log = logging.getLogger(__name__)

FEWEST = 10_000  # images. A smaller folder is listed in a tenth of a second
# Seconds since the last change of a folder. A later change within the resolution of the file
# system's clock (up to 2 s), or by a server whose clock is late, would leave the time as it is.
YOUNG = 10
_OPTIONS = ("train", "val", "include", "exclude", "labels", "group", "channels", "reader")
_TEXTS = ("val_folder", "why", "remarks")
_ARRAYS = ("train", "labels", "groups", "val", "val_labels")


def place_of(root: Path, data: DataConfig) -> tuple[Path, str]:
    """Returns the file of a folder's list, and what the list must say that it is of."""
    options = {name: getattr(data, name) for name in _OPTIONS}
    user = os.getuid() if hasattr(os, "getuid") else 0
    of = json.dumps([1, __version__, user, os.path.realpath(root), options], default=list)
    name = hashlib.blake2b(of.encode(errors="surrogateescape"), digest_size=12).hexdigest()
    return cache_folder() / "folders" / f"{name}.npz", of


def kept_layout(root: Path, data: DataConfig) -> Layout | None:
    """Returns the kept images of a folder, as `arrange` does, but the names as arrays of bytes.

    data: the options of the folder.
    None: no list is kept, or a folder has changed.
    """
    place, of = place_of(root, data)
    try:
        kept = _read(place, of)
    except Exception:  # numpy and zipfile raise nearly any exception for a damaged file
        return None
    if kept is not None:
        log.info("the folders are unchanged, so the list of images is that of %s", place)
    return kept


def _read(place: Path, of: str) -> Layout | None:
    with place.open("rb") as file:
        if hasattr(os, "getuid") and os.fstat(file.fileno()).st_uid != os.getuid():
            return None
    arrays = read_arrays(place)
    texts = json.loads(str(arrays["texts"]))
    if texts.pop("of") != of:
        return None
    folders = np.char.decode(arrays["folders"], "utf-8", "surrogateescape").tolist()
    states = map(tuple, arrays["states"].reshape(-1, 3).tolist())
    if any(state_of(folder) != state for folder, state in zip(folders, states, strict=True)):
        return None
    columns: dict[str, Any] = {name: arrays.get(name) for name in _ARRAYS}
    if columns["val"] is None:
        columns["val"] = []
    return Layout(**columns, **texts, classes=tuple(map(os.fsdecode, arrays["classes"].tolist())))


def list_folder(root: Path, data: DataConfig) -> Layout:
    """Returns the images of a folder, as `arrange` does, and keeps them."""
    seen: Seen = {}
    began = time.time()
    tree = choose_tree(lambda extensions: open_folder(root, extensions, seen), data)
    layout = arrange(tree, data, str(root))
    _keep(root, data, layout, seen, began)
    return layout


def _keep(root: Path, data: DataConfig, layout: Layout, seen: Seen, since: float) -> None:
    """Keeps the images of a large folder, if nothing stands against it.

    seen: every folder that was looked into, with its state before.
    since: time.time() before the first look.
    """
    young = since - YOUNG
    if len(layout.train) < FEWEST or None in seen.values() or layout.captions is not None:
        return
    if any(state[0] > young * 1e9 for state in seen.values() if state is not None):
        return
    place, of = place_of(root, data)
    columns = {name: getattr(layout, name) for name in _ARRAYS}
    for name in ("train", "val"):
        columns[name] = encoded(columns[name])
    arrays = {name: column for name, column in columns.items() if column is not None}
    arrays["classes"] = encoded(layout.classes)
    arrays["folders"] = encoded([*seen])
    arrays["states"] = np.array(list(seen.values()), dtype=np.int64).ravel()
    texts = {name: getattr(layout, name) for name in _TEXTS} | {"of": of}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(place, str(os.getpid())) as part, part.open("wb") as file:
            np.savez(file, texts=json.dumps(texts), **arrays)
    except (OSError, ConfigError) as error:  # a read-only place, a full disk
        log.info("the list of images cannot be kept: %s", error)
