"""Command lines of evaluation: options, and the model of a checkpoint with the images."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mocofast import settings
from mocofast.config import AugmentConfig, Config, DataConfig
from mocofast.parser import Parser, add_device, add_settings, given_settings, group_options
from mocofast.view_sizes import Size

if TYPE_CHECKING:
    from torch import nn

    from mocofast.data.sources import Datasets
    from mocofast.interop.classifiers import Classifier
    from mocofast.methods.base import Method


# Options of the order and the batches of pretraining.
_OF_TRAINING = ("data.batch_size", "data.checksum", "data.drop_last", "data.shuffle_window")
# Options of the loader of random views.
_OF_VIEWS = (
    *("data.decode", "data.hw_decoder_load", "data.loader", "data.preallocate", "data.prefetch"),
    *("augment.crop_ratio", "augment.flip", "augment.quarter_turns", "augment.vertical_flip"),
)
_OF_IMAGES = ("augment.size", "augment.mean", "augment.std")
# Options of the monitor of a run.
_OF_MONITOR = ("knn.every", "knn.start", "knn.start_limit", "knn.patience", "knn.size")


def add_image_settings(parser: Parser, views: bool = False, without: Sequence[str] = ()) -> None:
    """Adds the options of how images are found, read and made views of.

    views: whether the command trains on random views (crops and flips), or looks at whole images.
    without: further options that the command does not use.
    """
    used = {*_OF_IMAGES, *(_OF_VIEWS if views else ())}
    every = {each.name for each in settings.settings("augment", AugmentConfig)}
    unused = {*_OF_TRAINING, *_OF_VIEWS, *every, *without} - used
    add_settings(parser, {"data": DataConfig, "augment": AugmentConfig}, unused)


def evaluation_parser(
    name: str,
    description: str,
    group: str = "",
    kind: Any = None,
    often: Sequence[str] = (),
    examples: Sequence[str] = (),
) -> Parser:
    """Returns a parser of `mocofast NAME CKPT --data.path DIR ...`.

    group, kind: a further group of options, and its dataclass, or "" for none.
    often: options that --help shows, beside those of all evaluations.
    """
    parser = Parser(
        prog=f"mocofast {name}",
        usage=f"mocofast {name} CHECKPOINT [--data.path LABELLED] [--OPTION VALUE ...]",
        description=description,
        often=("--data.path", "--data.labels", "--data.target", "--device", "--dir", *often),
        examples=examples,
    )
    parser.add_argument(
        "checkpoint", help="a run folder, or a checkpoint file of any known project"
    )
    add_device(parser)
    add_arch(parser)
    add_image_settings(parser, views=group in ("linear", "finetune"))
    if group:
        add_settings(parser, {group: kind}, _OF_MONITOR)
    return parser


def add_arch(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names the encoder of a file."""
    parser.add_argument(
        "--model.arch",
        metavar="NAME",
        dest="arch",
        help="the encoder of a file of another project, where its weights do not show it",
    )


def size_of(arguments: argparse.Namespace) -> Size:
    """Returns the option augment.size."""
    size: Size = group_options(AugmentConfig, "augment", arguments).size
    return size


def load(arguments: argparse.Namespace) -> tuple[Method, Config, Datasets]:
    """Returns the model, its run's configuration with the given data options, and the images."""
    from mocofast.interop.reference_checkpoints import load_any

    model, config, layout, *_ = load_any(arguments.checkpoint, arguments.arch, size_of(arguments))
    if layout != "mocofast":
        print(f"{arguments.checkpoint}: {config.model.arch}, the layout of {layout}")
    return model, config, own_images(config, given_settings(arguments), arguments.checkpoint)


def load_encoder(
    arguments: argparse.Namespace, newest: bool = False
) -> tuple[nn.Module, Config, Classifier | None]:
    """Returns an encoder, its configuration, and the classifier that it belongs to, or None.

    newest: take the newest classifier of a run folder. Otherwise a run folder means its checkpoint.
    """
    from mocofast.interop.classifiers import FILE, find_classifier, load_classifier
    from mocofast.interop.reference_checkpoints import load_any

    path = Path(arguments.checkpoint)
    if newest or path.name == FILE or (path / FILE).is_file():
        file = find_classifier(arguments.checkpoint)
        if file is not None:
            classifier = load_classifier(file)
            return classifier.encoder, classifier.config, classifier
    model, config, *_ = load_any(arguments.checkpoint, arguments.arch, size_of(arguments))
    return model.encoder_q, config, None


def own_images(config: Config, given: Mapping[str, str], checkpoint: str) -> Datasets:
    """Returns the given images, or those of the run. Applies the given options to `config`.

    config: of the file `checkpoint`. given: {"group.option": text}.
    """
    from mocofast.data.sources import load_datasets, with_remarks
    from mocofast.train.configure import source_of
    from mocofast.train.places import check_places

    given = dict(given)
    if "data.path" in given:
        # Options that belong to the images of the run, not to the given images.
        given.setdefault("data.source", source_of(given["data.path"]))
        own = ["train", "val", "include", "exclude", "labels", "target", "captions", "column"]
        own += ["group", "pairs"]
        for name in own:
            given.setdefault(f"data.{name}", getattr(DataConfig, name))
    check_places(config, checkpoint, given, writes=False)
    settings.apply(
        config,
        {name: value for name, value in given.items() if hasattr(config, name.split(".")[0])},
    )
    settings.validate(config)
    datasets = load_datasets(config.data, config.train.seed)
    return with_remarks(datasets, config.data.channels)
