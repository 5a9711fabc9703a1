"""The compiled resize of crops equals PyTorch's to the bit, and PyTorch's serves as fallback."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mocofast.data import library, resize
from mocofast.data.resize import Box, Resize, resized_by_pytorch, resized_crop

DATA = Path(__file__).parent.parent / "mocofast/data"
FLAGS = ["-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]  # setup.py's
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]


def build(folder: Path, compiler: str) -> Path:
    path = folder / f"_photometric_{compiler}.so"
    sources = [str(DATA / name) for name in ("photometric.c", "resize.c")]
    command = [compiler, *FLAGS, "-shared", "-fPIC", *sources, "-o", str(path), "-lm"]
    subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="module", params=COMPILERS)
def functions(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Resize]:
    """Returns the functions that round as PyTorch does here, of every set of instructions."""
    loaded = ctypes.CDLL(str(build(tmp_path_factory.mktemp("library"), request.param)))
    variants = [2, 1] if library.rounds_together() else [0]
    return [Resize(loaded, v) for v in variants if loaded.photometric_runs(v)]


def picture(rng: np.random.Generator, shape: tuple[int, ...], dtype: type) -> Tensor:
    """Returns levels (H, W, C): noise, or extreme levels, which reach the clip."""
    top = np.iinfo(dtype).max
    levels = rng.integers(0, top + 1, shape)
    if rng.random() < 0.3:
        levels = top * (levels % 2)
    return torch.from_numpy(levels.astype(dtype))


def made(resize: Resize, image: Tensor, box: Box, shape: tuple[int, int]) -> np.ndarray:
    out = torch.empty((1, *shape, image.shape[2]), dtype=image.dtype)
    resize.crops([image], [box], out, [(False, False)])
    return out[0].numpy()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 13])
def test_crops_equal_pytorchs_to_the_bit(
    functions: list[Resize], dtype: type, channels: int
) -> None:
    """Boxes up to 20 times as large and 30 times as small as the view."""
    rng = np.random.default_rng(channels)
    for number in range(25):
        high, wide = (int(side) for side in rng.integers(1, 300, 2) * (1 if number % 5 else 3))
        size = (int(rng.choice([1, 7, 33, 64])), int(rng.choice([1, 7, 33, 64])))
        height, width = int(rng.integers(1, high + 1)), int(rng.integers(1, wide + 1))
        box = int(rng.integers(high - height + 1)), int(rng.integers(wide - width + 1))
        image = picture(rng, (high, wide, channels), dtype)
        expected = resized_by_pytorch(image, (*box, height, width), size).numpy()
        for function in functions:
            got = made(function, image, (*box, height, width), size)
            assert np.array_equal(got, expected), (function.variant, image.shape, box, size)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_crops_equal_sums_in_float64_to_the_rounding(functions: list[Resize], dtype: type) -> None:
    """Not PyTorch: a triangle as wide as the larger pixel. Bytes are rounded twice."""
    rng = np.random.default_rng(0)
    image = picture(rng, (70, 90, 3), dtype)

    def weights(count: int, size: int) -> np.ndarray:
        scale = max(1, count / size)
        centers = (np.arange(size)[:, None] + 0.5) * count / size
        found = np.maximum(0, 1 - np.abs(np.arange(count) + 0.5 - centers) / scale)
        return found / found.sum(1, keepdims=True)

    for height, width, shape in ((61, 83, (32, 20)), (20, 11, (40, 50))):
        box = image[3 : 3 + height, 2 : 2 + width].numpy().astype(np.float64)
        exact = np.einsum(
            "yh,hwc,xw->yxc", weights(height, shape[0]), box, weights(width, shape[1])
        )
        for function in functions:
            got = made(function, image, (3, 2, height, width), shape)
            assert np.abs(got - exact).max() < (1.2 if dtype == np.uint8 else 0.52)


def test_memory_behind_a_crop_is_not_read_or_written(functions: list[Resize]) -> None:
    """The last row of the image ends where a page ends, and the next page may not be read."""
    mmap = pytest.importorskip("mmap")
    libc = ctypes.CDLL(None)
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 64 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + 32 * page), page, 0) == 0
    rng = np.random.default_rng(0)
    for dtype in (np.uint8, np.uint16):
        for high, wide, channels in ((31, 40, 3), (5, 7, 1), (9, 11, 4), (20, 13, 5), (6, 9, 13)):
            image = picture(rng, (high, wide, channels), dtype)
            count = image.numel() * image.itemsize
            at_end = np.frombuffer(memory, dtype, image.numel(), 32 * page - count)
            at_end = at_end.reshape(image.shape)
            at_end[:] = image.numpy()
            for box in ((0, 0, high, wide), (high - 3, wide - 2, 3, 2)):
                expected = resized_by_pytorch(image, box, (24, 24)).numpy()
                for function in functions:
                    got = made(function, torch.from_numpy(at_end), box, (24, 24))
                    assert np.array_equal(got, expected)
    # Written: a view that ends there, too.
    out = np.frombuffer(memory, np.uint8, 24 * 24 * 3, 32 * page - 24 * 24 * 3)
    image = picture(rng, (31, 40, 3), np.uint8)
    for function in functions:
        whole = torch.from_numpy(out.reshape(1, 24, 24, 3))
        function.crops([image], [(0, 0, 31, 40)], whole, [(False, False)])
        expected = resized_by_pytorch(image, (0, 0, 31, 40), (24, 24))
        assert np.array_equal(out.reshape(24, 24, 3), expected)


def test_images_that_are_turned_upside_down_or_thinned_are_cut_alike(
    functions: list[Resize],
) -> None:
    image = picture(np.random.default_rng(0), (40, 50, 3), np.uint8)
    wide = picture(np.random.default_rng(0), (40, 50, 6), np.uint8)
    for view in (
        image.flip(0),
        image.mT.transpose(1, 2),
        wide[..., ::2],
        image[:, ::2],
        image[::2],
    ):
        box = (2, 3, 15, 20)
        expected = resized_by_pytorch(view, box, (16, 16)).numpy()
        for function in functions:
            assert np.array_equal(made(function, view, box, (16, 16)), expected)


def test_several_crops_in_one_call_and_without_a_library(
    functions: list[Resize], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    images = [picture(rng, (side, side + 9, 3), np.uint8) for side in (20, 31, 64)]
    boxes = [(1, 2, 15, 18), (0, 0, 31, 40), (30, 5, 20, 50)]
    flips = [(True, False), (False, True), (True, True)]
    outs = []
    for found in (*functions, None):
        monkeypatch.setattr(resize, "compiled", lambda dtype, found=found: (found, ""))
        outs.append(torch.empty((3, 24, 24, 3), dtype=torch.uint8))
        resize.resized_crops(images, boxes, outs[-1], flips)
        assert torch.equal(resized_crop(images[1], boxes[1], (24, 24)), outs[-1][1].flip(0))
        assert torch.equal(resized_crop(images[2], boxes[2], (24, 24)), outs[-1][2].flip(0, 1))
    assert all(torch.equal(out, outs[-1]) for out in outs)


def test_other_threads_run_while_crops_are_resized(functions: list[Resize]) -> None:
    image = picture(np.random.default_rng(0), (1000, 1000, 3), np.uint8)
    out = torch.empty((60, 224, 224, 3), dtype=torch.uint8)
    work = threading.Thread(
        target=functions[0].crops,
        args=([image] * 60, [(0, 0, 1000, 1000)] * 60, out, [(False, False)] * 60),
    )
    work.start()
    turns = 0
    while work.is_alive():
        time.sleep(0.001)  # wakes up only if the lock is free
        turns += 1
    assert turns > 10
