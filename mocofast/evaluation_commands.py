"""The commands that say what an encoder is worth: knn, linear and finetune."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from mocofast.config import ConfigError, KNNConfig
from mocofast.evaluate.options import FinetuneConfig, LinearConfig
from mocofast.evaluation_arguments import evaluation_parser, load
from mocofast.log_format import PrintableFormatter
from mocofast.parser import group_options


def log_to_screen() -> None:
    """Prints the lines of the log."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def knn(argv: Sequence[str]) -> int:
    """k-nearest-neighbour accuracy of a checkpoint"""
    description = "Weighted kNN accuracy of a checkpoint's query encoder on labelled images."
    arguments = evaluation_parser("knn", description, "knn", KNNConfig).parse(argv)
    from mocofast.device import choose_device
    from mocofast.evaluate.monitor import KNNMonitor

    model, config, datasets = load(arguments)
    device = choose_device(arguments.device)
    monitor = KNNMonitor.of(datasets, config, device)
    if monitor is None:
        raise ConfigError(
            f"data.path: kNN needs labelled images, some of them held out; got {datasets.note}"
        )
    print(datasets.lines())
    for name, value in monitor.evaluate(model.encoder_q.to(device)).items():
        print(f"{name} {value:.4f}")
    return 0


def linear(argv: Sequence[str]) -> int:
    """accuracy of a linear classifier on a checkpoint's frozen features"""
    description = (
        "Trains a linear classifier on a checkpoint's frozen query encoder and validates it."
    )
    arguments = evaluation_parser("linear", description, "linear", LinearConfig).parse(argv)
    from mocofast.device import choose_device
    from mocofast.evaluate.linear import linear_probe

    options = group_options(LinearConfig, "linear", arguments)
    model, config, datasets = load(arguments)
    device = choose_device(arguments.device)
    log_to_screen()
    print(datasets.lines())
    result = linear_probe(model.encoder_q.to(device), datasets, config, options, device)
    for name, value in result._asdict().items():
        if value is not None:
            print(f"{'linear_' if name.startswith('top') else ''}{name} {value:.4g}")
    return 0


def finetune(argv: Sequence[str]) -> int:
    """accuracy of a checkpoint's encoder after training all of it on labels"""
    description = (
        "Trains a checkpoint's query encoder and a new linear head on labelled images, "
        "and validates it."
    )
    parser = evaluation_parser("finetune", description, "finetune", FinetuneConfig)
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write the trained classifier's state dict, in torchvision's names",
    )
    arguments = parser.parse(argv)
    from mocofast.device import choose_autocast, choose_device
    from mocofast.evaluate import finetune as protocol
    from mocofast.train.checkpoint_writer import save_atomically

    options = group_options(FinetuneConfig, "finetune", arguments)
    model, config, datasets = load(arguments)
    device = choose_device(arguments.device)
    log_to_screen()
    print(datasets.lines())
    encoder = model.encoder_q.to(device)
    autocast = choose_autocast(config.train.precision, device)
    result = protocol.finetune(encoder, datasets, config, options, device, autocast)
    if arguments.out:
        save_atomically(encoder.state_dict(), Path(arguments.out))
    print(f"finetune_top1 {result.top1:.4g}\nfinetune_top5 {result.top5:.4g}")
    return 0
