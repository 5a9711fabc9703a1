"""The view operators: equal to PIL bit for bit, to HSV in float64, and close to torchvision's."""

from __future__ import annotations

import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mocofast.config import AugmentConfig
from mocofast.data import view_ops
from mocofast.data.crops import make_from_images
from mocofast.data.interface import ViewParams, sample_view
from mocofast.data.torchvision_loader import apply_view
from mocofast.data.view_ops import apply_view_ops, only_moves
from tests.pictures import differences, neutral

SIDE = 37  # odd and prime
NEUTRAL = neutral(SIDE)
FACTORS = [0.0, 0.3, 0.6, 1.0, 1.25, 1.4, 2.0]


def images(side: int = SIDE) -> list[Image.Image]:
    """Returns colour noise, a smooth ramp, gray noise, corners of the colour cube, and a
    single colour.
    """
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (side, side, 3))
    y, x = np.mgrid[:side, :side] * 255 // (side - 1)
    ramp = np.stack((x, y, 255 - x), axis=2)
    gray = np.repeat(noise[..., :1], 3, axis=2)
    corners = 255 * rng.integers(0, 2, (side, side, 3))
    plain = np.full((side, side, 3), (255, 0, 1))
    return [Image.fromarray(a.astype(np.uint8)) for a in (noise, ramp, gray, corners, plain)]


def planes(image: Image.Image) -> Tensor:
    """Returns an image as (1, 3, S, S) float32."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous().float()[None]


def value(number: float) -> Tensor:
    return torch.full((1, 1, 1, 1), number, dtype=torch.float32)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_brightness_contrast_and_saturation_equal_pil(name: str, factor: float) -> None:
    for image in images():
        x = planes(image)
        getattr(view_ops, f"adjust_{name}_")(x, value(factor))
        assert torch.equal(x, planes(getattr(F, f"adjust_{name}")(image, factor)))


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.1, 1.4])  # the recipes' range
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_brightness_contrast_and_saturation_are_within_1_of_torchvisions_tensor_operators(
    name: str, factor: float
) -> None:
    for image in images():
        x = planes(image)
        getattr(view_ops, f"adjust_{name}_")(x, value(factor))
        expected = getattr(F, f"adjust_{name}")(planes(image).byte(), factor).float()
        # torchvision truncates the luma and its mean, PIL rounds. The difference is below
        # 2, and a blend takes at most 0.4 of it.
        assert (x - expected).abs().max() <= 1


def test_grayscale_and_flip_equal_pil() -> None:
    for image in images():
        x = planes(image)
        view_ops.grayscale_(x)
        assert torch.equal(x, planes(F.rgb_to_grayscale(image, num_output_channels=3)))
        x = planes(image)
        view_ops.flip_(x)
        assert torch.equal(x, planes(F.horizontal_flip(image)))


@pytest.mark.parametrize("shift", [-0.5, -0.4, -1 / 6, -0.01, 0.0, 0.1, 1 / 3, 0.4999, 0.5])
def test_hue_is_the_exact_rotation_in_hsv_rounded(shift: float) -> None:
    for image in images(13):  # 169 pixels: colorsys converts pixel by pixel
        x = planes(image)
        view_ops.adjust_hue_(x, value(shift))
        result = x[0].permute(1, 2, 0).reshape(-1, 3).double().numpy()
        for pixel, ours in zip(np.asarray(image).reshape(-1, 3) / 255, result):
            hue, saturation, brightness = colorsys.rgb_to_hsv(*pixel)
            exact = 255 * np.array(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, brightness))
            # 0.5 for rounding, 1e-3 for the float32 turn of 6 * shift.
            assert np.abs(ours - exact).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("shift", [-0.4, 0.0, 0.1, 0.5])
def test_hue_is_within_1_of_torchvisions_tensor_operator_and_0_keeps_every_pixel(
    shift: float,
) -> None:
    for image in images():
        x = planes(image)
        view_ops.adjust_hue_(x, value(shift))
        assert (x - F.adjust_hue(planes(image).byte(), shift).float()).abs().max() <= 1
        assert shift or torch.equal(x, planes(image))


# 1.4142 and 1.4143: the box grows from 3 to 5 pixels at the square root of 2. 5.03: a wide box.
@pytest.mark.parametrize("sigma", [0.1234, 0.517, 1.037, 1.4142, 1.4143, 1.973, 5.03])
@pytest.mark.parametrize("side", [SIDE, 3])  # 3: narrower than the filter
def test_blur_equals_pils(sigma: float, side: int) -> None:
    radius = view_ops.box_radius(sigma)
    for image in images(side):
        x = planes(image)
        view_ops.box_blur_(x, value(radius), math.ceil(radius))
        error = (x - planes(image.filter(ImageFilter.GaussianBlur(sigma)))).abs()
        # PIL's weights have 24 bits, so a value within 1e-5 of a half may round the other way.
        assert error.max() <= 1
        assert error.count_nonzero() <= 1e-3 * error.numel()


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.0, math.sqrt(2), 2.0, 5.0])
def test_three_boxes_have_the_variance_of_the_gaussian(sigma: float) -> None:
    radius = view_ops.box_radius(sigma)
    offsets = np.arange(-math.ceil(radius), math.ceil(radius) + 1)
    weights = np.clip(radius + 1 - np.abs(offsets), 0, 1) / (2 * radius + 1)
    assert weights.sum() == pytest.approx(1)
    assert 3 * (weights * offsets**2).sum() == pytest.approx(sigma**2)


@pytest.mark.parametrize("angle", [-180.0, -37.5, -1.0, 7.0, 90.0, 133.0])
@pytest.mark.parametrize("side", [SIDE, 32])  # even: the centre lies between pixels
def test_rotation_is_pils_to_rounding(angle: float, side: int) -> None:
    for image in images(side):
        x = planes(image)
        view_ops.rotate_(x, value(angle))
        error = (x - planes(F.rotate(image, angle, InterpolationMode.BILINEAR, fill=0))).abs()
        # PIL computes positions in float64. A difference in the 7th digit may change the
        # truncation.
        assert error.max() <= 1
        assert error.mean() < 0.01


def test_solarization_equals_pil_at_every_value() -> None:
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    x = planes(Image.fromarray(values))
    view_ops.solarize_(x)
    assert torch.equal(x, planes(ImageOps.solarize(Image.fromarray(values))))
    assert sorted(x[0, 0].flatten().tolist()) == sorted([*range(128), *range(128)])


@pytest.mark.parametrize("gray_first", [True, False])
def test_a_view_without_hue_equals_the_torchvision_loaders(gray_first: bool) -> None:
    augment = AugmentConfig(
        size=SIDE,
        jitter=(0.4, 0.4, 0.4, 0.0),
        jitter_p=0.8,
        gray=0.3,
        gray_first=gray_first,
        blur=0.5,
        solarize=0.4,
    )
    for index in range(8):
        for view, image in enumerate(images()):
            params = whole_image(sample_view(augment, (SIDE, SIDE), 3, 0, index, view))
            assert torch.equal(
                applied([image], [params], augment), pixels(apply_view(image, params, augment))
            )


def test_views_of_a_batch_do_not_depend_on_their_neighbours() -> None:
    augment = AugmentConfig(
        size=SIDE, rotate=20, jitter_p=0.8, gray=0.3, blur=0.5, blur_sigma=(0.1, 4.0), solarize=0.4
    )
    # 25 views: every operator applies to some views, no operator but the crop to all views.
    batch = images() * 5
    params = [
        whole_image(sample_view(augment, (SIDE, SIDE), 5, 0, i, 0)) for i in range(len(batch))
    ]
    together = applied(batch, params, augment)
    alone = torch.cat([applied([image], [p], augment) for image, p in zip(batch, params)])
    assert torch.equal(together, alone)


def test_neutral_parameters_keep_every_pixel_and_crops_may_be_their_own_output() -> None:
    augment = AugmentConfig(size=SIDE)
    crops = torch.cat([pixels(image) for image in images()])
    original = crops.clone()
    view_ops.apply_view_ops(crops, [NEUTRAL] * len(crops), augment, crops)
    assert torch.equal(crops, original)
    view_ops.apply_view_ops(crops, [NEUTRAL._replace(flip=True)] * len(crops), augment, crops)
    assert torch.equal(crops, original.flip(2))


@pytest.mark.gpu
def test_a_gpu_gives_the_views_of_the_cpu_to_rounding() -> None:
    augment = AugmentConfig(size=SIDE, rotate=20, jitter_p=0.8, gray=0.3, blur=0.5, solarize=0.4)
    batch = images() * 5
    params = [
        whole_image(sample_view(augment, (SIDE, SIDE), 5, 0, i, 0)) for i in range(len(batch))
    ]
    crops = torch.cat([pixels(image) for image in batch])
    on_gpu = torch.empty_like(crops, device="cuda")
    view_ops.apply_view_ops(crops.cuda(), params, augment, on_gpu)
    error = differences(on_gpu, applied(batch, params, augment))
    # Fused multiply-adds change single truncations by 1. Later operators amplify the 1 a
    # little.
    assert error.mean() < 0.05
    assert (error > 4).float().mean() < 1e-3


def whole_image(params: ViewParams) -> ViewParams:
    return params._replace(top=0, left=0, height=SIDE, width=SIDE)


def pixels(image: Image.Image) -> Tensor:
    """Returns an image as (1, S, S, 3) uint8."""
    return torch.from_numpy(np.asarray(image).copy())[None]


def applied(batch: list[Image.Image], params: list[ViewParams], augment: AugmentConfig) -> Tensor:
    crops = torch.cat([pixels(image) for image in batch])
    out = torch.zeros_like(crops)
    view_ops.apply_view_ops(crops, params, augment, out)
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_views_that_only_move_are_moved_as_integers(dtype: torch.dtype) -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (7, 7, 5))).to(dtype)
    for flip, vertical, turns in itertools.product((False, True), (False, True), range(4)):
        p = neutral(7)._replace(flip=flip, vertical_flip=vertical, turns=turns)
        expected = torch.empty_like(pixels)[None]
        apply_view_ops(pixels[None], [p], AugmentConfig(), expected)
        assert only_moves(p)
        made = torch.empty_like(expected)
        make_from_images([pixels], [p], AugmentConfig(), made)
        assert np.array_equal(made, expected)
    for name, value in (("sigma", 1.0), ("order", (0,)), ("gray", True), ("angle", 3.0)):
        assert not only_moves(neutral(7)._replace(**{name: value}))
    assert not only_moves(neutral(7)._replace(key=1))
    assert not only_moves(neutral(7)._replace(solarize=True))
