"""Finds image files below a folder or among the names of an archive, and counts what is left out.

Patterns (`data.include`, `data.exclude`) are of `fnmatch`, on paths relative to the root. `*`
also matches `/`. A pattern that matches a folder matches all files below the folder.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple, Protocol

from mocofast.config import ConfigError
from mocofast.data.names import FIELDS, extension_of
from mocofast.errors import describe_error, printable

SHOWN = 5  # kinds, folders or names that a line lists
DEEPEST = 200  # levels of folders on a disk

# Names of folders that mostly hold masks, and classes of pictures such as "with_mask" left alone.
_MASKS = re.compile(
    r"(?!with|no[_ -]).*(masks?|labels?|annotations?|segmentations?|ground[_ -]?truths?|trimaps?)"
    r"|segmentation.*|gt|seg"
)
# Names of folders that hold a part of a set.
SET_NAMES = frozenset(
    {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
    | {"unlabeled", "unlabelled"}
)
# Pictures that no loader reads, and what converts them.
_PICTURES = frozenset({".heic", ".heif", ".avif", ".gif", ".svg", ".psd", ".raw", ".dng", ".cr2"})


class Patterns:
    """Decides which paths are used."""

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        """include: a used path matches one of the patterns. () includes all paths.
        exclude: a used path matches none of the patterns.
        """
        self.include, self.exclude = tuple(include), tuple(exclude)
        self._include, self._exclude = _compiled(include), _compiled(exclude)

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def keeps(self, path: str) -> bool:
        """Returns whether a path relative to the root is used."""
        if self._exclude is not None and self._exclude.match(path):
            return False
        return self._include is None or self._include.match(path) is not None


def _compiled(patterns: Sequence[str]) -> re.Pattern[str] | None:
    if not patterns:
        return None
    both = [form for text in patterns for form in (text, f"{text.rstrip('/')}/*")]
    return re.compile("|".join(fnmatch.translate(form.removeprefix("./")) for form in both))


ALL = Patterns()


class Found(NamedTuple):
    """The files below one folder.

    names: paths of the images relative to the root, sorted.
    kinds: how many files of other kinds there are, {".txt": 3}. Hidden files do not count.
    excluded: number of images that the patterns leave out.
    unreadable: folders that cannot be listed, {path: reason}.
    masks: images below a folder named like masks, {path of the folder: number}.
    sets: images below a folder named like a set (train, valid, ...), {path of the folder: number}.
    """

    names: list[str]
    kinds: Counter[str]
    excluded: int
    unreadable: dict[str, str]
    masks: dict[str, int]
    sets: dict[str, int]

    def plus(self, other: Found) -> Found:
        """Returns the files of two folders together."""
        return Found(
            sorted(self.names + other.names),
            self.kinds + other.kinds,
            self.excluded + other.excluded,
            {**self.unreadable, **other.unreadable},
            {**self.masks, **other.masks},
            {**self.sets, **other.sets},
        )

    def left_out(self) -> str:
        """Returns a line that says what was left out, by kind and number, or "" for nothing."""
        parts = []
        if self.kinds:
            count = self.kinds.total()
            parts.append(f"{counted(count, 'file')} of other kinds ignored: {listed(self.kinds)}")
            pictures = sorted(self.kinds.keys() & _PICTURES)
            if pictures:
                heif = " (pip install pillow-heif, and --data.include '*.heic,*.jpg' reads .heic)"
                convert = f"convert {', '.join(pictures)} to PNG or JPEG to use them"
                parts.append(convert + heif * bool({".heic", ".heif"} & set(pictures)))
            fields = sorted(self.kinds.keys() & FIELDS - _PICTURES)
            if fields:
                parts.append(f"--data.include '*{fields[0]}' reads {fields[0]}")
            packed = [kind for kind in (".gz", ".tgz") if kind in self.kinds]
            if packed:
                parts.append("gunzip unpacks .tar.gz, and data.source=shards reads .tar")
        if self.excluded:
            parts.append(
                f"{counted(self.excluded, 'image')} left out by data.include and data.exclude"
            )
        return "; ".join(parts)

    def warnings(self) -> list[str]:
        """Returns lines about folders that cannot be read, and about folders of masks."""
        lines = []
        if self.unreadable:
            first, reason = next(iter(self.unreadable.items()))
            count = counted(len(self.unreadable), "folder")
            lines.append(f"{count} cannot be read and left out: {shortened([first])} ({reason})")
        by_name: dict[str, list[str]] = {}
        for folder in self.masks:
            by_name.setdefault(folder.rpartition("/")[2], []).append(folder)
        for name, folders in by_name.items():
            images = sum(self.masks[folder] for folder in folders)
            if images == len(self.names):
                continue  # the set is of masks
            patterns = sorted({f"*/{name}" if "/" in folder else name for folder in folders})
            lines.append(
                f"{counted(len(folders), 'folder')} named {name} ({shortened(folders)}) with "
                f"{images:,} of {counted(len(self.names), 'image')}: masks or labels are trained "
                f"on like pictures; --data.exclude '{','.join(patterns)}' leaves them out"
            )
        return lines


class Tree(Protocol):
    """Folders and files, on a disk or in an archive."""

    def entries(self, folder: str) -> tuple[list[str], bool]:
        """Returns the names of the folders directly in a folder, and whether an image is there.

        folder: "" or a path that ends in "/".
        """
        ...

    def find(self, folder: str, patterns: Patterns = ALL) -> Found:
        """Returns the files below a folder. `names` are relative to the root of the tree."""
        ...

    def holds_image(self, patterns: Patterns = ALL) -> bool:
        """Returns whether there is an image. Looks no further than the first one."""
        ...


_FILE, _FOLDER, _SPECIAL = "file", "folder", "pipe, socket or device"


def _kind(entry: os.DirEntry[str]) -> str:
    """Returns the kind of an entry of a folder. Of a link: the kind of its target.

    A link that leads nowhere counts as a file: the loader skips and names the link.
    """
    try:
        if entry.is_file():
            return _FILE
        if entry.is_dir():
            return _FOLDER
        if entry.is_symlink():
            os.stat(entry.path)  # raises for a link that leads nowhere
    except OSError:
        return _FILE
    return _SPECIAL  # to read one may wait for ever


def _visible(folder: str | Path) -> Iterator[tuple[str, str]]:
    """Yields names and kinds of the entries of a folder, but hidden ones. Raises OSError."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] != ".":
                yield entry.name, _kind(entry)


# Folders that were looked into: {path: (time of modification in ns, number, device)}, before the
# look. None: a folder that cannot be read.
Seen = dict[str, "tuple[int, int, int] | None"]


def state_of(folder: str | Path) -> tuple[int, int, int] | None:
    """Returns the state of a folder, which changes with the names in the folder, as in `Seen`."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_dev


class Disk:
    """The tree below a folder of a disk. Hidden files and folders are skipped. Symbolic links are
    followed (a link back to a folder above only once).
    """

    def __init__(self, root: str | Path, extensions: Set[str], seen: Seen | None = None) -> None:
        """extensions: of an image, in lower case, with a dot.
        seen: takes every folder that is looked into.
        """
        self.root, self._extensions = Path(root), extensions
        self._seen: Seen = {} if seen is None else seen

    def _look(self, folder: str | Path) -> Iterator[tuple[str, str]]:
        """Yields names and kinds of the entries of a folder. Raises OSError."""
        self._seen.setdefault(str(folder), state_of(folder))
        return _visible(folder)

    def entries(self, folder: str) -> tuple[list[str], bool]:
        folders, images = [], False
        for name, kind in self._look(self.root / folder):
            if kind == _FOLDER:
                folders.append(name)
            elif not images and kind == _FILE:
                images = extension_of(name) in self._extensions
        return sorted(folders), images

    def find(self, folder: str, patterns: Patterns = ALL) -> Found:
        found = Found([], Counter(), 0, {}, {}, {})
        excluded = self._scan(str(self.root / folder), folder, frozenset(), patterns, found)
        found.names.sort()
        return found._replace(excluded=excluded)

    def holds_image(self, patterns: Patterns = ALL) -> bool:
        return self._holds_image("", frozenset(), patterns)

    def _holds_image(self, prefix: str, above: frozenset[str], patterns: Patterns) -> bool:
        real = os.path.realpath(self.root / prefix)
        if real in above or len(above) >= DEEPEST:
            return False
        folders = []
        # A folder that cannot be read holds none. `find` names the folder.
        with contextlib.suppress(OSError):
            for name, kind in self._look(self.root / prefix):
                if kind == _FOLDER:
                    folders.append(name)
                elif (
                    kind == _FILE
                    and extension_of(name) in self._extensions
                    and patterns.keeps(prefix + name)
                ):
                    return True
        return any(
            self._holds_image(f"{prefix}{name}/", above | {real}, patterns)
            for name in sorted(folders)
        )

    def _scan(
        self, folder: str, prefix: str, above: frozenset[str], patterns: Patterns, found: Found
    ) -> int:
        """Adds the files of a folder to `found`. Returns the number of excluded images."""
        real = os.path.realpath(folder)
        if real in above:
            return 0
        names, folders, excluded = [], [], 0
        try:
            if len(above) >= DEEPEST:
                raise OSError(f"below {DEEPEST} levels of folders")
            for name, kind in self._look(folder):
                if kind == _FOLDER:
                    folders.append(name)
                elif kind != _FILE:
                    found.kinds[kind] += 1
                elif extension_of(name) in self._extensions:
                    names.append(prefix + name)
                else:
                    found.kinds[os.path.splitext(name)[1].lower()] += 1
        except OSError as error:
            if not above:
                raise ConfigError(f"data.path: {folder!r} cannot be read ({error})") from error
            self._seen[folder] = None
            found.unreadable[prefix.rstrip("/")] = describe_error(error)
        if patterns:
            kept = [name for name in names if patterns.keeps(name)]
            excluded = len(names) - len(kept)
            names = kept
        # Sorted runs: the sort of all names then only merges runs.
        names.sort()
        found.names.extend(names)
        for name in sorted(folders):
            before = len(found.names)
            excluded += self._scan(
                os.path.join(folder, name), f"{prefix}{name}/", above | {real}, patterns, found
            )
            _note_folder(found, prefix, name, len(found.names) - before)
        return excluded


class Names:
    """The tree of an archive, from the paths of its files."""

    def __init__(self, paths: Iterable[str], extensions: Set[str], hidden: bool = False) -> None:
        """paths: with "/" between folders. extensions: as for `Disk`.

        hidden: keep names that begin with a dot, too.
        """
        self._extensions = extensions
        self._paths = [
            path
            for path in paths
            if hidden or not any(part.startswith(".") for part in path.split("/"))
        ]

    def entries(self, folder: str) -> tuple[list[str], bool]:
        below = [path[len(folder) :] for path in self._paths if path.startswith(folder)]
        folders = {path.partition("/")[0] for path in below if "/" in path}
        images = any(self._is_image(path) for path in below if "/" not in path)
        return sorted(folders), images

    def holds_image(self, patterns: Patterns = ALL) -> bool:
        return any(self._is_image(path) and patterns.keeps(path) for path in self._paths)

    def find(self, folder: str, patterns: Patterns = ALL) -> Found:
        found = Found([], Counter(), 0, {}, {}, {})
        excluded = 0
        for path in self._paths:
            if not path.startswith(folder):
                continue
            if not self._is_image(path):
                found.kinds[os.path.splitext(path)[1].lower()] += 1
            elif patterns.keeps(path):
                found.names.append(path)
                *folders, _ = path[len(folder) :].split("/")
                above = folder
                for name in folders:
                    _note_folder(found, above, name, 1)
                    above += f"{name}/"
                    if above[:-1] in found.masks:
                        break
            else:
                excluded += 1
        found.names.sort()
        return found._replace(excluded=excluded)

    def _is_image(self, path: str) -> bool:
        return extension_of(path) in self._extensions


def _note_folder(found: Found, prefix: str, name: str, images: int) -> None:
    """Counts the images of a folder that is named like masks or like a set."""
    if not images:
        return
    lower = name.lower()
    if is_mask_name(lower):
        inside = [folder for folder in found.masks if folder.startswith(f"{prefix}{name}/")]
        for folder in inside:  # a folder of masks in a folder of masks counts once
            del found.masks[folder]
        found.masks[prefix + name] = found.masks.get(prefix + name, 0) + images
    elif lower in SET_NAMES:
        found.sets[prefix + name] = found.sets.get(prefix + name, 0) + images


def is_mask_name(name: str) -> bool:
    """Returns whether a name in lower case is mostly a name of masks or labels."""
    return _MASKS.fullmatch(name) is not None


def counted(count: int, noun: str) -> str:
    """Returns "1 file", or "2,000 files"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def shortened(names: Iterable[str]) -> str:
    """Returns the first names, and how many more there are."""
    # Names of files may hold bytes that are no text.
    every = [printable(name) for name in names]
    rest = len(every) - SHOWN
    return ", ".join(every[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def listed(kinds: Counter[str]) -> str:
    """Returns the most frequent kinds with their numbers: "20 .heic, 6 .gif"."""
    return shortened(
        f"{count:,} {kind or 'without extension'}"
        for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    )
