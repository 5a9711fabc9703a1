"""Images for the tests of the data, and comparisons of batches."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mocofast.config import DataConfig
from mocofast.data.interface import Batch, Source, ViewParams
from mocofast.data.shards import ShardSource
from mocofast.data.sources import FolderSource, find_images, load_datasets


def photo(seed: int, size: tuple[int, int]) -> Image.Image:
    """Returns smooth noise of size (height, width). JPEG changes the noise little,
    every operator changes it much.
    """
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


def jpeg(seed: int) -> bytes:
    """Returns a JPEG file. Sizes differ: the size of a substitute matters.

    seed: below 45.
    """
    buffer = io.BytesIO()
    photo(seed, (30 + 3 * seed, 90 - 2 * seed)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def put_images(root: Path, *names: str) -> Path:
    """Writes a real image of 5 x 3 pixels at every name, in the format of the extension."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 3), (i % 256, 40, 200)).save(path)
    return root


def named(source: Source) -> dict[str, str]:
    """Returns {name: class} of every image of a labelled source."""
    assert source.labels is not None
    return {source.name(i): source.classes[source.labels[i]] for i in range(len(source))}


def save_photos(root: Path, count: int = 23) -> Path:
    root.mkdir(exist_ok=True)
    for i in range(count):
        (root / f"{i:03}.jpg").write_bytes(jpeg(i))
    return root


def files(root: Path, labelled: bool = True) -> FolderSource:
    names = find_images(root)
    labels = np.arange(len(names)) % 3 if labelled else None
    return FolderSource(root, names, labels, ("a", "b", "c") if labelled else ())


def shard_datasets(path: Path, **options: object) -> tuple[ShardSource, ShardSource | None, str]:
    data = DataConfig(source="shards", path=str(path), **options)  # type: ignore[arg-type]
    train, val, note, _ = load_datasets(data)
    assert isinstance(train, ShardSource)
    assert val is None or isinstance(val, ShardSource)
    return train, val, note


def neutral(side: int) -> ViewParams:
    """Returns the parameters of a view of a whole image. side: of the image, in pixels."""
    return ViewParams(0, 0, side, side, 0.0, (), 1.0, 1.0, 1.0, 0.0, False, 0.0, False, False)


def assert_same_batches(a: Iterable[Batch], b: Iterable[Batch]) -> None:
    """Asserts equal batches, bit for bit, with equal labels and an equal number of batches."""
    a, b = list(a), list(b)
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert torch.equal(x.index, y.index)
        assert (x.labels is None) == (y.labels is None)
        assert x.labels is None or y.labels is None or torch.equal(x.labels, y.labels)
        assert len(x.views) == len(y.views)
        assert all(map(torch.equal, x.views, y.views))


def joined(ranks: Sequence[Sequence[Batch]]) -> list[Batch]:
    """Joins the batches of all ranks to the batches of a single process."""
    return [
        Batch(
            tuple(torch.cat(views) for views in zip(*(part.views for part in parts), strict=True)),
            torch.cat([part.index for part in parts]),
            None if parts[0].labels is None else torch.cat([part.labels for part in parts]),
        )
        for parts in zip(*ranks, strict=True)
    ]


def differences(a: Tensor, b: Tensor) -> Tensor:
    """Returns the absolute differences of pixels, float32 on the CPU. a, b: any type, any
    device.
    """
    return (a.cpu().int() - b.cpu().int()).abs().float()


def assert_same_views_but_for_hue(fused: Tensor, composed: Tensor) -> None:
    """Asserts that the kernel's views equal the views of PyTorch's operators but for few
    pixels.

    The order of additions differs for the hue: a value within 1e-5 of a half may round the
    other way, and later be truncated the other way.
    """
    error = differences(fused, composed)
    assert error.max() <= 4
    assert (error > 0).float().mean() < 1e-3
