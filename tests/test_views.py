"""Views equal the transforms of facebookresearch/moco, and every kind of file is read as RGB."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

from mocofast.config import AugmentConfig
from mocofast.data.decoding import decode
from mocofast.data.interface import BatchSlice, ViewParams, sample_view, view_augments
from mocofast.data.sources import find_images
from mocofast.data.torchvision_loader import TorchvisionLoader, apply_view
from mocofast.settings import load_recipe
from tests.pictures import files, neutral, photo

# All operators, and an odd, prime side.
SMALL = AugmentConfig(size=19, rotate=10.0, jitter_p=0.8, blur=0.5)


# What a view is


def pinned(monkeypatch: pytest.MonkeyPatch, p: ViewParams) -> None:
    """Makes torchvision's random transforms use the crop and the jitter of `p`."""
    crop = (p.top, p.left, p.height, p.width)
    monkeypatch.setattr(transforms.RandomResizedCrop, "get_params", staticmethod(lambda *_: crop))
    jitter = (torch.tensor(p.order), p.brightness, p.contrast, p.saturation, p.hue)
    monkeypatch.setattr(transforms.ColorJitter, "get_params", staticmethod(lambda *_: jitter))


def blur_of(p: ViewParams) -> list[Callable[[Image.Image], Image.Image]]:
    return (
        [transforms.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(radius=p.sigma)))]
        if p.sigma
        else []
    )


def moco_v1(p: ViewParams) -> list[Callable[[Image.Image], Image.Image]]:
    return [
        transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
        transforms.RandomGrayscale(p=float(p.gray)),
        transforms.ColorJitter(0.4, 0.4, 0.4, 0.4),
        transforms.RandomHorizontalFlip(p=float(p.flip)),
    ]


def moco_v2(p: ViewParams) -> list[Callable[[Image.Image], Image.Image]]:
    return [
        transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
        transforms.RandomApply(
            [transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=float(bool(p.order))
        ),
        transforms.RandomGrayscale(p=float(p.gray)),
        *blur_of(p),
        transforms.RandomHorizontalFlip(p=float(p.flip)),
    ]


def cifar_demo(p: ViewParams) -> list[Callable[[Image.Image], Image.Image]]:
    return [
        transforms.RandomResizedCrop(32, scale=(0.08, 1.0)),
        # The demo flips first. A flip commutes with all later operators.
        transforms.RandomHorizontalFlip(p=float(p.flip)),
        transforms.RandomApply(
            [transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=float(bool(p.order))
        ),
        transforms.RandomGrayscale(p=float(p.gray)),
    ]


# {recipe: (transforms, numbers)}: the reference's transforms, and its crop scale, jitter strengths,
# and probabilities of jitter, grayscale and blur.
REFERENCE = {
    "moco_v1_r50": (moco_v1, ((0.2, 1.0), (0.4, 0.4, 0.4, 0.4), 1.0, 0.2, 0.0)),
    "moco_v2_r50_200ep": (moco_v2, ((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5)),
    "moco_v2_r50_800ep": (moco_v2, ((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5)),
    "cifar10_r18": (cifar_demo, ((0.08, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.0)),
}


def assert_recipe_is_the_reference(
    monkeypatch: pytest.MonkeyPatch, recipe: str, images: list[Image.Image], views: int
) -> None:
    reference, numbers = REFERENCE[recipe]
    augment = load_recipe(recipe).augment
    assert (
        augment.crop_scale,
        augment.jitter,
        augment.jitter_p,
        augment.gray,
        augment.blur,
    ) == numbers
    assert (augment.flip, augment.rotate) == (0.5, 0.0)
    if augment.blur:
        assert augment.blur_sigma == (0.1, 2.0)
    happened = np.zeros(4, dtype=int)
    for i, image in enumerate(images):
        for view in range(views):
            p = sample_view(augment, (image.height, image.width), 0, 0, i, view)
            happened += [bool(p.order), p.gray, p.sigma > 0, p.flip]
            pinned(monkeypatch, p)
            expected = transforms.Compose(reference(p))(image)
            assert np.array_equal(
                np.asarray(apply_view(image, p, augment)), np.asarray(expected)
            ), (i, view, p)
    wanted = np.array([augment.jitter_p, augment.gray, augment.blur, augment.flip]) > 0
    assert ((happened > 0) == wanted).all()  # otherwise an operator was never compared


@pytest.mark.parametrize("recipe", REFERENCE)
def test_every_recipe_makes_the_references_views_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    images = [photo(i, (47 + 31 * i, 130 - 11 * i)) for i in range(6)]
    assert_recipe_is_the_reference(monkeypatch, recipe, images, views=6)


def moco_v3(p: ViewParams) -> list[Callable[[Image.Image], Image.Image]]:
    return [
        transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
        transforms.RandomApply(
            [transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=float(bool(p.order))
        ),
        transforms.RandomGrayscale(p=float(p.gray)),
        *blur_of(p),
        *([transforms.Lambda(ImageOps.solarize)] if p.solarize else []),
        transforms.RandomHorizontalFlip(p=float(p.flip)),
    ]


@pytest.mark.parametrize("recipe", ["moco_v3_r50", "moco_v3_vit_s", "moco_v3_vit_b", "byol_r50"])
def test_both_views_of_moco_v3_and_byol_are_the_references_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    # 24 second views, of which 5 are solarized and 2 are blurred.
    images = [photo(i, (47 + 31 * i, 130 - 11 * i)) for i in range(6)] * 4
    happened = np.zeros((2, 2), dtype=int)
    for view, augment in enumerate(view_augments(load_recipe(recipe).augment, 2)):
        for i, image in enumerate(images):
            p = sample_view(augment, (image.height, image.width), 0, 0, i, view)
            happened[view] += [p.sigma > 0, p.solarize]
            pinned(monkeypatch, p)
            expected = transforms.Compose(moco_v3(p))(image)
            assert np.array_equal(
                np.asarray(apply_view(image, p, augment)), np.asarray(expected)
            ), (i, view, p)
    assert happened[0].tolist() == [24, 0]
    assert happened[1].min() > 0
    assert happened[1].max() < 12


@pytest.mark.data
@pytest.mark.parametrize("recipe", ["moco_v1_r50", "moco_v2_r50_200ep", "cifar10_r18"])
def test_every_recipe_makes_the_references_views_of_real_photos(
    monkeypatch: pytest.MonkeyPatch, photos: Path, recipe: str
) -> None:
    images = [decode(str(photos / name)) for name in find_images(photos)[::25]]
    assert_recipe_is_the_reference(monkeypatch, recipe, images, views=4)


@pytest.mark.parametrize("gray_first", [True, False])
def test_grayscale_comes_before_or_after_the_jitter_as_asked(gray_first: bool) -> None:
    image = photo(0, (40, 40))
    augment = AugmentConfig(size=40, gray_first=gray_first)
    p = neutral(40)._replace(
        order=(2, 3, 0, 1), brightness=1.2, contrast=0.8, saturation=0.5, hue=0.3, gray=True
    )
    got = np.asarray(apply_view(image, p, augment)).astype(int)
    assert np.ptp(got, axis=2).max() == 0
    # Saturation and hue change the luma of a coloured image, but not the luma of a grey image.
    other = np.asarray(
        apply_view(image, p, AugmentConfig(size=40, gray_first=not gray_first))
    ).astype(int)
    assert np.abs(got - other).max() > 5


def test_rotation_is_counter_clockwise_about_the_centre_and_fills_with_black() -> None:
    pixels = np.zeros((21, 21, 3), np.uint8)
    pixels[10, 18] = 255  # right of the centre
    still = neutral(21)
    turned = np.asarray(
        apply_view(Image.fromarray(pixels), still._replace(angle=90.0), AugmentConfig(size=21))
    )
    assert turned[2, 10].tolist() == [255] * 3  # above it
    assert turned.sum() == 3 * 255
    white = Image.new("RGB", (21, 21), (255, 255, 255))
    corners = np.asarray(apply_view(white, still._replace(angle=45.0), AugmentConfig(size=21)))[
        ::20, ::20
    ]
    assert corners.max() == 0


def test_neutral_parameters_change_nothing() -> None:
    image = photo(1, (19, 19))
    p = neutral(19)._replace(order=(3, 2, 1, 0))
    assert np.array_equal(np.asarray(apply_view(image, p, SMALL)), np.asarray(image))


# Which images are read, and how


def rgb_of(image: Image.Image, **options: Any) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        image.save(path, **options)
        return np.asarray(image.convert("RGB"))

    return write


def gray16(path: Path) -> np.ndarray:
    values = np.linspace(0, 65535, 12 * 10).reshape(10, 12).astype(np.uint16)
    if path.suffix == ".pgm":
        path.write_bytes(b"P5\n12 10\n65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    return np.stack([np.rint(values / 257.0)] * 3, axis=2)


def transparent(mode: str) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        image = photo(2, (10, 12)).convert("RGB" if mode == "RGBA" else "L")
        # From 0 (transparent) to 253.
        alpha = Image.fromarray(np.tile(np.arange(12, dtype=np.uint8) * 23, (10, 1)))
        with_alpha = image.convert(mode)
        with_alpha.putalpha(alpha)
        with_alpha.save(path)
        return np.asarray(image.convert("RGB"))  # the colour under transparent pixels shows

    return write


def palette_with_transparency(path: Path) -> np.ndarray:
    image = photo(3, (10, 12)).quantize(16)
    image.save(path, transparency=bytes(range(0, 160, 10)))
    return np.asarray(image.convert("RGB"))


MODES: dict[str, tuple[Callable[[Path], np.ndarray], float]] = {
    "gray.png": (rgb_of(photo(0, (10, 12)).convert("L")), 0),
    "gray.jpg": (rgb_of(photo(0, (32, 48)).convert("L"), quality=98), 4),
    "cmyk.jpg": (rgb_of(photo(0, (32, 48)).convert("CMYK"), quality=98), 12),
    "cmyk.tif": (rgb_of(photo(0, (10, 12)).convert("CMYK")), 0),
    "palette.png": (rgb_of(photo(0, (10, 12)).quantize(16)), 0),
    "palette_transparent.png": (palette_with_transparency, 0),
    "bilevel.png": (rgb_of(photo(0, (10, 12)).convert("1")), 0),
    "rgba.png": (transparent("RGBA"), 0),
    "gray_alpha.png": (transparent("LA"), 0),
    "gray16.png": (gray16, 0),
    "gray16.tif": (gray16, 0),
    "gray16.pgm": (gray16, 0),
    "colour.bmp": (rgb_of(photo(0, (10, 12))), 0),
    "colour.ppm": (rgb_of(photo(0, (10, 12))), 0),
    "colour.webp": (rgb_of(photo(0, (10, 12)), lossless=True), 0),
    "colour.jp2": (rgb_of(photo(0, (32, 48))), 1),
    "one_pixel.png": (rgb_of(photo(0, (1, 1))), 0),
    "progressive.jpg": (rgb_of(photo(0, (32, 48)), quality=98, subsampling=0, progressive=True), 8),
}


@pytest.mark.parametrize("name", MODES)
def test_unusual_images_are_read_as_rgb_at_full_range(tmp_path: Path, name: str) -> None:
    write, tolerance = MODES[name]  # above 0 for lossy files only
    expected = write(tmp_path / name)
    image = decode(str(tmp_path / name))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= tolerance
    batch = next(
        TorchvisionLoader(
            files(tmp_path), (SMALL, SMALL), BatchSlice(1), 0, torch.device("cpu"), 0
        ).epoch(0)
    )
    assert batch.views[0].shape == (1, 3, 19, 19)


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to show
    photo(0, (30, 50)).save(tmp_path / "turned.jpg", exif=exif)
    assert decode(str(tmp_path / "turned.jpg")).size == (50, 30)


def test_a_large_image_is_read_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(0, (10, 12)).save(tmp_path / "large.png")
    # PIL warns above this number of pixels, and refuses above twice the number.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode(str(tmp_path / "large.png")).size == (12, 10)
    assert not caught


def test_decoding_in_threads_leaves_the_filters_of_warnings_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    photo(0, (10, 12)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [
            threading.Thread(target=lambda: [decode(str(path)) for _ in range(50)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not caught
        with Image.open(path):  # elsewhere in the program PIL's warnings are shown
            pass
        assert [warning.category for warning in caught] == [Image.DecompressionBombWarning]
    assert warnings.filters == before


def test_importing_the_torchvision_loader_sets_no_filter_of_warnings() -> None:
    program = (
        "import warnings, torchvision.transforms.v2\n"
        "before = list(warnings.filters)\n"
        "import mocofast.data.torchvision_loader\n"
        "assert warnings.filters == before\n"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True, timeout=60)
