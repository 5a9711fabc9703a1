"""The commands that say what an encoder is worth: knn, linear and finetune."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mocofast.config import ConfigError, KNNConfig
from mocofast.evaluate.options import FinetuneConfig, LinearConfig, of_protocol
from mocofast.evaluation_arguments import evaluation_parser, load, size_of
from mocofast.log_format import PrintableFormatter
from mocofast.parser import Parser, given_settings, group_options

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mocofast.data.sources import Datasets
    from mocofast.evaluate.targets import Targets
    from mocofast.interop.classifiers import Classifier


def log_to_screen() -> None:
    """Prints the lines of the log, on rank 0."""
    from mocofast.distributed import is_main

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    level = logging.INFO if is_main() else logging.ERROR
    logging.basicConfig(level=level, handlers=[handler])


def knn(argv: Sequence[str]) -> int:
    """k-nearest-neighbour accuracy of a checkpoint"""
    description = (
        "Weighted kNN accuracy of a checkpoint's query encoder on labelled images.\n"
        "The search is exact, and its memory does not grow with the bank: --knn.bank takes "
        "millions."
    )
    parser = _with_folder(
        evaluation_parser(
            *("knn", description, "knn", KNNConfig),
            often=("--knn.k", "--knn.temperature"),
            examples=("mocofast knn runs/RECIPE --data.path LABELLED",),
        )
    )
    arguments = parser.parse(argv)
    from mocofast.evaluate.knn import few_shot_accuracy
    from mocofast.evaluate.metrics import measure
    from mocofast.evaluate.search import MOST_KEPT, search
    from mocofast.interop.classifiers import Bank, Classifier, plain_encoder

    with _ranks("knn", arguments) as device:
        model, config, datasets = load(arguments)
        _say(datasets.lines())
        encoder = model.encoder_q.to(device)
        found = search(encoder, datasets, config, device)
        figures = measure(found.scores, found.labels, found.targets, 1000, config.train.seed)
        if config.knn.shots and found.bank is not None:
            shots = few_shot_accuracy(*found.bank, found.queries, found.labels, config.knn.shots)
            figures["few_shot_top1"] = shots.mean
        classifier = None
        if found.bank is None:
            _say(f"the bank has more than {MOST_KEPT:,} images, so no classifier is saved")
        elif config.knn.features == "backbone":
            bank = Bank(*found.bank, config.knn.k, config.knn.temperature)
            plain = plain_encoder(encoder.cpu(), config)
            classifier = Classifier("knn", found.targets, config, plain, bank)
        results = (found.targets, found.scores, found.labels)
        _finish("knn", arguments, datasets, figures, *results, classifier)
    return 0


def linear(argv: Sequence[str]) -> int:
    """accuracy of a linear classifier on a checkpoint's frozen features"""
    description = (
        "Trains a linear classifier on a checkpoint's frozen query encoder and validates it.\n"
        "Several GPUs: torchrun --nproc-per-node N -m mocofast linear ..."
    )
    parser = _with_folder(
        evaluation_parser(
            *("linear", description, "linear", LinearConfig),
            often=("--linear.protocol",),
            examples=(
                "mocofast linear runs/RECIPE --data.path LABELLED",
                "mocofast linear runs/RECIPE --data.path LABELLED --linear.protocol reference",
            ),
        )
    )
    arguments = parser.parse(argv)
    import torch
    from torch import nn

    from mocofast.evaluate.linear import fit_probe
    from mocofast.evaluate.metrics import measure
    from mocofast.evaluate.targets import targets_of
    from mocofast.interop.classifiers import Classifier, plain_encoder
    from mocofast.models.heads import replace_head

    options = group_options(LinearConfig, "linear", arguments)
    with _ranks("linear", arguments) as device:
        model, config, datasets = load(arguments)
        options = of_protocol(options, given_settings(arguments), config.model.arch)
        log_to_screen()
        _say(datasets.lines())
        encoder = model.encoder_q.to(device)
        probe = fit_probe(encoder, datasets, config, options, device)
        targets = targets_of(datasets.train.classes, config.data.target)
        seed = config.train.seed
        figures = measure(probe.scores, probe.labels, targets, options.bootstrap, seed, logits=True)
        if probe.train_top1 is not None:
            name = {"class": "train_top1", "tags": "train_map", "number": "train_r2"}
            figures[name[targets.kind]] = probe.train_top1
        if probe.l2 is not None:
            figures["l2"] = probe.l2
        plain = plain_encoder(encoder.cpu(), config)
        outputs, width = probe.weight.shape
        head = nn.Linear(width, outputs)
        with torch.no_grad():
            head.weight.copy_(probe.weight)
            head.bias.copy_(probe.bias)
        replace_head(plain, head)
        classifier = Classifier("linear", targets, config, plain, None)
        results = (targets, probe.scores, probe.labels)
        _finish("linear", arguments, datasets, figures, *results, classifier)
    return 0


def finetune(argv: Sequence[str]) -> int:
    """accuracy of a checkpoint's encoder after training all of it on labels"""
    description = (
        "Trains a checkpoint's query encoder and a new linear head on labelled images, "
        "and validates it.\n"
        "Several GPUs: torchrun --nproc-per-node N -m mocofast finetune ..."
    )
    parser = _with_folder(
        evaluation_parser(
            *("finetune", description, "finetune", FinetuneConfig),
            often=("--finetune.epochs", "--finetune.lr", "--finetune.batch_size"),
            examples=(
                "mocofast finetune runs/RECIPE --data.path LABELLED",
                "mocofast finetune runs/RECIPE --data.path LABELLED --data.labels 0.01",
            ),
        )
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="also write the trained classifier's state dict, in torchvision's names",
    )
    arguments = parser.parse(argv)
    from mocofast.device import run_autocast
    from mocofast.distributed import is_main, rank_and_world_size
    from mocofast.evaluate.finetune import train_classifier
    from mocofast.evaluate.metrics import measure
    from mocofast.evaluate.targets import targets_of
    from mocofast.interop.classifiers import Classifier, plain_encoder
    from mocofast.train.checkpoint_writer import save_atomically

    options = group_options(FinetuneConfig, "finetune", arguments)
    with _ranks("finetune", arguments) as device:
        model, config, datasets = load(arguments)
        log_to_screen()
        _say(datasets.lines())
        encoder = model.encoder_q
        if rank_and_world_size()[1] > 1:
            encoder = plain_encoder(encoder, config)
        encoder = encoder.to(device)
        autocast = run_autocast(config, encoder, device)
        found = train_classifier(encoder, datasets, config, options, device, autocast)
        if arguments.out and is_main():
            save_atomically(encoder.state_dict(), Path(arguments.out))
        targets = targets_of(datasets.train.classes, config.data.target)
        figures = measure(*found, targets, options.bootstrap, config.train.seed, logits=True)
        classifier = Classifier("finetune", targets, config, encoder, None)
        _finish("finetune", arguments, datasets, figures, targets, *found, classifier)
    return 0


def zeroshot(argv: Sequence[str]) -> int:
    """accuracy of an image-text checkpoint by the names of classes, without training"""
    description = (
        "Classifies labelled images by the texts of class names, with a checkpoint of method clip."
        "\nWith --classes: only writes the classifier of these classes, for mocofast predict."
    )
    parser = _with_folder(
        evaluation_parser(
            *("zeroshot", description),
            often=("--classes", "--names", "--templates"),
            examples=("mocofast zeroshot RUN --data.path PHOTOS",),
        )
    )
    parser.add_argument(
        "--templates",
        nargs="+",
        metavar="TEXT",
        help="texts with {} in the place of a name, whose embeddings are averaged, or a .txt file "
        "with one in every line [a photo of a {}.]",
    )
    parser.add_argument(
        "--names",
        metavar="FILE",
        default="",
        help="a CSV file with rows CLASS,NAME: names for the texts [the class, with spaces for _]",
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="any classes, instead of labelled images"
    )
    arguments = parser.parse(argv)
    from mocofast.data.sources import labelled
    from mocofast.evaluate.metrics import measure
    from mocofast.interop import zero_shot
    from mocofast.interop.reference_checkpoints import load_any

    templates = zero_shot.read_templates(arguments.templates or zero_shot.TEMPLATES)
    with _ranks("zeroshot", arguments) as device:
        if arguments.classes:
            model, config, *_ = load_any(arguments.checkpoint, arguments.arch, size_of(arguments))
            classes, datasets = tuple(arguments.classes), None
        else:
            model, config, datasets = load(arguments)
            _say(datasets.lines())
            classes = datasets.train.classes
            if not classes:
                raise ConfigError(f"data.path: needs labelled images, got {datasets.note}")
        model = zero_shot.with_texts(model, config.model.method)
        names = zero_shot.read_names(arguments.names, classes)
        classifier = zero_shot.zero_shot_classifier(model, config, classes, names, templates)
        if datasets is None:
            _save(_folder("zeroshot", arguments), classifier, [])
            return 0
        classifier.encoder.to(device)
        source = datasets.val or labelled(datasets.train)
        found = zero_shot.classify(classifier, source, device)
        figures = measure(*found, classifier.targets, 1000, config.train.seed)
        _finish("zeroshot", arguments, datasets, figures, classifier.targets, *found, classifier)
    return 0


def _with_folder(parser: Parser) -> Parser:
    parser.add_argument(
        "--dir",
        metavar="FOLDER",
        default="",
        help="folder of results.json, classifier.pt, per_class.csv and confusion.png [a folder of "
        "the command's name in the run folder]",
    )
    return parser


@contextmanager
def _ranks(command: str, arguments: Namespace) -> Iterator[torch.device]:
    """Joins the ranks of torchrun inside the block. Yields the device of this rank.

    Raises ConfigError if rank 0 cannot write its results after the work.
    """
    import torch

    from mocofast import distributed, files
    from mocofast.device import choose_device

    device = choose_device(arguments.device)
    rank, world_size, local_rank = distributed.init_from_environment(device)
    arguments.started = time.monotonic()
    if device.type == "cuda" and world_size > 1:
        device = torch.device("cuda", local_rank)
    try:
        if rank == 0:
            files.require_writable(_folder(command, arguments), "--dir")
        yield device
    finally:
        distributed.shutdown()


def _say(text: str) -> None:
    from mocofast.distributed import is_main

    if is_main():
        print(text, flush=True)


def _finish(
    command: str,
    arguments: Namespace,
    datasets: Datasets,
    figures: dict[str, object],
    targets: Targets,
    scores: Tensor,
    labels: Tensor,
    classifier: Classifier | None,
) -> None:
    """Prints the figures, and writes results and classifier, on rank 0."""
    from mocofast.distributed import is_main
    from mocofast.evaluate.results import lines, write_results

    if not is_main():
        return
    print("\n".join(lines(command, figures)))
    folder = _folder(command, arguments)
    context = {
        "checkpoint": arguments.checkpoint,
        "images": [datasets.note, *datasets.remarks],
        "options": given_settings(arguments),
        "seconds": round(time.monotonic() - arguments.started, 1),
    }
    written = write_results(folder, command, figures, context, targets, scores, labels)
    _save(folder, classifier, written)


def _folder(command: str, arguments: Namespace) -> Path:
    from mocofast.evaluate.results import folder_of

    return Path(arguments.dir) if arguments.dir else folder_of(arguments.checkpoint, command)


def _save(folder: Path, classifier: Classifier | None, written: list[str]) -> None:
    """Writes the classifier, and says what was written."""
    from mocofast.interop.classifiers import FILE, save_classifier

    if classifier is not None:
        folder.mkdir(parents=True, exist_ok=True)
        save_classifier(classifier, folder / FILE)
        written = [*written, FILE]
    print(f"written to {folder}: {', '.join(written)}")
    if classifier is not None:
        print(f"next: mocofast predict {shlex.quote(str(folder))} IMAGE")
