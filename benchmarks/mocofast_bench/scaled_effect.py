"""What `--data.decode scaled` does to kNN, where nearly every image is decoded at 1/2.

    python -m mocofast_bench.scaled_effect CIFAR [--seeds 6] [--save FILE]

CIFAR: a folder with train/CLASS/*.jpg and test/CLASS/*.jpg of 32 pixels. Writes 2,000 training and
1,000 test images of 64 pixels to a temporary folder, and trains on views of 16 pixels: 12 epochs
with decoding in full, and scaled, for every seed in turns. The evaluation decodes in full. Prints
the row of results, and appends the row to FILE.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from PIL import Image

from mocofast import settings
from mocofast_bench import timing
from mocofast_bench.speedrun_runs import CPU, ours

IMAGES = {"train": 2_000, "test": 1_000}
SIDE = 64  # pixels of an enlarged image
OPTIONS = {
    "data.source": "folder",
    "data.batch_size": 64,
    "model.arch": "resnet_tiny",
    "model.queue_size": 1_024,
    "augment.size": 16,
    "optim.lr": 0.03,
    "train.epochs": 12,
    "train.device": "cpu",
    "knn.every": 0,
    "knn.start": False,
}
WAYS = ("full", "scaled")


def enlarge(folder: Path, place: Path) -> None:
    """Writes the first images of every class of `folder` to `place`, SIDE pixels wide."""
    for part, count in IMAGES.items():
        classes = sorted(path for path in (folder / part).iterdir() if path.is_dir())
        for one in classes:
            (place / part / one.name).mkdir(parents=True)
            for file in sorted(one.iterdir())[: count // len(classes)]:
                with Image.open(file) as image:
                    large = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                large.save(place / part / one.name / f"{file.stem}.jpg", quality=92)


def measure(place: Path, seeds: int) -> dict[str, Any]:
    """Returns the row: kNN in percent and CPU seconds of both ways, and the differences."""
    knn: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        for way in WAYS:
            config = settings.load_recipe("moco_v2_r50_200ep")
            options = {"data.path": str(place), "data.decode": way, "train.seed": seed}
            settings.apply(config, OPTIONS | options)
            curve = ours(config)
            knn[way].append(round(100 * curve.knn[-1], 3))
            cpu[way].append(round(curve.cpu[-1], 2))
            print(f"seed {seed}, {way}: kNN {knn[way][-1]:.2f} %, {cpu[way][-1]:.1f} CPU s")
    points = [scaled - full for full, scaled in zip(*knn.values())]
    return {
        "benchmark": "scaled decoding",
        **timing.environment(CPU),
        "seeds": seeds,
        "knn": knn,
        "cpu_seconds": cpu,
        "points": round(fmean(points), 3),
        "standard_error": round(stdev(points) / seeds**0.5, 3) if seeds > 1 else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, metavar="CIFAR")
    parser.add_argument("--seeds", type=int, default=6, help="runs of each way (%(default)s)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="append the row to this file")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        enlarge(given.folder, Path(place))
        row = measure(Path(place), given.seeds)
    print(json.dumps(row))
    if given.save:
        with given.save.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
