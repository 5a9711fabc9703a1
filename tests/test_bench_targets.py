"""Kernels compiled for GPUs of other kinds than the tiles were chosen on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import runs

pytest.importorskip("triton")


def _rows(*options: str) -> list[list[str]]:
    result = runs.compiled("mocofast", "bench", "targets", *options)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("target", ["sm_86", "sm_103", "sm_120", "gfx942"])
def test_moco_s_queue_fits_without_spills(target: str) -> None:
    rows = _rows("--target", target, "--only", "^forward, C=128, bf16, queue$")
    assert [row[2] for row in rows] == ["sweep_kernel", "combine_kernel"]
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
