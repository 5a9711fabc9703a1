"""Compile the shipped kernels for GPUs that are not there, and read registers, spills and instructions off the code.

`python -m mocofast_kernels.static` prints a table, `--json` one object a line; `--only TEXT` keeps the cases whose
name holds TEXT, `--capability 90` one architecture. TRITON_INTERPRET must not be set.

The arguments are those of the real launches: the launching functions run on tensors without storage (device "meta")
while launches are recorded instead of made.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mocofast_kernels.infonce import infonce_forward

CAPABILITIES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    """One recorded launch: the kernel and everything that decides its machine code."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]  # integers and pointers that are multiples of 16, which the compiler may use
    options: dict[str, int]


class Report(NamedTuple):
    """What the machine code of one launch holds."""

    case: str
    kernel: str
    capability: int
    registers: int  # a thread
    spills: int  # instructions that store to or load from local memory
    shared: int  # bytes a program
    instructions: int
    hgmma: int  # warpgroup matrix instructions (sm_90)
    tcgen: int  # fifth-generation tensor core instructions (sm_100)
    mma: int  # warp-level matrix instructions


def _describe(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """The launch as `triton.jit` would specialise it: 1 and None are constants, multiples of 16 are known as such."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    signature, constants, divisible = {}, {}, []
    given = dict(zip(kernel.arg_names, args), **kwargs)
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
    return Launch(kernel, signature, constants, tuple(divisible), options)


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` would make."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_describe(self, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return launches


def compile_launch(launch: Launch, capability: int) -> Any:
    """The compiled kernel, for compute capability 8.0 as 80."""
    names = launch.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def inspect(case: str, launch: Launch, capability: int) -> Report:
    """Compile one launch for one architecture and read its machine code."""
    compiled = compile_launch(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def tool(*options: str) -> str:
            command = [str(TOOLS / "cuobjdump"), *options, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage, code = tool("-res-usage"), tool("-sass")
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", code)
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None and opcodes, usage
    count = opcodes.count
    return Report(
        case, compiled.metadata.name, capability, int(found[1]), count("STL") + count("LDL"),
        compiled.metadata.shared, len(opcodes), count("HGMMA"), count("UTCHMMA") + count("UTCQMMA"),
        count("HMMA"),
    )  # fmt: skip


def _forward(
    N: int, K: int, C: int, stored: torch.dtype, dot: torch.dtype, normalize_negatives: bool, rank: bool, grad: bool,
    online: bool, exclude: bool, transposed: bool = False,
) -> Callable[[], object]:  # fmt: skip
    def call() -> object:
        query = torch.empty(N, C, dtype=stored, device="meta")
        negatives = torch.empty(K, C, dtype=stored, device="meta")
        if transposed:
            negatives = torch.empty(C, K, dtype=stored, device="meta").T
        temperature = torch.empty((), device="meta") if online else 0.07
        return infonce_forward(
            query, query, negatives, temperature, normalize=True, normalize_negatives=normalize_negatives,
            exclude_period=N if exclude else 0, return_rank=rank, compute_grad=grad, dot_dtype=dot,
        )  # fmt: skip

    return call


def cases() -> Iterator[tuple[str, Callable[[], object], str]]:
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    for C in (16, 32, 64, 100, 128, 256, 300, 512):
        for stored, dot, precision in [(torch.bfloat16, torch.bfloat16, "highest"), (torch.float16, torch.float16, "highest"), (torch.float32, torch.bfloat16, "highest"), (torch.float32, torch.float32, "high"), (torch.float32, torch.float32, "highest")]:
            for variant, opts in dict(queue=(0,1,1,0,0), online=(0,1,1,1,0), loss=(0,1,0,0,0), batch=(1,1,1,1,1)).items():
                yield f"forward C={C} {short[stored]}->{short[dot]} {precision} {variant}", _forward(256, 65536, C, stored, dot, *map(bool, opts)), precision


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES)
    options = parser.parse_args()
    for name, call, precision in cases():
        if not re.search(options.only, name):
            continue
        torch.set_float32_matmul_precision(precision)
        for launch, capability in itertools.product(record(call), CAPABILITIES):
            if options.capability not in (None, capability): continue
            if 'sweep' not in launch.kernel.__name__: continue
            print(inspect(name, launch, capability)._asdict() if options.json else " ".join(f"{k}={v}" for k,v in inspect(name, launch, capability)._asdict().items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
