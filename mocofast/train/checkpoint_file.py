"""Reads files of torch.save: no code of a file runs, and damage is found."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mocofast.config import ConfigError
from mocofast.errors import describe_error
from mocofast.train import parts
from mocofast.train.file_kinds import other_kind


def read_file(path: Path, whole: bool = True) -> Any:
    """Returns the content of a file of torch.save, ours or foreign, on the CPU.

    Runs no code of the file: of classes beside tensors, argparse.Namespace alone is allowed.
    whole: also read the sharded tensors of a sharded checkpoint. Otherwise their folder is checked,
        and the tensors have no values (see mocofast.train.parts).
    Raises FileNotFoundError if there is no file, ConfigError if the file is damaged or of another
    kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if kind := other_kind(path):
        raise ConfigError(f"{path}: no checkpoint of PyTorch or safetensors, but {kind}")
    if damage := find_damage(path):
        raise ConfigError(f"{path}: damaged ({damage})")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        text = describe_error(error)
        if blocked := re.search(r"GLOBAL ([\w.]+)", text):
            raise ConfigError(
                f"{path}: not a readable checkpoint: holds {blocked[1]}, an object whose "
                "loading runs code of the file. If "
                'you trust the file, save its weights alone: python -c "import torch; '
                "from mocofast.interop.reading import tensors_of; "
                f"c = torch.load('{path}', weights_only=False, map_location='cpu'); "
                "torch.save({'state_dict': tensors_of(c)}, 'weights.pt')\""
            ) from error
        # PyTorch's first line advises to run the code of the file.
        first = text.splitlines()[0][:300]
        if "weights_only" in first:
            first = "not in the format that torch.save writes by default"
        raise ConfigError(f"{path}: not a readable checkpoint ({first})") from error
    _check_tensors(content, path)
    if isinstance(content, dict) and "parts" in content:
        parts.check(content, path)
        if whole:
            parts.fill(content)
    return content


def _check_tensors(content: Any, path: Path) -> None:
    """Raises ConfigError for a tensor larger than its file, which a stride of 0 makes possible."""
    largest, waiting = path.stat().st_size, [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if value.is_meta:  # no values: parts.check compares its size
                continue
            # The element of a small tensor may stand for several: an expanded scalar.
            if value.numel() * value.element_size() > max(largest, 2**20):
                shape = "x".join(map(str, value.shape))
                raise ConfigError(f"{path}: damaged (a tensor of {shape}, larger than the file)")
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)


def find_damage(path: Path) -> str:
    """Returns what is wrong with a file of torch.save, "" for nothing.

    The file is a zip archive, whose checksums (CRC-32) torch.load does not compare. Files of
    other kinds have no checksums.
    """
    if not zipfile.is_zipfile(path):
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            if parts.is_compressed(archive):
                return "a compressed entry"
            bad = archive.testzip()
    except Exception as error:  # zipfile raises many exceptions on a damaged directory
        return describe_error(error)
    return f"wrong checksum of {bad}" if bad else ""
