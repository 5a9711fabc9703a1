"""Writes the features of a set of images, with names and labels, as .npz or .parquet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from mocofast import files
from mocofast.config import Config, ConfigError
from mocofast.data.sources import Datasets
from mocofast.device import run_autocast
from mocofast.evaluate.features import (
    check_finite,
    extract_batches,
    extraction,
    image_batches,
)

log = logging.getLogger("mocofast")

_ROWS = 4096  # features of a row group of a parquet file


class Embedded(NamedTuple):
    """Features of some images of a set. B: images."""

    features: np.ndarray  # (B, D) float32
    names: list[str]
    labels: np.ndarray  # (B,) int64, -1 for none
    set: str  # train or val


# Writes (path, images, names of the classes), returns the number and the dimension.
Writer = Callable[[str, Iterable[Embedded], Sequence[str]], tuple[int, int]]


def writer_of(path: str) -> Writer:
    """Returns the function that writes a file. Raises ConfigError for a path it cannot write."""
    out = Path(path)
    files.require_writable(out.parent, "OUT")
    if out.suffix == ".npz":
        return _write_npz
    if out.suffix != ".parquet":
        raise ConfigError(f"{path}: expected a file that ends in .parquet or .npz")
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{path}: needs pyarrow ({error}); pip install 'mocofast[parquet]', or write .npz"
        ) from error
    return _write_parquet


def embedded(
    encoder: nn.Module, datasets: Datasets, config: Config, device: torch.device, kind: str
) -> Iterator[Embedded]:
    """Yields the features of all images, in order: first those of the train set.

    encoder: on `device`. kind: "backbone" or "output", see `extract_batches`.
    Images that cannot be decoded are left out.
    """
    how = extraction(config, device, run_autocast(config, encoder, device))
    for name, source in (("train", datasets.train), ("val", datasets.val)):
        if source is None:
            continue
        batches = image_batches(source, config, device)
        for found, labels, index in extract_batches(encoder, batches, device, kind, **how):
            check_finite(found)
            own = torch.full((len(found),), -1) if labels is None else labels
            names = [source.name(i) for i in index.tolist()]
            yield Embedded(found.numpy(), names, own.numpy(), name)
        for bad, reason in batches.skipped.items():
            log.warning("left out: %s: %s", source.name(bad), reason)


def _write_npz(path: str, images: Iterable[Embedded], classes: Sequence[str]) -> tuple[int, int]:
    parts = list(images)
    if not parts:
        raise ConfigError("none of the images can be decoded")
    features = np.concatenate([part.features for part in parts])
    sets = [part.set for part in parts for _ in part.names]
    with files.atomic_write(Path(path)) as file, file.open("wb") as out:
        np.savez(
            out,
            features=features,
            names=np.array([_text(name) for part in parts for name in part.names]),
            labels=np.concatenate([part.labels for part in parts]),
            classes=np.array([_text(name) for name in classes], dtype=np.str_),
            sets=np.array(sets),
        )
    return features.shape


def _write_parquet(
    path: str, images: Iterable[Embedded], classes: Sequence[str]
) -> tuple[int, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [*map(_text, classes), None]  # label -1 is the last
    count = width = 0
    writer: Any = None
    waiting: list[Any] = []
    with files.atomic_write(Path(path)) as file:
        try:
            for part in images:
                width = part.features.shape[1]
                column = pa.FixedSizeListArray.from_arrays(part.features.ravel(), width)
                table = pa.table(
                    {
                        "name": pa.array([_text(name) for name in part.names], pa.string()),
                        "label": pa.array([names[i] for i in part.labels], pa.string()),
                        "set": pa.array([part.set] * len(part.names), pa.string()),
                        "feature": column,
                    }
                )
                writer = writer or pq.ParquetWriter(file, table.schema)
                waiting.append(table)
                count += len(part.names)
                if sum(map(len, waiting)) >= _ROWS:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
            if not count:
                raise ConfigError("none of the images can be decoded")
        finally:
            if writer is not None:
                writer.close()
    return count, width


def _text(name: str) -> str:
    """Returns a name without bytes that are no text."""
    return name.encode(errors="backslashreplace").decode()
