"""The evaluation of the untrained encoder is left out where it would take too long."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from mocofast_bench.processes import on_ranks
from torch import Tensor

from mocofast import settings
from mocofast.data.sources import load_datasets
from mocofast.evaluate.features import EvaluationStopped, EvaluationTooLongError
from mocofast.evaluate.monitor import KNNMonitor, _Forecast
from mocofast.models.encoders import TinyResNet
from mocofast.train import estimate
from mocofast.train.run import train

CPU = torch.device("cpu")


def monitor() -> KNNMonitor:
    config = settings.load_recipe("digits")
    made = KNNMonitor.of(load_datasets(config.data, 0), config, CPU)
    assert made is not None
    return made


def test_a_run_leaves_out_a_long_evaluation_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, **options: object) -> list[dict[str, object]]:
        config = settings.load_recipe("digits")
        settings.apply(config, {"train.dir": str(tmp_path / name), "train.epochs": 1})
        settings.apply(config, {f"knn.{key}": value for key, value in options.items()})
        result = train(config)
        assert bool(result.before) == (name == "no limit")
        assert result.after["knn_top1"] > 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    # A limit that no evaluation keeps. The second run asks for no evaluation.
    limited = run("limited", start_limit=1e-9)
    said = capsys.readouterr().out
    assert re.search(r"no kNN before training: it would take about \d+ s \(knn\.start_limit: "
                     r"1e-09 s\)", said)  # fmt: skip
    assert "after:  kNN accuracy" in said
    without = run("without", start=False)
    assert run("no limit", start_limit=0)[0]["step"] == 0

    def figures(rows: list[dict[str, object]]) -> list[object]:
        return [(row["step"], row.get("loss"), row.get("knn_top1")) for row in rows]

    assert figures(limited) == figures(without)


def test_only_a_clear_forecast_ends_an_evaluation() -> None:
    assert monitor().evaluate(TinyResNet(8), limit=3600)["knn_top1"] > 0
    with pytest.raises(EvaluationTooLongError) as caught:
        monitor().evaluate(TinyResNet(8), limit=1e-6)
    assert 0 < caught.value.seconds < 600


def test_a_known_time_ends_an_evaluation_before_it_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    knn = monitor()
    monkeypatch.setattr("mocofast.evaluate.monitor.batches_at_once", lambda *_: 2)
    computed: list[Tensor] = []
    encoder = TinyResNet(8)
    encoder.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0]))
    images = len(knn.train) + len(knn.val)
    for seconds, computes in ((4.1 * 3600, False), (3.9 * 3600, True)):
        forward = 2 * seconds / images  # two batches at a time
        if computes:
            assert knn.evaluate(encoder, limit=3600, forward=forward)["knn_top1"] > 0
        else:
            with pytest.raises(EvaluationTooLongError) as caught:
                knn.evaluate(encoder, limit=3600, forward=forward)
            assert caught.value.seconds == pytest.approx(seconds)
        assert bool(computed) == computes


def test_a_run_knows_the_time_of_an_evaluation_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[float] = []

    def evaluate(*given: object) -> dict[str, float]:
        known.append(given[4])
        return {"knn_top1": 0.5}

    monkeypatch.setattr(estimate, "seconds_per_sample", lambda *_: 12.0)
    monkeypatch.setattr(KNNMonitor, "evaluate", evaluate)
    config = settings.load_recipe("digits")
    settings.apply(config, {"train.dir": str(tmp_path), "train.max_steps": 1})
    train(config)
    # A forward pass of two, and the two passes of a backward pass: a forward pass is a quarter.
    assert known[0] == 3


@pytest.mark.parametrize(
    ("seconds", "ends_after"),
    [
        ([5.0] + [0.1] * 199, 200),  # a slow start, as of a GPU: 25 s in all
        ([5.0] + [1.0] * 199, 2),  # 204 s in all
        ([30.0] + [0.1] * 199, 1),  # the first batches cannot wait for the others
    ],
)
def test_the_start_of_an_evaluation_is_no_forecast_of_the_rest(
    seconds: list[float], ends_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    forecast = _Forecast(200 * 256, limit=60)
    image = torch.zeros(256, 1), None, torch.arange(256)
    done, predicted = 0, math.inf
    try:
        for done, _ in enumerate(forecast.of([image] * 200, at_once=1, world_size=1), 1):
            now += seconds[done - 1]
    except EvaluationTooLongError as error:
        predicted = error.seconds
    assert done == ends_after and predicted > 60


def ended_by(rank: int) -> list[str]:
    """Returns what ended the evaluations: rank 1 alone has a limit, then rank 0 also a signal."""
    names = []
    for stops in (False, True):
        limit = 1e-6 if rank == 1 else math.inf
        try:
            stopped = partial(bool, stops and rank == 0)
            monitor().evaluate(TinyResNet(8), stopped, limit)
            names.append("nothing")
        except (EvaluationStopped, EvaluationTooLongError) as error:
            names.append(type(error).__name__)
    return names


def test_all_ranks_end_together_and_a_signal_comes_first() -> None:
    for names in on_ranks(ended_by):
        assert names == ["EvaluationTooLongError", "EvaluationStopped"]
