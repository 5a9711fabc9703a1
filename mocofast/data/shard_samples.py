"""The samples of a tar shard: which member is the image of a sample, and which label it has.

The key of a member is the name up to the first dot after the last slash, as in WebDataset.

- `key.jpg`, or another image extension, is the image of the sample `key`. Of two such images the
  first in the shard is used, unless patterns leave it out. Images `key.other.jpg` beside an
  image `key.jpg` are left out.
- Without an image `key.jpg`, every image `key.other.jpg` is a sample with the key `key.other`.
  Masks (`key.mask.png`) are left out if the key has other images.
- `.cls` holds the label, an integer or the name of a class. `.json` holds the label as `label`.
  A label has the key of its image, in full or up to the first dot.
- `.txt` holds the caption, with the key of its image as a label.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from mocofast.config import ConfigError
from mocofast.data.finding import ALL, Patterns, counted, is_mask_name, listed, shortened
from mocofast.data.names import DOUBLE, EXTENSIONS, extension_of
from mocofast.data.tar_members import Member

LABELS = (".cls", ".json")
TEXT = ".txt"  # captions
LONGEST_LABEL = 200  # characters. A longer text or number is no label
LARGEST_LABEL_FILE = 16 << 20  # bytes. Larger files hold no label
# Integer labels from SPARSE on become names of classes if fewer than a tenth of the numbers occur.
SPARSE = 10_000


class NoImageError(ConfigError):
    """Shards hold no image."""


class Members(NamedTuple):
    """The m images of one shard, in the order of the shard, and what was left out."""

    names: np.ndarray  # (m,) bytes
    offsets: np.ndarray  # (m,) int64: start of the image file in the shard, in bytes
    sizes: np.ndarray  # (m,) int64: length of the image file, in bytes
    labels: np.ndarray  # (m,) int64: numbers of `label_names`, -1 for no label
    label_names: np.ndarray  # (k,) bytes
    text_offsets: np.ndarray  # (m,) int64: start of the caption in the shard, in bytes
    text_sizes: np.ndarray  # (m,) int64: length of the caption, in bytes. 0 for no caption
    left_out: dict[str, Any]  # {reason: number of members}, "kinds": {".txt": 3}


class MemberReader:
    """Takes the members of a shard in their order."""

    def __init__(self, extensions: Set[str] = EXTENSIONS) -> None:
        """extensions: of images, in lower case."""
        self._extensions = extensions
        self._images: dict[str, tuple[int, int] | str] = {}  # (offset, size), or a link's target
        # Labels by the name without extension: (preference, text)
        self._labels: dict[str, tuple[int, str]] = {}
        self._label_links: list[tuple[str, str]] = []  # (name, target)
        self._texts: dict[str, tuple[int, int]] = {}  # captions: places by name without extension
        self._left_out: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()

    def add(self, member: Member, link: str | None, read: Callable[[Member], bytes]) -> None:
        """Adds a file or a link.

        link: name of the target, None for a file.
        read: returns the content of the member. Called for labels.
        """
        name = member.name
        base = name.rfind("/") + 1
        dot = name.rfind(".", base)
        extension = name[dot:].lower() if dot >= 0 else ""
        if extension in DOUBLE:  # rare: a second search for the dot in every name costs 7 %
            extension = extension_of(name)
        if name.startswith(".", base):
            self._left_out["hidden files"] += 1
        elif extension in self._extensions and extension not in LABELS:
            if name in self._images:
                self._left_out["images whose name occurs twice"] += 1
            else:
                place = (member.offset_data, member.size)
                self._images[name] = place if link is None else link
        elif extension not in LABELS:
            self._kinds[extension] += 1
            if extension == TEXT and link is None:
                self._texts.setdefault(name[:dot], (member.offset_data, member.size))
        elif link is not None:
            self._label_links.append((name, link))
        elif member.size > LARGEST_LABEL_FILE:
            self.leave_out(f"label files of more than {LARGEST_LABEL_FILE >> 20} MiB")
        elif label := _label(extension, read(member)):
            self._add_label(name[:dot], label)

    def leave_out(self, reason: str) -> None:
        """Counts a member that is left out. reason: words such as "sparse files"."""
        self._left_out[reason] += 1

    def _add_label(self, stem: str, label: tuple[int, str]) -> None:
        if label[0] < self._labels.setdefault(stem, label)[0]:
            self._labels[stem] = label

    def finish(self) -> Members:
        """Returns the images with their labels."""
        places: dict[str, tuple[int, int]] = {}
        for name, found in self._images.items():
            place = self._follow(name) if isinstance(found, str) else found
            if place is None:
                self._left_out["links to images that the shard lacks"] += 1
            else:
                places[name] = place
        labels = self._labels_of(list(places))
        label_names = sorted({text for text in labels if text is not None})
        number = {text: i for i, text in enumerate(label_names)}
        table = np.array(list(places.values()), dtype=np.int64).reshape(-1, 2)
        texts = self._texts
        captions = [(0, 0)] * len(places)
        if texts:
            captions = [
                texts.get(name[: name.rfind(".")]) or texts.get(key_of(name)[0]) or (0, 0)
                for name in places
            ]
        text_table = np.array(captions, dtype=np.int64).reshape(-1, 2)
        left_out: dict[str, Any] = dict(self._left_out)
        if self._kinds:
            left_out["kinds"] = dict(self._kinds)
        return Members(
            np.array([os.fsencode(name) for name in places], dtype=np.bytes_),
            table[:, 0],
            table[:, 1],
            np.array([-1 if text is None else number[text] for text in labels], dtype=np.int64),
            np.array([text.encode() for text in label_names], dtype=np.bytes_),
            text_table[:, 0],
            text_table[:, 1],
            left_out,
        )

    def _follow(self, name: str) -> tuple[int, int] | None:
        """Returns the place of an image, behind links."""
        for _ in range(10):  # a chain of links may be a loop
            place = self._images.get(name)
            if not isinstance(place, str):
                return place
            name = _target(name, place, self._images)
        return None

    def _labels_of(self, names: Sequence[str]) -> list[str | None]:
        """Returns the label of every image, or None."""
        for name, link in self._label_links:
            # Hard links name members, symbolic links name paths.
            for target in (link, posixpath.join(posixpath.dirname(name), link)):
                label = self._labels.get(posixpath.splitext(posixpath.normpath(target))[0])
                if label is not None:
                    self._add_label(posixpath.splitext(name)[0], label)
                    break
        labels = self._labels
        if not labels:
            return [None] * len(names)
        found = [labels.get(name[: name.rfind(".")]) for name in names]
        texts = [None if label is None else label[1] for label in found]
        if None not in texts:
            return texts
        # Labels of the key, such as key.cls or key.output.cls.
        by_key: dict[str, str] = {}
        for stem, (_, text) in labels.items():
            by_key.setdefault(key_of(stem)[0], text)
        images = Counter(key_of(name)[0] for name in names)
        for i, name in enumerate(names):
            if texts[i] is None:
                key = key_of(name)[0]
                own = labels.get(key)
                texts[i] = own[1] if own else by_key.get(key) if images[key] == 1 else None
        return texts


def _target(name: str, link: str, known: Any) -> str:
    """Returns the name of a link's target. Hard links name members, symbolic links name paths."""
    if link in known:
        return link
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def _label(extension: str, content: bytes) -> tuple[int, str] | None:
    """Returns (preference, text) of a label, the smallest preference first, or None."""
    is_json = extension == ".json"
    if not is_json and content.isdigit() and str(int(content[:20])).encode() == content:
        return 0, content.decode()  # most labels
    try:
        value = json.loads(content)["label"] if is_json else content.decode().strip()
        str(value).encode()  # JSON may hold half a character
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    try:
        number = int(value)
    except ValueError:
        text = str(value).strip()
        return (2 + is_json, text) if text and len(text) <= LONGEST_LABEL else None
    if not 0 <= number < 10**LONGEST_LABEL:
        return None
    return int(is_json), str(number)


def key_of(name: str) -> tuple[str, str]:
    """Returns the key and the extension of a member, split at the first dot."""
    dot = name.find(".", name.rfind("/") + 1)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :])


def choose_samples(
    names: Sequence[str], patterns: Patterns = ALL
) -> tuple[list[str], list[int], dict[str, Any]]:
    """Returns the keys of the samples, the number of the image of every sample, and what
    was left out, {reason: number}.

    names: of the images of a shard.
    patterns: choose among the names.
    """
    left_out: dict[str, Any] = {}
    used = range(len(names))
    if patterns:
        used_list = [i for i in used if patterns.keeps(names[i])]
        if len(used_list) < len(names):
            left_out["images that data.include and data.exclude leave out"] = len(names) - len(
                used_list
            )
    else:
        used_list = list(used)
    plain: dict[str, int] = {}  # {key: number} of key.jpg
    dotted: dict[str, list[int]] = {}  # {key: numbers} of key.other.jpg
    twins: list[tuple[int, int]] = []  # (left out, used)
    for i in used_list:
        name = names[i]
        dot = name.find(".", name.rfind("/") + 1)  # as `key_of`, in the least time
        key = name if dot < 0 else name[:dot]
        if dot >= 0 and name.find(".", dot + 1) >= 0:
            dotted.setdefault(key, []).append(i)
        elif plain.setdefault(key, i) != i:
            twins.append((i, plain[key]))
    samples = plain
    for key, group in dotted.items():
        if key in plain:
            twins += [(i, plain[key]) for i in group]
            continue
        pictures = [i for i in group if not _is_mask(names[i])] or group
        twins += [(i, pictures[0]) for i in group if i not in pictures]
        for i in pictures:
            stem = posixpath.splitext(names[i])[0]
            if samples.setdefault(stem, i) != i:
                twins.append((i, samples[stem]))
    if dotted:
        samples = dict(sorted(samples.items(), key=lambda item: item[1]))
    if twins:
        left_out["twins"] = len(twins)
        left_out["twin"] = [names[i] for i in min(twins)]
    return list(samples), list(samples.values()), left_out


def _is_mask(name: str) -> bool:
    return any(is_mask_name(word) for word in key_of(name)[1].lower().split(".")[:-1])


def is_left_out(value: Any) -> bool:
    """Returns whether a value has the form of `Members.left_out`. A damaged file has none."""
    if not isinstance(value, dict):
        return False
    kinds, twin = value.get("kinds", {}), value.get("twin", ["", ""])
    if not isinstance(kinds, dict) or not isinstance(twin, list):
        return False
    counts = [*kinds.values(), *(n for key, n in value.items() if key not in ("kinds", "twin"))]
    return (
        all(type(count) is int for count in counts)
        and len(twin) == 2
        and all(isinstance(name, str) for name in twin)
    )


def left_out_lines(left_out: Sequence[dict[str, Any]], captions: bool = False) -> list[str]:
    """Returns lines that say what was left out of shards, by reason and number.

    left_out: of every shard. captions: captions are read, and not left out.
    """
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    twin: list[str] = []
    for shard in left_out:
        kinds.update(shard.get("kinds", {}))
        twin = twin or shard.get("twin", [])
        reasons.update({k: v for k, v in shard.items() if isinstance(v, int)})
    if captions:
        kinds.pop(TEXT, None)
    twins = reasons.pop("twins", 0)
    parts = [f"{count:,} {reason}" for reason, count in reasons.items()]
    if kinds:
        parts.append(f"{counted(kinds.total(), 'member')} of other kinds ({listed(kinds)})")
    lines = [f"members of shards left out: {'; '.join(parts)}"] if parts else []
    if twins:
        unused, used = (shortened([name]) for name in twin)
        pattern = f"*{posixpath.splitext(used)[1]}"
        if pattern == f"*{posixpath.splitext(unused)[1]}":
            pattern = f"*.{key_of(used)[1]}"
        lines.append(
            f"{counted(twins, 'image')} not used, because another image has the same key: "
            f"{used} is used, {unused} is not; --data.exclude '{pattern}' makes the other choice"
        )
    return lines


class Numbering(NamedTuple):
    """The numbers of the classes. number: {label as text: number}, () for unlabelled samples."""

    classes: tuple[str, ...]
    number: dict[str, int]


def number_labels(texts: set[str], names: tuple[str, ...], where: str) -> Numbering:
    """Returns the classes of labels.

    texts: the labels that occur.
    names: names of classes from META, or ().
    where: the shards, for the error.

    Integers are numbers of `names`, or names of themselves. Large integers with gaps
    are numbered anew. Texts are names of classes, in the order of `names`, or sorted.
    Fewer than two labels leave the samples unlabelled.
    """
    if len(texts) < 2:
        return Numbering((), {})
    if not all(text.isdecimal() for text in texts):
        classes = names if texts <= set(names) else tuple(sorted(texts))
        return Numbering(classes, {name: i for i, name in enumerate(classes)})
    largest = max(map(int, texts))
    if not names and largest >= max(SPARSE, 10 * len(texts)):
        classes = tuple(sorted(texts, key=int))
        return Numbering(classes, {name: i for i, name in enumerate(classes)})
    classes = names or tuple(str(i) for i in range(largest + 1))
    if largest >= len(classes):
        raise ConfigError(
            f"data.path: label {largest} in {where}, but there are {len(classes)} classes"
        )
    return Numbering(classes, {str(i): i for i in range(len(classes))})
