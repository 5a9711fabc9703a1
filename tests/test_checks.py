"""Options that cannot work are refused before the first step, by name and value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mocofast import cli
from mocofast.config import Config, ConfigError
from mocofast.data.interface import BatchSlice
from mocofast.device import choose_autocast, choose_device, wide
from mocofast.evaluate import linear
from mocofast.evaluate.logistic import Features
from mocofast.evaluate.targets import targets_of
from mocofast.methods.build import build_method
from mocofast.settings import apply, load_recipe
from mocofast.train.checks import check_batches, micro_batches
from mocofast.train.engine import Engine
from mocofast.train.estimate import seconds_per_image
from mocofast.train.optimizer import optimizer_of

SHORT = ("--train.device", "cpu", "--data.workers", "0", "--model.queue_size", "300")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--train.device", "gpus"), "train.device: expected auto, cpu, cuda, cuda:N, gpu or mps"),
        (("--train.device", "cpu:x"), "train.device: expected auto, cpu"),
        (("--train.device", "mps"), "train.device: mps needs Apple's Metal"),
        (("--train.seed", "-1"), r"train.seed: expected 0 to 2\^63 - 1, got -1"),
        (("--knn.shots", "-1"), "knn.shots: expected at least 0, got -1"),
        (("--knn.shots", "500"), r"knn.shots: expected at most \d+, the images of class"),
        (
            ("--data.batch_size", "66", "--model.bn_splits", "4"),
            "model.bn_splits: the 66 images of a batch cannot be divided into 4 parts",
        ),
        (
            ("--data.drop_last", "false", "--model.bn_splits", "4", "--data.batch_size", "64"),
            r"model.bn_splits: the 30 images of a batch cannot be divided .*drop_last true",
        ),
    ],
)
def test_options_are_refused_by_name_before_the_first_step(
    options: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "digits", *SHORT, "--train.dir", str(tmp_path / "run"), *options]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_missing_is_said() -> None:
    for name in ("gpu", "cuda", "cuda:1"):
        with pytest.raises(
            ConfigError, match=rf"train.device: {name} needs a GPU .*--train.device cpu"
        ):
            choose_device(name)


def test_a_batch_of_one_image_is_refused_where_batch_norm_has_one_value() -> None:
    config = Config()
    apply(config, {"model.arch": "resnet18", "augment.size": 32, "model.queue_size": 8})
    apply(config, {"data.batch_size": 4, "data.drop_last": False, "model.dim": 8})
    encoder = build_method(config).encoder_q  # the last maps have 1 x 1 pixels
    batches = BatchSlice(4, drop_last=False, uneven=True)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(
        ConfigError, match=r"data.drop_last: .* 1 image, and BatchNorm layer4.0.bn1"
    ):
        check_batches(config, encoder, 9, batches)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    check_batches(config, encoder, 10, batches)
    config.augment.size = 64  # 2 x 2 pixels
    check_batches(config, encoder, 9, batches)
    config.train.accumulate, config.augment.size = 4, 32
    with pytest.raises(ConfigError, match=r"data.batch_size: a micro-batch has 1 image"):
        check_batches(config, encoder, 8, batches)
    # One image in each of two splits, by the same reason.
    apply(config, {"model.bn_splits": 2, "train.accumulate": 1, "data.batch_size": 2})
    split = build_method(config).encoder_q
    with pytest.raises(ConfigError, match=r"1 image in each of 2 splits .*bn_splits"):
        check_batches(config, split, 8, BatchSlice(2, uneven=True, parts=2))
    assert seconds_per_image(split, 32, 3, torch.device("cpu")) > 0  # measured on two a split


@pytest.mark.parametrize("images", [10, 13, 16])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_smallest_micro_batch_is_known(images: int, accumulate: int, world_size: int) -> None:
    config = Config()
    apply(config, {"data.batch_size": 6, "train.accumulate": accumulate, "data.drop_last": False})
    found = micro_batches(config, images, BatchSlice(6, 0, world_size, False, uneven=True))
    rest = images % 6 // world_size
    for option, count in (("data.batch_size", 6 // world_size), ("data.drop_last", rest)):
        if count:
            parts = torch.zeros(count).tensor_split(min(accumulate, count))
            assert found[option] == min(map(len, parts))
    assert ("data.drop_last" in found) == (rest > 0)


def test_float64_leaves_devices_that_have_none() -> None:
    x = torch.tensor([0.1, 2.0])
    assert torch.equal(wide(x), x.double())
    with FakeTensorMode():
        assert wide(torch.empty(3, device="mps")).device.type == "cpu"


class NoFloat64(TorchDispatchMode):
    """Refuses tensors of float64, as a device without this type does."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        wrong = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.dtype == torch.float64]
        assert not wrong, f"{function} makes float64"
        return out


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        *(("moco", name) for name in ("sgd", "adamw", "lars")),
        *((name, "sgd") for name in ("moco_v3", "simclr", "byol", "swav", "memory_bank")),
    ],
)
def test_training_makes_no_float64(method: str, optimizer: str) -> None:
    config = load_recipe("digits")
    apply(config, {"model.method": method, "model.arch": "resnet_tiny", "optim.name": optimizer})
    torch.manual_seed(0)
    with NoFloat64():
        model = build_method(config, 40)
        autocast = choose_autocast("fp32", torch.device("cpu"))
        engine = Engine("eager", model, optimizer_of(model, config.optim), autocast, 1, 8)
        views = (torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8),) * model.num_views
        fields = {name: torch.arange(8) for name in model.batch_fields}
        engine.set_scheduled(0, 10, 0.1)
        for _ in range(2):
            metrics = engine.step(views, fields)
    assert metrics.values.isfinite().all()


def test_the_linear_probe_is_fitted_where_float64_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fitted(Exception):
        """Ends the probe at its first fit."""

    def fit(features: Features, labels: Tensor, *_: Any) -> Any:
        found.extend((features.rows.device.type, labels.device.type))
        raise Fitted

    found: list[str] = []
    monkeypatch.setattr(linear, "_fit", fit)
    targets = targets_of(["a", "b"], "class")
    with FakeTensorMode():
        rows = torch.empty(20, 3, device="mps")
        labels = torch.empty(20, dtype=torch.int64, device="mps")
        with pytest.raises(Fitted):
            linear._fast(rows, labels, rows, labels, targets, 0)
    assert found == ["cpu", "cpu"]
