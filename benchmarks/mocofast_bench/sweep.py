"""Times InfoNCE over many sizes: queries N, negatives K and dimension C.

Starts from a middle size and changes one of N, K and C at a time. Writes rows and plots of
time, peak extra memory and fraction of the floor to a folder. Every problem is measured as in
`mocofast bench kernels`. On a CPU the sizes are smaller.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mocofast.device import choose_device
from mocofast_bench import timing
from mocofast_bench.kernels import DTYPES, GRAPH, measure_problem, memory_of_all
from mocofast_bench.peers import OURS_IN_FLOAT32, Sizes, all_peers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = ("n", "k", "c")
MIDDLE = {"cuda": (256, 65536, 128), "cpu": (256, 16384, 128)}
VALUES: dict[str, tuple[tuple[int, ...], ...]] = {
    "cuda": (
        (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
        (1024, 4096, 16384, 65536, 262144, 1048576),
        (64, 128, 256, 512),
    ),
    "cpu": ((32, 128, 256, 1024), (1024, 4096, 16384, 65536), (64, 128, 256, 512)),
}
TITLES = {"n": "queries N", "k": "negatives K", "c": "dimension C"}


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the sizes and the folder of results."""
    parser.add_argument(
        "folder", type=Path, help="folder for sweep.jsonl, time.png, memory.png and floor.png"
    )
    for axis in AXES:
        parser.add_argument(f"--{axis}", type=positive, nargs="+", help=f"values of {TITLES[axis]}")
    parser.add_argument(
        "--middle",
        type=positive,
        nargs=3,
        metavar=("N", "K", "C"),
        help="middle size: two of N, K, C keep these values while the third changes",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="dtype of all inputs (default: %(default)s)",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out sides that need torch.compile"
    )
    parser.set_defaults(repeats=7)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, writes rows and plots, and returns a summary."""
    # Problems, small ones first, and peers.
    device, dtype = choose_device(arguments.device), DTYPES[arguments.dtype]
    middle, axes = choose_problems(arguments, device)
    peers = all_peers(dtype, compiling=not arguments.no_compile)
    peers = {
        name: peer for name, peer in peers.items() if name not in ("with rank", OURS_IN_FLOAT32)
    }
    cases = sorted({case for values in axes.values() for case in values}, key=lambda c: c[0] * c[1])
    arguments.folder.mkdir(parents=True, exist_ok=True)
    where = (
        "a GPU"
        if device.type == "cuda"
        else f"a CPU, {torch.get_num_threads()} threads, with smaller sizes"
    )
    print(
        f"{timing.device_name(device)}: {where}; {len(cases)} problems around N, K, C = {middle}",
        flush=True,
    )
    # Times of every problem.
    rows = []
    for sizes in cases:
        row = measure_problem(peers, sizes, dtype, device, arguments.repeats)
        rows.append(row)
        print(
            f"N {sizes[0]:5} K {sizes[1]:8} C {sizes[2]:4}: "
            f"{row['milliseconds']['mocofast']:9.3f} ms, {row['speedup']:5.2f} x eager, "
            f"{row['speedup_over_best_peer']:5.2f} x {row['best_peer']}, "
            f"{row['fraction_of_floor']:.0%} of the floor",
            flush=True,
        )
    # Memory of every peer, then the files.
    for name in peers:
        if any(name in row["milliseconds"] for row in rows):
            for row, extra in zip(rows, memory_of_all(name, cases, dtype, device)):
                row["extra_bytes"][name] = extra
    with (arguments.folder / "sweep.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    plot_axes(rows, axes, arguments.folder)
    for name, reason in rows[0]["skipped"].items():
        print(f"{name} is left out: {reason}")
    over_best = [row["speedup_over_best_peer"] for row in rows]
    return {
        "benchmark": "sweep",
        **timing.environment(device),
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "problems": len(rows),
        "least_speedup": min(row["speedup"] for row in rows),
        "least_speedup_over_best_peer": min(over_best),
        "median_speedup_over_best_peer": sorted(over_best)[len(over_best) // 2],
    }


def choose_problems(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[Sizes, dict[str, list[Sizes]]]:
    """Returns the middle size and {axis: problems along the axis}.

    Takes the sizes of the command line, else the defaults for this kind of device.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    n, k, c = arguments.middle or MIDDLE[kind]
    axes = {}
    for i, axis in enumerate(AXES):
        values = sorted(set(getattr(arguments, axis) or VALUES[kind][i]))
        axes[axis] = [
            (value if i == 0 else n, value if i == 1 else k, value if i == 2 else c)
            for value in values
        ]
    return (n, k, c), axes


def plot_axes(rows: list[dict[str, Any]], axes: dict[str, list[Sizes]], folder: Path) -> None:
    """Writes time.png, memory.png and floor.png: a panel for every axis, a line for every peer."""
    # Imported here: processes that measure memory start without matplotlib.
    from matplotlib.ticker import FuncFormatter

    from mocofast.plots import new_figure

    labels = {
        "time": "milliseconds",
        "memory": "peak extra memory, MB",
        "floor": "fraction of the floor",
    }
    by_sizes = {(row["n"], row["k"], row["c"]): row for row in rows}
    names = [name for name in rows[0]["milliseconds"] if not name.endswith(GRAPH)]
    for quantity, label in labels.items():
        figure = new_figure(13, 4.4)
        for axis, panel in zip(AXES, figure.subplots(1, 3, sharey=True)):
            _plot_panel(panel, axis, [by_sizes[sizes] for sizes in axes[axis]], names, quantity)
        # Labels, legend and title of the figure.
        first = figure.axes[0]
        first.set_ylabel(label)
        if quantity == "floor":
            first.set_ylim(bottom=0)
            first.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
        if first.lines:
            first.legend(fontsize="small")
        row = rows[0]
        threads = f", {row['threads']} threads" if row["threads"] else ""
        figure.suptitle(f"InfoNCE forward and backward, {row['dtype']}, {row['device']}{threads}")
        figure.savefig(folder / f"{quantity}.png")


def _plot_panel(
    panel: Axes, axis: str, along: list[dict[str, Any]], names: list[str], quantity: str
) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    value = {"time": shortest_time, "memory": memory, "floor": fraction_of_floor}[quantity]
    sizes = [row[axis] for row in along]
    # A line for every peer. Memory cannot be measured on every system.
    for color, name in enumerate(names):
        points = [(row[axis], y) for row in along if (y := value(row, name)) is not None]
        if points:
            width = 2.6 if name == "mocofast" else 1.3
            style: dict[str, Any] = {"linewidth": width, "color": f"C{color}", "label": name}
            panel.plot(*zip(*points), marker="o", markersize=4, **style)
    # The floor is an additional line among the times.
    if quantity == "time":
        floors = [row["floor_milliseconds"] for row in along]
        panel.plot(sizes, floors, color="gray", linestyle="--", label="floor")
    # Titles and logarithmic axes.
    fixed = ", ".join(f"{other.upper()} {along[0][other]}" for other in AXES if other != axis)
    panel.set(xscale="log", xlabel=TITLES[axis], title=fixed)
    panel.set_xticks(sizes, [short_number(size) for size in sizes])
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.3)
    if panel.lines and quantity != "floor":
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def memory(row: dict[str, Any], name: str) -> float | None:
    """Returns the peak extra memory of a peer in MB, None where memory is 0 or unknown."""
    return (row["extra_bytes"].get(name) or 0) / 1e6 or None


def shortest_time(row: dict[str, Any], name: str) -> float | None:
    """Returns the milliseconds of a peer: the lower of the direct call and the CUDA graph."""
    times = [row["milliseconds"][n] for n in (name, name + GRAPH) if n in row["milliseconds"]]
    return min(times, default=None)


def fraction_of_floor(row: dict[str, Any], name: str) -> float | None:
    """Returns floor / time of a peer, None where the peer has no time."""
    time = shortest_time(row, name)
    return None if time is None else row["floor_milliseconds"] / time


def short_number(value: int) -> str:
    """Writes 65536 as 64K, and 2**20 as 1M."""
    for unit, suffix in ((2**20, "M"), (2**10, "K")):
        if value >= unit and value % unit == 0:
            return f"{value // unit}{suffix}"
    return str(value)
