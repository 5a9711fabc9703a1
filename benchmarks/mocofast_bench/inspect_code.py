"""Compiles the kernels without a GPU and reads registers, spills and instructions from the code.

    python -m mocofast_bench.inspect_code [--json] [--only PATTERN] [--capability 90]

Prints a table, or with --json a JSON object a line. TRITON_INTERPRET must not be set.
`mocofast bench static` adds occupancy, bytes, operations and the predicted time of a model.

Launches have the arguments of real launches: the launching functions run on tensors without
storage (device "meta"), and every launch is recorded instead of made.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from mocofast_kernels import configs, tables, tiles
from mocofast_kernels.configs import Architecture
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mocofast_bench.inspected_calls import cases
from mocofast_bench.listing import covered_exponentials, main_loop, parse_listing, shared_bytes
from mocofast_bench.sizes import PROCESSORS, SHARED

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
# Instructions of float32 arithmetic: {opcode: numbers of a thread that the instruction takes}.
FLOAT = {"FFMA": 1, "FADD": 1, "FMUL": 1, "FFMA2": 2, "FADD2": 2, "FMUL2": 2}


class Launch(NamedTuple):
    """A recorded launch.

    The kernel, signature, constants, divisible and options decide the machine code.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]  # integers and pointers that the compiler knows as multiples of 16
    options: dict[str, int | None]
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def identity(self) -> str:
        """Returns a text that is equal for launches of equal code."""
        return repr((self.kernel.__name__, self[1:5]))


class Report(NamedTuple):
    """Contents of the machine code of a launch."""

    case: str
    kernel: str
    capability: int
    registers: int  # registers of a thread
    spills: int  # instructions that store to or load from local memory
    shared: int  # bytes of shared memory of a program
    tensor_memory: int  # columns of tensor memory of a program (sm_100)
    warps: int  # warps of a program
    instructions: int
    hgmma: int  # warpgroup matrix instructions (sm_90)
    tcgen: int  # fifth-generation tensor core instructions (sm_100)
    mma: int  # warp-level matrix instructions
    # Instructions that a warp issues in one round of the main loop. Inner loops count once for
    # each chunk of columns. All 0 for code without a loop.
    loop: int
    loop_float: int  # float32 arithmetic
    loop_special: int  # exponentials and other special functions
    loop_shared: float  # bytes that the warp reads from and writes to shared memory
    loop_covered: int  # exponentials that are issued while products run (sm_90)

    @property
    def matrix(self) -> int:
        """Returns the number of matrix instructions of any kind."""
        return self.hgmma + self.tcgen + self.mma


def _specialise(
    kernel: Any, args: tuple[Any, ...], grid: tuple[int, ...], kwargs: dict[str, Any]
) -> Launch:
    """Returns the launch as `triton.jit` would specialise the kernel.

    Arguments equal to 1 or None become constants. Multiples of 16 are marked as divisible.
    """
    options: dict[str, int | None] = {
        name: kwargs.pop(name)
        for name in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
        if name in kwargs
    }
    signature, constants, divisible = {}, {}, []
    given = dict(zip(kernel.arg_names, args), **kwargs)
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        free = not parameter.do_not_specialize
        if (
            parameter.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and free)
        ):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible.append(name)
        elif hasattr(value, "block_shape"):  # a tensor descriptor
            kind = POINTERS[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{kind}{list(value.block_shape)},{value.layout!r}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and free:
                divisible.append(name)
    return Launch(kernel, signature, constants, tuple(divisible), options, grid, given)


def record(
    call: Callable[[], object],
    processors: int = PROCESSORS[90],
    gpu: Architecture = Architecture(),  # noqa: B008 (immutable)
) -> list[Launch]:
    """Returns the launches of `call` on a GPU.

    processors: multiprocessors of the GPU.
    gpu: properties that decide the tiles.
    """
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_specialise(self, args, grid, kwargs))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(configs, "processors", return_value=processors),
        mock.patch.object(tiles, "architecture", return_value=gpu),
        # Tables stay on the CPU: the sizes in the tables are counted later.
        mock.patch.object(tables, "_upload", lambda values, _: values),
    ):
        call()
    return launches


def compile_launch(launch: Launch, capability: int | str) -> Any:
    """Compiles the kernel.

    capability: compute capability x 10, for example 80 for 8.0, or the name of an architecture of
        AMD's GPUs, for example "gfx942".
    """
    names = launch.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible}
    kind = ASTSource
    if launch.kernel.is_gluon():
        # Gluon cannot be imported where kernels are interpreted.
        kind = importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource
    source = kind(launch.kernel, launch.signature, launch.constants, attributes)
    options = dict(launch.options)
    if isinstance(capability, int):
        target = GPUTarget("cuda", capability, 32)
    else:
        target = GPUTarget("hip", capability, 64)
        options.pop("maxnreg", None)  # as on a machine with such a GPU
    return triton.compile(source, target=target, options=options)


def inspect(case: str, launch: Launch, capability: int) -> Report:
    """Compiles a launch for one architecture and reads the machine code.

    case: name of the case, goes into the report.
    capability: compute capability x 10.

    Raises RuntimeError (Triton) where the kernel does not compile.
    """
    compiled = compile_launch(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def tool(*options: str) -> str:
            command = [str(TOOLS / "cuobjdump"), *options, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage, listing = tool("-res-usage"), tool("-sass")
    # Count instructions, in the whole code and in the main loop.
    found = re.search(r"REG:(\d+)", usage)
    code = parse_listing(listing)
    assert found is not None and code, usage
    count = Counter(instruction.opcode for instruction in code)
    # An inner loop takes the columns in chunks where a row is longer than a block.
    C = launch.constants.get("C", 1)
    loop = main_loop(code, -(-C // launch.constants.get("BLOCK_C", C)))
    metadata = compiled.metadata
    return Report(
        case,
        metadata.name,
        capability,
        registers=int(found[1]),
        spills=count["STL"] + count["LDL"],
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        warps=metadata.num_warps,
        instructions=len(code),
        hgmma=count["HGMMA"],
        tcgen=count["UTCHMMA"] + count["UTCQMMA"],
        mma=count["HMMA"],
        loop=loop.total(),
        loop_float=sum(width * loop[name] for name, width in FLOAT.items()),
        loop_special=loop["MUFU"],
        loop_shared=shared_bytes(code),
        loop_covered=covered_exponentials(code),
    )


def reports(pattern: str, capabilities: tuple[int, ...]) -> Iterator[tuple[Report, Launch, bool]]:
    """Yields (report, launch, first) for every launch of the matching cases.

    pattern: regular expression, searched in the names of cases.
    capabilities: compute capabilities x 10.
    first: whether the code is met for the first time. Equal code is compiled once.
    """
    known: dict[tuple[str, int], Report] = {}
    for case in cases():
        if not re.search(pattern, case.name):
            continue
        torch.set_float32_matmul_precision(case.matmul_precision)
        for capability in (c for c in capabilities if case.capability in (c, None)):
            gpu = Architecture(
                SHARED[capability], hopper=capability == 90, blackwell=capability == 100
            )
            for launch in record(case.call, PROCESSORS[capability], gpu):
                identity = (launch.identity, capability)
                first = identity not in known
                if first:
                    known[identity] = inspect(case.name, launch, capability)
                yield known[identity]._replace(case=case.name), launch, first


def main() -> None:
    """Prints the reports of all kernels."""
    parser = argparse.ArgumentParser(
        description="Compiles the kernels and prints registers, spills and instructions."
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a line instead of a table"
    )
    parser.add_argument(
        "--only", default="", help="regular expression that the name of a case must match"
    )
    parser.add_argument(
        "--capability",
        type=int,
        choices=PROCESSORS,
        help="one architecture (default: 80, 90 and 100)",
    )
    options = parser.parse_args()
    capabilities = (options.capability,) if options.capability else (80, 90, 100)
    if not options.json:
        print(" ".join(f"{name:>12}" for name in Report._fields[2:]))
    for report, _, first in reports(options.only, capabilities):
        if not first:
            continue
        if options.json:
            print(json.dumps(report._asdict()), flush=True)
        else:
            numbers = " ".join(f"{value:12}" for value in report[2:])
            print(numbers, f" {report.kernel} ({report.case})", flush=True)


if __name__ == "__main__":
    main()
