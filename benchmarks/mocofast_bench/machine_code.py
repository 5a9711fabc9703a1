"""Compiles the kernels for A100, RTX 4090, H200 and B200 and shows what the machine code holds.

Needs no GPU.
Shows registers, spills, shared memory, occupancy, instructions, bytes, operations, and the
predicted time of a model (`mocofast_bench.roofline`).

InfoNCE has 256 queries and 65,536 negatives. EMA and optimisers have the weights of a
ResNet-50 with a two-layer head. Ghost BatchNorm has activations of 256 images.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mocofast_bench.roofline import (
    CARDS,
    GPU,
    GPUS,
    LAUNCH,
    Prediction,
    arithmetic_time,
    operations,
    predict,
    traffic,
)

if TYPE_CHECKING:
    from mocofast_bench.inspect_code import Launch, Report

# {name in the summary: case}, one case of every family.
HEADLINES = {
    "info_nce, bf16": "forward, C=128, bf16, queue",
    "info_nce, bf16, no ranks": "forward, C=128, bf16, queue, no ranks",
    "info_nce, bf16, loss only": "forward, C=128, bf16, queue, loss only",
    "info_nce, bf16, mean": "forward with mean, C=128, bf16, queue",
    "info_nce, bf16, ids": "forward with ids, C=128, bf16, queue",
    "info_nce, bf16, specialised": "forward specialised by 128, C=128, bf16, queue",
    "info_nce, bf16, specialised for Blackwell": (
        "forward specialised for sm_100, C=128, bf16, queue"
    ),
    "info_nce, bf16, temperature tensor": "forward, C=128, bf16, queue, temperature tensor",
    "info_nce, bf16, in-batch": "forward, C=128, bf16, in-batch",
    "info_nce, bf16, in-batch, ids": "forward with ids and period, C=128, bf16, in-batch",
    "info_nce, bf16, gradient of negatives": "backward, C=128, bf16",
    "info_nce, fp32 queue, bf16 products": "forward, C=128, fp32 as bf16, queue",
    "info_nce, fp32 queue, tf32 products": "forward, C=128, fp32 as tf32, queue",
    "info_nce, fp32": "forward, C=128, fp32, queue",
    "info_nce, bf16, C = 256": "forward, C=256, bf16, queue",
    "info_nce, bf16, C = 1024": "forward, C=1024, bf16, queue",
    "siglip_loss, bf16": "sigmoid, C=128, bf16",
    "enqueue 256 keys": "enqueue, C=128, fp32",
    "EMA": "ema, torch.float32, ResNet-50, float momentum",
    "SGD + EMA + bf16 copies": "sgd_, torch.float32, ResNet-50, float lr, with EMA",
    "LARS + EMA + bf16 copies": "lars_, torch.float32, ResNet-50, float lr, with EMA",
    "AdamW + EMA + bf16 copies": "adamw_, torch.float32, ResNet-50, float lr, with EMA",
    "ghost BatchNorm, forward and backward": "ghost_bn, (256, 64, 56, 56), torch.bfloat16, relu",
}
# Values of one launch in the full data.
FIELDS = (
    *("registers", "spills", "shared", "tensor_memory", "warps", "programs", "resident"),
    *("instructions", "matrix_instructions", "loop", "bytes", "operations"),
    *("microseconds", "limit"),
)


class CompiledLaunch(NamedTuple):
    """A launch, compiled for one architecture, with the model's prediction."""

    report: Report
    launch: Launch
    prediction: Prediction

    def values(self) -> list[Any]:
        """Returns the values in the order of FIELDS."""
        r, p = self.report, self.prediction
        return [
            *(r.registers, r.spills, r.shared, r.tensor_memory, r.warps, p.programs, p.resident),
            *(r.instructions, r.matrix, r.loop, p.bytes, p.operations),
            *(round(1e6 * p.time, 2), p.limit),
        ]


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds what to compile, and the files to write."""
    parser.add_argument(
        "--only",
        default="",
        metavar="REGEX",
        help="compile cases whose name contains a match, or headlines (default: all)",
    )
    parser.add_argument(
        "--capability", type=int, choices=GPUS, help="compute capability x 10 (default: all)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the full data: one JSON object a line"
    )
    parser.add_argument(
        "--summary", type=Path, metavar="FILE", help="write the summary as Markdown"
    )


def require_compiler(parser: argparse.ArgumentParser) -> None:
    """Exits with 2 if Triton cannot compile."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: Triton would interpret and not compile. Unset it")
    try:
        importlib.import_module("mocofast_bench.inspect_code")
    except ImportError as error:
        parser.error(f"Triton is needed to compile its kernels: {error}")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Compiles the kernels, prints a line for every kernel, and writes the files."""
    require_compiler(parser)
    import triton

    from mocofast_bench import inspect_code

    # Compile. Equal code is printed once, at the first case that has the code.
    capabilities = (arguments.capability,) if arguments.capability else tuple(GPUS)
    calls: dict[tuple[str, int], list[CompiledLaunch]] = defaultdict(list)
    data: dict[tuple[str, str, int], dict[str, Any]] = {}
    print(HEADER)
    only = arguments.only
    if only == "headlines":
        only = "|".join(f"^{re.escape(case)}$" for case in HEADLINES.values())
    for report, launch, first in inspect_code.reports(only, capabilities):
        row = CompiledLaunch(report, launch, predict(launch, report, GPUS[report.capability]))
        call = calls[report.case, report.capability]
        call.append(row)
        if first:
            print(line(row), flush=True)
            key = (report.case, report.kernel, len(call))
            entry = data.setdefault(key, {"case": report.case, "kernel": report.kernel})
            entry[f"sm_{report.capability}"] = row.values()
    if not calls:
        parser.error(f"no case has a match of --only {arguments.only!r}")
    # Print the summary and write the files.
    text = summary(calls)
    print(f"\n{text}")
    if arguments.json is not None:
        head = {"benchmark": "machine_code", "triton": triton.__version__, "fields": FIELDS}
        arguments.json.write_text(
            "".join(json.dumps(entry) + "\n" for entry in [head, *data.values()]), "utf-8"
        )
    if arguments.summary is not None:
        results = "benchmarks/results/machine_code"
        command = f"mocofast bench static --json {results}.jsonl \\\n        --summary {results}.md"
        if arguments.only:
            command += f" \\\n        --only {shlex.quote(arguments.only)}"
        preface = PREFACE.format(command=command, triton=triton.__version__)
        arguments.summary.write_text(f"{preface}\n{limits()}\n{text}", "utf-8")


HEADER = (
    f"{'GPU':5}{'regs':>5}{'spill':>6}{'shared':>8}{'programs':>9}{'resident':>9}{'warps':>6}"
    f"{'code':>6}{'matrix':>7}{'MB':>8}{'GFLOP':>8}{'us':>8} limit   kernel (case)"
)


def line(row: CompiledLaunch) -> str:
    """Returns a line of the full table."""
    r, p = row.report, row.prediction
    return (
        f"{GPUS[r.capability].name:5}{r.registers:5}{r.spills:6}{r.shared:8}{p.programs:9}"
        f"{p.resident:9}{p.resident * r.warps:6}{r.instructions:6}{r.matrix:7}"
        f"{p.bytes / 1e6:8.1f}{p.operations / 1e9:8.2f}{1e6 * p.time:8.1f} "
        f"{p.limit:7} {r.kernel} ({r.case})"
    )


PREFACE = """# Machine code of the kernels

Written with Triton {triton}, without a GPU, by

    {command}

Registers, shared memory and instructions are facts of the code. Times are predictions of the model
in `benchmarks/mocofast_bench/roofline.py`, with the numbers of the first table. No GPU has
confirmed the times. Of AMD's code only the traffic of the memory is modelled. The floor is the
larger of two times: the products at the full rate of the unit, and the traffic of the memory.
`machine_code.jsonl` has the kernels of all these cases.

InfoNCE has 256 queries, 65,536 negatives and 128 dimensions (unless the call says otherwise), with
gradient and positive ranks. The sigmoid loss has 4,096 pairs and both gradients. EMA and optimisers
have the 27,966,656 weights of a ResNet-50 with a two-layer head. BatchNorm has 256 x 64 x 56 x 56
activations in bf16, 8 splits and ReLU.
"""


def limits() -> str:
    """Returns the table of the GPUs' resources in the model."""
    lines = [
        "| GPU | multiprocessors | bf16 TFLOP/s | TB/s | clock, GHz | L2, TB/s |"
        " of a multiprocessor: registers | shared, KB | threads | bf16 operations a clock |"
        " float32 lanes | exponentials | shared, bytes a clock |",
        "|---" * 13 + "|",
    ]
    for gpu in CARDS:
        code = "AMD" if gpu.capability is None else f"sm_{gpu.capability}"
        lines.append(
            f"| {gpu.name} ({code}) | {gpu.processors} | {gpu.matrix_rate / 1e12:.0f} |"
            f" {gpu.bandwidth / 1e12:.2f} | {gpu.clock / 1e9:.2f} | {gpu.l2 / 1e12:.1f} |"
            f" {gpu.registers} | {gpu.shared // 1024} | {gpu.threads} | {gpu.matrix} |"
            f" {gpu.lanes} | {gpu.special} | {gpu.shared_rate} |"
        )
    return "\n".join(lines) + "\n"


def summary(calls: dict[tuple[str, int], list[CompiledLaunch]]) -> str:
    """Returns a Markdown table of whole calls, with a row for every headline and GPU.

    Code columns show the slowest kernel. Bytes, operations and times are sums over all kernels. The
    floor is the larger of two times: products at the full rate of the unit, and memory traffic.
    """
    lines = [
        "| call | GPU | slowest kernel | registers | spills | shared, KB |"
        " programs and warps a multiprocessor | matrix instructions | MB | GFLOP | floor, us |"
        " predicted, us | limit |",
        "|---" * 13 + "|",
    ]
    for name, case in HEADLINES.items():
        for gpu in CARDS:
            capability = 89 if gpu.capability is None else gpu.capability
            rows = calls.get((case, capability))
            if rows:
                lines.append(_summary_line(name, rows, gpu))
    return "\n".join(lines) + "\n"


def _summary_line(name: str, rows: list[CompiledLaunch], gpu: GPU) -> str:
    launches = [row.launch for row in rows]
    moved, counted = sum(map(traffic, launches)), sum(map(operations, launches))
    memory = moved / gpu.bandwidth
    arithmetic = sum(arithmetic_time(launch, gpu) for launch in launches)
    floor = 1e6 * max(memory, arithmetic)
    work = f"{moved / 1e6:.1f} | {counted / 1e9:.2f} | {floor:.1f}"
    starts = LAUNCH * len(rows)
    if gpu.capability is None:  # the listing of AMD's code is not read
        known = "" if arithmetic else f"{1e6 * (memory + starts):.1f}"
        return f"| {name} | {gpu.name} | | | | | | | {work} | {known} | |"
    predictions = [predict(row.launch, row.report, gpu) for row in rows]
    slowest, p = max(zip(rows, predictions), key=lambda pair: pair[1].time)
    r = slowest.report
    predicted = 1e6 * (sum(prediction.time for prediction in predictions) + starts)
    return (
        f"| {name} | {gpu.name} | {r.kernel.strip('_')} | {r.registers} | "
        f"{sum(row.report.spills for row in rows)} | {r.shared / 1024:.0f} | "
        f"{p.resident}, {p.resident * r.warps} | {r.matrix} | {work} | {predicted:.1f} |"
        f" {p.limit} |"
    )
