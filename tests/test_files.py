"""Files hold the complete old content or the complete new content."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mocofast import files
from mocofast.data.packed import PackedSource
from mocofast.data.shard_places import TarShard
from mocofast.data.shards import open_shards
from mocofast.data.tar_members import TarMembers
from mocofast.data.zips import ZipArchive, ZipSource


@pytest.mark.parametrize("writer", ["", "7"])
def test_a_file_is_replaced_at_the_end_and_after_an_error_stays_as_it_was(
    tmp_path: Path, writer: str
) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def write_half() -> None:
        with files.atomic_write(path, writer) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    with files.atomic_write(path, writer) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_different_names_do_not_collide_and_leftovers_are_overwritten(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a"
    with (
        files.atomic_write(path, "1") as one,
        files.atomic_write(path, "2") as two,
        files.atomic_write(path) as unnamed,
    ):
        assert len({one, two, unnamed}) == 3
        for temporary in (one, two, unnamed):
            temporary.write_text(temporary.name)
    assert path.read_text() == one.name  # the last to end
    with files.atomic_write(path) as again:
        assert again == unnamed  # the file of a killed writer is overwritten
        again.write_text("new")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("system", ["Linux", "Windows"])
def test_images_of_large_files_are_whole_where_the_system_reads_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """Linux reads 2 GiB in a call at most. Here a call reads 1000 bytes."""
    image = np.random.default_rng(0).bytes(4321)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.jpg", image)
        archive.writestr(zipfile.ZipInfo("y.jpg"), image)  # stored
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("x.jpg", "y.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    if system == "Linux":
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda file, n, at: pread(file, min(n, 1000), at))
    else:
        read = os.read
        monkeypatch.setattr(os, "read", lambda file, n: read(file, min(n, 1000)))
        monkeypatch.delattr(os, "pread")
    zipped = ZipSource(ZipArchive(tmp_path / "a.zip"), ["x.jpg", "y.jpg"])
    assert [zipped.load(0), zipped.load(1)] == [image, image]
    shards = open_shards([TarShard("a.tar", tmp_path / "a.tar")])
    assert [shards.load(0), shards.load(1)] == [image, image]
    place = shards._table.offsets[1]
    packed = PackedSource([tmp_path / "a.tar"], np.array([[0, place, len(image)]]), ["y.jpg"])
    assert packed.load(0) == image
    with TarMembers(tmp_path / "a.tar") as members:
        assert [members.read(member) for member in members] == [image, image]
        members.check_end()
    with pytest.raises(OSError, match=r"a\.tar ends within y\.jpg: it changed"):
        PackedSource([tmp_path / "a.tar"], np.array([[0, place, 10**6]]), ["y.jpg"]).load(0)
