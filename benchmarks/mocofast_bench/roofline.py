"""Models how long a kernel launch takes on a GPU, from machine code and sizes. Needs no GPU.

Products (the sweeps of InfoNCE). A round of a program's main loop takes, in clocks of a
multiprocessor:

    matrix   operations / operations a clock (half as many operations a clock in tf32)
    issue    instructions x warps / 4 (four schedulers with an instruction a clock)
    special  exponentials x threads / 16
    float32  float32 instructions x threads / lanes
    l2       bytes of the streamed tile / (bytes a clock of the whole L2 cache / multiprocessors)

With r programs on a multiprocessor, a round takes the maximum of two times:

    r x the largest of the five values
    matrix + the largest of issue, special and float32: inside a program, products and
        exponentials wait in turn

A program takes all rounds, and 2 more rounds to start and finish. Programs run in waves of as
many as fit on the GPU. Memory takes the time to move every byte of the tensors once, at the
bandwidth of a copy. The time of the launch is the larger of memory and waves. Bandwidth of
shared memory, latency and power are not modelled.

All other kernels take the larger of two times: moving the bytes, and issuing the
instructions. Issuing counts only for code without a loop.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from mocofast_bench.sizes import PROCESSORS

if TYPE_CHECKING:
    from mocofast_bench.inspect_code import Launch, Report


class GPU(NamedTuple):
    """Resources of a GPU. Numbers are for one multiprocessor, unless a comment says more."""

    name: str
    processors: int  # multiprocessors of the GPU
    matrix_rate: float  # of the GPU: bfloat16 operations a second, sustained in a large product
    bandwidth: float  # of the GPU: bytes a second that a copy reads and writes
    matrix: int  # dense bfloat16 operations a clock
    lanes: int  # float32 instructions of one thread a clock
    l2: float  # of the GPU: bytes a clock that the L2 cache delivers
    shared: int  # bytes of shared memory
    registers: int = 65536
    threads: int = 2048
    programs: int = 32
    special: int = 16  # exponentials a clock
    tensor_memory: int = 512  # columns

    @property
    def clock(self) -> float:
        """Returns the clock in Hz at which the matrix units sustain `matrix_rate`.

        The clock is below the data sheet's, because power is limited.
        """
        return self.matrix_rate / (self.matrix * self.processors)


# Sources of the numbers:
# - Peaks of matrix units (312, 989 and 2250 TFLOP/s) and memory (2.04, 4.8 and 8.0 TB/s): NVIDIA's
#   data sheets of A100 80 GB SXM, H200 SXM and HGX B200. Measured on an H200: 790 TFLOP/s and a
#   copy at 4.3 TB/s, 80% and 90% of the peaks. The same shares are assumed for A100 and B200.
# - Shared memory, registers, threads, programs, lanes and exponentials: CUDA C++ programming guide,
#   "Compute capabilities" and "Arithmetic instructions".
# - Matrix operations a clock: peak / boost clock.
# - L2: 5120 bytes a clock on an A100 (white paper). No number is published for H200 and B200.
#   Assumed: 5120 on an H200, and as many bytes for every multiprocessor on a B200.
L2_OF_B200 = 5120 * PROCESSORS[100] / PROCESSORS[90]
GPUS = {
    80: GPU("A100", PROCESSORS[80], 0.80 * 312e12, 0.90 * 2.04e12, 2048, 64, 5120, 164 * 1024),
    90: GPU("H200", PROCESSORS[90], 790e12, 4.3e12, 4096, 128, 5120, 228 * 1024),
    100: GPU("B200", PROCESSORS[100], 0.8 * 2250e12, 0.9 * 8e12, 8192, 128, L2_OF_B200, 228 * 1024),
}
RESERVED = 1024  # bytes of shared memory that the system takes in every program (same guide)
EXTRA_ROUNDS = 2  # as in mocofast_kernels.configs.split_count
LAUNCH = 2e-6  # seconds that a launch adds in the replay of a CUDA graph (an assumption)

# How often a kernel reads and writes every element of a column of the pointer table. Written
# columns are read first, except the copies (SHADOW, TARGET_SHADOW).
TOUCHES = {
    "PARAM": 2,
    "GRAD": 1,
    "BUFFER": 2,
    "EXP_AVG": 2,
    "EXP_AVG_SQ": 2,
    "SOURCE": 1,
    "TARGET": 2,
    "SHADOW": 1,
    "TARGET_SHADOW": 1,
}
# {kernel: (argument, operations for each element of the argument)}, counted in the source. A
# division or a root counts as one operation.
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
AVERAGE = 4  # operations for each element that an EMA adds to an optimiser's step


class Prediction(NamedTuple):
    """Prediction for a launch.

    Times are in seconds. The time of a resource assumes all else is free. An unused
    resource has time 0.
    """

    programs: int  # programs of the launch
    resident: int  # programs that fit on a multiprocessor at the same time
    bytes: int
    operations: int
    time: float  # predicted time of the launch
    memory: float
    # `operations` at the full rate of the unit. The floor is the larger of arithmetic and memory.
    arithmetic: float = 0.0
    matrix: float = 0.0
    issue: float = 0.0
    special: float = 0.0
    float32: float = 0.0
    l2: float = 0.0

    @property
    def limit(self) -> str:
        """Returns the resource with the longest time."""
        return max(
            ("matrix", "issue", "special", "float32", "l2", "memory"),
            key=lambda name: getattr(self, name),
        )


def resident_programs(report: Report, gpu: GPU) -> int:
    """Returns how many programs fit on a multiprocessor at the same time."""
    # Registers are given to warps in units of 256.
    of_registers = gpu.registers // (report.warps * -(-report.registers * 32 // 256) * 256)
    of_shared = gpu.shared // (report.shared + RESERVED)
    fits = [of_registers, of_shared, gpu.threads // (32 * report.warps), gpu.programs]
    if report.tensor_memory:
        fits.append(gpu.tensor_memory // report.tensor_memory)
    return min(fits)


def traffic(launch: Launch) -> int:
    """Returns the bytes moved if every tensor is read or written once.

    Tensors updated in place count twice: a read and a write.
    """
    # Optimisers and EMA: tensors stand in a pointer table.
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
    # All other kernels: tensors are arguments.
    tensors = {id(x): x.numel() * x.element_size() for x in given.values() if isinstance(x, Tensor)}
    total = sum(tensors.values())
    if kernel == "_enqueue_kernel":
        queue, keys = given["queue"], given["keys"]
        total -= (len(queue) - min(len(keys), len(queue))) * queue.shape[1] * queue.element_size()
    elif kernel == "_project_rows_kernel":
        total += tensors[id(given["grad"])]
    return total


def _is_product(launch: Launch) -> bool:
    """Returns whether the launch is one of InfoNCE's sweeps."""
    return "PRECISION" in launch.constants and "K" in launch.arguments


def operations(launch: Launch) -> int:
    """Returns the floating-point operations of the formula, without padding."""
    kernel, given = launch.kernel.__name__, launch.arguments
    if _is_product(launch):
        each = 4 if launch.constants.get("GRAD", True) else 2
        return each * given["N"] * given["K"] * launch.constants["C"]
    name, each = OPERATIONS.get(kernel, ("", 0))
    if not name or given[name] is None:
        return 0
    if launch.constants.get("TARGET") is not None and kernel != "_ema_kernel":
        each += AVERAGE
    return each * (int(given[name].sum()) if name == "sizes" else given[name].numel())


def predict(launch: Launch, report: Report, gpu: GPU) -> Prediction:
    """Predicts the time of a launch.

    launch: recorded launch: grid, arguments and constants.
    report: what the machine code of the launch holds.
    gpu: the GPU to predict for.
    """
    # Bytes, and kernels that are not products.
    programs, resident = prod(launch.grid), resident_programs(report, gpu)
    moved, counted = traffic(launch), operations(launch)
    memory = moved / gpu.bandwidth
    if not _is_product(launch):
        code = 0 if report.loop else report.instructions
        issue = programs * report.warps * code / 4 / gpu.processors / gpu.clock
        return Prediction(
            programs, resident, moved, counted, max(memory, issue), memory, issue=issue
        )
    # Products: clocks of all waves of programs.
    rounds, resources = _round(launch, report, gpu)
    alone = resources[0] + max(resources[1:4])

    def wave(side_by_side: int) -> float:
        return (rounds + EXTRA_ROUNDS) * max(
            alone, *(side_by_side * clocks for clocks in resources)
        )

    full, rest = divmod(programs, gpu.processors * resident)
    clocks = full * wave(resident) + (wave(-(-rest // gpu.processors)) if rest else 0.0)
    # Times of every resource alone, and of the arithmetic at full rate.
    matrix, issue, special, float32, l2 = (
        programs * rounds * each / gpu.processors / gpu.clock for each in resources
    )
    rate = gpu.matrix_rate if matrix else 2 * gpu.lanes * gpu.processors * gpu.clock
    if launch.constants["PRECISION"] == "tf32":
        rate /= 2
    time, arithmetic = max(memory, clocks / gpu.clock), counted / rate
    clock_times = (matrix, issue, special, float32, l2)
    return Prediction(programs, resident, moved, counted, time, memory, arithmetic, *clock_times)


def _round(launch: Launch, report: Report, gpu: GPU) -> tuple[int, list[float]]:
    """Returns the rounds of a program's main loop, and the clocks of every resource in a round.

    Order of resources: matrix, issue, special, float32, l2.
    """
    constants, given = launch.constants, launch.arguments
    threads = 32 * report.warps
    # Rows that stay, rows that stream, and the streamed tensor.
    if "STAY" in constants:
        stay, stream = constants["STAY"], constants["STREAM"]
        rounds, streamed = -(-given["N"] // stream), given["operand"]
    else:
        stay, stream = constants["BLOCK_N"], constants["BLOCK_K"]
        rounds, streamed = given["tiles_per_split"], given["negatives"]
    # Matrix units.
    chunks = -(-constants["C"] // constants["BLOCK_C"])
    width = chunks * constants["BLOCK_C"]  # columns with padding
    columns = width + (constants["OUT_C"] if constants.get("GRAD", True) else 0)
    clocks = 2 * stay * stream * columns / gpu.matrix
    if constants["PRECISION"] == "tf32":
        clocks *= 2
    elif str(constants["DOT"]) == "fp32":
        clocks = 0.0
    # L2 cache. Rows in chunks are read again for the second product, and so are rows that stay.
    size = streamed.element_size()
    read = stream * size * (columns if chunks > 1 else constants["BLOCK_C"])
    if chunks > 1:
        read += stay * size * width
    return rounds, [
        clocks,
        report.loop * report.warps / 4,
        report.loop_special * threads / gpu.special,
        report.loop_float * threads / gpu.lanes,
        read / (gpu.l2 / gpu.processors),
    ]
