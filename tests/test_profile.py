"""Profile of a step: parts add up, floors equal counts by hand, and training does not change."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mocofast import cli, step_parts
from mocofast.config import Config
from mocofast.device import choose_autocast
from mocofast.methods.moco import build
from mocofast.models.encoders import build_encoder
from mocofast.optim import FusedAdamW, FusedSGD
from mocofast.plots import plot_step
from mocofast.settings import load_recipe
from mocofast.step_parts import Recorder, Span, Step, step_part
from mocofast.train import profile
from mocofast.train.optimizer import optimizer_of
from mocofast.train.step import train_step
from mocofast.train.work import Work, encoder_work
from tests import runs

CPU = torch.device("cpu")
FP32 = torch.autocast("cpu", enabled=False)


# ---- parts ----


def test_time_belongs_to_the_innermost_part_and_all_of_it_is_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    recorder = Recorder(CPU)
    recorder.begin()
    with step_part("loss"), step_part("key forward", [torch.zeros(4, 3, 8, 8)]):
        pass
    step = recorder.end()
    assert step.spans() == [
        Span("other", 0, 1),
        Span("loss", 1, 3),
        Span("key forward", 3, 6),
        Span("loss", 6, 10),
        Span("other", 10, 15),
    ]
    assert profile.seconds_by_part(step) == {"other": 6, "loss": 6, "key forward": 3}
    assert step.images["key forward", 8] == 4


def test_nothing_is_timed_outside_a_step() -> None:
    assert not step_parts.timed()
    recorder = Recorder(CPU)
    recorder.begin()
    assert step_parts.timed()
    recorder.end()
    assert not step_parts.timed()
    with step_part("loss"):
        assert not step_parts._active


def test_simultaneous_work_of_two_streams_counts_as_overlap_and_the_sum_stays_the_step() -> None:
    # A GPU: keys on a stream from 1 to 5, queries on a second stream from 2 to 6.
    step = Step(
        [
            ("other", 0.0, 1.0),
            ("key forward", 1.0, 5.0),
            ("loss", 5.0, 2.0),
            ("query forward", 2.0, 6.0),
        ],
        {},
    )  # type: ignore[arg-type]
    seconds = profile.seconds_by_part(step)
    assert seconds == {"other": 1, "key forward": 4, "query forward": 4, "overlapped": -3}
    assert sum(seconds.values()) == 6


# ---- floors ----


@pytest.mark.parametrize(("arch", "size"), [("resnet_tiny", 8), ("resnet18_cifar", 32)])
def test_operations_of_the_layers_are_those_that_torchs_counter_sees(arch: str, size: int) -> None:
    encoder = build_encoder(arch)(num_classes=16)
    forward, backward = encoder_work(encoder, 4, size, FP32)
    images = torch.randn(4, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        output = encoder(images)
    assert sum(layer.operations for layer in forward) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert sum(layer.operations for layer in backward) == counter.get_total_flops()


def test_bytes_of_layers_are_those_of_all_that_they_take_and_give() -> None:
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    )
    forward, backward = encoder_work(encoder, 2, 4, FP32)
    x, w, y = 2 * 3 * 16, 8 * 3 * 9, 2 * 8 * 16
    a, b, c, z = 2 * 128, 128 * 5, 5, 2 * 5
    assert [layer.bytes for layer in forward] == [4 * (x + w + y), 4 * (a + b + c + z)]
    assert [layer.operations for layer in forward] == [2 * 16 * 2 * 8 * 27, 2 * 2 * 128 * 5]
    # Two products of the linear layer, in autograd's order, then the convolution (no gradient of
    # the images).
    *products, convolution = backward
    assert sorted(layer.bytes for layer in products) == sorted([4 * (z + b + a), 4 * (z + a + b)])
    assert convolution.bytes == 4 * (y + x + w + w)


def test_counting_computes_nothing_and_changes_nothing() -> None:
    encoder = build_encoder("resnet18_cifar")(num_classes=16)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    began = time.thread_time()
    # A real forward pass would be 284 GFLOP, which takes seconds.
    forward, _ = encoder_work(encoder, 512, 32, FP32)
    assert time.thread_time() - began < 1.5
    assert sum(layer.operations for layer in forward) > 5e11
    assert encoder.training
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())


def test_under_autocast_layers_move_half_the_bytes() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 5))
    full, _ = encoder_work(encoder, 2, 4, FP32)
    half, _ = encoder_work(encoder, 2, 4, torch.autocast("cpu", torch.bfloat16))
    assert [2 * layer.bytes for layer in half] == [layer.bytes for layer in full]


def test_a_floor_is_the_longer_of_both_times_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        profile, "memory_bandwidth", lambda size, device: 100.0 if size == 900 else 1.0
    )
    floor = profile.Floor.measure([Work(50, 100), Work(10, 900)], 10.0, CPU)
    assert floor == (5.0 + 9.0, 60, 1000, 100.0)


def test_bandwidth_of_memory_is_that_of_the_faster_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = profile.memory_passes(800, CPU)
    for call, _ in passes.values():
        call()
    # 100 numbers are copied to 100 others, or all 200 are read and written.
    assert {name: moved for name, (_, moved) in passes.items()} == {"copy": 800, "update": 1600}
    seconds = iter((2.0, 2.5))
    monkeypatch.setattr(profile, "_best", lambda function, device: next(seconds))
    assert profile.memory_bandwidth(800, CPU) == 1600 / 2.5


def test_traffic_of_an_optimiser_step_counted_by_hand() -> None:
    p, target = nn.Parameter(torch.ones(10)), torch.zeros(10)
    idle = nn.Parameter(torch.ones(7))  # gets no gradient: only read for its average
    idle_target = torch.zeros(7)
    shadow = torch.zeros(10, dtype=torch.bfloat16)
    sgd = FusedSGD([p, idle], lr=0.1, momentum=0.9, ema=([target, idle_target], 0.9))
    sgd.write_shadows({p: shadow})
    p.grad = torch.ones(10)
    sgd.step()
    # Parameter, momentum and average twice, gradient and copy once. Of the idle parameter: only the
    # average, twice.
    assert sgd.traffic() == 10 * 4 * (2 + 2 + 2 + 1) + 10 * 2 + 7 * 4 * 2
    q = nn.Parameter(torch.ones(10))
    adamw = FusedAdamW([q], lr=0.1)
    q.grad = torch.ones(10)
    adamw.step()
    # Parameter and two averages of gradients twice, gradient once. The step count is negligible.
    assert adamw.traffic() == 10 * 4 * (2 + 2 + 2 + 1)


# ---- the profile of a loop ----


def tiny() -> Config:
    config = load_recipe("digits")
    config.data.batch_size, config.model.queue_size = 8, 16
    return config


def profiled(
    config: Config, wait: float = 0.0, device: torch.device = CPU
) -> tuple[profile.Profile, list[float]]:
    """Returns the profile of a loop, and the seconds of every step by the loop's own clock.

    wait: seconds that the loop sleeps for every batch.
    """
    torch.manual_seed(0)
    model = build(config).to(device)
    optimizer = optimizer_of(model, config.optim)
    autocast = choose_autocast("fp32", device)
    profiler = profile.StepProfiler(model, optimizer, autocast, config)
    views = tuple(
        torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8).to(device) for _ in range(2)
    )
    seconds = []
    for i in range(profile.STEPS):
        profiler.begin()
        began = time.perf_counter()
        with step_part("data wait"):
            time.sleep(wait)
        train_step(model, views, optimizer, config.train.accumulate, autocast)
        seconds.append(time.perf_counter() - began)
        assert profiler.end() == (i + 1 == profile.STEPS)
    assert profiler.profile is not None
    return profiler.profile, seconds


@pytest.fixture(scope="module")
def loop() -> tuple[profile.Profile, list[float]]:
    return profiled(tiny(), wait=0.01)


@pytest.fixture(scope="module")
def profile_of_a_loop(loop: tuple[profile.Profile, list[float]]) -> profile.Profile:
    return loop[0]


def test_parts_are_there_in_order_and_add_up_to_the_step(
    loop: tuple[profile.Profile, list[float]],
) -> None:
    p, seconds = loop
    assert [part.name for part in p.parts] == [
        *("data wait", "key forward", "query forward", "loss", "backward"),
        *("optimiser and EMA", "other"),
    ]
    assert all(part.seconds > 0 for part in p.parts)
    first = profile.SKIPPED + profile.TIMED_WHOLE
    middle = sorted(seconds[first : first + profile.TIMED_BY_PARTS])[
        profile.TIMED_BY_PARTS // 4 : -profile.TIMED_BY_PARTS // 4
    ]
    # begin() and end() take microseconds outside of the loop's own clock. A step takes 12 ms.
    assert p.seconds == pytest.approx(sum(middle) / len(middle), rel=0.1)
    whole = sorted(seconds[profile.SKIPPED : first])[profile.TIMED_WHOLE // 2]
    assert p.whole == pytest.approx(whole, rel=0.1)


def test_the_wait_is_the_loops_own(profile_of_a_loop: profile.Profile) -> None:
    wait = profile_of_a_loop.parts[0]
    assert wait.seconds >= 0.01  # as long as the loop slept
    assert wait.floor is None


def test_floors_are_of_what_the_step_does(profile_of_a_loop: profile.Profile) -> None:
    found = {part.name: part.floor for part in profile_of_a_loop.parts}
    loss, update = found["loss"], found["optimiser and EMA"]
    assert loss is not None and update is not None
    assert (loss.operations, loss.bytes) == (4 * 8 * 16 * 64, 16 * 64 * 4)
    weights = sum(p.numel() for p in build(tiny()).encoder_q.parameters())
    assert update.bytes == 28 * weights
    assert found["other"] is None
    # Backward takes twice the forward, less the gradient to the images.
    forward, backward = found["query forward"], found["backward"]
    assert forward is not None and backward is not None
    assert backward.operations == 2 * forward.operations - 2 * 8 * 64 * 27 * 16


def test_the_table_shows_every_part_and_the_counts(profile_of_a_loop: profile.Profile) -> None:
    p = profile_of_a_loop
    table = p.table()
    for part in p.parts:
        assert f"{part.name:18}{1e3 * part.seconds:10.3f}{part.seconds / p.seconds:8.1%}" in table
    assert table.startswith("resnet_tiny, 8 px, batch 8, fp32, ")
    assert f"{p.operators:.0f} operators, 0 host synchronisations a step" in table


def test_operators_and_waits_are_counted_within_steps_only() -> None:
    recorder = Recorder(CPU, timing=False)
    x = torch.ones(3)
    with torch.profiler.profile(acc_events=True) as traced:
        for _ in range(profile.TRACED):
            recorder.begin()
            torch.relu(x.add(1))  # relu calls clamp_min, which does not count
            x.sum().item()
            recorder.end()
            x.max().item()
    assert profile.count_calls(traced, CPU) == (None, 4, 1)


def test_micro_batches_count_together() -> None:
    config = tiny()
    config.train.accumulate = 2
    found, _ = profiled(config)
    single = encoder_work(build(config).encoder_q, 8, 8, FP32)[0]
    (forward,) = (part.floor for part in found.parts if part.name == "query forward")
    assert forward is not None and forward.operations == sum(layer.operations for layer in single)


@pytest.mark.gpu
def test_on_a_gpu_launches_are_counted_and_no_step_waits() -> None:
    found, _ = profiled(tiny(), device=torch.device("cuda"))
    # Op by op: every layer launches a few times.
    assert found.launches is not None and found.launches > 50
    assert found.synchronisations == 0
    assert found.seconds > found.floor > 0


def test_the_picture_shows_every_part_its_floor_and_its_numbers(
    profile_of_a_loop: profile.Profile,
) -> None:
    p = profile_of_a_loop
    figure = plot_step(p.bars(), p.title)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [part.name for part in p.parts]
    with_floor = sum(part.floor is not None for part in p.parts)
    assert len(axes.patches) == len(p.parts) + with_floor
    bars = [patch for patch in axes.patches if not patch.get_hatch()]  # type: ignore[attr-defined]
    begins = [bar.get_x() for bar in bars]  # type: ignore[attr-defined]
    widths = [bar.get_width() for bar in bars]  # type: ignore[attr-defined]
    assert widths == pytest.approx([1e3 * part.seconds for part in p.parts])
    assert begins == pytest.approx([sum(widths[:i]) for i in range(len(widths))])
    # Texts neither leave the picture nor cover bars of their row.
    figure.canvas.draw()
    frame = figure.bbox
    for text, bar in zip(axes.texts, bars):
        box, own = text.get_window_extent(), bar.get_window_extent()
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
        assert box.x1 <= own.x0 or box.x0 >= own.x1


# ---- whole runs ----


@pytest.fixture(scope="module")
def profiled_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("profiled", "plain")]
    # Log lines within the steps that are profiled, and three epochs of 11 steps.
    options = ["--train.max_steps", "31", "--train.log_every", "4"]
    options += ["--knn.every", "0", "--data.workers", "0"]
    out = runs.mocofast(
        "pretrain", "digits", *options, "--train.dir", str(folders[0]), "--profile"
    ).stdout
    runs.mocofast("pretrain", "digits", *options, "--train.dir", str(folders[1]))
    return folders[0], folders[1], out


def test_a_profiled_run_equals_one_that_is_not_bit_for_bit(
    profiled_run: tuple[Path, Path, str],
) -> None:
    with_profile, without, _ = profiled_run
    runs.assert_same_run(with_profile, without)


def test_a_profiled_run_leaves_table_picture_and_trace(
    profiled_run: tuple[Path, Path, str],
) -> None:
    folder, without, out = profiled_run
    assert f"profile of a step: {folder / 'profile.png'}" in out
    assert "data wait" in (folder / "profile.txt").read_text()
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    events: list[dict[str, Any]] = json.loads(
        gzip.decompress((folder / "trace.json.gz").read_bytes())
    )["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for name in (
        "data wait",
        "key forward",
        "query forward",
        "loss",
        "backward",
        "optimiser and EMA",
        "step",
    ):
        assert named.count(name) == profile.TRACED
    assert not any((without / name).exists() for name in profile.FILES)


def test_a_run_too_short_for_a_profile_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "short"
    options = ["--train.max_steps", "2", "--data.workers", "0", "--profile"]
    options += ["--train.dir", str(folder)]
    assert cli.main(["pretrain", "digits", *options]) == 0
    assert f"no profile: it takes {profile.STEPS} steps" in capsys.readouterr().out
    assert not (folder / "profile.txt").exists()


def test_of_two_ranks_one_profiles_and_sees_what_it_waits_for(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    options = ["--train.max_steps", "28", "--data.workers", "0", "--profile"]
    options += ["--train.dir", str(folder)]
    out = runs.torchrun(2, "pretrain", "digits", *options).stdout
    assert out.count("profile of a step") == 1
    assert "\ncommunication" in (folder / "profile.txt").read_text()
