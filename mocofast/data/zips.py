"""Images in a zip archive, as a source that can be read in any order."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mocofast.config import ConfigError
from mocofast.data.finding import counted, listed
from mocofast.data.names import NamedImages
from mocofast.files import read_at

_HEADER = struct.Struct("<4s22xHH")  # of a file: signature, lengths of name and extra field


class ZipArchive:
    """The table of contents of a zip archive."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a broken archive, and for encrypted files."""
        self.path, self.remarks = path, list[str]()
        try:
            with zipfile.ZipFile(path) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ConfigError(
                f"data.path: {str(path)!r} is not a whole zip file: {error}"
            ) from error
        locked = [info.filename for info in infos if info.flag_bits & 1]
        if locked:
            raise ConfigError(
                f"data.path: {counted(len(locked), 'file')} of {str(path)!r} with a password, "
                f"{locked[0]} the first; unpack the archive"
            )
        readable = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        odd = Counter(
            f"method {info.compress_type}" for info in infos if info.compress_type not in readable
        )
        if odd:
            self.remarks.append(
                f"files of compressions that are not read left out: {listed(odd)}; "
                "unpack the archive to use the files"
            )
        # Of entries with one name the last is valid.
        self.infos = {info.filename: info for info in infos if info.compress_type in readable}


class ZipSource(NamedImages):
    """Images of a zip archive. `load` returns the content of an image file."""

    def __init__(
        self,
        archive: ZipArchive,
        names: Sequence[str],
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        """names: N paths in the archive. labels: (N,) integers that index `classes`, or None."""
        super().__init__(names, labels, classes)
        self.path = archive.path
        infos = [archive.infos[name] for name in names]
        self._places = np.array(  # (N, 4)
            [(i.header_offset, i.compress_size, i.file_size, i.compress_type) for i in infos],
            dtype=np.int64,
        ).reshape(-1, 4)

    def paths(self) -> Iterator[str]:
        """Yields the path of the archive."""
        yield str(self.path)

    def load(self, index: int) -> bytes:
        """Returns the content of an image file.

        Raises OSError if the archive cannot be read or has changed. A file that does not
        unpack returns what was unpacked, so the loader skips and names the image.
        """
        offset, packed, size, method = self._places[index].tolist()
        # Reads at a position: threads and forked workers share no place in the file.
        with self.path.open("rb", buffering=0) as file:
            header = read_at(file.fileno(), _HEADER.size, offset)
            if len(header) < _HEADER.size or not header.startswith(b"PK\x03\x04"):
                raise OSError(f"{self.path} changed: {self.name(index)} is no longer there")
            _, name_length, extra_length = _HEADER.unpack(header)
            start = offset + _HEADER.size + name_length + extra_length
            content = read_at(file.fileno(), packed, start)
        if method == zipfile.ZIP_STORED:
            return content
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size)
        except zlib.error:
            return b""
