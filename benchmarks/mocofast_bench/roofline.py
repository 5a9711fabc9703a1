"""Models how long a kernel launch takes on a GPU, from machine code and sizes. Needs no GPU.

Products (the sweeps of InfoNCE and of the sigmoid loss). A round of a program's main loop takes, in
clocks of a multiprocessor:

    matrix   operations / operations a clock (half as many operations a clock in tf32)
    issue    instructions x warps / 4 (four schedulers with an instruction a clock)
    special  exponentials x threads / 16
    float32  float32 instructions x threads / lanes
    l2       bytes of the streamed tile / bytes that the L2 cache delivers
    shared   bytes read from and written to shared memory / 128

Inside a program, products wait for exponentials, and exponentials for products, unless the machine
code issues exponentials while products run. A copy that is issued less than its latency ahead is
waited for. Both make a round longer: "alone" is the sum. With r programs on a multiprocessor, a
round takes at least r x the largest of the six values (perfect overlap), and at most r x alone (no
overlap). Programs overlap as OVERLAP says, because nothing keeps them out of step.

A program takes all rounds, and 2 more rounds to start and finish. Programs run in waves of as
many as fit on the GPU. Memory takes the time to move every byte of the tensors once, at the
bandwidth of a copy. The time of the launch is the larger of memory and waves. Power is not
modelled beyond the clock. A call takes the sum of its launches, each with LAUNCH on top.

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
    capability: int | None  # compute capability x 10 of the modelled code. None: of AMD, no code
    processors: int  # multiprocessors, or compute units, of the GPU
    matrix_rate: float  # of the GPU: bfloat16 operations a second, sustained in a large product
    bandwidth: float  # of the GPU: bytes a second that a copy reads and writes
    matrix: int  # dense bfloat16 operations a clock
    lanes: int  # float32 instructions of one thread a clock
    l2: float  # of the GPU: bytes a second that the L2 cache delivers. 0: not known
    shared: int  # bytes of shared memory
    threads: int = 2048
    programs: int = 32
    registers: int = 65536
    special: int = 16  # exponentials a clock
    shared_rate: int = 128  # bytes of shared memory a clock
    tensor_memory: int = 512  # columns

    @property
    def clock(self) -> float:
        """Returns the clock in Hz at which the matrix units sustain `matrix_rate`.

        The clock is below the data sheet's, because power is limited.
        """
        return self.matrix_rate / (self.matrix * self.processors)


# Sources of the numbers:
# - Peaks of matrix units and of memory: the makers' data sheets, with 32-bit sums for RTX 4090 and
#   5090. Measured on an H200: 790 TFLOP/s and a copy at 4.3 TB/s, 80% and 90% of the peaks. The
#   same shares are assumed elsewhere: a copy of an H100 takes 3.0 of 3.35 TB/s.
# - Shared memory, registers, threads, programs, lanes and exponentials: CUDA C++ programming guide,
#   "Compute capabilities" and "Arithmetic instructions".
# - Matrix operations a clock: peak / boost clock.
# - L2: measured by github.com/te42kyfo/gpu-benches (gpu-l2-cache, June 2024): A100 5.4, H200 9.7,
#   L40 5.2 TB/s. Assumed: an H200's for an H100, an L40's for an RTX 4090, and as many bytes for
#   every multiprocessor of B200 and RTX 5090 as of H200 and L40.
# - RTX 5090: code of sm_89, which has the same matrix instructions. The listing of sm_120 shows no
#   loops.
KB = 1024


def _gpu(name: str, code: int | None, units: int, peak: float, memory: float, *rest: float) -> GPU:
    """Returns a GPU with 80% of the peak (TFLOP/s) and 90% of the memory's bandwidth (TB/s)."""
    matrix, lanes, l2, shared, *limits = (int(x) for x in rest)
    return GPU(
        name, code, units, 0.8e12 * peak, 0.9e12 * memory, matrix, lanes, l2, shared, *limits
    )


CARDS = (
    _gpu("A100", 80, PROCESSORS[80], 312, 2.04, 2048, 64, 5.4e12, 164 * KB),
    _gpu("RTX 4090", 89, PROCESSORS[89], 165.2, 1.008, 512, 128, 5.2e12, 100 * KB, 1536, 24),
    _gpu("H100", 90, PROCESSORS[90], 989, 3.35, 4096, 128, 9.7e12, 228 * KB),
    _gpu("H200", 90, PROCESSORS[90], 989, 4.8, 4096, 128, 9.7e12, 228 * KB),
    _gpu("B200", 100, PROCESSORS[100], 2250, 8.0, 8192, 128, 9.7e12 * 148 / 132, 228 * KB),
    _gpu("RTX 5090", 89, 170, 209.5, 1.792, 512, 128, 5.2e12 * 170 / 142, 100 * KB, 1536, 24),
    _gpu("MI300X", None, 304, 1307, 5.3, 2048, 128, 0, 64 * KB),
)
# {compute capability x 10: the GPU for which tiles are ranked}
TUNED = ("A100", "RTX 4090", "H200", "B200")
GPUS = {gpu.capability: gpu for gpu in CARDS if gpu.capability is not None and gpu.name in TUNED}
RESERVED = 1024  # bytes of shared memory that the system takes in every program (same guide)
EXTRA_ROUNDS = 2  # as in mocofast_kernels.configs.split_count
LAUNCH = 2e-6  # seconds that a launch adds in the replay of a CUDA graph (an assumption)
LATENCY = 800  # clocks from a copy's issue to its bytes in shared memory (an assumption)
# Share of the possible overlap that two programs of a multiprocessor reach (an assumption). With .5
# the queue's sweep gains 1.2 to 1.25 from warp specialisation, as attention does: 1.18 to 1.28 by
# github.com/facebookexperimental/triton/pull/206.
OVERLAP = 0.5

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
    shared: float = 0.0

    @property
    def limit(self) -> str:
        """Returns the resource with the longest time."""
        return max(
            ("matrix", "issue", "special", "float32", "l2", "shared", "memory"),
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
    values = [getattr(x, "base", x) for x in given.values()]  # of tensors, also of described ones
    tensors = {id(x): x.numel() * x.element_size() for x in values if isinstance(x, Tensor)}
    total = sum(tensors.values())
    if kernel == "_enqueue_kernel":
        queue, keys = given["queue"], given["keys"]
        total -= (len(queue) - min(len(keys), len(queue))) * queue.shape[1] * queue.element_size()
    elif kernel == "_project_rows_kernel":
        total += tensors[id(given["grad"])]
    return total


def _is_product(launch: Launch) -> bool:
    """Returns whether the launch is a sweep of products."""
    return "K" in launch.arguments and {"PRECISION", "STAGES"} & launch.constants.keys() != set()


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
    alone = _alone(launch, report, resources)

    def wave(side_by_side: int) -> float:
        perfect = max(side_by_side * clocks for clocks in resources)
        none = max(perfect, side_by_side * alone)
        return (rounds + EXTRA_ROUNDS) * max(alone, none - OVERLAP * (none - perfect))

    full, rest = divmod(programs, gpu.processors * resident)
    clocks = full * wave(resident) + (wave(-(-rest // gpu.processors)) if rest else 0.0)
    # Times of every resource alone, and of the arithmetic at full rate.
    clock_times = [programs * rounds * each / gpu.processors / gpu.clock for each in resources]
    time = max(memory, clocks / gpu.clock)
    arithmetic = arithmetic_time(launch, gpu)
    return Prediction(programs, resident, moved, counted, time, memory, arithmetic, *clock_times)


def arithmetic_time(launch: Launch, gpu: GPU) -> float:
    """Returns the seconds of a launch's products at the full rate of the unit, 0 without any."""
    if not _is_product(launch):
        return 0.0
    rate = gpu.matrix_rate
    if launch.constants.get("PRECISION") == "tf32":
        rate /= 2
    elif str(launch.constants.get("DOT")) == "fp32":
        rate = 2 * gpu.lanes * gpu.processors * gpu.clock
    return operations(launch) / rate


def _alone(launch: Launch, report: Report, resources: list[float]) -> float:
    """Returns the clocks of a round of a program that has a multiprocessor for itself."""
    matrix, *vector = resources[:4]
    uncovered = 1 - report.loop_covered / max(1, report.loop_special)
    if report.tcgen and "STAGES" in launch.constants:  # a warp of its own issues the products
        uncovered = 0.0
    serial = max(*resources, matrix + uncovered * max(vector))
    # How many rounds ahead a copy is issued. Triton's loop frees a stage a round late.
    stages = launch.constants.get("STAGES") or (launch.options["num_stages"] or 1) - 1
    return serial + max(0.0, LATENCY - max(0, stages - 1) * serial)


def _round(launch: Launch, report: Report, gpu: GPU) -> tuple[int, list[float]]:
    """Returns the rounds of a program's main loop, and the clocks of every resource in a round.

    Order of resources: matrix, issue, special, float32, l2, shared.
    """
    constants, given = launch.constants, launch.arguments
    warps = report.warps
    if "STAGES" in constants:  # four warps copy. A round is a tile of both warpgroups
        warps -= 4
    threads = 32 * warps
    # Rows that stay, rows that stream, and the streamed tensor.
    if "STAY" in constants:
        stay, stream = constants["STAY"], constants["STREAM"]
        streamed = given["operand"] if "operand" in given else given["query"]
        rounds = -(-given["N"] // stream)
    else:
        stay, stream = constants["BLOCK_N"], constants["BLOCK_K"]
        streamed = given["negatives"]
        of_sigmoid = given.get("rows_per_split", 0) // stream
        rounds = of_sigmoid or given["tiles_per_split"]
    # Matrix units.
    block_c = constants.get("BLOCK_C", constants["C"])
    chunks = -(-constants["C"] // block_c)
    width = chunks * block_c  # columns with padding
    out = constants.get("OUT_C", constants["C"]) if constants.get("GRAD", True) else 0
    columns = width + out
    clocks = 2 * stay * stream * columns / gpu.matrix
    if constants.get("PRECISION") == "tf32":
        clocks *= 2
    elif str(constants.get("DOT")) == "fp32":
        clocks = 0.0
    # L2 cache. Rows in chunks are read again for the second product, and so are rows that stay.
    size = getattr(streamed, "base", streamed).element_size()
    read = stream * size * (columns if chunks > 1 else block_c)
    if chunks > 1:
        read += stay * size * width
    # Shared memory. Tensor memory's products (sm_100) read the tile once for 128 rows, and what the
    # listing shows counts for all other kinds. Copies past the registers are no instructions of
    # the specialised sweep.
    moved = report.loop_shared * warps
    if report.tcgen:
        moved += -(-stay // 128) * stream * size * columns
    if "STAGES" in constants:
        moved += read
    return rounds, [
        clocks,
        report.loop * warps / 4,
        report.loop_special * threads / gpu.special,
        report.loop_float * threads / gpu.lanes,
        read / (gpu.l2 / gpu.processors) * gpu.clock,
        moved / gpu.shared_rate,
    ]
