"""Compiles the kernels for NVIDIA's and AMD's GPUs and shows whether they fit. Needs no GPU.

Shows registers and spills of a thread, and the shared memory of a program beside the most that a
program may use on the GPU.

The calls are those of `mocofast bench static`. For float16 and bfloat16 products, GPUs before
Ampere (sm_75) take the blocked PyTorch path, so they have no row. sm_75 and AMD's GPUs have no rows
of tf32 products: the kernels multiply float32 there.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mocofast_bench.machine_code import HEADLINES, require_compiler

if TYPE_CHECKING:
    from mocofast_bench.inspect_code import Launch

KB = 1024


class Target(NamedTuple):
    """A kind of GPU that Triton compiles for."""

    name: str  # as compilers spell the architecture
    gpus: str  # products
    processors: int  # multiprocessors, or compute units, of the first product
    shared: int  # bytes of shared memory of a multiprocessor
    limit: int  # bytes of shared memory that a program may use

    @property
    def capability(self) -> int | None:
        """Returns the compute capability x 10, or None for AMD's GPUs."""
        return int(self.name[3:]) if self.name.startswith("sm_") else None


# Sources: CUDA C++ programming guide, "Compute capabilities". AMD: CDNA 2, 3 and 4 instruction set
# guides (LDS of a compute unit).
TARGETS = {
    target.name: target
    for target in (
        Target("sm_75", "T4", 40, 64 * KB, 64 * KB),
        Target("sm_80", "A100", 108, 164 * KB, 163 * KB),
        Target("sm_86", "RTX 3090, A40", 82, 100 * KB, 99 * KB),
        Target("sm_89", "RTX 4090, L40S", 128, 100 * KB, 99 * KB),
        Target("sm_90", "H100, H200", 132, 228 * KB, 227 * KB),
        Target("sm_100", "B200", 148, 228 * KB, 227 * KB),
        Target("sm_103", "B300", 148, 228 * KB, 227 * KB),
        Target("sm_120", "RTX 5090", 170, 100 * KB, 99 * KB),
        Target("gfx90a", "MI250X", 110, 64 * KB, 64 * KB),
        Target("gfx942", "MI300X", 304, 64 * KB, 64 * KB),
        Target("gfx950", "MI355X", 256, 160 * KB, 160 * KB),
    )
}


class Usage(NamedTuple):
    """What a thread and a program of a compiled kernel take."""

    registers: int
    spills: int  # NVIDIA: bytes of a thread. AMD: registers of a thread
    shared: int  # bytes of a program


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds what to compile, and the file to write."""
    parser.add_argument(
        "--only",
        default="",
        metavar="REGEX",
        help="compile cases whose name contains a match (default: a case of every family)",
    )
    parser.add_argument(
        "--target",
        choices=TARGETS,
        metavar="GPU",
        help=f"one kind of GPU: {', '.join(TARGETS)} (default: all)",
    )
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the table as Markdown")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Compiles the kernels, and prints a row of a Markdown table for every kernel and target."""
    require_compiler(parser)
    import triton

    targets = [TARGETS[arguments.target]] if arguments.target else list(TARGETS.values())
    lines = [
        f"| kernels (Triton {triton.__version__}) | GPU | kernel | registers | spills |"
        " shared memory, KB | of at most, KB |",
        "|---" * 7 + "|",
    ]
    print("\n".join(lines), flush=True)
    for name, target, launch in launches(arguments.only, targets):
        found = usage(launch, target)
        lines.append(
            f"| {name} | {target.name} ({target.gpus}) | {launch.kernel.__name__.strip('_')} |"
            f" {found.registers} | {found.spills} | {found.shared / KB:.0f} |"
            f" {target.limit / KB:.0f} |"
        )
        print(lines[-1], flush=True)
    if len(lines) == 2:
        parser.error(f"no case has a match of --only {arguments.only!r}")
    if arguments.summary is not None:
        preface = PREFACE.format(file=arguments.summary, triton=triton.__version__)
        arguments.summary.write_text(f"{preface}\n" + "\n".join(lines) + "\n", "utf-8")


PREFACE = """# Kernels on every kind of GPU

Compiled with Triton {triton} and without a GPU by `mocofast bench targets --summary {file}`.
Spills: bytes of a thread for NVIDIA's GPUs, registers of a thread for AMD's.
"""


def launches(only: str, targets: list[Target]) -> Iterator[tuple[str, Target, Launch]]:
    """Yields (name of the case, target, launch), without repeating equal code of a target.

    only: regular expression for names of cases. Empty: a case of every family.
    """
    import torch
    from mocofast_kernels.configs import Architecture

    from mocofast_bench import inspect_code

    # Importing Triton takes a second. Other commands do not wait.
    cases = importlib.import_module("mocofast_bench.inspected_calls").cases
    names = {case: name for name, case in HEADLINES.items()}
    known = set()
    for case in cases():
        if not (re.search(only, case.name) if only else case.name in names):
            continue
        torch.set_float32_matmul_precision(case.matmul_precision)
        for target in targets:
            half = re.search(r"^(forward|backward|sigmoid).*(bf16|fp16)", case.name)
            # B300 has the tensor memory of B200.
            kind = 100 if target.name == "sm_103" else target.capability
            if (target.name == "sm_75" and half) or case.capability not in (None, kind):
                continue
            if (target.capability or 0) < 80 and case.matmul_precision != "highest":
                continue
            hopper, amd = target.name == "sm_90", target.capability is None
            gpu = Architecture(target.shared, hopper, amd, target.name in ("sm_100", "sm_103"))
            for launch in inspect_code.record(case.call, target.processors, gpu):
                if (launch.identity, target.name) not in known:
                    known.add((launch.identity, target.name))
                    yield names.get(case.name, case.name), target, launch


def usage(launch: Launch, target: Target) -> Usage:
    """Compiles a launch for a target and returns what the compiler reports.

    Raises RuntimeError (Triton) where the kernel does not compile.
    """
    from mocofast_bench import inspect_code

    compiled = inspect_code.compile_launch(launch, target.capability or target.name)
    if target.capability is None:
        return _usage_of_amd(compiled)
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    # The compiler's own report: the listing tools do not read every architecture.
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        fused = launch.options.get("enable_fp_fusion", True)
        command = [
            get_ptxas(target.capability).path,
            "-v",
            *([] if fused else ["--fmad=false"]),
            f"--gpu-name={sm_arch_from_capability(target.capability)}",
            file.name,
            "-o",
            "/dev/null",
        ]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    return Usage(_number(r"Used (\d+) registers", report), spills, compiled.metadata.shared)


def _usage_of_amd(compiled: Any) -> Usage:
    text = compiled.asm["amdgcn"]
    spills = _number(r"\.vgpr_spill_count:\s*(\d+)", text)
    return Usage(_number(r"\.vgpr_count:\s*(\d+)", text), spills, compiled.metadata.shared)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's report has no match of {pattern!r}: {text[:500]}")
    return int(found[1])
