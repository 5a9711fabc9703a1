"""`mocofast bench`: our ops, steps and loaders beside what they replace, all sides in one run.

Every benchmark interleaves its candidates in one process, prints a table with the machine's own limit measured in
the same run, and ends with one JSON line that `--save FILE` also appends to a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from mocofast_bench import (
    autotune,
    data,
    ema,
    kernels,
    machine_code,
    norm,
    optim,
    step,
    sweep,
    train,
)

BENCHMARKS = {
    "kernels": (kernels, "InfoNCE: time and memory of forward and backward"),
    "sweep": (sweep, "InfoNCE over numbers of queries and negatives and dimensions, with plots"),
    "ema": (ema, "EMA of a ResNet-50's weights"),
    "optim": (optim, "SGD, LARS and AdamW with EMA and bfloat16 copies, of a ResNet-50's weights"),
    "norm": (norm, "ghost BatchNorm of a ResNet-50's activations"),
    "data": (data, "pairs of views per second from a folder of images"),
    "step": (step, "one optimiser step beside the reference's, a strong eager one and lightly's"),
    "train": (
        train,
        "training end to end on a folder of images beside the reference's loop and loader",
    ),
}
COMPILING = {
    "static": (machine_code, "the kernels' machine code and predicted times; needs no GPU"),
    "autotune": (autotune, "choose the kernels' tiles for this GPU"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark, or `all`; returns the exit status (arguments that cannot be used exit with 2)."""
    parser = argparse.ArgumentParser(
        prog="mocofast bench", description="Times ops, steps and loaders beside what they replace."
    )
    commands = parser.add_subparsers(
        required=True, dest="name", metavar="|".join([*BENCHMARKS, *COMPILING, "all"])
    )
    for name, (module, text) in BENCHMARKS.items():
        command = _add(commands, name, text, module.__doc__)
        command.add_argument(
            "--repeats", type=positive, default=20, help="timed rounds (default: %(default)s)"
        )
        module.add_arguments(command, positive)
        if hasattr(module, "plot"):
            command.add_argument(
                "--plot", type=Path, metavar="FILE", help="draw the sides into this image file"
            )
        command.set_defaults(run=partial(_run, module))
    for name, (module, text) in COMPILING.items():
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command, positive)
        command.set_defaults(run=partial(module.run, parser=command))
    every = _add(
        commands, "all", "every one of them but the sweep, with its defaults for this machine", None
    )
    every.add_argument(
        "--path",
        help="a folder of images, without which `data` is left out and `train` takes digits",
    )
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--static"]:
        given[0] = "static"
    arguments = parser.parse_args(given)
    if arguments.name != "all":
        arguments.run(arguments)
        return 0
    for name, (module, _) in BENCHMARKS.items():
        if name == "sweep":  # minutes of its own, and a folder for its plots
            continue
        own = [name, "--device", arguments.device]
        if arguments.save is not None:
            own += ["--save", str(arguments.save)]
        if name in ("data", "train") and arguments.path is not None:
            own.append(arguments.path)
        elif name == "data":
            print("\ndata is left out: it needs a folder of images (--path DIR)")
            continue
        print(f"\nmocofast bench {' '.join(own)}")
        _run(module, parser.parse_args(own))
    return 0


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    description: str | None,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=description or text
    )
    command.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    command.add_argument(
        "--save", type=Path, metavar="FILE", help="append the JSON line to this file"
    )
    return command


def _run(module: ModuleType, arguments: argparse.Namespace) -> None:
    row = module.run(arguments)
    line = json.dumps(row)
    print(line)
    if arguments.save is not None:  # before a picture, which may fail: a measurement takes minutes
        with arguments.save.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    if getattr(arguments, "plot", None) is not None:
        module.plot(row).savefig(arguments.plot)


def positive(text: str) -> int:
    """An argparse type: an integer >= 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: got {value}")
    return value
