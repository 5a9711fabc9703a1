"""Schedules of views, tokens, queue and rate: values, every loader, resume, branches, plateaus."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from mocofast import cli, distributed, settings
from mocofast.config import AugmentConfig, ConfigError, DataConfig, OptimConfig
from mocofast.data.interface import BatchSlice
from mocofast.data.loaders import build_loader
from mocofast.data.sources import ArraySource, load_datasets
from mocofast.device import choose_autocast
from mocofast.evaluate.linear import plain_view
from mocofast.evaluate.monitor import KNNMonitor
from mocofast.methods.moco import MoCo
from mocofast.models.encoders import TinyResNet, build_encoder
from mocofast.models.flexible_vit import FlexibleViT
from mocofast.optim.schedule import learning_rate
from mocofast.train.checkpoint import load_checkpoint, model_from_checkpoint
from mocofast.train.engine import Engine
from mocofast.train.optimizer import optimizer_of
from tests.runs import assert_same_run, make_images, metrics, torchrun, weights

CPU = torch.device("cpu")
# Two steps an epoch of digits.
SHORT = "--data.batch_size 512 --train.log_every 1 --knn.start false --checkpoint.every_epochs 1"
VIT = (
    "--model.arch vit_micro_cifar --augment.size 16 --augment.sizes 0:8,2:16 "
    "--augment.crop_scales 0:0.6:1,1:0.3:0.9 --model.token_dropout 0.4 --model.queue_warmup 2 "
    "--model.queue_size 1000 --model.shuffle_bn false --optim.schedule wsd "
    "--optim.cooldown_epochs 2 --train.epochs 4 --data.batch_sizes 0:512,3:1024"
)


def pretrain(folder: Path, *options: str) -> Path:
    """Runs `mocofast pretrain` in `folder` and returns the folder."""
    words = [word for option in options for word in option.split()]
    assert cli.main(["pretrain", *SHORT.split(), "--train.dir", str(folder), *words]) == 0
    return folder


# ---- views ----


def test_an_epoch_takes_the_last_stage_that_has_begun() -> None:
    augment = AugmentConfig(size=32, sizes=("0:16", "10:24", "20:32"), crop_scales=("0:0.5:1",))
    assert [augment.at(epoch).size for epoch in (0, 9, 10, 19, 20, 99)] == [16, 16, 24, 24, 32, 32]
    assert augment.at(3).crop_scale == (0.5, 1.0)
    assert augment.training_sizes() == (16, 24, 32)
    assert augment.at(3).at(30).size == 16  # follows no schedule any more
    plain = AugmentConfig(size=48)
    assert plain.at(7) is plain and plain.training_sizes() == (48,)
    assert plain_view(augment).at(0).size == 32  # an evaluation takes augment.size


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("augment.sizes", "5:16"),
        ("augment.sizes", "0:16,9:24,3:32"),
        ("augment.sizes", "0:16,0:24"),
        ("augment.sizes", "0:1.5"),
        ("augment.sizes", "16"),
        ("data.batch_sizes", "0:192"),
        ("data.batch_sizes", "0:128.5"),
        ("augment.crop_scales", "0:0.5"),
        ("augment.crop_scales", "0:0.9:0.5"),
        ("model.token_dropout", "1"),
        ("optim.cooldown_epochs", "101"),
    ],
)
def test_bad_schedules_are_refused_by_name(option: str, value: str) -> None:
    config = settings.load_recipe("digits")
    settings.apply(config, {"optim.schedule": "wsd", option: value})
    with pytest.raises(ConfigError, match=option):
        settings.validate(config)


def test_numbers_of_yaml_without_quotes_get_an_error_that_says_so() -> None:
    with pytest.raises(ConfigError, match=r"augment\.sizes: expected EPOCH:SIZE.*quotes"):
        settings.from_dict({"augment": {"sizes": [624]}})  # YAML reads 10:24 so


def test_parts_of_patches_and_tokens_of_a_resnet_are_refused(tmp_path: Path) -> None:
    for options, message in (
        ("--model.arch vit_micro_cifar --augment.sizes 0:6", "multiple of 4"),
        ("--model.token_dropout 0.5", "model.token_dropout: expected 0"),
    ):
        config = settings.load_recipe("digits")
        words = options.split()
        settings.apply(config, {n[2:]: v for n, v in zip(words[::2], words[1::2])})
        from mocofast.train.build import new_state

        with pytest.raises(ConfigError, match=message):
            new_state(config, load_datasets(config.data, 0), CPU, 0, 1)


@pytest.mark.parametrize("name", ["device", "torchvision", "dali"])
def test_every_loader_follows_the_schedule(name: str, tmp_path: Path) -> None:
    """An epoch's views are those of a loader whose size and scale are fixed, also after a jump."""
    config = settings.load_recipe("cifar10_r18")
    path = make_images(tmp_path, 12)
    settings.apply(config, {"data.source": "folder", "data.path": str(path), "data.holdout": 0.0})
    source = load_datasets(config.data, 0).train
    augment = replace(config.augment, sizes=("0:8", "1:12"), crop_scales=("0:0.5:1", "2:0.1:0.3"))
    data = DataConfig(loader=name, batch_size=4, workers=1 if name == "dali" else 0)

    def loader(augment: AugmentConfig) -> Any:
        return build_loader(source, data, (augment, augment), BatchSlice(4), 3, CPU)

    scheduled = loader(augment)
    for epoch, size in ((0, 8), (1, 12), (2, 12), (0, 8)):
        fixed = loader(augment.at(epoch))
        for ours, expected in zip(scheduled.epoch(epoch), fixed.epoch(epoch), strict=True):
            assert ours.views[0].shape == (4, 3, size, size)
            assert all(map(torch.equal, ours.views, expected.views))
        fixed.close()
    scheduled.close()


def test_the_device_loader_asks_for_the_largest_size() -> None:
    source = ArraySource(np.zeros((8, 8, 8, 3), np.uint8), None, (), str)
    augment = AugmentConfig(size=32, sizes=("0:32", "1:96"))
    data = DataConfig(loader="device", batch_size=4)
    with pytest.raises(ConfigError, match="not 96"):
        build_loader(source, data, (augment,), BatchSlice(4), 0, CPU)


# ---- steps ----


def moco(**options: Any) -> MoCo:
    torch.manual_seed(0)
    return MoCo(TinyResNet, dim=16, queue_size=24, momentum=0.9, **options)


def engine_of(method: MoCo, mode: str, backend: Any = None) -> Engine:
    optimizer = optimizer_of(method, OptimConfig())
    return Engine(mode, method, optimizer, choose_autocast("fp32", CPU), 1, 8, backend)


def views(size: int, seed: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 8, 3, size, size, generator=torch.Generator().manual_seed(seed)))


def test_a_size_is_compiled_once_and_more_sizes_than_dynamos_limit_stay_compiled() -> None:
    graphs: list[tuple[int, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(max((tuple(x.shape) for x in inputs if hasattr(x, "shape")), key=len))
        return graph.forward

    engine = engine_of(moco(), "compile", backend)
    sizes = list(range(4, 14))
    for size in [*sizes, *reversed(sizes)]:
        engine.step(views(size, size))
    assert len(graphs) == 2 * len(sizes)  # the query encoder and the key encoder
    torch._dynamo.reset()


def test_fixed_buffers_follow_the_size() -> None:
    losses = {}
    for mode in ("eager", "graph"):
        engine = engine_of(moco(), mode)
        losses[mode] = [float(engine.step(views(s, i)).loss) for i, s in enumerate((8, 8, 12, 8))]
    assert losses["graph"] == pytest.approx(losses["eager"], rel=1e-5)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_warm_up_fills_the_queue_and_trains_nothing(mode: str, symmetric: bool) -> None:
    method = moco(symmetric=symmetric)
    before = {name: p.clone() for name, p in method.named_parameters()}
    engine = engine_of(method, mode)
    for step in range(1 if symmetric else 2):
        engine.step(views(8, step), update=False)
    assert all(torch.equal(p, before[name]) for name, p in method.named_parameters())
    assert not engine.optimizer.state_dict()["state"]
    # The last keys are the key encoder's outputs, in train mode, in the order of the images.
    expected = moco(symmetric=symmetric)
    if not symmetric:
        expected.encoder_k(views(8, 0)[1])
    keys = nn.functional.normalize(expected.encoder_k(views(8, 1 - symmetric)[1]), dim=1)
    torch.testing.assert_close(method.queue[8:16], keys.detach(), rtol=1e-4, atol=1e-5)
    assert int(method.queue_ptr) == 16
    engine.step(views(8, 9))
    assert any(not torch.equal(p, before[name]) for name, p in method.named_parameters())


# ---- tokens ----


def vit(size: int = 16) -> FlexibleViT:
    torch.manual_seed(0)
    return build_encoder("vit_micro_cifar", size)(num_classes=5)  # type: ignore[return-value]


def test_without_dropout_it_is_torchvisions() -> None:
    ours = vit()
    theirs = torchvision.models.VisionTransformer(16, 4, 4, 4, 64, 256, num_classes=5)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-6)
    assert type(build_encoder("vit_b_32", 32)(num_classes=2)) is FlexibleViT


def test_images_of_another_size_get_interpolated_positions() -> None:
    ours, other = vit(16).eval(), vit(24).eval()
    position = ours.encoder.pos_embedding
    resized = timm.layers.resample_abs_pos_embed(position, [6, 6], num_prefix_tokens=1)
    other.load_state_dict({**ours.state_dict(), "encoder.pos_embedding": resized})
    images = torch.randn(3, 3, 24, 24)
    torch.testing.assert_close(ours(images), other(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="multiples of 4"):
        ours(torch.randn(1, 3, 18, 18))


def kept(model: FlexibleViT, step: int, count: int = 64, patches: int = 16) -> np.ndarray:
    model.begin_step(step)
    return model._kept(count, patches).sort(dim=1).values.numpy()


def test_train_mode_computes_on_the_kept_patches_alone() -> None:
    """The independent result: every image alone, through blocks that see its kept patches."""
    model = vit()
    model.drop_tokens(0.4, seed=1)
    images = torch.randn(4, 3, 16, 16)
    stay = kept(model, 7, 4)
    assert stay.shape == (4, 10)  # round(16 * 0.6)
    model.begin_step(7)
    got = model(images)
    position = model.encoder.pos_embedding[0]
    for image, patches, result in zip(images, stay, got):
        tokens = [model.class_token[0, 0] + position[0]]
        for patch in patches:
            row, column = divmod(int(patch), 4)
            pixels = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            linear = model.conv_proj.weight.flatten(1) @ pixels.flatten() + model.conv_proj.bias
            tokens.append(linear + position[1 + patch])
        expected = model.heads(model.encoder.ln(model.encoder.layers(torch.stack(tokens)[None])))
        torch.testing.assert_close(result, expected[0, 0], rtol=1e-3, atol=1e-5)
    model.eval()
    assert torch.equal(model(images), vit().eval()(images))


def test_choices_depend_on_seed_step_image_and_call_and_are_even(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = vit(), vit()
    first.drop_tokens(0.5, seed=1)
    second.drop_tokens(0.5, seed=2)
    here = kept(first, 3)
    assert len({row.tobytes() for row in here}) > 60  # of 64 images
    assert (kept(first, 3) == here).all()
    again = first._kept(64, 16).sort(dim=1).values.numpy()  # the second call of the step
    for other in (kept(first, 4), kept(second, 3), again):
        assert (other == here).all(axis=1).sum() < 5
    # Two ranks choose as one process with all images.
    ranks, alone = [], distributed.rank_and_world_size
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank_and_world_size", lambda rank=rank: (rank, 2))
        ranks.append(kept(first, 3, 32))
    assert (np.concatenate(ranks) == here).all()
    monkeypatch.setattr(distributed, "rank_and_world_size", alone)
    # 64,000 choices of half of 16 patches: all patches equally often, all pairs, too.
    chosen = np.zeros((64000, 16))
    for step in range(1000):
        np.put_along_axis(chosen[64 * step :][:64], kept(first, step), 1, axis=1)
    assert np.abs(chosen.mean(0) - 0.5).max() < 5 * 0.5 / math.sqrt(64000)
    pairs = (chosen.T @ chosen / 64000)[~np.eye(16, dtype=bool)]
    assert np.abs(pairs - 7 / 30).max() < 6 * math.sqrt(7 / 30 * 23 / 30 / 64000)


# ---- rate ----


def test_the_rate_of_wsd() -> None:
    config = OptimConfig(lr=2.0, schedule="wsd", warmup_epochs=1.0, cooldown_epochs=4.0)
    rates = [learning_rate(config, step, 5, 10) for step in range(50)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert set(rates[5:31]) == {2.0}
    expected = [2 * (1 - (k / 20) ** 0.5) for k in range(1, 20)]
    assert rates[31:] == pytest.approx(expected)
    forever = replace(config, cooldown_epochs=0.0)
    assert learning_rate(forever, 49, 5, 10) == 2.0


# ---- runs ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every schedule: filling, two sizes and scales, tokens, stable rate, cool-down."""
    return pretrain(tmp_path_factory.mktemp("whole") / "run", VIT)


@pytest.mark.parametrize("step", [1, 3, 4, 6])  # the seventh joins two batches
def test_a_run_that_stops_at_any_step_continues_exactly(
    step: int, whole: Path, tmp_path: Path
) -> None:
    folder = pretrain(tmp_path / "run", VIT, f"--train.max_steps {step}")
    pretrain(folder, VIT, "--resume auto --train.max_steps 0")
    assert_same_run(folder, whole)


def test_two_ranks_train_as_one_process(whole: Path, tmp_path: Path) -> None:
    """Filling without gradients, tokens and sizes: every rank takes its part of each choice."""
    options = [*SHORT.split(), *VIT.split(), "--train.dir", str(tmp_path), "--train.max_steps", "7"]
    torchrun(2, "pretrain", *options)
    losses = [
        [line["loss"] for line in metrics(folder) if "loss" in line] for folder in (tmp_path, whole)
    ]
    assert losses[0][:6] == pytest.approx(losses[1][:6], rel=1e-4)
    # The joined step has the images in another order, and so other tokens of each.
    assert losses[0][6:] == pytest.approx(losses[1][6:], rel=0.01)


def test_tokens_stay_out_of_checkpoints_and_evaluations(whole: Path) -> None:
    assert not any("token_key" in name for name in weights(whole))
    model, config = model_from_checkpoint(load_checkpoint(whole))
    assert config.model.token_dropout == 0.4
    assert not any(getattr(module, "token_dropout", 0) for module in model.modules())


def test_a_branch_is_the_run_that_was_planned_and_leaves_the_trunk_alone(
    whole: Path, tmp_path: Path
) -> None:
    """The trunk knows no end. Its branch equals a run that knew its length from the start."""
    trunk = pretrain(tmp_path / "trunk", VIT, "--optim.cooldown_epochs 0 --checkpoint.keep 9")
    files = {p: p.read_bytes() for p in trunk.rglob("*") if p.is_file()}
    saved = trunk / "checkpoints" / "step_00000004.pt"
    assert cli.main(["pretrain", "--resume", str(saved), "--cooldown", "2"]) == 0
    assert {p: p.read_bytes() for p in trunk.rglob("*") if p.is_file()} == files
    branch = tmp_path / "trunk-epoch2-cooldown2"
    lines = [line for line in metrics(whole) if line["step"] > 4]
    assert metrics(branch) == lines
    assert lines[-2]["lr"] < 0.3 * lines[0]["lr"]
    ours, expected = weights(branch), weights(whole)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    # The trunk goes on, also beyond its former end.
    pretrain(trunk, "--resume auto --train.epochs 5")
    assert load_checkpoint(trunk)["epoch"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--resume {run} --cooldown -1", "--cooldown: expected at least 1"),
        ("--resume auto --cooldown 2", "expected --resume RUN"),
        ("digits --resume {run} --cooldown 2", "without a recipe"),
        ("--cooldown 2", "expected --resume RUN"),
        ("--resume {run} --cooldown 2 --train.epochs 9", "train.epochs: --cooldown sets"),
        ("--resume {run} --cooldown 2 --train.dir {run}", "holds a run already"),
        ("--resume {run} --train.epochs 9", "train.epochs"),  # its cool-down has begun
    ],
)
def test_branches_that_cannot_be_are_refused(
    options: str, message: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pretrain", *options.format(run=whole).split()]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_a_stable_rate_has_no_branch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain(tmp_path / "run", "--train.epochs 1")
    assert cli.main(["pretrain", "--resume", str(run), "--cooldown", "2"]) == 2
    assert "optim.schedule wsd" in capsys.readouterr().err


def test_a_plateau_of_knn_ends_the_run_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = [0.5, 0.7, 0.6, 0.7, 0.71, 0.7, 0.7, 0.7, 0.9]

    def evaluate(self: KNNMonitor, *_: Any) -> dict[str, float]:
        top1 = figures[evaluate.calls]  # type: ignore[attr-defined]
        evaluate.calls += 1  # type: ignore[attr-defined]
        return {"knn_top1": top1, "knn_top5": 1.0}

    evaluate.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(KNNMonitor, "evaluate", evaluate)
    options = "--train.epochs 20 --knn.every 1 --knn.shots 0 --knn.patience 3"
    run = pretrain(tmp_path / "run", options, "--train.max_steps 14")
    assert load_checkpoint(run)["since_best"] == 2
    pretrain(run, options, "--resume auto --train.max_steps 0")
    assert load_checkpoint(run)["epoch"] == 8  # 3 evaluations after the fifth
    pretrain(run, options, "--resume auto --train.max_steps 0")
    assert evaluate.calls == 8  # type: ignore[attr-defined]
    pretrain(run, options, "--resume auto --train.max_steps 18 --knn.patience 4")
    assert load_checkpoint(run)["best"] == 0.9


def test_patience_needs_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ("--knn.every 0", "--data.labels none"):
        path = make_images(tmp_path / "images", 8)
        words = f"--data.source folder --data.path {path} --knn.patience 1 --data.batch_size 4"
        words += f" --train.dir {tmp_path / 'run'} {options}"
        assert cli.main(["pretrain", *words.split()]) == 2
        assert "knn." in capsys.readouterr().err
