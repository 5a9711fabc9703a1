"""The compiled rotation equals PyTorch's to the bit, and PyTorch rotates where it differs."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mocofast.config import AugmentConfig
from mocofast.data import library as library_of_views
from mocofast.data import view_ops
from mocofast.data.interface import ViewParams, sample_view
from mocofast.data.photometric import Photometric, compiled, make_views
from mocofast.data.rotation import turned_places
from mocofast.view_sizes import Size, height_width
from tests import test_photometric
from tests.test_photometric import (
    COMPILERS,
    FLAGS,
    SOURCE,
    SOURCES,
    equal,
    needs_compiler,
    pictures,
    variants,
)

library, loads = test_photometric.library, test_photometric.loads  # fixtures

# 1e-60: 0 in float32, but not in float64
ANGLES = (180.0, -180.0, 90.0, 360.0, 1e-60, 1e-3, 0.0, 45.0, -30.0, 7.0, 133.0, -101.5)


def turned_views(size: Size, angles: tuple[float, ...], **options: float) -> list[ViewParams]:
    """Returns views with the given angles and the operators of `options`."""
    augment = AugmentConfig(size=size, jitter_p=0.0, **{"gray": 0.0, "flip": 0.0} | options)
    views = [sample_view(augment, augment.shape, 3, 0, i, 0) for i in range(len(angles))]
    return [view._replace(angle=angle) for view, angle in zip(views, angles)]


def by_pytorch(crops: Tensor, params: list[ViewParams], augment: AugmentConfig) -> Tensor:
    expected = torch.empty_like(crops)
    view_ops.apply_view_ops(crops, params, augment, expected)
    return expected


# 300: rows in three parts. (1, 2) and (2, 1): pixels that come from an edge exactly.
@pytest.mark.parametrize(
    "size", [1, (1, 2), (2, 1), 37, 128, 300, (2, 141), (141, 2), (19, 37), (131, 64)]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_rotated_views_equal_pytorchs_to_the_bit(
    library: Path, size: Size, dtype: type, channels: int
) -> None:
    crops = pictures(size, channels, dtype, len(ANGLES))
    params = turned_views(size, ANGLES)
    augment = AugmentConfig(size=size)
    expected = by_pytorch(crops, params, augment)
    assert size == 1 or not equal(expected, crops)
    for variant in variants():
        operators = Photometric(ctypes.CDLL(str(library)), variant)
        got = torch.empty_like(crops)
        operators.make(crops, params, augment, got)
        assert equal(got, expected), library_of_views.VARIANTS[variant]
        got = crops.clone()
        operators.make(got, params, augment, got)
        assert equal(got, expected), "in place"


@pytest.mark.parametrize("channels", [2, 3])
def test_a_view_is_turned_before_its_other_operators(library: Path, channels: int) -> None:
    """Alone, and between views without an angle."""
    options = {"blur": 0.5, "solarize": 0.5, "flip": 0.5, "vertical_flip": 0.5}
    angles = (0.0, 20.0, -45.0, 0.0, 170.0, 0.0)
    crops = pictures(41, channels, np.uint8, len(angles))
    params = [p._replace(order=(1, 0, 3, 2)) for p in turned_views(41, angles, **options)]
    if channels == 3:
        params[1] = params[1]._replace(gray=True)
    augment = AugmentConfig(size=41)
    expected = by_pytorch(crops, params, augment)
    operators = Photometric(ctypes.CDLL(str(library)), variants()[0])
    got = torch.empty_like(crops)
    operators.make(crops, params, augment, got)
    assert equal(got, expected)
    for i, view in enumerate(params):
        operators.make(crops[i : i + 1], [view], augment, got[:1])
        assert equal(got[0], expected[i])


@needs_compiler
def test_where_rotated_views_differ_pytorch_rotates(tmp_path: Path, loads: object) -> None:
    """The library makes all other operators."""
    for path in [*SOURCES, *SOURCE.parent.glob("*.h")]:
        shutil.copy(path, tmp_path)
    body = tmp_path / "rotation_body.h"
    text = body.read_text("utf-8")
    assert text.count("1.f / 1024") == 1
    body.write_text(text.replace("1.f / 1024", "1.f / 16"), "utf-8")
    path = tmp_path / "_photometric.so"
    sources = [str(tmp_path / source.name) for source in SOURCES]
    command = [COMPILERS[0], *FLAGS, "-shared", "-fPIC", *sources, "-o", str(path), "-lm"]
    subprocess.run(command, check=True)
    assert callable(loads)
    loads(path)
    operators, how = compiled()
    assert operators is not None
    assert how.endswith("rotation by PyTorch")
    crops = pictures(37, 3, np.uint8, 3)
    params = turned_views(37, (0.0, 33.0, -5.0), flip=0.5, blur=0.5)
    augment = AugmentConfig(size=37)
    expected = by_pytorch(crops, params, augment)
    operators.make(crops, params, augment, got := torch.empty_like(crops))
    assert not equal(got, expected)
    make_views(crops, params, augment, got)
    assert equal(got, expected)
    make_views(crops, params, augment, crops)
    assert equal(crops, expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 7), (40, 224)])
def test_places_are_those_of_affine_grid(size: tuple[int, int]) -> None:
    height, width = size
    angles = torch.tensor(ANGLES)
    columns, rows = turned_places(angles, height, width)
    places = columns.unsqueeze(2) + rows.unsqueeze(3)  # (n, 2, H, W)
    radians = torch.deg2rad(angles.double())
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    theta = torch.stack(
        (cos, -sin * height / width, zero, sin * width / height, cos, zero), dim=1
    ).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(angles), 1, *height_width(size)], align_corners=False)
    assert (places - grid.permute(0, 3, 1, 2)).abs().max() < 5e-7 * max(width / height, 1)
