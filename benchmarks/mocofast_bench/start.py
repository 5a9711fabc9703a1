"""The time and the memory from the start of a process to the first batch of a large set.

`python -m mocofast_bench.start PLACE [--images N] [--entries N] [--out FILE.jsonl]` makes a folder
of N images, shards of N images, and a set of N samples in links to one shard in PLACE, and deletes
them. Every side runs in a process of its own, the sides in turns. A side's own imports are not part
of its time and of `more_mib`. webdataset has no index, and its first batch mixes the first samples
of a few shards.

more_mib: peak of the process's resident memory, minus the memory after the imports.
own_mib: at the first batch, memory that no file backs (RssAnon) of the process, minus the same.
shared_mib: the same of process and workers together, with pages of files (PSS).
peak_mib: peak of the process's resident memory, with imports.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mocofast.data.folder_index import YOUNG

SIZE, BATCH, WORKERS = 64, 256, 2
SIDES = (
    *("list", "kept list", "ImageFolder", "shards", "kept shards", "webdataset"),
    *("entries", "kept entries"),  # the set of links
)
SHARD = 10_000  # samples
LINKS = 50_000  # names that a file has at most (ext4 allows 65,000)


def make_folder(place: Path, count: int) -> list[Path]:
    """Writes `count` hard links to few photos, and returns the photos.

    place: a new folder, gets FOLDER/train/CLASS/NAME.jpg with 1,000 images a class.
    """
    from PIL import Image

    rng, made = np.random.default_rng(0), place / "made"
    made.mkdir(parents=True)
    files = [made / f"{number}.jpg" for number in range(-(-count // LINKS))]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
    for number in range(count):
        folder = place / "folder" / "train" / f"class{number // 1000:05d}"
        if number % 1000 == 0:
            folder.mkdir(parents=True)
        os.link(files[number // LINKS], folder / f"{number:08d}.jpg")
    return files


def make_set(place: Path, count: int) -> None:
    """Writes the same photos as a folder of `count` hard links and as shards with an index.

    place: gets the folder of `make_folder`, and SHARDS/NUMBER.tar.
    """
    files = make_folder(place, count)
    shards = place / "shards"
    shards.mkdir()
    with tarfile.open(shards / "000000.tar", "w") as tar:
        for number in range(min(SHARD, count)):
            tar.add(files[number % len(files)], f"{number:08d}.jpg")
            tar.inodes.clear()  # type: ignore[attr-defined]  # the next is a file, too, not a link
    for number in range(1, count // SHARD):
        shutil.copyfile(shards / "000000.tar", shards / f"{number:06d}.tar")


def make_links(place: Path, count: int) -> None:
    """Writes `count` samples in shards of SHARD: hard links to few shards and to their indices."""
    from mocofast.data.shard_index import INDEX, local_index

    place.mkdir()
    first = place.parent / "shards" / "000000.tar"
    for number in range(count // SHARD):
        shard = place / f"{number:06d}.tar"
        if number % LINKS == 0:
            made = place.parent / "made" / shard.name
            shutil.copyfile(first, made)
            local_index(made)
        os.link(made, shard)
        os.link(f"{made}{INDEX}", f"{shard}{INDEX}")


def mocofast_batch(folder: str, kind: str = "folder") -> int:
    """Returns the number of images, after mocofast's first batch of views.

    kind: "folder" or "shards".
    """
    import torch

    from mocofast.config import AugmentConfig, DataConfig
    from mocofast.data import torchvision_loader  # noqa: F401  # loads torchvision, as others do
    from mocofast.data.interface import BatchSlice
    from mocofast.data.loaders import build_loader
    from mocofast.data.sources import load_datasets

    data = DataConfig(path=folder, source=kind, loader="torchvision", workers=WORKERS, holdout=0.0)
    note_moment()
    source = load_datasets(data).train
    augment, batch_slice = AugmentConfig(size=SIZE), BatchSlice(BATCH)
    loader = build_loader(source, data, (augment, augment), batch_slice, 0, torch.device("cpu"))
    next(loader.epoch(0))
    note_moment()
    loader.close()
    return len(source)


def torchvision_batch(folder: str) -> int:
    """Returns the number of images, after the first batch of ImageFolder and a DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    two = two_views()
    note_moment()
    images = ImageFolder(str(Path(folder, "train")), two)
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS)
    batches = iter(loader)
    next(batches)
    note_moment()
    del batches
    return len(images)


def webdataset_batch(folder: str) -> int:
    """Returns the number of shards, after the first batch of webdataset and its shuffle."""
    import webdataset

    two = two_views()
    note_moment()
    shards = sorted(map(str, Path(folder).glob("*.tar")))
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode("pil")
    batches = samples.to_tuple("jpg").map_tuple(two).batched(BATCH)
    loader = iter(webdataset.WebLoader(batches, batch_size=None, num_workers=WORKERS))
    next(loader)
    note_moment()
    del loader
    return len(shards)


def two_views() -> Callable[[Any], tuple[Any, Any]]:
    """Returns what makes two views of an image, with torchvision."""
    from torchvision.transforms import v2

    two = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return lambda image: (two(image), two(image))


class Moment(NamedTuple):
    """Wall time and CPU time of this process in seconds, and memory in KiB."""

    wall: float
    cpu: float
    resident: int
    own: int  # RssAnon
    shared: int  # PSS of process and workers


_MOMENTS: list[Moment] = []


def note_moment() -> None:
    """Notes the times, then the memory, of this process."""
    times = (time.perf_counter(), time.process_time())
    me = os.getpid()
    workers = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    shared = sum(_kib(f"/proc/{each}/smaps_rollup", "Pss:") for each in (me, *workers))
    status = "/proc/self/status"
    _MOMENTS.append(Moment(*times, _kib(status, "VmRSS:"), _kib(status, "RssAnon:"), shared))


def _kib(file: str, name: str) -> int:
    """Returns a number of a file of Linux's memory figures."""
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measured(side: str, folder: str) -> dict[str, Any]:
    """Runs a side in this process."""
    ways = {"ImageFolder": torchvision_batch, "webdataset": webdataset_batch}
    shards = partial(mocofast_batch, kind="shards")
    ways |= dict.fromkeys(("shards", "kept shards", "entries", "kept entries"), shards)
    count = ways.get(side, mocofast_batch)(folder)
    before, after = _MOMENTS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.collect()  # ends the workers of a loader that is no longer used
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "side": side,
        "shards" if side == "webdataset" else "images": count,
        "wall_s": round(after.wall - before.wall, 2),
        "cpu_s": round(after.cpu - before.cpu, 2),
        "workers_cpu_s": round(workers.ru_utime + workers.ru_stime, 2),
        "more_mib": round((peak - before.resident) / 1024),
        "own_mib": round((after.own - before.own) / 1024),
        "shared_mib": round((after.shared - before.shared) / 1024),
        "peak_mib": round(peak / 1024),
    }


def run(side: str, place: Path) -> dict[str, Any]:
    """Runs a side in a process of its own.

    "list" and "shards" find nothing kept from before, and "entries" the indices of shards alone.
    """
    from mocofast.data.shard_index import INDEX

    cache = place / "cache"
    if side == "list":
        for kept in (cache / "mocofast" / "folders").glob("*.npz"):
            kept.unlink()
    if side == "shards":
        for kept in (place / "shards").glob(f"*{INDEX}"):
            kept.unlink()
    if side in ("shards", "entries"):
        for kept in (cache / "mocofast" / "shard_tables").glob("*.columns"):
            kept.unlink()
    folders = dict.fromkeys(("shards", "kept shards", "webdataset"), "shards")
    folders |= dict.fromkeys(("entries", "kept entries"), "entries")
    folder = str(place / folders.get(side, "folder"))
    words = [sys.executable, "-m", "mocofast_bench.start", folder, "--side", side]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Prints a line of JSON for every run, and appends it to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", type=Path, help="a new folder, deleted at the end")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--entries", type=int, default=1_000_000, help="of the set of links")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, metavar="SIDE")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measured(given.side, str(given.place))))
        return
    try:
        make_set(given.place, given.images)
        make_links(given.place / "entries", given.entries)
        time.sleep(YOUNG + 1)  # the list of a folder that has just changed is not kept
        for number in range(given.rounds):
            for side in given.sides:
                row = {"benchmark": "start", "round": number, **run(side, given.place)}
                row["date"] = time.strftime("%Y-%m-%d")
                print(json.dumps(row), flush=True)
                if given.out:
                    with given.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    finally:
        shutil.rmtree(given.place)


if __name__ == "__main__":
    main()
