"""Encoders, methods and commands on images that do not have three channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mocofast import MoCo, cli, settings
from mocofast.config import AugmentConfig, Config, ConfigError
from mocofast.interop.export import export
from mocofast.methods.build import build_method
from mocofast.models import encoders
from mocofast.models.encoders import build_encoder, features
from mocofast.models.pixels import pixel_statistics, prepare_images
from mocofast.train.work import encoder_work
from tests import runs
from tests.test_export import query_features, run, trained

try:
    import tifffile
except ImportError:
    tifffile = None

BANDS = 13
STATISTICS = ",".join(f"{0.02 + 0.004 * band:.3f}" for band in range(BANDS))


# Encoders and methods


@pytest.mark.parametrize("channels", [1, 13])
@pytest.mark.parametrize("arch", ["resnet18", "resnet18_cifar", "resnet_tiny", "vit_tiny_cifar"])
def test_the_first_convolution_takes_all_channels(arch: str, channels: int) -> None:
    encoder = build_encoder(arch, 32, channels)(num_classes=5).eval()
    images = torch.randn(2, channels, 32, 32, requires_grad=True)
    encoder(images).square().sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().sum((0, 2, 3)) > 0).all()
    # All other weights are as for three channels.
    rgb = build_encoder(arch, 32)(num_classes=5).state_dict()
    other = {name for name, value in encoder.state_dict().items() if value.shape != rgb[name].shape}
    assert len(other) == 1
    assert encoder.state_dict()[other.pop()].shape[1] == channels


def test_a_first_convolution_has_the_deviation_of_its_library() -> None:
    torch.manual_seed(0)
    conv = build_encoder("resnet18", 32, BANDS)(num_classes=5).conv1
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.03)  # fan out
    conv = build_encoder("vit_b_32", 32, BANDS)(num_classes=5).conv_proj
    assert conv.weight.std().item() == pytest.approx((BANDS * 32 * 32) ** -0.5, rel=0.03)  # fan in
    conv = build_encoder("vit_tiny_cifar", 32, BANDS)(num_classes=5).conv_proj
    bound = (6 / (192 + BANDS * 16)) ** 0.5  # Glorot and Bengio's, of the flattened patch
    assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert not conv.weight.requires_grad


def test_moco_normalises_13_channels_of_16_bits_by_13_statistics() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)

    def base(num_classes: int) -> nn.Module:
        return timm.create_model("resnet10t", num_classes=num_classes, in_chans=BANDS)

    mean, std = np.linspace(5, 100, BANDS), np.linspace(2, 60, BANDS)
    model = MoCo(base, 8, 16, pixel_mean=mean.tolist(), pixel_std=std.tolist()).eval()
    levels = np.random.default_rng(0).integers(0, 65536, (4, BANDS, 32, 32))
    exact = (levels / 257 - mean[:, None, None]) / std[:, None, None]
    pixels = torch.from_numpy(levels.astype(np.uint16))
    got = model.normalize_pixels(pixels)
    assert (got.double() - torch.from_numpy(exact)).abs().max() < 1e-4
    with torch.no_grad():
        mirrored = torch.from_numpy(levels[..., ::-1].astype(np.uint16))
        from_pixels = model(pixels, mirrored)
        floats = torch.from_numpy(exact).float()
        from_floats = model(floats, floats.flip(3))
    assert from_pixels.loss.item() == pytest.approx(from_floats.loss.item(), rel=1e-4)
    with pytest.raises(ValueError, match=r"im_q must have 13 channels, .* got 12"):
        model(pixels[:, 1:], pixels[:, 1:])


def test_one_statistic_serves_all_channels() -> None:
    mean, std = pixel_statistics(AugmentConfig(mean=(0.5,), std=(0.25,)))
    images = torch.tensor([0, 32768, 65535]).view(1, 3, 1, 1).to(torch.uint16)
    got = prepare_images(images, mean, std).flatten()
    torch.testing.assert_close(got, torch.tensor([-2.0, 2 / 65535, 2.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["moco", "moco_v3", "byol", "simclr", "memory_bank", "swav"])
def test_every_method_builds_its_encoder_with_the_channels_of_the_data(method: str) -> None:
    values = {"model.method": method, "model.arch": "resnet_tiny", "data.channels": 5}
    config = Config()
    settings.apply(config, values | {"augment.mean": "0.5", "augment.std": "0.2"})
    model = build_method(config, images=40, classes=2)
    images = torch.randint(0, 65536, (4, 5, 16, 16)).to(torch.uint16)
    pixels = model.normalize_pixels(images)
    assert features(model.encoder_q, pixels).shape == (4, 64)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_statistics_are_one_or_as_many_as_channels(name: str) -> None:
    config = Config()
    settings.apply(config, {"data.path": "x", "data.channels": BANDS})
    settings.apply(config, {"augment.mean": "0.5", "augment.std": "0.2"})
    settings.validate(config)
    settings.apply(config, {f"augment.{name}": STATISTICS})
    settings.validate(config)
    settings.apply(config, {f"augment.{name}": "0.5,0.6"})
    with pytest.raises(
        ConfigError, match=rf"augment\.{name}: expected 13 values or 1 value.*got 2"
    ):
        settings.validate(config)


@pytest.mark.parametrize("text", ["0,1,0,2", "divide:1,2,3"])
def test_ranges_are_one_or_as_many_as_channels(text: str) -> None:
    config = Config()
    settings.apply(config, {"data.path": "x", "data.channels": BANDS, "augment.mean": "0.5"})
    settings.apply(config, {"augment.std": "0.2", "augment.color_ops": "auto"})
    for good in ("auto", "0,1", "divide:9", "percentile:1,99", "0,1," * 12 + "0,2"):
        settings.apply(config, {"data.range": good})
        settings.validate(config)
    settings.apply(config, {"data.range": text})
    with pytest.raises(
        ConfigError, match=r"data\.range: got numbers for [23] channels.* or for 13"
    ):
        settings.validate(config)


def test_a_profile_counts_all_channels() -> None:
    encoder = build_encoder("resnet_tiny", 8, BANDS)(num_classes=4)
    off = torch.autocast("cpu", enabled=False)
    forward, _ = encoder_work(encoder, 2, 8, off, BANDS)
    rgb, _ = encoder_work(build_encoder("resnet_tiny")(num_classes=4), 2, 8, off)
    first = 2 * 2 * 64 * 16 * 9  # operations a channel: 2 images, 64 pixels, 16 filters of 3 x 3
    assert sum(w.operations for w in forward) - sum(w.operations for w in rgb) == first * (
        BANDS - 3
    )


@pytest.mark.parametrize(
    ("format", "arch", "size"),
    [
        ("torchvision", "resnet18", 64),
        ("torchvision", "resnet18_cifar", 32),
        ("timm", "resnet18", 64),
        pytest.param("torchvision", "vit_b_32", 32, marks=pytest.mark.slow),  # 88 M weights
    ],
)
def test_exported_lines_load_an_encoder_of_13_channels(
    format: str, arch: str, size: int, tmp_path: Path
) -> None:
    if format == "timm":
        pytest.importorskip("timm")
    options = {"data.channels": BANDS, "augment.mean": "0.1", "augment.std": "0.1"}
    checkpoint = trained(arch, options | {"augment.size": size})
    written = export(checkpoint, format, tmp_path / "encoder.pt")
    images = torch.randn(2, BANDS, size, size)
    with torch.no_grad():
        got = run(written.how_to_load)(images)
    torch.testing.assert_close(got, query_features(checkpoint, images), rtol=1e-5, atol=1e-5)
    assert "13 channels from 0 to 1" in written.how_to_load
    assert f"mean {[0.1] * BANDS}" in written.how_to_load


# The command line


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes 48 arrays and TIFF files of 13 bands, reflectance times 10,000, of two classes.

    Bands 0 to 5 are bright in one class, and bands 6 to 11 in the other class.
    """
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for i in range(48):
        coarse = rng.integers(200, 2000, (4, 4, BANDS))
        coarse[..., 6 * (i % 2) :][..., :6] += 2000
        pixels = np.kron(coarse, np.ones((6, 6, 1))).astype(np.uint16)
        path = root / f"class{i % 2}" / f"{i:02}.npy"
        path.parent.mkdir(exist_ok=True)
        if i % 3 == 0 and tifffile is not None:
            planes = pixels.transpose(2, 0, 1)
            tifffile.imwrite(
                path.with_suffix(".tif"), planes, photometric="minisblack", planarconfig="separate"
            )
        else:
            np.save(path, pixels if i % 2 else pixels.transpose(2, 0, 1))
    return root


def pretrain_arguments(scenes: Path, folder: Path) -> list[str]:
    options = {
        "data.source": "folder",
        "data.path": scenes,
        "data.channels": BANDS,
        "data.batch_size": 16,
        "data.workers": 0,
        "data.holdout": 0.3,
        "model.queue_size": 48,
        "augment.size": 16,
        "augment.jitter": "0.2,0.2,0,0",
        "augment.vertical_flip": 0.5,
        "augment.quarter_turns": 1,
        "augment.channel_jitter": "0.1,0.1",
        "augment.noise": 0.01,
        "augment.mean": 0.04,
        "augment.std": 0.03,
        "train.epochs": 4,
        "train.log_every": 1,
        "train.device": "cpu",
        "knn.k": 5,
        "train.dir": folder,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["pretrain", "digits", *flags]


def write_images(recipe: str, folder: Path) -> None:
    """Writes 12 images of the kind that a recipe is for."""
    rng = np.random.default_rng(0)
    for i in range(12):
        small = rng.integers(0, 60_000, (6, 6, 5)).astype(np.uint16)
        pixels = np.kron(small, np.ones((4, 4, 1), np.uint16))
        if recipe == "medical_gray":
            Image.fromarray(pixels[..., 0]).save(folder / f"{i}.png")
        elif recipe == "histology":
            Image.fromarray((pixels[..., :3] >> 8).astype(np.uint8)).save(folder / f"{i}.png")
        elif recipe == "sentinel2":
            np.save(folder / f"{i}.npy", np.tile(pixels // 6, 3)[..., :BANDS])
        else:
            np.save(folder / f"{i}.npy", pixels.transpose(2, 0, 1) / np.float32(65535))


@pytest.mark.parametrize("recipe", ["sentinel2", "medical_gray", "histology", "microscopy"])
def test_recipes_for_other_images_than_photos_train(recipe: str, tmp_path: Path) -> None:
    images, folder = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    write_images(recipe, images)
    options = {
        **{"data.path": images, "data.batch_size": 4, "data.workers": 0, "train.dir": folder},
        **{"model.arch": "resnet_tiny", "model.queue_size": 8, "augment.size": 16},
        **{"train.device": "cpu", "train.max_steps": 2, "train.log_every": 1},
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert cli.main(["pretrain", recipe, *flags]) == 0
    assert all(np.isfinite(line["loss"]) for line in runs.metrics(folder))
    channels = settings.load_recipe(recipe).data.channels
    assert runs.weights(folder)["encoder_q.conv1.weight"].shape[1] == channels
    assert not (folder / "skipped.jsonl").exists()


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, str]:
    capsys.readouterr()
    assert cli.main([str(word) for word in arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return dict(line.split(maxsplit=1) for line in lines if " " in line)


def test_13_bands_train_resume_exactly_and_are_evaluated_and_exported(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(pretrain_arguments(scenes, whole)) == 0
    assert cli.main([*pretrain_arguments(scenes, parts), "--train.max_steps", "3"]) == 0
    assert cli.main(["pretrain", "--resume", str(parts), "--train.max_steps", "0"]) == 0
    runs.assert_same_run(parts, whole)
    losses = [line["loss"] for line in runs.metrics(whole) if "loss" in line]
    assert np.isfinite(losses).all() and len(losses) == 8
    assert runs.weights(whole)["encoder_q.conv1.weight"].shape == (16, BANDS, 3, 3)

    on = ("--data.path", scenes)
    assert float(printed(capsys, "knn", whole, *on)["knn_top1"]) == 1
    assert float(printed(capsys, "linear", whole, *on)["linear_top1"]) == 1
    tuned = printed(
        capsys, "finetune", whole, *on, "--finetune.epochs", 3, "--finetune.batch_size", 16
    )
    assert float(tuned["finetune_top1"]) > 0.8
    out = tmp_path / "encoder.safetensors"
    printed(capsys, "export", whole, "--format", "torchvision", out)
    checkpoint = torch.load(whole / "checkpoints" / "last.pt", weights_only=True)
    images = torch.randn(2, BANDS, 16, 16)
    lines = export(checkpoint, "torchvision", out).how_to_load
    assert torch.equal(features_of(run(lines), images), query_features(checkpoint, images))


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def test_two_processes_see_the_batches_of_one(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No BatchNorm, so the division of a batch must not matter."""
    last = ("--train.max_steps", "4")
    monkeypatch.setattr(encoders, "TinyResNet", runs.PlainEncoder)
    assert cli.main([*pretrain_arguments(scenes, tmp_path / "1"), *last]) == 0
    script = str(Path(runs.__file__))
    runs.torchrun(2, *pretrain_arguments(scenes, tmp_path / "2"), *last, script=script)
    one, two = runs.metrics(tmp_path / "1"), runs.metrics(tmp_path / "2")
    assert len(one) == len(two)
    for a, b in zip(one, two):
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    expected, got = runs.weights(tmp_path / "1"), runs.weights(tmp_path / "2")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_colours_of_13_bands_are_an_error_that_says_the_way_out(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*pretrain_arguments(scenes, tmp_path / "run"), "--augment.gray", "0.2"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "augment.gray: expected 0" in error and "--augment.color_ops auto" in error
    assert not (tmp_path / "run").exists()


def test_embeddings_of_13_bands_are_those_of_float64(scenes: Path) -> None:
    """The first convolution of normalised levels, in float64 and as the run computes it."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet_tiny", 24, BANDS)(num_classes=4).eval()
    levels = np.load(scenes / "class1" / "01.npy")
    images = torch.from_numpy(levels).permute(2, 0, 1)[None]
    mean, std = torch.full((BANDS,), 255 * 0.04), torch.full((BANDS,), 255 * 0.03)
    conv = encoder.get_submodule("conv1")
    got = conv(prepare_images(images, mean, std))
    exact = (images.double() / 65535 - 0.04) / 0.03
    expected = F.conv2d(exact, conv.weight.double(), padding=1)  # type: ignore[operator,union-attr]
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
