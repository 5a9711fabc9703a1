"""Where the shards of a set lie: in a folder, behind a pattern, or at URLs with copies in the
cache folder.
"""

from __future__ import annotations

import glob
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from mocofast.config import ConfigError
from mocofast.data.braces import expand_braces
from mocofast.data.download import cache_folder, downloaded_version, is_http, is_url
from mocofast.data.finding import Disk, listed
from mocofast.data.remote import joined, matching, names_below, other_version

log = logging.getLogger(__name__)

PACKED = (".gz", ".tgz", ".zip", ".zst")


@dataclass(frozen=True)
class TarShard:
    """One tar file."""

    name: (
        str  # for logs and the fingerprint: the path below the folder, or the last part of the path
    )
    path: Path  # the local file, which may not be downloaded yet
    url: str = ""  # "" for a local shard


def find_shards(path: str, folder: str = "") -> list[TarShard]:
    """Returns the shards of `data.path`.

    path: a folder with *.tar files at any depth, or a file, a glob pattern or a URL.
        Braces in files, patterns and URLs are expanded: x-{000..012}.tar, {a,b}.tar.
    folder: a subfolder of the folder, for example "train/", or a file or pattern in
        the folder.

    Raises ConfigError or FileNotFoundError if there is no shard.
    """
    if is_url(path):
        return _stored(path, folder)
    root = Path(path).expanduser()
    if (root / folder).is_dir():
        found = Disk(root, {".tar"}).find(folder)
        if not found.names:
            packed = {kind: found.kinds[kind] for kind in PACKED if found.kinds[kind]}
            raise ConfigError(
                f"data.path: no *.tar file below {str(root / folder)!r}"
                + (f" ({listed(Counter(packed))}: gunzip unpacks .tar.gz)" if packed else "")
            )
        return [TarShard(name, root / name) for name in found.names]
    pattern = str(root / folder) if folder else str(root)
    files = [
        Path(match)
        for part in expand_braces(pattern)
        for match in sorted(glob.glob(part)) or [part]
    ]
    for missing in (file for file in files if not file.is_file()):
        raise FileNotFoundError(f"data.path: there is no shard {str(missing)!r}")
    return [TarShard(file.name, file) for file in files]


def packed_shards(path: str, folder: str = "") -> list[str]:
    """Returns a line about packed shards in a folder, or none. path, folder: see `find_shards`."""
    root = Path(path).expanduser() / folder
    kinds = Disk(root, {".tar"}).find("").kinds if not is_url(path) and root.is_dir() else {}
    packed = Counter({kind: kinds[kind] for kind in PACKED if kinds.get(kind)})
    return [f"packed shards are left out: {listed(packed)}; gunzip unpacks .tar.gz"] * bool(packed)


def _stored(path: str, folder: str) -> list[TarShard]:
    """Returns the shards of a URL. path, folder: see `find_shards`."""
    if is_http(path):
        return _remote(expand_braces(path))
    parts = expand_braces(joined(path, folder) if folder else path)
    urls = [url for part in parts for url in matching(part)]
    names: list[str] | None = None
    if urls == parts and len(urls) == 1 and not urls[0].endswith(".tar"):
        names = [name for name in names_below(parts[0]) if name.endswith(".tar")]
        urls = [joined(parts[0], name) for name in names]
        names = [f"{folder}{name}" for name in names]
    if not urls:
        raise ConfigError(f"data.path: no *.tar file at {path}")
    return _remote(urls, names)


def _remote(urls: Sequence[str], names: Sequence[str] | None = None) -> list[TarShard]:
    """Returns the shards at URLs, with places in the cache folder.

    names: of the shards. None takes the last part of the URLs.

    Where URLs differ in the query only, the parameters that differ are a part of the name.
    Other queries are not: signatures change from day to day.
    """
    queries: dict[str, list[dict[str, str]]] = {}
    for url in urls:
        parts = urlsplit(url)
        queries.setdefault(f"{parts.netloc}{parts.path}", []).append(dict(parse_qsl(parts.query)))
    shards = []
    for number, url in enumerate(urls):
        parts = urlsplit(url)
        folder, _, name = parts.path.rpartition("/")
        place = f"{parts.netloc}{folder}"
        others = queries[f"{parts.netloc}{parts.path}"]
        own = dict(parse_qsl(parts.query))
        differ = {k: v for k, v in own.items() if any(other.get(k) != v for other in others)}
        if differ:
            name = f"{name}?{urlencode(sorted(differ.items()))}"
        hashed = hashlib.blake2b(place.encode(), digest_size=8).hexdigest()
        file = name.replace("/", "_")
        name = name if names is None else names[number]
        shards.append(TarShard(name, cache_folder() / "shards" / hashed / file, url))
    return shards


def drop_outdated(shard: TarShard, index: Path) -> None:
    """Removes the copies of a shard and its index if the server has another content by now."""
    known = downloaded_version(shard.path)
    if known and shard.path.exists() and other_version(shard.url, known):
        log.info("%s has changed at %s, and is fetched again", shard.name, shard.url)
        shard.path.unlink(missing_ok=True)
        index.unlink(missing_ok=True)
