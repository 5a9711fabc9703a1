"""Downloads files from HTTP servers and from storages that fsspec knows: complete or not at all,
once for all processes of a machine.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from mocofast import files
from mocofast.errors import describe_error

ATTEMPTS = 6
FIRST_PAUSE = 0.5  # seconds before the second attempt. The pause doubles with every attempt
TIMEOUT = 60.0  # seconds without a byte
# Status codes after which an attempt may succeed later.
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


PIECE = 8 << 20  # bytes that are read from a storage at a time
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


class NotStored(FileNotFoundError):
    """There is no file at a URL."""


def is_url(path: str) -> bool:
    """Returns whether a path starts with http://, s3:// or another scheme."""
    return _URL.match(path) is not None


def is_http(url: str) -> bool:
    """Returns whether a URL is of an HTTP server."""
    return url.lower().startswith(("http://", "https://"))


def storage(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system of a URL, and the path there.

    Raises OSError that names the URL if a library is missing, or the scheme is unknown.
    """
    try:
        import fsspec
    except ImportError as error:
        raise OSError(f"{url} needs fsspec ({error}); pip install 'mocofast[remote]'") from error
    try:
        system, path = fsspec.core.url_to_fs(url)
    # ImportError without a library such as s3fs, ValueError for an unknown scheme.
    except Exception as error:
        raise OSError(f"cannot open {url}: {describe_error(error)}") from error
    return system, str(path)


def cache_folder() -> Path:
    """Returns the folder of downloads and indices: mocofast/ below $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mocofast"


def download(url: str, path: Path) -> bool:
    """Downloads `url` to `path`. Returns False if the file exists already.

    A broken transfer continues where it stopped, after a pause, with at most ATTEMPTS
    attempts. It starts again from the beginning if the content has changed. If several
    processes or threads ask for the same file, the first downloads and the others wait.
    Raises urllib.error.HTTPError for an answer like 404, and another OSError if the
    network fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("w") as lock:
        files.lock(lock, wait=True)
        if path.exists():
            return False
        part = Path(f"{path}.part")
        part.write_bytes(b"")  # a killed process may have left a part of an older version
        validator, failures = "", 0
        while True:
            try:
                _append(url, part, validator)
                os.replace(part, path)
                return True
            except (OSError, http.client.HTTPException) as error:
                failures += 1
                refused = isinstance(error, HTTPError) and error.code not in TRANSIENT
                refused = refused or isinstance(error, (NotStored, PermissionError))
                if refused or failures == ATTEMPTS:
                    part.unlink(missing_ok=True)
                    if isinstance(error, OSError):
                        raise
                    raise OSError(f"{url}: {error}") from error
                validator = getattr(error, "validator", validator)
            time.sleep(FIRST_PAUSE * 2 ** (failures - 1))


class _Broken(OSError):
    """A transfer ended early. `validator`: the server's name for this version of the
    content, or "".
    """

    def __init__(self, message: str, validator: str) -> None:
        super().__init__(message)
        self.validator = validator


def _append(url: str, part: Path, validator: str) -> None:
    """Downloads the missing rest of `part` from `url`.

    validator: the version of the content in `part`, or "". Downloads everything if the
        server has another version.
    Raises _Broken if the transfer ends early.
    """
    if not is_http(url):
        _append_stored(url, part, validator)
        return
    have = part.stat().st_size if validator else 0
    headers = {"Range": f"bytes={have}-", "If-Range": validator} if have else {}
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as response:
        found = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        whole = response.status != 206
        expected = response.headers.get("Content-Length")
        with part.open("r+b") as file:
            begin = file.seek(0 if whole else have)
            file.truncate()
            try:
                shutil.copyfileobj(response, file, 1 << 20)
            except (OSError, http.client.HTTPException) as error:
                raise _Broken(f"{url}: {error}", found) from error
            got = file.tell() - begin
    if expected is not None and got != int(expected):
        raise _Broken(f"{url}: ended after {got} of {expected} bytes", found)


def _append_stored(url: str, part: Path, validator: str) -> None:
    """Does the same for a file of a storage, in pieces."""
    system, path = storage(url)
    found = ""
    try:
        if not system.isfile(path):
            raise NotStored(f"{url}: no such file")
        found, expected = str(system.ukey(path)), int(system.size(path))
        with part.open("r+b") as file:
            have = file.seek(0, os.SEEK_END) if validator == found else 0
            file.seek(have)
            file.truncate()
            while have < expected:
                content = system.cat_file(path, start=have, end=min(expected, have + PIECE))
                if not content:
                    raise OSError(f"ended after {have} of {expected} bytes")
                file.write(content)
                have += len(content)
    except (NotStored, PermissionError):
        raise
    except FileNotFoundError as error:
        raise NotStored(f"{url}: {error}") from error
    except Exception as error:  # the libraries of storages raise exceptions of their own
        raise _Broken(f"{url}: {describe_error(error)}", found) from error
