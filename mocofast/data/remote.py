"""Files at URLs: of HTTP servers, and of every storage that fsspec knows (s3://, gs://, hf://).

A file is copied into the cache folder, once for all processes of a machine, when its content is
needed. So a batch depends on no network, and an epoch reads local files only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np

from mocofast.config import ConfigError
from mocofast.data.download import (
    TIMEOUT,
    NotStored,
    cache_folder,
    download,
    is_http,
    is_url,
    storage,
)
from mocofast.data.finding import Names
from mocofast.data.folders import FolderSource
from mocofast.errors import describe_error


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
    return [system.unstrip_protocol(path) for path in _answer(url, lambda: system.glob(pattern))]


def exists(url: str) -> bool:
    """Returns whether there is a file at a URL."""
    if is_http(url):
        return bool(version(url))
    system, path = _storage(url)
    return bool(_answer(url, lambda: system.isfile(path)))


def version(url: str) -> str:
    """Returns the server's name for the present content of a file, "" for no file."""
    if is_http(url):
        try:
            with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT) as answer:
                return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "?"
        except OSError:
            return ""
    system, path = _storage(url)
    if not _answer(url, lambda: system.isfile(path)):
        return ""
    return str(_answer(url, lambda: system.ukey(path)))


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
        download(url, path)
    except OSError as error:
        raise OSError(f"data.path: cannot fetch {url}: {error}") from error
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
        raise OSError(f"data.path: cannot reach {url}: {describe_error(error)}") from error


class RemoteSource(FolderSource):
    """Image files below a URL. `load` returns the path of a copy in the cache folder."""

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
                download(url, path)
            except NotStored:
                pass
            except HTTPError as error:
                if error.code not in (404, 410):
                    raise OSError(f"cannot fetch {url}: {error}") from error
            except OSError as error:
                raise OSError(f"cannot fetch {url}: {error}") from error
        return str(path)


def tree_below(url: str, extensions: frozenset[str]) -> Names:
    """Returns the tree below the URL of a folder. extensions: of images, in lower case."""
    return Names(names_below(url), extensions)
