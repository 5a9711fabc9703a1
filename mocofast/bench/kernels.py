"""InfoNCE, forward and backward (gradient to the query, negatives normalised already), beside the eager formula.

The eager side writes the N x (1 + K) logits, as MoCo's paper does; ours streams the negatives once. The floor is
4 N K C operations at the matrix rate measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from mocofast_kernels import reference
from torch import Tensor
from torch.nn import functional as F

from mocofast import ops
from mocofast.bench import timing

TEMPERATURE = 0.2  # MoCo v2's
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Sizes and type of the problem."""
    parser.add_argument("--n", type=positive, default=256, help="queries (default: %(default)s)")
    parser.add_argument("--k", type=positive, default=65536, help="negatives (default: %(default)s)")
    parser.add_argument("--c", type=positive, default=128, help="feature dimension (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all inputs (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of the eager formula")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return the row."""
    device, dtype = timing.resolved(arguments.device), DTYPES[arguments.dtype]
    sizes = (arguments.n, arguments.k, arguments.c)
    memory = measured_memory(sizes, dtype, device)
    candidates: dict[str, Callable[[], Any]] = {**steps(sizes, dtype, device)}
    if not arguments.no_compile:
        compiled = compiled_step(sizes, dtype, device)
        if compiled is not None:
            candidates["torch.compile"] = compiled
    side = 8192 if device.type == "cuda" else 2048
    candidates["matrix product"] = matrix_product(side, dtype, device)
    times = timing.interleaved(candidates, arguments.repeats, device)

    rate = 2 * side**3 / times.pop("matrix product").median
    floor = 4 * arguments.n * arguments.k * arguments.c / rate
    eager = times["eager"].median
    print(f"InfoNCE forward and backward, N {sizes[0]}, K {sizes[1]}, C {sizes[2]}, {arguments.dtype}")
    print(f"{timing.device_name(device)}; matrix rate {rate / 1e9:.0f} GFLOP/s; floor {1e3 * floor:.3f} ms")
    print(f"{'':16}{'ms':>10}{'quartiles':>20}{'x eager':>9}{'of floor':>10}{'extra MB':>10}{'of eager':>10}")
    for name, time in times.items():
        quartiles = f"{1e3 * time.low:.3f} - {1e3 * time.high:.3f}"
        line = (
            f"{name:16}{1e3 * time.median:10.3f}{quartiles:>20}{eager / time.median:9.2f}{floor / time.median:10.0%}"
        )
        if (extra := memory.get(name)) is not None:
            line += f"{extra / 1e6:10.1f}{extra / (memory['eager'] or 1):10.1%}"
        print(line)
    return {
        "benchmark": "info_nce",
        **timing.environment(device),
        "n": sizes[0],
        "k": sizes[1],
        "c": sizes[2],
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "milliseconds": {name: round(1e3 * time.median, 4) for name, time in times.items()},
        "quartiles": {name: [round(1e3 * t, 4) for t in time[1:]] for name, time in times.items()},
        "extra_bytes": memory,
        "matrix_gflops": round(rate / 1e9, 1),
        "floor_milliseconds": round(1e3 * floor, 4),
        "speedup": round(eager / times["mocofast"].median, 3),
        "fraction_of_floor": round(floor / times["mocofast"].median, 3),
    }


def inputs(sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Query that requires its gradient (N, C), positive key (N, C), unit negatives (K, C)."""
    n, k, c = sizes
    generator = torch.Generator().manual_seed(0)
    query, positive, negatives = (torch.randn(rows, c, generator=generator) for rows in (n, n, k))
    negatives = F.normalize(negatives)
    query, positive, negatives = (x.to(device, dtype) for x in (query, positive, negatives))
    return query.requires_grad_(), positive, negatives


def steps(sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], None]]:
    """One forward and backward of each side, by name."""
    query, positive, negatives = inputs(sizes, dtype, device)

    def ours() -> None:
        query.grad = None
        loss = ops.info_nce(query, positive, negatives, temperature=TEMPERATURE, negatives_normalized=True)
        loss.backward()

    def ours_with_rank() -> None:
        query.grad = None
        loss, _ = ops.info_nce(
            query, positive, negatives, temperature=TEMPERATURE, negatives_normalized=True, return_rank=True
        )
        loss.backward()

    def eager() -> None:
        query.grad = None
        reference.info_nce(query, positive, negatives, TEMPERATURE).backward()

    return {"mocofast": ours, "with rank": ours_with_rank, "eager": eager}


def compiled_step(sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Callable[[], None] | None:
    """torch.compile of the eager formula; None, with the reason printed, where this machine cannot compile."""
    query, positive, negatives = inputs(sizes, dtype, device)
    formula = torch.compile(reference.info_nce)

    def step() -> None:
        query.grad = None
        formula(query, positive, negatives, TEMPERATURE).backward()

    try:
        step()
    except Exception as error:  # whatever its tool chain raises, the other sides are still worth a table
        print(f"torch.compile is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    return step


def matrix_product(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """A square product, the machine's own matrix rate. Random data: zeros draw less power and run faster on GPUs."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def measured_memory(sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, int | None]:
    """Peak extra bytes of each side, each in a process of its own."""
    return {
        name: timing.in_fresh_process(memory_of, name, sizes, dtype, str(device))
        for name in ("mocofast", "with rank", "eager")
    }


def memory_of(name: str, sizes: tuple[int, int, int], dtype: torch.dtype, device: str) -> int | None:
    """Peak extra bytes of one forward and backward; the same on a small problem first, to load code."""
    small = (min(sizes[0], 64), min(sizes[1], 256), sizes[2])
    where = torch.device(device)
    steps(small, dtype, where)[name]()
    return timing.peak_extra_memory(steps(sizes, dtype, where)[name], where)
