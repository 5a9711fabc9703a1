"""The commands that use an encoder on images: embed and predict."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mocofast.config import ConfigError
from mocofast.evaluation_arguments import add_arch, add_image_settings, load_encoder, own_images
from mocofast.parser import Parser, add_device, given_settings


def _parser(
    name: str, description: str, arguments: str, example: str, often: Sequence[str]
) -> Parser:
    parser = Parser(
        prog=f"mocofast {name}",
        usage=f"mocofast {name} CHECKPOINT {arguments} [--OPTION VALUE ...]",
        description=description,
        often=("--device", *often),
        examples=(example,),
    )
    parser.add_argument(
        "checkpoint",
        help="a run folder, a checkpoint file of any known project, or the folder of a classifier "
        "that knn, linear, finetune or zeroshot wrote",
    )
    add_device(parser)
    add_arch(parser)
    return parser


def embed(argv: Sequence[str]) -> int:
    """features, file names and labels of images, as parquet or npz"""
    parser = _parser(
        "embed",
        "Writes the features of all images of a set.\n"
        "OUT.npz: arrays features (N, D) float32, names (N,), labels (N,) int64 (-1: none), "
        "classes, and sets (N,) (train or val).\n"
        "OUT.parquet: columns name, label (text), set, and feature (list of D float32). Its memory "
        "does not grow with the set.",
        *("PHOTOS OUT", "mocofast embed runs/RECIPE PHOTOS features.npz", ["--features"]),
    )
    parser.add_argument("path", help="the images, as data.path of pretrain")
    parser.add_argument("out", help="the file to write, *.parquet or *.npz")
    parser.add_argument(
        "--features",
        choices=("backbone", "output"),
        default="backbone",
        help="pooled features before the head, or the output of the head [backbone]",
    )
    add_image_settings(parser, without=("data.path", "data.holdout"))
    arguments = parser.parse(argv)
    from mocofast.device import choose_device
    from mocofast.interop import embedding

    write = embedding.writer_of(arguments.out)
    encoder, config, _ = load_encoder(arguments)
    given = {"data.holdout": "0", **given_settings(arguments), "data.path": arguments.path}
    datasets = own_images(config, given, arguments.checkpoint)
    print(datasets.lines())
    device = choose_device(arguments.device)
    kind = arguments.features
    images = embedding.embedded(encoder.to(device), datasets, config, device, kind)
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    count, width = write(arguments.out, images, datasets.train.classes)
    print(f"written to {arguments.out}: {count:,} features of dimension {width}")
    return 0


def predict(argv: Sequence[str]) -> int:
    """classes of single images by a saved classifier, or their nearest neighbours"""
    parser = _parser(
        "predict",
        "Classifies single images. The classifier is the newest that finetune, linear, knn or "
        "zeroshot wrote into the run folder.\n"
        "Without a classifier, shows the nearest images of the run's images, or of --data.path.",
        *("IMAGE [IMAGE ...]", "mocofast predict runs/RECIPE photo.jpg --neighbours 5"),
        ["--top", "--neighbours", "--json", "--data.path"],
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders")
    parser.add_argument(
        "--top", type=int, default=3, metavar="N", help="classes that are shown [3]"
    )
    parser.add_argument(
        "--neighbours",
        type=int,
        default=0,
        metavar="N",
        help="also show the N nearest images of the run's images, or of --data.path "
        "[0; 5 without a classifier]",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for every image")
    add_image_settings(parser)
    arguments = parser.parse(argv)
    for name in ("top", "neighbours"):
        if getattr(arguments, name) < (name == "top"):
            least = int(name == "top")
            raise ConfigError(f"--{name}: expected {least} or more, got {getattr(arguments, name)}")
    from mocofast.device import choose_device
    from mocofast.interop import predicting

    encoder, config, classifier = load_encoder(arguments, newest=True)
    given = given_settings(arguments)
    # The run's own images, before options change how the images of the command are read.
    wanted = arguments.neighbours or (0 if classifier else 5)
    bank = own_images(config, given, arguments.checkpoint) if wanted else None
    device = choose_device(arguments.device)
    found, skipped = predicting.predict(
        arguments.images, encoder.to(device), config, device, classifier, bank, wanted
    )
    if classifier is not None and not arguments.json:
        print(
            f"{classifier.kind} of {len(classifier.targets.names)} {_of(classifier.targets.kind)}"
        )
    for row in found:
        row["predictions"] = row["predictions"][: arguments.top]
        print(json.dumps(row) if arguments.json else _described(row))
    for name, reason in skipped.items():
        print(f"mocofast predict: {name}: {reason}", file=sys.stderr)
    return 1 if skipped else 0


def _of(kind: str) -> str:
    return {"class": "classes", "tags": "tags", "number": "value"}[kind]


def _described(row: dict[str, Any]) -> str:
    """Returns the lines of an image."""
    shown = []
    for entry in row["predictions"]:
        score = entry["score"]
        is_value = entry["name"] == "value"
        shown.append(f"{score:.4g}" if is_value else f"{entry['name']} {score:.1%}")
    lines = [f"{row['image']}: {', '.join(shown)}" if shown else f"{row['image']}:"]
    for near in row.get("neighbours", []):
        label = f"  {near['label']}" if near["label"] else ""
        lines.append(f"    {near['similarity']:.4f}  {near['name']}{label}")
    return "\n".join(lines)
