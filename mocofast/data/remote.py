"""Files at URLs: of HTTP servers, and of every storage that fsspec knows (s3://, gs://, hf://).

A file is copied into the cache folder, once for all processes of a machine, when its content is
needed. So a batch depends on no network, and an epoch reads local files only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request

import numpy as np

from mocofast.config import ConfigError
from mocofast.data.decoding import decode, read_header
from mocofast.data.download import (
    InvalidContent,
    NotStored,
    ask,
    cache_folder,
    check_no_page,
    download,
    is_http,
    is_url,
    named_version,
    storage,
    stored_file,
)
from mocofast.data.finding import Names
from mocofast.data.folders import FolderSource
from mocofast.errors import UnreachableError, describe_error

log = logging.getLogger(__name__)


def parent(url: str) -> str:
    """Returns the folder of a URL, without a slash at the end."""
    return url.rstrip("/").rpartition("/")[0]


def joined(folder: str, name: str) -> str:
    """Returns the URL of a name in a folder. A name that is a URL stays."""
    return name if is_url(name) else f"{folder.rstrip('/')}/{name}"


def names_below(url: str) -> list[str]:
    """Returns the names of all files below a folder, relative to the folder, sorted.

    Raises ConfigError where a folder cannot be listed, and FileNotFoundError for no folder.
    """
    if is_http(url):
        raise ConfigError(
            f"data.path: folders of HTTP servers cannot be listed, got {url}; name files, a list "
            "(--data.source list) or a pattern x-{000..099}.tar"
        )
    system, root = _storage(url)
    found = _answer(url, lambda: system.find(root))
    if not found:
        raise FileNotFoundError(f"data.path: there is no folder {url}")
    start = root.rstrip("/") + "/"
    return sorted(name.removeprefix(start) for name in found)


def matching(url: str) -> list[str]:
    """Returns the URLs that match a pattern with *, sorted. A URL without * stays."""
    if is_http(url) or not set("*?[") & set(url):
        return [url]
    system, pattern = _storage(url)

    def paths() -> list[str]:
        try:
            return list(system.glob(pattern))
        except FileNotFoundError:  # some storages raise it where the folder is missing
            return []

    return [system.unstrip_protocol(path) for path in _answer(url, paths)]


def exists(url: str) -> bool:
    """Returns whether there is a file at a URL."""
    if is_http(url):
        return bool(version(url))
    system, path = _storage(url)
    return _answer(url, lambda: stored_file(system, path)) is not None


def version(url: str) -> str:
    """Returns the server's name for the present content of a file, "" for no file."""
    if is_http(url):
        try:
            with contextlib.closing(ask(Request(url, method="HEAD"))) as answer:
                length = answer.headers.get("Content-Length", "")
                names = named_version(answer.headers).split("\n")
                return next(filter(None, names), f"?{length}")
        except OSError:
            return ""
    system, path = _storage(url)
    if _answer(url, lambda: stored_file(system, path)) is None:
        return ""
    return str(_answer(url, lambda: system.ukey(path)))


def other_version(url: str, known: str) -> bool:
    """Returns whether the server has a different content than the `named_version` of a copy.

    False without an answer: copies serve without a network, too.
    """
    try:
        if is_http(url):
            with contextlib.closing(ask(Request(url, method="HEAD"))) as answer:
                present = named_version(answer.headers)
        else:
            present = f"{version(url)}\n"
    except (OSError, ConfigError):
        return False
    # Some servers name ETag in one kind of answer alone.
    pairs = zip(known.split("\n"), present.split("\n"))
    return next((a != b for a, b in pairs if a and b), False)


def local_copy(url: str) -> Path:
    """Returns a copy of a file in the cache folder, of the file's present content.

    Raises FileNotFoundError if there is no file, ConfigError without a library for the kind
    of URL, and another OSError if the network fails. All name the URL.
    """
    content = version(url)
    if not content:
        raise FileNotFoundError(f"data.path: there is no file {url}")
    hashed = hashlib.blake2b(f"{url} {content}".encode(), digest_size=12).hexdigest()
    path = cache_folder() / "files" / hashed / Path(urlsplit(url).path).name
    try:
        download(url, path, _check_container)
    except OSError as error:
        raise UnreachableError(f"data.path: cannot fetch {url}: {error}") from error
    return path


def _storage(url: str) -> tuple[Any, str]:
    try:
        return storage(url)
    except OSError as error:
        raise ConfigError(f"data.path: {error}") from error


def _answer(url: str, ask: Any) -> Any:
    """Returns the answer of a storage. Raises OSError that names the URL."""
    try:
        return ask()
    except Exception as error:  # the libraries of storages raise exceptions of their own
        raise UnreachableError(f"data.path: cannot reach {url}: {describe_error(error)}") from error


class RemoteSource(FolderSource):
    """Image files below a URL. `load` returns the path of a copy in the cache folder."""

    downloads = True

    def __init__(
        self,
        root: str,
        names: Sequence[str],
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        """root: the URL of the folder. names: N paths below the folder, or URLs."""
        super().__init__(root, names, labels, classes)
        self._cache = cache_folder() / "images"

    def paths(self) -> Iterator[str]:
        """Yields none: the copies are of one content for ever."""
        return iter(())

    def load(self, index: int) -> str:
        """Returns the path of an image. Copies the image into the cache if it is not there.

        An image that the storage lacks has a path without a file, so the loader skips and
        names the image. Raises OSError that names the URL if the network fails.
        """
        name = self.name(index)
        url = joined(self.root, name)
        # The name may lead out of a folder ("../x"), so it is no part of the path.
        hashed = hashlib.blake2b(url.encode(errors="surrogateescape"), digest_size=16).hexdigest()
        ending = re.sub(r"[^.\w]", "", Path(urlsplit(url).path).suffix)
        path = self._cache / hashed[:2] / f"{hashed[2:]}{ending}"
        if not path.exists():
            try:
                download(url, path, _check_image)
            except NotStored:
                pass
            except InvalidContent as error:
                log.warning("%s", error)
            except HTTPError as error:
                if error.code not in (404, 410):
                    raise UnreachableError(f"cannot fetch {url}: {error}") from error
            except OSError as error:
                raise UnreachableError(f"cannot fetch {url}: {error}") from error
        return str(path)


def _check_container(path: Path, length_known: bool) -> None:
    """A `download.Check` for zip archives, parquet files and lists."""
    check_no_page(path, length_known)
    kind = path.name.lower().removesuffix(".part")
    if kind.endswith(".zip") and not zipfile.is_zipfile(path):
        raise ValueError("no zip archive, or a part of one")
    if kind.endswith(".parquet"):
        with path.open("rb") as file:
            ends = file.read(4), file.seek(-min(4, path.stat().st_size), 2), file.read(4)
        if (ends[0], ends[2]) != (b"PAR1", b"PAR1"):
            raise ValueError("no parquet file, or a part of one")


def _check_image(path: Path, length_known: bool) -> None:
    """A `download.Check` for images. An image of unknown length is decoded: it may be cut off."""
    check_no_page(path, length_known)
    if length_known:
        return
    try:
        read_header(str(path))
    except Exception:  # perhaps a file for a function of the user
        return
    try:
        decode(str(path))
    except Exception as error:  # decoders raise nearly any exception
        raise ValueError(f"no whole image ({describe_error(error)})") from error


def tree_below(url: str, extensions: frozenset[str]) -> Names:
    """Returns the tree below the URL of a folder. extensions: of images, in lower case."""
    return Names(names_below(url), extensions)
