"""Runs whose loss or weights become NaN stop, keep the last finite checkpoint, and say so."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mocofast import cli, ops
from mocofast.config import ConfigError
from mocofast.evaluate.features import check_finite
from mocofast.evaluate.knn import knn_accuracy
from mocofast.interrupts import EXIT_DIVERGED, EXIT_INTERRUPTED
from mocofast.train.checkpoint import load_checkpoint
from mocofast.train.checkpoint_writer import save_atomically
from mocofast.train.finite import are_finite
from mocofast.train.finite import check_finite as check_weights
from mocofast.train.metrics import Moment, StepMetrics, Window

SHORT = ("--train.device", "cpu", "--data.workers", "0", "--model.queue_size", "300")


def pretrain(folder: Path, *options: str) -> int:
    return cli.main(["pretrain", "digits", *SHORT, "--train.dir", str(folder), *options])


def lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, with a checkpoint after every second step."""
    folder = tmp_path_factory.mktemp("good") / "run"
    options = ("--train.max_steps", "4", "--checkpoint.every_steps", "2", "--knn.start", "false")
    assert pretrain(folder, *options) == 0
    return folder


def test_a_run_at_an_absurd_rate_stops_and_keeps_the_last_finite_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ("--optim.lr", "1e30", "--checkpoint.every_steps", "1", "--knn.start", "false")
    assert EXIT_DIVERGED not in (0, 2, EXIT_INTERRUPTED)
    assert pretrain(run, *options, "--train.log_every", "3") == EXIT_DIVERGED
    error = capsys.readouterr().err
    assert "the run diverged" in error and "learning rate 1e+30" in error and "--optim.lr" in error
    assert "Traceback" not in error
    for path in (run / "checkpoints").glob("*.pt"):
        assert are_finite(load_checkpoint(path)["model"].values())
    assert lines(run) is not None  # strict JSON


def test_the_checkpoint_of_the_good_steps_stays_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss becomes NaN at step 7. Steps 5 and 6 have checkpoints, the log line is of 5 to 8."""
    from mocofast.train.engine import Engine

    step, seen = Engine.step, []

    def spoil(self: Engine, *args: Any) -> StepMetrics:
        metrics = step(self, *args)
        seen.append(metrics)
        return metrics._replace(values=metrics.values * math.nan) if len(seen) == 7 else metrics

    monkeypatch.setattr(Engine, "step", spoil)
    run = tmp_path / "run"
    options = ("--train.log_every", "4", "--checkpoint.every_steps", "2", "--knn.start", "false")
    assert pretrain(run, *options) == EXIT_DIVERGED
    error = capsys.readouterr().err
    assert "the loss is nan in the steps up to 8" in error
    named = max((run / "checkpoints").glob("step_*.pt"))
    assert str(named) in error
    assert load_checkpoint(named)["step"] in (6, 8)
    assert [line["loss"] is None for line in lines(run)] == [False, True]
    assert (run / "checkpoints" / "last.pt").exists()


def test_weights_that_are_nan_are_refused_by_every_command(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_checkpoint(good)
    state["model"]["encoder_q.conv1.weight"][0, 0, 0, 0] = math.nan
    state["model"]["encoder_q.fc.bias"][0] = math.inf
    spoiled = tmp_path / "spoiled.pt"
    save_atomically(state, spoiled)
    out = tmp_path / "out.pt"
    for command in (["knn"], ["linear"], ["finetune"], ["export", "--format", "torchvision"]):
        words = [command[0], str(spoiled), *command[1:], *([str(out)] if len(command) > 1 else [])]
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert "encoder_q.conv1.weight and 1 other tensor" in error and "NaN" in error
    assert not out.exists()


def test_features_that_are_nan_have_no_accuracy() -> None:
    features, labels = torch.randn(8, 3), torch.arange(8) % 2
    features[2, 1] = math.nan
    with pytest.raises(ConfigError, match="NaN or infinity for 1 of 8 images"):
        check_finite(features)
    # Rows of NaN are no hits of the library's function, even beside good rows.
    everywhere = torch.full((8, 3), math.nan)
    assert knn_accuracy(features, labels, everywhere, labels, 3) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_found(dtype: torch.dtype) -> None:
    tensors = [torch.full((3, 2), 3e4, dtype=dtype), torch.arange(3), torch.zeros(0), torch.ones(2)]
    assert are_finite(tensors)
    for wrong in (math.nan, math.inf, -math.inf):
        spoiled = tensors[0].clone()
        spoiled[1, 1] = wrong
        assert not are_finite([*tensors, spoiled])


def test_limits_of_clamps_may_be_infinite_and_weights_may_not() -> None:
    limit = torch.tensor(-math.inf)  # a buffer of timm's Gemma 4
    assert are_finite([torch.ones(2), limit])
    check_weights({"limit": limit}, "file")
    assert not are_finite([torch.tensor(math.nan)])
    for wrong in (limit.expand(2), torch.tensor(math.nan)):
        with pytest.raises(ConfigError, match="file: w hold NaN or infinity"):
            check_weights({"limit": limit, "w": wrong}, "file")


def test_the_last_line_is_of_the_last_step_where_max_steps_ends_before_an_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert pretrain(run, "--train.max_steps", "5", "--knn.every", "1") == 0
    out = capsys.readouterr().out
    (after,) = [line for line in out.splitlines() if line.startswith("after: ")]
    assert cli.main(["knn", str(run), "--device", "cpu"]) == 0
    expected = capsys.readouterr().out.split("knn_top1 ")[1].split()[0]
    assert after.split()[3].rstrip(";") == expected
    # A continued run writes the metrics of a run that never stopped.
    assert [line["step"] for line in lines(run) if "knn_top1" in line] == [0]


def test_rates_are_of_the_steps_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 1 s, of which 0.75 s wait for data. The log line is read a step later."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    window, cpu = Window(torch.device("cpu")), torch.device("cpu")
    window.start_clock()
    pending, found = None, []
    for step in range(1, 7):
        clock[0] += 1.0
        window.add(StepMetrics(("loss",), torch.ones(1)), 8, 0.75)
        if pending is not None:
            found.append(pending.wait())
        pending = window.flush()
        if step % 2 == 0:  # an evaluation
            began = Moment(cpu)
            clock[0] += 50.0
            window.end_pause(began)
    assert [values["data_wait"] for values in found] == [0.75] * 5
    assert [values["images_per_second"] for values in found] == [8.0] * 5


def test_a_run_on_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    import signal
    import threading

    handler, found = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(
        target=lambda: found.append(pretrain(tmp_path / "run", "--train.max_steps", "1"))
    )
    thread.start()
    thread.join()
    assert found == [0] and signal.getsignal(signal.SIGINT) is handler


def test_a_queue_larger_than_the_set_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--train.max_steps", "1", "--knn.start", "false")
    assert pretrain(tmp_path / "small", *options) == 0
    assert "larger than the set" not in capsys.readouterr().out
    assert pretrain(tmp_path / "large", *options, "--model.queue_size", "65536") == 0
    out = capsys.readouterr().out
    assert out.count("the queue of 65536 keys is larger than the set of") == 1
    # 65,536 / 1,438 images. The size that the line suggests is smaller than the set.
    found = re.search(r"of ([\d.]+) epochs.* --model.queue_size (\d+)", out)
    assert found is not None and 64 <= int(found[2]) < 1438
    assert float(found[1]) == pytest.approx(65536 / 1438, rel=1e-2)
    assert pretrain(tmp_path / "seed", "--train.seed", "-1") == 2
    assert "train.seed" in capsys.readouterr().err


def test_a_batch_of_one_without_negatives_is_an_error() -> None:
    one = torch.randn(1, 4)
    with pytest.raises(ValueError, match="positive_key without negative_keys must have 2 rows"):
        ops.info_nce(one, one)
    assert ops.info_nce(one, one, torch.randn(1, 4)).isfinite()
