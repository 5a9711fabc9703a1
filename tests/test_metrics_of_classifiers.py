"""Figures of classifiers against their definitions, kNN of any bank, and rates by layer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics
from torch import Tensor, nn

from mocofast import cli
from mocofast.config import Config, ConfigError, DataConfig, OptimConfig
from mocofast.data.sources import ArraySource, Datasets, load_datasets
from mocofast.evaluate import search as search_module
from mocofast.evaluate.finetune import FinetuneConfig, finetune, train_classifier
from mocofast.evaluate.knn import knn_accuracy, knn_votes
from mocofast.evaluate.layers import add_drop_path, optimizer_of
from mocofast.evaluate.linear import LinearConfig, fit_probe
from mocofast.evaluate.metrics import measure, top_accuracies
from mocofast.evaluate.options import of_protocol
from mocofast.evaluate.search import search
from mocofast.evaluate.targets import targets_of
from mocofast.models.encoders import build_encoder
from mocofast.optim.schedule import set_learning_rate
from tests.test_evaluate import CPU, bright_datasets, clusters, tiny_encoder


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_figures_of_classes_follow_their_definitions() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 300, p=[0.7, 0.2, 0.1, 0.0])  # class 3 does not occur
    scores = rng.normal(size=(300, 4)) + 1.2 * np.eye(4)[labels]
    targets = targets_of(("a", "b", "c", "d"), "class")
    found = measure(torch.tensor(scores).float(), torch.tensor(labels), targets, 500, seed=0)
    predicted = scores.argmax(1)
    recalls = [(predicted[labels == c] == c).mean() for c in range(3)]
    assert found["top1"] == pytest.approx((predicted == labels).mean())
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    low, high = found["intervals"]["balanced_accuracy"]
    resample = np.random.default_rng(0)
    chosen = [resample.integers(0, 300, 300) for _ in range(500)]
    wanted = [metrics.balanced_accuracy_score(labels[i], predicted[i]) for i in chosen]
    assert (low, high) == pytest.approx(np.percentile(wanted, [2.5, 97.5]), abs=1e-6)
    # AUROC: the share of pairs (one of the class, one of the rest) in the right order.
    areas = []
    for c in range(3):
        own, rest = scores[labels == c, c], scores[labels != c, c]
        areas.append((own[:, None] > rest).mean())
    assert found["auroc"] == pytest.approx(np.mean(areas), abs=1e-6)
    for c, row in enumerate(found["per_class"]):
        assert row["images"] == (labels == c).sum()
        right = ((predicted == c) & (labels == c)).sum()
        assert row["precision"] == pytest.approx(right / max(1, (predicted == c).sum()))
    assert found["per_class"][3]["recall"] is None
    expected = [[((labels == i) & (predicted == j)).sum() for j in range(4)] for i in range(4)]
    assert found["confusion"] == np.array(expected).tolist()
    # The percentile interval of a share is close to the normal one.
    low, high = found["intervals"]["top1"]
    error = 1.96 * np.sqrt(found["top1"] * (1 - found["top1"]) / 300)
    assert (low, high) == pytest.approx((found["top1"] - error, found["top1"] + error), abs=0.012)


@pytest.mark.parametrize("classes", [2, 3])
def test_auroc_of_logits_is_that_of_their_probabilities(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 200)
    logits = rng.normal(size=(200, classes)) + np.eye(classes)[labels]
    targets = targets_of(tuple("abc"[:classes]), "class")
    # A number added to all logits of an image changes nothing.
    moved = torch.tensor(logits + 5 * rng.normal(size=(200, 1))).float()
    found = measure(moved, torch.tensor(labels), targets, 0, seed=0, logits=True)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if classes == 2:
        wanted = metrics.roc_auc_score(labels, shares[:, 1])
    else:
        wanted = metrics.roc_auc_score(labels, shares, multi_class="ovr")
    assert found["auroc"] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("classes", [1, 2, 5, 6, 30])
def test_accuracies_of_ties_and_missing_scores(classes: int) -> None:
    rng = np.random.default_rng(classes)
    scores = rng.integers(0, 4, (400, classes)).astype(np.float64)  # many are equal
    scores[rng.random(scores.shape) < 0.2] = np.nan  # classes without a vote
    scores[:20] = np.nan
    labels = rng.integers(0, classes, 400)
    hits = np.zeros(2)
    for row, label in zip(scores, labels):
        known = [c for c in range(classes) if not np.isnan(row[c])]
        ranked = sorted(known, key=lambda c: (-row[c], c))
        hits += [label in ranked[:1], label in ranked[:5]]
    for dtype in (torch.float64, torch.bfloat16):
        found = top_accuracies(torch.tensor(scores).to(dtype), torch.tensor(labels))
        assert found == pytest.approx(tuple(hits / 400), abs=1e-12)
    assert top_accuracies(torch.full((9, classes), np.nan), torch.zeros(9).long()) == (0, 0)


def test_figures_of_tags_and_numbers_follow_their_definitions() -> None:
    rng = np.random.default_rng(1)
    targets = targets_of(("x;y", "y", "-", "z | x"), "tags")
    assert targets.names == ("x", "y", "z")
    labels = torch.tensor(rng.integers(0, 4, 120))
    true = targets.of(labels).numpy()
    scores = rng.normal(size=(120, 3)) + true
    found = measure(torch.tensor(scores).float(), labels, targets, 50, seed=0)
    precisions = []
    for tag in range(3):  # mean precision at the ranks of the positives
        ranked = true[np.argsort(-scores[:, tag]), tag]
        precisions.append((ranked.cumsum() / np.arange(1, 121))[ranked > 0].mean())
    assert found["map"] == pytest.approx(np.mean(precisions), abs=1e-6)
    low, high = found["intervals"]["map"]
    assert low < found["map"] < high

    numbers = targets_of(("1.5", "-2", "10"), "number")
    labels = torch.tensor([0, 1, 2, 2])
    found = measure(torch.tensor([[1.0], [-1.0], [9.0], [12.0]]), labels, numbers, 0, seed=0)
    assert found["mae"] == pytest.approx((0.5 + 1 + 1 + 2) / 4)
    mean = (1.5 - 2 + 20) / 4
    spread = (1.5 - mean) ** 2 + (-2 - mean) ** 2 + 2 * (10 - mean) ** 2
    assert found["r2"] == pytest.approx(1 - (0.25 + 1 + 1 + 4) / spread)
    with pytest.raises(ConfigError, match="needs labels that are numbers, got 'cat'"):
        targets_of(("1", "cat"), "number")
    with pytest.raises(ConfigError, match="two tags or more"):
        targets_of(("x", "x"), "tags")


def test_a_bank_in_parts_votes_like_the_whole_bank() -> None:
    train, labels, val, own = clusters(500, 6, 12, seed=2)
    parts = list(zip(train.split(83), labels.split(83)))
    votes = knn_votes(parts, val, 20, 0.1, torch.eye(6))
    top1 = (votes.nan_to_num(-1).argmax(1) == own).double().mean().item()
    assert top1 == pytest.approx(knn_accuracy(train, labels, val, own, 20).top1, abs=1e-9)
    assert votes.nan_to_num(0).sum(1).numpy() == pytest.approx(np.ones(len(val)))
    # Values: the weighted mean of the neighbours' values, in float64.
    values = torch.linspace(-1, 1, 6)[:, None]
    cosine = nn.functional.normalize(val.double()) @ nn.functional.normalize(train.double()).T
    best, index = cosine.topk(20)
    weight = ((best - best[:, :1]) / 0.1).exp()
    expected = (weight * values[:, 0].double()[labels[index]]).sum(1) / weight.sum(1)
    found = knn_votes(parts, val, 20, 0.1, values)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_search_keeps_no_features_of_a_large_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, config = bright_datasets()
    whole = search(tiny_encoder(), datasets, config, CPU)
    assert whole.bank is not None
    assert whole.bank[0].shape == (160, 64)
    monkeypatch.setattr(search_module, "MOST_KEPT", 100)
    monkeypatch.setattr(search_module, "_PART", 10)
    monkeypatch.setattr("mocofast.evaluate.features.EVALUATION_BATCH", 16)
    parts = search(tiny_encoder(), datasets, config, CPU)
    assert parts.bank is None
    torch.testing.assert_close(parts.scores, whole.scores, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_the_rate_falls_from_layer_to_layer() -> None:
    pytest.importorskip("timm")
    for arch, size, first, middle in (
        ("vit_micro_cifar", 16, "conv_proj.weight", "encoder.layers.encoder_layer_1.mlp.0.weight"),
        ("resnet18_cifar", 16, "conv1.weight", "layer2.0.conv1.weight"),
    ):
        encoder = build_encoder(arch, size)(num_classes=3).requires_grad_(True)
        schedule = OptimConfig(name="adamw", weight_decay=0.05)
        optimizer = optimizer_of(encoder, schedule, 0.5)
        set_learning_rate(optimizer, 1.0)
        names = {id(value): name for name, value in encoder.named_parameters()}
        rates, decays = {}, {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rates[names[id(parameter)]] = group["lr"]
                decays[names[id(parameter)]] = group["weight_decay"]
        assert rates.keys() == set(names.values())
        head = next(name for name in rates if name.startswith(("fc.weight", "heads.head.weight")))
        assert rates[head] == 1
        assert decays[head] == 0.05
        assert 0 < rates[first] < rates[middle] < 1
        assert all(np.log2(rate) == round(np.log2(rate)) for rate in rates.values())
        assert decays[head.replace("weight", "bias")] == 0
    plain = optimizer_of(encoder, schedule, 1.0)
    set_learning_rate(plain, 0.3)
    assert [group["lr"] for group in plain.param_groups] == [0.3]


def test_blocks_are_skipped_in_train_mode_alone() -> None:
    encoder = build_encoder("vit_micro_cifar", 16)(num_classes=3)
    images = torch.randn(8, 3, 16, 16)
    expected = encoder.eval()(images)
    names = list(encoder.state_dict())
    handles = add_drop_path(encoder, 0.9)
    assert len(handles) == 8
    assert torch.equal(encoder(images), expected)
    assert not torch.allclose(encoder.train()(images), expected)
    assert list(encoder.state_dict()) == names
    with pytest.raises(ConfigError, match=r"expected 0 for TinyResNet, got 0\.1"):
        add_drop_path(tiny_encoder(), 0.1)


def test_a_network_that_a_cpu_gets_wrong_in_bf16_is_tuned_in_fp32() -> None:
    datasets, config = bright_datasets()
    options = FinetuneConfig(epochs=1, batch_size=32)

    def scores(arch: str, enabled: bool) -> Tensor:
        torch.manual_seed(0)
        encoder = build_encoder(arch, config.augment.size)(num_classes=2)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        return train_classifier(encoder, datasets, config, options, CPU, autocast).scores

    assert torch.equal(scores("resnet18", True), scores("resnet18", False))
    right = "vit_micro_cifar"
    assert not torch.equal(scores(right, True), scores(right, False))


def test_mixtures_train_a_vit_with_all_options(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="mocofast")
    pytest.importorskip("timm")
    datasets, config = bright_datasets()
    encoder = build_encoder("vit_micro_cifar", 8)(num_classes=2)
    options = FinetuneConfig(
        epochs=6, optimizer="adamw", lr=2e-3, batch_size=32, warmup_epochs=1, layer_decay=0.75,
        drop_path=0.1, mixup=0.8, cutmix=1.0, label_smoothing=0.1,
    )  # fmt: skip
    autocast = torch.autocast("cpu", enabled=False)
    assert finetune(encoder, datasets, config, options, CPU, autocast).top1 > 0.7
    assert "steps in all are few. A smaller --finetune.batch_size (now 32)" in caplog.text
    caplog.clear()
    train_classifier(tiny_encoder(), datasets, config, FinetuneConfig(epochs=1), CPU, autocast)
    assert "finetune: 1 step in all is few. A smaller" in caplog.text
    config.data.target = "tags"
    with pytest.raises(ConfigError, match="mixtures are of classes"):
        train_classifier(tiny_encoder(), datasets, config, options, CPU, autocast)


def test_the_head_may_start_as_the_linear_probe() -> None:
    found, autocast = {}, torch.autocast("cpu", enabled=False)
    for head in ("random", "probe"):
        datasets, config = bright_datasets()
        still = FinetuneConfig(head=head, epochs=1, lr=1e-12)  # keeps the weights
        found[head] = finetune(tiny_encoder(), datasets, config, still, CPU, autocast)
    assert found["probe"].top1 > 0.9 > found["random"].top1 + 0.3
    datasets, config = brightness("number")
    with pytest.raises(ConfigError, match=r"finetune\.head: expected random"):
        train_classifier(tiny_encoder(), datasets, config, still, CPU, autocast)


@pytest.mark.parametrize(
    ("size", "given", "expected"),
    [(32, (), (0.3, 1.0)), (224, (), (0.08, 1.0)), (32, (0.5, 0.9), (0.5, 0.9))],
)
def test_crops_of_small_views_are_larger(
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    given: tuple[float, ...],
    expected: tuple[float, float],
) -> None:
    datasets, config = bright_datasets()
    config.augment.size = size
    loaded = mock.Mock(side_effect=ConfigError("no more"))
    monkeypatch.setattr("mocofast.evaluate.finetune.build_loader", loaded)
    options, autocast = FinetuneConfig(crop_scale=given), torch.autocast("cpu", enabled=False)
    with pytest.raises(ConfigError, match="no more"):
        finetune(tiny_encoder(), datasets, config, options, CPU, autocast)
    (view,) = loaded.call_args.args[2]
    assert view.crop_scale == expected


def brightness(kind: str) -> tuple[Datasets, Config]:
    """Images whose label is their brightness, as a number or as tags."""
    datasets, config = bright_datasets()
    texts = {"number": ("-1", "0.5", "2", "3.5"), "tags": ("-", "low", "high", "low;high")}[kind]
    parts = []
    for source in (datasets.train, datasets.val):
        assert isinstance(source, ArraySource)
        parts.append(ArraySource(source.images, source.labels, texts))
    config.data.target = kind
    return Datasets(parts[0], parts[1], "made for a test"), config


@pytest.mark.parametrize(("kind", "figure"), [("number", "r2"), ("tags", "map")])
def test_numbers_and_tags_are_learned_by_every_command(kind: str, figure: str) -> None:
    datasets, config = brightness(kind)
    targets = targets_of(datasets.train.classes, kind)
    probe = fit_probe(tiny_encoder(), datasets, config, LinearConfig(), CPU)
    options = FinetuneConfig(epochs=12, lr=0.05, batch_size=40)
    autocast = torch.autocast("cpu", enabled=False)
    tuned = train_classifier(tiny_encoder(), datasets, config, options, CPU, autocast)
    near = search(tiny_encoder(), datasets, config, CPU)
    scores: dict[str, tuple[Tensor, Tensor]] = {
        "linear": (probe.scores, probe.labels),
        "finetune": tuple(tuned),  # type: ignore[dict-item]
        "knn": (near.scores, near.labels),
    }
    for name, (found, labels) in scores.items():
        value = measure(found, labels, targets, 0, 0)[figure]
        assert value > (0.5 if name == "knn" else 0.8), (name, value)


def test_a_list_of_numbers_holds_out_values_of_their_own(tmp_path: Path) -> None:
    from PIL import Image

    rows = ["path,age"]
    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i:02}.png")
        rows.append(f"{i:02}.png,{i / 2}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    labels = f"{tmp_path}/list.csv:age"
    found = load_datasets(DataConfig(path=str(tmp_path), labels=labels, target="number"))
    assert found.val is not None
    assert len(found.val) == 2
    assert len(found.train) == 18
    values = targets_of(found.val.classes, "number").of(torch.tensor(found.val.labels))
    names = [int(found.val.name(i)[:2]) / 2 for i in range(2)]
    assert values[:, 0].tolist() == names


def test_protocols_have_the_values_of_their_papers() -> None:
    v3 = LinearConfig(protocol="moco_v3")
    found = of_protocol(v3, {}, "resnet50")
    assert (found.epochs, found.batch_size, found.schedule) == (90, 1024, "cosine")
    assert found.lr == pytest.approx(0.4)
    assert of_protocol(v3, {}, "vit_small").lr == 12
    given = of_protocol(
        LinearConfig(protocol="moco_v3", epochs=3, batch_size=256),
        {"linear.epochs": "3", "linear.batch_size": "256"},
        "resnet50",
    )
    assert (given.epochs, given.lr) == (3, 0.1)
    with pytest.raises(ConfigError, match=r"linear.lr: no effect with linear.protocol=fast"):
        of_protocol(LinearConfig(), {"linear.lr": "1"}, "resnet50")


def test_images_that_cannot_be_decoded_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 30)):
        for name in ("a", "b"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / part / name / f"{i:02d}.png")
    bad = ["train/a/03.png", *(f"val/b/{i:02d}.png" for i in range(25))]
    for name in bad:
        (tmp_path / "set" / name).write_bytes(b"no image")
    small = ["--model.arch", "resnet_tiny", "--augment.size", "32", "--data.path", "set"]
    run = ["--train.epochs", "0", "--train.dir", "run", "--knn.every", "0"]
    assert cli.main(["pretrain", *small, *run]) == 0
    # A run keeps its lines from other handlers, also after its end.
    monkeypatch.setattr(logging.getLogger("mocofast"), "propagate", True)
    for command, short in (
        ("knn", []),
        ("linear", []),
        ("linear", ["--linear.protocol", "reference", "--linear.epochs", "1"]),
        ("finetune", ["--finetune.epochs", "1"]),
    ):
        caplog.clear()
        assert cli.main([command, "run", "--data.path", "set", *short]) == 0
        left_out = [text for text in caplog.messages if text.startswith("left out: ")]
        said = {text.split(":")[1].strip() for text in left_out}
        rest = "5 images more that cannot be decoded"
        assert said == {*bad[:21], rest}, command  # 20 names of a set


def test_a_probe_of_tags_says_what_its_figures_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = ["path,tags"]
    for i in range(60):
        pixels = rng.integers(0, 100, (8, 8, 3)) + np.array([(i % 2) * 150, 0, (i % 3 > 1) * 150])
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i:02d}.png")
        rows.append(f"{i:02d}.png,{'red' if i % 2 else ''};{'blue' if i % 3 > 1 else ''}")
    (tmp_path / "tags.csv").write_text("\n".join(rows) + "\n")
    small = ["--model.arch", "resnet_tiny", "--augment.size", "32", "--train.epochs", "0"]
    assert cli.main(["pretrain", "--data.path", ".", *small, "--train.dir", "run"]) == 0
    tags = ["--data.path", ".", "--data.labels", "tags.csv:tags", "--data.target", "tags"]
    assert cli.main(["linear", "run", *tags]) == 0
    figures = json.loads((tmp_path / "run/linear/results.json").read_text())["figures"]
    out = capsys.readouterr().out
    assert figures["train_map"] > 0.9 and f"train_map {figures['train_map']:.4g}\n" in out
    sgd = ["--linear.protocol", "reference", "--linear.epochs", "1", "--linear.lr", "0.1"]
    assert cli.main(["linear", "run", *tags, *sgd, "--dir", "sgd"]) == 0
    figures = json.loads((tmp_path / "sgd/results.json").read_text())["figures"]
    assert [name for name in figures if name.startswith("train")] == []
