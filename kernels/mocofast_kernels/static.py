"""Compile the shipped kernels for GPUs that are not there, and read registers, spills and instructions off the code.

`python -m mocofast_kernels.static` prints a table, `--json` one object a line; `--only PATTERN` keeps cases whose
name matches, `--capability 90` one architecture. TRITON_INTERPRET must not be set.

The arguments are those of the real launches: the launching functions run on tensors without storage (device "meta")
while launches are recorded instead of made.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
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

from mocofast_kernels.cpu_optim import Row
from mocofast_kernels.ema import ema_update_
from mocofast_kernels.enqueue import enqueue_
from mocofast_kernels.ghost_bn import ghost_bn_backward, ghost_bn_forward
from mocofast_kernels.infonce import infonce_forward
from mocofast_kernels.infonce_backward import infonce_grad_negatives
from mocofast_kernels.optim import adamw_, lars_, sgd_
from mocofast_kernels.tables import FLOATS

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
    options: dict[str, int | None]


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
    options: dict[str, int | None] = {
        name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs
    }
    signature, constants, divisible = {}, {}, []
    given = dict(zip(kernel.arg_names, args), **kwargs)
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and free):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and free:
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


class Case(NamedTuple):
    """A call whose launches are compiled, and the precision of PyTorch's float32 products it is made under."""

    name: str
    call: Callable[[], object]
    matmul_precision: str = "highest"


class Types(NamedTuple):
    """Stored type of the inputs, type of the matrix operands, precision of float32 products."""

    name: str
    stored: torch.dtype
    dot: torch.dtype
    matmul_precision: str = "highest"


TYPES = (
    Types("bf16", torch.bfloat16, torch.bfloat16),
    Types("fp16", torch.float16, torch.float16),
    Types("fp32 as bf16", torch.float32, torch.bfloat16),
    Types("fp32 as fp16", torch.float32, torch.float16),
    Types("fp32 as tf32", torch.float32, torch.float32, "high"),
    Types("fp32", torch.float32, torch.float32),
)
# Every row of the tile tables: whole blocks, partly filled ones, several chunks, and rows that are not aligned.
COLUMNS = (16, 32, 64, 101, 120, 128, 200, 256, 300, 512)


class Variant(NamedTuple):
    """A way to call the forward sweep; the names say what calls it so."""

    name: str
    normalize_negatives: bool
    compute_grad: bool
    online: bool
    exclude: bool
    transposed: bool = False


VARIANTS = (
    Variant("queue", False, True, False, False),
    Variant("queue, temperature tensor", False, True, True, False),
    Variant("queue, loss only", False, False, False, False),
    Variant("queue, transposed", False, True, True, False, True),
    Variant("in-batch", True, True, True, True),
)


def _forward(C: int, types: Types, variant: Variant) -> Callable[[], object]:
    def call() -> object:
        query = torch.empty(256, C, dtype=types.stored, device="meta")
        negatives = torch.empty(65536, C, dtype=types.stored, device="meta")
        if variant.transposed:
            negatives = torch.empty(C, 65536, dtype=types.stored, device="meta").T
        return infonce_forward(
            query, query, negatives, torch.empty((), device="meta") if variant.online else 0.07, normalize=True,
            normalize_negatives=variant.normalize_negatives, exclude_period=256 if variant.exclude else 0,
            return_rank=True, compute_grad=variant.compute_grad, dot_dtype=types.dot,
        )  # fmt: skip

    return call


def _grad_negatives(C: int, types: Types) -> Callable[[], object]:
    def call() -> object:
        row = torch.empty(256, device="meta")
        x = torch.empty(256, C, dtype=types.stored, device="meta")
        return infonce_grad_negatives(
            row, x, x, row, torch.empty((), device="meta"), normalize=True, normalize_negatives=True,
            exclude_period=256, dot_dtype=types.dot,
        )  # fmt: skip

    return call


def _enqueue(C: int, types: Types) -> Callable[[], object]:
    def call() -> None:
        queue = torch.empty(65536, C, dtype=types.stored, device="meta")
        pointer = torch.empty(1, dtype=torch.int64, device="meta")
        enqueue_(queue, pointer, torch.empty(256, C, device="meta"), normalize=True)

    return call


def _ema(target: torch.dtype, shape: tuple[int, int], momentum: float | Tensor) -> Callable[[], object]:
    return lambda: ema_update_(
        [torch.empty(shape, dtype=target, device="meta")], [torch.empty(shape, device="meta")], momentum
    )


def _optimizer(
    step: Callable[..., None], dtype: torch.dtype, shape: tuple[int, int], number: float | Tensor, followed: bool
) -> Callable[[], object]:
    def call() -> None:
        def empty(dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        target, *shadows = (
            empty(kind) if followed else None for kind in (torch.float32, torch.bfloat16, torch.bfloat16)
        )
        options: dict[str, Any] = {"lr": number, "weight_decay": 0.1, "ema_momentum": number}
        if step is adamw_:
            state: tuple[Tensor, ...] = (empty(dtype), empty(dtype), torch.empty((), device="meta"))
            options |= {"betas": (0.9, 0.999), "eps": 1e-8}
        else:
            state = (empty(dtype),)
            options |= {"momentum": 0.9, **({"trust_coefficient": 0.001} if step is lars_ else {})}
        step([Row(empty(dtype), empty(dtype), target, shadows[0], shadows[1], state)], **options)

    return call


# What wide loads fit, and what they do not.
WEIGHTS = ((64, 64), (5, 3))


def _ghost_bn(
    shape: tuple[int, int, int, int], parts: int, dtype: torch.dtype, relu: bool, residual: bool, running: bool
) -> Callable[[], object]:
    def call() -> None:
        x = torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
        row = torch.empty(shape[1], device="meta")
        statistics = (row, row) if running else (None, None)
        output = ghost_bn_forward(
            x, x if residual else None, row, row, *statistics, parts=parts, momentum=0.1, eps=1e-5, relu=relu
        )
        y = output.output if relu and residual else None
        ghost_bn_backward(x, x, y, row, row, output.statistics, parts=parts, relu=relu)

    return call


# Widths of ResNets, with the last one's few rows; a width that masks columns; rows that are not aligned; so many rows
# that their numbers need 64 bits.
ACTIVATIONS = ((256, 64, 56, 56), (256, 2048, 7, 7), (256, 48, 28, 28), (256, 13, 7, 7), (2**20, 64, 56, 56))


def cases() -> Iterator[Case]:
    """Every row of the tile tables in every variant that changes its code, and the small kernels."""
    for C, types in itertools.product(COLUMNS, TYPES):
        for variant in VARIANTS:
            name = f"forward, C={C}, {types.name}, {variant.name}"
            yield Case(name, _forward(C, types, variant), types.matmul_precision)
        yield Case(f"backward, C={C}, {types.name}", _grad_negatives(C, types), types.matmul_precision)
    for C in COLUMNS:
        yield Case(f"enqueue, C={C}, fp32", _enqueue(C, TYPES[-1]))
    numbers = (0.1, torch.empty((), device="meta"))
    for target, shape, momentum in itertools.product(FLOATS, WEIGHTS, numbers):
        yield Case(f"ema, {target}, {shape}, {type(momentum).__name__} momentum", _ema(target, shape, momentum))
    for step, dtype, shape, number, followed in itertools.product(
        (sgd_, lars_, adamw_), FLOATS, WEIGHTS, numbers, (True, False)
    ):
        name = (
            f"{step.__name__}, {dtype}, {shape}, {type(number).__name__} lr, {'with' if followed else 'without'} EMA"
        )
        yield Case(name, _optimizer(step, dtype, shape, number, followed))
    for shape, dtype, relu, residual in itertools.product(ACTIVATIONS, FLOATS, (False, True), (False, True)):
        name = f"ghost_bn, {shape}, {dtype}{', residual' * residual}{', relu' * relu}"
        yield Case(name, _ghost_bn(shape, 8, dtype, relu, residual, running=True))
    yield Case("ghost_bn, under torch.compile", _ghost_bn(ACTIVATIONS[0], 8, torch.bfloat16, False, False, False))


def reports(pattern: str, capabilities: tuple[int, ...]) -> Iterator[Report]:
    """Compile the cases whose name holds a match of `pattern`; equal launches only once."""
    seen = set()
    for case in cases():
        if not re.search(pattern, case.name):
            continue
        torch.set_float32_matmul_precision(case.matmul_precision)
        for launch, capability in itertools.product(record(case.call), capabilities):
            identity = (launch.kernel.__name__, repr(launch[1:]), capability)
            if identity not in seen:
                seen.add(identity)
                yield inspect(case.name, launch, capability)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels for GPUs that are not there.")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--only", default="", help="regular expression that a case's name must match")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, help="one architecture; default all")
    options = parser.parse_args()
    capabilities = (options.capability,) if options.capability else CAPABILITIES
    if not options.json:
        print(" ".join(f"{name:>12}" for name in Report._fields[2:]))
    for report in reports(options.only, capabilities):
        if options.json:
            print(json.dumps(report._asdict()), flush=True)
        else:
            print(" ".join(f"{value:12}" for value in report[2:]), f" {report.kernel} ({report.case})", flush=True)


if __name__ == "__main__":
    main()
