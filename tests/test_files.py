"""Files hold the complete old content or the complete new content."""

from __future__ import annotations

from pathlib import Path

import pytest

from mocofast import files


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
