"""`mocofast bench`: our ops beside eager PyTorch, our loaders beside the reference's, all sides in one run.

Every benchmark interleaves its candidates in one process, prints a table with the machine's own limit measured in
the same run, and ends with one JSON line that `--save FILE` also appends to a file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mocofast.bench import data, ema, kernels


def main(argv: Sequence[str] | None = None) -> int:
    """Run `kernels`, `ema` or `data`; returns the exit status (arguments that cannot be used exit with 2)."""
    parser = argparse.ArgumentParser(
        prog="mocofast bench", description="Times ops and loaders beside what they replace."
    )
    commands = parser.add_subparsers(required=True, metavar="kernels|ema|data")
    for module, name, text in (
        (kernels, "kernels", "InfoNCE: time and memory of forward and backward"),
        (ema, "ema", "EMA of a ResNet-50's weights"),
        (data, "data", "pairs of views per second from a folder of images"),
    ):
        command = commands.add_parser(name, help=text, description=module.__doc__)
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
        command.add_argument("--repeats", type=positive, default=20, help="timed rounds (default: %(default)s)")
        command.add_argument("--save", type=Path, metavar="FILE", help="append the JSON line to this file")
        module.add_arguments(command, positive)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    row = arguments.run(arguments)
    line = json.dumps(row)
    print(line)
    if arguments.save is not None:
        with arguments.save.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return 0


def positive(text: str) -> int:
    """An argparse type: an integer >= 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: got {value}")
    return value
