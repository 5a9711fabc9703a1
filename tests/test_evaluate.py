"""kNN and linear probes equal brute force and scikit-learn, and leave encoders unchanged."""

from __future__ import annotations

import io
import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from mocofast.config import Config
from mocofast.data.interface import BatchSlice
from mocofast.data.loaders import build_loader
from mocofast.data.sources import ArraySource, Datasets, load_datasets
from mocofast.evaluate import features, knn, linear, logistic
from mocofast.evaluate.features import embed, evaluating, extract
from mocofast.evaluate.knn import few_shot_accuracy, knn_accuracy, label_position
from mocofast.evaluate.linear import LinearConfig, linear_probe
from mocofast.evaluate.logistic import fit_logistic
from mocofast.evaluate.metrics import top_accuracies
from mocofast.evaluate.monitor import KNNMonitor
from mocofast.evaluate.targets import targets_of
from mocofast.models import encoders
from mocofast.models.convolutions import compiled_convolutions
from mocofast.models.pixels import pixel_statistics
from mocofast.settings import ConfigError

CPU = torch.device("cpu")


def clusters(
    samples: int, classes: int, dim: int, seed: int, noise: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Overlapping Gaussian classes: features and labels, for training and for validation.

    There are a third as many validation samples.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    parts: list[Tensor] = []
    for count in (samples, max(1, samples // 3)):
        labels = (torch.arange(count) % classes)[torch.randperm(count, generator=generator)]
        parts += [centres[labels] + noise * torch.randn(count, dim, generator=generator), labels]
    return parts[0], parts[1], parts[2], parts[3]


def brute_force_knn(
    train: NDArray[np.float64],
    labels: NDArray[np.int64],
    val: NDArray[np.float64],
    own: NDArray[np.int64],
    k: int,
    temperature: float,
) -> tuple[float, float]:
    """Loops in float64, written from Wu et al. (2018): top-1 and top-5.

    A class without a vote is not predicted.
    """
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    val = val / np.linalg.norm(val, axis=1, keepdims=True)
    hits = [0, 0]
    for row, label in zip(val, own):
        similarity = train @ row
        votes: dict[int, float] = {}
        for neighbour in np.argsort(-similarity)[:k]:
            c = int(labels[neighbour])
            votes[c] = votes.get(c, 0.0) + float(
                np.exp((similarity[neighbour] - similarity.max()) / temperature)
            )
        ranking = sorted(votes, key=lambda c: -votes[c])
        hits = [hit + (label in ranking[:top]) for hit, top in zip(hits, (1, 5))]
    return hits[0] / len(val), hits[1] / len(val)


@settings(deadline=None, max_examples=100)
@given(
    samples=st.integers(1, 90),
    classes=st.integers(1, 13),  # fewer and more than the five of top-5
    dim=st.integers(2, 20),
    k=st.integers(1, 120),  # also beyond the bank
    temperature=st.floats(0.005, 1.0),
    seed=st.integers(0, 10**6),
)
def test_knn_equals_brute_force_in_float64(
    samples: int, classes: int, dim: int, k: int, temperature: float, seed: int
) -> None:
    train, labels, val, own = clusters(samples, classes, dim, seed)
    top1, top5 = knn_accuracy(train, labels, val, own, k, temperature, num_classes=classes + 1)
    arrays = (train.double().numpy(), labels.numpy(), val.double().numpy(), own.numpy())
    expected = brute_force_knn(*arrays, k, temperature)
    # Float32 similarities may swap neighbours or classes that differ by 1e-7: one sample at most.
    assert abs(top1 - expected[0]) <= 1.001 / len(val)
    assert abs(top5 - expected[1]) <= 1.001 / len(val)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.07), (200, 0.1)])
def test_knn_equals_scikit_learns_weighted_classifier(k: int, temperature: float) -> None:
    train, labels, val, own = clusters(1501, 11, 16, seed=3)
    classifier = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    )
    classifier.fit(train.double().numpy(), labels.numpy())
    share = classifier.predict_proba(val.double().numpy())
    expected_top1 = float((share.argmax(1) == own.numpy()).mean())
    ranked = np.argsort(-share, axis=1)[:, :5]
    voted = np.take_along_axis(share, own.numpy()[:, None], 1)[:, 0] > 0
    expected_top5 = float(((ranked == own.numpy()[:, None]).any(1) & voted).mean())
    top1, top5 = knn_accuracy(train, labels, val, own, k, temperature)
    assert (top1, top5) == pytest.approx((expected_top1, expected_top5), abs=1.001 / len(val))
    assert 0.5 < top1 < 0.99  # the task is neither trivial nor hopeless


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, val, own = clusters(
        331, 7, 8, seed=5
    )  # a prime: the last tile is short both ways
    whole = knn_accuracy(train, labels, val, own, 20)
    nearest = (val @ nn.functional.normalize(train).T).topk(20)
    for columns, k in ((13, 20), (57, 20), (57, 1)):  # columns fewer than k, and many more
        monkeypatch.setattr(knn, "_ROWS", 17)
        monkeypatch.setattr(knn, "_COLUMNS", columns)
        assert knn_accuracy(train, labels, val, own, 20) == whole
        bank = knn._Bank(train, k)
        found = [bank.nearest(rows) for rows in val.split(bank.rows)]
        assert bank.rows == 17
        similarity, order = torch.cat([values for values, _ in found]).sort(1, descending=True)
        index = torch.cat([index for _, index in found]).gather(1, order)
        assert torch.equal(index, nearest.indices[:, :k])
        torch.testing.assert_close(similarity, nearest.values[:, :k])


@settings(deadline=None, max_examples=60)
@given(
    columns=st.integers(1, 700),
    k=st.integers(1, 40),
    distinct=st.integers(1, 50),
    seed=st.integers(0, 10**6),
)
def test_the_largest_values_equal_a_sort(columns: int, k: int, distinct: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Half of the rows have many equal values.
    rows = np.concatenate([rng.normal(size=(3, columns)), rng.integers(0, distinct, (3, columns))])
    k = min(k, columns)
    values, index = knn._largest(torch.from_numpy(rows), k)
    assert np.array_equal(np.sort(values.numpy(), axis=1), np.sort(rows, axis=1)[:, columns - k :])
    assert np.array_equal(np.take_along_axis(rows, index.numpy(), 1), values.numpy())
    assert all(len(set(row)) == k for row in index.tolist())


def test_similarities_take_one_tile_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_TILE", 2**12)
    monkeypatch.setattr(knn, "_COLUMNS", 2**8)
    for count in (1, 100, 256, 5000):
        bank = knn._Bank(torch.zeros(count, 2), 1)
        bank.nearest(torch.zeros(1, 2))
        assert bank.rows == min(512, 2**12 // min(count, 2**8))
        assert bank._own.tile.numel() == bank.rows * min(count, 2**8) <= 2**12


def test_any_number_of_threads_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_FEW", 0)
    monkeypatch.setattr(knn, "_ROWS", 12)
    train, labels, val, own = clusters(331, 7, 8, seed=5)
    table, before, ran = torch.eye(7), torch.get_num_threads(), set()
    nearest = knn._Bank.nearest

    def noted(bank: Any, rows: torch.Tensor) -> Any:
        ran.add(threading.current_thread().name)
        return nearest(bank, rows)

    monkeypatch.setattr(knn._Bank, "nearest", noted)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            shots = knn.few_shot_accuracy(train, labels, val, own, 3, repeats=2)
            votes = knn.knn_votes([(train, labels)], val, 9, 0.1, table)
            found.append((knn_accuracy(train, labels, val, own, 9), shots, votes))
    finally:
        torch.set_num_threads(before)
    # the calling thread, and two threads of the pool at least (a single core has a pool of one)
    assert len(ran) > min(2, os.cpu_count() or 1)
    for accuracy, shots, votes in found[1:]:
        assert (accuracy, shots) == found[0][:2]
        torch.testing.assert_close(votes, found[0][2], equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_features_that_require_grad(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_FEW", 0)
    train, labels, val, own = clusters(331, 7, 8, seed=5)
    cosines = nn.functional.normalize(val) @ nn.functional.normalize(train).T
    hits = (labels[cosines.argmax(1)] == own).double().mean().item()
    train, val = train.requires_grad_(), val.requires_grad_()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        similarity, _ = knn.nearest_labels([(train, labels)], val, 1)
        shots = knn.few_shot_accuracy(train[:7], torch.arange(7), val, own, 1, repeats=1)
        assert knn_accuracy(train, labels, val, own, 1).top1 == pytest.approx(hits)
    finally:
        torch.set_num_threads(before)
    assert not similarity.requires_grad
    torch.testing.assert_close(similarity[:, 0], cosines.amax(1))
    assert shots.mean == pytest.approx((cosines[:, :7].argmax(1) == own).double().mean().item())


def test_an_empty_part_of_the_bank_is_passed_over() -> None:
    train, labels, val, _ = clusters(40, 9, 8, seed=6)
    whole = knn.nearest_labels([(train, labels)], val, 3)
    parts = [(train[:0], labels[:0]), (train[:25], labels[:25]), (train[25:25], labels[25:25])]
    for found, expected in zip(
        knn.nearest_labels([*parts, (train[25:], labels[25:])], val, 3), whole, strict=True
    ):
        torch.testing.assert_close(found, expected)
    similarity, found = knn.nearest_labels(parts[:1], val, 3)
    assert similarity.shape == found.shape == (len(val), 0)


def test_knn_votes_by_similarity_not_by_number() -> None:
    # One very close neighbour of class 0, two distant neighbours of class 1.
    # The close neighbour wins at a low temperature.
    train = torch.tensor([[1.0, 0.05], [0.2, 1.0], [0.2, 1.0]])
    labels, val, own = torch.tensor([0, 1, 1]), torch.tensor([[10.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(train, labels, val, own, k=3, temperature=0.1).top1 == 1.0
    assert knn_accuracy(train, labels, val, own, k=3, temperature=100.0).top1 == 0.0


def test_broken_features_never_look_good() -> None:
    labels = torch.arange(200) % 10
    for broken in (torch.zeros(200, 4), torch.full((200, 4), torch.nan)):
        result = knn_accuracy(broken, labels, broken, labels, 50)
        assert result.top1 <= 0.1
        assert result.top5 <= 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be at least 1 neighbour: got 0"),
        ({"temperature": 0.0}, "temperature must be > 0: got 0.0"),
        ({"num_classes": 3}, "num_classes must exceed every label: got 3, and the labels reach 4"),
        ({"val_features": torch.ones(4, 2)}, "must have the same dimension: got 3 and 2"),
        (
            {"val_features": torch.ones(0, 3), "val_labels": torch.ones(0).long()},
            "val_features must be .* not empty",
        ),
        (
            {"train_labels": torch.zeros(4).long()},
            r"train_labels must hold one label for each of the 5 rows",
        ),
        ({"train_labels": torch.zeros(5)}, "train_labels must be int64: got torch.float32"),
        ({"val_labels": torch.tensor([0, 1, -1, 0])}, "val_labels must not be negative: got -1"),
    ],
)
def test_bad_input_is_an_error_that_names_the_argument(
    change: dict[str, object], message: str
) -> None:
    arguments = {
        "train_features": torch.ones(5, 3),
        "train_labels": torch.arange(5),
        "val_features": torch.ones(4, 3),
        "val_labels": torch.arange(4),
    }
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**{**arguments, **change})  # type: ignore[arg-type]


def test_few_shots_equal_one_nearest_neighbour_for_every_choice() -> None:
    train, labels, val, own = clusters(211, 5, 6, seed=7)
    result = few_shot_accuracy(train, labels, val, own, shots=3, repeats=4, seed=9)
    generator = torch.Generator().manual_seed(9)
    shares = []
    for _ in range(4):
        chosen = []
        for c in range(5):
            members = np.flatnonzero(labels.numpy() == c)
            chosen += list(members[torch.randperm(len(members), generator=generator)[:3].numpy()])
        classifier = KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(
            train[chosen].numpy(), labels[chosen]
        )
        shares.append(classifier.score(val.numpy(), own.numpy()))
    assert result == pytest.approx((np.mean(shares), np.std(shares, ddof=1)), abs=1e-6)
    assert result.std > 0


def test_all_labels_make_few_shots_plain_nearest_neighbours() -> None:
    train, labels, val, own = clusters(60, 6, 4, seed=11)
    result = few_shot_accuracy(train, labels, val, own, shots=10, repeats=3)
    expected = knn_accuracy(train, labels, val, own, k=1).top1
    assert result == pytest.approx((expected, 0), abs=1e-9)  # every choice is the whole bank
    assert expected > 1 / 6


def test_too_few_examples_of_a_class_are_named() -> None:
    train, val = torch.randn(9, 3), torch.randn(2, 3)
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 7, 7, 7])
    with pytest.raises(ValueError, match="got 3, and class 2 has 2"):
        few_shot_accuracy(train, labels, val, torch.tensor([0, 2]), shots=3)
    with pytest.raises(ValueError, match="shots must be at least 1: got 0"):
        few_shot_accuracy(train, labels, val, torch.tensor([0, 2]), shots=0)


def test_of_equal_scores_the_lower_class_comes_first_and_nan_comes_last() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [torch.nan] * 3, [0.0, 0.0, 0.0]])
    positions = label_position(scores, torch.tensor([1, 2, 0, 2]))
    assert positions.tolist() == [0, 1, torch.iinfo(torch.int64).max, 2]


def images_of(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy images, whose brightness is the class: (N, 3, 8, 8) uint8, and labels of 4 classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, samples)
    pixels = np.clip(
        60 * labels[:, None, None, None] + rng.normal(30, 20, (samples, 3, 8, 8)), 0, 255
    )
    return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels)


def batches_of(
    images: Tensor, labels: Tensor | None, size: int
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    for rows in torch.arange(len(images)).split(size):
        yield images[rows], None if labels is None else labels[rows], rows


def tiny_encoder() -> nn.Module:
    torch.manual_seed(0)
    return encoders.build_encoder("resnet_tiny")(num_classes=5)


MEAN, STD = torch.tensor([120.0, 110.0, 100.0]), torch.tensor([60.0, 50.0, 40.0])


@pytest.mark.parametrize(("kind", "dim"), [("backbone", 64), ("output", 5)])
def test_features_equal_a_plain_forward_in_eval_mode(kind: str, dim: int) -> None:
    encoder = tiny_encoder()
    images, labels = images_of(23)  # batches of 10, 10 and 3
    features, found = extract(encoder, batches_of(images, labels, 10), CPU, kind, MEAN, STD)
    head = encoder.fc
    encoder.eval()
    if kind == "backbone":
        encoder.fc = nn.Identity()
    with torch.no_grad():
        expected = encoder((images.float() - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))
    encoder.fc = head
    assert features.shape == (23, dim)
    assert features.dtype == torch.float32
    # Batches of another size may sum convolutions in another order: float32 rounding of 7 layers.
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, labels)
    assert not features.requires_grad


@pytest.mark.parametrize("kind", ["backbone", "output"])
def test_batches_computed_at_the_same_time_give_equal_bits(kind: str) -> None:
    encoder = tiny_encoder().train()
    images, labels = images_of(97)
    plain = extract(encoder, batches_of(images, labels, 5), CPU, kind, MEAN, STD)
    threads = torch.get_num_threads()
    found = extract(encoder, batches_of(images, labels, 5), CPU, kind, MEAN, STD, at_once=3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain))
    assert encoder.training
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="batches must carry labels"):
        extract(encoder, batches_of(images, None, 5), CPU, kind, MEAN, STD, at_once=3)


@pytest.mark.parametrize("at_once", [1, 2])
def test_features_in_autocast_are_those_of_a_forward_in_bf16(at_once: int) -> None:
    encoder = tiny_encoder().eval()
    images, labels = images_of(24)
    autocast = torch.autocast("cpu", torch.bfloat16)
    found, _ = extract(
        encoder,
        batches_of(images, labels, 24),
        CPU,
        "output",
        MEAN,
        STD,
        autocast=autocast,
        at_once=at_once,
    )
    exact, _ = extract(encoder, batches_of(images, labels, 24), CPU, "output", MEAN, STD)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), compiled_convolutions(encoder):
        expected = encoder((images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))
    assert expected.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


def test_batches_at_once_take_the_cores_that_one_batch_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features, "count_workers", lambda asked: 8 if asked == -1 else asked)
    for threads, workers, expected in ((4, -1, 2), (8, -1, 1), (1, -1, 4), (2, 3, 3), (4, 0, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert features.batches_at_once(workers, CPU) == expected
    assert features.batches_at_once(-1, torch.device("cuda")) == 1


def test_a_missing_monitor_has_a_reason() -> None:
    datasets, config = bright_datasets()
    assert KNNMonitor.missing(datasets, config) == ""
    assert KNNMonitor.missing(datasets._replace(val=None), config) == "no images are held out"
    config.data.target = "value"
    assert KNNMonitor.missing(datasets, config) == "the labels are no classes"
    assert KNNMonitor.of(datasets, config, CPU) is None
    unlabelled = ArraySource(np.zeros((4, 8, 8, 3), np.uint8), None, ())
    assert KNNMonitor.missing(datasets._replace(train=unlabelled), config) == "no labels"


def test_the_monitor_takes_images_of_another_size() -> None:
    datasets, config = bright_datasets()
    config.knn.size = 5
    monitor = KNNMonitor.of(datasets, config, CPU)
    seen = []
    encoder = tiny_encoder()
    encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[2:]))
    assert monitor is not None and monitor.evaluate(encoder)["knn_top1"] > 0
    assert set(seen) == {(5, 5)}
    config.model.arch = "vit_tiny_cifar"
    with pytest.raises(ConfigError, match=r"knn\.size: expected 0 for model\.arch vit_"):
        KNNMonitor.of(datasets, config, CPU)


def test_the_monitor_computes_features_in_a_precision_of_its_own() -> None:
    datasets, config = bright_datasets()
    seen = []
    encoder = tiny_encoder()
    encoder.conv1.register_forward_hook(lambda *passed: seen.append(passed[2].dtype))
    for precision in ("train", "bf16"):
        config.knn.precision = precision
        monitor = KNNMonitor.of(datasets, config, CPU)
        assert monitor is not None and monitor.evaluate(encoder)["knn_top1"] > 0
    assert set(seen) == {torch.float32, torch.bfloat16}


def test_the_monitor_shows_its_progress_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets, config = bright_datasets()
    monitor = KNNMonitor.of(datasets, config, CPU)
    assert monitor is not None
    for terminal in (True, False):
        shown = io.StringIO()
        monkeypatch.setattr(shown, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stderr", shown)
        monitor.evaluate(tiny_encoder())
        bars = set(re.findall(r"kNN (\w+): +0%", shown.getvalue()))
        assert bars == ({"bank", "queries"} if terminal else set())


def test_the_monitor_classifies_a_fixed_random_part_of_the_queries() -> None:
    datasets, config = bright_datasets()
    assert datasets.val is not None
    assert datasets.val.labels is not None
    monitor = KNNMonitor.of(datasets, config, CPU)
    assert monitor is not None
    whole = monitor.evaluate(tiny_encoder())
    assert len(monitor.val) == 60
    for queries in (60, 10**6):
        config.knn.queries = queries
        again = KNNMonitor.of(datasets, config, CPU)
        assert again is not None
        assert again.evaluate(tiny_encoder()) == whole
    config.knn.queries = 17
    capped, same = (KNNMonitor.of(datasets, config, CPU) for _ in range(2))
    assert capped is not None
    assert same is not None
    assert len(capped.val) == 17
    names = [capped.val.name(i) for i in range(17)]
    assert names == [same.val.name(i) for i in range(17)]
    assert names != [datasets.val.name(i) for i in range(17)]
    assert len(set(names)) == 17
    # Independently: the accuracy of plain features over the chosen images.
    chosen = [int(name.rpartition(" ")[2]) for name in names]
    parts = []
    for source in (datasets.train, datasets.val):
        assert isinstance(source, ArraySource)
        pixels = torch.from_numpy(source.images).permute(0, 3, 1, 2)
        statistics = pixel_statistics(config.augment)
        with torch.no_grad():
            parts.append(embed(tiny_encoder().eval(), pixels, *statistics, "backbone"))
            parts.append(torch.from_numpy(np.asarray(source.labels)))
    train, labels, val, own = parts
    expected = knn_accuracy(train, labels, val[chosen], own[chosen])
    assert capped.evaluate(tiny_encoder())["knn_top1"] == expected.top1


def test_every_submodule_gets_its_own_mode_back_even_after_an_error() -> None:
    encoder = tiny_encoder().train()
    encoder.get_submodule("layer1").eval()  # a partly frozen encoder
    modes = [part.training for part in encoder.modules()]
    statistics = {name: value.clone() for name, value in encoder.state_dict().items()}
    images, labels = images_of(6)
    extract(encoder, batches_of(images, labels, 4), CPU, "backbone", MEAN, STD)
    assert [part.training for part in encoder.modules()] == modes
    with evaluating(encoder):
        assert not any(part.training for part in encoder.modules())
    with pytest.raises(ValueError, match="labels"):
        extract(encoder, batches_of(images, None, 4), CPU, "backbone", MEAN, STD)
    assert [part.training for part in encoder.modules()] == modes
    assert all(torch.equal(value, statistics[name]) for name, value in encoder.state_dict().items())


def test_extraction_errors_name_the_argument() -> None:
    encoder = tiny_encoder()
    images, labels = images_of(4)
    with pytest.raises(ValueError, match="kind must be 'backbone' or 'output': got 'head'"):
        extract(encoder, batches_of(images, labels, 4), CPU, "head", MEAN, STD)
    with pytest.raises(ValueError, match="batches must carry labels"):
        extract(encoder, batches_of(images, None, 4), CPU, "output", MEAN, STD)
    with pytest.raises(ValueError, match="none of the images to evaluate can be decoded"):
        extract(encoder, [], CPU, "output", MEAN, STD)


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_logistic_regression_equals_scikit_learns(
    l2: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, labels, val, _ = clusters(301, 5, 9, seed=13)
    monkeypatch.setattr(logistic, "_ROWS", 128)  # several blocks, the last one short
    weight, bias = fit_logistic(train, labels, 5, l2)
    theirs = LogisticRegression(C=1 / (len(train) * l2), tol=1e-10, max_iter=10000)
    theirs.fit(train.double().numpy(), labels.numpy())
    share = (val @ weight.T + bias).softmax(1).numpy()
    # The optimum is flat to second order: gradients below 1e-6 leave shares within 1e-3.
    np.testing.assert_allclose(share, theirs.predict_proba(val.double().numpy()), atol=1e-3)
    np.testing.assert_allclose(weight.numpy(), theirs.coef_, atol=0.01 * np.abs(theirs.coef_).max())


def test_the_strength_that_is_best_on_the_held_out_tenth_is_refitted_on_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    train, labels, val, own = clusters(
        400, 5, 90, seed=17, noise=4.0
    )  # few samples, many dimensions: they overfit
    scale = torch.logspace(
        -2, 2, 90
    )  # features of very different sizes, which standardising makes equal
    with caplog.at_level("INFO", "mocofast"):
        targets = targets_of(("a", "b", "c", "d", "e"), "class")
        probe = linear._fast(train * scale + 7, labels, val * scale + 7, own, targets, seed=3)
    swept = [cast(tuple[float, float], record.args) for record in caplog.records]
    assert [l2 for l2, _ in swept] == list(linear.STRENGTHS)
    best = max(accuracy for _, accuracy in swept)
    assert probe.l2 == next(l2 for l2, accuracy in swept if accuracy == best)
    assert probe.l2 is not None
    assert best > swept[-1][1]
    theirs = make_pipeline(
        StandardScaler(), LogisticRegression(C=1 / (400 * probe.l2), tol=1e-8, max_iter=10000)
    )
    theirs.fit((train * scale + 7).double().numpy(), labels.numpy())
    expected = theirs.score((val * scale + 7).double().numpy(), own.numpy())
    # One sample may lie on the border: the fit ends at a small gradient.
    top1 = top_accuracies(probe.scores, own)[0]
    assert top1 == pytest.approx(expected, abs=1.001 / len(val))
    # Weights are for features as they come.
    scores = (val * scale + 7) @ probe.weight.T + probe.bias
    torch.testing.assert_close(scores, probe.scores, rtol=1e-4, atol=1e-3)


def bright_datasets(seed: int = 0) -> tuple[Datasets, Config]:
    """Images in memory and a configuration of small views, one process."""
    parts = []
    for samples in (160, 60):
        images, labels = images_of(samples, seed + samples)
        classes = ("dark", "dim", "light", "bright")
        parts.append(ArraySource(images.permute(0, 2, 3, 1).numpy(), labels.numpy(), classes))
    config = Config()
    config.model.arch, config.augment.size = "resnet_tiny", 8
    config.data.source, config.data.workers = "digits", 0
    return Datasets(parts[0], parts[1], "made for a test"), config


def test_the_fast_probe_learns_and_chooses_its_strength_on_training_images(
    caplog: pytest.LogCaptureFixture,
) -> None:
    datasets, config = bright_datasets()
    encoder = tiny_encoder().train()
    with caplog.at_level("INFO", "mocofast"):
        result = linear_probe(encoder, datasets, config, LinearConfig(), CPU)
    assert result.top1 > 0.9
    assert result.top5 == 1.0  # of four classes
    assert result.l2 in linear.STRENGTHS
    assert len(caplog.messages) == len(linear.STRENGTHS)
    assert encoder.training
    assert linear_probe(encoder, datasets, config, LinearConfig(), CPU) == result  # reproducible


def test_the_validation_images_have_no_part_in_the_choice() -> None:
    datasets, config = bright_datasets()
    assert isinstance(datasets.val, ArraySource)
    assert datasets.val.labels is not None
    wrong = ArraySource(
        datasets.val.images, np.asarray(3 - datasets.val.labels), datasets.val.classes
    )
    right = linear_probe(tiny_encoder(), datasets, config, LinearConfig(), CPU)
    fooled = linear_probe(tiny_encoder(), datasets._replace(val=wrong), config, LinearConfig(), CPU)
    assert (fooled.l2, fooled.train_top1) == (right.l2, right.train_top1)
    assert fooled.top1 < 0.1


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("step", [0.5, 0.5, 0.05, 0.005]),
        ("cosine", [0.25 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]),  # MoCo v3's
    ],
)
def test_the_reference_protocol_follows_sgd_with_its_schedule(
    schedule: str, rates: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against an independent loop over the same batches, in float64."""
    datasets, config = bright_datasets()
    options = LinearConfig(
        protocol="reference", epochs=4, lr=0.5, batch_size=48, milestones=(2, 3), schedule=schedule
    )
    encoder = tiny_encoder().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    heads: list[tuple[Tensor, Tensor]] = []
    scores_of = linear._scores

    def recorded(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        heads.append((weight.detach().clone(), bias.detach().clone()))
        return scores_of(features, weight, bias)

    monkeypatch.setattr(linear, "_scores", recorded)
    result = linear_probe(encoder, datasets, config, options, CPU)

    encoder.eval()
    view = replace(config.augment, crop_scale=(0.08, 1.0), jitter=(0.0, 0.0, 0.0, 0.0), gray=0.0)
    loader = build_loader(
        datasets.train, config.data, (view,), BatchSlice(48, drop_last=False), 0, CPU
    )
    mean, std = pixel_statistics(config.augment)
    weight = (
        torch.empty(4, 64).normal_(0, 0.01, generator=torch.Generator().manual_seed(0)).double()
    )
    bias = torch.zeros(4, dtype=torch.float64)
    momentum_w, momentum_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for epoch, rate in enumerate(rates):
        sizes, hits = [], 0
        for batch in loader.epoch(epoch):
            assert batch.labels is not None
            with torch.no_grad():
                x = embed(encoder, batch.views[0], mean, std, "backbone").double()
            error = (x @ weight.T + bias).softmax(1)
            hits += int((error.argmax(1) == batch.labels).sum())
            error[torch.arange(len(x)), batch.labels] -= 1
            error /= len(x)
            momentum_w = 0.9 * momentum_w + error.T @ x
            momentum_b = 0.9 * momentum_b + error.sum(0)
            weight, bias = weight - rate * momentum_w, bias - rate * momentum_b
            sizes.append(len(x))
        # Float32 against float64 over at most 16 steps.
        torch.testing.assert_close(heads[epoch][0].double(), weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads[epoch][1].double(), bias, rtol=1e-4, atol=1e-5)
        assert sizes == [48, 48, 48, 16]  # the last, smaller batch is not dropped
    loader.close()
    assert isinstance(datasets.val, ArraySource)
    assert datasets.val.labels is not None
    pixels = torch.from_numpy(datasets.val.images).permute(0, 3, 1, 2)
    with torch.no_grad():
        scores = embed(encoder, pixels, mean, std, "backbone").double() @ weight.T + bias
    top1 = float((scores.argmax(1).numpy() == datasets.val.labels).mean())
    # One sample may lie on the border to float32 rounding.
    assert result.top1 == pytest.approx(top1, abs=1.001 / 60)
    assert result.train_top1 == pytest.approx(hits / 160, abs=1.001 / 160)
    assert result.top5 == 1.0
    assert result.l2 is None
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_a_diverged_probe_is_wrong_and_not_right() -> None:
    datasets, config = bright_datasets()
    options = LinearConfig(protocol="reference", epochs=2, lr=1e38, batch_size=160)
    assert linear_probe(tiny_encoder(), datasets, config, options, CPU).top1 <= 0.5


def test_an_encoder_that_changes_is_noticed() -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_encoder()
            self.fc = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.inner.fc.bias.data += 1  # type: ignore[union-attr, operator]
            return self.fc(self.inner(x))

    datasets, config = bright_datasets()
    with pytest.raises(RuntimeError, match=r"inner.fc.bias of the frozen encoder changed"):
        linear_probe(Restless(), datasets, config, LinearConfig(), CPU)


def test_a_probe_without_labels_or_held_out_images_says_what_is_needed() -> None:
    datasets, config = bright_datasets()
    with pytest.raises(
        ConfigError, match=r"needs labelled images, some of them held out .* got made for a test"
    ):
        linear_probe(tiny_encoder(), datasets._replace(val=None), config, LinearConfig(), CPU)
    with pytest.raises(
        ConfigError, match=r"linear.protocol: expected fast, reference or moco_v3, got 'quick'"
    ):
        linear_probe(tiny_encoder(), datasets, config, LinearConfig(protocol="quick"), CPU)


@pytest.mark.data
@pytest.mark.parametrize("loader", ["torchvision", "dali"])
@pytest.mark.parametrize("protocol", ["fast", "reference"])
def test_jpeg_files_are_probed_through_either_loader(
    loader: str, protocol: str, cifar10_jpeg: Path, tmp_path: Path
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    for split, count in (("train", 41), ("test", 11)):
        for folder in sorted((cifar10_jpeg / split).iterdir())[:3]:
            (tmp_path / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                (tmp_path / split / folder.name / image.name).symlink_to(image)
    config = Config()
    config.data.path, config.data.loader, config.data.workers = str(tmp_path), loader, 1
    config.augment.size = 32
    datasets = load_datasets(config.data)
    options = LinearConfig(protocol=protocol, epochs=6, lr=0.1, batch_size=32, milestones=(5,))
    result = linear_probe(tiny_encoder(), datasets, config, options, CPU)
    # Three classes, 33 images: random weights see colours, which is worth more than chance (0.33).
    assert result.top1 > 0.4
    assert result.top5 == 1.0
