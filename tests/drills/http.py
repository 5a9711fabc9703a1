"""Damaged answers of HTTP servers: `python -m tests.drills.http [--minutes 5] [--seed 0]`.

Every download ends in time: with an OSError that leaves no file, or with a file that is whole. The
bodies of answers are shards, images, indexes and pages. Headers and bodies are damaged.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from urllib.error import HTTPError

from mocofast.config import ConfigError
from mocofast.data import download as downloads
from mocofast.data.remote import RemoteSource
from mocofast.data.shard_places import find_shards
from mocofast.data.shards import open_shards
from mocofast.data.tar_members import check_tar
from tests.drills.mutate import mutated, run_fuzzer
from tests.drills.shards import FORMATS, contents, shard
from tests.pictures import jpeg
from tests.raw_server import ok, serving

PAGE = b"<html><body>Please log in</body></html>" + b" " * 1000
SECONDS = 30.0  # a case that takes longer hangs


def answers(rng: random.Random, whole: bytes) -> bytes:
    """Returns a damaged answer: of its headers, of its body, or another body."""
    body = rng.choice((whole, whole, whole, PAGE, jpeg(3), b""))
    extra = rng.choice(((), ('ETag: "1"',), ("Content-Length: abc",), ("Content-Encoding: gzip",)))
    kind = rng.randrange(4)
    if kind == 0:
        return ok(mutated(body or b"x", rng), *extra, length=rng.random() < 0.5)
    answer = ok(body, *extra, length=rng.random() < 0.5)
    if kind == 1:
        return answer[: rng.randrange(len(answer))]
    head, _, rest = answer.partition(b"\r\n\r\n")
    if kind == 2:
        return mutated(head, rng) + b"\r\n\r\n" + rest
    size = b"%x" % len(rest)
    chunked = head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + size + b"\r\n" + rest
    return mutated(chunked + b"\r\n0\r\n\r\n", rng)


def case(rng: random.Random, folder: Path, wholes: list[bytes]) -> str:
    """Fetches a shard, an image or the samples of a shard. Returns what happened."""
    whole = rng.choice(wholes)
    os.environ["XDG_CACHE_HOME"] = str(folder)
    with serving(lambda line, headers: [answers(rng, whole)]) as url:
        what = rng.choice(("file", "image", "samples"))
        path = folder / "x.tar"
        try:
            if what == "file":
                downloads.download(f"{url}/x.tar", path, check_tar)
                check_tar(path, True)
            elif what == "image":
                path = Path(RemoteSource(url, ["a.jpg"]).load(0))
            else:
                images = contents(open_shards(find_shards(f"{url}/x.tar")))
                return f"{what}: {'shown' if images else 'DEFECT: no image'}"
        except (ConfigError, OSError, HTTPError):
            left = [p.name for p in folder.rglob("*") if p.suffix not in ("", ".lock", ".npz")]
            return f"{what}: refused" if not left else f"{what}: DEFECT: leaves {left}"
        return f"{what}: {'kept' if path.exists() else 'skipped'}"


def main(minutes: float, seed: int, most: int = 10**9) -> Counter[str]:
    """Runs the drill, prints and returns the counts."""
    logging.disable(logging.WARNING)
    kept = {name: getattr(downloads, name) for name in ("FIRST_PAUSE", "ATTEMPTS", "TIMEOUT")}
    downloads.FIRST_PAUSE, downloads.ATTEMPTS, downloads.TIMEOUT = 0.0, 3, 2.0
    cache = os.environ.get("XDG_CACHE_HOME")
    counts: Counter[str] = Counter()
    wholes, until = [shard(tar_format) for tar_format in FORMATS], time.monotonic() + 60 * minutes
    try:
        for number in range(most):
            if time.monotonic() > until:
                break
            begin = time.monotonic()
            with tempfile.TemporaryDirectory() as place:
                try:
                    what = case(random.Random(seed + number), Path(place), wholes)
                except Exception as error:
                    what = f"DEFECT: seed {seed + number}: {type(error).__name__}: {error}"[:300]
            if time.monotonic() - begin > SECONDS:
                what = f"DEFECT: seed {seed + number} takes {time.monotonic() - begin:.0f} s"
            counts[what] += 1
    finally:
        for name, value in kept.items():
            setattr(downloads, name, value)
        os.environ.pop("XDG_CACHE_HOME")
        if cache is not None:
            os.environ["XDG_CACHE_HOME"] = cache
        logging.disable(logging.NOTSET)
    print(f"http: {counts.total()} cases, {dict(counts)}", flush=True)
    return counts


if __name__ == "__main__":
    sys.exit(run_fuzzer(main, __doc__, 5.0))
