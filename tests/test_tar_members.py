"""Members of tar files equal tarfile's: names, places, contents, and the end of damaged files."""

from __future__ import annotations

import io
import itertools
import random
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mocofast.data import tar_members
from mocofast.data.tar_members import TarMembers

Found = list[tuple[Any, ...]]

NAMES = [
    "a.jpg",
    "a.cls",
    "folder/" + "n" * 93,  # 100 bytes: the whole field, without a NUL at its end
    "folder/" + "n" * 94,  # too long for the field
    f"{'p' * 90}/{'q' * 90}.jpg",  # a prefix in ustar
    "deep/" * 60 + "x.png",  # too long for ustar
    "ü/日本.jpg",
    "path=of size=9.jpg",
    "empty.cls",
    "z.jpg",
]


def by_tarfile(path: Path) -> Found:
    """Lists a tar file with `tarfile` alone."""
    found: Found = []
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                content = tar.extractfile(member) if member.isreg() else None
                place = (member.name, member.offset_data, member.size)
                kind = (member.isreg(), member.islnk(), member.issym())
                found.append((*place, *kind))
                found.append((content.read() if content else b"",))
    except tarfile.TarError as error:
        found.append((type(error), str(error)))
    return found


def by_members(path: Path) -> Found:
    """Lists a tar file with `TarMembers`."""
    found: Found = []
    try:
        with TarMembers(path) as tar:
            for member in tar:
                place = (member.name, member.offset_data, member.size)
                kind = (member.isreg(), member.islnk(), member.issym())
                found.append((*place, *kind))
                found.append((tar.read(member) if member.isreg() else b"",))
    except tarfile.TarError as error:
        found.append((type(error), str(error)))
    return found


def write(path: Path, tar_format: int, **options: Any) -> Path:
    """Writes files of many names, and members of every other kind between them."""
    rng = random.Random(3)
    with tarfile.open(path, "w", format=tar_format, **options) as tar:
        for number, name in enumerate(NAMES):
            if tar_format == tarfile.USTAR_FORMAT and len(name) > 255:
                continue
            size = (0, 1, 511, 512, 513, 5000, 70000)[number % 7]
            info = tarfile.TarInfo(name)
            info.size = size
            # WebDataset's writer gives times with a fraction, which need a PAX header.
            info.mtime = 1e9 + 0.25 * (number % 3)  # type: ignore[assignment]
            info.type = tarfile.CONTTYPE if number == 3 else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(rng.randbytes(size)))
            if number % 3 == 1:
                for kind in (tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE):
                    other = tarfile.TarInfo(f"other-{number}-{kind.decode()}")
                    other.type, other.linkname = kind, NAMES[0]
                    tar.addfile(other)
    return path


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("at_once", [1, 3, 1024])
@pytest.mark.parametrize("tar_format", FORMATS)
def test_members_equal_tarfiles(
    tmp_path: Path, tar_format: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_members, "_AT_ONCE", at_once)
    path = write(tmp_path / "x.tar", FORMATS[tar_format])
    expected = by_tarfile(path)
    assert len(expected) > 30
    assert by_members(path) == expected


@pytest.mark.parametrize("tar_format", FORMATS)
def test_a_file_cut_off_anywhere_ends_as_with_tarfile(tmp_path: Path, tar_format: str) -> None:
    whole = write(tmp_path / "x.tar", FORMATS[tar_format]).read_bytes()
    cut = tmp_path / "cut.tar"
    for size in [*range(0, 16000, 171), *range(512, 16000, 512), len(whole) - 10240]:
        cut.write_bytes(whole[:size])
        assert by_members(cut) == by_tarfile(cut), size


@pytest.mark.parametrize("end", [b"\0x", b"  ", b" x", b"x ", b"7\0", b"\xff\xff"])
def test_what_follows_the_digits_of_a_sum_is_read_as_by_tarfile(tmp_path: Path, end: bytes) -> None:
    path = write(tmp_path / "x.tar", tarfile.USTAR_FORMAT)
    with tarfile.open(path) as tar:
        start = tar.getmembers()[-2].offset
    content = bytearray(path.read_bytes())
    content[start + 154 : start + 156] = end
    path.write_bytes(content)
    assert by_members(path) == by_tarfile(path)


@pytest.mark.parametrize("tar_format", FORMATS)
def test_a_damaged_byte_of_any_header_ends_as_with_tarfile(tmp_path: Path, tar_format: str) -> None:
    whole = write(tmp_path / "x.tar", FORMATS[tar_format]).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        starts = [member.offset for member in tar]
    damaged = tmp_path / "damaged.tar"
    rng = random.Random(5)
    for start in starts:
        for field in (0, 126, 134, 135, 150, 156, 345, rng.randrange(512)):
            content = bytearray(whole)
            content[start + field] ^= 1 << rng.randrange(8)
            damaged.write_bytes(content)
            assert by_members(damaged) == by_tarfile(damaged), (start, field)


def test_global_headers_apply_to_all_later_members(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.tar", tarfile.PAX_FORMAT, pax_headers={"path": "one name for all.jpg"}
    )
    found = by_members(path)
    assert found == by_tarfile(path)
    assert {row[0] for row in found if len(row) > 2} >= {"one name for all.jpg"}


def test_numbers_that_are_not_octal_are_read_as_by_tarfile(tmp_path: Path) -> None:
    """Owners above 2,097,151 (8 digits) are binary in GNU's format."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for i in range(4):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size, info.uid = 9, 2**30
            tar.addfile(info, io.BytesIO(b"123456789"))
    assert by_members(path) == by_tarfile(path)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("size", "named"),
    [
        (b"-00000002000", "-1,024"),
        (b"\xff" * 10 + b"\xfc\0", "-1,024"),
        (b"\x80\0\0\x80" + b"\0" * 8, f"{1 << 71:,}"),
    ],
)
def test_an_impossible_size_ends_the_members(
    tmp_path: Path, size: bytes, named: str, first: bool
) -> None:
    path = write(tmp_path / "x.tar", tarfile.USTAR_FORMAT)
    with tarfile.open(path) as tar:
        start = tar.getmembers()[0 if first else 1].offset
    content = bytearray(path.read_bytes())
    content[start + 124 : start + 136] = size
    header = content[start : start + 512]
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    content[start + 148 : start + 156] = b"%06o\0 " % total
    path.write_bytes(content)
    message = f"a member of {named} bytes at byte"
    with TarMembers(path) as tar, pytest.raises(tarfile.ReadError, match=message):
        list(itertools.islice(tar, 100))


def test_sums_padded_with_spaces_are_read_as_by_tarfile(tmp_path: Path) -> None:
    """POSIX allows spaces before the digits. A wrong digit behind spaces ends the members."""
    path = write(tmp_path / "x.tar", tarfile.USTAR_FORMAT)
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar]
    content = bytearray(path.read_bytes())
    for start in starts:
        total = int(content[start + 148 : start + 154], 8)
        content[start + 148 : start + 156] = b"%6o\0 " % total
    path.write_bytes(content)
    assert content[starts[0] + 148] == ord(" ")
    found = by_members(path)
    assert found == by_tarfile(path)
    assert len(found) == 2 * len(starts)
    content[starts[2] + 153] ^= 1
    path.write_bytes(content)
    assert by_members(path) == by_tarfile(path) != found


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the tar command")
@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_files_of_the_tar_command_equal_tarfiles(tmp_path: Path, kind: str) -> None:
    """With links, a sparse file, and a folder whose name ends with a slash."""
    root = tmp_path / "root"
    root.mkdir()
    for name in ("1.jpg", "2.cls"):
        (root / name).write_bytes(name.encode() * 300)
    (root / "sub").mkdir()
    (root / "sub" / "link.jpg").hardlink_to(root / "1.jpg")
    (root / "sub" / "soft.jpg").symlink_to("../1.jpg")
    with (root / "sparse.jpg").open("wb") as file:
        file.truncate(10**6)
        file.write(b"content")
        file.seek(900_000)
        file.write(b"more")
    sparse = ["--sparse"] if kind in ("gnu", "oldgnu", "posix") else []
    path = tmp_path / "x.tar"
    command = ["tar", "-cf", str(path), f"--format={kind}", *sparse, "-C", str(root), "."]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this tar command does not write the format")
    found = by_members(path)
    assert found == by_tarfile(path)
    assert len(found) >= 12
