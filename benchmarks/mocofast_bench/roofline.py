"""A model of how long a launch takes on a GPU that is not there, from its machine code and its sizes.

Products (the sweeps of InfoNCE). A program's round of the main loop takes, in clocks of a multiprocessor:

    matrix   operations / operations a clock (half of them in tf32)
    issue    instructions x warps / 4: four schedulers, one instruction a clock each
    special  exponentials x threads / 16
    float32  float32 instructions x threads / lanes
    l2       bytes of the streamed tile / (bytes a clock of the whole L2 cache / multiprocessors)

Of r programs on a multiprocessor, a round takes the largest of r times each of these, and of matrix + the largest of
issue, special and float32, since inside one program products and exponentials wait for each other. Programs take
their rounds and 2 more to start and finish, in waves of as many as fit. Memory: every byte of the tensors once, at
the bandwidth of a copy. The time is the larger of both. Not modelled: shared memory's bandwidth, latency, power.

All other kernels: the larger of the memory's time and, where the code has no loop, that of issuing it.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from mocofast_bench.sizes import PROCESSORS

if TYPE_CHECKING:
    from mocofast_bench.inspect_code import Launch, Report


class GPU(NamedTuple):
    """What a GPU has. Of a multiprocessor where not said otherwise."""

    name: str
    processors: int
    matrix_rate: (
        float  # bfloat16 operations a second that the whole GPU sustains in a large product
    )
    bandwidth: float  # bytes a second that a copy moves, read and written
    matrix: int  # dense bfloat16 operations a clock
    lanes: int  # float32 instructions of one thread a clock
    l2: float  # bytes a clock that the L2 cache delivers to all
    shared: int  # bytes of shared memory
    registers: int = 65536
    threads: int = 2048
    programs: int = 32
    special: int = 16  # exponentials a clock
    tensor_memory: int = 512  # columns

    @property
    def clock(self) -> float:
        """Hertz at which the matrix units sustain `matrix_rate`: below the data sheet's, for power."""
        return self.matrix_rate / (self.matrix * self.processors)


# Peaks of matrix units (312, 989 and 2250 TFLOP/s) and memory (2.04, 4.8 and 8.0 TB/s): NVIDIA's data sheets of the
# A100 80 GB SXM, H200 SXM and HGX B200. On an H200 790 TFLOP/s and a copy at 4.3 TB/s were measured: 80% and 90% of
# its peaks, which the others are taken to reach too. Shared memory, registers, threads, programs, lanes and
# exponentials: CUDA C++ programming guide, "Compute capabilities" and "Arithmetic instructions". Matrix operations a
# clock follow from peak and boost clock. L2: 5120 bytes a clock on an A100 (its white paper); none is published for
# the others: taken to be 5120 on an H200 too, and as much for each multiprocessor on a B200.
GPUS = {
    80: GPU("A100", PROCESSORS[80], 0.80 * 312e12, 0.90 * 2.04e12, 2048, 64, 5120, 164 * 1024),
    90: GPU("H200", PROCESSORS[90], 790e12, 4.3e12, 4096, 128, 5120, 228 * 1024),
    100: GPU(
        "B200", PROCESSORS[100], 0.80 * 2250e12, 0.90 * 8.0e12, 8192, 128,
        5120 * PROCESSORS[100] / PROCESSORS[90], 228 * 1024,
    ),
}  # fmt: skip
RESERVED = 1024  # bytes of shared memory that each program takes for the system (same guide)
EXTRA_ROUNDS = 2  # as mocofast_kernels.configs.split_count has it
LAUNCH = 2e-6  # seconds that each launch of a call adds: an assumption, for replays of CUDA graphs

# How often a column of a pointer table is touched for each element: written ones are read first but for the copies.
TOUCHES = {
    "PARAM": 2, "GRAD": 1, "BUFFER": 2, "EXP_AVG": 2, "EXP_AVG_SQ": 2, "SOURCE": 1, "TARGET": 2, "SHADOW": 1,
    "TARGET_SHADOW": 1,
}  # fmt: skip
# Operations for each element of the named argument, counted in the source; a division or a root is one.
OPERATIONS = {
    "_ema_kernel": ("sizes", 3),
    "_sgd_kernel": ("sizes", 6),
    "_squares_kernel": ("sizes", 6),
    "_adamw_kernel": ("sizes", 17),
    "_prepare_rows_kernel": ("query", 5),
    "_project_rows_kernel": ("grad", 9),
    "_enqueue_kernel": ("keys", 3),
    "_combine_kernel": ("outs", 2),
    "_statistics_kernel": ("x", 4),
    "_normalise_kernel": ("x", 3),
    "_backward_sums_kernel": ("x", 4),
    "_grad_input_kernel": ("x", 6),
}
AVERAGE = 4  # operations that a moving average adds to an optimiser's step


class Prediction(NamedTuple):
    """Of one launch. Times are in seconds, those of a resource as if all else were free; 0 where it has no part."""

    programs: int  # of the launch
    resident: int  # programs that fit on a multiprocessor at a time
    bytes: int
    operations: int
    time: float
    memory: float
    arithmetic: float = (
        0.0  # that `operations` take at the full rate of their unit; with `memory`, the floor
    )
    matrix: float = 0.0
    issue: float = 0.0
    special: float = 0.0
    float32: float = 0.0
    l2: float = 0.0

    @property
    def limit(self) -> str:
        """The resource that takes longest."""
        return max(
            ("matrix", "issue", "special", "float32", "l2", "memory"),
            key=lambda name: getattr(self, name),
        )


def resident_programs(report: Report, gpu: GPU) -> int:
    """Programs that fit on a multiprocessor: registers go to warps in units of 256."""
    of_registers = gpu.registers // (report.warps * -(-report.registers * 32 // 256) * 256)
    of_shared = gpu.shared // (report.shared + RESERVED)
    fits = [of_registers, of_shared, gpu.threads // (32 * report.warps), gpu.programs]
    if report.tensor_memory:
        fits.append(gpu.tensor_memory // report.tensor_memory)
    return min(fits)


def traffic(launch: Launch) -> int:
    """Bytes moved if every tensor passes the memory once (those updated in place: twice)."""
    kernel, given = launch.kernel.__name__, launch.arguments
    if "sizes" in given:
        touches = {**TOUCHES, "PARAM": 1} if kernel == "_squares_kernel" else TOUCHES
        types = {name: launch.constants.get(name) for name in touches}
        width = sum(
            touches[name] * kind.primitive_bitwidth // 8
            for name, kind in types.items()
            if kind is not None
        )
        return int(given["sizes"].sum()) * width
    tensors = {id(x): x.numel() * x.element_size() for x in given.values() if isinstance(x, Tensor)}
    total = sum(tensors.values())
    if kernel == "_enqueue_kernel":
        queue, keys = given["queue"], given["keys"]
        total -= (len(queue) - min(len(keys), len(queue))) * queue.shape[1] * queue.element_size()
    elif kernel == "_project_rows_kernel":
        total += tensors[id(given["grad"])]
    return total


def _is_product(launch: Launch) -> bool:
    """Whether it is one of InfoNCE's sweeps."""
    return "PRECISION" in launch.constants and "K" in launch.arguments


def operations(launch: Launch) -> int:
    """Floating-point operations that the mathematics asks for, without padding."""
    kernel, given = launch.kernel.__name__, launch.arguments
    if _is_product(launch):
        return (
            (4 if launch.constants.get("GRAD", True) else 2)
            * given["N"]
            * given["K"]
            * launch.constants["C"]
        )
    name, each = OPERATIONS.get(kernel, ("", 0))
    if not name or given[name] is None:
        return 0
    if launch.constants.get("TARGET") is not None and kernel != "_ema_kernel":
        each += AVERAGE
    return each * (int(given[name].sum()) if name == "sizes" else given[name].numel())


def predict(launch: Launch, report: Report, gpu: GPU) -> Prediction:
    """What the model says of one launch."""
    programs, resident = prod(launch.grid), resident_programs(report, gpu)
    moved, counted = traffic(launch), operations(launch)
    memory = moved / gpu.bandwidth
    if not _is_product(launch):
        code = 0 if report.loop else report.instructions
        issue = programs * report.warps * code / 4 / gpu.processors / gpu.clock
        return Prediction(
            programs, resident, moved, counted, max(memory, issue), memory, issue=issue
        )
    rounds, resources = _round(launch, report, gpu)
    alone = resources[0] + max(resources[1:4])

    def wave(side_by_side: int) -> float:
        return (rounds + EXTRA_ROUNDS) * max(
            alone, *(side_by_side * clocks for clocks in resources)
        )

    full, rest = divmod(programs, gpu.processors * resident)
    clocks = full * wave(resident) + (wave(-(-rest // gpu.processors)) if rest else 0.0)
    matrix, issue, special, float32, l2 = (
        programs * rounds * each / gpu.processors / gpu.clock for each in resources
    )
    rate = gpu.matrix_rate if matrix else 2 * gpu.lanes * gpu.processors * gpu.clock
    if launch.constants["PRECISION"] == "tf32":
        rate /= 2
    time, arithmetic = max(memory, clocks / gpu.clock), counted / rate
    return Prediction(
        programs,
        resident,
        moved,
        counted,
        time,
        memory,
        arithmetic,
        matrix,
        issue,
        special,
        float32,
        l2,
    )


def _round(launch: Launch, report: Report, gpu: GPU) -> tuple[int, list[float]]:
    """Rounds of a program's main loop, and clocks of each resource (matrix, issue, special, float32, l2) in one."""
    constants, given = launch.constants, launch.arguments
    threads = 32 * report.warps
    if "STAY" in constants:
        stay, stream, rounds = (
            constants["STAY"],
            constants["STREAM"],
            -(-given["N"] // constants["STREAM"]),
        )
        streamed = given["operand"]
    else:
        stay, stream, rounds = constants["BLOCK_N"], constants["BLOCK_K"], given["tiles_per_split"]
        streamed = given["negatives"]
    chunks = -(-constants["C"] // constants["BLOCK_C"])
    columns = chunks * constants["BLOCK_C"] + (
        constants["OUT_C"] if constants.get("GRAD", True) else 0
    )
    clocks = 2 * stay * stream * columns / gpu.matrix
    if constants["PRECISION"] == "tf32":
        clocks *= 2
    elif str(constants["DOT"]) == "fp32":
        clocks = 0.0
    # A row in chunks is read again for the second product, and so are the rows that stay.
    row = streamed.element_size() * (columns if chunks > 1 else constants["BLOCK_C"])
    read = stream * row + (
        stay * chunks * constants["BLOCK_C"] * streamed.element_size() if chunks > 1 else 0
    )
    return rounds, [
        clocks,
        report.loop * report.warps / 4,
        report.loop_special * threads / gpu.special,
        report.loop_float * threads / gpu.lanes,
        read / (gpu.l2 / gpu.processors),
    ]
