"""Measures goals of this project in the build of another checkout and in this build, in turns.

    python benchmarks/compare_builds.py OLD_TREE [--only NAME ...] [--images FOLDER]
        [--photos FOLDER] [--turns N]

OLD_TREE: a checkout, for instance of `git worktree add OLD_TREE COMMIT`. A module that was not
compiled there is not used there. Each side of a turn runs in a process of its own. A side that is
no build, as plain PyTorch, runs in the process of this build.

Appends a row of JSON for a quantity when all its turns are done. A value is the median over the
turns, and a ratio the median of the ratios of the turns: above 1 this build is better. `builds/
goals.py` holds the goals, `builds/quantities.py` the measurements.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from builds.goals import FILES, IMAGES, OLD, OURS, RATES, Quantity, quantities
from mocofast_bench import neighbours, start, timing
from PIL import Image

from mocofast.usage import usage

HERE = Path(__file__).resolve().parent
# As `mocofast pretrain` sets them in this build.
PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
# Prefixes of variables of the user that change speed.
CHOICES = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "GLIBC_TUNABLES")
TARS, SAMPLES = 20, 10_000  # and samples of a tar file
LARGE, LARGE_SIZE = 32, (4_000, 3_000)  # photos as phones make them, width and height


class Folders:
    """Folders of files that quantities read, made when they are asked for."""

    def __init__(self, images: Path | None, photos: Path | None, place: Path) -> None:
        """images, photos: the user's folders. place: an empty folder."""
        self._given, self._place = {"images": images, "photos": photos}, place
        self._makers = {
            "many images": self._link_images,
            "large photos": self._enlarge,
            "files": _link_files,
            "tars": _pack,
        }

    def missing(self, name: str) -> str:
        """Returns the option that a folder needs and that is not given, or ""."""
        needed = name.split(" ")[-1]
        return f"--{needed}" if self._given.get(needed, self._place) is None else ""

    def path(self, name: str) -> Path:
        """Returns a folder. name: an option's, "many images", "large photos", "files" or "tars"."""
        if given := self._given.get(name):
            return given.resolve()
        place = self._place / name.replace(" ", "_")
        if not place.exists():
            self._makers[name](place)
        return place / "folder"

    def _enlarge(self, place: Path) -> None:
        """Enlarges LARGE of the user's photos to LARGE_SIZE."""
        (place / "folder").mkdir(parents=True)
        for number, file in enumerate(_files(self.path("photos"))[:LARGE]):
            with Image.open(file) as image:
                large = image.convert("RGB").resize(LARGE_SIZE, Image.Resampling.BICUBIC)
            large.save(place / "folder" / f"{number:02d}.jpg", quality=90)

    def _link_images(self, place: Path) -> None:
        """Links the user's images until there are IMAGES. A folder remains a class."""
        files = _files(self.path("images"))
        for number in range(IMAGES):
            file = files[number % len(files)]
            link = place / "folder" / file.parent.name / f"{number:06d}{file.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, link)
            except OSError:  # another file system, or too many links
                shutil.copyfile(file, link)


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def _link_files(place: Path) -> None:
    start.make_folder(place, FILES)


def _pack(place: Path) -> None:
    """Writes TARS files in the style of WebDataset: an image and the number of its class."""
    (place / "folder").mkdir(parents=True)
    first = place / "folder" / "000000.tar"
    image = (start.make_folder(place / "photos", 1)[0]).read_bytes()
    with tarfile.open(first, "w") as tar:
        for number in range(SAMPLES):
            for end, content in (("jpg", image), ("cls", b"%d" % (number % 1000))):
                member = tarfile.TarInfo(f"{number:08d}.{end}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for number in range(1, TARS):
        shutil.copyfile(first, first.with_name(f"{number:06d}.tar"))


def environment(tree: Path, cache: Path, passive: bool) -> dict[str, str]:
    """Returns the environment of a build's process.

    tree: the checkout. cache: holds what builds keep between runs.
    """
    chosen = {name: value for name, value in os.environ.items() if not name.startswith(CHOICES)}
    paths = (tree, tree / "kernels", tree / "benchmarks")
    chosen |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "XDG_CACHE_HOME": str(cache)}
    return chosen | (PASSIVE if passive else {})


def in_build(
    tree: Path, name: str, options: Mapping[str, Any], variables: Mapping[str, str]
) -> dict[str, float]:
    """Measures a quantity once in a build and returns {side: value}.

    Raises RuntimeError if the process fails, or takes another build than that of `tree`.
    """
    command = [sys.executable, str(HERE / "builds" / "quantities.py"), name, json.dumps(options)]
    # `python -m` imports from the folder where it starts before all others.
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables, cwd=tree, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name} in {tree}: {done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    if not os.path.samefile(found["build"], tree):
        raise RuntimeError(f"{name} ran in {found['build']} instead of {tree}")
    values: dict[str, float] = found["values"]
    return values


def measure(
    quantity: Quantity, trees: Mapping[str, Path], turns: int, folders: Folders, cache: Path
) -> dict[str, Any]:
    """Measures a quantity in all builds, `turns` times, and returns the row.

    trees: {OLD or OURS: checkout}. cache: as for `environment`.
    """
    options = dict(quantity.options)
    if quantity.folder:
        options["folder"] = str(folders.path(quantity.folder))
    samples: dict[str, list[float]] = {}
    before, began = usage(), time.monotonic()
    program = timing.PYTORCH if quantity.pytorch else timing.BUSY
    light = timing.busy_neighbours(quantity.light, timing.LIGHT)
    with timing.busy_neighbours(quantity.busy, program), light:
        for turn in range(turns):
            for build in quantity.builds if turn % 2 else quantity.builds[::-1]:
                variables = environment(trees[build], cache, quantity.passive)
                found = in_build(trees[build], quantity.name, options, variables)
                for side, value in found.items():
                    if side == "mocofast":
                        samples.setdefault(build, []).append(value)
                    elif build == OURS:
                        samples.setdefault(side, []).append(value)
    after = usage()
    row = {
        "benchmark": "compare_builds",
        "quantity": quantity.name,
        **timing.environment(torch.device("cpu")),
        "threads": quantity.options.get("threads"),  # None: as the program chooses
        "commits": {build: timing.commit_of(trees[build]) for build in quantity.builds},
        **{name: value for name, value in quantity.options.items() if name != "threads"},
        "busy": quantity.busy,
        **({"of": "PyTorch"} if quantity.pytorch else {}),
        **({"light": quantity.light} if quantity.light else {}),
        "environment": PASSIVE if quantity.passive else {},
        "turns": turns,
        "took_seconds": round(time.monotonic() - began, 1),
        **results(quantity, samples),
    }
    if before and after:
        others = neighbours.between(before, after)
        row["neighbours"] = {name: round(share, 4) for name, share in others._asdict().items()}
        sides = {"milliseconds": row[quantity.unit], "quartiles": row["quartiles"]}
        row["warnings"] = neighbours.warnings(others, sides)
    return row


def results(quantity: Quantity, samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Returns the entries of a row that hold results. samples: {side: a value for each turn}."""
    times = {side: timing.summary(list(values)) for side, values in samples.items()}
    power = -1 if quantity.unit in RATES else 1  # less time is better, a lower rate is worse
    ratios = {
        side: statistics.median((a / b) ** power for a, b in zip(values, samples[OURS]))
        for side, values in samples.items()
        if side != OURS
    }
    if quantity.against:
        met = ratios[quantity.against] >= quantity.target
    else:
        met = times[OURS].median <= quantity.target
    return {
        quantity.unit: {side: round(time.median, 5) for side, time in times.items()},
        "quartiles": {side: [round(t, 5) for t in time[1:]] for side, time in times.items()},
        "ratios": {side: round(ratio, 3) for side, ratio in ratios.items()},
        "goal": quantity.goal,
        "target": quantity.target,
        "against": quantity.against,
        "met": met,
    }


def chosen_quantities(only: Sequence[str], folders: Folders) -> list[Quantity]:
    """Returns the quantities of some names, all for no name, and prints what is left out."""
    chosen = []
    for quantity in quantities():
        if only and quantity.name not in only:
            continue
        if option := folders.missing(quantity.folder):
            print(f"{quantity.name} is left out: it needs {option} FOLDER")
            continue
        chosen.append(quantity)
    return chosen


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    names = sorted({quantity.name for quantity in quantities()})
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD_TREE", help="checkout of the old build")
    parser.add_argument("--only", nargs="+", choices=names, default=[], help="default: all")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="class folders of images")
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="JPEG files of 0.2 Mpx")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "goals_cpu.jsonl")
    parser.add_argument("--turns", type=int, default=5, help="default: %(default)s")
    given = parser.parse_args(argv)
    if given.turns < 1:
        parser.error("--turns must be at least 1")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the chosen quantities. Returns 1 if one failed, after all others."""
    given = arguments(argv)
    trees = {OLD: given.old.resolve(), OURS: HERE.parent}
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        folders = Folders(given.images, given.photos, Path(place))
        for quantity in chosen_quantities(given.only, folders):
            try:
                row = measure(quantity, trees, given.turns, folders, Path(place, "cache"))
            except RuntimeError as error:
                failed += 1
                print(f"{quantity.name} failed: {error}", flush=True)
                continue
            for warning in row.get("warnings", []):
                print(f"BUSY MACHINE, measure again: {warning}")
            print(json.dumps(row), flush=True)
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
