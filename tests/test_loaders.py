"""The choice of the loader, and the batches of evaluation."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from mocofast.config import AugmentConfig, DataConfig
from mocofast.data import loaders
from mocofast.data.interface import BatchSlice
from mocofast.data.loaders import (
    build_loader,
    choose_loader,
    count_workers,
    dali_missing,
    eval_batches,
)
from mocofast.data.sources import ArraySource, FolderSource, find_images
from mocofast.data.torchvision_loader import TorchvisionLoader
from tests.pictures import assert_same_batches

CPU = torch.device("cpu")
LARGE = (AugmentConfig(size=224),)  # too large for the device loader
IN_MEMORY = ArraySource(
    np.arange(6 * 8 * 8 * 3).reshape(6, 8, 8, 3).astype(np.uint8), np.arange(6) % 2, ("a", "b")
)


@pytest.fixture
def folder(tmp_path: Path) -> FolderSource:
    """Writes seven images: larger than 32 pixels, wide, tall, exactly 32, smaller."""
    sizes = [(70, 50), (64, 33), (33, 90), (32, 32), (20, 20), (30, 20), (200, 40)]
    for i, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return FolderSource(tmp_path, find_images(tmp_path), np.arange(7) % 2, ("a", "b"))


def test_auto_takes_dali_for_files_where_it_is_installed(
    folder: FolderSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "dali_missing", lambda: "")
    assert choose_loader(folder, "auto", CPU, LARGE) == (
        "dali",
        "image files, and DALI is installed",
    )
    assert choose_loader(folder, "dali", CPU, LARGE)[0] == "dali"
    assert choose_loader(folder, "torchvision", CPU, LARGE) == ("torchvision", "asked for")


def test_without_dali_auto_falls_back_and_asking_for_it_says_how_to_install_it(
    folder: FolderSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # makes the import fail
    assert dali_missing()
    choice, reason = choose_loader(folder, "auto", CPU, LARGE)
    assert choice == "torchvision"
    assert "pip install 'mocofast[cuda13]'" in reason
    with pytest.raises(
        ValueError, match=r"data\.loader=dali, but .* pip install 'mocofast\[cuda13\]'"
    ):
        choose_loader(folder, "dali", CPU, LARGE)


def test_images_in_memory_stay_on_the_device_where_their_views_are_small() -> None:
    small, large = (AugmentConfig(size=8),), (AugmentConfig(size=8), AugmentConfig(size=224))
    assert choose_loader(IN_MEMORY, "auto", CPU, small)[0] == "device"
    # The device loader itself refuses.
    assert choose_loader(IN_MEMORY, "device", CPU, large) == ("device", "asked for")
    choice, reason = choose_loader(IN_MEMORY, "auto", CPU, large)
    assert choice == "torchvision"
    assert "in memory" in reason and "up to 64 pixels, not 224" in reason
    with pytest.raises(
        ValueError, match=r"data\.loader must be auto, device, dali or torchvision, got 'pil'"
    ):
        choose_loader(IN_MEMORY, "pil", CPU, small)
    pytest.importorskip("nvidia.dali")
    assert choose_loader(IN_MEMORY, "auto", torch.device("cuda"), large)[0] == "dali"
    assert choose_loader(IN_MEMORY, "dali", CPU, small) == ("dali", "asked for")


def test_the_built_loader_says_why_it_was_chosen(folder: FolderSource) -> None:
    augment = AugmentConfig(size=16)
    on_device = build_loader(
        IN_MEMORY, DataConfig(), (augment,), BatchSlice(3), 0, torch.device("cpu")
    )
    assert (on_device.name, on_device.steps_per_epoch) == ("device", 2)
    assert on_device.reason == "the images are in memory, and their views small"
    data = DataConfig(loader="torchvision", workers=0)
    for views in (1, 2):  # linear probe, pretraining
        loader = build_loader(
            folder, data, (augment,) * views, BatchSlice(3), 0, torch.device("cpu")
        )
        assert (loader.name, loader.reason, loader.steps_per_epoch) == (
            "torchvision",
            "asked for",
            2,
        )
        assert len(next(loader.epoch(0)).views) == views
        loader.close()


@pytest.mark.parametrize("name", ["torchvision", "dali"])
def test_working_further_ahead_changes_no_batch(folder: FolderSource, name: str) -> None:
    if name == "dali" and dali_missing():
        pytest.skip("DALI is not installed")
    streams = []
    for prefetch in (1, 3):
        data = DataConfig(loader=name, workers=1, prefetch=prefetch)
        loader = build_loader(folder, data, (AugmentConfig(size=16),) * 2, BatchSlice(2), 0, CPU)
        streams.append([batch for epoch in range(3) for batch in loader.epoch(epoch)])
        if isinstance(loader, TorchvisionLoader):
            assert loader._batches is not None
            assert loader._batches.prefetch_factor == prefetch
        loader.close()
    assert len(streams[0]) == 3 * 3
    assert_same_batches(*streams)


def test_workers_share_the_cores_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    assert count_workers(-1) == 7
    assert count_workers(0) == 0
    assert count_workers(3) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun sets it to the ranks of the machine
    assert count_workers(-1) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert count_workers(-1) == 1
    with pytest.raises(ValueError, match=r"data\.workers must be -1 or more, got -2"):
        count_workers(-2)


def torchvisions_center(image: Image.Image, size: int) -> np.ndarray:
    """Applies torchvision's evaluation transforms to a PIL image, as facebookresearch/moco
    does.
    """
    short = round(size * 256 / 224) if max(image.size) > size else size
    return np.asarray(
        transforms.Compose([transforms.Resize(short), transforms.CenterCrop(size)])(image)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_in_order_cut_as_by_torchvision(
    folder: FolderSource, workers: int
) -> None:
    # The last batch holds one image.
    batches = list(eval_batches(folder, size=32, batch_size=3, workers=workers))
    assert torch.cat([index for _, _, index in batches]).tolist() == list(range(7))
    for images, labels, index in batches:
        assert images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels is not None
        assert labels.tolist() == [i % 2 for i in index.tolist()]
        for image, i in zip(images, index.tolist()):
            expected = torchvisions_center(Image.open(folder.load(i)), 32)
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_images_of_the_views_size_are_not_touched_by_evaluation() -> None:
    [(images, labels, index)] = eval_batches(IN_MEMORY, size=8, batch_size=10, workers=0)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), IN_MEMORY.images)
    assert labels is not None
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert index.tolist() == list(range(6))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_bad_files_out_and_counts_them(
    folder: FolderSource, workers: int
) -> None:
    for i in (1, 3, 4, 5):  # 3, 4, 5: a whole batch
        Path(folder.load(i)).write_bytes(b"no image")
    batches = eval_batches(folder, size=32, batch_size=3, workers=workers)
    found = [index.tolist() for _, _, index in batches]
    assert found == [[0, 2], [6]]
    assert set(batches.skipped) == {1, 3, 4, 5}
    assert all("UnidentifiedImageError" in reason for reason in batches.skipped.values())


@pytest.mark.data
def test_real_photos_are_cut_as_in_the_imagenet_protocol(photos: Path) -> None:
    source = FolderSource(photos, find_images(photos)[::50])
    [(images, labels, index)] = eval_batches(source, size=224, batch_size=10, workers=0)
    assert labels is None
    protocol = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    for image, i in zip(images, index.tolist()):
        expected = np.asarray(protocol(Image.open(source.load(i)).convert("RGB")))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
