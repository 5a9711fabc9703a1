"""Every method through the command line: learns, continues exactly, works with every command."""

from __future__ import annotations

import re
import weakref
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from mocofast_bench.processes import on_ranks
from torch.nn.parallel import DistributedDataParallel

from mocofast import cli, distributed
from mocofast.config import Config
from mocofast.data.interface import view_augments
from mocofast.models.encoders import build_encoder
from mocofast.optim.schedule import scaled_by_batch
from mocofast.settings import load_recipe, validate
from tests import runs


def words(text: str) -> tuple[str, ...]:
    """Returns the words of a command line."""
    return tuple(text.split())


SHORT = words("--train.epochs 8 --train.log_every 11 --knn.shots 0 --data.workers 0")
PREDICTING = words("--model.hidden_dim 128 --model.momentum_schedule cosine")
HEAD = words("--model.hidden_dim 128")
METHODS = {
    "moco_v3": (*PREDICTING, *words("--model.method moco_v3 --model.temperature 0.2")),
    "byol": (*PREDICTING, *words("--model.method byol --optim.lr 0.06")),
    "moco, symmetric": words("--model.symmetric true --model.queue_size 128 --train.epochs 12"),
    "simclr": (*HEAD, *words("--model.method simclr")),
    # Twice the epochs: the slots are random at first, and are updated once an epoch.
    "memory_bank": words(
        "--model.method memory_bank --model.momentum 0.5 --model.queue_size 512 "
        "--model.mlp true --train.epochs 16"
    ),
    # Few images need sharp assignments: a small epsilon.
    "swav": (
        *HEAD,
        *words(
            "--model.method swav --model.prototypes 100 --model.freeze_prototypes 11 "
            "--model.temperature 0.1 --model.epsilon 0.02"
        ),
    ),
    "supervised": words("--model.method supervised"),
}


def mocofast(*arguments: object) -> None:
    """Runs a command in this process, because a new process takes longer than these runs."""
    assert cli.main([str(argument) for argument in arguments]) == 0


def learnt(folder: Path) -> tuple[float, float, float, float]:
    """Returns the highest loss, the last loss, and the kNN accuracy before and after training.

    MoCo's loss rises at first, while keys replace the noise in the queue.
    """
    lines = runs.metrics(folder)
    losses = [line["loss"] for line in lines if "loss" in line]
    accuracies = [line["knn_top1"] for line in lines if "knn_top1" in line]
    return max(losses), losses[-1], accuracies[0], accuracies[-1]


@pytest.fixture(scope="module", params=METHODS)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[str, ...]]:
    """A run of 88 steps on the digits: folder and options."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    options = SHORT + METHODS[request.param]
    mocofast("pretrain", "digits", *options, "--train.dir", folder)
    return folder, options


def test_loss_falls_and_knn_accuracy_rises(run: tuple[Path, tuple[str, ...]]) -> None:
    first, last, before, after = learnt(run[0])
    assert last < 0.95 * first
    assert after > before + 0.02  # 7 of 359 images; a random encoder gets 88 % right


def test_a_stopped_and_continued_run_equals_one_never_stopped(
    run: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    whole, options = run
    parts = tmp_path / "parts"
    # Step 50 lies inside the fifth epoch.
    mocofast("pretrain", "digits", *options, "--train.dir", parts, "--train.max_steps", 50)
    mocofast("pretrain", "--resume", parts, "--train.max_steps", 0)
    runs.assert_same_run(parts, whole)


WITH_OTHER_RANKS = ("simclr", "memory_bank", "swav")


def two_rank_runs(folder: Path, rank: int) -> list[int]:
    """Trains runs, and stopped and continued runs, on a rank.

    Returns two numbers per run, counted at the end of the run: how many models were wrapped in
    DistributedDataParallel so far, and how many wrappers are alive.
    """
    wrappers: list[weakref.ref[DistributedDataParallel]] = []
    counts: list[int] = []

    def wrapped(*arguments: Any, **options: Any) -> DistributedDataParallel:
        wrapper = DistributedDataParallel(*arguments, **options)
        wrappers.append(weakref.ref(wrapper))
        return wrapper

    def leave() -> None:
        counts.extend((len(wrappers), sum(wrapper() is not None for wrapper in wrappers)))
        distributed.barrier()

    # All runs in one process group: a second one cannot take the same port again.
    with (
        mock.patch("mocofast.distributed.shutdown", leave),
        mock.patch("mocofast.train.engine.DistributedDataParallel", wrapped),
    ):
        for name in WITH_OTHER_RANKS:
            options = ("pretrain", "digits", *SHORT, *METHODS[name], "--train.log_every", "3")
            whole, parts = folder / name, folder / f"{name}, in parts"
            mocofast(*options, "--train.dir", whole, "--train.max_steps", "12")
            mocofast(*options, "--train.dir", parts, "--train.max_steps", "7")
            mocofast("pretrain", "--resume", parts, "--train.max_steps", "12")
    return counts


def test_two_ranks_stop_and_continue_as_if_never_stopped(tmp_path: Path) -> None:
    """Ranks share gathered views, the sample of negatives, a memory bank, and sums over ranks."""
    for counts in on_ranks(partial(two_rank_runs, tmp_path)):
        # A wrapper that outlives the process group can wait without end for the group's threads.
        assert counts[::2] == list(range(1, 3 * len(WITH_OTHER_RANKS) + 1))
        assert not any(counts[1::2])
    for name in WITH_OTHER_RANKS:
        whole, parts = tmp_path / name, tmp_path / f"{name}, in parts"
        assert [line["step"] for line in runs.metrics(whole) if "loss" in line] == [3, 6, 9, 12]
        runs.assert_same_run(parts, whole)


def values(printed: str) -> dict[str, float]:
    """Returns the numbers of the lines "name number"."""
    lines = re.findall(r"^(\w+) ([\d.e-]+)$", printed, re.MULTILINE)
    return {name: float(value) for name, value in lines}


def test_every_command_takes_the_checkpoint(
    run: tuple[Path, tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    mocofast("knn", folder)
    assert values(capsys.readouterr().out)["knn_top1"] == pytest.approx(learnt(folder)[3], abs=1e-4)
    mocofast("linear", folder)
    assert values(capsys.readouterr().out)["linear_top1"] > 0.9
    mocofast("finetune", folder, "--finetune.epochs", 1, "--out", tmp_path / "classifier.pt")
    assert "finetune_top1" in values(capsys.readouterr().out)
    assert torch.load(tmp_path / "classifier.pt", weights_only=True)["fc.weight"].shape == (10, 64)

    mocofast("export", folder, "--format", "torchvision", tmp_path / "backbone.pt")
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)
    encoder = build_encoder("resnet_tiny")(num_classes=1)
    missing, unexpected = encoder.load_state_dict(backbone, strict=False)
    # The export holds neither projector nor predictor.
    assert (sorted(missing), unexpected) == (["fc.bias", "fc.weight"], [])
    if "queue" not in runs.weights(folder):  # the reference format is for MoCo only
        out = str(tmp_path / "moco.pt")
        assert cli.main(["export", str(folder), "--format", "reference", out]) == 2
        assert "model.method" in capsys.readouterr().err


def test_a_vit_trains_on_its_patches_alone_and_is_finetuned_and_exported_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Images of 8 x 8 pixels have four patches.
    folder = tmp_path / "run"
    options = words(
        "--model.arch vit_tiny_cifar --optim.name adamw --optim.lr 1e-3 --optim.lr_per 64 "
        "--optim.weight_decay 0.1 --train.max_steps 3 --train.log_every 1"
    )
    mocofast(
        *("pretrain", "digits", *METHODS["moco_v3"], *SHORT, *options),
        *("--train.dir", folder),
    )
    lines = [line for line in runs.metrics(folder) if "loss" in line]
    assert lines[0]["lr"] == pytest.approx(2e-3)  # 1e-3 per 64 images, for 128 images
    state = runs.weights(folder)
    for name in ("conv_proj.weight", "encoder.pos_embedding"):
        assert torch.equal(state[f"encoder_q.{name}"], state[f"encoder_k.{name}"])
    assert "encoder_q.heads.7.running_mean" in state  # the third layer's BatchNorm
    mocofast("finetune", folder, "--finetune.epochs", 1, "--out", tmp_path / "classifier.pt")
    tuned = torch.load(tmp_path / "classifier.pt", weights_only=True)
    assert not torch.equal(tuned["conv_proj.weight"], state["encoder_q.conv_proj.weight"])
    capsys.readouterr()

    mocofast("export", folder, "--format", "safetensors", tmp_path / "vit.safetensors")
    code = capsys.readouterr().out.partition("\n\n")[2]
    found: dict[str, Any] = {}
    exec(code, found)
    loaded = found["model"].state_dict()
    assert loaded and all(
        torch.equal(value, state[f"encoder_q.{name}"]) for name, value in loaded.items()
    )


# recipe: method, encoder, batch size, epochs, (optimiser, learning rate per 256 images, weight
# decay), momentum, smallest crop
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "moco_v3_r50": ("moco_v3", "resnet50", 4096, 300, ("lars", 0.3, 1e-6), 0.99, 0.2),
    "moco_v3_vit_s": ("moco_v3", "vit_small", 4096, 300, ("adamw", 1.5e-4, 0.1), 0.99, 0.08),
    "moco_v3_vit_b": ("moco_v3", "vit_base", 4096, 300, ("adamw", 1.5e-4, 0.1), 0.99, 0.08),
    "moco_v3_vit_l": ("moco_v3", "vit_large", 4096, 300, ("adamw", 1.5e-4, 0.1), 0.99, 0.08),
    "moco_v3_vit_h": ("moco_v3", "vit_huge", 4096, 300, ("adamw", 1.5e-4, 0.1), 0.99, 0.08),
    "byol_r50": ("byol", "resnet50", 4096, 1000, ("lars", 0.2, 1.5e-6), 0.996, 0.08),
}


def loaded(recipe: str) -> Config:
    config = load_recipe(recipe)
    config.data.path = "anywhere"
    validate(config)
    return config


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_imagenet_recipes_are_the_published_settings(recipe: str) -> None:
    c = loaded(recipe)
    method, arch, batch, epochs, optim, momentum, smallest = PUBLISHED[recipe]
    assert (c.model.method, c.model.arch) == (method, arch)
    assert (c.data.batch_size, c.train.epochs) == (batch, epochs)
    assert ((c.optim.name, c.optim.lr, c.optim.weight_decay), c.optim.lr_per) == (optim, 256)
    assert (c.optim.schedule, c.optim.per) == ("cosine", "step")
    assert c.optim.warmup_epochs == (40 if "vit" in recipe else 10)
    assert (c.model.momentum, c.model.momentum_schedule) == (momentum, "cosine")
    assert c.model.sync_bn is True
    assert (c.model.dim, c.model.hidden_dim) == (256, 4096)
    if method == "moco_v3":
        assert c.model.temperature == (0.2 if "vit" in recipe else 1.0)
    first, second = view_augments(c.augment, 2)
    assert c.augment.crop_scale == (smallest, 1.0)
    assert c.augment.jitter == (0.4, 0.4, 0.2, 0.1)
    assert (c.augment.jitter_p, c.augment.gray) == (0.8, 0.2)
    assert (first.blur, first.solarize) == (1.0, 0.0)
    assert (second.blur, second.solarize) == (0.1, 0.2)


@pytest.mark.parametrize("recipe", ["cifar10_moco_v3", "cifar10_byol"])
def test_cifar_recipes_blur_nothing_and_see_small_images(recipe: str) -> None:
    c = loaded(recipe)
    assert (c.model.arch, c.augment.size) == ("resnet18_cifar", 32)
    assert (c.augment.blur, c.augment.blur_2) == (0.0, -1.0)
    assert c.model.sync_bn


# recipe: epochs, batch size, learning rate of the whole batch, weight decay, temperature
SINGLE_ENCODER: dict[str, tuple[int, int, float, float, float]] = {
    # The README of google-research/simclr.
    "simclr_r50": (100, 4096, 4.8, 1e-4, 0.1),
    "cifar10_simclr": (1000, 512, 2.0, 1e-4, 0.5),
    # swav_400ep_2x224_pretrain.sh of facebookresearch/swav.
    "swav_r50": (400, 4096, 4.8, 1e-6, 0.1),
    "swav_r50_multicrop": (400, 4096, 4.8, 1e-6, 0.1),
    # arXiv:1805.01978, section 4.2.
    "instdisc_r50": (200, 256, 0.03, 1e-4, 0.07),
    # cifar.py in the repository of InstDisc's authors.
    "cifar10_instdisc": (200, 128, 0.03, 5e-4, 0.1),
}


@pytest.mark.parametrize("recipe", SINGLE_ENCODER)
def test_recipes_without_a_momentum_encoder_are_the_published_settings(recipe: str) -> None:
    c = loaded(recipe)
    optim = scaled_by_batch(c.optim, c.data.batch_size)
    found = (c.train.epochs, c.data.batch_size, optim.lr, optim.weight_decay, c.model.temperature)
    assert found == pytest.approx(SINGLE_ENCODER[recipe])
    assert (
        c.model.sync_bn
        == (optim.name == "lars")
        == (optim.warmup_epochs == 10)
        == ("instdisc" not in recipe)
    )


SGD = words("--optim.name sgd --optim.lr_per 0 --optim.lr 0.12 --optim.warmup_epochs 0")
# recipe: options for a short run, of 60 steps of 128 images
CIFAR10 = {
    "cifar10_moco_v3": HEAD,
    "cifar10_byol": HEAD,
    "cifar10_r18_symmetric": words("--model.queue_size 256 --model.bn_splits 2"),
    "cifar10_simclr": (*SGD, *HEAD),
    "cifar10_swav": (
        *SGD,
        *HEAD,
        *words("--model.prototypes 64 --model.epsilon 0.02 --model.freeze_prototypes 5"),
    ),
    "cifar10_instdisc": words(
        "--model.queue_size 256 --model.temperature 0.2 --optim.lr 0.06 "
        "--train.epochs 40 --augment.flip 0.5"
    ),
    "cifar10_supervised": (),
}


@pytest.fixture(scope="module")
def few_of_cifar10(cifar10_jpeg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of 640 images of 10 classes, and 200 of a test set."""
    images = tmp_path_factory.mktemp("cifar10") / "images"
    for part, count in (("train", 64), ("test", 20)):
        for folder in sorted((cifar10_jpeg / part).iterdir()):
            (images / part / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                (images / part / folder.name / path.name).symlink_to(path)
    return images


def train_recipe(recipe: str, images: Path, folder: Path) -> None:
    """Trains a small encoder on views of 16 x 16 pixels: 12 epochs of 5 steps of 128 images."""
    options = words(
        "--data.source folder --data.batch_size 128 --data.workers 1 --augment.size 16 "
        "--model.arch resnet_tiny --optim.lr 0.2 "
        "--train.epochs 12 --train.log_every 5 "
        "--knn.every 12 --knn.k 20 --knn.features backbone"
    )
    arguments = ("pretrain", recipe, *options, *CIFAR10[recipe])
    mocofast(*arguments, "--data.path", images, "--train.dir", folder)


def check_recipe(folder: Path) -> None:
    first, last, before, after = learnt(folder)
    assert last < 0.97 * first, folder
    assert after > before + 0.03, folder  # 7 of 200 images


@pytest.mark.data
@pytest.mark.parametrize("recipe", CIFAR10)
def test_recipes_learn_real_images(few_of_cifar10: Path, tmp_path: Path, recipe: str) -> None:
    train_recipe(recipe, few_of_cifar10, tmp_path / "run")
    check_recipe(tmp_path / "run")


# Recipes whose losses need the other ranks: keys, negatives, sums, or slots of a memory bank.
OF_ALL_RANKS = ("cifar10_r18_symmetric", "cifar10_simclr", "cifar10_swav", "cifar10_instdisc")


def train_recipes(images: Path, folder: Path, rank: int) -> None:
    # All runs in one process group: a second one cannot take the same port again.
    with (
        mock.patch("mocofast.distributed.shutdown", distributed.barrier),
        mock.patch("mocofast.train.run_folder.plot_curves"),  # a fifth of the time
    ):
        for recipe in OF_ALL_RANKS:
            train_recipe(recipe, images, folder / recipe)


@pytest.mark.data
def test_recipes_learn_real_images_in_two_processes(few_of_cifar10: Path, tmp_path: Path) -> None:
    """The other recipes learn in one process, and two ranks equal one (test_methods.py)."""
    on_ranks(partial(train_recipes, few_of_cifar10, tmp_path))
    for recipe in OF_ALL_RANKS:
        check_recipe(tmp_path / recipe)
