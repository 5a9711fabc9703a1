"""The sharded tensors of a checkpoint: a folder of torch.distributed.checkpoint beside the file.

The file, step_N.pt, holds all the rest, and for every sharded tensor a tensor without values
(device "meta"). Its entry "parts" names the folder, and size and CRC-32 of every file in the
folder. The file is written last, so a checkpoint is whole if its file is there.

Loads torch.distributed.checkpoint, which takes long, with the first sharded tensor.
"""

from __future__ import annotations

import io
import mmap
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mocofast.config import ConfigError
from mocofast.errors import describe_error
from mocofast.ops.local import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata

SUFFIX = ".parts"
METADATA = ".metadata"
# The classes in a file .metadata, whose reading would run any code otherwise.
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorProperties"),
        *("TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float16", "bfloat16", "float64", "int64"},
    "pathlib": {"PosixPath", "WindowsPath"},
}


def split(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the content with tensors without values in place of sharded tensors, and these.

    The names of sharded tensors are paths: "optimizer/state/0/exp_avg".
    """
    sharded = {path: tensor for path, tensor in _tensors(content) if is_dtensor(tensor)}
    empty = {
        path: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for path, tensor in sharded.items()
    }
    return _replaced(content, empty), sharded


def write(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup) -> dict[str, Any]:
    """Writes sharded tensors into a new folder. Returns {file: [bytes, CRC-32]} of all files.

    A collective call of the group. Files and folder are synced to the disk.
    Raises OSError, on all ranks, if the system refuses a write.
    """
    import torch.distributed.checkpoint as dcp

    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as error:
        for found, _ in error.failures.values():
            if isinstance(found, OSError):
                raise OSError(found.errno, found.strerror, str(folder)) from error
        raise
    rank = dist.get_rank()
    own = [*folder.glob(f"__{rank}_*"), *([folder / METADATA] if rank == 0 else [])]
    sums: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(sums, {file.name: _sum_of(file) for file in own}, group=group)
    return {name: value for found in sums for name, value in found.items()}


def check(content: dict[str, Any], path: Path) -> None:
    """Checks the folder of a checkpoint, and notes its place in the content.

    content: of the file `path`.
    Raises ConfigError if a file of the folder is missing, damaged, or not of the checkpoint.
    """
    try:
        name, files = content["parts"]["folder"], dict(content["parts"]["files"])
        folder = path.resolve().parent / name
        if Path(name).name != name or not name.startswith("step_"):
            raise ValueError(f"the name of the folder, {name!r}")
        for file, expected in files.items():
            if Path(file).name != file:
                raise ValueError(f"the name of a file, {file!r}")
            if not (folder / file).is_file():
                raise ValueError(f"{folder / file} is missing")
            if _sum_of(folder / file) != list(expected):
                raise ValueError(f"wrong checksum of {folder / file}")
        empty = {name: tensor for name, tensor in _tensors(content) if tensor.is_meta}
        if sum(t.numel() * t.element_size() for t in empty.values()) > sum(
            f[0] for f in files.values()
        ):
            raise ValueError("tensors larger than their files")
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        metadata = _reader(folder).read_metadata()
        for name, tensor in empty.items():
            found = metadata.state_dict_metadata.get(name)
            if not isinstance(found, TensorStorageMetadata) or found.size != tensor.shape:
                raise ValueError(f"no {name} of {tuple(tensor.shape)}")
        _check_slices(metadata, folder, files)
    except Exception as error:  # the content may be anything
        raise ConfigError(f"{path}: damaged ({describe_error(error)})") from error
    content["parts"]["place"] = str(folder)


def fill(content: dict[str, Any], make: Callable[[str, Tensor], Tensor] | None = None) -> None:
    """Reads the values of the sharded tensors, in place.

    content: checked by `check`.
    make: returns the tensor to read into, for the path of a tensor and the tensor without values.
        A DTensor reads the part of this rank. None: whole tensors on the CPU.
    """
    empty = {path: tensor for path, tensor in _tensors(content) if tensor.is_meta}
    make = make or (lambda _, t: torch.empty(t.shape, dtype=t.dtype))
    tensors = {path: make(path, tensor) for path, tensor in empty.items()}
    import torch.distributed.checkpoint as dcp

    reader = _reader(Path(content.pop("parts")["place"]))
    with warnings.catch_warnings():  # every rank reads on its own
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    content.update(_replaced(content, tensors))


def folder_of(file: Path) -> str:
    """Returns the name of the folder of a checkpoint's file, "" for none."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return str(content["parts"]["folder"])
    except Exception:  # a file of another kind, or damaged
        return ""


def _reader(folder: Path) -> FileSystemReader:
    """Returns a reader of a folder whose metadata nobody vouches for."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            content = (Path(self.path) / METADATA).read_bytes()
            metadata = _MetadataUnpickler(io.BytesIO(content)).load()
            if not isinstance(metadata, Metadata):
                raise ValueError(f"{METADATA} holds no metadata")
            metadata.storage_meta = None
            return metadata

    return Reader(folder)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{METADATA} holds {module}.{name}")


def _check_slices(metadata: Metadata, folder: Path, files: dict[str, Any]) -> None:
    """Raises ValueError unless all tensors are plain archives inside the files of the folder."""
    for info in metadata.storage_data.values():
        if info.relative_path not in files or getattr(info, "transform_descriptors", None):
            raise ValueError(f"a tensor in {info.relative_path!r}")
        with open(folder / info.relative_path, "rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with (
                view,
                zipfile.ZipFile(io.BytesIO(view[info.offset : info.offset + info.length])) as z,
            ):
                if is_compressed(z):
                    raise ValueError("a compressed entry")


def is_compressed(archive: zipfile.ZipFile) -> bool:
    """Returns whether an entry is compressed. torch.save never compresses.

    A small compressed file may unpack to any size.
    """
    return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def _sum_of(file: Path) -> list[int]:
    """Returns the number of bytes of a file, and their CRC-32."""
    size = total = 0
    with open(file, "rb") as content:
        while block := content.read(2**22):
            size, total = size + len(block), zlib.crc32(block, total)
    return [size, total]


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the path and the value of every tensor in nested dictionaries."""
    for key, item in value.items():
        place = f"{path}/{key}" if path else str(key)
        if isinstance(item, Tensor):
            yield place, item
        elif isinstance(item, dict):
            yield from _tensors(item, place)


def _replaced(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Returns nested dictionaries with other tensors at the paths of `tensors`."""
    if isinstance(value, dict):
        return {
            k: _replaced(v, tensors, f"{path}/{k}" if path else str(k)) for k, v in value.items()
        }
    return tensors.get(path, value)
