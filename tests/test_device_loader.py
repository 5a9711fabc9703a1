"""The device loader: equal to the torchvision loader, from images in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mocofast.config import AugmentConfig
from mocofast.data import device_loader
from mocofast.data.device_loader import DeviceLoader, crop_and_resize
from mocofast.data.interface import Batch, BatchSlice, sample_view
from mocofast.data.sources import ArraySource, FolderSource, find_images
from mocofast.data.torchvision_loader import TorchvisionLoader
from mocofast.ops import backend
from mocofast.settings import load_recipe
from mocofast.view_sizes import Size, height_width
from tests.pictures import (
    assert_same_batches,
    assert_same_views_but_for_hue,
    differences,
    files,
    joined,
)

CPU = torch.device("cpu")
SIDE = 16
EVERYTHING = AugmentConfig(
    size=SIDE, rotate=10.0, jitter_p=0.8, gray=0.3, gray_first=False, blur=0.5, solarize=0.2
)


def images(count: int = 23, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


SOURCE = ArraySource(images(), np.arange(23) % 3, ("a", "b", "c"))


def loader(
    batch_slice: BatchSlice, seed: int = 0, augment: AugmentConfig = EVERYTHING
) -> DeviceLoader:
    return DeviceLoader(SOURCE, (augment, augment), batch_slice, seed, CPU)


@pytest.fixture(params=[4096, 16])
def sampled_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples parameters for a whole epoch at once, or for two steps."""
    monkeypatch.setattr(device_loader, "SAMPLED_AT_ONCE", request.param)


def test_the_stream_is_the_torchvision_loaders(sampled_at_once: None) -> None:
    # Without hue (PIL quantises it) and rotation (PIL truncates float64), views are equal.
    augment = AugmentConfig(
        size=SIDE,
        jitter=(0.4, 0.4, 0.4, 0.0),
        jitter_p=0.8,
        gray=0.3,
        blur=0.5,
        blur_sigma=(0.1, 2.0),
        solarize=0.2,
    )
    batch_slice = BatchSlice(4, drop_last=False)
    ours = DeviceLoader(SOURCE, (augment, augment), batch_slice, 3, CPU)
    expected = TorchvisionLoader(SOURCE, (augment, augment), batch_slice, 3, CPU, 0)
    assert ours.steps_per_epoch == expected.steps_per_epoch == 6
    for epoch in range(2):
        batches = list(ours.epoch(epoch))
        assert_same_batches(batches, list(expected.epoch(epoch)))
        assert [len(batch.index) for batch in batches] == [4, 4, 4, 4, 4, 3]


def test_whole_views_are_the_torchvision_loaders_but_for_hue_and_rounding() -> None:
    batch_slice = BatchSlice(23)
    ours = next(loader(batch_slice).epoch(0))
    expected = next(TorchvisionLoader(SOURCE, (EVERYTHING,) * 2, batch_slice, 0, CPU, 0).epoch(0))
    for x, y in zip(ours.views, expected.views):
        error = differences(x, y)
        assert error.mean() < 1  # views of other samples or parameters differ by about 80
        # The error of hue is 9. Three operators multiply it by up to 1.4, solarize keeps it.
        assert error.max() <= 40


def test_any_step_can_be_resumed(sampled_at_once: None) -> None:
    stream = loader(BatchSlice(4))
    whole = [list(stream.epoch(epoch)) for epoch in range(2)]
    assert [len(epoch) for epoch in whole] == [5, 5]  # 23 images: 3 are left out
    assert not torch.equal(whole[0][0].index, whole[1][0].index)
    for epoch, start in ((1, 3), (0, 0), (1, 0), (0, 4), (0, 5)):
        assert_same_batches(stream.epoch(epoch, start), whole[epoch][start:])
    early = stream.epoch(0)
    assert_same_batches([next(early)], whole[0][:1])
    assert_same_batches(stream.epoch(1, 1), whole[1][1:])
    assert list(early) == []
    stream.close()
    assert_same_batches(stream.epoch(0, 3), whole[0][3:])  # a closed loader can start again


def test_the_ranks_batches_make_the_batch_of_one_process(sampled_at_once: None) -> None:
    whole = list(loader(BatchSlice(6)).epoch(1))
    ranks = [list(loader(BatchSlice(6, rank, 3)).epoch(1)) for rank in range(3)]
    assert_same_batches(joined(ranks), whole)


def test_batches_are_channels_last_uint8_with_the_samples_labels() -> None:
    small = AugmentConfig(size=7)
    stream = DeviceLoader(SOURCE, (EVERYTHING, small), BatchSlice(4, drop_last=False), 0, CPU)
    seen: list[int] = []
    for batch in stream.epoch(0):
        seen += batch.index.tolist()
        for view, size in zip(batch.views, (SIDE, 7)):
            assert view.shape == (len(batch.index), 3, size, size)
            assert view.dtype == torch.uint8
            assert view.is_contiguous(memory_format=torch.channels_last)
        assert SOURCE.labels is not None
        assert batch.labels is not None
        assert batch.labels.tolist() == SOURCE.labels[batch.index].tolist()
    assert sorted(seen) == list(range(23))
    assert stream.skipped == {}
    unlabelled = DeviceLoader(ArraySource(images(), None, ()), (small,), BatchSlice(4), 0, CPU)
    assert next(unlabelled.epoch(0)).labels is None


def test_loading_takes_nothing_from_the_global_generators() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(loader(BatchSlice(4)).epoch(0))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton")
def test_the_kernel_makes_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from tests.triton_device import DEVICE

    still = replace(EVERYTHING, rotate=0.0)  # rotation takes long in the interpreter
    augments = (still, AugmentConfig(size=8), still)  # two views of one size are one launch
    device = torch.device(DEVICE)

    def batches(device: torch.device) -> list[Batch]:
        return list(DeviceLoader(SOURCE, augments, BatchSlice(5, 1, 5), 0, device).epoch(0, 2))

    composed = batches(CPU)
    kernels = backend.backend_for("cuda")
    monkeypatch.setattr(backend, "backend_for", lambda device_type: kernels)
    fused = batches(device)
    assert len(composed) == len(fused) > 0
    for a, b in zip(composed, fused):
        assert torch.equal(a.index, b.index)
        for x, y in zip(a.views, b.views):
            assert y.device.type == DEVICE
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert_same_views_but_for_hue(y, x)


def test_views_of_one_size_are_one_launch_which_rotates_if_a_view_rotates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches = []

    def recorded(
        images: Tensor, index: Tensor, parameters: Tensor, shape: tuple[int, int], *, rotate: bool
    ) -> Tensor:
        launches.append((len(parameters), len(index), shape, rotate))
        return torch.empty(len(parameters), len(index), *shape, 3, dtype=torch.uint8)

    kernels = backend.backend_for("cpu")._replace(augment=recorded)
    monkeypatch.setattr(backend, "backend_for", lambda device_type: kernels)
    large = AugmentConfig(size=64)  # too large to rotate
    stream = DeviceLoader(
        SOURCE, (EVERYTHING, large, replace(EVERYTHING, rotate=0.0)), BatchSlice(6, 0, 2), 0, CPU
    )
    next(stream.epoch(0))
    assert launches == [(2, 3, (SIDE, SIDE), True), (1, 3, (64, 64), False)]


def resized_by_pil(pixels: np.ndarray, box: tuple[int, int, int, int], size: Size) -> Tensor:
    view = F.resized_crop(
        Image.fromarray(pixels),
        *box,
        list(height_width(size)),
        InterpolationMode.BILINEAR,
        antialias=True,
    )
    return torch.from_numpy(np.asarray(view).copy())


@pytest.mark.parametrize(
    ("size", "height", "width", "largest"),
    [
        # Larger than the crop, sides are powers of two: PIL's weights are exact too.
        (32, 32, 32, 0),
        (8, 8, 8, 0),
        (19, 23, 37, 1),  # odd and prime
        (16, 96, 57, 1),  # filters of up to 12 pixels
        ((32, 64), 32, 32, 0),
        ((41, 53), 23, 37, 1),
    ],
)
def test_crops_are_resized_as_pil_does(size: Size, height: int, width: int, largest: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, height, width, 3), dtype=np.uint8)
    boxes = [
        sample_view(AugmentConfig(), (height, width), 0, 0, i, 0)[:4] for i in range(len(pixels))
    ]
    got = crop_and_resize(torch.from_numpy(pixels), torch.tensor(boxes).T, height_width(size))
    expected = torch.stack([resized_by_pil(image, box, size) for image, box in zip(pixels, boxes)])
    error = differences(got, expected)
    assert error.max() <= largest
    assert error.mean() < 0.02


def test_what_cannot_be_served_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(augment: AugmentConfig) -> None:
        DeviceLoader(SOURCE, (AugmentConfig(size=8), augment), BatchSlice(4), 0, CPU)

    with pytest.raises(
        ValueError, match=r"data\.loader=device .* views of up to 64 pixels, not 65"
    ):
        refused(AugmentConfig(size=65))
    with pytest.raises(ValueError, match="views of up to 64 pixels, not 8 x 65"):
        refused(AugmentConfig(size=(8, 65)))
    with pytest.raises(ValueError, match="rotated views of up to 32 pixels, not 33"):
        refused(AugmentConfig(size=33, rotate=5.0))
    monkeypatch.setattr(device_loader, "LARGEST_SET", 2**10)
    with pytest.raises(ValueError, match="GiB of pixels are more than it holds"):
        refused(EVERYTHING)
    with pytest.raises(ValueError, match="GiB of pixels are more than it holds"):
        DeviceLoader(files_of(tmp_path, SOURCE.images), (EVERYTHING,), BatchSlice(1), 0, CPU)


def files_of(root: Path, pixels: np.ndarray) -> FolderSource:
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(root / f"{i:02}.png")
    return files(root)


def test_files_are_decoded_once_and_bad_ones_replaced_as_by_the_torchvision_loader(
    tmp_path: Path,
) -> None:
    source = files_of(tmp_path, SOURCE.images)
    batch_slice, augments = BatchSlice(23), (EVERYTHING, EVERYTHING)
    in_memory = list(loader(batch_slice).epoch(1))
    assert_same_batches(
        list(DeviceLoader(source, augments, batch_slice, 0, CPU).epoch(1)), in_memory
    )
    bad = {2, 7, 8, 22}  # two neighbours, and the last image, whose substitute is the first
    for index in bad:
        (tmp_path / f"{index:02}.png").write_bytes(b"no image")
    stream = DeviceLoader(source, augments, batch_slice, 0, CPU)
    assert set(stream.skipped) == bad
    assert all("UnidentifiedImageError" in reason for reason in stream.skipped.values())
    [ours], [expected] = (
        list(stream.epoch(1)),
        list(TorchvisionLoader(source, augments, batch_slice, 0, CPU, 0).epoch(1)),
    )
    assert torch.equal(ours.index, expected.index)
    assert ours.labels is not None and expected.labels is not None
    assert torch.equal(ours.labels, expected.labels)
    for x, y in zip(ours.views, expected.views):
        assert differences(x, y).mean() < 1  # rotation and hue, as above
    for index in range(23):
        (tmp_path / f"{index:02}.png").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"none of the 23 images can be decoded; the first: 00\.png: Unidentified"
    ):
        DeviceLoader(source, augments, batch_slice, 0, CPU)


def test_files_of_several_sizes_are_refused_with_the_first_different_file(tmp_path: Path) -> None:
    source = files_of(tmp_path, SOURCE.images)
    Image.new("RGB", (9, 7)).save(tmp_path / "05.png")
    with pytest.raises(ValueError, match=r"images of one size, got 16 x 16 and 9 x 7 \(05\.png\)"):
        DeviceLoader(source, (EVERYTHING,), BatchSlice(4), 0, CPU)


@pytest.mark.data
def test_real_cifar_files_give_the_torchvision_loaders_views(cifar10_jpeg: Path) -> None:
    names = find_images(cifar10_jpeg / "train")[::500]
    source = FolderSource(cifar10_jpeg / "train", names)
    # Without hue, which PIL quantises.
    augment = replace(load_recipe("cifar10_r18").augment, jitter=(0.4, 0.4, 0.4, 0.0))
    ours = DeviceLoader(source, (augment, augment), BatchSlice(50), 0, CPU)
    assert_same_batches(
        ours.epoch(0),
        list(TorchvisionLoader(source, (augment,) * 2, BatchSlice(50), 0, CPU, 0).epoch(0)),
    )


@pytest.mark.gpu
def test_a_cifar_epoch_on_a_gpu_needs_no_synchronisation_and_equals_the_cpus() -> None:
    augment = AugmentConfig(
        size=32, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_first=False, blur=0.5
    )
    source = ArraySource(images(600, 32), None, ())
    on_gpu = DeviceLoader(source, (augment, augment), BatchSlice(128), 0, torch.device("cuda"))
    next(on_gpu.epoch(0))  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(on_gpu.epoch(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = list(DeviceLoader(source, (augment, augment), BatchSlice(128), 0, CPU).epoch(0))
    assert len(expected) == len(batches) > 0
    for a, b in zip(expected, batches):
        assert torch.equal(a.index, b.index)
        for x, y in zip(a.views, b.views):
            assert_same_views_but_for_hue(y, x)
