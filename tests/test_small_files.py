"""Small files: headers without PIL, contents read once, headers ahead, few threads."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast.config import AugmentConfig
from mocofast.data import deadline, planning
from mocofast.data.deadline import Call, Readers
from mocofast.data.decoding import _plain_jpeg, open_image, read_header
from mocofast.data.interface import Batch, BatchSlice, source_order, view_augments
from mocofast.data.planning import KEPT_BYTES, BatchPlanner
from mocofast.data.producer import Producer
from mocofast.data.sampling import Views
from mocofast.data.threads import Threads
from tests.pictures import files, photo, save_photos


def jpegs() -> dict[str, bytes]:
    kinds: dict[str, tuple[str, dict[str, object]]] = {
        "baseline": ("RGB", {}),
        "progressive": ("RGB", {"progressive": True}),
        "gray": ("L", {}),
        "4:4:4": ("RGB", {"subsampling": 0}),
        "restart": ("RGB", {"restart_marker_rows": 1}),
        "comment": ("RGB", {"comment": b"a comment"}),
        "CMYK": ("CMYK", {}),
        "EXIF": ("RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}),
        "profile": ("RGB", {"icc_profile": b"profile" * 9}),
    }
    made = {}
    for name, (mode, options) in kinds.items():
        buffer = io.BytesIO()
        photo(1, (33, 57)).convert(mode).save(buffer, "JPEG", **options)
        made[name] = buffer.getvalue()
    return made


@pytest.mark.parametrize("kind", jpegs())
def test_headers_of_jpeg_are_those_of_pil(kind: str) -> None:
    content = jpegs()[kind]
    with open_image(content) as image:
        expected = image.height, image.width
    found = _plain_jpeg(content)
    assert found == (None if kind in ("CMYK", "EXIF", "profile") else expected)
    header = read_header(content)
    assert header[:2] == expected
    assert header.plain
    assert header.format == "JPEG"
    assert not header.deep


def test_pil_decides_about_damaged_jpeg() -> None:
    content = jpegs()["progressive"]
    start = content.index(b"\xff\xda")
    rng = np.random.default_rng(0)
    damaged = [content[:end] for end in range(start + 12)]
    for place in range(2, start + 4):
        for byte in (0, 1, 255, int(rng.integers(256))):
            damaged.append(content[:place] + bytes([byte]) + content[place + 1 :])
    taken = 0
    for file in damaged:
        if (found := _plain_jpeg(file)) is None:
            continue
        taken += 1
        with open_image(file) as image:
            assert (image.height, image.width) == found
            assert (image.format, image.mode in ("L", "RGB")) == ("JPEG", True)
    assert taken > 100  # tables and numbers changed, the segments did not


def test_a_jpeg_of_too_many_pixels_is_refused_as_by_pil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 33 * 57 // 2 - 1)
    assert _plain_jpeg(jpegs()["baseline"]) is not None
    with pytest.raises(Image.DecompressionBombError):
        read_header(jpegs()["baseline"])


def test_a_small_file_is_read_once_and_a_large_file_is_not_kept(tmp_path: Path) -> None:
    source = files(save_photos(tmp_path / "photos"))
    large = int(source_order(source, 0, 0)[1])
    with Path(source.load(large)).open("ab") as file:
        file.write(bytes(KEPT_BYTES))
    broken = int(source_order(source, 0, 0)[2])
    Path(source.load(broken)).write_bytes(b"no image")
    readers = Readers(2, 10.0)
    planner = BatchPlanner(source, (AugmentConfig(size=8),), BatchSlice(4), 0, readers)
    plan = planner.plan(0, 0)
    for sample in source_order(source, 0, 0)[:4].tolist():
        content = planner.take(sample)
        if sample in (large, broken) or planner.in_python[sample]:
            assert content is None
        else:
            assert content is not None
            assert content.tobytes() == Path(source.load(sample)).read_bytes()
            assert planner.take(sample) is None
    planner._contents[0] = planner._contents[1] = b"kept"
    reads = planner.start_reads(lambda file, factor: "read", [(0, 1), (1, 2), (2, 1)])
    contents = [readers.result(r) if isinstance(r, Call) else r.tobytes() for r in reads]
    assert contents == [b"kept", "read", "read"]
    assert not {0, 1} & planner._contents.keys()  # a file at a smaller scale keeps none, too
    assert broken not in plan.samples
    assert source.name(broken) in planner.skipped[broken]  # the reason names the file
    readers.close()


def test_headers_are_read_ahead_and_views_sampled_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "SAMPLED_AT_ONCE", 24)  # three batches of two views
    calls: list[int] = []
    sample = planning.sample_views

    def counted(*arguments: Any) -> Views:
        calls.append(len(arguments[4]))
        return sample(*arguments)

    monkeypatch.setattr(
        planning,
        "sample_views",
        counted,
    )
    source = files(save_photos(tmp_path / "photos"))
    augments = view_augments(AugmentConfig(size=8), 2)
    noted: list[int] = []
    readers = Readers(2, 10.0)
    ahead, plain = (
        BatchPlanner(source, augments, BatchSlice(4), 0, readers, note=noted.extend)
        for _ in range(2)
    )
    for step in range(5):
        plan, expected = ahead.plan(0, step), plain.plan(0, step)
        assert plan.params == expected.params
        assert (plan.samples == expected.samples).all()
        ahead.look_ahead(plan)
        begun = source_order(source, 0, 0)[: 4 * min(step + 4, 5)]
        until = time.monotonic() + 30
        while len(ahead.being_read()) and time.monotonic() < until:
            time.sleep(0.001)
        assert ahead._sizes_known(begun).all()
        assert set(begun.tolist()) <= set(noted)
    assert calls.count(12) >= 2  # three batches together, in the first epoch already
    readers.close()


def test_quick_calls_take_one_thread_and_slow_calls_more() -> None:
    readers = Readers(3, 10.0, "test-quick")

    def threads() -> int:
        return sum(t.name == "test-quick" for t in threading.enumerate())

    for _ in range(50):
        readers.result(readers.submit(int))
    assert threads() == 1
    slow = [readers.submit(time.sleep, 4 * deadline.PATIENCE) for _ in range(12)]
    for call in reversed(slow):
        readers.result(call)
    assert threads() == 3
    readers.close()


class Counting:
    """Batches that tell PyTorch's number of threads where they are made."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def seek(self, epoch: int, step: int) -> None:
        pass

    def next(self) -> Batch:
        self.seen.append(torch.get_num_threads())
        return Batch((), torch.zeros(0), None)

    def close(self) -> None:
        pass


def test_threads_of_a_loader_start_no_team_of_their_own() -> None:
    used = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batches = Counting()
        producer = Producer(batches, 2)
        for position in range(2):
            producer.start(0, position)
            producer.get()
        producer.close()
        assert set(batches.seen) == {1}
        with Threads(2) as pool:
            seen = set(pool.map(lambda _: torch.get_num_threads(), range(8), 2))
        assert seen == {1}
        assert torch.get_num_threads() == 2
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [2]
    finally:
        torch.set_num_threads(used)


FAULTS = """
import resource, torch
from mocofast.memory import keep_freed
kept = keep_freed()
def use():
    for _ in range(20):
        x, y = torch.ones(2 << 20), torch.ones(5 << 20)
        del x, y
use()
begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**environment: str) -> tuple[str, int]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
        done = subprocess.run(
            [sys.executable, "-c", FAULTS],
            env={**env, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        kept, faults = done.stdout.split()
        return kept, int(faults)

    if os.confstr("CS_GNU_LIBC_VERSION") is None:
        pytest.skip("no GNU C library")
    kept, faults = run()
    assert kept == "True"
    assert faults < 200
    chose, more = run(MALLOC_MMAP_THRESHOLD_="65536")
    assert chose == "False"
    assert more > 50 * max(faults, 1)
    assert run(GLIBC_TUNABLES="glibc.malloc.check=0")[0] == "False"


def test_threads_that_start_together_leave_the_default_alone() -> None:
    script = """
import threading, torch
from mocofast_kernels.cpu_threads import compute_alone
torch.set_num_threads(2)
for _ in range(200):
    begin = threading.Barrier(4)
    def start():
        begin.wait()
        compute_alone()
        assert torch.get_num_threads() == 1
    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
seen = []
thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
thread.start(); thread.join()
print(seen)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[2]"
