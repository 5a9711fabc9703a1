"""Parquet and Arrow files with a column of image bytes, as Hugging Face stores images.

An image of an Arrow file is read where it lies, as the file is not compressed. A parquet file is
unpacked once into the cache folder, in pieces, because its images can only be read in order.
Fingerprints, names and labels do not depend on the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mocofast import files
from mocofast.config import ConfigError
from mocofast.data.download import cache_folder
from mocofast.data.finding import shortened
from mocofast.data.lists import PATH

log = logging.getLogger(__name__)

ENDINGS = (".parquet", ".arrow")
# Names of columns of images, in lower case. Of several columns the first name wins.
IMAGE = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "tif", "tiff")
PIECE = 4 << 20  # bytes that are unpacked at a time, at least a row
BUFFER = 1 << 20  # bytes of a parquet column that are read at a time
OFFSET, SIZE, NAME = "mocofast.offset", "mocofast.size", "mocofast.path"
VERSION = 1  # of the files in the cache


class Table(NamedTuple):
    """The n rows of one file."""

    name: str  # of the table file, below data.path
    file: Path  # where the bytes of the images lie
    offsets: np.ndarray  # (n,) int64, in bytes
    sizes: np.ndarray  # (n,) int64, in bytes. 0 for a row without an image
    paths: list[str]  # n paths that the images had, "" where the table knows none
    columns: Any  # pyarrow.Table of the columns of texts and numbers
    column: str  # the column of images
    others: tuple[str, ...]  # more columns of images

    def texts(self, column: str) -> list[str]:
        """Returns a column as n texts, "" for an empty cell.

        Numbers of a column of classes (`datasets.ClassLabel`) become the names of the classes.
        """
        names = class_names(self.columns.schema, column)
        values = self.columns[column].to_pylist()
        if names:
            return [
                names[value] if isinstance(value, int) and 0 <= value < len(names) else ""
                for value in values
            ]
        # A negative number is Hugging Face's mark of a row without a label.
        return [
            "" if value is None or (isinstance(value, int) and value < 0) else str(value)
            for value in values
        ]


def pyarrow() -> Any:
    """Returns the module pyarrow. Raises ConfigError with a pip command without it."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"data.path: parquet and Arrow files need pyarrow ({error}); "
            "pip install 'mocofast[parquet]'"
        ) from error
    return pyarrow


def read_schema(path: Path) -> Any:
    """Returns the schema of a table file. Raises ConfigError for a broken file."""
    pa = pyarrow()
    try:
        if path.suffix.lower() == ".parquet":
            return pa.parquet.read_schema(path)
        return _arrow(path)[0].schema
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"data.path: {str(path)!r} cannot be read: {error}") from error


def image_columns(schema: Any) -> list[str]:
    """Returns the columns of bytes, the likeliest column of images first."""
    found = [name for name in schema.names if _holds_bytes(schema.field(name).type)]
    rank = {name: i for i, name in enumerate(IMAGE)}
    return sorted(found, key=lambda name: rank.get(name.lower(), len(rank)))


def _is_binary(kind: Any) -> bool:
    types = pyarrow().types
    view = getattr(types, "is_binary_view", lambda kind: False)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or view(kind))


def _holds_bytes(kind: Any) -> bool:
    """Returns whether a type is of bytes, or a struct with an entry `bytes` of bytes."""
    if pyarrow().types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_binary(kind.field(place).type)
    return _is_binary(kind)


def choose_column(schema: Any, asked: str, path: Path) -> tuple[str, tuple[str, ...]]:
    """Returns the column of images, and more columns of bytes.

    asked: the value of `data.column`, "" for the likeliest.

    Raises ConfigError if there is no column of images.
    """
    found = image_columns(schema)
    if asked and asked not in found:
        raise ConfigError(
            f"data.column: {asked!r} is no column of image bytes in {str(path)!r} "
            f"({shortened(found) or shortened(schema.names)})"
        )
    if not found:
        lower = {name.lower() for name in schema.names}
        way = "; --data.source list reads a column of paths" if lower & set(PATH) else ""
        raise ConfigError(
            f"data.path: no column of image bytes in {str(path)!r} ({shortened(schema.names)}){way}"
        )
    column = asked or found[0]
    return column, tuple(name for name in found if name != column)


def class_names(schema: Any, column: str) -> tuple[str, ...]:
    """Returns the names of a column of classes, in the order of their numbers, () for others."""
    with suppress(KeyError, ValueError, TypeError):
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        if features[column]["_type"] == "ClassLabel":
            return tuple(str(name) for name in features[column]["names"])
    return ()


def open_table(name: str, path: Path, asked: str = "") -> Table:
    """Returns the rows of a table file. Unpacks a parquet file into the cache, once.

    name: for logs and the fingerprint.
    asked: the value of `data.column`.

    Raises ConfigError for a broken file, and where the disk lacks the room to unpack.
    """
    schema = read_schema(path)
    column, others = choose_column(schema, asked, path)
    pa = pyarrow()
    try:
        if path.suffix.lower() != ".parquet":
            found = _in_place(path, column)
            if found is not None:
                return Table(name, path, *found, column, others)
        stat = path.stat()
        key = f"{VERSION} {path.resolve()} {stat.st_size} {stat.st_mtime_ns} {column}"
        place = (
            cache_folder() / "tables" / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
        )
        _unpack_once(path, column, place)
        kept = pa.parquet.read_table(Path(f"{place}.parquet"))
    except pa.ArrowException as error:
        raise ConfigError(f"data.path: {str(path)!r} cannot be read: {error}") from error
    offsets, sizes = (kept[key].to_numpy().astype(np.int64) for key in (OFFSET, SIZE))
    paths = [text or "" for text in kept[NAME].to_pylist()]
    rest = kept.drop_columns([OFFSET, SIZE, NAME])
    return Table(name, Path(f"{place}.images"), offsets, sizes, paths, rest, column, others)


def _arrow(path: Path) -> tuple[Any, Iterator[Any], Any]:
    """Returns (reader, batches, buffer) of an Arrow file. buffer: of the whole file, mapped."""
    pa = pyarrow()
    buffer = pa.memory_map(str(path)).read_buffer()
    if bytes(buffer[:6]) == b"ARROW1":
        reader = pa.ipc.open_file(buffer)
        return reader, (reader.get_batch(i) for i in range(reader.num_record_batches)), buffer
    reader = pa.ipc.open_stream(buffer)
    return reader, iter(reader), buffer


def _in_place(path: Path, column: str) -> tuple[np.ndarray, np.ndarray, list[str], Any] | None:
    """Returns offsets, sizes, paths and columns of an Arrow file, or None if it is compressed."""
    pa = pyarrow()
    reader, batches, buffer = _arrow(path)
    offsets, sizes, paths, rest = [], [], list[str](), []
    for batch in batches:
        starts, lengths, data = _bytes_of(batch.column(column))
        if data is not None and len(data):
            begin = data.address - buffer.address
            if not 0 <= begin <= buffer.size - data.size:
                return None
            starts = starts + begin
        offsets.append(starts)
        sizes.append(lengths)
        paths += _paths_of(batch.column(column))
        rest.append(batch.select(_simple(reader.schema)))
    none = np.empty(0, dtype=np.int64)
    fields = [reader.schema.field(name) for name in _simple(reader.schema)]
    table = pa.Table.from_batches(rest, pa.schema(fields, reader.schema.metadata))
    return np.concatenate([*offsets, none]), np.concatenate([*sizes, none]), paths, table


def _bytes_of(column: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """Returns (offsets, sizes, buffer) of an array of images. Offsets count from the buffer."""
    pa = pyarrow()
    if pa.types.is_struct(column.type):
        column = pa.compute.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        column = column.cast(pa.large_binary())
    wide = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    _, offsets, data = column.buffers()
    if not len(column):
        return np.empty(0, np.int64), np.empty(0, np.int64), None
    ends = np.frombuffer(offsets, wide)[column.offset :][: len(column) + 1].astype(np.int64)
    present = column.is_valid().to_numpy(zero_copy_only=False)
    return ends[:-1], np.diff(ends) * present, data


def _paths_of(column: Any) -> list[str]:
    """Returns the paths beside the bytes of images, "" where there is none."""
    pa = pyarrow()
    if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
        paths = pa.compute.struct_field(column, "path").to_pylist()
        return [path if isinstance(path, str) else "" for path in paths]
    return [""] * len(column)


def _simple(schema: Any) -> list[str]:
    """Returns the columns of texts, integers and booleans."""
    types = pyarrow().types
    kinds = {name: schema.field(name).type for name in schema.names}
    kinds = {n: k.value_type if types.is_dictionary(k) else k for n, k in kinds.items()}
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_boolean)
    return [name for name, kind in kinds.items() if any(test(kind) for test in tests)]


def _unpack_once(path: Path, column: str, place: Path) -> None:
    """Writes `place`.images, then `place`.parquet (the other columns), unless they are there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    table = Path(f"{place}.parquet")
    with Path(f"{place}.lock").open("w") as lock:
        files.lock(lock, wait=True)
        if table.exists():
            return
        with files.atomic_write(Path(f"{place}.images")) as part:
            columns = _unpack(path, column, part)
        with files.atomic_write(table) as part:
            pyarrow().parquet.write_table(columns, part)


def _unpack(path: Path, column: str, target: Path) -> Any:
    """Writes the images of a file to `target`. Returns the other columns, and the places."""
    pa = pyarrow()
    needed: int
    if path.suffix.lower() == ".parquet":
        file = pa.parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
        schema, count = file.schema_arrow, file.metadata.num_rows
        rest = file.read(columns=_simple(schema), use_threads=False)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        needed = sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if chunk.path_in_schema.split(".")[0] == column
        )
        rows = max(1, PIECE * count // max(1, needed))
        pieces = file.iter_batches(rows, columns=[column], use_threads=False)
    else:
        reader, pieces, _ = _arrow(path)
        schema, needed = reader.schema, path.stat().st_size
        again = _arrow(path)[1]
        rest = pa.Table.from_batches([batch.select(_simple(schema)) for batch in again])
        count = len(rest)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise ConfigError(
            f"data.path: {str(path)!r} needs {needed / 1e9:.1f} GB in {str(target.parent)!r}, "
            f"which has {free / 1e9:.1f} GB; XDG_CACHE_HOME names another folder"
        )
    log.info("unpacking %d images of %s once, %.0f MB", count, path.name, needed / 1e6)
    offsets, sizes, paths, end = [], [], list[str](), 0
    with target.open("wb") as out:
        for piece in pieces:
            array = piece.column(column)
            starts, lengths, data = _bytes_of(array)
            paths += _paths_of(array)
            sizes.append(lengths)
            offsets.append(starts - (starts[0] if len(starts) else 0) + end)
            if data is not None and len(starts):
                # Bytes of empty rows are empty, so all images lie in one piece.
                first, last = int(starts[0]), int((starts + lengths).max())
                out.write(memoryview(data)[first:last])
                end += last - first
    none = np.empty(0, dtype=np.int64)
    places = [pa.array(np.concatenate([*values, none])) for values in (offsets, sizes)]
    arrays = [*rest.columns, *places, pa.array(paths, pa.string())]
    names = [*rest.column_names, OFFSET, SIZE, NAME]
    return pa.Table.from_arrays(arrays, names).replace_schema_metadata(schema.metadata)
