"""The images of a command line are used, the recipe `auto` fits, and odd settings are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mocofast import settings
from mocofast.config import Config, ConfigError
from mocofast.data.sources import ArraySource
from mocofast.models import sync_batch_norm
from mocofast.train import configure, estimate
from mocofast.train.auto import fit
from tests import runs
from tests.test_cli import call

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_images(tmp_path_factory.mktemp("photos"), 150, side=16)


@pytest.mark.parametrize("words", [("PATH",), ("--data.path", "PATH"), ("digits", "PATH")])
def test_a_path_is_used_with_or_without_a_recipe(
    words: tuple[str, ...],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(images) if word == "PATH" else word for word in words]
    folder = tmp_path / "run"
    options = ("--train.max_steps", "1", "--data.workers", "0", "--train.dir", str(folder))
    status, out, err = call(capsys, "pretrain", *given, *options)
    assert status == 0, err
    assert "150 images of 2 classes" in out
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["data"]["source"] == "folder" and saved["data"]["path"] == str(images)
    assert saved["recipe"] == ("digits" if words[0] == "digits" else "auto")
    if words[0] == "digits":
        assert "chose" not in out
        return
    assert out.count("chose --") == 13
    assert (saved["model"]["arch"], saved["augment"]["size"]) == ("resnet_tiny", 16)
    assert "time: about" in out
    # The run continues without choosing again, and config.yaml runs again with the same options.
    status, out, err = call(
        *(capsys, "pretrain", *given, "--resume", "auto", "--train.dir", str(folder)),
        *("--train.max_steps", "2"),
    )
    assert status == 0, err
    assert "continuing at step 1" in out and "chose" not in out
    again = ("--train.dir", str(tmp_path / "again"), "--train.max_steps", "1")
    status, out, err = call(capsys, "pretrain", str(folder / "config.yaml"), *again)
    assert status == 0 and "chose" not in out, err


def choices(count: int, side: int, seconds: float = 1e-4, device: str = "cpu") -> dict[str, object]:
    """Returns what `fit` chooses for `count` images of `side` pixels."""
    source = ArraySource(np.zeros((count, side, side, 3), np.uint8), None, ())
    config = settings.load_recipe("auto")
    found = fit(config, source, (), torch.device(device), 1, lambda arch, size: seconds)
    settings.apply(config, {choice.option: choice.value for choice in found})
    config.data.path = "anywhere"
    settings.validate(config)
    steps = count // config.data.batch_size
    assert estimate.warnings(config, count, steps) == []
    return {choice.option: choice.value for choice in found}


@pytest.mark.parametrize("count", [4, 10, 57, 500, 5000, 60_000])
@pytest.mark.parametrize("side", [8, 28])
def test_choices_fit_sets_of_any_size(count: int, side: int) -> None:
    chosen = choices(count, side)
    assert chosen["augment.size"] == (8 if side == 8 else 24)
    assert chosen["data.batch_size"] <= max(2, count / 8)  # type: ignore[operator]
    assert chosen["model.queue_size"] <= max(2, count / 2)  # type: ignore[operator]
    # Shuffled BatchNorm of one process needs parts of the batch (MoCo, arXiv:1911.05722, sec. 3.3).
    batch, parts = int(str(chosen["data.batch_size"])), int(str(chosen["model.bn_splits"]))
    assert batch % parts == 0 and batch // parts >= min(batch, 16)
    assert parts > 1 or batch < 32


def test_epochs_and_encoder_fit_the_time_that_the_machine_needs() -> None:
    fast, slow = choices(5000, 32, 1e-4), choices(5000, 32, 1e-1)
    assert fast["train.epochs"] == 200 and slow["train.epochs"] == 10
    assert (fast["model.arch"], slow["model.arch"]) == ("resnet18_cifar", "resnet_tiny")
    large = choices(200, 300, device="cuda")
    assert (large["model.arch"], large["augment.size"]) == ("resnet18", 224)


def test_given_options_stay() -> None:
    config = settings.load_recipe("auto")
    settings.apply(config, {"data.batch_size": 4, "model.arch": "resnet_tiny"})
    source = ArraySource(np.zeros((80, 32, 32, 3), np.uint8), None, ())
    kept = ("data.batch_size", "model.arch")
    found = {c.option: c for c in fit(config, source, kept, CPU, 1, lambda arch, size: 1e-9)}
    assert not found.keys() & set(kept)
    assert found["train.epochs"].value == 800  # 16,000 steps
    assert found["optim.lr"].value == 0.000937  # 0.06 * 4 / 256
    assert "optim.name" not in found
    assert "20 steps an epoch" in found["model.momentum"].why


@pytest.mark.parametrize(("count", "queue"), [(500, 128), (9344, 512), (200_000, 8192)])
def test_keys_leave_the_queue_before_their_age_tells_them(count: int, queue: int) -> None:
    """MoCo learned nothing from 9,344 tiles with a queue of 16 steps (docs/log.md)."""
    chosen = choices(count, 32)
    assert chosen["model.queue_size"] == queue
    moved = (
        queue / float(str(chosen["data.batch_size"])) * (1 - float(str(chosen["model.momentum"])))
    )
    assert moved < 0.041


def test_short_runs_take_adamw_unless_the_user_gives_the_optimiser_or_the_rate() -> None:
    source = ArraySource(np.zeros((1752, 64, 64, 3), np.uint8), None, ())
    for given in ({}, {"optim.name": "sgd"}, {"optim.lr": 0.1}, {"train.epochs": 800}):
        config = settings.load_recipe("auto")
        settings.apply(config, given)
        found = {c.option: c.value for c in fit(config, source, given, CPU, 1, lambda *_: 0.05)}
        assert (found.get("optim.name") == "adamw") == (not given), given
        if not given:
            assert found["optim.lr"] == 0.00099  # 0.0014 * 0.5**0.5
            assert (found["train.epochs"], found["optim.warmup_epochs"]) == (20, 1)
    config.train.epochs = 3
    found = {c.option: c.value for c in fit(config, source, ["train.epochs"], CPU, 1, lambda *_: 1)}
    assert (found["optim.warmup_epochs"], found["knn.every"]) == (0.3, 1)


def test_slots_of_a_memory_bank_keep_their_momentum() -> None:
    source = ArraySource(np.zeros((80, 32, 32, 3), np.uint8), None, ())
    config = settings.load_recipe("auto")
    settings.apply(config, {"model.method": "memory_bank"})
    found = fit(config, source, ("model.method",), CPU, 1, lambda arch, size: 1e-4)
    assert "model.momentum" not in {choice.option for choice in found}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data.batch_size": 256, "model.queue_size": 64}, ["an epoch is 1 step", "244 images of"]),
        ({"data.batch_size": 50, "train.epochs": 2}, ["never fills"]),
        (
            {"data.batch_size": 50, "model.queue_size": 128, "train.max_steps": 2},
            ["100 keys, so random vectors stay among the negatives. --model.queue_size 100 fits"],
        ),
        (
            {
                **{"data.batch_size": 50, "data.batch_sizes": ("0:100",)},
                **{"model.queue_size": 128, "train.max_steps": 2},
            },
            [],
        ),
        ({"data.batch_size": 50, "model.queue_size": 500}, []),
    ],
)
def test_settings_that_do_not_fit_are_named(options: dict[str, object], said: list[str]) -> None:
    config = settings.load_recipe("moco_v2_r50_200ep")
    settings.apply(config, options)
    lines = estimate.warnings(config, 500, 500 // config.data.batch_size)
    assert len(lines) == len(said)
    assert all(text in line for text, line in zip(said, lines))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data.source", "digits", "--data.path", "."), "data.path: no effect with data.source"),
        (("digits", "--data.holdout", "0.3"), "data.holdout: no effect with data.source=digits"),
        (("--optim.gamma", "0.5"), "optim.gamma: no effect with optim.schedule=cosine"),
        (("--model.method", "byol", "--model.queue_size", "8"), "it is an option of moco"),
        (("--augment.blur_sigma", "1,2"), "augment.blur_sigma: no effect with augment.blur 0"),
        (("./photos",), "there is no folder or file './photos'"),
        (("photos",), "there is no folder of images of this name"),
        (("digits", "auto"), "got also 'auto'"),
        ((".", "--data.path", "/"), "both"),
    ],
)
def test_an_option_without_effect_is_an_error(
    words: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, "pretrain", *words)
    assert status == 2
    assert said in err and err.count("\n") == 1
    assert not caplog.records  # the mistake is said once
    assert not list(tmp_path.iterdir())


def test_a_run_folder_is_not_taken_for_images(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match=f"--resume {tmp_path} continues the run"):
        configure.split_words(["digits", str(tmp_path)])


def test_the_source_follows_from_the_path(tmp_path: Path) -> None:
    for name, source in (("a.zip", "zip"), ("b.csv", "list")):
        (tmp_path / name).touch()
        assert configure.source_of(str(tmp_path / name)) == source
    assert configure.source_of(str(tmp_path)) == "folder"
    (tmp_path / "x.tar").touch()
    assert configure.source_of(str(tmp_path)) == "shards"
    assert configure.source_of("https://host/x-{000..099}.tar") == "shards"


def test_a_folder_of_images_is_not_taken_for_a_folder_of_cifar(images: Path) -> None:
    given = {"data.path": str(images)}
    assert configure.configure("cifar10_r18", "", given).data.source == "folder"
    assert configure.configure("cifar10_r18", "", {"data.path": "/new"}).data.source == "cifar10"


def test_measuring_changes_neither_the_encoder_nor_the_random_state() -> None:
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout()
    )
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    assert 0 < estimate.seconds_per_image(encoder, 8, 3, CPU) < 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


class Clocked(torch.nn.Module):
    """Moves a clock: 30 s in the first call, which loads code, then `per_image` an image."""

    def __init__(self, per_image: float) -> None:
        super().__init__()
        self.inner, self.per_image = torch.nn.Linear(3 * 8 * 8, 2), per_image

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        CLOCK.append(CLOCK[-1] + (self.per_image * len(images) if len(CLOCK) > 1 else 30.0))
        return self.inner(images.flatten(1))


CLOCK: list[float] = []


@pytest.mark.parametrize(("per_image", "passes"), [(0.1, 3), (0.001, 5), (1.0, 2)])
def test_the_time_of_an_image_is_without_what_the_first_pass_loads(
    per_image: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    CLOCK[:] = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: CLOCK[-1])
    each = estimate.seconds_per_image(Clocked(per_image), 8, 3, CPU)
    assert each == pytest.approx(per_image * 4 / 3)
    assert len(CLOCK) - 1 == passes


def test_measuring_waits_for_no_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_batch_norm, "rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(sync_batch_norm, "all_gather", lambda values: pytest.fail("gathered"))
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), sync_batch_norm.SyncBatchNorm(4))
    assert estimate.seconds_per_image(encoder, 8, 3, CPU) > 0
    assert encoder[1].training


def test_the_time_is_of_the_steps_that_run() -> None:
    config = Config()
    config.train.max_steps = 10
    line = estimate.time_of_run(0.01, config, 100, 5)
    assert "0:10 of computation" in line and "10 steps of 1 s, an epoch in 0:05" in line
    config.data.batch_sizes, config.train.max_steps = (f"0:{2 * config.data.batch_size}",), 4
    line = estimate.time_of_run(0.01, config, 100, 5)  # 2, 2, 1 and 2 batches
    assert "0:07 of computation" in line and "4 steps of 1.75 s, an epoch in 0:05" in line


def test_words_are_a_recipe_and_a_place_in_any_order(tmp_path: Path) -> None:
    place = str(tmp_path)
    assert configure.split_words([place, "digits"]) == ("digits", place)
    assert configure.split_words([]) == (None, "")
    with pytest.raises(ConfigError, match="got also"):
        configure.split_words([place, place])
