"""Finds the layout and the sets of a folder of annotated images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mocofast.config import ConfigError
from mocofast.detection import coco, voc
from mocofast.detection.options import SetOptions
from mocofast.detection.sets import AnnotatedSet
from mocofast.settings import nearest


class Sets(NamedTuple):
    """The images to train on, and to evaluate on."""

    train: AnnotatedSet
    val: AnnotatedSet


def load_sets(data: SetOptions, kind: str) -> Sets:
    """Reads the annotations of a folder.

    kind: boxes, masks (of objects) or pixels (a class for every pixel).
    Raises ConfigError for a folder without annotations of the kind, and for unreadable files.
    """
    if not data.path:
        raise ConfigError("data.path: expected the folder of a set, got nothing (--data.path DIR)")
    path = Path(data.path)
    if not path.is_dir():
        raise ConfigError(f"data.path: {path} is no folder")
    layouts: dict[str, Any] = {"voc": voc, "coco": coco}
    for name, layout in layouts.items():
        if data.layout in ("auto", name) and (known := layout.find(path, kind)):
            names = [
                _chosen("data.train", data.train, known, ("trainval", "train")),
                _chosen("data.val", data.val, known, ("test", "val", "valid")),
            ]
            if not data.val and names[0][0].endswith("train"):
                names[1] = _chosen("data.val", (), known, ("val", "valid", "test"))
            train, val = layout.load([[known[n] for n in part] for part in names], data, kind)
            return Sets(train, val)
    expected = "ImageSets/Main/*.txt and Annotations/*.xml (Pascal VOC)"
    if kind != "boxes":
        expected = "ImageSets/Segmentation/*.txt and SegmentationClass/*.png (Pascal VOC)"
    raise ConfigError(f"data.path: {path} has neither {expected} nor annotations/*.json (COCO)")


def _chosen(
    option: str, given: Sequence[str], known: dict[str, Any], usual: Sequence[str]
) -> list[str]:
    """Returns the names of sets. given: by the user. usual: names to look for, the first wins."""
    listed = ", ".join(sorted(known)[:12])
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{option}: no set {name!r}{nearest(name, known)} (there are: {listed})"
            )
    if given:
        return list(given)
    if option == "data.train" and not any(_is(name, "test") for name in known):
        usual = usual[1:]  # trainval beside no test would hold the images of val
    for word in usual:
        found = [name for name in known if _is(name, word)]
        if len(found) == 1:
            return found
        if found:
            raise ConfigError(f"{option}: expected names of sets; there are several: {listed}")
    raise ConfigError(f"{option}: expected names of sets (there are: {listed})")


def _is(name: str, word: str) -> bool:
    """Returns whether a set is called by `word`, such as val2017, VOC2007/val or val for "val"."""
    return name.rpartition("/")[2].rstrip("0123456789").rstrip("_-") == word
