"""`mocofast bench step|train|all` at tiny sizes: rows are complete and consistent."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from mocofast_bench import commands, loops, neighbours, step, train, training_steps
from mocofast_bench.commands import BENCHMARKS, benchmark, main

from mocofast.config import Config, ConfigError
from mocofast.data.loaders import count_workers
from mocofast.settings import load_recipe
from mocofast.train import threads
from mocofast.usage import Usage, usage
from tests import runs

CPU = torch.device("cpu")
TINY = ["--recipe", "digits", "--batch", "8", "--queue", "16", "--repeats", "1", "--device", "cpu"]


def last_row(out: str) -> dict[str, Any]:
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def step_row(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns the row of a run of `bench step`, without lightly (installed or not)."""
    target = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        for name in {"lightly", *(name for name in sys.modules if name.startswith("lightly."))}:
            patch.setitem(sys.modules, name, None)
        picture = target.with_name("step.png")
        assert (
            main(["step", *TINY, "--modes", "graph", "--save", str(target), "--plot", str(picture)])
            == 0
        )
    assert picture.read_bytes().startswith(b"\x89PNG")
    return json.loads(target.read_text())


def test_step_times_every_side_on_the_same_problem(step_row: dict[str, Any]) -> None:
    assert (step_row["arch"], step_row["size"]) == ("resnet_tiny", 8)
    assert (step_row["batch_size"], step_row["queue_size"]) == (8, 16)
    assert set(step_row["milliseconds"]) == {"mocofast", "reference", "strong", "encoders only"}
    for name, milliseconds in step_row["milliseconds"].items():
        low, high = step_row["quartiles"][name]
        assert 0 < low <= milliseconds <= high
        assert step_row["images_per_second"][name] == pytest.approx(8e3 / milliseconds, rel=1e-3)
    ours = step_row["milliseconds"]["mocofast"]
    for name, ratio in step_row["speedup"].items():
        assert ratio == pytest.approx(step_row["milliseconds"][name] / ours, rel=0.01)
    floor = step_row["milliseconds"]["encoders only"]
    assert step_row["over_encoders_only"] == pytest.approx(ours / floor, rel=0.01)


@pytest.mark.usefixtures("measured_here")
def test_in_bf16_a_cpus_step_stands_beside_our_step_in_fp32(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lightly", "lightly.loss"):
        monkeypatch.setitem(sys.modules, name, None)
    used: list[tuple[str, bool]] = []

    class Recorded(training_steps.Engine):
        def __init__(self, mode: str, model: Any, optimizer: Any, autocast: Any, *rest: Any):
            used.append((mode, autocast._enabled))
            super().__init__(mode, model, optimizer, autocast, *rest)

    monkeypatch.setattr(training_steps, "Engine", Recorded)
    main(["step", *TINY, "--modes", "--precision", "bf16"])
    row = last_row(capsys.readouterr().out)
    assert row["precision"] == "bf16"
    assert row["speedup"].keys() == {"mocofast", "mocofast fp32", "reference", "strong"}
    # Two steps in turns, two alone, and the profile of our step.
    assert used == [("eager", low) for low in (True, False, True, False, True)]


def test_step_names_the_side_it_skips_and_why(step_row: dict[str, Any]) -> None:
    assert set(step_row["skipped"]) == {"engine graph", "lightly"}
    assert "needs a GPU" in step_row["skipped"]["engine graph"]
    assert "lightly" in step_row["skipped"]["lightly"]


def test_the_row_says_where_our_steps_time_goes(step_row: dict[str, Any]) -> None:
    parts, floors = step_row["breakdown_milliseconds"], step_row["floor_milliseconds"]
    assert list(parts) == [
        "key forward",
        "query forward",
        "loss",
        "backward",
        "optimiser and EMA",
        "other",
    ]
    assert list(floors) == ["key forward", "query forward", "loss", "backward", "optimiser and EMA"]
    assert all(value > 0 for value in (*parts.values(), *floors.values()))


def test_each_side_starts_in_a_process_of_its_own(step_row: dict[str, Any]) -> None:
    sides_timed = {"mocofast", "reference", "strong"}
    assert set(step_row["first_step_seconds"]) == set(step_row["cores"]) == sides_timed
    assert all(
        value > 0
        for value in (*step_row["first_step_seconds"].values(), *step_row["cores"].values())
    )


def test_the_picture_of_a_row_shows_every_side_and_every_part(step_row: dict[str, Any]) -> None:
    figure = step.plot(step_row)
    *panels, below = figure.get_axes()
    labels = ["images/s", "time to first step, s", "peak extra memory, MB"]
    assert [panel.get_xlabel() for panel in panels] == labels
    rates = step_row["images_per_second"]
    widths = [bar.get_width() for bar in panels[0].patches]  # type: ignore[attr-defined]
    assert widths == [rates[name] for name in step_row["speedup"]]
    assert [label.get_text() for label in below.get_yticklabels()] == list(
        step_row["breakdown_milliseconds"]
    )


def test_only_the_reference_waits_for_its_device(step_row: dict[str, Any]) -> None:
    # The reference waits for the pointer of the queue and for the loss.
    assert step_row["host_synchronisations"] == {"mocofast": 0, "reference": 2, "strong": 0}


def test_step_measures_memory_of_each_side(step_row: dict[str, Any]) -> None:
    assert set(step_row["extra_bytes"]) == {"mocofast", "reference", "strong"}
    if sys.platform == "linux":
        # The output of the first convolution, 8 x 16 x 8 x 8 floats, is in memory at the peak.
        assert all(value >= 4 * 8 * 16 * 8 * 8 for value in step_row["extra_bytes"].values())


def test_operations_of_the_encoders_are_counted(step_row: dict[str, Any]) -> None:
    # Multiply-adds of resnet_tiny at 8 px, by hand: stem, three blocks, two shortcuts, head.
    stem = 64 * 3 * 9 * 16
    blocks = 64 * 16 * 9 * 16 * 2 + 16 * (16 + 32) * 9 * 32 + 4 * (32 + 64) * 9 * 64
    forward = stem + blocks + 16 * 16 * 32 + 4 * 32 * 64 + 64 * 64
    # Backward takes twice the forward, minus the gradient to the images, which is not computed.
    # The forward pass of the keys comes in addition.
    assert step_row["encoder_flops"] == 2 * 8 * (4 * forward - stem)


def tiny() -> Config:
    config = load_recipe("digits")
    config.data.batch_size, config.model.queue_size = 8, 16
    return config


def test_all_sides_start_from_the_same_loss() -> None:
    config = tiny()
    ours, strong = (training_steps.STEPS[name](config, CPU)() for name in ("mocofast", "strong"))
    reference = training_steps.STEPS["reference"](config, CPU)()
    assert ours.loss.item() == pytest.approx(reference, rel=1e-5)
    torch.testing.assert_close(ours.values, strong, rtol=1e-5, atol=1e-6)


def test_lightlys_side_waits_once_and_learns_on_the_same_images() -> None:
    pytest.importorskip("lightly")
    run = training_steps.lightly(tiny(), CPU)
    first = [run() for _ in range(3)]
    assert all(torch.isfinite(loss) for loss in first)
    assert step.host_synchronisations(run) == 1  # the pointer of the memory bank


def test_the_counter_counts_waits_and_nothing_else() -> None:
    with step.HostSynchronisations() as waits:
        torch.ones(3).nonzero()
        torch.ones(1).item()
        torch.ones(3) + 1
    assert waits.count == 2


@pytest.mark.gpu
def test_a_copy_to_the_host_counts_as_a_wait() -> None:
    with step.HostSynchronisations() as waits:
        torch.ones(3, device="cuda").cpu()
        torch.ones(3).cuda()
    assert waits.count == 1


@pytest.mark.parametrize("command", ["step", "train"])
def test_a_queue_that_the_reference_refuses_is_an_error_that_says_so(command: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--queue must be a multiple of --batch, .* 17 keys and 8 images"
    ):
        main([command, "--recipe", "digits", "--batch", "8", "--queue", "17", "--device", "cpu"])


@pytest.mark.usefixtures("measured_here")
def test_the_quick_options_of_a_step_leave_memory_and_profile_out_and_keep_the_times(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = commands.QUICK["step"]
    assert main(["step", *TINY, *options[2:]]) == 0  # without the number of repeats
    row = last_row(capsys.readouterr().out)
    assert {"mocofast", "reference", "strong", "encoders only"} <= set(row["milliseconds"])
    assert "breakdown_milliseconds" not in row and not row["extra_bytes"]
    assert len(step.plot(row).get_axes()) == 1


@pytest.mark.usefixtures("measured_here")
@pytest.mark.parametrize("command", ["step", "train"])
def test_steps_and_runs_are_timed_on_the_threads_of_pretrain(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny network takes one thread, and all where its operations count as many."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setattr(threads, "cores_of_others", lambda _: 0.0)
    before, cores = torch.get_num_threads(), count_workers(-1)
    short = {"step": ["--times-only", "--no-profile", "--modes"], "train": ["--steps", "1"]}
    try:
        for worth, expected in ((threads.WORTH, 1), (5, cores)):
            monkeypatch.setattr(threads, "WORTH", worth)
            torch.set_num_threads(2)
            assert main([command, *TINY, *short[command]]) == 0
            assert last_row(capsys.readouterr().out)["threads"] == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("measured_here")
def test_train_measures_both_loops_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.make_images(tmp_path, 20)  # two batches an epoch: timed steps cross epochs
    options = ["--arch", "resnet_tiny", "--size", "8", "--steps", "2", "--workers", "1"]
    # A recipe whose views lightly's transforms can make
    options += ["--recipe", "moco_v2_r50_200ep"]
    assert main(["train", str(folder), *TINY, *options]) == 0
    row = last_row(capsys.readouterr().out)
    assert (row["images"], row["batch_size"], row["workers"]) == (20, 8, 1)
    assert row["loader"] in ("dali", "torchvision")
    sides = {"mocofast", "reference", "synthetic"} | (
        set() if importlib.util.find_spec("lightly") is None else {"lightly"}
    )
    for field in loops.LoopRates._fields:
        assert set(row[field]) == sides
    assert set(row["extra_bytes"]) == sides
    panels = train.plot(row).get_axes()
    assert len(panels) == 5
    widths = [bar.get_width() for bar in panels[0].patches]  # type: ignore[attr-defined]
    assert widths == list(row["images_per_second"].values())
    assert set(row["speedup"]) == sides
    assert row["speedup"]["mocofast"] == 1
    assert all(0 <= share <= 1 for share in row["data_wait"].values())
    assert row["data_wait"]["synthetic"] < 0.1
    # A loader has to start and to make a batch. "synthetic" only trains.
    assert row["time_to_first_step"]["synthetic"] < row["time_to_first_step"]["reference"]


def test_train_compares_the_sides_of_a_round() -> None:
    ours, theirs = (100.0, 30.0, 90.0), (50.0, 20.0, 50.0)  # the machine was slow in one round
    rounds = {
        name: [loops.LoopRates(rate, 0, 0, 0) for rate in rates]
        for name, rates in {"mocofast": ours, "reference": theirs}.items()
    }
    assert train.ratios_of(rounds) == {"mocofast": 1.0, "reference": 1.8}


def test_train_counts_the_time_of_the_loaders_workers(tmp_path: Path) -> None:
    """Batches come from a busy process: CPU time of the process and the wait are measured."""

    class Slow:
        def epoch(self, epoch: int) -> Any:
            from torch.utils.data import DataLoader

            numbers: Any = range(100)
            return iter(DataLoader(numbers, num_workers=1, collate_fn=spin))

        def close(self) -> None: ...

    found = loops.measure_loop(loops.TimedLoop(Slow, lambda batch: None), 4, 32, CPU)
    assert found.data_wait > 0.9
    assert found.cores > 0.1
    assert found.time_to_first_step > SPIN


def test_a_round_lasts_for_the_least_number_of_steps_and_the_least_time() -> None:
    class Endless:
        def epoch(self, epoch: int) -> Any:
            return iter(range(100))

        def close(self) -> None: ...

    for steps, seconds in ((4, 0.0), (1, 0.05)):
        seen: list[int] = []
        rate = loops.measure_loop(loops.TimedLoop(Endless, seen.append), steps, 32, CPU, seconds)
        timed = len(seen) - loops.WARM_UP_BATCHES
        assert timed == steps if not seconds else timed > steps
        assert 32 * timed / rate.images_per_second > seconds


SPIN = 0.05  # seconds of work a batch


def spin(items: list[int]) -> list[int]:
    import time

    end = time.process_time() + SPIN
    while time.process_time() < end:
        pass
    return items


@pytest.mark.parametrize("path", [None, "photos"])
def test_all_runs_every_short_benchmark_with_its_defaults(
    path: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = {}

    def recorder(name: str) -> Any:
        return lambda arguments: ran.setdefault(name, vars(arguments)) and {"benchmark": name}

    def fake(name: str) -> Any:
        module = benchmark(name)
        return types.SimpleNamespace(
            add_arguments=module.add_arguments, run=recorder(name), __doc__=module.__doc__
        )

    monkeypatch.setattr(commands, "benchmark", fake)
    processes: list[str] = []
    monkeypatch.setattr(
        commands, "_in_own_process", lambda words: main(words) or processes.append(words[0])
    )
    assert main(["all", "--device", "cpu", *(["--path", path] if path else [])]) == 0
    assert set(ran) == set(BENCHMARKS) - {"sweep", "speedrun"} - (set() if path else {"data"})
    assert ("data is left out" in capsys.readouterr().out) == (path is None)
    assert ran["train"]["path"] == path
    assert all(arguments["device"] == "cpu" for arguments in ran.values())
    assert (ran["kernels"]["n"], ran["step"]["recipe"]) == (256, None)
    assert processes == ["step", "train"]
    ran.clear()
    assert main(["all", "--quick", "--device", "cpu", *(["--path", path] if path else [])]) == 0
    assert (ran["kernels"]["no_compile"], list(ran["step"]["modes"])) == (True, [])
    assert ran["train"]["path"] == path and ran["ema"]["repeats"] < 20


def test_a_busy_machine_is_told_from_a_quiet_machine() -> None:
    before = Usage(wall=10.0, busy=5.0, own=1.0, stolen=0.5)
    cores = os.cpu_count() or 1
    after = Usage(wall=20.0, busy=5.0 + 8.0 * cores, own=1.0 + 6.0 * cores, stolen=0.5)
    assert neighbours.between(before, after) == pytest.approx((0.2, 0.0))
    # Half of the time does not count, in which children of another process measured memory.
    untimed = [Usage(wall=5.0, busy=2.0 * cores, own=cores, stolen=0.0)]
    assert neighbours.between(before, after, untimed) == pytest.approx((0.2, 0.0))
    untimed = [Usage(wall=5.0, busy=2.0 * cores, own=0.0, stolen=0.0)]
    assert neighbours.between(before, after, untimed) == pytest.approx((0.0, 0.0))
    row = {"sgd": {"milliseconds": {"a": 10.0}, "quartiles": {"a": [9.0, 13.0]}}}
    assert neighbours.spread(row) == pytest.approx(0.4)
    assert neighbours.spread({"shape": [1, 2], "rows": [row]}) == pytest.approx(0.4)
    assert len(neighbours.warnings(neighbours.Neighbours(0.2, 0.1), row)) == 3
    quiet = {"milliseconds": {"a": 10.0}, "quartiles": {"a": [9.9, 10.1]}}
    assert neighbours.warnings(neighbours.Neighbours(0.01, 0.0), quiet) == []


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_the_work_of_this_process_is_its_own() -> None:
    before = usage()
    spin([])
    after = usage()
    assert before is not None and after is not None
    assert after.own - before.own == pytest.approx(SPIN, abs=0.03)
    assert after.busy >= before.busy and after.wall > before.wall
