"""Tells what a file or a folder is that was taken for a checkpoint or a run folder."""

from __future__ import annotations

import codecs
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from mocofast.data.finding import counted

_EXPORTED = "name the checkpoint that it was exported from"
# (pattern of the first bytes, what the file is).
_KINDS = (
    (rb"\xff\xd8\xff", "a JPEG image"),
    (rb"\x89PNG", "a PNG image"),
    (rb"GIF8", "a GIF image"),
    (rb"RIFF.{4}WEBP", "a WebP image"),
    (rb"II\*\0|MM\0\*", "a TIFF image"),
    (rb"%PDF-", "a PDF document"),
    (rb"\x1f\x8b", "a gzip file; unpack it first"),
    (rb"BZh", "a bzip2 file; unpack it first"),
    (rb"\xfd7zXZ", "an xz file; unpack it first"),
    (rb"\x28\xb5\x2f\xfd", "a zstd file; unpack it first"),
    (rb".{257}ustar", "a tar archive; unpack it first"),
    (rb"\x93NUMPY", "an array of NumPy"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"PAR1", "a Parquet file"),
    # Version of the format, then the producer, the domain, the graph or the operators.
    (rb"\x08[\x03-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]", f"an ONNX model; {_EXPORTED}"),
    (rb"\s*<(!doctype html|html|head)", "an HTML page, where a download may have failed"),
    (rb"version https://git-lfs", "a pointer of Git LFS; git lfs pull fetches the file"),
)
_SAFETENSORS = rb'.{4}\0{4}\{"'  # the length of the header, and the header
# (name in a zip archive, what the archive is). Files of torch.save have data.pkl alone.
_ARCHIVES = (
    (r"[^/]+/constants\.pkl", "a TorchScript model; save the state_dict() of torch.jit.load"),
    (r"([^/]+/)?archive_format", f"a program of torch.export; {_EXPORTED}"),
    (r"[^/]+/data\.pkl", ""),
    (r".+\.npy", "arrays of NumPy"),
)


def other_kind(path: Path) -> str:
    """Returns what a file is, if it is surely not what its name says, else "".

    *.safetensors: a file of safetensors. All other names: a file of torch.save.
    """
    with path.open("rb") as file:
        first = file.read(512)
    if not first:
        return "an empty file"
    named = path.suffix == ".safetensors"
    if not named and re.match(_SAFETENSORS, first, re.DOTALL):
        return "a file of safetensors; end its name in .safetensors"
    kind = _archive(path) if first.startswith(b"PK") else ""
    if kind:
        return kind
    if named and re.match(rb"PK|\x80[\x02-\x05]", first):
        return "a file of torch.save; end its name in .pt"
    for pattern, kind in _KINDS:
        if re.match(pattern, first, re.DOTALL | re.IGNORECASE):
            return kind
    return "a text file" if _is_text(first) else ""


def _archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # damaged: find_damage says how
        return ""
    for pattern, kind in _ARCHIVES:
        if any(re.fullmatch(pattern, name) for name in names):
            return kind
    return "a zip archive"


def _is_text(first: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(first)
    except UnicodeDecodeError:
        return False
    return re.search(r"[\0-\x08\x0e-\x1f]", text) is None


def other_folder(path: Path) -> str:
    """Returns what a folder without checkpoints/ is, and what to name in its place."""
    results = entries_of(path / "results.json")
    if "command" in results:
        has_run = (path.parent / "checkpoints").is_dir()
        run = path.parent if has_run else results.get("checkpoint", "their checkpoint")
        return f"results of mocofast {results['command']}; name {run}"
    if "model_type" in entries_of(path / "config.json"):
        return (
            "a folder of transformers; evaluations, export and --init read its model.safetensors, "
            "and no run continues from it"
        )
    if (path / ".metadata").is_file():
        return (
            "a folder of torch.distributed.checkpoint; make a file of it first: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE.pt"
        )
    if path.name == "checkpoints" and any(path.glob("*.pt")):
        return f"the checkpoints of a run; name {path.parent}"
    runs = sorted(folder.parent.name for folder in path.glob("*/checkpoints"))
    if runs:
        return f"a folder of {counted(len(runs), 'run folder')}; name one: {path / runs[0]}"
    return "expected a folder with checkpoints/"


def entries_of(file: Path) -> dict[str, Any]:
    """Returns the content of a JSON file, {} for other files."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
