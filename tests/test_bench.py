"""`mocofast bench`: reported rows, the clock, the memory gauge, and the claims about InfoNCE."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from mocofast_bench import autotune, commands, data, kernels, optim, targets, timing
from mocofast_bench.commands import main
from mocofast_bench.sizes import weight_shapes
from torch import nn

from tests import runs

CPU = torch.device("cpu")
IMPORT_PATHS = [runs.ROOT, runs.ROOT / "kernels", runs.ROOT / "benchmarks"]
CLAIM = (256, 65536, 128)  # N, K, C of the claims on the CPU


def test_processes_load_no_benchmark_no_torchvision_and_no_triton() -> None:
    code = "import sys, mocofast_bench.processes; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, IMPORT_PATHS))}
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    names = set(loaded.stdout.split())
    ours = {name for name in names if name.startswith("mocofast_bench.")}
    assert ours == {"mocofast_bench.processes"}
    assert not names & {"torchvision", "triton", "mocofast_kernels"}


def test_kernels_reports_both_sides_and_appends_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lightly", "lightly.loss"):  # its process imports for many seconds
        monkeypatch.setitem(sys.modules, name, None)
    target = tmp_path / "rows.jsonl"
    options = [
        "--n",
        "8",
        "--k",
        "64",
        "--c",
        "4",
        "--repeats",
        "2",
        "--no-compile",
        "--device",
        "cpu",
    ]
    assert main(["kernels", *options, "--save", str(target)]) == 0
    row = json.loads(target.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == row
    assert (row["n"], row["k"], row["c"], row["dtype"]) == (8, 64, 4, "float32")
    assert {"mocofast", "with rank", "eager"} <= set(row["milliseconds"])
    assert set(row["extra_bytes"]) == set(row["milliseconds"])
    assert "Liger" in row["skipped"]
    # 4 N K C operations at the rate of the same row. Both numbers are rounded.
    assert row["floor_milliseconds"] == pytest.approx(
        4 * 8 * 64 * 4 / row["matrix_gflops"] / 1e6, rel=1e-3, abs=1e-4
    )
    assert row["torch"] == torch.__version__
    assert row["device"]


@pytest.mark.usefixtures("measured_here")
def test_kernels_beside_busy_processes_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--n", "8", "--k", "64", "--c", "4", "--repeats", "2", "--device", "cpu"]
    assert main(["kernels", *options, "--no-compile", "--busy", "2"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text.splitlines()[-1])["busy"] == 2
    assert "beside 2 busy processes" in text
    assert main(["kernels", *options, "--no-compile", "--busy", "0"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["busy"] == 0
    with pytest.raises(SystemExit):
        main(["kernels", *options, "--busy", "-1"])


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
@pytest.mark.parametrize(
    "program",
    [timing.BUSY, timing.PYTORCH, timing.LIGHT],
    ids=["Python", "PyTorch", "light"],
)
def test_busy_neighbours_work_until_the_block_ends(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **kwargs))
        return started[-1]

    def ticks(process: subprocess.Popen[bytes]) -> int:
        """Returns the CPU time of a process in user mode, in ticks of 10 ms."""
        return int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11])

    monkeypatch.setattr(subprocess, "Popen", start)
    with timing.busy_neighbours(2, program):
        end = time.monotonic() + 60
        while min(map(ticks, started)) < 10 and time.monotonic() < end:
            time.sleep(0.02)
        assert min(map(ticks, started)) >= 10
        assert len(started) == 2
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


def test_ema_counts_its_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ema", "--repeats", "1", "--device", "cpu"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    # torchvision's ResNet-50 without fc (23,508,032), and two layers with biases.
    assert row["weights"] == 23_508_032 + 2048 * 2048 + 2048 + 2048 * 128 + 128
    assert row["bytes"] == 3 * 4 * row["weights"]
    assert len(weight_shapes()) == row["tensors"]
    assert {"mocofast", "loop", "foreach_lerp", "swa_utils.AveragedModel"} <= set(
        row["milliseconds"]
    )


def test_weight_shapes_are_those_of_a_resnet50_with_mocos_head() -> None:
    with torch.device("meta"):
        network = torchvision.models.resnet50()
        network.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 128))
    assert weight_shapes() == [tuple(parameter.shape) for parameter in network.parameters()]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["kernels", "--n", "0"],
        ["kernels", "--dtype", "int8"],
        ["unknown"],
        ["sweep", "folder", "--plot", "sweep.png"],  # the sweep always plots into its folder
    ],
)
def test_unusable_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_is_marked_where_code_changed(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a", "-C", str(tmp_path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert timing.commit_of(tmp_path) is None
    rows, code = tmp_path / "benchmarks/results/rows.jsonl", tmp_path / "code.py"
    rows.parent.mkdir(parents=True)
    for file in (rows, code):
        file.write_text("1\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "--short", "HEAD")
    assert timing.commit_of(tmp_path) == commit
    rows.write_text("1\n2\n")
    assert timing.commit_of(tmp_path) == commit
    code.write_text("2\n")
    assert timing.commit_of(rows.parent) == f"{commit}+"


def test_a_row_tells_generations_of_a_cpu_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nstepping\t: 1\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    monkeypatch.setattr(timing, "cpu_bf16", lambda: "AVX512-BF16")
    assert timing.device_name(CPU) == "AMD EPYC"
    assert timing.cpu_generation() == "family 26, model 2, AVX512-BF16"
    assert timing.environment(CPU)["cpu"] == timing.cpu_generation()


@pytest.mark.parametrize("name", [*commands.BENCHMARKS, *commands.COMPILING, "all"])
def test_every_benchmark_has_help_of_at_most_100_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: mocofast bench {name} ")
    assert not [line for line in out.splitlines() if len(line) > 100]
    choices = {"targets": targets.TARGETS, "autotune": (*autotune.KINDS, *autotune.TYPES)}
    for choice in choices.get(name, ()):
        assert choice in " ".join(out.split())


def test_the_clock_measures_a_known_wait() -> None:
    calls = []

    def wait() -> None:
        calls.append(1)
        time.sleep(0.02)

    times = timing.interleaved({"wait": wait, "nothing": lambda: None}, 3, CPU)
    assert 0.02 <= times["wait"].low <= times["wait"].median <= times["wait"].high
    assert times["nothing"].median < 0.001
    assert len(calls) == 3 + 3  # warm-up and rounds


def test_cold_calls_come_one_by_one_after_a_pass_over_other_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    passed: list[int] = []
    pass_over = timing.pass_over

    def passing(memory: torch.Tensor) -> None:
        pass_over(memory)
        passed.append(memory.nbytes)
        order.append(f"pass {int(memory.min())}")
        assert memory.min() == memory.max()  # every byte is written

    monkeypatch.setattr(timing, "pass_over", passing)
    sides = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    timing.interleaved(sides, 4, CPU, cold=True)
    assert order[:6] == ["a"] * 3 + ["b"] * 3  # warm-up
    timed = order[6:]
    assert timed[::2] == [f"pass {number}" for number in range(1, 9)]
    assert [sorted(timed[i + 1 : i + 5 : 2]) for i in range(0, 16, 4)] == [["a", "b"]] * 4
    assert set(passed) == {80_000_000}


def test_cpu_medians_leave_waits_and_the_first_round_out() -> None:
    calls = []

    def work() -> None:
        calls.append(1)
        end = time.process_time() + (0.2 if len(calls) == 1 else 0.02)
        while time.process_time() < end:
            pass

    seconds = timing.cpu_medians({"work": work, "wait": lambda: time.sleep(0.02)}, 3)
    assert len(calls) == 1 + 3
    assert 0.02 <= seconds["work"] < 0.1
    assert seconds["wait"] < 0.01


def allocate(megabytes: int) -> int | None:
    return timing.peak_extra_memory(lambda: torch.ones(megabytes, 2**18), CPU)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="the memory gauge reads /proc"
)
def test_the_memory_gauge_sees_a_known_allocation_that_is_freed_again() -> None:
    extra = timing.in_fresh_process(allocate, 32)
    assert extra == pytest.approx(32 * 2**20, abs=3 * 2**20)  # pages of code vary


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="the memory gauge reads /proc"
)
def test_info_nce_takes_at_most_6_percent_of_eagers_extra_memory() -> None:
    extra = {
        name: timing.in_fresh_process(kernels.memory_of, name, CLAIM, torch.float32, "cpu")
        for name in ("mocofast", "with rank", "eager")
    }
    assert extra["eager"] > 3 * 4 * CLAIM[0] * CLAIM[1]  # more than three N x K arrays
    assert extra["mocofast"] <= 0.06 * extra["eager"]
    assert extra["with rank"] <= 0.06 * extra["eager"]


@pytest.mark.slow
def test_info_nce_is_3_and_a_half_times_as_fast_as_eager_on_an_idle_cpu() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        times = timing.interleaved(kernels.steps(CLAIM, torch.float32, CPU), 15, CPU)
    finally:
        torch.set_num_threads(threads)
    assert times["eager"].median >= 3.5 * times["mocofast"].median


def test_optim_reports_every_optimiser_and_counts_its_bytes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["optim", "--repeats", "1", "--device", "cpu"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    weights = row["weights"]
    # SGD: 4 reads and 3 writes of 4 bytes, 2 writes of 2 bytes. AdamW has a second state. LARS has
    # no copies, and reads weights and gradients of matrices twice: all weights except vectors of
    # 54 norms and 2 layers, 0.2% of the weights.
    assert row["sgd"]["bytes"] == 32 * weights
    assert row["adamw"]["bytes"] == 40 * weights
    assert 0.997 * 36 * weights < row["lars"]["bytes"] < 36 * weights
    for name in ("sgd", "lars", "adamw"):
        ours, theirs, other = row[name]["milliseconds"].values()
        assert other > 0 and not row[name]["skipped"]
        assert row[name]["speedup"] == pytest.approx(theirs / ours, rel=1e-2)


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_all_sides_of_an_optimiser_do_the_same(
    name: str, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trains two tensors at a large learning rate: the weights change."""
    monkeypatch.setattr(optim, "LR", 0.1)
    monkeypatch.setattr(optim, "weight_shapes", lambda: [(7, 5), (11,)])
    made: list[optim.Weights] = []
    build = optim.weights
    monkeypatch.setattr(optim, "weights", lambda *given: made.append(build(*given)) or made[-1])
    optimizer, others, skipped = optim.build_sides(name, CPU, copies)
    assert len(others) == 2 and not skipped
    assert copies or not any("casts" in side for side in others)
    own, start = made[-1], [p.detach().clone() for p in made[-1].params]
    for step in (optimizer.step, *(step for _, step in others.values())):
        for _ in range(3):
            step()
    for side, (weights, _) in others.items():
        tensors = (
            [*w.params, *w.targets, *itertools.chain(*(w.shadows or ()))] for w in (own, weights)
        )
        for ours, theirs in zip(*tensors):
            # float32 rounding, values below 1. timm's divisor is larger by the decay's share.
            rtol, atol = (1e-5, 1e-6) if "timm" not in side else (1e-3, 1e-5)
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    assert all((p - before).abs().max() > 1e-5 for p, before in zip(own.params, start))


def test_a_row_is_saved_before_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: argparse.Namespace) -> dict[str, Any]:
        return {"benchmark": "data"}

    def plot(row: dict[str, Any]) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr(data, "run", run)
    monkeypatch.setattr(data, "plot", plot)
    rows = tmp_path / "rows.jsonl"
    with pytest.raises(RuntimeError, match="no picture"):
        main(["data", "folder", "--save", str(rows), "--plot", str(tmp_path / "data.png")])
    assert json.loads(rows.read_text())["benchmark"] == "data"
