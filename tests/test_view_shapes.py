"""Views that are no squares: all loaders, the evaluation, encoders, and a run to its end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast import cli, settings
from mocofast.config import AugmentConfig, Config, ConfigError, DataConfig
from mocofast.data.arrays import central_view
from mocofast.data.evaluation import center_view
from mocofast.data.interface import Batch, BatchSlice, Source, sample_view
from mocofast.data.loaders import build_loader
from mocofast.data.scaled import scaled_factor
from mocofast.data.sources import ArraySource, load_datasets
from mocofast.models.encoders import build_encoder
from mocofast.report.gallery import _sprite
from mocofast.train.auto import encoders
from tests.pictures import differences
from tests.runs import assert_same_run, metrics

SHAPE = (24, 56)
CPU = torch.device("cpu")
# Without hue, which PIL quantises, and without quarter turns, which do not fit.
AUGMENT = AugmentConfig(
    size=SHAPE, jitter=(0.4, 0.4, 0.4, 0.0), blur=0.5, vertical_flip=0.4, solarize=0.2
)


def write_images(root: Path, count: int = 24) -> Path:
    """Writes smooth pictures of 60 x 90 pixels into two class folders, and returns `root`."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        path = root / f"c{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((90, 60), Image.Resampling.BICUBIC).save(path)
    return root


def batches(source: Source, name: str, augment: AugmentConfig) -> list[Batch]:
    channels = 5 if isinstance(source, ArraySource) else 3
    data = DataConfig(loader=name, workers=int(name == "dali"), channels=channels)
    loader = build_loader(source, data, (augment, augment), BatchSlice(6), 3, CPU)
    try:
        return [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]
    finally:
        loader.close()


# ---- options ----


def test_a_size_is_a_side_or_height_and_width() -> None:
    config = Config()
    for text, size in (("24,56", SHAPE), ([24, 56], SHAPE), ("32,32", 32), (32, 32), ("40", 40)):
        settings.apply(config, {"augment.size": text})
        assert config.augment.size == size
        assert settings.from_dict(settings.to_dict(config)).augment.size == size
    assert settings.as_flags({"augment.size": SHAPE}) == ["--augment.size", "24,56"]
    for bad in ("24,56,3", "24x56", "a", True, 2.5):
        with pytest.raises(ConfigError, match=r"augment\.size: expected a number, or HEIGHT,WIDTH"):
            settings.apply(config, {"augment.size": bad})
    config.augment.sizes = ("0:12:28", "2:24", "4:24:56")
    assert config.augment.training_sizes() == ((12, 28), 24, SHAPE)
    settings.validate(settings.load_recipe("digits"))
    for option, value in (("augment.size", (0, 5)), ("augment.sizes", ("0:1:2:3",))):
        config = settings.load_recipe("digits")
        settings.apply(config, {option: value})
        with pytest.raises(ConfigError, match=option):
            settings.validate(config)
    config = settings.load_recipe("digits")
    settings.apply(config, {"augment.size": "8,16", "augment.quarter_turns": 0.5})
    with pytest.raises(ConfigError, match=r"quarter_turns: expected 0 for views of 8 x 16 pixels"):
        settings.validate(config)


# ---- views ----


def test_scale_and_ratio_are_those_of_the_crop_in_the_image() -> None:
    """As in torchvision's RandomResizedCrop, whose size is not read for the crop."""
    boxes = []
    for i in range(200):
        square = sample_view(replace(AUGMENT, size=24), (600, 900), 0, 0, i, 0)
        assert sample_view(AUGMENT, (600, 900), 0, 0, i, 0) == square
        boxes.append(sample_view(replace(AUGMENT, crop_ratio=(2, 3)), (600, 900), 0, 0, i, 0)[2:4])
    ratios = np.array([width / height for height, width in boxes])
    assert ratios.min() > 1.45 and ratios.max() < 3.05 and np.ptp(ratios) > 0.8


@pytest.mark.parametrize("kind", ["photos", "bands"])
def test_all_loaders_make_the_same_views(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    if kind == "photos":
        data = {"data.source": "folder", "data.path": str(write_images(tmp_path))}
        config = Config()
        settings.apply(config, {**data, "data.holdout": 0.0})
        source, augment = load_datasets(config.data, 0).train, AUGMENT
    else:
        levels = np.random.default_rng(0).integers(0, 65536, (12, 30, 40, 5), dtype=np.uint16)
        source = ArraySource(levels, None, (), "image")
        augment = replace(AUGMENT, jitter=(0.4, 0.4, 0.0, 0.0), gray=0.0, solarize=0.0)
    found = {name: batches(source, name, augment) for name in ("torchvision", "dali", "device")}
    expected = found.pop("torchvision")
    assert expected[0].views[0].shape[2:] == SHAPE
    for name, others in found.items():
        for ours, other in zip(expected, others, strict=True):
            assert torch.equal(ours.index, other.index)
            for x, y in zip(ours.views, other.views):
                if kind == "bands" and name == "dali":
                    assert torch.equal(x.view(torch.int16), y.view(torch.int16))
                else:  # jitter and blur widen a rounding of the resize
                    assert differences(x, y).mean() < (0.3 if kind == "photos" else 2.0), name


def test_a_file_is_scaled_down_to_the_sides_of_its_view() -> None:
    params = sample_view(AUGMENT, (600, 900), 0, 0, 0, 0)
    for height, width, factor in ((24 * 4, 56 * 4, 4), (24 * 8, 56 * 2, 2), (24, 56 * 8, 1)):
        assert scaled_factor([params._replace(height=height, width=width)], [AUGMENT]) == factor


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (200, 200), (20, 50), (33, 400), (30, 1200)])
def test_the_evaluation_covers_the_view_and_cuts_the_centre(size: tuple[int, int]) -> None:
    """On ramps a pixel tells its place: red the column, green the row, from 0 to 255."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    ramps = np.stack((x * 255 / (width - 1), y * 255 / (height - 1), 0 * x), axis=2)
    pixels = np.rint(ramps).astype(np.uint8)
    # The view shows 7/8 of the largest rectangle of its shape, or all of it if there is no margin.
    small = height <= SHAPE[0] and width <= SHAPE[1]
    factor = min(height / SHAPE[0], width / SHAPE[1]) * (1 if small else 7 / 8)
    rows, columns = (
        ((side - factor * count) / 2 + (np.arange(count) + 0.5) * factor - 0.5)
        for side, count in zip(size, SHAPE)
    )
    for view in (center_view(Image.fromarray(pixels), SHAPE), central_view(pixels, SHAPE)):
        found = np.asarray(view).astype(float)
        assert found.shape == (*SHAPE, 3)
        # Sides are rounded to whole pixels, of the image or of the resized image.
        for channel, at, side in ((0, columns[None], width), (1, rows[:, None], height)):
            expected = np.clip(at, 0, side - 1) * 255 / (side - 1)
            most = 1.2 + 255 / (side - 1) * max(1, factor)
            assert np.abs(found[..., channel] - expected).max() < most


# ---- encoders ----


def test_vits_have_positions_for_every_patch() -> None:
    timm = pytest.importorskip("timm")
    ours = build_encoder("vit_micro_cifar", SHAPE)(num_classes=5).eval()
    theirs = timm.models.VisionTransformer(
        SHAPE, 4, num_classes=0, embed_dim=64, depth=4, num_heads=4
    ).eval()
    from tests.test_vit import timms

    head = ("heads.head.weight", "heads.head.bias")
    weights = {timms(n): value for n, value in ours.state_dict().items() if n not in head}
    theirs.load_state_dict(weights)
    images = torch.randn(2, 3, *SHAPE)
    ours.heads = torch.nn.Identity()
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    # Another size: positions are interpolated.
    theirs.set_input_size((12, 36))
    smaller = torch.randn(2, 3, 12, 36)
    torch.testing.assert_close(ours(smaller), theirs(smaller), rtol=1e-4, atol=1e-5)
    assert build_encoder("vit_b_32", (64, 96))(num_classes=2)(torch.zeros(1, 3, 64, 96)).shape
    assert build_encoder("timm/vit_tiny_patch16_224", (32, 64))(num_classes=2).patch_embed
    with pytest.raises(ConfigError, match=r"augment.size: expected a multiple of 4, .* 24 x 30"):
        build_encoder("vit_micro_cifar", (24, 30))


def test_auto_and_pictures_take_the_shape() -> None:
    assert encoders((32, 64), 1000, "cpu") == encoders(45, 1000, "cpu")
    url, side = _sprite(np.full((3, *SHAPE, 3), 200, np.uint8), 100)
    assert side == 56 and url.startswith("data:image/jpeg")


# ---- a run ----


def pretrain(folder: Path, images: Path, *options: str) -> None:
    words = (
        f"pretrain digits --data.source folder --data.path {images} --data.batch_size 8 "
        "--model.arch vit_micro_cifar --augment.size 24,56 --augment.sizes 0:12:28,1:24:56 "
        "--train.epochs 3 --train.log_every 1 --model.queue_size 16 --data.workers 0 "
        f"--data.loader torchvision --train.dir {folder}"
    )
    assert cli.main([*words.split(), *options]) == 0


def test_a_run_resumes_exactly_and_its_encoder_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, whole, parts = write_images(tmp_path / "images"), tmp_path / "whole", tmp_path / "parts"
    pretrain(whole, images)
    pretrain(parts, images, "--train.max_steps", "4")
    pretrain(parts, images, "--train.max_steps", "0", "--resume", "auto")
    assert_same_run(parts, whole)
    assert "knn_top1" in metrics(whole)[-1]
    with Image.open(whole / "views.png") as sheet:
        assert sheet.width > 8 * 56 / 24 * 20
    assert "24 x 56 pixels" in (whole / "report.html").read_text()
    capsys.readouterr()
    for command in ("knn", "linear", "finetune --finetune.epochs 1"):
        name, *options = command.split()
        assert cli.main([name, str(whole), "--data.path", str(images), *options]) == 0, command
    assert cli.main(["embed", str(whole), str(images), str(tmp_path / "features.npz")]) == 0
    out = tmp_path / "vit.pt"
    for format in ("timm", "torchvision"):
        capsys.readouterr()
        assert cli.main(["export", str(whole), "--format", format, str(out)]) == 0
        text = capsys.readouterr().out
        scope: dict[str, Any] = {}
        code = text[text.index("import torch") :].split("\nnext")[0]
        exec(code, scope)
        assert scope["model"].eval()(torch.zeros(1, 3, *SHAPE)).shape == (1, 64), format
