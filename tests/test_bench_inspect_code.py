"""Kernels compiled without a GPU: no spills, room in shared memory, matrix instructions.

The compiler runs in a new process, without Triton's interpreter. A GPU may be present.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests import runs

pytest.importorskip("triton")

# {compute capability x 10: bytes of shared memory that a program may use} (CUDA C++ programming
# guide, table of technical specifications).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# With the pinned Triton no register may spill. Triton 3.9 spills 27 in one sweep, which is slower
# but correct.
SPILLS = 0 if importlib.metadata.version("triton").startswith("3.6.") else 32
PRODUCTS = (
    "_sweep_kernel",
    "_specialised_sweep_kernel",
    "_grad_negatives_kernel",
    "_sigmoid_sweep_kernel",
    "_sigmoid_grad_kernel",
)


def _reports(*options: str) -> list[dict[str, Any]]:
    result = runs.compiled("mocofast_bench.inspect_code", "--json", *options)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def _assert_sound(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["spills"] <= SPILLS, report
        assert report["shared"] <= SHARED[report["capability"]], report
        if report["kernel"] not in PRODUCTS:
            continue
        instruction = {80: "mma", 90: "hgmma", 100: "tcgen"}[report["capability"]]
        # No matrix unit multiplies float32: exact float32 runs on fused multiply-adds.
        exact_float32 = report["case"].split(", ")[2] == "fp32"
        assert (report[instruction] == 0) == exact_float32, report


# The kinds of launches, compiled for Hopper in one process: a process takes seconds to start.
KINDS = (
    r"^forward, C=128, (fp16|fp32 as tf32|fp32), in-batch$",
    r"^(backward|forward), C=200, bf16(, in-batch)?$",
    r"^enqueue, C=128",
    r"^ema, torch.bfloat16",
    r"^forward with (mean|ids), C=128, bf16, queue$",
    # Rates and momenta of a CUDA graph lie on the device, in float64.
    r"^(sgd_|lars_|adamw_), torch.float32, ResNet-50, Tensor lr, with EMA",
    r"^adamw_, torch.bfloat16, ResNet-50, Tensor lr, without EMA",
)
STEPS = r"^(sgd_|lars_|adamw_|ema), torch.float32, .*float (lr, with E|m)"
QUEUES = r"^forward( specialised by 128)?, C=128, bf16, queue(, no ranks)?$"
AUGMENT = r"^augment, 32 px$"
Hopper = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def hopper() -> Hopper:
    """Returns the reports of the cases whose names match a pattern, compiled for Hopper."""
    found = _reports("--capability", "90", "--only", "|".join((*KINDS, STEPS, QUEUES, AUGMENT)))
    _assert_sound(found)
    return lambda pattern: [report for report in found if re.search(pattern, report["case"])]


def test_moco_s_own_configurations_do_not_spill_and_use_the_matrix_unit() -> None:
    reports = _reports(
        "--only",
        r"^forward(, C=128, (bf16|fp32 as bf16)| specialised for sm_100, C=128, bf16), queue$",
    )
    _assert_sound(reports)
    # Two types of queue on three architectures. Equal code is reported once.
    assert len([r for r in reports if r["kernel"] == "_sweep_kernel"]) == 6
    hopper = next(
        r for r in reports if r["capability"] == 90 and r["case"].split(", ")[2] == "bf16"
    )
    # Two programs share a multiprocessor: 65536 registers and 228 KB for both.
    assert hopper["registers"] * 128 * 2 <= 65536
    assert hopper["shared"] * 2 <= 227 * 1024
    blackwell = next(r for r in reports if r["kernel"] == "_specialised_sweep_kernel")
    assert (blackwell["tensor_memory"], blackwell["warps"]) == (512, 8)


def test_a_step_of_info_nce_has_two_launches() -> None:
    """The mean, its gradient, and the cast to bfloat16 are parts of the second launch.

    In float32 without tf32 a row is too long for a tile, and a launch more prepares the queries.
    """
    result = runs.compiled("tests.count_launches")
    assert result.returncode == 0, result.stderr
    ours = ["_sweep_kernel", "_combine_kernel"]
    assert json.loads(result.stdout) == {
        f"torch.{dtype}, {way}": [*prepared, *ours, *others]
        for dtype, prepared in (("float32", ["_prepare_rows_kernel"]), ("bfloat16", []))
        for way, others in (
            ("backward()", []),
            ("a part of a sum", ["add"]),
            ("another gradient", ["mul", "ones_like", "mul", "mul"]),
        )
    }


def test_every_kind_of_launch_compiles_for_hopper(hopper: Hopper) -> None:
    assert {report["kernel"] for report in hopper("|".join(KINDS))} == {
        "_sweep_kernel",
        "_combine_kernel",
        "_prepare_rows_kernel",
        "_project_rows_kernel",
        "_grad_negatives_kernel",
        "_enqueue_kernel",
        "_ema_kernel",
        "_sgd_kernel",
        "_adamw_kernel",
    }


def test_optimiser_steps_use_wide_loads_where_they_fit(hopper: Hopper) -> None:
    """Narrow loads took 2.3 times the code and 2.5 times the registers of wide loads."""
    found: dict[str, list[int]] = {}
    for report in hopper(STEPS):
        found.setdefault(report["case"].split(",")[0] + report["kernel"], []).append(
            report["instructions"]
        )
    for name in ("sgd__sgd_kernel", "adamw__adamw_kernel", "ema_ema_kernel"):
        wide, narrow = found[name]
        assert 1.8 * wide < narrow, (name, wide, narrow)
    lars = {"lars__squares_kernel", "lars__trust_kernel", "lars__sgd_kernel"}
    assert {*lars, "adamw__count_kernel"} <= found.keys()


def test_the_augmentation_of_cifar_fits_the_registers_of_several_programs(hopper: Hopper) -> None:
    [report] = hopper(AUGMENT)
    assert report["mma"] > 0  # matrix products of the blur
    assert report["registers"] * 128 * 3 <= 65536  # three programs of 4 warps on a multiprocessor


def test_every_launch_says_whether_products_and_sums_are_fused() -> None:
    """Triton's default is fusion up to 3.9, and no fusion from 3.10 on."""
    result = runs.compiled("tests.launch_options")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) >= 18, found
    # Augmentation on a GPU rounds like augmentation on a CPU.
    assert found == {name: [name != "_augment_kernel"] for name in found}


def test_the_specialised_sweep_hides_its_exponentials_under_products(hopper: Hopper) -> None:
    found = {r["case"]: r for r in hopper(QUEUES) if "sweep" in r["kernel"]}
    assert len(found) == 4
    plain, specialised = (
        found[f"forward{kind}, C=128, bf16, queue"] for kind in ("", " specialised by 128")
    )
    assert (plain["loop_covered"], plain["loop_special"]) == (0, 64)
    assert (specialised["loop_covered"], specialised["loop_special"]) == (64, 64)
    assert specialised["registers"] * 32 * specialised["warps"] <= 65536


@pytest.mark.slow
@pytest.mark.parametrize("capability", list(SHARED))
def test_every_shipped_configuration_does_not_spill(capability: int) -> None:
    reports = _reports("--capability", str(capability))
    _assert_sound(reports)
    assert len(reports) > 300
