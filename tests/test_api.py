"""Pretraining, loading and features from Python, beside the command line's own evaluation."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mocofast
from mocofast.config import ConfigError
from mocofast.data.sources import load_datasets
from mocofast.evaluate.features import extract, image_batches
from mocofast.models.pixels import pixel_statistics


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> mocofast.Trained:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return mocofast.pretrain(train={"epochs": 2, "dir": str(folder)})


def test_pretrains_and_loads(trained: mocofast.Trained) -> None:
    assert trained.config.recipe == "digits"
    assert trained.path.name == "run" and (trained.path / "metrics.jsonl").is_file()
    assert 0 < trained.before["knn_top1"] <= 1 and 0 < trained.after["knn_top1"] <= 1
    again = mocofast.load(trained.path)
    assert repr(again).startswith("Trained(resnet_tiny, 8 px")
    for name, value in trained.encoder.state_dict().items():
        assert torch.equal(value, again.encoder.state_dict()[name]), name


def test_embeds_what_the_evaluation_embeds(trained: mocofast.Trained) -> None:
    config = trained.config
    val = load_datasets(config.data, config.train.seed).val
    assert val is not None
    cpu = torch.device("cpu")
    expected, _ = extract(
        trained.encoder,
        image_batches(val, config, cpu),
        cpu,
        "backbone",
        *pixel_statistics(config.augment),
    )
    pixels = np.stack([np.asarray(val.load(index)) for index in range(len(val))])
    assert torch.equal(trained.embed(pixels), expected)
    as_tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(trained.embed(as_tensor), expected)
    pictures = [Image.fromarray(image) for image in pixels[:5]]
    assert torch.equal(trained.embed(pictures), trained.embed(pixels[:5]))
    output = trained.embed(pixels[:5], output="output")
    assert output.shape == (5, config.model.dim)


def test_embeds_files_in_order(trained: mocofast.Trained, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = []
    for index in range(4):
        path = tmp_path / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (9, 7 + index, 3), np.uint8)).save(path)
        paths.append(path)
    every = trained.embed(tmp_path)
    assert every.shape == (4, 64)
    assert torch.equal(trained.embed(paths), every)
    one = trained.embed(paths[2])
    torch.testing.assert_close(one, every[2:3], rtol=1e-5, atol=1e-5)


def test_embeds_the_files_that_can_be_decoded(
    trained: mocofast.Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.png", "d.png", "e.png"):
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).save(tmp_path / name)
    for name in ("b.png", "c.png"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"b\.png cannot be decoded.*embed_readable leaves"):
        trained.embed(tmp_path)
    found = trained.embed_readable(tmp_path)
    assert found.names == ["a.png", "d.png", "e.png"] and found.places.tolist() == [0, 3, 4]
    expected = trained.embed([tmp_path / name for name in found.names])
    assert torch.equal(found.features, expected)
    assert [line.split(": ")[:2] for line in caplog.messages] == [
        ["left out unreadable file 1", "b.png"],
        ["left out unreadable file 2", "c.png"],
    ]
    paths = [tmp_path / name for name in ("c.png", "e.png", "a.png")]
    listed = trained.embed_readable(paths)
    assert listed.names == [str(path) for path in paths[1:]] and listed.places.tolist() == [1, 2]
    assert torch.equal(listed.features, expected[[2, 0]])
    whole = trained.embed_readable(paths[1:], output="output")
    assert torch.equal(whole.features, trained.embed(paths[1:], output="output"))
    with pytest.raises(ConfigError, match=r"none of the 1 images can be decoded.*c\.png"):
        trained.embed_readable(paths[:1])


def test_mistakes(trained: mocofast.Trained, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        trained.embed([tmp_path / "nowhere.png"])
    with pytest.raises(ValueError, match="no image"):
        trained.embed([])
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"bad\.png cannot be decoded"):
        trained.embed([bad])
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        trained.embed(torch.zeros(3, 8, 8))
    with pytest.raises(TypeError, match="got int"):
        trained.embed(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r'optim=\{"lr": 0.06\}'):
        mocofast.pretrain(lr=0.1)
    with pytest.raises(ConfigError, match=r"optimm: unknown group of options.*'optim'"):
        mocofast.pretrain(optimm={})
    with pytest.raises(ConfigError, match="unknown recipe 'digit'"):
        mocofast.pretrain(recipe="digit")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mocofast.load(tmp_path / "nowhere")


def test_fits_to_a_folder_of_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(images / f"{index}.png")
    with caplog.at_level(logging.INFO):
        run = mocofast.pretrain(images, train={"max_steps": 1, "dir": str(tmp_path / "run")})
    assert run.config.recipe == "auto"
    assert run.embed(images).shape[0] == 40
    assert not run.encoder.training and isinstance(run.encoder, nn.Module)
