"""Times InfoNCE, forward and backward, beside eager PyTorch, torch.compile and packages.

The gradient goes to the query alone. The negatives are normalised already. The eager formula
of MoCo's paper writes the N x (1 + K) logits to memory. Our kernel streams the negatives once.
The packages are cut-cross-entropy, Liger-Kernel and lightly.

The floor is 4 N K C operations at the matrix rate measured in the same run. Every call takes
the next set of inputs, and all sets together exceed the last-level cache. On a GPU, sides
that never wait for the device are also timed as CUDA graphs, without the cost of launches.

On a CPU, `--busy N` runs N busy processes beside all sides, as other users of a machine do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mocofast_kernels import cpu_products
from torch import Tensor

from mocofast.device import choose_device
from mocofast_bench import timing
from mocofast_bench.optim import capture_graph
from mocofast_bench.peers import (
    BASELINE,
    OURS,
    OURS_IN_FLOAT32,
    Peer,
    Sizes,
    all_peers,
    call_over,
    input_sets,
    prepare_calls,
    sets_past_the_cache,
)
from mocofast_bench.timing import Call

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRAPH = ", graph"


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the sizes and the dtype of the problem."""
    parser.add_argument("--n", type=positive, default=256, help="queries (default: %(default)s)")
    parser.add_argument(
        "--k", type=positive, default=65536, help="negatives (default: %(default)s)"
    )
    parser.add_argument(
        "--c", type=positive, default=128, help="feature dimension (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="dtype of all inputs (default: %(default)s)",
    )
    parser.add_argument(
        "--busy",
        type=_natural,
        metavar="N",
        default=0,
        help="processes that keep cores busy beside the measurement (default: %(default)s)",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out sides that need torch.compile"
    )


def _natural(text: str) -> int:
    """Parses an integer >= 0 (an argparse type). Raises ArgumentTypeError for a smaller integer."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0: got {value}")
    return value


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the table and returns the row."""
    device, dtype = choose_device(arguments.device), DTYPES[arguments.dtype]
    sizes = (arguments.n, arguments.k, arguments.c)
    peers = all_peers(dtype, compiling=not arguments.no_compile)
    with timing.busy_neighbours(arguments.busy):
        row = measure_problem(peers, sizes, dtype, device, arguments.repeats)
    row["busy"] = arguments.busy
    arguments.keep(row)
    for name in row["milliseconds"]:
        if not name.endswith(GRAPH):
            (row["extra_bytes"][name],) = memory_of_all(name, [sizes], dtype, device)
    print_table(row)
    return row


def measure_problem(
    peers: dict[str, Peer], sizes: Sizes, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Times every peer on a problem.

    peers: {name: peer}.
    sizes: N, K, C.
    repeats: timed rounds.

    Returns the row with times, and reasons for peers left out. "extra_bytes" stays empty.
    """
    # Candidates: every peer, directly and as a CUDA graph where possible.
    sets = sets_past_the_cache(sizes, dtype, device)
    steps, skipped = prepare_calls(peers, sizes, dtype, device, sets)
    candidates: dict[str, Callable[[], Any]] = dict(steps)
    if device.type == "cuda":
        for name in [name for name in steps if not peers[name].waits]:
            try:
                candidates[name + GRAPH] = capture_graph(cycle(steps[name], sets))
            except RuntimeError as error:  # compiled code cannot always be captured
                skipped[name + GRAPH] = str(error).splitlines()[0]
    # Matrix products give the machine's rate, and with it the floor.
    side = 8192 if device.type == "cuda" else 2048
    products = {"matrix product": matrix_product(side, dtype, device)}
    if device.type == "cpu" and dtype == torch.float32:
        products["oneDNN's"] = onednn_product(side)
    # Time all candidates in turns. A graph holds one call for every set of inputs.
    times = timing.interleaved({**candidates, **products}, repeats, device)
    rate = 2 * side**3 / min(times.pop(name).median for name in products)
    for name in times:
        if name.endswith(GRAPH):
            times[name] = timing.Timing(*(value / sets for value in times[name]))

    # Compare with the floor, the eager formula and the best other peer.
    floor = 4 * sizes[0] * sizes[1] * sizes[2] / rate
    ours = min(times[name].median for name in times if name.removesuffix(GRAPH) == "mocofast")
    others = {
        name: time.median
        for name, time in times.items()
        if name.removesuffix(GRAPH) not in (*OURS, OURS_IN_FLOAT32)
    }
    best = min(others, key=lambda name: others[name])
    return {
        "benchmark": "info_nce",
        **timing.environment(device),
        "n": sizes[0],
        "k": sizes[1],
        "c": sizes[2],
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "input_sets": sets,
        **timing.entries(times),
        "extra_bytes": {},
        "skipped": skipped,
        "matrix_gflops": round(rate / 1e9, 1),
        "floor_milliseconds": round(1e3 * floor, 4),
        "speedup": round(others["eager"] / ours, 3),
        "best_peer": best,
        "speedup_over_best_peer": round(others[best] / ours, 3),
        "fraction_of_floor": round(floor / ours, 3),
    }


def print_table(row: dict[str, Any]) -> None:
    """Prints the row as a table."""
    memory, floor = row["extra_bytes"], row["floor_milliseconds"]
    eager = row["milliseconds"]["eager"]
    print(f"InfoNCE forward and backward, N {row['n']}, K {row['k']}, C {row['c']}, {row['dtype']}")
    print(f"{row['device']}; matrix rate {row['matrix_gflops']:.0f} GFLOP/s; floor {floor:.3f} ms")
    if row["busy"]:
        print(f"beside {row['busy']} busy processes, on {row['threads']} threads")
    print(
        f"{'':28}{'ms':>10}{'quartiles':>20}{'x eager':>9}{'of floor':>10}"
        f"{'extra MB':>10}{'of eager':>10}"
    )
    for name, time in row["milliseconds"].items():
        low, high = row["quartiles"][name]
        quartiles = f"{low:.3f} - {high:.3f}"
        line = f"{name:28}{time:10.3f}{quartiles:>20}{eager / time:9.2f}{floor / time:10.0%}"
        if (extra := memory.get(name)) is not None:
            line += f"{extra / 1e6:10.1f}{extra / (memory['eager'] or 1):10.1%}"
        print(line)
    for name, reason in row["skipped"].items():
        print(f"{name} is left out: {reason}")


def steps(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """Returns {name: forward and backward pass} of our two peers and the eager formula."""
    return prepare_calls({**OURS, **BASELINE}, sizes, dtype, device, 1)[0]


def cycle(step: Call, sets: int) -> Call:
    """Returns a call with a step for every set of inputs."""

    def steps() -> None:
        for _ in range(sets):
            step()

    return steps


def matrix_product(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Returns a product of two (side, side) matrices, to measure the machine's matrix rate.

    Data is random: zeros use less power and run faster on GPUs.
    """
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def onednn_product(side: int) -> Callable[[], Tensor]:
    """Returns the same product in float32 by oneDNN, which beats `torch.mm` on some CPUs."""
    a, b = (torch.randn(side, side) for _ in range(2))
    return lambda: cpu_products.product(a, b)


def memory_of_all(
    name: str, cases: Sequence[Sizes], dtype: torch.dtype, device: torch.device
) -> list[int | None]:
    """Returns the peak extra bytes of a peer for every problem, small problems first.

    On CUDA the allocator counts. On a CPU the peer runs in a new process, where earlier
    calls have left no memory behind.
    """
    if device.type == "cuda":
        return [memory_of(name, sizes, dtype, str(device)) for sizes in cases]
    result: list[int | None] = timing.in_fresh_process(
        _memory_of_each, name, cases, dtype, str(device)
    )
    return result


def _memory_of_each(
    name: str, cases: Sequence[Sizes], dtype: torch.dtype, device: str
) -> list[int | None]:
    return [memory_of(name, sizes, dtype, device) for sizes in cases]


def memory_of(name: str, sizes: Sizes, dtype: torch.dtype, device: str) -> int | None:
    """Returns the peak extra bytes of a forward and backward pass by the peer `name`."""
    peer, where = all_peers(dtype)[name], torch.device(device)

    def step(sizes: Sizes) -> Call:
        own = peer.dtype or dtype
        return call_over(peer.build(sizes, own), input_sets(sizes, own, where, 1))

    torch.compiler.reset()  # earlier sizes count against the limit of recompilations
    full = step(sizes)
    # First a smaller problem: loading code takes memory too. A very small problem would not load
    # oneDNN, nor the sweep over blocks. torch.compile loads code for every size.
    first = full if peer.compiles else step((min(sizes[0], 64), min(sizes[1], 32_768), sizes[2]))
    first()
    return timing.peak_extra_memory(full, where)
