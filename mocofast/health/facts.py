"""Facts about the images of a run that a verdict needs: numbers, copies, the level of guessing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mocofast import __version__
from mocofast.data.interface import Source
from mocofast.data.loaders import count_workers
from mocofast.data.sources import Datasets
from mocofast.methods.base import Method

MOST = 20_000  # images that are looked at for copies
SECONDS = 1.0  # for the look at copies


def facts_of(method: Method, datasets: Datasets) -> dict[str, Any]:
    """Returns the facts. All can be written as JSON.

    images: number in the training set. queue: keys in the queue, 0 without one.
    looked_at, copies: images looked at, and how many of them are exact copies of an earlier image.
    held_out, chance_knn: number of evaluation images, and the share of their largest class, if
        there are labels.
    machine: processor or GPU, and versions, {part: text}.
    """
    queue = getattr(method, "queue", None)
    looked_at, copies = count_copies(datasets.train)
    facts: dict[str, Any] = {
        "images": len(datasets.train),
        "queue": len(queue) if isinstance(queue, Tensor) else 0,
        "looked_at": looked_at,
        "copies": copies,
        "machine": machine_of(next(method.parameters()).device),
    }
    if datasets.val is not None and datasets.val.labels is not None and len(datasets.val):
        labels = datasets.val.labels[datasets.val.labels >= 0]
        if len(labels):
            facts["held_out"] = len(labels)
            facts["chance_knn"] = int(np.bincount(labels).max()) / len(labels)
    return facts


def machine_of(device: torch.device) -> dict[str, str]:
    """Returns what computes, and the versions of what a run depends on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    parts = {"processor": f"{name}, {count_workers(-1)} cores", "system": platform.platform()}
    if device.type == "cuda":
        parts["GPU"] = torch.cuda.get_device_name(device)
    versions = {"mocofast": __version__, "Python": platform.python_version()}
    versions |= {"PyTorch": torch.__version__, "NumPy": np.__version__}
    return {**parts, **versions}


def count_copies(source: Source, seconds: float = SECONDS) -> tuple[int, int]:
    """Returns the number of images looked at, and how many are exact copies of an earlier image.

    Looks at images in memory and at files on a disk, for `seconds` at most. Files of different
    sizes are no copies, so only files of equal size are read. (0, 0) for other images: archives
    and shards may be far away.
    """
    end = time.monotonic() + seconds
    if not len(source):
        return 0, 0
    first = source.load(0)
    indices = np.linspace(0, len(source) - 1, min(MOST, len(source))).astype(int)
    if isinstance(first, np.ndarray):
        digests = []
        for index in indices:
            pixels = np.asarray(source.load(int(index))).tobytes()
            digests.append(hashlib.blake2b(pixels, digest_size=16).digest())
            if time.monotonic() > end:
                break
        return len(digests), len(digests) - len(set(digests))
    if not isinstance(first, str):
        return 0, 0
    sizes: dict[int, list[str]] = {}
    seen: set[str] = set()
    looked_at = 0
    for index in indices:
        path = str(source.load(int(index)))
        if path in seen:  # an image with several captions
            continue
        seen.add(path)
        try:
            sizes.setdefault(os.stat(path).st_size, []).append(path)
        except OSError:  # a bad file, which the loader skips and names
            continue
        looked_at += 1
        if time.monotonic() > end - seconds / 2:
            break
    copies = 0
    for paths in sizes.values():
        if len(paths) > 1 and time.monotonic() < end:
            copies += len(paths) - len(set(map(_digest, paths)))
    return looked_at, copies


def _digest(path: str) -> bytes:
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest()
    except OSError:
        return os.fsencode(path)  # equal to no other file
