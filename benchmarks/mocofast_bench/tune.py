"""`mocofast bench data --tune`: finds the fastest loader settings on this machine.

The options of every available loader are tuned in this order: threads or processes, then
prefetch depth. For DALI on a GPU follow the hardware decoder's share of images, and whether
buffers are allocated for the largest image at the start. All values of an option are timed
in turns. A new value is taken only if it is FASTER times as fast as the old value: noise
changes nothing. At the end the tuned loaders are compared.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mocofast import settings
from mocofast.config import Config, DataConfig
from mocofast.data.decoding import image_size
from mocofast.data.interface import BatchSlice, view_augments
from mocofast.data.loaders import build_loader, count_workers, dali_missing
from mocofast.data.sources import FolderSource, find_images
from mocofast_bench import timing
from mocofast_bench.loops import TimedLoop, measure_loop

FASTER = 1.03  # speedup that a new value must reach
HW_DECODER_LOADS = (0.0, 0.5, 0.65, 0.8, 0.9, 1.0)
SAMPLED = 1000  # images whose headers are read to find the largest size

# Takes candidates and returns pairs/s, one list of rounds for every candidate.
MeasureRates = Callable[[list[DataConfig]], list[list[float]]]


def run(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures, prints a table, writes the recipe `arguments.out` and returns the row."""
    config = settings.load_recipe(arguments.recipe)
    source = FolderSource(arguments.path, find_images(arguments.path))
    batch_slice = BatchSlice(arguments.batch_size)
    batch_slice.steps(len(source))  # raises if there are too few images
    views = view_augments(config.augment, 2)

    def once(data: DataConfig) -> float:
        loop = TimedLoop(
            lambda: build_loader(source, data, views, batch_slice, 0, device), lambda batch: None
        )
        return measure_loop(loop, arguments.batches, arguments.batch_size, device).images_per_second

    def rates_of(candidates: list[DataConfig]) -> list[list[float]]:
        rates: list[list[float]] = [[] for _ in candidates]
        for _ in range(arguments.repeats):
            for i in random.sample(range(len(candidates)), len(candidates)):
                rates[i].append(once(candidates[i]))
        return rates

    # Print the head of the table. _best() prints the lines.
    print(
        f"{len(source)} images, {arguments.recipe}, {config.augment.size} px, "
        f"batches of {arguments.batch_size}"
    )
    print(
        f"{timing.device_name(device)}; {arguments.repeats} rounds; "
        "* is the new value, - the old value"
    )
    print(f"{'loader':13}{'option':18}{'value':>12}{'pairs/s':>10}{'lowest, highest':>18}")
    # Tune every loader, then compare the tuned loaders.
    cores = count_workers(-1)
    names = ["torchvision"] if dali_missing() else ["dali", "torchvision"]
    rows: list[dict[str, Any]] = []
    tuned = [
        tune_loader(
            DataConfig(loader=name, workers=cores),
            _stages(name, cores, source, device),
            rates_of,
            rows,
        )
        for name in names
    ]
    best = _best("loader", tuned, rates_of, rows)
    # Write the best settings as a recipe.
    config.data = replace(
        config.data,
        source="folder",
        path=str(Path(arguments.path).resolve()),
        loader=best.loader,
        workers=best.workers,
        prefetch=best.prefetch,
        hw_decoder_load=best.hw_decoder_load,
        preallocate=best.preallocate,
    )
    row = {"benchmark": "data --tune", **timing.environment(device), "rows": rows}
    recipe = settings.as_yaml(settings.differences(config, Config()))
    title = f"mocofast bench data --tune on {row['device']}, {row['date']}"
    Path(arguments.out).write_text(f"# {title}\n{recipe}", encoding="utf-8")
    print(f"Written: {arguments.out}. Use it: mocofast pretrain {arguments.out}")
    return row


def tune_loader(
    data: DataConfig,
    stages: list[tuple[str, list[Any]]],
    rates_of: MeasureRates,
    rows: list[dict[str, Any]],
) -> DataConfig:
    """Returns `data` with the fastest value of every option.

    data: settings to start from.
    stages: [(option, values to try)], tuned in this order.
    rates_of: measures candidates.
    rows: a row for every measured candidate is appended.
    """
    for name, values in stages:
        others = [
            replace(data, **{name: value}) for value in values if value != getattr(data, name)
        ]
        data = _best(name, [data, *others], rates_of, rows)
    return data


def _stages(
    loader: str, cores: int, source: FolderSource, device: torch.device
) -> list[tuple[str, list[Any]]]:
    stages: list[tuple[str, list[Any]]] = [
        (
            "workers",
            sorted({max(1, cores // 2), cores} | ({2 * cores} if loader == "dali" else set())),
        ),
        ("prefetch", [1, 2, 4]),
    ]
    if loader == "dali" and device.type == "cuda":
        stages += [("hw_decoder_load", list(HW_DECODER_LOADS)), ("preallocate", [_largest(source)])]
    return stages


def _largest(source: FolderSource) -> tuple[int, int]:
    """Returns the largest width and the largest height of SAMPLED random images, in pixels."""
    sizes = []
    for i in random.Random(0).sample(range(len(source)), min(SAMPLED, len(source))):
        try:
            sizes.append(image_size(source.load(i)))
        except Exception:  # a bad file: the loaders skip bad files too
            continue
    height, width = (max(lengths) for lengths in zip(*sizes))
    return width, height


def _best(
    name: str, candidates: list[DataConfig], rates_of: MeasureRates, rows: list[dict[str, Any]]
) -> DataConfig:
    """Returns the fastest candidate, or the first if no other is FASTER times as fast."""
    rates = rates_of(candidates)
    medians = [statistics.median(values) for values in rates]
    best = max(range(len(candidates)), key=lambda i: medians[i] * (FASTER if i == 0 else 1))
    for i, (data, values) in enumerate(zip(candidates, rates)):
        value, spread = getattr(data, name), f"{min(values):.0f}, {max(values):.0f}"
        mark = "*" if i == best else "-" if i == 0 else ""
        text = settings.shown(value)
        print(f"{data.loader:13}{name:18}{text:>12}{medians[i]:10.1f}{spread:>18} {mark}")
        rows.append(
            {
                "loader": data.loader,
                name: value,
                "pairs_per_second": round(medians[i], 1),
                "best": i == best,
            }
        )
    return candidates[best]
