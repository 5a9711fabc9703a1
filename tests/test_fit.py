"""Predicted memory of a step beside the peak of PyTorch's allocator in real steps on a CPU."""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mocofast_bench.processes import on_ranks
from torch.profiler import ProfilerActivity, profile, record_function

from mocofast import cli, settings
from mocofast.config import Config, ConfigError
from mocofast.device import choose_autocast, cpu_bf16
from mocofast.distributed import rank_and_world_size
from mocofast.methods.build import build_method
from mocofast.models.recompute import recompute_blocks
from mocofast.train import fit, run
from mocofast.train.engine import Engine
from mocofast.train.memory import own_part, step_peak
from mocofast.train.optimizer import optimizer_of
from mocofast.train.result import Result
from mocofast.train.sharding import Sharding, is_sharded

CPU = torch.device("cpu")
VIT = ("moco_v3_vit_s", {"model.arch": "vit_tiny_cifar", "model.hidden_dim": 512})
# 16 images, beside which the memory inside an operator is large.
SMALL = {"model.arch": "resnet18_cifar", "model.shuffle_bn": False, "data.batch_size": 16}
RESNET = ("moco_v2_r50_200ep", SMALL)
SIMCLR = ("simclr_r50", {"model.arch": "resnet18_cifar", "data.batch_size": 16})
RECOMPUTED = {"engine.checkpoint_activations": True, "train.accumulate": 2}
BF16 = {"train.precision": "bf16"}


def configured(recipe: str, **options: Any) -> Config:
    config = settings.load_recipe(recipe)
    common = {"augment.size": 32, "train.precision": "fp32", "train.device": "cpu"}
    settings.apply(config, {"data.batch_size": 32, **common, **options})
    return config


def measured_peak(config: Config, rank: int = 0) -> int:
    """Returns the most bytes that PyTorch's allocator holds in a second step of this process."""
    torch.manual_seed(0)
    method = build_method(config)
    if config.engine.checkpoint_activations:
        recompute_blocks(method.encoder_q)
    parts, world_size = config.train.accumulate, rank_and_world_size()[1]
    images = config.data.batch_size // world_size
    autocast = choose_autocast(config.train.precision, CPU)
    if is_sharded(config, world_size):
        Sharding(method, CPU, autocast)
    else:
        method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts_of_rank = map(own_part, (*method.parameters(), *method.buffers()))
    held = sum({t.data_ptr(): t.nbytes for t in parts_of_rank}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer = optimizer_of(method, config.optim)
        engine = Engine("eager", method, optimizer, autocast, parts, images // parts)
        size = (images, 3, 32, 32)
        views = tuple(
            torch.randint(256, size, dtype=torch.uint8).to(memory_format=torch.channels_last)
            for _ in range(2)
        )
        engine.step(views)
        with record_function("second step"):
            engine.step(views)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == "second step")
    most = held
    changes = [event for event in events if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        if event.start_ns() >= begin:
            most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("run", "options"),
    [
        (VIT, {}),
        (VIT, RECOMPUTED),
        (RESNET, {}),
        (RESNET, RECOMPUTED),
        (RESNET, BF16),
        (SIMCLR, {}),
    ],
)
def test_the_predicted_peak_is_the_allocators(
    run: tuple[str, dict[str, Any]], options: dict[str, Any]
) -> None:
    recipe, small = run
    config = configured(recipe, **small, **options)
    assert step_peak(config) == pytest.approx(measured_peak(config), rel=0.05)


def test_the_predicted_peak_of_a_sharded_model_is_the_allocators() -> None:
    recipe, small = VIT
    config = configured(recipe, **small, **{"engine.parallel": "fsdp"})
    for measured in on_ranks(partial(measured_peak, config)):
        assert step_peak(config, 2) == pytest.approx(measured, rel=0.05)


def test_settings_that_fit_are_found_in_the_order_of_their_cost() -> None:
    recipe, small = VIT
    config = configured(recipe, **small)
    [given] = fit.trials(config, 1, usable=2**40)
    assert (given.accumulate, given.recompute, given.parallel) == (1, False, "ddp")
    assert given.peak == step_peak(config)
    first, second = fit.trials(config, 1, usable=given.peak - 1)
    assert first == given
    assert (second.accumulate, second.recompute) == (1, True)
    *_, last = fit.trials(config, 1, usable=second.peak - 1)
    assert (last.accumulate, last.recompute) == (2, True)
    assert last.peak < second.peak < first.peak


def test_the_command_says_what_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = ["--model.arch", "vit_micro_cifar", "--augment.size", "32", "--data.batch_size", "8"]
    assert cli.main(["fit", "moco_v3_vit_s", "--gpu", "h200", *small]) == 0
    said = capsys.readouterr().out
    assert "batch of 8 on 1 GPU of 140.4 GiB" in said
    [command] = re.findall(r"  fits\nnext: mocofast (.*)", said)
    started: list[Config] = []

    def train(config: Config, *_: object, **__: object) -> Result:
        started.append(config)
        return Result(tmp_path, 0, False, {}, {})

    monkeypatch.setattr(run, "train", train)
    assert cli.main(shlex.split(command.replace("PHOTOS", str(tmp_path)))) == 0
    [config] = started
    assert (config.recipe, config.model.arch) == ("moco_v3_vit_s", "vit_micro_cifar")
    assert (config.data.batch_size, config.train.accumulate) == (8, 1)
    assert cli.main(["fit", "moco_v3_vit_s", "--memory", "0.001", *small]) == 0
    assert "nothing fits" in capsys.readouterr().out
    larger = [*small, "--data.batch_sizes", "0:8,1:16"]
    assert cli.main(["fit", "moco_v3_vit_s", "--train.device", "cpu", *larger]) == 0
    precision = "bf16" if cpu_bf16() else "fp32"
    assert f"{precision}, batch of 16 on 1 machine of" in capsys.readouterr().out
    assert cli.main(["fit", "moco_v3_vit_s", "--gpu", "H3000"]) == 2
    assert "--gpu: expected one of T4" in capsys.readouterr().err


@pytest.mark.parametrize(("recipe", "field"), [("instdisc_r50", "index"), ("clip_r50", "captions")])
def test_methods_that_need_more_than_images_are_refused(recipe: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"methods that need images alone, .* needs {field}"):
        step_peak(configured(recipe, **{"model.arch": "resnet18_cifar"}))
