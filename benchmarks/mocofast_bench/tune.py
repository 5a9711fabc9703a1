"""`mocofast bench data --tune`: the loader settings that are fastest on this machine, one after the other.

For each loader that can run here: threads or processes, then prefetch depth, then, for DALI on a GPU, the hardware
decoder's share and whether its buffers are allocated for the largest image at the start. All values of an option are
timed in turns; one replaces the value before only where it is FASTER times as fast, so noise changes nothing. At last
the loaders, so tuned, are compared.
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

FASTER = 1.03
HW_DECODER_LOADS = (0.0, 0.5, 0.65, 0.8, 0.9, 1.0)
SAMPLED = 1000  # images whose headers are read for the largest size

MeasureRates = Callable[[list[DataConfig]], list[list[float]]]  # pairs/s of each in every round


def run(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures, prints a table, writes the recipe `arguments.out`, returns the row."""
    config = settings.load_recipe(arguments.recipe)
    source = FolderSource(arguments.path, find_images(arguments.path))
    shard = BatchSlice(arguments.batch_size)
    shard.steps(len(source))  # raises where there are too few images
    views = view_augments(config.augment, 2)

    def once(data: DataConfig) -> float:
        side = TimedLoop(
            lambda: build_loader(source, data, views, shard, 0, device), lambda batch: None
        )
        return measure_loop(side, arguments.batches, arguments.batch_size, device).images_per_second

    def rates_of(candidates: list[DataConfig]) -> list[list[float]]:
        rates: list[list[float]] = [[] for _ in candidates]
        for _ in range(arguments.repeats):
            for i in random.sample(range(len(candidates)), len(candidates)):
                rates[i].append(once(candidates[i]))
        return rates

    print(
        f"{len(source)} images, {arguments.recipe}, {config.augment.size} px, batches of {arguments.batch_size}"
    )
    print(
        f"{timing.device_name(device)}; {arguments.repeats} rounds; * is taken, - was there before"
    )
    print(f"{'loader':13}{'option':18}{'value':>12}{'pairs/s':>10}{'lowest, highest':>18}")
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
    print(f"written to {arguments.out}; mocofast pretrain {arguments.out}")
    return row


def tune_loader(
    data: DataConfig,
    stages: list[tuple[str, list[Any]]],
    rates_of: MeasureRates,
    rows: list[dict[str, Any]],
) -> DataConfig:
    """`data` with the fastest value of each option, in the order of `stages`; appends what was measured to `rows`."""
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
    """(width, height) that no image of a sample exceeds."""
    sizes = []
    for i in random.Random(0).sample(range(len(source)), min(SAMPLED, len(source))):
        try:
            sizes.append(image_size(source.load(i)))
        except Exception:  # a bad file, which the loaders skip
            continue
    height, width = (max(sides) for sides in zip(*sizes))
    return width, height


def _best(
    name: str, candidates: list[DataConfig], rates_of: MeasureRates, rows: list[dict[str, Any]]
) -> DataConfig:
    """The fastest; the first unless another is clearly faster."""
    rates = rates_of(candidates)
    medians = [statistics.median(values) for values in rates]
    best = max(range(len(candidates)), key=lambda i: medians[i] * (FASTER if i == 0 else 1))
    for i, (data, values) in enumerate(zip(candidates, rates)):
        value, spread = getattr(data, name), f"{min(values):.0f}, {max(values):.0f}"
        mark = "*" if i == best else "-" if i == 0 else ""
        print(
            f"{data.loader:13}{name:18}{settings.shown(value):>12}{medians[i]:10.1f}{spread:>18} {mark}"
        )
        rows.append(
            {
                "loader": data.loader,
                name: value,
                "pairs_per_second": round(medians[i], 1),
                "best": i == best,
            }
        )
    return candidates[best]
