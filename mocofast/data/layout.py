"""Tells the training images, the evaluation images, their classes and their groups by folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mocofast.config import ConfigError, DataConfig
from mocofast.data.finding import (
    SET_NAMES,
    Disk,
    Found,
    Patterns,
    Tree,
    counted,
    shortened,
)
from mocofast.data.folders import no_image
from mocofast.data.names import EXTENSIONS

# Names of sets in lower case. Of several folders the first name wins.
TRAIN = ("train", "training")
UNLABELLED = ("unlabeled", "unlabelled")
EVALUATION = ("val", "valid", "validation", "dev", "test", "testing")

_MOST_DIGITS = 9  # of the level of a folder
_YEAR = re.compile(r"[-_]?(19|20)\d\d$")


class SetFolders(NamedTuple):
    """The folders of a set, as prefixes of names ("train/"), "" for the root."""

    train: tuple[str, ...]  # folders of training images
    val: str | None  # the folder of evaluation images
    beside: tuple[str, ...] = ()  # folders that belong to neither


class Layout(NamedTuple):
    """N training images and M evaluation images, by names relative to the root.

    A layout that was kept has the names as arrays of bytes.
    """

    train: Sequence[str]
    labels: np.ndarray | None  # (N,) int64, -1 for unlabelled images
    classes: tuple[str, ...]
    groups: np.ndarray | None  # (N,) int64: images of a group stay together
    val: Sequence[str]
    val_labels: np.ndarray | None  # (M,) int64
    val_folder: str  # "" without a folder of evaluation images
    why: str  # why `val_folder` is not used, or ""
    remarks: list[str]
    captions: list[str] | None = None  # N texts, "" for none


def arrange(tree: Tree, data: DataConfig, place: str) -> Layout:
    """Finds the images of a tree, their classes and groups.

    data: `train`, `val`, `include`, `exclude`, `labels` and `group` are used.
    place: the name of the tree, for errors.

    Training and evaluation images lie in folders that `set_folders` chooses. The class
    is the first folder below, behind folders that hold a single folder. All images lie in
    a class, and there are two classes or more, otherwise images are unlabelled.

    Raises ConfigError for a folder that is not there, and without images.
    """
    sets = set_folders(tree, data)
    patterns = Patterns(data.include, data.exclude)
    parts = [tree.find(folder, patterns) for folder in sets.train]
    found = parts[0]
    for part in parts[1:]:
        found = found.plus(part)
    if sets.train == ("",) and sets.val is not None:  # all but the evaluation images
        outside = [name for name in found.names if not name.startswith(sets.val)]
        found = found._replace(names=outside)
    if not found.names:
        raise no_image("/".join((place, *sets.train[0].split("/")[:-1])), found)
    remarks = [line for line in (found.left_out(),) if line] + found.warnings()
    if sets.beside:
        used = ", ".join(filter(None, (*sets.train, sets.val)))
        remarks.append(f"{shortened(sets.beside)} beside {used} not used")
    classes: tuple[str, ...] = ()
    labels = None
    if data.labels == "auto":
        classes, labels = _classes_of_parts(found.names, sets.train)
    remarks += _doubts(found, classes, sets, patterns)
    groups = None
    if data.group:
        groups = groups_of(found.names, sets.train, data.group, classed=labels is not None)
    layout = Layout(found.names, labels, classes, groups, [], None, "", "", remarks)
    if sets.val is None:
        return layout
    if data.labels not in ("auto", "none"):  # labels come from a list
        names = tree.find(sets.val, patterns).names
        return layout._replace(val=names, val_folder=sets.val)
    if labels is None:
        return layout
    return _with_evaluation(layout, tree.find(sets.val, patterns), sets)


def set_folders(tree: Tree, data: DataConfig) -> SetFolders:
    """Returns the folders of training and evaluation images.

    TRAIN beside one of EVALUATION, in any case of letters, or TRAIN alone. A folder of
    UNLABELLED beside TRAIN is trained on, too. Folders that hold only one folder are
    passed through, as the folder of an archive mostly is. Beside other folders, a folder
    named train may be a class (of vehicles).
    `data.train` and `data.val` take precedence.
    """
    folders, images = tree.entries("")
    prefix, sets = "", _choose(folders)
    while sets is None and not images and len(folders) == 1 and folders[0].lower() not in SET_NAMES:
        prefix += f"{folders[0]}/"
        try:
            folders, images = tree.entries(prefix)
        except OSError:  # a folder that cannot be read, which `Tree.find` reports
            break
        sets = _choose(folders)
    sets = sets or SetFolders((), None)
    train = tuple(prefix + folder for folder in sets.train)
    val = None if sets.val is None else prefix + sets.val
    if data.train:
        train = tuple(_given(tree, "train", folder, prefix, folders) for folder in data.train)
    if data.val:
        val = _given(tree, "val", data.val, prefix, folders)
        parts = (_first(folders, names) for names in (TRAIN, UNLABELLED))
        train = train or tuple(prefix + part for part in parts if part)
    val = None if val in train else val
    used = {*train, val}
    beside = tuple(f"{name}/" for name in folders if f"{prefix}{name}/" not in used)
    return SetFolders(train or ("",), val, beside if train and set(train) != {""} else ())


def _choose(folders: Sequence[str]) -> SetFolders | None:
    """Returns the sets among the names of folders, or None if there are none."""
    train, more, val = (_first(folders, names) for names in (TRAIN, UNLABELLED, EVALUATION))
    parts = tuple(part for part in (train, more) if part)
    if parts and (val or (train and len(folders) == len(parts))):
        return SetFolders(parts, val)
    return None


def _first(folders: Sequence[str], names: Sequence[str]) -> str | None:
    """Returns the first folder with one of `names`, as a prefix, or None."""
    # Of "Train" and "train", the name in lower case. COCO's "train2017" is "train".
    found = {_YEAR.sub("", folder.lower()): folder for folder in sorted(folders)}
    return next((f"{found[name]}/" for name in names if name in found), None)


def _given(tree: Tree, option: str, folder: str, prefix: str, folders: Sequence[str]) -> str:
    """Returns the prefix of a folder that an option names."""
    path = "" if folder in (".", "./") else folder.rstrip("/") + "/"
    for place in (path, prefix + path):
        try:
            entries = tree.entries(place)
        except OSError:
            continue
        if any(entries):
            return place
    there = shortened(f"{name}/" for name in folders) or "no folder"
    raise ConfigError(
        f"data.{option}: no images or folders in {folder!r} below data.path ({there})"
    )


def classes_of(names: list[str]) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Returns the class names, sorted, and labels (N,) int64.

    names: N paths, sorted.
    The class is the first folder in which the paths differ. Returns ((), None) if an
    image has no such folder.
    """
    start = _common_folder(names)
    first = [name[start:].partition("/") for name in names]
    classes = tuple(sorted({folder for folder, slash, _ in first if slash}))
    if len(classes) < 2 or not all(slash for _, slash, _ in first):
        return (), None
    label = {name: i for i, name in enumerate(classes)}
    return classes, np.array([label[folder] for folder, _, _ in first], dtype=np.int64)


def _common_folder(names: Sequence[str]) -> int:
    """Returns the length of the folders that all paths share. names: sorted."""
    if not names:
        return 0
    return _common_start(names[0], names[-1]).rfind("/") + 1


def _common_start(a: str, b: str) -> str:
    length = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return a[:length]


def _classes_of_parts(
    names: list[str], folders: Sequence[str]
) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Returns classes and labels of the images of several folders, -1 in folders without classes.

    names: N paths, sorted.
    folders: prefixes of all paths.
    """
    if len(folders) == 1:
        return classes_of(names)
    labels = np.full(len(names), -1, dtype=np.int64)
    found = []
    for folder in folders:
        rows = np.flatnonzero([name.startswith(folder) for name in names])
        own, numbers = classes_of([names[row] for row in rows])
        if numbers is not None:
            found.append((rows, own, numbers))
    classes = tuple(sorted({name for _, own, _ in found for name in own}))
    for rows, own, numbers in found:
        labels[rows] = np.searchsorted(classes, own)[numbers]
    return (classes, labels) if classes else ((), None)


def groups_of(
    names: Sequence[str], folders: Sequence[str], level: str, classed: bool = False
) -> np.ndarray:
    """Returns the group of every image, (N,) int64.

    names: N paths.
    folders: prefixes of the paths.
    level: number of the folder below that names the group, 1 is the first.
    classed: the first folder in which paths differ is the class, which is no part of a group: a
        patient with images of two classes is one group.
    """
    if not level.isdecimal() or len(level) > _MOST_DIGITS or not int(level):
        shown = level if len(level) <= 40 else f"{level[:40]}..."
        raise ConfigError(
            "data.group: expected the level of the folders that are groups, from 1, or the column "
            f"of a list or a table (data.source=list, parquet, hf), got {shown!r}"
        )
    classes = {folder: _level_of_classes(names, folder) for folder in folders if classed}
    groups = []
    first: dict[str, str] = {}  # of every group, the first path of its folders
    for name in names:
        folder = next(folder for folder in folders if name.startswith(folder))
        *parts, _ = name[len(folder) :].split("/")
        if len(parts) < int(level):
            raise ConfigError(f"data.group: {name} has no folder at level {level}")
        path = "/".join(parts[: int(level)])
        kept = [part for i, part in enumerate(parts[: int(level)], 1) if i != classes.get(folder)]
        groups.append("/".join(kept) or path)
        first[groups[-1]] = min(path, first.get(groups[-1], path))
    return np.unique([first[group] for group in groups], return_inverse=True)[1].astype(np.int64)


def _level_of_classes(names: Sequence[str], folder: str) -> int:
    """Returns the level below a folder in which its paths differ first. names: sorted."""
    inside = [name[len(folder) :] for name in names if name.startswith(folder)]
    return inside[0][: _common_folder(inside)].count("/") + 1 if inside else 1


def grouped_holdout(groups: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Returns the images to hold out, sorted. Images of a group stay together.

    groups: (N,) int64.
    share: of the images, from 0 to 1. At least one group is kept, and one is held out
        for a positive share.
    seed: of the random order of the groups.
    """
    names, sizes = np.unique(groups, return_counts=True)
    if not share or len(names) < 2:
        return np.empty(0, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(names))
    before = np.cumsum(sizes[order]) - sizes[order]  # images in the groups before
    count = max(1, min(int((before < share * len(groups)).sum()), len(names) - 1))
    # The last group is left out if the share is met better without the group.
    if count > 1 and before[count - 1] + sizes[order[count - 1]] / 2 > share * len(groups):
        count -= 1
    return np.flatnonzero(np.isin(groups, names[order[:count]]))


def _doubts(
    found: Found, classes: tuple[str, ...], sets: SetFolders, patterns: Patterns
) -> list[str]:
    """Returns warnings about folders that may be no classes."""
    lines = []
    named = [name for name in classes if name.lower() in SET_NAMES]
    if named:
        first = named[0] if named[0].lower() not in EVALUATION else "FOLDER"
        lines.append(
            f"{shortened(named)} among the classes: if they are parts of the set, "
            f"--data.train {first} --data.val FOLDER name the parts"
        )
    below = {path.rpartition("/")[2] for path in found.sets} - set(classes)
    if below and not patterns:
        lines.append(
            f"folders named {shortened(sorted(below))} lie below the root, and images of all are "
            f"trained on; --data.include '*/train/*' keeps a part"
        )
    if len(classes) > max(9, len(found.names) // 2):
        lines.append(
            f"{counted(len(classes), 'class folder')} for {counted(len(found.names), 'image')}: "
            "if they are patients or dates, --data.labels none trains without labels"
        )
    return lines


def _with_evaluation(layout: Layout, found: Found, sets: SetFolders) -> Layout:
    """Adds the evaluation images that have a class of the training images."""
    assert sets.val is not None
    train = " and ".join(sets.train) or "data.path"
    layout = layout._replace(val_folder=sets.val)
    position = {name: i for i, name in enumerate(layout.classes)}
    folders = _class_folders([name[len(sets.val) :] for name in found.names], layout.classes)
    known = [i for i, folder in enumerate(folders) if folder in position]
    unknown = sorted({folder for folder in folders if folder} - position.keys())
    if not known and unknown:
        remark = (
            f"no folder of {sets.val} ({shortened(unknown)}) is among those of {train}"
            f" ({shortened(layout.classes)}): folders are not taken for classes"
        )
        remarks = [line for line in layout.remarks if "--data.labels none" not in line]
        return layout._replace(labels=None, classes=(), remarks=[*remarks, remark])
    if not known:
        nothing = "has no class folders" if found.names else "has no images"
        return layout._replace(why=f"{sets.val} {nothing}")
    remarks = layout.remarks
    if len(known) < len(folders):
        words = (
            f"that {train} lack{'s' * (len(sets.train) < 2)} ({shortened(unknown)})"
            if unknown
            else "without a class"
        )
        count = counted(len(folders) - len(known), "image")
        remarks = [*remarks, f"{count} of {sets.val} not evaluated: of classes {words}"]
    labels = np.array([position[folders[i]] for i in known], dtype=np.int64)
    return layout._replace(val=[found.names[i] for i in known], val_labels=labels, remarks=remarks)


def _class_folders(names: Sequence[str], classes: tuple[str, ...]) -> list[str]:
    """Returns the folder of every path that names its class, "" where there is no folder.

    Looks behind folders that all paths share, unless the first folder is a class.
    """
    known = set(classes)
    start = 0
    while True:
        folders = [name[start:].rpartition("/")[0].partition("/")[0] for name in names]
        if known & set(folders) or len(set(folders)) != 1 or not folders[0]:
            return folders
        start += len(folders[0]) + 1


def has_evaluation_folder(root: Path) -> bool:
    """Returns whether a folder of images has evaluation images beside its training images."""
    if not root.is_dir():
        return False
    return set_folders(Disk(root, EXTENSIONS), DataConfig()).val is not None
