"""`mocofast bench`: times our ops, steps and loaders beside PyTorch and other packages.

Every benchmark interleaves the candidates in a single process and prints a table with the
limit of the machine, measured in the same run. The last line is JSON. `--save FILE` appends
the line to a file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from mocofast import completion

# Each is a module of this package, which is imported where it is asked for: PyTorch and the peers
# take seconds. A module has add_arguments() and run(), plot() where it makes a picture, and
# why_not() where it does not run on every machine. run() gives the row so far to `arguments.keep`,
# and measurements leave entries in `timing.SO_FAR`: a run that is stopped saves both.
BENCHMARKS = {
    "kernels": "InfoNCE: time and memory of forward and backward",
    "batch": "CLIP's and SigLIP's losses over the pairs of a batch",
    "sweep": "InfoNCE over many sizes of the problem, with plots",
    "ema": "EMA of a ResNet-50's weights",
    "optim": "SGD, LARS and AdamW with EMA and bfloat16 copies",
    "norm": "ghost BatchNorm of a ResNet-50's activations",
    "convolution": "an encoder's convolutions in C on a CPU beside PyTorch's",
    "data": "pairs of views per second from a folder of images",
    "step": "one training step beside the reference, eager PyTorch and lightly",
    "train": "training end to end beside the reference's loop and loader",
    "probe": "the fit of a linear probe beside scikit-learn's LogisticRegression",
    "speedrun": "CPU seconds to the plain recipe's kNN, with a search of recipes",
}
# Modules that compile kernels: no --device, --save or --plot.
COMPILING = {
    "static": "machine code of the kernels and predicted times (needs no GPU)",
    "targets": "registers and shared memory on every kind of GPU (needs no GPU)",
    "autotune": "choose the tiles of the kernels for this GPU",
}
MODULES = {"static": "machine_code"}  # where the name of the module is another
ALL = "all benchmarks except the sweep, with defaults for this machine"
# `bench all --quick`: enough rounds for quartiles. Compiling takes minutes.
QUICK = {
    "kernels": ["--repeats", "9", "--no-compile"],
    "batch": ["--repeats", "5"],
    "ema": ["--repeats", "12"],
    "optim": ["--repeats", "7"],
    "norm": ["--repeats", "7"],
    "convolution": ["--repeats", "7"],
    "data": ["--repeats", "3"],
    "step": ["--repeats", "5", "--times-only", "--no-profile", "--modes"],
    "train": ["--repeats", "3", "--steps", "6", "--short"],
    "probe": ["--repeats", "3"],
}
# Compute as `pretrain` does: the command sets how threads wait before PyTorch loads.
AS_USERS = ("step", "train")
RAW = argparse.RawDescriptionHelpFormatter  # keeps the line breaks of docstrings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a benchmark, or `all`.

    argv: arguments after `mocofast bench`. None: the process's own arguments.

    Returns the exit status 0. Exits with 2 if the arguments cannot be used.
    """
    if "torch" not in sys.modules:  # a caller with PyTorch has chosen what forks have loaded
        multiprocessing.set_forkserver_preload(["torch", "mocofast_bench.timing"])
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--static"]:  # an older spelling of `bench static`
        given[0] = "static"
    names = {**BENCHMARKS, **COMPILING, "all": ALL}
    parser = argparse.ArgumentParser(
        prog="mocofast bench",
        description="Times ops, steps and loaders beside PyTorch and other packages.",
    )
    commands = parser.add_subparsers(required=True, dest="name", metavar="BENCHMARK")
    for name, text in names.items():
        command = commands.add_parser(name, help=text, formatter_class=RAW)
        if [name] == given[:1]:
            _add_arguments(command, name)
    completion.answer(parser)
    arguments = parser.parse_args(given)
    arguments.run(arguments)
    return 0


def _add_arguments(command: argparse.ArgumentParser, name: str) -> None:
    """Adds the options of a benchmark, and `run`, the function that takes their values."""
    if name in COMPILING:
        module = benchmark(name)
        command.description = module.__doc__
        module.add_arguments(command, positive)
        command.set_defaults(run=partial(module.run, parser=command))
        return
    command.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    command.add_argument(
        "--save", type=Path, metavar="FILE", help="append the JSON line to this file"
    )
    if name == "all":
        command.description = ALL
        command.add_argument(
            "--path",
            help="folder of images (default: `data` is left out and `train` uses the digits)",
        )
        command.add_argument(
            "--quick",
            action="store_true",
            help="few rounds, without torch.compile and other engine modes: 5 minutes on two cores",
        )
        command.set_defaults(run=_run_all)
        return
    module = benchmark(name)
    command.description = module.__doc__
    command.add_argument(
        "--repeats", type=positive, default=20, help="timed rounds (default: %(default)s)"
    )
    module.add_arguments(command, positive)
    if hasattr(module, "plot"):
        command.add_argument(
            "--plot", type=Path, metavar="FILE", help="save a plot of the results to this file"
        )
    command.set_defaults(run=partial(_run, module))


def benchmark(name: str) -> ModuleType:
    """Imports the module of a benchmark."""
    return importlib.import_module(f"mocofast_bench.{MODULES.get(name, name)}")


def _run_all(arguments: argparse.Namespace) -> None:
    for name in BENCHMARKS:
        if name in ("sweep", "speedrun"):  # take minutes to hours
            continue
        own = [name, "--device", arguments.device]
        if arguments.save is not None:
            own += ["--save", str(arguments.save)]
        if arguments.quick:
            own += QUICK[name]
        if name in ("data", "train") and arguments.path is not None:
            own.append(arguments.path)
        elif name == "data":
            print("\ndata is left out: it needs a folder of images (--path DIR)")
            continue
        elif name == "convolution" and (why := _why_not(benchmark(name), arguments.device)):
            print(f"\nconvolution is left out: {why}")
            continue
        print(f"\nmocofast bench {' '.join(own)}", flush=True)
        (_in_own_process if name in AS_USERS else main)(own)


def _in_own_process(words: Sequence[str]) -> None:
    """Runs a benchmark as a command. Ends with the status of a command that failed."""
    command = [sys.executable, "-m", "mocofast", "bench", *words]
    if status := subprocess.run(command, check=False).returncode:
        raise SystemExit(status)


def _why_not(module: ModuleType, device: str) -> str:
    """Returns why a benchmark does not run on this machine, "" if it does."""
    return str(module.why_not(device)) if hasattr(module, "why_not") else ""


def _run(module: ModuleType, arguments: argparse.Namespace) -> None:
    from mocofast.device import choose_device
    from mocofast.usage import usage
    from mocofast_bench import neighbours, timing

    if why := _why_not(module, arguments.device):
        raise SystemExit(f"mocofast bench {arguments.name}: {why}")
    before = usage()
    head = {"benchmark": arguments.name, **timing.environment(choose_device(arguments.device))}
    parts = [head]
    timing.SO_FAR.clear()
    timing.UNTIMED.clear()
    arguments.keep = parts.append  # takes the row so far, for a run that is stopped
    try:
        row = module.run(arguments)
    except BaseException:
        if parts[1:] or timing.SO_FAR:
            _save({**parts[-1], "so_far": timing.SO_FAR, "unfinished": True}, arguments.save)
        raise
    after = usage()
    others = neighbours.between(before, after, timing.UNTIMED) if before and after else None
    if others is not None:
        row["neighbours"] = {name: round(share, 4) for name, share in others._asdict().items()}
    for warning in neighbours.warnings(others, row):
        print(f"BUSY MACHINE, measure again: {warning}")
    # Save before plotting: plotting may fail, and the measurement took minutes.
    _save(row, arguments.save)
    if getattr(arguments, "plot", None) is not None:
        module.plot(row).savefig(arguments.plot)


def _save(row: dict[str, Any], path: Path | None) -> None:
    """Prints the row as JSON and appends it to a file."""
    line = json.dumps(row)
    print(line, flush=True)
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def positive(text: str) -> int:
    """Parses an integer >= 1 (an argparse type).

    Raises ArgumentTypeError for a smaller integer, ValueError for text without an integer.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: got {value}")
    return value
