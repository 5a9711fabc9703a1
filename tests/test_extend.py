"""Everything that docs/extend.md shows runs: a method, a metric, a source of images, an encoder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mocofast_bench.processes import on_ranks
from sklearn.datasets import load_digits

from mocofast.config import Config, ConfigError
from mocofast.data.sources import load_datasets
from mocofast.methods.build import build_method
from mocofast.methods.momentum import MomentumMethod
from mocofast.models.encoders import build_encoder
from mocofast.plugins import load_plugin
from mocofast.settings import apply, load_recipe
from tests import runs

PAGE = (runs.ROOT / "docs" / "extend.md").read_text("utf-8")
EXAMPLE = (runs.ROOT / "examples" / "barlow_twins.py").read_text("utf-8")
BARLOW = "examples.barlow_twins"
SHORT = ("--train.epochs", "2", "--train.log_every", "5", "--checkpoint.every_steps", "6")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder that holds the page's modules in `package/`, and a file of images."""
    folder = tmp_path / "package"
    folder.mkdir()
    for name, code in re.findall(r"```python (\w+\.py)\n(.*?)```", PAGE, re.DOTALL):
        (folder / name).write_text(code)
    digits = load_digits()
    images = np.repeat(digits.images[:300, :, :, None] * 15, 3, axis=3).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=digits.target[:300])
    return tmp_path


def run(folder: Path, *command: str) -> str:
    path = os.pathsep.join([str(folder), runs.environment()["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=runs.environment() | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_shows_the_example_as_it_is() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        assert block in EXAMPLE or "self.schedules" in block, block


def test_barlow_twins_trains_resumes_exactly_and_is_evaluated(tmp_path: Path) -> None:
    options = ("--model.method", BARLOW, "--model.hidden_dim", "64", *SHORT)
    whole, part = tmp_path / "whole", tmp_path / "part"
    out = runs.mocofast("pretrain", "digits", *options, "--train.dir", str(whole)).stdout
    assert re.search(r"loss \d+\.\d+  invariance 0\.\d+  lr", out)
    stopped = (*options, "--train.dir", str(part))
    runs.mocofast("pretrain", "digits", *stopped, "--train.max_steps", "8")
    runs.mocofast("pretrain", "digits", *stopped, "--resume", "auto")
    assert runs.metrics(part) == runs.metrics(whole)
    assert all("invariance" in line for line in runs.metrics(whole) if "loss" in line)
    assert "knn_top1" in runs.mocofast("knn", str(whole)).stdout
    # The option of the method is one of the command line, with its check.
    assert "--model.redundancy" in runs.mocofast("pretrain", *options[:2], "--help-all").stdout
    wrong = runs.mocofast("pretrain", "digits", *options, "--model.redundancy", "0", check=False)
    assert (wrong.returncode, "model.redundancy: expected above 0" in wrong.stderr) == (2, True)


def barlow_loss_and_gradient(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradient that the optimiser sees, of this rank's half of a batch."""
    config = load_recipe("digits")
    apply(config, {"model.method": BARLOW, "model.hidden_dim": 16, "model.dim": 8})
    apply(config, {"model.sync_bn": True})
    torch.manual_seed(0)
    model = build_method(config).double()
    views = torch.randn(2, 12, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    halves = views.chunk(2, 1)[rank] if torch.distributed.get_world_size() > 1 else views
    wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    loss = wrapped(*halves).loss
    loss.backward()
    gradient = model.get_submodule("encoder_q.conv1").weight.grad
    assert isinstance(gradient, torch.Tensor)
    return loss.detach(), gradient


def test_two_ranks_of_barlow_twins_are_one_process_with_the_whole_batch() -> None:
    ((loss, gradient),) = on_ranks(barlow_loss_and_gradient, 1)
    for other_loss, other_gradient in on_ranks(barlow_loss_and_gradient, 2):
        torch.testing.assert_close(other_loss, loss)
        # The method computes in float32, whatever the weights.
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (("--model.method", "package.my_moco"), "mean_length 0."),
        (("--model.arch", "package.my_encoder"), "package.my_encoder, 1,438 images"),
        (
            ("--data.source", "package.my_images", "--data.path", "images.npz"),
            "270 images of images.npz; 30 held out",
        ),
    ],
    ids=["metric", "encoder", "source"],
)
def test_modules_of_the_page_train(package: Path, options: tuple[str, ...], shown: str) -> None:
    command = ("-m", "mocofast", "pretrain", "digits", *options, *SHORT, "--train.dir", "run")
    assert shown in run(package, *command)
    assert "knn_top1" in run(package, "-m", "mocofast", "knn", "run")


def test_options_of_a_module_that_a_yaml_file_names(package: Path) -> None:
    (package / "package" / "weighted.py").write_text(
        "from dataclasses import dataclass\n"
        "from mocofast.option import option\n"
        "from mocofast.methods.moco import Options as MoCoOptions, build\n\n\n"
        "@dataclass\n"
        "class Options(MoCoOptions):\n"
        "    weight: float = option(1.0, 'a weight')\n"
    )
    (package / "mine.yaml").write_text(
        "model: {method: package.weighted, arch: resnet_tiny}\n"
        "data: {source: digits, batch_size: 128}\naugment: {size: 8}\n"
    )
    common = ("-m", "mocofast", "pretrain", "mine.yaml", "--train.dir", "run")
    run(package, *common, "--model.weight", "3", "--train.max_steps", "2")
    config = yaml.safe_load((package / "run" / "config.yaml").read_text())
    assert (config["model"]["method"], config["model"]["weight"]) == ("package.weighted", 3.0)
    resumed = ("--resume", "run", "--model.weight", "3", "--train.max_steps", "4")
    assert "continuing at step 2" in run(package, "-m", "mocofast", "pretrain", *resumed)


def test_training_from_python(package: Path) -> None:
    folder, step, accuracy = run(package, "package/run.py").splitlines()[-1].split()
    assert (folder, step) == ("runs/from-python", "22")
    assert float(accuracy) > 0.5


def test_a_number_that_follows_a_schedule_is_set_before_every_step() -> None:
    config = load_recipe("digits")
    apply(config, {"model.momentum": 0.99, "model.momentum_schedule": "constant"})
    model = build_method(config)
    assert isinstance(model, MomentumMethod)
    assert (model.schedules, model.momentum) == ({}, 0.99)
    apply(config, {"model.momentum_schedule": "cosine"})
    schedule = build_method(config).schedules["momentum"]
    # The average that ends step s is the average that starts step s + 1 of MoCo v3.
    assert [schedule(step, 100) for step in (49, 99)] == pytest.approx([0.995, 1.0])


@pytest.mark.parametrize(
    ("option", "name", "expected"),
    [
        ("model.method", "package.nothing", "there is no module 'package.nothing'"),
        ("model.method", "json.decoder", "does not define Options, build"),
        ("model.method", "mocoo", "did you mean 'moco'"),
        ("model.arch", "json.decoder", "does not define build_encoder"),
        ("data.source", "json.decoder", "does not define load_datasets"),
    ],
)
def test_a_module_that_cannot_be_used_is_named(option: str, name: str, expected: str) -> None:
    def configure_and_build() -> None:
        config = Config()
        apply(config, {option: name})
        build_encoder(config.model.arch)
        load_datasets(config.data)

    with pytest.raises(ConfigError, match=expected) as raised:
        configure_and_build()
    assert option in str(raised.value)


def test_an_import_that_fails_inside_a_plugin_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_plugins").mkdir()
    (tmp_path / "broken_plugins" / "method.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        load_plugin("model.method", "broken_plugins.method", "Options")
