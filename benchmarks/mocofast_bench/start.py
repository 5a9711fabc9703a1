"""The time and the memory from the start of a process to the first batch of a large folder.

`python -m mocofast_bench.start FOLDER [--out FILE.jsonl]`. Every side runs in a process
of its own, the sides in turns. A side's own imports are not part of its time and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZE, BATCH, WORKERS = 64, 256, 2
SIDES = ("kept list", "list", "ImageFolder")


def mocofast_batch(folder: str) -> int:
    """Returns the number of images, after mocofast's first batch of views."""
    import torch

    from mocofast.config import AugmentConfig, DataConfig
    from mocofast.data.interface import BatchSlice
    from mocofast.data.loaders import build_loader
    from mocofast.data.sources import load_datasets

    data = DataConfig(path=folder, loader="torchvision", workers=WORKERS, holdout=0.0)
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
    from torchvision.transforms import v2

    two = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    note_moment()
    images = ImageFolder(folder, lambda image: (two(image), two(image)))
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS)
    batches = iter(loader)
    next(batches)
    note_moment()
    return len(images)


_MOMENTS: list[tuple[float, float, int]] = []


def note_moment() -> None:
    """Notes wall time, CPU time of this process, and resident memory in KiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") // 1024
    _MOMENTS.append((time.perf_counter(), time.process_time(), resident))


def measured(side: str, folder: str) -> dict[str, Any]:
    """Runs a side in this process."""
    images = (torchvision_batch if side == "ImageFolder" else mocofast_batch)(folder)
    (wall, cpu, resident), (wall_2, cpu_2, _) = _MOMENTS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "side": side,
        "images": images,
        "wall_s": round(wall_2 - wall, 2),
        "cpu_s": round(cpu_2 - cpu, 2),
        "more_mib": round((peak - resident) / 1024),
        "peak_mib": round(peak / 1024),
    }


def run(side: str, folder: str, cache: Path) -> dict[str, Any]:
    """Runs a side in a process of its own. The list of "list" is not kept from before."""
    if side == "list":
        for kept in (cache / "mocofast" / "folders").glob("*.npz"):
            kept.unlink()
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
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--cache", type=Path, default=Path("start-cache"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measured(given.side, given.folder)))
        return
    for number in range(given.rounds):
        for side in ("list", "kept list", "ImageFolder"):
            row = {"benchmark": "start", "round": number, **run(side, given.folder, given.cache)}
            row["date"] = time.strftime("%Y-%m-%d")
            print(json.dumps(row), flush=True)
            if given.out:
                with given.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
