"""Damaged image files of every format: `python -m tests.drills.images [--minutes 10] [--seed 0]`.

A round mixes good and damaged files, and shows the set by a loader in a process of its own. All
good images must be shown, equal to the bit to a set without damage, and no other image may be
skipped. Every damaged file also goes through `mocofast prepare`. If a decoder ends the process,
the next start must name a file and go on. Contents that end a process are not kept.
"""

from __future__ import annotations

import io
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mocofast.config import AugmentConfig, DataConfig
from mocofast.data.interface import BatchSlice, epoch_order
from mocofast.data.loaders import build_loader, dali_missing
from mocofast.data.prepare import compact
from mocofast.data.sources import FolderSource
from mocofast.train.suspects import skip_fatal_files
from tests.drills.mutate import mutated, run_fuzzer
from tests.pictures import jpeg, photo

GOOD, DAMAGED = 8, 24  # files of a round
VIEWS = (AugmentConfig(size=24, jitter_p=0.5),)
SECONDS = 240.0  # a round that takes longer hangs
ROUNDS = 10  # of a process


def seeds() -> dict[str, bytes]:
    """Returns small files of every format, {extension with a number: content}."""
    rgb = photo(1, (37, 53))
    wide = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
    kinds = {
        "jpg": [(rgb, {}), (rgb.convert("L"), {}), (rgb.convert("CMYK"), {})],
        "png": [
            (rgb, {}),
            (rgb.convert("P"), {}),
            (rgb.convert("RGBA"), {}),
            (rgb.convert("1"), {}),
        ],
        "bmp": [(rgb, {}), (rgb.convert("L"), {})],
        "webp": [(rgb, {}), (rgb, {"lossless": True})],
        "ppm": [(rgb, {})],
        "pgm": [(rgb.convert("L"), {})],
        "pbm": [(rgb.convert("1"), {})],
        "tif": [
            (rgb, {"compression": c}) for c in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg")
        ],
        "jp2": [(rgb, {}), (rgb.convert("L"), {})],
    }
    kinds["jpg"].append((rgb, {"progressive": True, "subsampling": 2}))
    kinds["png"].append((Image.fromarray(wide), {}))
    kinds["tif"] += [(Image.fromarray(wide), {}), (Image.fromarray(wide.astype(np.float32)), {})]
    found = {}
    for extension, images in kinds.items():
        for image, options in images:
            buffer = io.BytesIO()
            image.save(buffer, Image.registered_extensions()[f".{extension}"], **options)
            found[f"{len(found):02}.{extension}"] = buffer.getvalue()
    for name in ("npy", "npz"):
        buffer = io.BytesIO()
        save = np.save if name == "npy" else np.savez
        save(buffer, np.asarray(rgb))  # type: ignore[operator]
        found[f"{len(found):02}.{name}"] = buffer.getvalue()
    return found


def write_round(folder: Path, seed: int) -> list[str]:
    """Writes the files of a round. Returns their names: good and damaged files take turns."""
    rng, sources = random.Random(seed), seeds()
    contents = list(sources.values())
    names = []
    for i in range(GOOD + DAMAGED):
        if i % ((GOOD + DAMAGED) // GOOD) == 0:
            name, content = f"{i:02}-good.jpg", jpeg(i)
        else:
            kind = rng.choice(list(sources))
            content = mutated(sources[kind], rng, contents)
            name = f"{i:02}-{kind}"
        (folder / name).write_bytes(content)
        names.append(name)
    return names


def views_of_good(names: list[str], folder: Path, seed: int) -> dict[int, torch.Tensor]:
    """Returns the views of the good files in a set where all files are good, {index: view}."""
    clean = folder / "clean"
    clean.mkdir()
    for i, name in enumerate(names):
        (clean / name).write_bytes(jpeg(i))
    source = FolderSource(clean, names)
    part = BatchSlice(len(names))
    data = DataConfig(loader="torchvision", workers=0)
    (batch,) = build_loader(source, data, VIEWS, part, seed, torch.device("cpu")).epoch(0)
    order = epoch_order(len(names), seed, 0).tolist()
    return {i: batch.views[0][order.index(i)] for i, name in enumerate(names) if "good" in name}


def run_round(loader: str, seed: int, run: Path) -> dict[str, int]:
    """Shows one round by a loader, in this process. Returns counts. Raises AssertionError."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = write_round(folder, seed)
        source = FolderSource(folder, names)
        data = DataConfig(loader=loader, workers=0 if loader == "torchvision" else 2)
        stream = build_loader(
            source, data, VIEWS, BatchSlice(len(names)), seed, torch.device("cpu")
        )
        named = skip_fatal_files(stream, source, run)
        (batch,) = stream.epoch(0)
        stream.close()
        good = {i for i, name in enumerate(names) if "good" in name}
        assert not good & stream.skipped.keys(), "a good image was skipped"
        assert not set(batch.index.tolist()) & stream.skipped.keys(), "a bad image was shown"
        if loader == "torchvision":  # DALI's views differ by rounding
            order = epoch_order(len(names), seed, 0).tolist()
            for index, view in views_of_good(names, folder, seed).items():
                assert torch.equal(batch.views[0][order.index(index)], view), "another view"
        prepared = 0
        for name in names:
            try:
                compact(str(folder / name), 32, 90)
                prepared += 1
            except Exception:  # `prepare` names the file
                pass
        return {
            "files": DAMAGED,
            "skipped": len(stream.skipped),
            "shown": DAMAGED - len(stream.skipped),
            "prepared": prepared - GOOD,
            "named after a death": sum("ends the process" in line for line in named),
        }


def rounds(loader: str, first: int, count: int, run: str) -> None:
    """The work of a process: prints a line of JSON for every round."""
    for seed in range(first, first + count):
        print(json.dumps({"seed": seed, **run_round(loader, seed, Path(run))}), flush=True)


def drill(loader: str, seed: int, until: float, most: int) -> Iterator[tuple[str, int]]:
    """Runs rounds in processes that may die. Yields counts, with defects by their words."""
    done = 0
    deaths_of_round = 0
    with tempfile.TemporaryDirectory() as run:
        while done < most and time.monotonic() < until:
            count = min(ROUNDS, most - done)
            asked = (loader, seed + done, count, run)
            code = f"from tests.drills.images import rounds; rounds(*{asked!r})"
            try:
                child = subprocess.run(
                    [sys.executable, "-c", code],
                    capture_output=True,
                    text=True,
                    timeout=SECONDS * count,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                yield f"DEFECT: round {seed + done} or a later one hangs ({loader})", 1
                return
            lines = [json.loads(line) for line in child.stdout.splitlines() if line[:1] == "{"]
            for line in lines:
                line.pop("seed")
                for name, value in line.items():
                    yield f"{loader}: {name}", value
                yield f"{loader}: rounds", 1
                deaths_of_round = 0
            done += len(lines)
            if child.returncode < 0:
                yield f"{loader}: deaths of the process", 1
                deaths_of_round += 1
                if deaths_of_round > 3:
                    yield f"DEFECT: round {seed + done} dies at every start ({loader})", 1
                    done, deaths_of_round = done + 1, 0
            elif child.returncode:
                yield f"DEFECT: round {seed + done} ({loader}): {child.stderr[-400:]}", 1
                done += 1


def main(minutes: float, seed: int, most: int = 10**9) -> Counter[str]:
    """Runs the drill on all loaders, prints and returns the counts."""
    counts: Counter[str] = Counter()
    loaders = ["torchvision"] + ["dali"] * (not dali_missing())
    for loader in loaders:
        until = time.monotonic() + 60 * minutes / len(loaders)
        for name, value in drill(loader, seed, until, most):
            counts[name] += value
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    print(f"images: {dict(counts)}, peak memory of a process {peak} MiB", flush=True)
    return counts


if __name__ == "__main__":
    sys.exit(run_fuzzer(main, __doc__, 10.0))
