"""Does a recipe fit a GPU? Predicted peaks of a step, and settings that fit.

The settings are tried in the order of their cost: activation checkpointing (a quarter to a third
more time), sharding (weights travel), both, and then micro-batches, which also change what
BatchNorm and losses over a batch see.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mocofast import settings
from mocofast.config import Config, ConfigError
from mocofast.data.finding import counted
from mocofast.train.memory import step_peak

GIB = 2**30
# GiB of the whole memory, as nvidia-smi says.
GPUS = {
    "T4": 15.0,
    "V100-16": 16.0,
    "V100-32": 32.0,
    "L4": 22.5,
    "A10": 22.5,
    "RTX3090": 24.0,
    "RTX4090": 24.0,
    "RTX5090": 31.8,
    "A100-40": 40.0,
    "L40S": 45.0,
    "A100-80": 80.0,
    "H100": 79.6,
    "H200": 140.4,
    "B200": 179.1,
}
WITHOUT_BF16 = ("T4", "V100-16", "V100-32")
# Share of the memory that a step may take. The rest is for what no prediction counts.
USABLE = 0.9


class Trial(NamedTuple):
    """A setting, and the predicted peak of its step in bytes."""

    accumulate: int
    recompute: bool
    parallel: str
    peak: int

    def options(self) -> dict[str, Any]:
        """Returns the options of the setting, {"group.option": value}."""
        return {
            "train.accumulate": self.accumulate,
            "engine.checkpoint_activations": self.recompute,
            "engine.parallel": self.parallel,
        }


def memory_of(gpu: str) -> float:
    """Returns the GiB of a GPU's memory. Raises ConfigError for an unknown name."""
    for name, memory in GPUS.items():
        if name.lower() == gpu.lower():
            return memory
    raise ConfigError(f"--gpu: expected one of {', '.join(GPUS)}, got {gpu!r}; or --memory GB")


def trials(config: Config, ranks: int, usable: float) -> Iterator[Trial]:
    """Yields settings in the order of their cost, the given setting first, until one fits.

    config: with a precision other than auto. ranks: number of GPUs. usable: bytes of a GPU.
    Raises ConfigError if the batch is no multiple of the ranks.
    """
    if config.data.batch_size % ranks:
        raise ConfigError(f"data.batch_size: expected a multiple of --ranks {ranks}")
    given = (config.engine.checkpoint_activations, config.engine.parallel)
    ways = [given, (True, given[1])]
    if ranks > 1 and config.optim.name != "lars" and config.train.precision != "fp16":
        ways += [(given[0], "fsdp"), (True, "fsdp")]
    accumulate = config.train.accumulate
    for way in dict.fromkeys(ways):
        trial = _trial(config, ranks, accumulate, *way)
        yield trial
        if trial.peak <= usable:
            return
    images = config.data.batch_size // ranks
    while images % (accumulate * 2) == 0 and images >= accumulate * 4:  # BatchNorm needs 2 images
        accumulate *= 2
        trial = _trial(config, ranks, accumulate, *way)
        yield trial
        if trial.peak <= usable:
            return


def _trial(config: Config, ranks: int, accumulate: int, recompute: bool, parallel: str) -> Trial:
    config = copy.deepcopy(config)
    config.train.accumulate = accumulate
    config.engine.checkpoint_activations, config.engine.parallel = recompute, parallel
    return Trial(accumulate, recompute, parallel, step_peak(config, ranks))


def report(config: Config, ranks: int, memory: float, given: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of `mocofast fit`.

    memory: GiB of a GPU. given: options of the command line, {"group.option": value}.
    """
    usable = USABLE * memory * GIB
    c, largest = config, config.data.largest_batch()
    images = largest // ranks
    places = counted(ranks, "machine" if config.train.device == "cpu" else "GPU")
    yield (
        f"recipe {c.recipe}: {c.model.arch}, {c.train.precision}, batch of {largest} on "
        f"{places} of {memory:.4g} GiB, of which a step may take {usable / GIB:.1f}"
    )
    yield "images a micro-batch  activations  parallel  peak GiB"
    trial = None
    for trial in trials(config, ranks, usable):
        kept = "recomputed" if trial.recompute else "kept"
        cells = f"{images // trial.accumulate:>20}  {kept:<11}  {trial.parallel:<8}"
        fits = "  fits" if trial.peak <= usable else ""
        yield f"{cells}  {trial.peak / GIB:8.2f}{fits}"
    assert trial is not None
    if trial.peak <= usable:
        options = {"data.path": "PHOTOS", **given, **trial.options()}
        where = "next" if ranks == 1 else f"next, by torchrun on {ranks} GPUs"
        yield f"{where}: mocofast pretrain {config.recipe} {shlex.join(settings.as_flags(options))}"
    else:
        yield "nothing fits: more --ranks, a larger GPU, or a smaller encoder (--model.arch)"
    yield (
        "not counted: workspaces of cuDNN, fragmentation, NCCL, the driver, the loader's images, "
        "the evaluation"
    )
