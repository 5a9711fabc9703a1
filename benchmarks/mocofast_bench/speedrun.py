"""CPU seconds and FLOPs until an encoder is as good as the plain recipe's.

Sides: the plain recipe, a fast recipe, and the plain recipe in the reference's loop and loader.
All sides train the same encoder on the same images, and the same kNN judges the encoder.
`docs/speedrun.md` has the rules. Every run appends a line to OUT/log.jsonl, and a run whose line is
there is not repeated, so an interrupted command continues.

--search trains random combinations of the task's knobs, with other seeds than the sides have, and
prints the combinations by kNN. --wsd compares four budgets from one trunk with four cosine runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from mocofast import settings
from mocofast.config import ConfigError
from mocofast.train import run as training
from mocofast.train.configure import configure
from mocofast_bench import timing
from mocofast_bench.speedrun_runs import CPU, Curve, clocked, measured, ours, reference
from mocofast_bench.speedrun_tasks import TASKS, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDES = ("plain", "fast", "reference")
SEARCH_SEED = 100  # the first seed of the search
BUDGETS = (0.4, 0.6, 0.8, 1)  # of the plain recipe's epochs; the last tenth is the cool-down


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the task, the sides, and the search."""
    parser.add_argument("task", choices=tuple(TASKS), help="the encoder and the images")
    parser.add_argument(
        "--path", default="", help="folder with train/ and test/ (tasks on image files)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/speedrun"), help="folder of the log (%(default)s)"
    )
    parser.add_argument(
        "--sides", default="", help="sides to train (default: plain,reference, and fast if given)"
    )
    parser.add_argument(
        "--fast", metavar="RECIPE", default="", help="recipe of the fast side, or a .yaml file"
    )
    parser.add_argument(
        "--seeds", type=positive, default=5, help="runs of every side (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of our sides and the search (%(default)s)",
    )
    parser.add_argument(
        "--search", type=int, default=0, metavar="N", help="train N combinations of the knobs"
    )
    parser.add_argument("--wsd", action="store_true", help="four budgets from one trunk")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains what is missing in the log, prints the table and returns the row."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    task = TASKS[arguments.task]
    sides = (arguments.sides or "plain,reference" + ",fast" * bool(arguments.fast)).split(",")
    for side in sides:
        if side not in SIDES:
            raise ConfigError(f"--sides: expected some of {', '.join(SIDES)}, got {side!r}")
    if "fast" in sides and not arguments.fast:
        raise ConfigError("--sides: fast needs --fast RECIPE; --search N finds options of a recipe")
    log = _Log(arguments.out / "log.jsonl", arguments.task)
    if arguments.search:
        return _search(task, arguments, log)
    if arguments.wsd:
        return _wsd(task, arguments, log)
    bf16 = _suffix(arguments)
    names = {side: side + bf16 * (side != "reference") for side in sides}
    if "fast" in sides:
        names["fast"] = f"fast {task.config(arguments.path, arguments.fast).recipe}{bf16}"
    for seed, side in itertools.product(range(arguments.seeds), sides):
        config = task.config(arguments.path, arguments.fast if side == "fast" else "")
        config.train.seed = seed
        config.train.precision = arguments.precision
        loop = reference if side == "reference" else ours
        log.run(names[side], seed, partial(measured, config, loop))
    return _table(arguments.task, list(names.values()), arguments.seeds, log)


def _suffix(arguments: argparse.Namespace) -> str:
    """Returns what names in the log end with: runs in bf16 are other runs."""
    return " bf16" * (arguments.precision == "bf16")


class _Log:
    """The results of runs, {(task, name, seed): result}, in a file of JSON lines."""

    def __init__(self, path: Path, task: str) -> None:
        self._path, self._task = path, task
        self._rows: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._read()

    def _read(self) -> None:
        """Reads the file again: other processes may have added results."""
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._rows[row["task"], row["name"], row["seed"]] = row

    def run(self, name: str, seed: int, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the result of a run, and trains it unless the log has the result."""
        key = (self._task, name, seed)
        self._read()
        if key not in self._rows:
            row = {"task": self._task, "name": name, "seed": seed, **measure()}
            self._rows[key] = row
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}, seed {seed}: kNN {row['knn'][-1]:.4f}, {row['cpu'][-1]:.1f} CPU s")
        return self._rows[key]

    def of(self, name: str, seeds: int) -> list[dict[str, Any]]:
        """Returns the results of a side that the log has."""
        keys = [(self._task, name, seed) for seed in range(seeds)]
        return [self._rows[key] for key in keys if key in self._rows]


# ---- search ----


def _search(task: Task, arguments: argparse.Namespace, log: _Log) -> dict[str, Any]:
    """Trains random combinations with one seed, and the best third with two seeds more."""
    chooser = random.Random(0)
    every = list(itertools.product(*task.knobs.values()))
    sampled = [dict(zip(task.knobs, values)) for values in chooser.sample(every, len(every))]
    combinations = [*task.first, *sampled][: arguments.search]

    cpu: dict[str, list[float]] = {}
    bf16 = _suffix(arguments)

    def name_of(changes: Mapping[str, Any]) -> str:
        return f"search{bf16} " + " ".join(settings.as_flags(changes))

    def score(changes: Mapping[str, Any], seed: int) -> float:
        config = task.config(arguments.path)
        settings.apply(config, {**task.budget, **changes})
        config.train.seed, config.train.precision = seed, arguments.precision
        config.knn.every = config.train.epochs
        name = name_of(changes)
        row = log.run(name, seed, lambda: measured(config, ours))
        cpu.setdefault(name, []).append(row["cpu"][-1])
        return float(row["knn"][-1])

    first = {i: score(changes, SEARCH_SEED) for i, changes in enumerate(combinations)}
    best = sorted(first, key=lambda i: -first[i])[: max(1, len(first) // 3)]
    means = {
        i: fmean([first[i], *(score(combinations[i], SEARCH_SEED + s) for s in (1, 2))])
        for i in best
    }
    for i in sorted(means, key=lambda i: -means[i]):
        name = name_of(combinations[i])
        flags = name.removeprefix(f"search{bf16} ")
        print(f"{means[i]:.4f}  {fmean(cpu[name]):.0f} CPU s  {flags}")
    winner = max(means, key=lambda i: means[i])
    return {
        "benchmark": "speedrun search",
        **timing.environment(CPU),
        "task": arguments.task,
        "combinations": len(combinations),
        "knn": means[winner],
        "options": " ".join(settings.as_flags(combinations[winner])),
    }


# ---- WSD ----


def _wsd(task: Task, arguments: argparse.Namespace, log: _Log) -> dict[str, Any]:
    """Trains a cosine run for every budget, and a trunk with a branch for every budget."""
    budgets = _budgets(task.config(arguments.path).train.epochs)
    gaps: dict[int, list[float]] = {budget: [] for budget in budgets}
    precision, bf16 = arguments.precision, _suffix(arguments)
    cpu = {"cosine": 0.0, "wsd": 0.0}
    # In turns, so that both sides meet the same neighbours.
    for seed in range(arguments.seeds):
        branches = log.run(
            f"wsd{bf16}", seed, partial(_branches, task, arguments.path, seed, precision)
        )
        cpu["wsd"] += sum(branches["cpu"])
        for budget, knn in zip(budgets, branches["knn"]):
            config = task.config(arguments.path)
            # The plain side is a cosine run already.
            name = "plain" if budget == config.train.epochs else f"cosine {budget}"
            if name != "plain":
                config.train.epochs = config.knn.every = config.checkpoint.every_epochs = budget
            config.train.seed, config.train.precision = seed, precision
            cosine = log.run(name + bf16, seed, partial(measured, config, ours))
            cpu["cosine"] += cosine["cpu"][-1]
            gaps[budget].append(100 * (knn - cosine["knn"][-1]))
    share = cpu["wsd"] / cpu["cosine"]
    for budget, values in gaps.items():
        spread = stdev(values) if len(values) > 1 else 0.0
        print(f"{budget} epochs: WSD less cosine {fmean(values):+.2f} points (sd {spread:.2f})")
    print(f"CPU seconds of trunk and branches: {share:.1%} of the cosine runs'")
    return {
        "benchmark": "speedrun wsd",
        **timing.environment(CPU),
        "task": arguments.task,
        "seeds": arguments.seeds,
        "points": {budget: round(fmean(values), 3) for budget, values in gaps.items()},
        "cpu_share": round(share, 4),
    }


def _budgets(epochs: int) -> dict[int, int]:
    """Returns the budgets of a plain recipe of `epochs`, {epochs: epochs of the cool-down}."""
    budgets = [round(part * epochs) for part in BUDGETS]
    return {budget: max(1, budget // 10) for budget in budgets}


def _branches(task: Task, path: str, seed: int, precision: str) -> dict[str, Any]:
    """Trains a trunk, and a branch for every budget. cpu: a value for every budget.

    The trunk's time counts with the first budget.
    """
    folder = Path(tempfile.mkdtemp())
    config = task.config(path)
    cooldowns = _budgets(config.train.epochs)
    ends = {budget: budget - cooldown for budget, cooldown in cooldowns.items()}
    settings.apply(
        config,
        {
            "train.seed": seed,
            "train.precision": precision,
            "train.dir": str(folder / "trunk"),
            "train.epochs": max(ends.values()),
            "optim.schedule": "wsd",
            "checkpoint.keep": 1000,
            "checkpoint.every_epochs": math.gcd(*ends.values()),
            "knn.every": 0,
        },
    )
    with clocked() as trunk:
        steps = training.train(config).step // config.train.epochs
    cpu, knn = [], []
    for budget, cooldown in cooldowns.items():
        saved = folder / "trunk" / "checkpoints" / f"step_{steps * ends[budget]:08d}.pt"
        with clocked() as curve:
            training.train(configure(None, str(saved), {}, cooldown=cooldown), str(saved))
        cpu.append(curve.cpu[-1])
        knn.append(curve.knn[-1])
    shutil.rmtree(folder)
    cpu[0] += trunk.cpu[-1]
    return {"epoch": list(cooldowns), "cpu": cpu, "knn": knn}


# ---- the table ----


def _table(name: str, sides: list[str], seeds: int, log: _Log) -> dict[str, Any]:
    """Prints the sides, and returns the row. The first side is the unit of CPU time."""
    rows = {side: log.of(side, seeds) for side in sides}
    print(f"{name}\n{'':20}{'seeds':>6}{'kNN':>8}{'sd':>7}{'CPU s':>8}{'share':>8}{'GFLOP':>10}")
    figures: dict[str, dict[str, float]] = {}
    for side, results in rows.items():
        knn = [result["knn"][-1] for result in results]
        figures[side] = {
            "seeds": len(results),
            "knn": round(fmean(knn), 5),
            "sd": round(stdev(knn), 5) if len(knn) > 1 else 0.0,
            "cpu": round(fmean(result["cpu"][-1] for result in results), 2),
            "flops": fmean(result["flops"] for result in results),
        }
    unit = figures[sides[0]]["cpu"]
    for side, f in figures.items():
        print(
            f"{side:20}{f['seeds']:6.0f}{100 * f['knn']:8.2f}{100 * f['sd']:7.2f}{f['cpu']:8.1f}"
            f"{f['cpu'] / unit:8.2f}{f['flops'] / 1e9:10.0f}"
        )
    return {
        "benchmark": "speedrun",
        **timing.environment(CPU),
        "task": name,
        "sides": figures,
        "curves": {
            side: [{key: result[key] for key in Curve._fields} for result in results]
            for side, results in rows.items()
        },
    }


def plot(row: dict[str, Any]) -> Figure:
    """Returns kNN over CPU seconds: a line for every run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (side, curves) in enumerate(row["curves"].items()):
        for i, curve in enumerate(curves):
            label = side if i == 0 else None
            knn = [100 * value for value in curve["knn"]]
            # A marker, because a run of one evaluation has no line.
            axes.plot(curve["cpu"], knn, color=f"C{number}", alpha=0.7, label=label, marker=".")
    first = next(iter(row["sides"].values()))
    axes.axhline(100 * first["knn"], color="gray", ls=":", lw=1)
    axes.set(xscale="log", xlabel="CPU seconds of training", ylabel="kNN top-1, %")
    # 20 instead of 2 x 10^1, and no labels that touch.
    seconds = FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else "")
    axes.xaxis.set_major_formatter(seconds)
    axes.xaxis.set_minor_formatter(seconds)
    axes.tick_params(axis="x", which="both", length=3)  # labels in one line
    axes.set_title(row["task"])
    axes.legend()
    return figure
