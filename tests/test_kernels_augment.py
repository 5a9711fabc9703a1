"""Checks the augmentation kernel against PIL and PyTorch operators.

Without a GPU the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.triton_device import DEVICE

pytest.importorskip("triton")

import mocofast_kernels.augment as kernel

from mocofast.config import AugmentConfig
from mocofast.data import device_loader
from mocofast.data.device_loader import compose, parameter_table
from mocofast.data.interface import ViewParams, sample_view
from mocofast.data.sampling import Views, sample_views
from mocofast.data.torchvision_loader import apply_view
from mocofast.view_sizes import Size
from tests.pictures import assert_same_views_but_for_hue, differences
from tests.sampled import stack_views

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton"
)

PLAIN = AugmentConfig(size=32, jitter=(0.0, 0.0, 0.0, 0.0), gray=0.0)
# PIL quantises hue to 8 bits, so comparisons with PIL leave the hue alone.
WITHOUT_HUE = AugmentConfig(
    size=32,
    jitter=(0.4, 0.4, 0.4, 0.0),
    jitter_p=0.8,
    gray=0.3,
    gray_first=False,
    blur=0.6,
    solarize=0.3,
)
EVERYTHING = replace(WITHOUT_HUE, jitter=(0.4, 0.4, 0.4, 0.4))


def pictures(height: int, width: int) -> np.ndarray:
    """Returns (4, H, W, 3) uint8: noise, a ramp, corners of the colour cube, gray noise."""
    rng = np.random.default_rng(height + width)
    noise = rng.integers(0, 256, (2, height, width, 3))
    y, x = np.mgrid[:height, :width]
    ramp = np.stack((x * 255 // (width - 1), y * 255 // (height - 1), 255 - x), axis=2)
    corners = 255 * rng.integers(0, 2, (height, width, 3))
    gray = np.repeat(noise[1, ..., :1], 3, axis=2)
    return np.stack((noise[0], ramp, corners, gray)).astype(np.uint8)


def by_kernel(
    images: np.ndarray, index: np.ndarray, views: Views, augment: AugmentConfig
) -> Tensor:
    table = parameter_table(views, augment).to(DEVICE)
    on_device = torch.from_numpy(images).to(DEVICE), torch.from_numpy(index).to(DEVICE)
    return kernel.augment(*on_device, table[None], augment.shape, rotate=augment.rotate > 0)[
        0
    ].cpu()


def by_pil(
    images: np.ndarray, index: np.ndarray, params: list[ViewParams], augment: AugmentConfig
) -> Tensor:
    views = [
        np.asarray(apply_view(Image.fromarray(images[i]), p, augment))
        for i, p in zip(index, params)
    ]
    return torch.from_numpy(np.stack(views))


@pytest.mark.parametrize(
    ("size", "height", "width", "largest"),
    [
        # CIFAR: crops are enlarged to a power of two, so PIL's weights are exact too.
        (32, 32, 32, 0),
        (8, 8, 8, 0),  # digits: a tile is padded to the smallest matrix product
        (64, 40, 64, 0),  # the largest tile
        (19, 23, 37, 1),  # odd and prime. PIL's weights have 22 bits, so ties may round differently
        (16, 30, 57, 1),  # up to 4 times smaller: filters of many pixels
        ((64, 32), 32, 32, 0),
        ((41, 17), 23, 37, 1),
    ],
)
def test_crops_are_resized_as_pil_does(size: Size, height: int, width: int, largest: int) -> None:
    images, index = pictures(height, width), np.arange(4)
    augment = replace(PLAIN, size=size)
    params = [sample_view(augment, (height, width), 1, 0, i, 0) for i in range(len(index))]
    error = differences(
        by_kernel(images, index, stack_views(params), augment),
        by_pil(images, index, params, augment),
    )
    assert error.max() <= largest
    assert error.mean() < 0.05  # a ramp has many ties


def test_a_view_without_hue_is_pils() -> None:
    images, index = pictures(32, 32), np.arange(16) % 4
    params = [sample_view(WITHOUT_HUE, (32, 32), 5, 0, i, 0) for i in range(len(index))]
    happened = [(bool(p.order), p.gray, p.sigma > 0, p.solarize, p.flip) for p in params]
    assert np.any(happened, axis=0).all() and not np.all(happened, axis=0).any()
    got = by_kernel(images, index, stack_views(params), WITHOUT_HUE)
    error = differences(got, by_pil(images, index, params, WITHOUT_HUE))
    # Equal except for ties of the blur. PIL holds the weights in 24 bits, the kernel in 22.
    assert (error > 0).float().mean() < 1e-3


@pytest.mark.parametrize("size", [32, (12, 40)])
def test_a_view_is_that_of_the_pytorch_operators(size: Size) -> None:
    images, index = pictures(32, 32), np.arange(16) % 4
    augment = replace(EVERYTHING, size=size, gray_first=True)
    views = sample_views(augment, np.array((32, 32)), 3, 0, np.arange(len(index)), 0)
    expected = compose(torch.from_numpy(images), torch.from_numpy(index), views, augment)
    assert_same_views_but_for_hue(by_kernel(images, index, views, augment), expected)


@pytest.mark.parametrize("size", [8, 17, (8, 19)])
def test_rotated_views_are_those_of_the_pytorch_operators(size: Size) -> None:
    images, index = pictures(11, 13), np.arange(4)
    augment = replace(EVERYTHING, size=size, rotate=60.0)
    views = sample_views(augment, np.array((11, 13)), 3, 0, np.arange(len(index)), 0)
    expected = compose(torch.from_numpy(images), torch.from_numpy(index), views, augment)
    error = differences(by_kernel(images, index, views, augment), expected)
    # Positions differ in the 7th digit, so truncated values may differ by more.
    assert (error > 1).float().mean() < 5e-3
    assert error.mean() < 0.02


def test_a_wide_blur_repeats_the_edges_of_a_narrow_view() -> None:
    images, index = pictures(5, 5), np.arange(4)
    # Box filters of 7 pixels and more on 5 pixels.
    augment = replace(PLAIN, size=5, blur=1.0, blur_sigma=(3.0, 6.0))
    params = [sample_view(augment, (5, 5), 1, 0, i, 0) for i in range(4)]
    got = by_kernel(images, index, stack_views(params), augment)
    error = differences(got, by_pil(images, index, params, augment))
    assert error.max() <= 1
    assert error.mean() < 0.02


@pytest.mark.parametrize(("channels", "rotate"), [(1, 0.0), (2, 60.0), (13, 0.0)])
def test_views_of_any_number_of_channels_are_those_of_the_pytorch_operators(
    channels: int, rotate: float
) -> None:
    rng = np.random.default_rng(channels)
    images = rng.integers(0, 256, (4, 11, 13, channels), dtype=np.uint8)
    augment = replace(WITHOUT_HUE, size=(9, 17), gray=0.0, solarize=0.0, rotate=rotate)
    augment = replace(augment, jitter=(0.4, 0.4, 0.0, 0.0))
    index = np.arange(6) % 4
    views = sample_views(augment, np.array((11, 13)), 3, 0, np.arange(len(index)), 0)
    expected = compose(torch.from_numpy(images), torch.from_numpy(index), views, augment)
    got = by_kernel(images, index, views, augment)
    assert got.shape == (6, 9, 17, channels)
    error = differences(got, expected)
    assert (error > 1).float().mean() < 5e-3
    assert error.mean() < (0.02 if rotate else 2e-3)


def test_several_views_of_a_batch_come_out_of_one_launch_and_a_longer_table() -> None:
    images, index = pictures(8, 8), np.array([3, 0])
    augment = replace(EVERYTHING, size=8)
    sampled = [
        sample_views(augment, np.array((8, 8)), 0, 0, np.arange(4), view) for view in range(2)
    ]
    table = torch.stack([parameter_table(views, augment) for views in sampled]).to(DEVICE)
    both = kernel.augment(
        torch.from_numpy(images).to(DEVICE),
        torch.from_numpy(index).to(DEVICE),
        table[:, 1:3],
        (8, 8),
        rotate=False,
    ).cpu()
    for got, views in zip(both, sampled):
        own = Views(*(column[1:3] for column in views))
        assert torch.equal(got, by_kernel(images, index, own, augment))


def test_what_the_kernel_cannot_hold_is_refused() -> None:
    assert (device_loader.LARGEST, device_loader.LARGEST_ROTATED) == (
        kernel.LARGEST,
        kernel.LARGEST_ROTATED,
    )
    images, index = torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    for shape, rotate in (((65, 8), False), ((8, 65), False), ((8, 33), True)):
        with pytest.raises(AssertionError):
            kernel.augment(images, index, torch.zeros(1, 1, 20), shape, rotate=rotate)
