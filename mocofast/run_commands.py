"""The commands on several runs: compare and sweep."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mocofast import interrupts
from mocofast.config import ConfigError
from mocofast.parser import Parser, add_run_settings, add_words, given_settings


def compare(argv: Sequence[str]) -> int:
    """runs side by side: figures, options that differ, curves in one picture"""
    parser = Parser(
        prog="mocofast compare",
        description="Compares runs: a table of their figures and of the options that differ, and "
        "their curves in one picture.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, two or more")
    parser.add_argument(
        "--out", metavar="FILE", default="compare.png", help="the picture [compare.png]"
    )
    arguments = parser.parse(argv)
    if len(arguments.runs) < 2:
        raise ConfigError("expected two run folders or more, got one")
    from mocofast.plots import save_figure
    from mocofast.train import compare as module

    runs = module.read_runs(arguments.runs)
    print(module.table(runs))
    out = Path(arguments.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_figure(module.plot_runs(runs), out)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out {out}: cannot be written ({error})") from error
    print(f"written to {out}")
    return 0


def sweep(argv: Sequence[str]) -> int:
    """a run for every combination of options, resumable, with a table and a plot"""
    parser = Parser(
        prog="mocofast sweep",
        usage="mocofast sweep [RECIPE] [IMAGES] --dir FOLDER (--grid OPTION VALUE ... | --list "
        "FILE) [--OPTION VALUE ...]",
        description=(
            "Trains a run for every combination of options, one after the other. The same command "
            "continues: runs that are done stay, and a run that was interrupted goes on.\n"
            "Writes sweep.json, table.md and sweep.png, and a run folder for every run."
        ),
        often=("--dir", "--grid", "--list"),
        examples=(
            "mocofast sweep digits --dir runs/rates --grid optim.lr 0.03 0.06 0.12 "
            "--grid model.dim 64 128",
            "mocofast sweep PHOTOS --dir runs/list --list trials.yaml",
        ),
    )
    add_words(parser, "as of pretrain")
    parser.add_argument("--dir", metavar="FOLDER", required=True, help="the folder of the sweep")
    parser.add_argument(
        "--grid",
        action="append",
        nargs="+",
        default=[],
        metavar=("OPTION", "VALUE"),
        help="an option and its values; with several --grid, every combination",
    )
    parser.add_argument(
        "--list",
        metavar="FILE",
        default="",
        help="a YAML file with a list of options for every run",
    )
    add_run_settings(parser, argv)
    arguments = parser.parse(argv)
    if bool(arguments.grid) == bool(arguments.list):
        raise ConfigError("expected --grid or --list, one of the two")
    return _sweep(arguments)


def _sweep(arguments: Namespace) -> int:
    import os

    from mocofast.plots import save_figure
    from mocofast.train import compare, configure
    from mocofast.train import sweep as module
    from mocofast.train.run import train

    recipe, images = configure.split_words(arguments.words)
    given = given_settings(arguments)
    if "train.dir" in given:
        raise ConfigError("train.dir: --dir names the folder of the sweep and of its runs")
    axes = {row[0].removeprefix("--"): row[1:] for row in arguments.grid}
    trials = module.read_list(arguments.list) if arguments.list else module.grid(axes)

    def config_of(trial: module.Trial, folder: Path) -> tuple[Any, dict[str, str]]:
        options = {**given, **trial, "train.dir": str(folder)}
        return configure.configure(recipe, "", options, images), options

    folder = Path(arguments.dir)
    for trial in trials:  # a mistake in the last run shows before the first run
        config_of(trial, folder / module.name_of(trial))
    main = os.environ.get("RANK", "0") == "0"

    def run(trial: module.Trial, place: Path) -> dict[str, float] | None:
        config, options = config_of(trial, place)
        kept = configure.kept_options(config, recipe, options)
        result = train(config, "auto", False, kept)
        return None if result.interrupted else result.after

    base = {"words": arguments.words, "options": given}
    rows = module.run_all(folder, trials, base, run, print if main else lambda line: None, main)
    if main and rows:
        text = module.table(rows)
        (folder / module.TABLE).write_text(text, encoding="utf-8")
        written = [module.RESULTS, module.TABLE]
        figure = compare.plot_sweep(rows)
        if figure is not None:
            save_figure(figure, folder / module.PLOT)
            written.append(module.PLOT)
        print(f"\n{text}\nwritten to {folder}: {', '.join(written)}")
    if len(rows) < len(trials):
        print(f"stopped; the same command continues in {folder}", file=sys.stderr)
        return interrupts.EXIT_INTERRUPTED
    return 0
