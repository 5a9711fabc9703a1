"""The goals that `benchmarks/compare_builds.py` measures: quantities with options and targets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

OLD, OURS = "old build", "this build"
IMAGES = 60_000  # of the set whose first step is measured
FILES = 1_000_000  # of the set that is listed
CLASSES = 10_000  # of a million labels
RATES = ("images_per_second", "pairs_per_second")  # units of which more is better


class Quantity(NamedTuple):
    """Something to be measured, and its goal."""

    name: str  # of a function of quantities.py
    options: dict[str, Any]  # of this function
    unit: str  # milliseconds, seconds, cpu_milliseconds, cpu_seconds, or one of RATES
    goal: str  # in words
    # The least ratio of the side `against` and this build. Without a side: the most that this build
    # may take, in `unit`.
    target: float
    against: str = OLD
    builds: Sequence[str] = (OLD, OURS)
    busy: int = 0  # processes that only keep a core busy
    pytorch: bool = False  # they multiply matrices on all cores, by PyTorch
    light: int = 0  # processes that wake every millisecond
    passive: bool = False  # with PASSIVE
    folder: str = ""  # option "folder": a name of `Folders`


def quantities() -> Iterator[Quantity]:
    """Yields all quantities."""
    yield from _ops()
    yield from _training()
    yield from _loaders()
    yield from _start()
    yield from _passes()


def _ops() -> Iterator[Quantity]:
    """Yields ops in the environment that a user has by default, alone and with neighbours."""
    equal = "no slower than the old build"
    product = {"keys": 65_536, "repeats": 9}
    large = {"threads": 2, "bank": 50_000, "queries": 2_048, "repeats": 5}
    ms = "milliseconds"
    for busy, threads, target, goal in (
        (2, 2, 15.0, "15 times the old build"),
        (0, 1, 1.0, equal),
        (0, 2, 1.0, equal),
    ):
        yield Quantity("info_nce", product | {"threads": threads}, ms, goal, target, busy=busy)
    goal, two = "15 times the old build", product | {"threads": 2}
    for busy in (1, 2):
        yield Quantity("info_nce", two, ms, goal, 15.0, busy=busy, pytorch=True)
    for busy in (0, 1, 2):
        yield Quantity("info_nce", two, ms, goal, 15.0, busy=busy, light=1)
    yield Quantity("knn", large, ms, equal, 1.0, busy=2)
    for arch in ("resnet18", "resnet50"):
        average = {"arch": arch, "threads": 2, "repeats": 21}
        yield Quantity("ema", average, ms, equal, 1.0, busy=2)
        for name in ("sgd", "adamw"):  # old builds have no such measurement
            step = average | {"name": name, "copies": False}
            goal, side = "no slower than PyTorch's fused step and _foreach_lerp_", "fused, lerp"
            yield Quantity("optimizer", step, ms, goal, 1.0, side, (OURS,), busy=2)


def _training() -> Iterator[Quantity]:
    for arch, size in (("resnet18", 32), ("resnet18_cifar", 32), ("resnet50", 64)):
        options = {"arch": arch, "size": size, "batch": 32, "threads": 1, "repeats": 7}
        goal = "2.3 times the old build, whose auto takes fp32"
        yield Quantity("step", options, "milliseconds", goal, 2.3, passive=True)
    for busy, target, goal in (
        (0, 1.7, "1.7 times the old build"),
        (1, 1.0, "no slower than the old build"),
        (2, 1.0, "no slower than the old build"),
    ):
        options = {"size": 64, "steps": 160, "every": 20}
        rate = "images_per_second"
        yield Quantity("pretrain", options, rate, goal, target, busy=busy, folder="images")
    goal = "beside two busy processes at most 3 times the quiet time"
    yield Quantity("demo", {"busy": 2}, "seconds", goal, 1 / 3, "quiet", (OURS,))
    goal, side = "views made ahead across epochs would gain at most 2 %", "with views ahead"
    for epochs in (2, 4):
        options = {"epochs": epochs, "repeats": 41}
        unit = "cpu_milliseconds"
        yield Quantity("views_ahead", options, unit, goal, 0.98, side, (OURS,))


def _loaders() -> Iterator[Quantity]:
    """Yields pairs of views per second of the DALI loader, from JPEG files."""
    photos, rate = {"recipe": "moco_v2_r50_200ep", "batch": 32}, "pairs_per_second"
    small = {"recipe": "cifar10_r18", "batch": 128}
    full, scaled = {"decode": "full", "seconds": 10}, {"decode": "scaled", "seconds": 10}
    equal = "no slower than the old build"
    for busy, target, goal in ((0, 2.0, "2 times the old build"), (2, 1.0, equal)):
        yield Quantity("loader", photos | full, rate, goal, target, busy=busy, folder="photos")
    goal = "1.5 times the old build"
    yield Quantity("loader", small | full, rate, goal, 1.5, folder="images")
    for changes in ({"rotate": 15.0}, {"hed": 0.05}, {"noise": 0.02}):
        options = photos | full | {"changes": changes}
        yield Quantity("loader", options, rate, equal, 1.0, folder="photos")
    goal, large = "2.5 times the old build, which decodes in full", photos | {"batch": 4}
    yield Quantity("loader", large | scaled, rate, goal, 2.5, folder="large photos")
    goal, unit = "at most 1.15 times torchvision, pixels equal to PIL's", "cpu_milliseconds"
    sides = "torchvision", (OURS,)
    yield Quantity("decoder", {"repeats": 5}, unit, goal, 1 / 1.15, *sides, folder="photos")


def _start() -> Iterator[Quantity]:
    """Yields what a run with many images does before training."""
    unit, no_side = "cpu_seconds", ""
    goal = f"at most 10 CPU seconds to the first step of {IMAGES:,} images"
    # ResNet-18, the recipe's network, and the recipe itself, whose first step takes 512 images
    for own in ({}, {"arch": "resnet18_cifar"}, {"recipe": "cifar10_r18"}):
        options = {"size": 32} | own
        yield Quantity("first_step", options, unit, goal, 10.0, no_side, folder="many images")
    many = {"count": FILES, "classes": CLASSES, "repeats": 3}
    for shuffled in (False, True):
        options = many | {"shuffled": shuffled}
        yield Quantity("split", options, unit, "at most .06 CPU seconds", 0.06, no_side)
    yield Quantity("few_shot", many, unit, "no slower than the old build", 1.0)
    chosen = many | {"hashed": False}
    yield Quantity("subset", chosen, unit, "at most .03 CPU seconds", 0.03, no_side)
    yield Quantity("subset", many | {"hashed": True}, unit, "no slower than the old build", 1.0)
    yield Quantity("listing", {}, unit, "at most 2.5 CPU seconds", 2.5, no_side, folder="files")
    yield Quantity("index", {}, unit, "at most 1.5 CPU seconds", 1.5, no_side, folder="tars")


def _passes() -> Iterator[Quantity]:
    """Yields kNN, attention, averages and optimisers beside PyTorch."""
    for bank, queries in ((1_500, 1_000), (50_000, 2_048), (200_000, 1_024)):
        options = {"bank": bank, "queries": queries, "threads": 1, "repeats": 5}
        goal, side = "no slower than plain PyTorch", "plain PyTorch"
        yield Quantity("knn", options, "milliseconds", goal, 1.0, side)
    for bf16 in (False, True):
        options = {"arch": "vit_small", "size": 224, "batch": 8, "bf16": bf16}
        goal, side = "no slower than torchvision's attention", "torchvision"
        own = options | {"threads": 1, "repeats": 5}
        yield Quantity("attention", own, "milliseconds", goal, 1.0, side, (OURS,))
    ways = ((1, False), (2, False), (2, True))  # threads, and whether they sleep
    # Calls one after the other, and calls that find the caches as a training step leaves them.
    repeated, cold = {"repeats": 21}, {"repeats": 101, "cold": True}
    for arch, (threads, passive), calls in itertools.product(
        ("resnet18", "resnet50"), ways, (repeated, cold)
    ):
        options = {"arch": arch, "threads": threads} | calls
        goal, side = "no slower than torch._foreach_lerp_", "foreach_lerp"
        yield Quantity("ema", options, "milliseconds", goal, 1.0, side, (OURS,), passive=passive)
        goal, side = "no slower than PyTorch's fused step and _foreach_lerp_", "fused, lerp"
        for name, copies in itertools.product(("sgd", "adamw"), (False, True)):
            own = options | {"name": name, "copies": copies}
            unit = "milliseconds"
            yield Quantity("optimizer", own, unit, goal, 1.0, side, (OURS,), passive=passive)
