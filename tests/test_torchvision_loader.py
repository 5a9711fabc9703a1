"""The torchvision loader: the stream stays equal with bad files, resumed, and with workers."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast.config import AugmentConfig
from mocofast.data.decoding import decode
from mocofast.data.interface import BatchSlice, sample_view
from mocofast.data.sources import ArraySource, FolderSource
from mocofast.data.torchvision_loader import TorchvisionLoader, apply_view
from tests.pictures import assert_same_batches, files, joined, photo, save_photos

CPU = torch.device("cpu")
# All operators, and an odd, prime side.
SMALL = AugmentConfig(size=19, rotate=10.0, jitter_p=0.8, blur=0.5)


def loader(
    source: FolderSource | ArraySource,
    batch_slice: BatchSlice,
    seed: int = 0,
    workers: int = 0,
    augment: AugmentConfig = SMALL,
) -> TorchvisionLoader:
    return TorchvisionLoader(source, (augment, augment), batch_slice, seed, CPU, workers)


# The stream


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_can_be_resumed_and_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    source = files(save_photos(tmp_path / "photos"))
    in_process = loader(source, BatchSlice(4))
    whole = [list(in_process.epoch(epoch)) for epoch in range(2)]
    assert [len(epoch) for epoch in whole] == [5, 5]  # 23 images: 3 are left out
    assert not torch.equal(whole[0][0].index, whole[1][0].index)
    stream = loader(source, BatchSlice(4), workers=workers)
    try:
        for epoch, start in ((1, 3), (0, 0), (1, 0), (0, 4), (0, 5)):
            assert_same_batches(stream.epoch(epoch, start), whole[epoch][start:])
        early = stream.epoch(0)
        assert_same_batches([next(early)], whole[0][:1])
        # A new epoch drops the batches that were loaded ahead for the old epoch.
        assert_same_batches(stream.epoch(1, 1), whole[1][1:])
        assert list(early) == []
    finally:
        stream.close()
    assert_same_batches(stream.epoch(0, 3), whole[0][3:])  # a closed loader can start again
    stream.close()


def test_batches_are_channels_last_uint8_with_the_samples_labels(tmp_path: Path) -> None:
    source = files(save_photos(tmp_path / "photos"))
    seen: list[int] = []
    for batch in loader(source, BatchSlice(4, drop_last=False)).epoch(0):
        seen += batch.index.tolist()
        for view in batch.views:
            assert view.shape == (len(batch.index), 3, 19, 19)
            assert view.dtype == torch.uint8
            assert view.is_contiguous(memory_format=torch.channels_last)
        assert source.labels is not None
        assert batch.labels is not None
        assert batch.labels.tolist() == source.labels[batch.index].tolist()
        assert not torch.equal(*batch.views)
    assert sorted(seen) == list(range(23))
    unlabelled = next(loader(files(tmp_path / "photos", labelled=False), BatchSlice(4)).epoch(0))
    assert unlabelled.labels is None


def test_a_view_is_its_parameters_executed_on_its_sample(tmp_path: Path) -> None:
    source = files(save_photos(tmp_path / "photos"))
    augments = (SMALL, AugmentConfig(size=7))  # different augmentations
    batch = next(TorchvisionLoader(source, augments, BatchSlice(5), 3, CPU, 0).epoch(2))
    for row, index in enumerate(batch.index.tolist()):
        image = Image.open(source.load(index)).convert("RGB")
        for view, augment in enumerate(augments):
            p = sample_view(augment, (image.height, image.width), 3, 2, index, view)
            expected = torch.from_numpy(np.asarray(apply_view(image, p, augment)).copy()).permute(
                2, 0, 1
            )
            assert torch.equal(batch.views[view][row], expected)


def test_the_ranks_batches_make_the_batch_of_one_process(tmp_path: Path) -> None:
    source = files(save_photos(tmp_path / "photos"))
    whole = list(loader(source, BatchSlice(6)).epoch(1))
    ranks = [list(loader(source, BatchSlice(6, rank, 3)).epoch(1)) for rank in range(3)]
    assert_same_batches(joined(ranks), whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_takes_nothing_from_the_global_generators(tmp_path: Path, workers: int) -> None:
    source = files(save_photos(tmp_path / "photos", 8))
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = (torch.rand(3), np.random.rand(3))  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    stream = loader(source, BatchSlice(4), workers=workers)
    for epoch in range(2):
        list(stream.epoch(epoch))
    stream.close()
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])  # noqa: NPY002


def test_images_in_memory_give_views_as_files_of_them_do(tmp_path: Path) -> None:
    images = np.stack([np.asarray(photo(i, (8, 8))) for i in range(7)])
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    in_memory = loader(ArraySource(images, None, ()), BatchSlice(3))
    assert_same_batches(
        in_memory.epoch(0), loader(files(tmp_path, labelled=False), BatchSlice(3)).epoch(0)
    )


# Bad files


def bomb() -> bytes:
    """Returns a PNG file whose header states 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def truncated() -> bytes:
    buffer = io.BytesIO()
    photo(0, (80, 80)).save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def spoil(root: Path) -> dict[int, str]:
    """Spoils some of 23 files, also two neighbours and the last file.

    Returns {index: a part of the expected reason}.
    """
    bad = {
        2: (truncated(), "truncated"),
        7: (b"", "cannot identify"),
        8: (b"this is no image", "cannot identify"),
        13: (bomb(), "DecompressionBombError"),
        22: (truncated()[:100], ""),  # the substitute is the first image
    }
    for index, (content, _) in bad.items():
        (root / f"{index:03}.jpg").write_bytes(content)
    (root / "017.jpg").unlink()
    (root / "017.jpg").symlink_to(root / "nowhere.jpg")
    return {index: reason for index, (_, reason) in bad.items()} | {17: "FileNotFoundError"}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_replaced_counted_and_named_and_others_unchanged(
    tmp_path: Path, workers: int
) -> None:
    good = files(save_photos(tmp_path / "good"))
    root = save_photos(tmp_path / "spoilt")
    bad = spoil(root)
    source = files(root)
    batch_slice = BatchSlice(4, drop_last=False)
    before = [list(loader(good, batch_slice).epoch(epoch)) for epoch in range(2)]
    stream = loader(source, batch_slice, workers=workers)
    try:
        for epoch in range(2):
            after = list(stream.epoch(epoch))
            assert len(after) == len(before[epoch])
            for x, y in zip(before[epoch], after):
                assert y.labels is not None
                for row, slot in enumerate(x.index.tolist()):
                    shown = slot
                    while shown in bad:
                        shown = (shown + 1) % len(source)
                    assert int(y.index[row]) == shown
                    assert int(y.labels[row]) == shown % 3
                    image = decode(source.load(shown))
                    for view in range(2):
                        p = sample_view(SMALL, (image.height, image.width), 0, epoch, slot, view)
                        expected = torch.from_numpy(
                            np.asarray(apply_view(image, p, SMALL)).copy()
                        ).permute(2, 0, 1)
                        assert torch.equal(y.views[view][row], expected)
                        if slot == shown:
                            assert torch.equal(y.views[view][row], x.views[view][row])
    finally:
        stream.close()
    assert set(stream.skipped) == set(bad)
    for index, reason in bad.items():
        assert reason in stream.skipped[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_of_only_bad_files_is_an_error_that_names_a_file(
    tmp_path: Path, workers: int
) -> None:
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_text("no image")
    stream = loader(files(tmp_path), BatchSlice(2), workers=workers)
    with pytest.raises(
        ValueError, match=r"none of the 5 images can be decoded; the first: 0\.jpg: Unidentified"
    ):
        next(stream.epoch(0))
    stream.close()


# Workers


def workers_of_this_process() -> set[int | None]:
    return {child.pid for child in multiprocessing.active_children()}


@pytest.fixture
def new_workers() -> Callable[[], set[int | None]]:
    before = workers_of_this_process()
    return lambda: workers_of_this_process() - before


def test_an_epoch_left_early_leaves_no_worker_behind(
    tmp_path: Path, new_workers: Callable[[], set[int | None]]
) -> None:
    stream = loader(files(save_photos(tmp_path / "photos")), BatchSlice(2), workers=2)
    next(stream.epoch(0))
    assert len(new_workers()) == 2
    start = time.monotonic()
    stream.close()
    assert new_workers() == set()
    assert time.monotonic() - start < 5  # ended, not waited for


def test_interrupts_are_left_to_the_main_process(
    tmp_path: Path, new_workers: Callable[[], set[int | None]]
) -> None:
    source = files(save_photos(tmp_path / "photos"))
    whole = list(loader(source, BatchSlice(2)).epoch(0))
    stream = loader(source, BatchSlice(2), workers=2)
    try:
        running = stream.epoch(0)
        first = next(running)
        for pid in new_workers():
            assert pid is not None
            os.kill(pid, signal.SIGINT)  # Ctrl-C reaches every process
            # A scheduler's SIGTERM reaches every process of the job. Send it from another
            # process, because the parent may end the workers.
            subprocess.run(
                [sys.executable, "-c", f"import os; os.kill({pid}, {int(signal.SIGTERM)})"],
                check=True,
            )
        assert_same_batches([first, *running], whole)
    finally:
        stream.close()
    assert new_workers() == set()


def test_a_program_that_ends_without_closing_its_loader_ends() -> None:
    program = (
        "import numpy as np, torch\n"
        "from mocofast.config import AugmentConfig\n"
        "from mocofast.data.interface import BatchSlice\n"
        "from mocofast.data.sources import ArraySource\n"
        "from mocofast.data.torchvision_loader import TorchvisionLoader\n"
        "source = ArraySource(np.zeros((8, 9, 9, 3), np.uint8), None, ())\n"
        "views = (AugmentConfig(size=8), AugmentConfig(size=8))\n"
        "loader = TorchvisionLoader(source, views, BatchSlice(2), 0, torch.device('cpu'), 2)\n"
        "running = loader.epoch(0)\n"
        "print(next(running).views[0].shape)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""


@pytest.mark.gpu
def test_views_arrive_on_the_gpu_equal_and_channels_last(tmp_path: Path) -> None:
    source = files(save_photos(tmp_path / "photos"))
    augments = (SMALL, SMALL)
    on_gpu = TorchvisionLoader(source, augments, BatchSlice(4), 0, torch.device("cuda"), 2)
    batches = list(on_gpu.epoch(0))
    on_gpu.close()
    for view in (view for batch in batches for view in batch.views):
        assert view.is_cuda
        assert view.is_contiguous(memory_format=torch.channels_last)
    on_host = [batch._replace(views=tuple(view.cpu() for view in batch.views)) for batch in batches]
    assert_same_batches(loader(source, BatchSlice(4)).epoch(0), on_host)
