"""A file that ends the process inside a decoder: the next start finds, skips and names the file.

Fake decoders end their process on a mark behind the end of a good JPEG file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from mocofast.config import AugmentConfig
from mocofast.data import planning, trial
from mocofast.data.dali_loader import DaliLoader
from mocofast.data.decoding import read_header
from mocofast.data.interface import BatchSlice
from mocofast.data.journal import Journal, read_journal
from mocofast.data.probing import accepts
from mocofast.data.sources import FolderSource
from mocofast.data.trial import try_files
from mocofast.train.suspects import FATAL, FOLDER, skip_fatal_files
from tests.pictures import assert_same_batches, files, jpeg, photo, save_photos

MARK, HANG = b"ends its decoder", b"never ends"
VIEWS = (AugmentConfig(size=19),) * 2
FAKE = f"""
import os, signal, sys, time
files = sys.stdin.buffer
os.write(1, b"ready\\n")
while len(length := files.read(8)) == 8:
    content = files.read(int.from_bytes(length, "little"))
    if content.endswith({MARK!r}):
        os.kill(os.getpid(), signal.SIGSEGV)
    if content.endswith({HANG!r}):
        time.sleep(60)
    os.write(1, b"g\\n")
"""


def loader_of(source: FolderSource, batch_size: int = 4, rank: int = 0) -> DaliLoader:
    return DaliLoader(source, VIEWS, BatchSlice(batch_size), 3, torch.device("cpu"), 2)


@pytest.fixture
def photos_23(tmp_path: Path) -> Path:
    return save_photos(tmp_path / "photos")


def test_a_journal_holds_what_was_last_noted_for_the_same_images_alone(tmp_path: Path) -> None:
    path, name = tmp_path / "decoding" / "rank-0", "f" * 32
    journal = Journal(path, name)
    assert read_journal(path, name, 10) == []
    journal.note([np.array([7, 1, 3]), np.array([1, 9, 5])])
    journal.note([np.array([4, 2])])
    assert read_journal(path, name, 10) == [2, 4]
    assert read_journal(path, name, 3) == [2]
    assert read_journal(path, "e" * 32, 10) == []
    for size in range(60):
        path.write_bytes(path.read_bytes()[:size] + b"\xff" * (size % 7))
        assert set(read_journal(path, name, 10)) <= set(range(10))
    journal.close()
    journal.close()
    assert not path.parent.exists()


def test_files_that_end_or_hang_a_process_are_told_from_others(
    photos_23: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos_23 / "003.jpg").write_bytes(jpeg(3) + MARK)
    (photos_23 / "004.jpg").write_bytes(jpeg(4) + MARK)
    (photos_23 / "009.jpg").write_bytes(jpeg(9) + HANG)
    (photos_23 / "011.jpg").unlink()
    source = FolderSource(photos_23, [f"{i:03}.jpg" for i in range(23)])
    monkeypatch.setattr(trial, "COMMAND", (sys.executable, "-c", FAKE))
    monkeypatch.setattr(trial, "SECONDS", 3.0)
    bad, python, fatal = try_files(source, range(1, 14))
    assert (python, fatal) == ((), 3)
    assert bad == {
        3: "it ends the process that decodes it (SIGSEGV)",
        4: "it ends the process that decodes it (SIGSEGV)",
        9: "a decoder did not end within 3 s",
    }


def test_a_slow_start_accuses_no_file(photos_23: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = FAKE.replace("files =", "time.sleep(1); files =", 1)
    monkeypatch.setattr(trial, "COMMAND", (sys.executable, "-c", slow))
    monkeypatch.setattr(trial, "SECONDS", 0.5)
    assert try_files(files(photos_23), [0]) == ({}, (), 0)
    monkeypatch.setattr(trial, "START_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match="did not start"):
        try_files(files(photos_23), [0])


def test_the_real_trial_decodes_good_and_bad_files_and_accuses_none(photos_23: Path) -> None:
    (photos_23 / "001.jpg").write_bytes(jpeg(3)[:-100])
    (photos_23 / "002.jpg").write_bytes(b"no image")
    (photos_23 / "003.jpg").write_bytes(b"")
    bad, python, fatal = try_files(files(photos_23), range(6))
    assert (sorted(bad), python, fatal) == ([1, 2, 3], (), 0)
    assert "truncated" in bad[1]
    assert "cannot identify" in bad[2]


def test_jpeg_2000_never_reaches_nvimagecodec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged headers end the process there. PIL reads less of a header, and accepts more."""
    nvimgcodec = pytest.importorskip("nvidia.nvimgcodec")
    parsed, parse = [], nvimgcodec.CodeStream
    monkeypatch.setattr(nvimgcodec, "CodeStream", lambda file: parsed.append(file) or parse(file))
    for name, by_dali in (("a.png", True), ("a.jp2", False), ("gray.jp2", False), ("a.j2k", False)):
        path = str(tmp_path / name)
        photo(0, (20, 30)).convert("L" if "gray" in name else "RGB").save(path)
        assert accepts(path, read_header(path)) == by_dali
    assert [Path(file).name for file in parsed] == ["a.png"]


def test_a_loader_that_ends_by_itself_leaves_no_journal(photos_23: Path, tmp_path: Path) -> None:
    source, run = files(photos_23), tmp_path / "run"
    loader = loader_of(source)
    assert skip_fatal_files(loader, source, run) == []
    next(loader.epoch(0))
    noted = read_journal(run / FOLDER / "rank-0", source.fingerprint(), len(source))
    assert len(noted) >= 4
    loader.close()
    assert not (run / FOLDER).exists()


FAKES = {
    "decoder": """
feed = dali_loader._Batches._feed
def fake_feed(self):
    fed = feed(self)
    if any(bytes(item).endswith(MARK) for item in fed[0]):
        os.kill(os.getpid(), signal.SIGSEGV)
    return fed
dali_loader._Batches._feed = fake_feed
""",
    "parser": """
accepts = planning.accepts
def fake_accepts(item, header):
    if item.endswith(MARK):
        os.kill(os.getpid(), signal.SIGSEGV)
    return accepts(item, header)
planning.accepts = fake_accepts
""",
}


@pytest.mark.parametrize("fake", FAKES)
def test_after_a_death_the_next_start_skips_and_names_the_file(
    photos_23: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: str
) -> None:
    (photos_23 / "003.jpg").write_bytes(jpeg(3) + MARK)
    run = tmp_path / "run"
    script = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from mocofast.data import dali_loader, planning
        from mocofast.train.suspects import skip_fatal_files
        from tests.pictures import files
        from tests.test_decoder_deaths import FAKES, MARK, loader_of
        exec(FAKES[{fake!r}])
        planning.SAMPLED_AT_ONCE = 4  # headers are read one batch ahead
        source = files(Path({str(photos_23)!r}))
        loader = loader_of(source)
        skip_fatal_files(loader, source, Path({str(run)!r}))
        for batch in loader.epoch(0):
            pass
        """
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    env["PYTHONPATH"] = f"{Path(__file__).parents[1]}{os.pathsep}{env['PYTHONPATH']}"
    died = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False
    )
    assert died.returncode == -11, died.stderr
    source = files(photos_23)
    journal = run / FOLDER / "rank-0"
    suspects = read_journal(journal, source.fingerprint(), len(source))
    assert 3 in suspects
    assert len(suspects) <= 16  # of 23: what was under way
    # The next start.
    monkeypatch.setattr(trial, "COMMAND", (sys.executable, "-c", FAKE))
    loader = loader_of(source)
    lines = skip_fatal_files(loader, source, run)
    assert lines[0] == "skipped: 003.jpg: it ends the process that decodes it (SIGSEGV)"
    assert f"{len(suspects)} images tested in a process of their own, 1 ended it" in lines[1]
    batches = list(loader.epoch(0))
    assert 3 not in torch.cat([batch.index for batch in batches])
    loader.close()
    assert [path.name for path in (run / FOLDER).iterdir()] == [FATAL]
    # A later start knows the file without a test. A stream that knew beforehand is the same.
    monkeypatch.setattr(trial, "COMMAND", ("no such command",))
    again = loader_of(source)
    assert skip_fatal_files(again, source, run) == lines[:1]
    assert_same_batches(again.epoch(0), batches)
    again.close()
    # Other images have other indices.
    (photos_23 / "000.jpg").unlink()
    other = files(photos_23)
    assert skip_fatal_files(loader_of(other), other, run) == []


# Batches of many pixels


@pytest.mark.parametrize("limit", [1, 9_000, 20_000])
def test_batches_decoded_in_parts_equal_whole_ones_also_with_bad_files(
    photos_23: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    (photos_23 / "005.jpg").write_bytes(jpeg(5)[:-300])
    (photos_23 / "006.jpg").write_bytes(b"no image")
    (photos_23 / "018.jpg").write_bytes(b"")

    def batches(drop_last: bool = False) -> Iterator[object]:
        part = BatchSlice(8, drop_last=drop_last)
        loader = DaliLoader(files(photos_23), VIEWS, part, 3, torch.device("cpu"), 2)
        yield from [*loader.epoch(0), *loader.epoch(1)]
        yield sorted(loader.skipped)
        loader.close()

    *expected, skipped = batches()
    monkeypatch.setattr(planning, "DECODED_AT_ONCE", limit)
    *found, skipped_in_parts = batches()
    assert skipped == skipped_in_parts == [5, 6, 18]
    assert len(found) == 6
    assert_same_batches(found, expected)  # type: ignore[arg-type]
    for batch in found:
        for view in batch.views:  # type: ignore[attr-defined]
            assert view.is_contiguous(memory_format=torch.channels_last)
