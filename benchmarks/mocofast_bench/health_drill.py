"""Faults put into small runs on a CPU: does the verdict name them, and does it stay quiet else?

    python -m mocofast_bench.health_drill [--seeds 3 [--first-seed 3]] [--only NAME ...] [--out DIR]

Trains the digits with every fault, and without a fault over methods and seeds, and prints a table
in Markdown. `--out` keeps the run folders, and takes finished runs from there.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mocofast import settings
from mocofast.errors import DivergedError
from mocofast.health.folder import evidence_of
from mocofast.health.verdict import diagnose, verdict
from mocofast.train.run import train

DRILL = "mocofast_bench.drill_faults"


class Fault(NamedTuple):
    """A fault: the finding that must come first, and the options that make the fault."""

    expected: str
    options: dict[str, Any]


FAULTS = {
    "no stop-gradient": Fault(
        "collapse", {"model.method": DRILL, "model.hidden_dim": 128, "optim.lr": 0.06}
    ),
    "BatchNorm leak": Fault("BatchNorm leak", {"model.bn_splits": 32, "model.shuffle_bn": False}),
    "queue beyond the set": Fault("queue beyond the set", {"model.queue_size": 4096}),
    "stale queue, m too small": Fault("stale queue", {"model.momentum": 0.0}),
    "rate 10 times too high": Fault("rate too high", {"optim.lr": 1.2}),
    "rate 10 times too low": Fault("rate too low", {"optim.lr": 0.012}),
    "wrong normalisation": Fault(
        "normalisation", {"augment.mean": [0.0] * 3, "augment.std": [1 / 255] * 3}
    ),
    "constant images": Fault("constant images", {"data.source": DRILL, "data.path": "constant"}),
    "duplicate images": Fault(
        "duplicate images", {"data.source": DRILL, "data.path": "duplicates"}
    ),
    "labels shuffled": Fault("labels", {"data.source": DRILL, "data.path": "labels"}),
    "augmentation off": Fault(
        "augmentation off",
        {"augment.crop_scale": [1.0, 1.0], "augment.rotate": 0.0, "augment.jitter_p": 0.0},
    ),
    "frozen key encoder": Fault("frozen key encoder", {"model.momentum": 1.0}),
    "NaN": Fault("diverged", {"optim.lr": 1e12}),
}
HEAD = {"model.hidden_dim": 128}
PREDICTING = {**HEAD, "model.momentum_schedule": "cosine"}
CLIP = {
    **{"model.method": "clip", "data.source": DRILL, "data.path": "captions"},
    **{"model.text_width": 32, "model.text_layers": 1, "model.text_length": 32},
    **{"model.dim": 32, "model.queue_size": 0, "optim.name": "adamw", "optim.lr": 0.002},
}
SMALL_VIEWS = {
    "augment.local_crops": 2,
    "augment.local_size": 6,
    "augment.local_scale": [0.3, 0.7],
}
SWAV = {
    **{**HEAD, "model.method": "swav", "model.prototypes": 100, "model.epsilon": 0.02},
    **{"model.freeze_prototypes": 11, "model.temperature": 0.1},
}
# Healthy runs: every method on the digits, with rates that suit the method.
METHODS: dict[str, dict[str, Any]] = {
    "moco": {},
    "moco, symmetric": {"model.symmetric": True, "model.queue_size": 128},
    "moco v2 head, adamw": {"model.mlp": True, "optim.name": "adamw", "optim.lr": 0.002},
    "moco, shuffled splits": {"model.bn_splits": 8},
    "moco_v3": {**PREDICTING, "model.method": "moco_v3", "model.temperature": 0.2},
    "byol": {**PREDICTING, "model.method": "byol", "optim.lr": 0.06},
    "simclr": {**HEAD, "model.method": "simclr"},
    "memory_bank": {
        **{"model.method": "memory_bank", "model.momentum": 0.5, "model.queue_size": 512},
        # The slots are random at first. At the recipe's 0.12, or without warm-up, it may collapse.
        **{"model.mlp": True, "optim.lr": 0.03, "optim.warmup_epochs": 5},
    },
    "swav": SWAV,
    "supervised": {"model.method": "supervised"},
    "moco, small views": SMALL_VIEWS,
    "simclr, small views": {**SMALL_VIEWS, **HEAD, "model.method": "simclr"},
    "swav, small views": {**SMALL_VIEWS, **SWAV},
    "clip": CLIP,
    "clip, queues": {
        **{**CLIP, "model.queue_size": 256, "model.momentum": 0.9, "model.temperature": 0.07},
        **{"optim.lr": 0.001, "optim.warmup_epochs": 2},
    },
}


class Outcome(NamedTuple):
    """A run: the name of its first finding ("" for none), and the verdict."""

    found: str
    verdict: str


def one(folder: Path, options: dict[str, Any], seed: int, epochs: int) -> Outcome:
    """Trains the digits with options, if `folder` holds no such run yet. Returns the outcome."""
    if not (folder / "train.log").exists():
        config = settings.load_recipe("digits")
        base = {
            **{"train.dir": str(folder), "train.epochs": epochs, "train.seed": seed},
            **{"train.log_every": 11, "knn.shots": 0, "checkpoint.every_epochs": 1000},
            **{"train.device": "cpu", "data.workers": 0, "knn.every": 0},
        }
        settings.apply(config, {**base, **options})
        settings.validate(config)
        with contextlib.suppress(DivergedError):
            train(config)
    evidence = evidence_of(folder)
    findings = diagnose(evidence)
    return Outcome(findings[0].name if findings else "", verdict(evidence))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the drill. Returns 0 if at least 11 faults are named and no healthy run is accused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="of every healthy method [3]")
    parser.add_argument("--first-seed", type=int, default=0, help="of the healthy runs [0]")
    parser.add_argument("--epochs", type=int, default=30, help="of a run [30]")
    parser.add_argument("--only", nargs="*", default=[], help="names of faults and methods")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    given = parser.parse_args(argv)
    runs = [(name, fault.options, 0, fault.expected) for name, fault in FAULTS.items()]
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        runs += [(name, options, seed, "") for name, options in METHODS.items()]
    named = wrong = alarms = healthy = 0
    print("| run | seed | found | verdict |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary, _quiet():
        out = given.out or Path(temporary)
        for name, options, seed, expected in runs:
            if given.only and name not in given.only:
                continue
            folder = out / f"{name}-{seed}".replace(" ", "-").replace(",", "")
            outcome = one(folder, options, seed, given.epochs)
            mark = "" if outcome.found == expected else " (wrong)"
            print(f"| {name} | {seed} | {outcome.found or 'healthy'}{mark} | {outcome.verdict} |")
            if expected:
                named, wrong = named + (not mark), wrong + bool(mark)
            else:
                healthy, alarms = healthy + 1, alarms + bool(mark)
    print(f"\n{named} of {named + wrong} faults named, {alarms} alarms in {healthy} healthy runs")
    return 0 if wrong <= 2 and not alarms else 1


if __name__ == "__main__":
    raise SystemExit(main())
