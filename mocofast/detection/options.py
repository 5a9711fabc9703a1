"""The options of `mocofast detect` and `mocofast segment`, and how a run's options are found.

The defaults are the settings of MoCo's tables (He et al. 2020, arXiv:1911.05722, sec. 4.2 and
appendix) on Pascal VOC: 24,000 steps of 16 images for detection.
On a CPU, SMALL replaces the defaults. Loads no PyTorch: `--help` is quick.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mocofast import settings, yaml_files
from mocofast.config import CheckpointConfig, ConfigError
from mocofast.option import Valid, above, at_least, between, option

_NORM = (
    "BatchNorm of all layers: sync trains over the images of all ranks, frozen keeps the "
    "statistics of the checkpoint"
)
STARTS = ("scratch", "imagenet")
_SHARES = Valid(lambda value: all(0 < x < 1 for x in value), "shares of the run, between 0 and 1")


@dataclass
class StartOptions:
    """The encoder that a run starts from."""

    init: str = option(
        "", "scratch, imagenet (torchvision's weights, where on disk), or a checkpoint (CKPT)"
    )
    arch: str = option(
        "", "a ResNet, as pretrain's model.arch; empty takes that of the checkpoint, or resnet50"
    )
    channels: int = option(0, "1 (gray) or 3; 0 takes those of the checkpoint, or 3")
    mean: tuple[float, ...] = option(
        (), "mean of the channels, 0 to 1; empty takes those of the checkpoint, or ImageNet's"
    )
    std: tuple[float, ...] = option(
        (), "standard deviation of the channels; empty takes those of the checkpoint, or ImageNet's"
    )


@dataclass
class DetectModel(StartOptions):
    """The detector."""

    name: str = option(
        "faster_rcnn_c4",
        "the detector; c4 is MoCo's, with an extra BatchNorm in the head; the others have feature "
        "pyramids; retinanet is for small machines; mask_rcnn needs masks",
        ("faster_rcnn", "faster_rcnn_c4", "mask_rcnn", "mask_rcnn_c4", "retinanet"),
    )
    norm: str = option("sync", _NORM, ("sync", "frozen"))
    width: int = option(
        256, "channels of the feature pyramid and its heads; 64 for small machines", valid=above(0)
    )
    anchor: int = option(32, "side of the smallest anchor, in pixels", valid=above(0))
    rois: int = option(
        512, "regions an image that train the head of faster_rcnn and mask_rcnn", valid=at_least(1)
    )


@dataclass
class SegmentModel(StartOptions):
    """The network that labels every pixel."""

    name: str = option("fcn", "the head on the encoder", ("fcn", "deeplabv3"))
    norm: str = option("sync", _NORM, ("sync", "frozen"))
    stride: int = option(
        16,
        "pixels of the image a step of the last feature map; less than the encoder's own stride "
        "dilates the last stages (16 in MoCo's table, 8 in torchvision's)",
        valid=Valid(lambda value: value in (4, 8, 16, 32), "4, 8, 16 or 32"),
    )


@dataclass
class SetOptions:
    """Images with annotations."""

    path: str = option("", "folder of the set, in the layout of Pascal VOC or COCO")
    layout: str = option(
        "auto",
        "auto finds ImageSets/ (voc) or files in .json (coco)",
        ("auto", "voc", "coco"),
    )
    train: tuple[str, ...] = option(
        (),
        "sets to train on, also below sub-folders: VOC2007/trainval,VOC2012/trainval; "
        "empty takes trainval beside test, or train",
    )
    val: tuple[str, ...] = option(
        (), "sets to evaluate on; empty takes test beside trainval, or val"
    )
    classes: tuple[str, ...] = option(
        (), "names of the classes, in the order of their numbers; empty takes those of the set"
    )
    batch_size: int = option(16, "images per optimiser step, over all ranks", valid=at_least(1))
    flip: float = option(0.5, "probability of a horizontal flip", valid=between(0, 1))
    workers: int = option(-1, "threads that read images; -1: a thread per core of a rank")


@dataclass
class DetectData(SetOptions):
    """Images with boxes or masks."""

    sizes: tuple[int, ...] = option(
        (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        "shorter sides of the images in training, in pixels, at random",
        valid=at_least(16),
    )
    val_size: int = option(800, "shorter side of the images in evaluation", valid=at_least(16))
    max_size: int = option(1333, "largest longer side, in pixels", valid=at_least(16))


@dataclass
class SegmentData(SetOptions):
    """Images with a class for every pixel."""

    crop: int = option(513, "side of the random crop in training, in pixels", valid=at_least(16))
    scale: tuple[float, float] = option(
        (0.5, 2.0), "random factors of the image's size in training", valid=above(0)
    )
    val_size: int = option(
        0,
        "shorter side of the images in evaluation, and before the random factor in training; 0 "
        "keeps the size of the file",
        valid=at_least(0),
    )


@dataclass
class TaskOptim:
    """SGD and the schedule."""

    lr: float = option(0.02, "peak learning rate of a batch of lr_per images", valid=at_least(0))
    lr_per: int = option(
        16, "linear scaling: lr x batch_size / lr_per; 0 turns it off", valid=at_least(0)
    )
    momentum: float = option(0.9, "momentum", valid=between(0, 1))
    weight_decay: float = option(1e-4, "L2 weight decay, of all weights but BatchNorm's")
    schedule: str = option(
        "step", "step multiplies the rate by 0.1 at the milestones", ("step", "cosine", "constant")
    )
    milestones: tuple[float, ...] = option(
        (0.75, 0.917), "shares of the run at which schedule=step lowers the rate", valid=_SHARES
    )
    warmup_steps: int = option(
        100, "steps in which the rate rises linearly from 0", valid=at_least(0)
    )


@dataclass
class TaskTrain:
    """The loop."""

    epochs: int = option(
        23, "passes over the training set (23 on VOC07+12: 24,000 steps)", valid=at_least(0)
    )
    precision: str = option(
        "fp32", "fp32, or bf16 autocast in training; evaluation is fp32", ("fp32", "bf16")
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    seed: int = option(0, "seed of new weights, data order, flips and samples", valid=at_least(0))
    seeds: tuple[int, ...] = option(
        (), "train once with each of these seeds, and compare the means; empty takes train.seed"
    )
    log_every: int = option(50, "steps between log lines", valid=at_least(1))
    eval_every: int = option(
        0, "epochs between evaluations; 0 evaluates at the end alone", valid=at_least(0)
    )
    max_steps: int = option(0, "stop after this many steps in all; 0 trains every epoch")
    dir: str = option("", "run folder; empty makes runs/detect or runs/segment")


@dataclass
class DetectConfig:
    """Everything that defines a run of `mocofast detect`."""

    recipe: str = "detect"
    model: DetectModel = field(default_factory=DetectModel)
    data: DetectData = field(default_factory=DetectData)
    optim: TaskOptim = field(default_factory=TaskOptim)
    train: TaskTrain = field(default_factory=TaskTrain)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass
class SegmentConfig:
    """Everything that defines a run of `mocofast segment`."""

    recipe: str = "segment"
    model: SegmentModel = field(default_factory=SegmentModel)
    data: SegmentData = field(default_factory=SegmentData)
    optim: TaskOptim = field(default_factory=TaskOptim)
    train: TaskTrain = field(default_factory=TaskTrain)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


TaskConfig = DetectConfig | SegmentConfig
# Defaults on a CPU, where MoCo's settings would take weeks.
SMALL: dict[str, dict[str, Any]] = {
    "detect": {
        "model.name": "faster_rcnn",
        "model.width": 64,
        "model.anchor": 8,
        "model.rois": 128,
        "data.sizes": (160,),
        "data.val_size": 160,
        "data.batch_size": 4,
        "optim.lr_per": 4,
    },
    "segment": {
        "data.crop": 160,
        "data.val_size": 160,
        "data.batch_size": 8,
        "optim.lr_per": 8,
    },
}
KINDS: dict[str, type] = {"detect": DetectConfig, "segment": SegmentConfig}


def groups(kind: type) -> dict[str, type]:
    """Returns the groups of options of a task, {name: dataclass}."""
    return {name: t for name, t in typing.get_type_hints(kind).items() if name != "recipe"}


def apply(config: TaskConfig, values: Mapping[str, Any]) -> None:
    """Sets options, {"group.option": value or text}, and checks all options.

    Raises ConfigError for an unknown name or a bad value.
    """
    known = {
        s.name: s
        for name, kind in groups(type(config)).items()
        for s in settings.settings(name, kind)
    }
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"unknown option {name!r}{settings.nearest(name, known)}")
        group, key = name.split(".")
        setattr(getattr(config, group), key, settings.coerce(known[name], value))
    for name, setting in known.items():
        group, key = name.split(".")
        value = getattr(getattr(config, group), key)
        if setting.valid and value != () and not setting.valid.holds(value):
            raise ConfigError(f"{name}: expected {setting.valid.expected}, got {value!r}")


def read_yaml(task: str, path: Path) -> TaskConfig:
    """Returns the configuration of a config.yaml of the task. Raises ConfigError."""
    try:
        content, lines = yaml_files.read(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        return from_dict(task, content, str(path))
    except ConfigError as error:
        raise yaml_files.at_line(error, str(path), lines) from None


def from_dict(task: str, content: Any, what: str) -> TaskConfig:
    """Returns the configuration in nested dictionaries. what: the file, for the message."""
    if not isinstance(content, Mapping) or content.get("recipe", task) != task:
        raise ConfigError(f"{what}: expected the options of a run of mocofast {task}")
    config: TaskConfig = KINDS[task]()
    values = {}
    for group, options in content.items():
        if group == "recipe":
            continue
        if not isinstance(options, Mapping):
            raise ConfigError(f"{what}: {group}: expected options, got {options!r}")
        values.update({f"{group}.{key}": value for key, value in options.items()})
    apply(config, values)
    return config


# Options that may change in a continued run: they change neither the model nor the images' order.
FREE_TO_CHANGE = (
    *("data.path", "data.workers", "train.device", "train.max_steps", "train.dir"),
    *("train.log_every", "train.seeds", "checkpoint."),
)


def check_same_run(config: TaskConfig, saved: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming the option, if `config` differs from a checkpoint's options."""
    for group, options in settings.to_dict(config).items():
        if group == "recipe":
            continue
        for key, value in options.items():
            name, then = f"{group}.{key}", saved[group].get(key, value)
            if value != then and not name.startswith(FREE_TO_CHANGE):
                raise ConfigError(
                    f"{name}: {value!r}, but the run to continue has {then!r}. To change this "
                    "option, start a new run (another --train.dir, no --resume)"
                )
