"""Kernels compiled for GPUs of other kinds than the tiles were chosen on."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from mocofast_bench.machine_code import HEADLINES
from mocofast_bench.targets import TARGETS

from tests import runs

pytest.importorskip("triton")


def _rows(*options: str) -> list[list[str]]:
    result = runs.compiled("mocofast", "bench", "targets", *options)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _committed(name: str) -> list[list[str]]:
    lines = (runs.ROOT / "benchmarks" / "results" / name).read_text("utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and "Triton" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


@pytest.mark.parametrize("name", ["targets.md", "targets_newest.md"])
def test_the_committed_tables_have_every_call_and_gpu_without_spills(name: str) -> None:
    rows = _committed(name)
    assert {row[0] for row in rows} == HEADLINES.keys()
    gpus = {(row[0], row[1].split()[0]) for row in rows}
    for call, case in HEADLINES.items():
        half = "bf16" in case and case.startswith(("forward", "backward", "sigmoid"))
        for target in TARGETS:
            # GPUs before Ampere multiply no 16-bit types, AMD's no tf32. One sweep is Hopper's, one
            # needs tensor memory.
            absent = target == "sm_75" and (half or "tf32" in case)
            absent |= "specialised by" in case and target != "sm_90"
            absent |= "specialised for sm_100" in case and target not in ("sm_100", "sm_103")
            absent |= "tf32" in case and target.startswith("gfx")
            assert ((call, target) in gpus) != absent, (call, target)
    for row in rows:
        assert int(row[5]) <= int(row[6]), row
        assert row[4] == "0", row


@pytest.mark.parametrize("target", ["sm_86", "sm_103", "sm_120", "gfx942"])
def test_moco_s_queue_fits_without_spills(target: str) -> None:
    rows = _rows("--target", target, "--only", "^forward, C=128, bf16, queue$")
    assert [row[2] for row in rows] == ["sweep_kernel", "combine_kernel"]
    version = importlib.metadata.version("triton")
    if f"Triton {version}" in (runs.ROOT / "benchmarks/results/targets.md").read_text("utf-8"):
        table = _committed("targets.md")
        assert all(row in table for row in rows), "write targets.md again, as its first lines say"
    for *_, spills, shared, limit in rows:
        assert spills == "0" and int(shared) <= int(limit)
    if target in ("sm_86", "sm_120"):  # two programs share the 100 KB of a multiprocessor
        assert int(rows[0][5]) + 1 <= 50


def test_rows_of_8192_columns_fit_without_spills() -> None:
    only = "^(forward, C=8192, (bf16|fp32), in-batch|backward, C=8192, bf16)$"
    rows = _rows("--target", "sm_90", "--only", only)
    assert {row[2] for row in rows} == {
        "sweep_kernel",
        "combine_kernel",
        "prepare_rows_kernel",
        "project_rows_kernel",
        "grad_negatives_kernel",
    }
    assert all(row[4] == "0" and int(row[5]) <= int(row[6]) for row in rows), rows


def test_turing_compiles_float32_products_and_no_half_products(tmp_path: Path) -> None:
    summary = tmp_path / "targets.md"
    only = "^forward, C=128, (bf16|fp32), queue, loss only$"
    rows = _rows("--target", "sm_75", "--only", only, "--summary", str(summary))
    assert {row[0] for row in rows} == {"forward, C=128, fp32, queue, loss only"}
    assert all(row[4] == "0" for row in rows)
    assert "| sm_75 (T4) |" in summary.read_text()
