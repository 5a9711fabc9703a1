"""Damaged tar shards and indexes: `python -m tests.drills.shards [--minutes 5] [--seed 0]`.

A damaged shard is refused with words, or shows every image that it held, or says what was left
out. A damaged index is made again, so every image is the image of the good index.
"""

from __future__ import annotations

import io
import logging
import random
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

from mocofast.config import ConfigError
from mocofast.data.shard_index import INDEX
from mocofast.data.shard_places import TarShard
from mocofast.data.shards import ShardSource, open_shards
from tests.drills.mutate import mutated, run_fuzzer

COUNT = 12
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
SECONDS = 20.0  # a case that takes longer hangs


def shard(tar_format: int) -> bytes:
    """Returns a shard with images, labels, a folder, a link, and names of every length."""
    buffer = io.BytesIO()
    rng = random.Random(tar_format)
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for i in range(COUNT):
            long = "n" * (90 * (i % 4 == 3)) + "/" * (i % 4 == 3)
            for end in (".jpg", (".cls", ".json")[i % 2]):
                content = {
                    ".jpg": rng.randbytes(100 * i + 1),
                    ".cls": str(i % 3).encode(),
                    ".json": b'{"label": "%d"}' % (i % 3),
                }[end]
                info = tarfile.TarInfo(f"{long}{i:02}{end}")
                info.size, info.mtime = len(content), 1e9 + i / 4  # type: ignore[assignment]
                tar.addfile(info, io.BytesIO(content))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
            info = tarfile.TarInfo(f"other-{kind!r}")
            info.type, info.linkname = kind, "00.jpg"
            tar.addfile(info)
    return buffer.getvalue()


def contents(source: ShardSource) -> list[bytes]:
    return [source.load(i) for i in range(len(source))]


def damaged_shard(folder: Path, whole: bytes, rng: random.Random) -> str:
    """Opens a damaged shard. Returns what happened. A word in capitals is a defect."""
    path = folder / "x.tar"
    Path(f"{path}{INDEX}").unlink(missing_ok=True)
    content = mutated(whole, rng)
    path.write_bytes(content)
    try:
        source = open_shards([TarShard("x.tar", path)])
        images = contents(source)
    except ConfigError:
        return "refused"
    if content == whole:
        return "not damaged"
    if len(images) == COUNT:
        return "shows all images"
    if source.remarks:
        return "says what is left out"
    with tarfile.open(path) as tar:
        tar.getmembers()
        only_zeros = not any(content[tar.offset :])
    # Zeros from a header on to the end: no format of tar tells the rest from padding.
    return "a whole shard of fewer images" if only_zeros else "DEFECT: images are lost silently"


def damaged_index(folder: Path, whole: bytes, rng: random.Random) -> str:
    """Opens a good shard with a damaged index. Returns what happened, as `damaged_shard`."""
    path = folder / "y.tar"
    index = Path(f"{path}{INDEX}")
    if not path.exists():
        path.write_bytes(whole)
    index.unlink(missing_ok=True)
    expected = contents(open_shards([TarShard("y.tar", path)]))
    good = index.read_bytes()
    index.write_bytes(mutated(good, rng))
    found = contents(open_shards([TarShard("y.tar", path)]))
    if found != expected:
        return "DEFECT: other images than with the good index"
    return "makes the index again" if index.read_bytes() == good else "reads the index"


def main(minutes: float, seed: int, most: int = 10**9) -> Counter[str]:
    """Runs the drill, prints and returns the counts."""
    logging.disable(logging.INFO)
    counts: Counter[str] = Counter()
    wholes = [shard(tar_format) for tar_format in FORMATS]
    until = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as place:
        for number in range(seed, seed + most):
            if time.monotonic() > until:
                break
            rng, begin = random.Random(number), time.monotonic()
            case = (damaged_shard, damaged_index)[number % 4 == 3]
            whole = wholes[0] if case is damaged_index else wholes[number % len(wholes)]
            try:
                what = case(Path(place), whole, rng)
            except Exception as error:
                what = f"DEFECT: {type(error).__name__}: {str(error)[:200]}"
            if time.monotonic() - begin > SECONDS:
                what = f"DEFECT: takes {time.monotonic() - begin:.0f} s"
            if "DEFECT" in what:
                what = f"seed {number}: {what}"
            counts[f"{case.__name__}: {what}"] += 1
    logging.disable(logging.NOTSET)
    print(f"shards: {counts.total()} cases, {dict(counts)}", flush=True)
    return counts


if __name__ == "__main__":
    sys.exit(run_fuzzer(main, __doc__, 5.0))
