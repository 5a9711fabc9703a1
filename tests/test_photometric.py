"""The compiled view operators equal PyTorch's to the bit, and PyTorch's serve where they cannot."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mocofast.config import AugmentConfig
from mocofast.data import library as library_of_views
from mocofast.data import view_ops
from mocofast.data.interface import ViewParams, sample_view
from mocofast.data.photometric import FIELDS, Photometric, compiled, make_views
from mocofast.view_sizes import Size, height_width

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "mocofast/data/photometric.c"
SOURCES = [SOURCE, SOURCE.with_name("resize.c")]
FLAGS = ["-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]  # setup.py's
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]

needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no C compiler")


def build(folder: Path, compiler: str, flags: list[str]) -> Path:
    path = folder / f"_photometric_{compiler}.so"
    command = [compiler, *flags, "-shared", "-fPIC", *map(str, SOURCES), "-o", str(path), "-lm"]
    subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="module", params=COMPILERS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library"), request.param, FLAGS)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Returns a function: `compiled` shall load this file, or find none."""

    def load(path: Path | None) -> None:
        found = None if path is None else SimpleNamespace(origin=str(path))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
        compiled.cache_clear()

    yield load
    monkeypatch.undo()
    compiled.cache_clear()


def variants() -> list[int]:
    """Returns the variants that round as PyTorch does here."""
    return [2, 1] if library_of_views.rounds_together() else [0]


def pictures(size: Size, channels: int, dtype: type, count: int) -> Tensor:
    """Returns (count, H, W, C): noise, smooth waves, and extreme levels."""
    height, width = height_width(size)
    rng = np.random.default_rng(height + channels)
    top = np.iinfo(dtype).max
    images = rng.integers(0, top + 1, (count, height, width, channels))
    y, x = np.mgrid[:height, :width][..., None] * 6 / height
    phase = rng.uniform(0, 6, (channels,))
    images[1::3] = np.rint((np.sin(x + phase) * np.cos(y - phase) + 1) / 2 * top)
    images[2::3] = top * rng.integers(0, 2, images[2::3].shape)
    return torch.from_numpy(images.astype(dtype))


def equal(got: Tensor, expected: Tensor) -> bool:
    return np.array_equal(got.numpy(), expected.numpy())


# 300: sums of 8 bits do not fit into float32. 3: narrower than the blur.
@pytest.mark.parametrize("size", [3, 37, 64, 300, (2, 41), (41, 2), (19, 37)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_views_equal_pytorchs_to_the_bit(
    library: Path, size: Size, dtype: type, channels: int
) -> None:
    colour = channels == 3
    late: tuple[dict[str, Any], ...] = (
        {"channel_jitter": (0.2, 0.3), "hed": 0.05 if colour else 0.0, "noise": 0.1},
        {"hed": 1.0 if colour else 0.0},
        {"noise": 1.0},
        {},
    )
    for number, options in enumerate(late):
        augment = AugmentConfig(
            size=size,
            jitter_p=0.9,
            gray=0.3 if colour else 0.0,
            gray_first=number % 2 == 0,
            blur=0.6,
            blur_sigma=(0.1, 5.0),
            solarize=0.3,
            vertical_flip=0.5,
            quarter_turns=0.6 if isinstance(size, int) else 0.0,
            **options,
        )
        count = 6 if size == 300 else 12
        crops = pictures(size, channels, dtype, count)
        params = [sample_view(augment, augment.shape, 3, 0, i, 0) for i in range(count)]
        expected = torch.empty_like(crops)
        view_ops.apply_view_ops(crops, params, augment, expected)
        for variant in variants():
            operators = Photometric(ctypes.CDLL(str(library)), variant)
            got = torch.empty_like(crops)
            operators.make(crops, params, augment, got)
            assert equal(got, expected), (library_of_views.VARIANTS[variant], options)


def test_all_operators_work_in_place_and_into_memory_with_gaps(library: Path, loads: Any) -> None:
    loads(library)
    assert compiled()[0] is not None, compiled()[1]
    augment = AugmentConfig(
        size=37,
        rotate=20,
        blur=0.5,
        vertical_flip=0.5,
        hed=0.1,
        noise=0.05,
        channel_jitter=(0.2, 0),
    )
    crops = pictures(37, 3, np.uint8, 12)
    params = [sample_view(augment, (37, 37), 3, 0, i, 0) for i in range(12)]
    expected = torch.empty_like(crops)
    view_ops.apply_view_ops(crops, params, augment, expected)
    original, got = crops.clone(), torch.empty_like(crops)
    make_views(crops, params, augment, got)
    assert equal(got, expected)
    assert equal(crops, original)
    # In place, and into memory with gaps.
    gaps = torch.empty((12, 37, 37, 6), dtype=torch.uint8)[..., ::2]
    make_views(crops, params, augment, gaps)
    assert equal(gaps, expected)
    make_views(crops, params, augment, crops)
    assert equal(crops, expected)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_way_in_which_pytorch_rounds_has_its_compiled_operators(
    library: Path, capability: str
) -> None:
    """The tests above cover the way of this CPU's own instructions."""
    code = (
        "import ctypes, sys, torch\n"
        "from mocofast.data import library as of_views, photometric as p, resize\n"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "for variant in (2, 1) if of_views.rounds_together() else (0,):\n"
        "    if library.photometric_runs(variant):\n"
        "        assert not p.differs(p.Photometric(library, variant)), variant\n"
        "        assert not p.rotation_differs(p.Photometric(library, variant)), variant\n"
        "        for dtype in (torch.uint8, torch.uint16):\n"
        "            assert not resize.differs(resize.Resize(library, variant), dtype), variant\n"
    )
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    subprocess.run([sys.executable, "-c", code, str(library)], env=env, check=True)


@needs_compiler
def test_a_library_that_rounds_otherwise_is_refused(tmp_path: Path, loads: Any) -> None:
    loads(build(tmp_path, COMPILERS[0], ["-O3", "-ffast-math"]))
    assert compiled()[0] is None
    assert "differ from PyTorch's" in compiled()[1]


@needs_compiler
def test_a_library_of_an_older_version_is_named(
    tmp_path: Path, loads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.c"  # lacks the functions of today
    path.write_text("int photometric_runs(int variant) { return variant == 2 || variant == 0; }")
    monkeypatch.setattr(sys.modules[__name__], "SOURCES", [path])
    loads(build(tmp_path, COMPILERS[0], []))
    operators, why = compiled()
    assert operators is None
    assert why.startswith("compiled from an older version: install a C compiler")
    assert "photometric_early" in why


@needs_compiler
def test_turns_of_views_that_are_not_square_are_an_error(library: Path) -> None:
    crops = pictures((5, 8), 3, np.uint8, 2)
    augment = AugmentConfig(size=(5, 8), quarter_turns=1.0)
    params = [sample_view(augment, (5, 8), 3, 0, i, 0) for i in range(2)]
    operators = Photometric(ctypes.CDLL(str(library)), 0)
    with pytest.raises(ValueError, match="square views, got 5 x 8"):
        operators.make(crops, params, augment, torch.empty_like(crops))


def test_without_a_library_pytorch_makes_the_views_and_doctor_says_why(
    tmp_path: Path, loads: Any
) -> None:
    augment = AugmentConfig(size=37, blur=0.5)
    crops = pictures(37, 3, np.uint8, 3)
    params = [sample_view(augment, (37, 37), 3, 0, i, 0) for i in range(3)]
    expected, got = torch.empty_like(crops), torch.empty_like(crops)
    view_ops.apply_view_ops(crops, params, augment, expected)
    broken = tmp_path / "_photometric.so"
    broken.write_bytes(b"not a library")
    for path, reason in ((None, "install a C compiler"), (broken, "_photometric.so")):
        loads(path)
        operators, why = compiled()
        assert operators is None
        assert reason in why
        make_views(crops, params, augment, got)
        assert equal(got, expected)


def test_other_threads_run_while_views_are_made(library: Path) -> None:
    operators = Photometric(ctypes.CDLL(str(library)), variants()[0])
    augment = AugmentConfig(size=224, blur=1.0)
    crops = pictures(224, 3, np.uint8, 1).expand(150, -1, -1, -1).contiguous()
    params = [sample_view(augment, (224, 224), 3, 0, 0, 0)._replace(sigma=1.9)] * 150
    worker = threading.Thread(target=operators.make, args=(crops, params, augment, crops))
    worker.start()
    turns = 0
    while worker.is_alive():
        time.sleep(0.001)  # wakes up only if the lock is free
        turns += 1
    assert turns > 10


def test_threads_do_not_share_their_scratch_memory(library: Path) -> None:
    operators = Photometric(ctypes.CDLL(str(library)), variants()[0])
    augment = AugmentConfig(size=64, blur=0.5)
    crops = pictures(64, 3, np.uint8, 30)
    params = [sample_view(augment, (64, 64), 3, 0, i, 0) for i in range(30)]
    alone = torch.empty_like(crops)
    operators.make(crops, params, augment, alone)
    outs = [torch.empty_like(crops) for _ in range(4)]
    workers = [
        threading.Thread(target=operators.make, args=(crops, params, augment, out)) for out in outs
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(equal(out, alone) for out in outs)


def test_the_table_has_the_fields_of_the_library() -> None:
    """The order of operators takes four fields."""
    text = SOURCE.read_text("utf-8")
    names = text[text.index("enum {") : text.index("FIELDS\n}")]
    names = names[names.index("BRIGHTNESS = 4") :]
    assert 4 + names.count(",") == FIELDS
    assert {"order", "brightness", "turns"} <= set(ViewParams._fields)
