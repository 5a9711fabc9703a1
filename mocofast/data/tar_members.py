"""The members of a tar file, listed from their headers.

Headers of plain files are read here, in a tenth of the time that `tarfile` takes. Members of any
other kind (folders, links, sparse files, long names) and damaged headers are left to `tarfile`.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np

from mocofast.files import read_at

BLOCK = tarfile.BLOCKSIZE  # 512 bytes: a header, and the unit of a member's content
_AT_ONCE = 1024  # headers whose checksums are verified together
# Bytes of a read after a file of more than _LARGE bytes (the next header, and often a small label
# file behind it), and after a smaller file (many headers).
_SMALL, _LARGE = 4096, 32768
_AT_END = 1 << 20  # bytes behind the end of an archive that are read at once
_LONGEST_PAX = 1 << 20  # bytes of a PAX header that is read here
_LONGEST_FILE = 1 << 63  # bytes
_FILE_TYPES = b"0\0"
_PAX_TYPE = ord("x")
# Parts of the keywords of a PAX header that change the name, the size or the kind of a member.
_PAX_CHANGES = (b"path=", b"size=", b"GNU.sparse")


def check_tar(path: Path, length_known: bool) -> None:
    """Raises ValueError unless a file begins with a header of tar and ends with a block of zeros.

    length_known: is not used. The block of zeros shows whether the file is whole.
    """
    with path.open("rb") as file:
        try:
            tarfile.TarInfo.frombuf(file.read(BLOCK), tarfile.ENCODING, "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(f"no tar file ({error})") from error
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - BLOCK))
        if size % BLOCK or any(file.read(BLOCK)):
            raise ValueError(f"a tar file that is cut off after {size:,} bytes")


class PlainFile:
    """A plain file. Has the attributes of `tarfile.TarInfo` that describe its place."""

    __slots__ = ("content", "name", "offset_data", "size")
    linkname = ""

    def __init__(self, name: str, offset_data: int, size: int, content: bytes | None) -> None:
        """Describes a file.

        offset_data: start of the content in the tar file, in bytes.
        size: of the content, in bytes.
        content: of a file of at most BLOCK bytes that was read with its header, or None.
        """
        self.name, self.offset_data, self.size, self.content = name, offset_data, size, content

    def isreg(self) -> bool:
        """Returns True: a plain file is a regular file."""
        return True

    def islnk(self) -> bool:
        """Returns False: a plain file is no hard link."""
        return False

    def issym(self) -> bool:
        """Returns False: a plain file is no symbolic link."""
        return False


Member: TypeAlias = "tarfile.TarInfo | PlainFile"


class TarMembers:
    """All members of an uncompressed tar file, in order. A context manager."""

    def __init__(self, path: Path) -> None:
        """Raises tarfile.TarError for another kind of file."""
        self._tar = tarfile.open(path, "r:")  # noqa: SIM115
        self._file = self._tar.fileobj.fileno()  # type: ignore[attr-defined]
        self._damaged = False  # a checksum is wrong

    def __enter__(self) -> TarMembers:
        return self

    def __exit__(self, *error: object) -> None:
        self._tar.close()

    def __iter__(self) -> Iterator[Member]:
        """Yields every member. Raises tarfile.TarError where the tar file is cut off, and for a
        member of an impossible size.
        """
        tar = self._tar
        while (member := tar.next()) is not None:
            # tarfile would go back, and read the same members for ever, or past all files.
            if not member.offset_data <= tar.offset < _LONGEST_FILE:
                raise tarfile.ReadError(
                    f"a member of {member.size:,} bytes at byte {member.offset:,}"
                )
            yield member
            # tarfile keeps all headers: a gigabyte for a shard of a million samples.
            tar.members.clear()  # type: ignore[attr-defined]
            # A global header (tarfile keeps its fields) may change the fields of every member.
            while not (tar.pax_headers or self._damaged) and (
                files := self._plain_files(tar.offset)
            ):
                yield from files

    def check_end(self) -> None:
        """Raises tarfile.ReadError unless the members end with the archive's end: blocks of zeros
        up to the end of the file. Call it after the last member.

        `tarfile` takes a damaged header, a header of zeros and the end of the file for the end of
        the archive, and leaves out all later members without an error.
        """
        position = self._tar.offset
        block = read_at(self._file, BLOCK, position)
        if not block:
            raise tarfile.ReadError(f"cut off: no end of the archive at byte {position:,}")
        if any(block) or len(block) < BLOCK:
            raise tarfile.ReadError(f"damaged or cut-off header at byte {position:,}")
        while rest := read_at(self._file, _AT_END, position):
            if any(rest):
                raise tarfile.ReadError(
                    f"members behind byte {position:,}: a header of zeros, or several archives in "
                    "one file"
                )
            position += len(rest)

    def read(self, member: Member) -> bytes:
        """Returns the content of a regular file. Raises tarfile.TarError for a cut-off file."""
        if isinstance(member, tarfile.TarInfo):
            file = self._tar.extractfile(member)
            return file.read() if file else b""
        content = member.content
        if content is None:
            content = read_at(self._file, member.size, member.offset_data)
        if len(content) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        return content

    def _plain_files(self, position: int) -> list[PlainFile]:
        """Returns the plain files from `position` to the next member of another kind.

        Returns at most _AT_ONCE files, and none if a checksum is wrong. Moves `tarfile` to the
        end of the last file.
        """
        files: list[PlainFile] = []
        headers: list[bytes] = []
        window, at, size = b"", 0, 0  # bytes of the file, the next header's place in them
        end = position  # of the last file
        encoding, errors = self._tar.encoding, self._tar.errors
        while len(headers) < _AT_ONCE:
            header = window[at : at + BLOCK]
            if len(header) < BLOCK:
                window = read_at(self._file, _SMALL if size > _LARGE else _LARGE, position)
                at, header = 0, window[:BLOCK]
                if len(header) < BLOCK:
                    break
            try:
                size = int(header[124:135], 8)
            except ValueError:  # the end, a size of 8 GiB or more, or a damaged header
                break
            step = BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK  # to the next header
            kind, small = header[156], None
            if size <= BLOCK or kind == _PAX_TYPE:
                content = window[at + BLOCK : at + BLOCK + size]
                small = content if len(content) == size else None
            if kind == _PAX_TYPE:
                if not 0 <= size <= _LONGEST_PAX:
                    break
                if small is None:
                    small = read_at(self._file, size, position + BLOCK)
                if len(small) < size or any(change in small for change in _PAX_CHANGES):
                    break
            elif kind in _FILE_TYPES and not header[345] and size >= 0:
                name = header[:100].partition(b"\0")[0].decode(encoding, errors)
                if name.endswith("/"):  # a folder, as old tar programs write folders
                    break
                files.append(PlainFile(name, position + BLOCK, size, small))
                end = position + step
            else:
                break
            headers.append(header)
            position, at = position + step, at + step
        if not _are_whole(headers):
            self._damaged = True
            return []
        self._tar.offset = end
        return files


def _are_whole(headers: list[bytes]) -> bool:
    """Returns whether every header holds the sum of its bytes, in 6 digits, and a size of at most
    11 digits.
    """
    if not headers:
        return True
    table = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)  # (headers, BLOCK)
    digits = table[:, 148:154] - np.uint8(ord("0"))
    if (digits < 8).all():  # in most tar files
        written = digits @ 8 ** np.arange(5, -1, -1)
    else:
        try:
            written = np.array([int(header[148:154], 8) for header in headers])
        except ValueError:
            return False
    # The field of the sum counts as 8 spaces.
    total = table.sum(1, dtype=np.int64) - table[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    ends = table[:, [135, 154, 155]] & ~np.uint8(ord(" "))  # 0 for NULs and spaces
    return bool(np.array_equal(total, written) and not ends.any())
