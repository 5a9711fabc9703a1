"""Signals equal independent formulas, and verdicts name what they were made for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mocofast_bench import health_drill

from mocofast import settings
from mocofast.config import Config
from mocofast.data.folders import FolderSource
from mocofast.data.sources import ArraySource
from mocofast.health.facts import count_copies
from mocofast.health.leak import leak_test
from mocofast.health.signals import (
    Snapshot,
    drift,
    of_embeddings,
    of_views,
    sample_of,
    weights_of,
)
from mocofast.health.verdict import Evidence, diagnose, verdict
from mocofast.health.watch import read_signals
from mocofast.methods.build import build_method
from mocofast.train.engine import Engine
from mocofast.train.optimizer import optimizer_of
from tests.test_run_files import run


def test_signals_of_embeddings_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 40, 16)) + 0.5
    found = of_embeddings(torch.tensor(3 * q), torch.tensor(k))
    q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, k))
    p = np.linalg.svd(q, compute_uv=False)
    p /= p.sum()
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    expected = {
        "embedding_std": q.std(0).mean() * math.sqrt(16),
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "alignment": np.mean([((a - b) ** 2).sum() for a, b in zip(q, k)]),
        "uniformity": np.log(np.mean([np.exp(-2 * ((q[i] - q[j]) ** 2).sum()) for i, j in pairs])),
        "positive_similarity": np.mean((q * k).sum(1)),
        "negative_similarity": np.mean([q[i] @ k[j] for i, j in pairs]),
    }
    assert found == pytest.approx(expected, abs=1e-9)
    assert of_embeddings(torch.full((4, 2), math.nan), torch.ones(4, 2)) == {}


def test_signals_of_views_tell_easy_and_flat_views_apart() -> None:
    noise = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.full((3, 1, 1), 127.5), torch.full((3, 1, 1), 73.6)
    same = of_views(noise, noise, mean, std)
    assert (same["same_views"], same["easy_views"], same["flat_views"]) == (1, 1, 0)
    assert same["pixel_mean"] == pytest.approx(0, abs=0.02)
    assert same["pixel_std"] == pytest.approx(1, abs=0.02)
    other = of_views(noise, noise.flip(0), mean, std)
    assert (other["same_views"], other["easy_views"]) == (0, 0)
    gray = torch.full((4, 3, 8, 8), 90, dtype=torch.uint8)
    assert of_views(gray, None, mean, std)["flat_views"] == 1
    # Deep pixels have the same scale.
    deep = of_views((noise.int() * 257).to(torch.uint16), None, mean, std)
    assert deep["pixel_std"] == pytest.approx(same["pixel_std"], abs=1e-4)


def test_drift_is_the_distance_of_old_and_new_keys_in_deviations() -> None:
    ahead = torch.eye(8)[:1]
    q = ahead + 0.1 * torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    assert drift(q, ahead, ahead) == pytest.approx(0, abs=1e-6)
    # Similarities are near 1 and -1, and their deviation is 1.
    assert drift(q, ahead, -ahead) == pytest.approx(2, abs=0.05)


def test_samples_of_weights_belong_together() -> None:
    method = build_method(settings.load_recipe("digits"))
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert torch.equal(sample_of(method.encoder_q), sample_of(method.encoder_k))
    before = sample_of(method.encoder_q)
    with torch.no_grad():
        for p in method.encoder_q.parameters():
            p.mul_(2)
    torch.testing.assert_close(sample_of(method.encoder_q), 2 * before)


def test_the_leak_test_leaves_the_method_alone() -> None:
    config = settings.load_recipe("digits")
    settings.apply(config, {"model.bn_splits": 4})
    method = build_method(config)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    views = torch.randint(0, 256, (2, 32, 3, 8, 8), dtype=torch.uint8)
    found = leak_test(method, views)
    assert found.keys() == {"acc1_as_trained", "acc1_shuffled"}
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert leak_test(build_method(settings.load_recipe("digits")), views) == {}


def test_a_captured_step_leaves_the_same_signals() -> None:
    """On a CPU, `graph` runs the step on the fixed buffers that a CUDA graph would read."""
    config = settings.load_recipe("digits")
    views = tuple(torch.randint(0, 256, (2, 32, 3, 8, 8), dtype=torch.uint8))
    found = []
    for mode in ("eager", "graph"):
        torch.manual_seed(0)
        method = build_method(config)
        before = weights_of(method)
        optimizer = optimizer_of(method, config.optim)
        autocast = torch.autocast("cpu", enabled=False)
        engine = Engine(mode, method, optimizer, autocast, 1, 32, backend=None)
        engine.set_scheduled(0, 10, 0.1)
        metrics = engine.step(views)
        found.append(Snapshot(method, views, metrics.pair).signals(before, 1))
    assert {"effective_rank", "queue_drift", "gradient_norm"} <= found[0].keys()
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)


def test_a_run_that_may_leak_is_tested_for_it(tmp_path: Path) -> None:
    options = {"model.bn_splits": 32, "model.shuffle_bn": False}
    run(tmp_path, 2, **options)
    _, (first, second) = read_signals(tmp_path)
    assert "acc1_shuffled" not in first
    assert {"acc1_as_trained", "acc1_shuffled"} <= second.keys()


@pytest.mark.slow
def test_faults_are_named_and_healthy_runs_are_left_alone() -> None:
    assert health_drill.main(["--seeds", "1"]) == 0


def test_copies_are_counted(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    images[20:] = images[:10]
    assert count_copies(ArraySource(images, None, ())) == (30, 10)


def test_a_file_with_several_captions_is_no_copy(tmp_path: Path) -> None:
    for name in ("a", "b", "copy"):
        (tmp_path / name).write_bytes(b"b" if name == "copy" else name.encode())
    assert count_copies(FolderSource(tmp_path, ["a", "a", "a", "b", "copy"])) == (3, 1)


def evidence(config: Config | None = None, **line: Any) -> Evidence:
    """Returns ten equal log lines of a healthy run, with the given changes."""
    healthy = {
        **{"loss": 5.0, "chance_loss": 6.9, "pixel_mean": 0.1, "pixel_std": 0.9},
        **{"flat_views": 0.0, "same_views": 0.0, "easy_views": 0.1, "embedding_std": 0.9},
        **{"effective_rank": 20.0, "weight_change": 2e-3, "key_change": 1e-3, "key_distance": 0.1},
    }
    facts = {"images": 1438, "queue": 1024, "held_out": 359, "chance_knn": 0.1}
    lines = [{"step": 110 * i, "epoch": 10.0 * i, **healthy, **line} for i in range(1, 11)]
    config = config or settings.load_recipe("digits")
    return Evidence(config, facts, lines, {"knn_top1": 0.88}, {"knn_top1": 0.97})


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("diverged", {"loss": None}),
        ("normalisation", {"pixel_std": 200.0}),
        ("constant images", {"flat_views": 0.9, "pixel_std": 0.0}),
        ("augmentation off", {"same_views": 1.0, "easy_views": 1.0}),
        ("frozen key encoder", {"key_change": 0.0}),
        ("stale queue", {"key_distance": 0.0}),
        ("stale queue", {"queue_drift": 1.5}),
        (
            "rate too high",  # which also makes keys of different encoders
            {"weight_change": 0.05, "loss": 6.93, "effective_rank": 1.5, "queue_drift": 1.5},
        ),
        ("rate too low", {"weight_change": 1e-4}),
        ("BatchNorm leak", {"acc1_as_trained": 0.9, "acc1_shuffled": 0.1}),
        ("collapse", {"embedding_std": 0.01, "effective_rank": 1.1}),
    ],
)
def test_a_verdict_names_the_fault(name: str, line: dict[str, Any]) -> None:
    config = settings.load_recipe("digits")
    config.model.momentum = 0.0
    found = diagnose(evidence(config, **line))
    assert found[0].name == name
    assert verdict(evidence(config, **line)).startswith(found[0].title)


def test_a_healthy_run_and_a_young_run_raise_no_alarm() -> None:
    assert verdict(evidence()).startswith("healthy")
    flat = evidence()._replace(before={"knn_top1": 0.8}, after={"knn_top1": 0.79})
    assert verdict(flat).startswith("no gain yet: nothing wrong was noticed, train longer")
    assert "kNN accuracy 79.0% (random weights: 80.0%)" in verdict(flat)
    flat.facts["pretrained"] = True
    assert "(weights before: 80.0%)" in verdict(flat)
    # Single steps of a random walk make the measured lag short. The momentum says better.
    assert diagnose(evidence(key_distance=0.0, queue_drift=0.6)) == []
    # Queries part from the random start of the queue within the first lines.
    early = evidence(queue_drift=0.3)
    for line in early.lines[:3]:
        line["queue_drift"] = 1.2  # type: ignore[index]
    assert diagnose(early) == []
    # A short run cannot move its weights far.
    assert [finding.name for finding in diagnose(evidence(weight_change=1e-4))] == ["rate too low"]
    short = evidence(weight_change=1e-4)
    lines = [{**line, "step": 28 * i} for i, line in enumerate(short.lines, 1)]
    assert diagnose(short._replace(lines=lines)) == []
    young = evidence()._replace(lines=evidence().lines[:2])
    assert verdict(young).startswith("too early")


def test_facts_name_the_fault() -> None:
    healthy = evidence()
    for name, facts in (
        ("queue beyond the set", {"queue": 4096}),
        ("duplicate images", {"looked_at": 1438, "copies": 1400}),
    ):
        found = diagnose(healthy._replace(facts={**healthy.facts, **facts}))
        assert [finding.name for finding in found] == [name]
    shuffled = healthy._replace(before={"knn_top1": 0.11}, after={"knn_top1": 0.12})
    assert [finding.name for finding in diagnose(shuffled)] == ["labels"]
    few = {**shuffled.facts, "held_out": 6}  # guesses spread wider than features of any use
    assert diagnose(shuffled._replace(facts={**few, "chance_knn": 1 / 3})) == []
    # 6 and 5 of 30 images, where guesses get 3 on average: good labels may give that.
    thirty = shuffled._replace(before={"knn_top1": 6 / 30}, after={"knn_top1": 5 / 30})
    assert diagnose(thirty._replace(facts={**thirty.facts, "held_out": 30})) == []
    # Two classes: 69 of 100 is far above guessing.
    pairs = shuffled._replace(before={"knn_top1": 0.6}, after={"knn_top1": 0.69})
    facts = {**pairs.facts, "held_out": 100, "chance_knn": 0.5}
    assert diagnose(pairs._replace(facts=facts)) == []
    guesses = pairs._replace(after={"knn_top1": 0.55}, facts=facts)
    assert [finding.name for finding in diagnose(guesses)] == ["labels"]


def test_a_run_writes_views_signals_and_a_verdict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "whole", 5)
    assert (tmp_path / "whole" / "views.png").exists()
    facts, lines = read_signals(tmp_path / "whole")
    assert facts["images"] == 1438 and [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert {"effective_rank", "gradient_norm", "key_change"} <= lines[-1].keys()
    assert "verdict: " in (tmp_path / "whole" / "train.log").read_text()
    # A continued run has the same lines, but for changes since a line that it has not seen.
    run(tmp_path / "parts", 3)
    run(tmp_path / "parts", 5, "auto")
    _, parts = read_signals(tmp_path / "parts")
    assert [line["step"] for line in parts] == [1, 2, 3, 4, 5]
    assert parts[-1]["effective_rank"] == lines[-1]["effective_rank"]
    with (tmp_path / "parts" / "signals.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6})[:5])
    assert len(read_signals(tmp_path / "parts")[1]) == 5
