"""Reads files of weights, whatever project wrote them, as flat dictionaries of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from mocofast.config import ConfigError
from mocofast.errors import describe_error
from mocofast.train.checkpoint import FORMAT, LAST, load_checkpoint
from mocofast.train.checkpoint_file import read_file
from mocofast.train.file_kinds import entries_of, other_kind

# Entries under which projects keep their weights, in the order of search. timm evaluates averages
# (state_dict_ema, model_ema), and DINO the teacher. mmselfsup, Lightning and facebookresearch/moco:
# state_dict. VISSL: classy_state_dict.
CONTAINERS = (
    *("state_dict_ema", "model_ema"),
    *("classy_state_dict", "base_model", "state_dict", "model_state_dict", "teacher", "model"),
    *("network", "net", "module", "weights", "trunk", "student"),
)
# Wrappers that put their name before every entry, in any order: DistributedDataParallel,
# torch.compile, Lightning modules and trainers.
WRAPPERS = ("module.", "model.", "network.", "net.", "method.", "_forward_module.")
# Wrappers of single parts, which may stand anywhere: torch.compile, FSDP1, recomputed activations.
INNER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Files of a folder of transformers or Accelerate, in the order of search.
_INDEX = "model.safetensors.index.json"
_SAVED = ("model.safetensors", _INDEX, "pytorch_model.bin")


def read_any(path: str | Path) -> tuple[Any, Path]:
    """Reads a file onto the CPU. Returns its content and its path.

    path: a file of torch.save or of safetensors, a run folder, as `load_checkpoint` reads it, or a
        folder of transformers or Accelerate, whose weights may be divided into files.
    Raises FileNotFoundError, and ConfigError for a file that cannot be read.
    """
    path = Path(path)
    if path.is_dir() and not (path / "checkpoints").is_dir():
        path = next((file for name in _SAVED if (file := path / name).is_file()), path)
    if path.name == _INDEX:
        return _read_shards(path), path
    if path.is_dir():
        return load_checkpoint(path), path / "checkpoints" / LAST
    if path.suffix != ".safetensors":
        return read_file(path), path
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if kind := other_kind(path):
        raise ConfigError(f"{path}: no checkpoint of PyTorch or safetensors, but {kind}")
    try:
        return load_file(path), path
    except Exception as error:
        raise ConfigError(f"{path}: not a readable checkpoint ({describe_error(error)})") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Returns the weights of all files that an index names."""
    files = entries_of(index).get("weight_map")
    if not isinstance(files, dict) or not all(map(_is_weights, files.values())):
        raise ConfigError(f"{index}: expected an index of safetensors, with a weight_map of files")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        weights |= read_any(index.with_name(name))[0]
    return weights


def _is_weights(name: Any) -> bool:
    """Returns whether a value of an index names a file beside the index, of safetensors."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def is_ours(content: Any) -> bool:
    """Returns whether the content is a checkpoint of mocofast."""
    return isinstance(content, Mapping) and content.get("format") == FORMAT and "config" in content


def tensors_of(content: Any) -> dict[str, Tensor]:
    """Returns the flat dictionary of weights in the content of a file, without wrappers' names.

    content: may hold modules, where somebody loaded the file by `torch.load` without our reader.
    Raises ConfigError if there is none.
    """
    weights = _find(content)
    if not weights:
        entries = list(content)[:5] if isinstance(content, Mapping) else type(content).__name__
        raise ConfigError(f"no weights found: expected a dictionary of tensors, got {entries}")
    return without_wrappers(weights)


def _find(content: Any, depth: int = 0) -> dict[str, Tensor]:
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping) or depth > 5:
        return {}
    own = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    for name in CONTAINERS:
        found = _find(content.get(name), depth + 1)
        if found and len(found) >= len(own):
            return found
    return own


def without_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes wrappers' names: INNER anywhere, WRAPPERS where one stands before every entry."""
    found = dict(weights)
    for inner in INNER:
        found = {name.replace(inner, ""): value for name, value in found.items()}
    while True:
        wrapper = next((w for w in WRAPPERS if all(name.startswith(w) for name in found)), None)
        if wrapper is None:
            return found
        found = {name.removeprefix(wrapper): value for name, value in found.items()}


def described_names(names: list[str]) -> str:
    """Returns at most five names, and the number of the rest."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{rest}"
