"""The tasks of `mocofast bench speedrun`: recipes, images, and the knobs of the search."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mocofast import settings
from mocofast.config import Config


@dataclass(frozen=True)
class Task:
    """An encoder and a set of images.

    plain: the recipe to beat.
    both: options of both sides: encoder, images, kNN.
    shortened: options of the plain side that fit its recipe to the set.
    budget: options of every run of the search.
    knobs: values that the search combines.
    first: combinations that the search tries before the random ones.
    evaluations: of a run of a side, at most.
    """

    plain: str
    both: Mapping[str, Any] = field(default_factory=dict)
    shortened: Mapping[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    knobs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    first: tuple[Mapping[str, Any], ...] = ()
    evaluations: int = 10

    def config(self, path: str = "", fast: str = "") -> Config:
        """Returns the configuration of the plain side, or of a fast recipe.

        path: folder of the images, for a task on image files.
        fast: a recipe, or a .yaml file.
        """
        config = settings.load_recipe(fast or self.plain)
        options = {**self.both, **({} if fast else self.shortened)}
        if path:
            options |= {"data.source": "folder", "data.path": path}
        options |= {"knn.start": False, "train.device": "cpu", "train.precision": "fp32"}
        settings.apply(config, options)
        config.knn.every = -(-config.train.epochs // self.evaluations)
        config.checkpoint.every_epochs = config.train.epochs
        return config


def growing(**epochs: int) -> dict[str, Any]:
    """Returns options of a run of growing views: growing(px16=4, px32=2) for 4 and 2 epochs."""
    starts = itertools.accumulate(epochs.values(), initial=0)
    sizes = tuple(f"{start}:{size.removeprefix('px')}" for size, start in zip(epochs, starts))
    return {"train.epochs": sum(epochs.values()), "augment.sizes": sizes}


SIMCLR: dict[str, Any] = {
    "model.method": "simclr",
    "model.temperature": 0.2,
    "model.hidden_dim": 128,
    "augment.crop_scale": (0.2, 1.0),
}

# One epoch in small batches.
EPOCH: dict[str, Any] = SIMCLR | {"data.batch_size": 32, "train.epochs": 1}
ADAMW: dict[str, Any] = {"optim.name": "adamw", "optim.weight_decay": 0.01}


def jitter(strength: float, hue: float) -> dict[str, Any]:
    """Returns the option of colours. strength: of brightness, contrast and saturation."""
    return {"augment.jitter": (strength, strength, strength, hue)}


TASKS = {
    "digits": Task(
        "digits",
        budget={"train.epochs": 25},
        knobs={
            "optim.lr": (0.03, 0.06, 0.12, 0.25, 0.5),
            "data.batch_size": (32, 64, 128),
            "model.queue_size": (256, 1024),
            "model.momentum": (0.9, 0.97, 0.99),
            "model.temperature": (0.1, 0.2),
            "augment.crop_scale": ((0.4, 1.0), (0.6, 1.0)),
            "augment.sizes": ((), ("0:6", "15:8")),
        },
    ),
    "cifar10": Task(
        "cifar10_r18",
        both={
            "model.arch": "mocofast.models.narrow:resnet18_quarter",
            "knn.k": 20,
            "data.loader": "device",
        },
        # The rate of the recipe is that of batches of 512.
        shortened={"train.epochs": 20, "data.batch_size": 128, "optim.lr": 0.03},
        budget={"train.epochs": 8, "optim.per": "step", "model.queue_size": 1024},
        knobs={
            "optim.lr": (0.06, 0.12),
            "data.batch_size": (64, 128),
            "model.momentum": (0.97, 0.99),
            "model.temperature": (0.1, 0.2),
            "model.bn_splits": (1, 8),
            "augment.crop_scale": ((0.08, 1.0), (0.2, 1.0), (0.4, 1.0)),
            "augment.sizes": (("0:16", "6:32"), ("0:20", "7:32"), ("0:24", "7:32")),
        },
        first=(
            SIMCLR | {"optim.lr": 0.06, **growing(px16=6, px32=2)},
            SIMCLR | {"optim.lr": 0.12, **growing(px16=6, px32=2)},
            SIMCLR | {"optim.lr": 0.06, **growing(px16=5, px32=1)},
            SIMCLR | {"optim.lr": 0.12, **growing(px16=5, px32=1)},
            SIMCLR | {"optim.lr": 0.06, "data.batch_size": 64, **growing(px16=5, px32=1)},
            SIMCLR | {"optim.lr": 0.06, **growing(px16=4, px32=2)},
            SIMCLR | {"optim.lr": 0.06, **growing(px16=1, px32=1)},
            EPOCH | {"optim.lr": 0.03},
            EPOCH | {"optim.lr": 0.06},
            EPOCH | {"optim.lr": 0.001} | ADAMW,
            EPOCH | {"optim.lr": 0.003} | ADAMW,
            EPOCH | {"optim.lr": 0.003} | ADAMW | jitter(0.2, 0.05),
            EPOCH | {"optim.lr": 0.003} | ADAMW | jitter(0.3, 0.05),
            EPOCH | {"optim.lr": 0.003} | ADAMW | jitter(0.8, 0.2),
        ),
        evaluations=5,
    ),
    "vit": Task(
        "cifar10_moco_v3",
        both={
            "model.arch": "vit_tiny_cifar",
            "optim.name": "adamw",
            "optim.lr_per": 0,
            "optim.weight_decay": 0.1,
            "knn.k": 20,
            "data.loader": "device",
        },
        shortened={
            "model.hidden_dim": 1024,
            "train.epochs": 10,
            "data.batch_size": 128,
            "optim.lr": 0.0003,
            "optim.warmup_epochs": 2,
        },
        budget={"train.epochs": 6, "optim.warmup_epochs": 1, "data.batch_size": 128},
        knobs={
            "optim.lr": (0.0003, 0.001, 0.003),
            "data.batch_size": (64, 128),
            "model.momentum": (0.97, 0.99),
            "model.token_dropout": (0.0, 0.5),
            "augment.crop_scale": ((0.08, 1.0), (0.3, 1.0)),
            "augment.sizes": ((), ("0:16", "4:32")),
        },
        first=(
            SIMCLR | {"optim.lr": 0.001, **growing(px16=5, px32=1)},
            SIMCLR | {"optim.lr": 0.0005, **growing(px16=5, px32=1)},
            SIMCLR | {"optim.lr": 0.001, "model.token_dropout": 0.5, "train.epochs": 4},
            SIMCLR | {"optim.lr": 0.001, **growing(px16=4, px32=1)},
            {"optim.lr": 0.001, **growing(px16=5, px32=1)},
            SIMCLR | {"optim.lr": 0.001, **growing(px16=3, px32=1)},
            SIMCLR | {"optim.lr": 0.001, **growing(px16=2, px32=1)},
        ),
        evaluations=5,
    ),
}
