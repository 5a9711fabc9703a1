"""The script for the first minutes with a new GPU, at tiny sizes on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mocofast_bench import autotune, eager_formulas, ema, kernels, loops, optim, timing
from mocofast_bench.commands import main
from PIL import Image

from tests import runs

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_run.sh"
# Stands for Python: writes the arguments of a command to a file, with ASCII's separators.
RECORDER = """#!/bin/sh
{ printf '%s\\037' "$@"; printf '\\036'; } >>"$OUT/commands"
"""
# Stands for Python: tests run until Ctrl-C, other commands end at once.
SLOW_TESTS = f"""#!{sys.executable}
import sys, time
try:
    time.sleep(30 * ("pytest" in sys.argv))
except KeyboardInterrupt:
    print("1 failed")
    sys.exit(2)
"""
PARTS = [("quick", 11), ("second", 1), ("cifar", 0)]  # and their rows of benchmarks


def _python(folder: Path, script: str) -> str:
    """Writes a script that stands for Python, and returns its path."""
    path = folder / "python"
    path.write_text(script)
    path.chmod(0o755)
    return str(path)


def _dry(out: Path, part: str, python: str = sys.executable, **variables: str) -> list[str]:
    environment = {**runs.environment(), "DRY": "1", "OUT": str(out), "PYTHON": python}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"], **variables}
    environment.pop("TRITON_INTERPRET", None)  # autotune compiles
    result = subprocess.run(
        ["bash", str(SCRIPT), part], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


def test_parts_that_no_time_is_left_for_are_named_in_the_last_line(tmp_path: Path) -> None:
    """Tests that are stopped say what failed until then."""
    *_, missing, end = _dry(tmp_path, "quick", _python(tmp_path, SLOW_TESTS), CLOCK="6")
    assert end == "== quick ended with 1"
    assert missing.startswith("missing: kernel tests (status 124);")
    for name in ("kernels bf16", "norm", "step ResNet-50", "gpu tests"):
        assert f" {name} (no time left);" in missing
    assert (tmp_path / "environment.log").exists()
    assert (tmp_path / "kernel_tests.log").read_text() == "1 failed\n"
    assert not (tmp_path / "kernels_bf16.log").exists()


def test_pictures_stand_for_an_archive_that_is_not_there(tmp_path: Path) -> None:
    python = _python(tmp_path, RECORDER)
    absent = {"DRY": "", "MOCOFAST_DATA": str(tmp_path), "TMPDIR": str(tmp_path)}
    assert _dry(tmp_path, "second", python, **absent)[-2].startswith("missing: nothing")
    arguments = (tmp_path / "commands").read_text().split("\037")
    assert arguments[arguments.index("data") + 1] == str(tmp_path / "images")
    # The accuracy on noise would say nothing.
    *_, missing, end = _dry(tmp_path, "cifar", python, **absent)
    assert missing == "MOCOFAST_DATA must name a folder with cifar10-jpeg.tar.xz"
    assert end == "== cifar ended with 1"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes commands of this process small: few weights, no new processes, no slow imports."""
    for module in (ema, optim):
        monkeypatch.setattr(module, "weight_shapes", lambda: [(8, 3, 3, 3), (8,), (16, 8)])
    monkeypatch.setattr(timing, "PASSED", 2**16)
    monkeypatch.setattr(timing, "in_fresh_process", lambda function, *a: function(*a))
    product = kernels.matrix_product
    monkeypatch.setattr(kernels, "matrix_product", lambda side, *a: product(64, *a))
    for name in ("lightly", "lightly.loss", "timm.utils", "timm.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    # Compiling has tests of its own.
    monkeypatch.setattr(autotune, "run", lambda given, parser: given.out.write_text("{}"))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("part", "rows"), PARTS)
def test_every_command_of_a_dry_run_works(part: str, rows: int, tmp_path: Path) -> None:
    lines = _dry(tmp_path, part, _python(tmp_path, RECORDER))
    assert lines[-2].startswith("missing: nothing"), lines[-2]
    commands = [
        command.split("\037")[:-1]
        for command in (tmp_path / "commands").read_text().split("\036")[:-1]
    ]
    tests = 0
    for module, *arguments in [command[1:] for command in commands if command[0] == "-m"]:
        if module == "pytest":
            # The files exist, and options select tests in them.
            tests += 1
            assert pytest.main([*arguments, "--collect-only"]) == 0
        elif arguments[0] == "bench":
            _make_images(tmp_path)
            assert main(arguments[1:]) == 0
        elif arguments[0] == "pretrain":
            _make_images(tmp_path)
            runs.mocofast(*arguments)
    assert tests == {"quick": 2, "second": 1, "cifar": 0}[part]
    _assert_saved(tmp_path, part, rows)


def _make_images(out: Path) -> None:
    """Makes the images that Python, which the recorder stands for, would have made."""
    (out / "images").mkdir(exist_ok=True)
    for i in range(32):
        Image.linear_gradient("L").rotate(10 * i).convert("RGB").save(out / f"images/{i}.jpg")


def _assert_saved(out: Path, part: str, rows: int) -> None:
    if part == "cifar":
        assert (out / "cifar10_short" / "checkpoints" / "last.pt").exists()
        return
    saved = (out / "rows.jsonl").read_text().splitlines()
    assert len(saved) == rows
    assert all("benchmark" in json.loads(line) for line in saved)
    for table in ("tiles.json", "specialised.json"):
        assert (out / table).exists() == (part == "second")


@pytest.mark.slow
@pytest.mark.parametrize(("part", "rows"), PARTS)
def test_every_command_runs_at_tiny_sizes(part: str, rows: int, tmp_path: Path) -> None:
    lines = _dry(tmp_path, part)
    assert lines[-2].startswith("missing: nothing"), lines[-2]
    _assert_saved(tmp_path, part, rows)


def test_a_benchmark_that_is_stopped_saves_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Any
) -> None:
    measure = optim._measure

    def stopped(name: str, *arguments: Any) -> Any:
        if name == "lars":
            raise KeyboardInterrupt
        return measure(name, *arguments)

    monkeypatch.setattr(optim, "_measure", stopped)
    rows = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        main(["optim", "--repeats", "1", "--device", "cpu", "--save", str(rows)])
    row = json.loads(rows.read_text())
    assert row["unfinished"] and "sgd" in row and "lars" not in row

    # A measurement that is stopped leaves the times of the sides that ran.
    def waits(*_: Any) -> None:
        raise KeyboardInterrupt

    rows.unlink()
    monkeypatch.setattr(eager_formulas, "ema_update_", waits)
    with pytest.raises(KeyboardInterrupt):
        main(["ema", "--repeats", "1", "--device", "cpu", "--save", str(rows)])
    row = json.loads(rows.read_text())
    assert row["benchmark"] == "ema" and row["unfinished"] and row["device"]
    assert list(row["so_far"]["milliseconds"]) == ["mocofast"]
    assert row["so_far"]["milliseconds"]["mocofast"] > 0


def test_loops_that_are_stopped_leave_their_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([loops.LoopRates(rate, 0, 0, 0) for rate in (10.0, 20.0, 30.0)])
    monkeypatch.setattr(loops, "measure_loop", lambda *_: next(rates))
    monkeypatch.setattr(timing, "SO_FAR", {})
    with pytest.raises(StopIteration):
        loops.measure_in_turns(dict.fromkeys("ab"), 2, 1, 1, torch.device("cpu"))
    assert timing.SO_FAR == {"images_per_second": {"a": 20.0, "b": 20.0}}
