"""Downloads files from HTTP servers and from storages that fsspec knows: complete or not at all,
once for all processes of a machine.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from mocofast import files
from mocofast.data.deadline import within
from mocofast.errors import describe_error

ATTEMPTS = 6
FIRST_PAUSE = 0.5  # seconds before the second attempt. The pause doubles with every attempt
INVALID = 2  # attempts after which wrong content is an error
TIMEOUT = 60.0  # seconds without a byte, and seconds for the headers of an answer
SLOWEST = 10_000  # bytes per second. A slower transfer ends TIMEOUT after its bytes were due
LARGEST = 1 << 40  # bytes of a file
# Status codes after which an attempt may succeed later.
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


PIECE = 8 << 20  # bytes that are read from a storage at a time
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*<(!doctype\s+html|html)", re.I | re.S)
_LENGTH = re.compile(r"\d{1,18}", re.A)


class NotStored(FileNotFoundError):
    """There is no file at a URL."""


class InvalidContent(OSError):
    """The content at a URL is not what was asked for. The message says what it is."""


# Raises ValueError for the path of a download that is no whole file of its kind. The second
# argument: the server stated the length, and the file has this length.
Check = Callable[[Path, bool], None]


def check_no_page(path: Path, length_known: bool) -> None:
    """Raises ValueError for a page of HTML, which servers send instead of a file (a login)."""
    with path.open("rb") as file:
        if _PAGE.match(file.read(1024)):
            raise ValueError("a page of HTML, such as a login")


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


def downloaded_version(path: Path) -> str:
    """Returns the `named_version` of a downloaded file, "" if not known."""
    try:
        return Path(f"{path}.lock").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def ask(request: Request) -> Any:
    """Opens a URL. Raises OSError, also where a server does not answer, or not in HTTP."""
    try:
        return within(2 * TIMEOUT, lambda: urlopen(request, timeout=TIMEOUT))
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{request.full_url}: {describe_error(error)}") from error


def named_version(headers: Any) -> str:
    """Returns the names of a content in the headers of an answer: lines of ETag and Last-Modified,
    each of which may be empty.
    """
    return f"{headers.get('ETag') or ''}\n{headers.get('Last-Modified') or ''}"


def download(
    url: str,
    path: Path,
    check: Check = check_no_page,
    keep: Callable[[], bool] | None = None,
    largest: int = LARGEST,
) -> bool:
    """Downloads `url` to `path`. Returns False if the file exists already.

    check: looks at the content before it is kept. Content that fails is fetched once more.
    keep: returns whether a file that exists is the right one. None keeps every file.
    largest: bytes of the largest file that is kept.

    A broken transfer continues where it stopped, after a pause, with at most ATTEMPTS
    attempts. It starts again from the beginning if the content has changed. If several
    processes or threads ask for the same file, the first downloads and the others wait.
    Raises urllib.error.HTTPError for an answer like 404, InvalidContent for content that fails
    `check`, and another OSError if the network fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("a", encoding="utf-8") as lock:
        files.lock(lock, wait=True)
        if path.exists() and (keep is None or keep()):
            return False
        part = Path(f"{path}.part")
        part.write_bytes(b"")  # a killed process may have left a part of an older version
        validator, failures, invalid = "", 0, 0
        while True:
            try:
                version, length_known = _append(url, part, validator, largest)
                try:
                    check(part, length_known)
                except ValueError as error:
                    invalid += 1
                    raise InvalidContent(f"{url} is {error}") from error
                os.replace(part, path)
                lock.truncate(0)
                lock.write(version)  # the file of the lock keeps the version
                return True
            except OSError as error:
                failures += 1
                refused = isinstance(error, HTTPError) and error.code not in TRANSIENT
                refused = refused or isinstance(error, (NotStored, PermissionError, _TooLarge))
                if refused or failures == ATTEMPTS or invalid == INVALID:
                    part.unlink(missing_ok=True)
                    raise
                # Wrong content is fetched from its start.
                kept = "" if isinstance(error, InvalidContent) else validator
                validator = getattr(error, "validator", kept)
            time.sleep(FIRST_PAUSE * 2 ** (failures - 1))


class _Broken(OSError):
    """A transfer ended early. `validator`: the server's name for this version of the
    content, or "".
    """

    def __init__(self, message: str, validator: str) -> None:
        super().__init__(message)
        self.validator = validator


class _TooLarge(OSError):
    """A file has more bytes than asked for."""


def _append(url: str, part: Path, validator: str, largest: int) -> tuple[str, bool]:
    """Downloads the missing rest of `part` from `url`.

    validator: the version of the content in `part`, or "". Downloads everything if the
        server has another version.
    Returns the `named_version`, and whether the server stated the length.
    Raises _Broken if the transfer ends early, and another OSError for an answer without a file.
    """
    if not is_http(url):
        return _append_stored(url, part, validator, largest)
    have = part.stat().st_size if validator else 0
    headers = {"Range": f"bytes={have}-", "If-Range": validator} if have else {}
    with contextlib.closing(ask(Request(url, headers=headers))) as response:
        version = named_version(response.headers)
        found = next(filter(None, version.split("\n")), "")
        if response.status not in (200, 206) or (response.status == 206 and not have):
            raise OSError(f"{url}: answer {response.status} to a request for the whole file")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise OSError(f"{url}: packed by the server ({response.headers['Content-Encoding']})")
        rest = response.status == 206
        if rest and not str(response.headers.get("Content-Range")).startswith(f"bytes {have}-"):
            raise _Broken(f"{url}: another part than the one asked for", "")
        stated = response.headers.get("Content-Length", "")
        expected = int(stated) if _LENGTH.fullmatch(stated) else None
        with part.open("r+b") as file:
            begin = file.seek(have if rest else 0)
            file.truncate()
            got, began = 0, time.monotonic()
            try:
                while content := response.read1(1 << 20):
                    file.write(content)
                    got += len(content)
                    if begin + got > largest:
                        raise _TooLarge(f"{url}: more than {largest:,} bytes")
                    if time.monotonic() - began > TIMEOUT + got / SLOWEST:
                        raise TimeoutError(f"slower than {SLOWEST:,} bytes a second")
            except _TooLarge:
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _Broken(f"{url}: {describe_error(error)}", found) from error
    if expected is not None and got != expected:
        raise _Broken(f"{url}: ended after {got} of {expected} bytes", found)
    return version, expected is not None or bool(response.chunked)


def stored_file(system: Any, path: str) -> dict[str, Any] | None:
    """Returns what a storage of fsspec tells of a file, such as its size. None: there is no file.

    Raises PermissionError and other errors of the storage, which `isfile` takes for no file.
    """
    try:
        facts: dict[str, Any] = within(2 * TIMEOUT, system.info, path)
    except FileNotFoundError:
        return None
    return facts if facts["type"] == "file" else None


def _append_stored(url: str, part: Path, validator: str, largest: int) -> tuple[str, bool]:
    """Does the same for a file of a storage, in pieces."""
    system, path = storage(url)
    found = ""
    try:
        facts = stored_file(system, path)
        if facts is None:
            raise NotStored(f"{url}: no such file")
        found, expected = str(within(2 * TIMEOUT, system.ukey, path)), int(facts["size"])
        if expected > largest:
            raise _TooLarge(f"{url}: more than {largest:,} bytes")
        with part.open("r+b") as file:
            have = file.seek(0, os.SEEK_END) if validator == found else 0
            file.seek(have)
            file.truncate()
            while have < expected:
                end = min(expected, have + PIECE)
                seconds = TIMEOUT + (end - have) / SLOWEST
                content = within(seconds, partial(system.cat_file, path, start=have, end=end))
                if not content:
                    raise OSError(f"ended after {have} of {expected} bytes")
                file.write(content)
                have += len(content)
        return f"{found}\n", True
    except (NotStored, PermissionError, _TooLarge):
        raise
    except FileNotFoundError as error:
        raise NotStored(f"{url}: {error}") from error
    except Exception as error:  # the libraries of storages raise exceptions of their own
        raise _Broken(f"{url}: {describe_error(error)}", found) from error
