"""From a command line to one run, or to several runs side by side and a table."""

from __future__ import annotations

import copy
import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocofast import distributed, files, interrupts, settings
from mocofast.config import ConfigError
from mocofast.detection.folder import read_saved
from mocofast.detection.options import (
    KINDS,
    SMALL,
    STARTS,
    TaskConfig,
    apply,
    check_same_run,
    from_dict,
    read_yaml,
)
from mocofast.detection.run import Outcome, train
from mocofast.detection.start import find_start
from mocofast.device import choose_device
from mocofast.train.run_folder import choose_folder

log = logging.getLogger("mocofast")

COLUMNS = ("ap", "ap50", "ap75", "voc07_ap50", "mask_ap", "mask_ap50", "miou", "pixel_accuracy")


def launch(task: str, words: Sequence[str], resume: str, given: Mapping[str, str]) -> int:
    """Runs a command line of `mocofast detect` or `mocofast segment`. Returns the exit status.

    words: where encoders start, or a config.yaml. resume: "", auto or a path.
    given: {"group.option": text}.
    Raises ConfigError and FileNotFoundError for an unusable command line.
    """
    device = choose_device(given.get("train.device", "auto"))
    *_, local_rank = distributed.init_from_environment(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    try:
        if resume and resume != "auto":
            if words:
                raise ConfigError(f"--resume {resume}: continues a run, which has its CKPT already")
            return _status(_continue(task, Path(resume), given, device))
        config, inits = configure(task, words, given, device.type == "cpu")
        if not inits and not resume:
            raise ConfigError("CKPT: expected scratch, imagenet, a run folder or a checkpoint")
        seeds = config.train.seeds or (config.train.seed,)
        if len(inits) * len(seeds) > 1:
            return _side_by_side(config, inits, seeds, resume, given, device)
        config.model.init, config.train.seed = (inits or [""])[0], seeds[0]
        return _status(_start_or_continue(config, resume, given, device))
    finally:
        distributed.shutdown()


def _status(outcome: Outcome) -> int:
    return interrupts.EXIT_INTERRUPTED if outcome.interrupted else 0


def configure(
    task: str, words: Sequence[str], given: Mapping[str, str], small: bool
) -> tuple[TaskConfig, list[str]]:
    """Returns the configuration, and where the encoders start.

    small: the defaults are the defaults of a CPU.
    """
    inits, config = list(words), KINDS[task]()
    if any(Path(word).suffix in (".yaml", ".yml") for word in words):
        if len(words) > 1:
            raise ConfigError(f"CKPT: expected one YAML file alone, got {' '.join(words)}")
        config = read_yaml(task, Path(words[0]))
        inits = [config.model.init] if config.model.init else []
    elif small and words:
        chosen = {name: value for name, value in SMALL[task].items() if name not in given}
        apply(config, chosen)
        if chosen and distributed.is_main():
            print(f"defaults on a CPU: {' '.join(settings.as_flags(chosen))}", flush=True)
    apply(config, given)
    if "model.init" in given:
        if words:
            raise ConfigError("model.init: CKPT names the start already")
        inits = [config.model.init]
    return config, inits


def _continue(task: str, path: Path, given: Mapping[str, Any], device: torch.device) -> Outcome:
    """Continues a run folder or a checkpoint, with the options of the run."""
    saved = read_saved(path, task)
    folder = path if path.is_dir() else path.parent.parent
    return train(_as_saved(saved, {"train.dir": str(folder), **given}, task), device, saved)


def _as_saved(saved: Mapping[str, Any], given: Mapping[str, str], task: str) -> TaskConfig:
    """Returns the options of a checkpoint, with the given options."""
    config = from_dict(task, saved["config"], "checkpoint")
    apply(config, given)
    check_same_run(config, saved["config"])
    return config


def _start_or_continue(
    config: TaskConfig, resume: str, given: Mapping[str, Any], device: torch.device
) -> Outcome:
    """Runs a configuration. resume: "auto" continues the folder of the run, if there is a run."""
    saved = None
    if resume:
        folder = choose_folder(config, True)
        try:
            saved = read_saved(folder, config.recipe)
        except FileNotFoundError:
            if not config.model.init:
                raise
        if saved is not None:
            own = {**given, "train.dir": str(folder), "train.seed": str(config.train.seed)}
            if config.model.init:
                own["model.init"] = config.model.init
            config = _as_saved(saved, own, config.recipe)
    return train(config, device, saved)


def _side_by_side(
    config: TaskConfig,
    inits: Sequence[str],
    seeds: Sequence[int],
    resume: str,
    given: Mapping[str, str],
    device: torch.device,
) -> int:
    """Trains from every start with every seed, and compares the figures. Returns the status."""
    labels = labels_of(inits)
    if len(set(labels)) < len(labels) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"CKPT: expected starts and seeds of different names, got {labels}")
    if resume and not config.train.dir:
        raise ConfigError("--resume auto: with several runs, --train.dir has to name their folder")
    parent = Path(distributed.from_main(str(choose_folder(config, False))))
    own: dict[str, Any] = {n: v for n, v in given.items() if n != "train.seeds"}
    # All starts have the encoder and the pixels of the first checkpoint.
    for init in [init for init in inits if init not in STARTS][:1]:
        start = find_start(copy.deepcopy(_with(config, init, 0, parent).model))
        values: dict[str, Any] = {
            "arch": start.arch,
            "channels": start.channels,
            "mean": start.mean,
        }
        own |= {f"model.{n}": v for n, v in {**values, "std": start.std}.items()}
    apply(config, own)
    figures: dict[str, list[dict[str, float]]] = {label: [] for label in labels}
    for seed in seeds:
        for init, label in zip(inits, labels):
            one = _with(config, init, seed, parent / f"{label}-seed{seed}")
            outcome = _start_or_continue(one, resume, own, device)
            if outcome.interrupted:
                if distributed.is_main():
                    print(
                        "to continue all runs: the same command with --train.dir "
                        f"{shlex.quote(str(parent))} --resume auto"
                    )
                return interrupts.EXIT_INTERRUPTED
            figures[label].append(outcome.values)
    if distributed.is_main():
        text = table(figures)
        with files.atomic_write(parent / "comparison.json") as file:
            file.write_text(json.dumps({"seeds": list(seeds), **figures}, indent=1) + "\n", "utf-8")
        (parent / "comparison.md").write_text(f"In percent:\n\n{text}\n", encoding="utf-8")
        print(
            f"in percent:\n{text}\nwritten to {parent}: comparison.md, comparison.json, and a "
            "folder for a run"
        )
    return 0


def labels_of(inits: Sequence[str]) -> list[str]:
    """Returns the names of starts: of a folder, or of a file without its ending.

    Where names are equal (last.pt of two runs), names of the folders above come first.
    """

    def name(init: str, parts: int) -> str:
        path = Path(os.path.abspath(init))
        return "-".join((path if path.is_dir() else path.with_suffix("")).parts[1:][-parts:])

    for parts in (1, 3):
        labels = [init if init in STARTS else name(init, parts) for init in inits]
        if len(set(labels)) == len(labels):
            break
    return labels


def _with(config: TaskConfig, init: str, seed: int, folder: Path) -> TaskConfig:
    """Returns a copy of the configuration for a run of several."""
    one = copy.deepcopy(config)
    one.model.init, one.train.seed, one.train.dir = init, seed, str(folder)
    one.train.seeds = ()  # config.yaml of a run is for one run
    return one


def table(figures: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Returns a Markdown table: mean and standard deviation over seeds.

    figures: {start: figures of all runs, 0 to 1}. The table is in percent.
    """
    known = [c for c in COLUMNS if any(c in run for runs in figures.values() for run in runs)]
    lines = ["| start | runs | " + " | ".join(known) + " |", "|---" * (len(known) + 2) + "|"]
    for label, runs in figures.items():
        cells = []
        for column in known:
            values = 100 * np.array([run[column] for run in runs if column in run])
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}" if len(values) else "")
        lines.append(f"| {label} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
