"""Every kind of file against the picture that the file was made from, in every loader."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast.config import AugmentConfig, ConfigError, DataConfig
from mocofast.data.decoding import decode, read_header, read_pixels
from mocofast.data.device_loader import DeviceLoader
from mocofast.data.interface import BatchSlice, Loader
from mocofast.data.loaders import build_loader, eval_batches
from mocofast.data.ranges import parse_range, range_of, set_range
from mocofast.data.sources import FolderSource, find_images, load_datasets
from tests import kinds
from tests.kinds import KINDS, H, Kind, W

pytest.importorskip("tifffile", reason="tifffile is not installed: pip install 'mocofast[images]'")
pytest.importorskip("imagecodecs", reason="imagecodecs is not installed")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a file of every kind."""
    out = tmp_path_factory.mktemp("kinds")
    kinds.write_all(out)
    return out


def error(pixels: np.ndarray, kind: Kind) -> float:
    assert pixels.shape == kind.expected.shape, kind.name
    return float(np.abs(pixels - kind.expected).max())


# The pixels


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_file_shows_the_picture_that_it_was_made_from(kind: Kind, folder: Path) -> None:
    file = folder / kind.name
    for item in (str(file), file.read_bytes()):
        header = read_header(item)
        image = decode(item)
        assert image.mode == "RGB"
        assert (header.height, header.width) == (image.height, image.width) == (H, W)
        assert error(np.asarray(image).astype(float), kind) <= kind.tolerance
        assert kind.remark in header.remark
        assert bool(kind.remark) == bool(header.remark)
