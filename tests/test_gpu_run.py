"""The script for the first minutes with a new GPU, at tiny sizes on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import runs

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_run.sh"


def _dry(out: Path, part: str, **variables: str) -> list[str]:
    environment = {**runs.environment(), "DRY": "1", "OUT": str(out), "PYTHON": sys.executable}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"], **variables}
    environment.pop("TRITON_INTERPRET", None)  # autotune compiles
    result = subprocess.run(
        ["bash", str(SCRIPT), part], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


def test_parts_that_no_time_is_left_for_are_named_in_the_last_line(tmp_path: Path) -> None:
    *_, missing, end = _dry(tmp_path, "quick", CLOCK="6")
    assert end == "== quick ended with 1"
    assert missing.startswith("missing:")
    for name in ("kernels bf16", "norm", "step ResNet-50", "gpu tests"):
        assert f" {name} (no time left);" in missing
    assert (tmp_path / "environment.log").exists()
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("part", "rows"), [("quick", 8), ("second", 1)])
def test_every_command_runs_at_tiny_sizes(part: str, rows: int, tmp_path: Path) -> None:
    lines = _dry(tmp_path, part)
    assert lines[-2].startswith("missing: nothing"), lines[-2]
    saved = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(saved) == rows
    assert all("benchmark" in json.loads(line) for line in saved)
    for table in ("tiles.json", "specialised.json"):
        assert (tmp_path / table).exists() == (part == "second")
