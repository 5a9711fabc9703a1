"""The DALI loader on real JPEG files: equal to torchvision's, resumed, on ranks, with bad
files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from nvidia.dali import types

from mocofast.config import AugmentConfig, DataConfig
from mocofast.data import dali_loader, dali_pipeline, planning
from mocofast.data.dali_loader import DaliLoader
from mocofast.data.decoding import Header, image_size, read_header
from mocofast.data.interface import Batch, BatchSlice, Source, epoch_order
from mocofast.data.probing import undecodable
from mocofast.data.sources import ArraySource
from mocofast.data.torchvision_loader import TorchvisionLoader
from tests.pictures import assert_same_batches, differences, files, joined

CPU = torch.device("cpu")
CROP_ONLY = AugmentConfig(size=65, jitter_p=0.0, gray=0.0, flip=0.0)  # odd
V2 = AugmentConfig(size=65, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_first=False, blur=0.5)
V1 = AugmentConfig(size=48)
SEED = 7

Load = Callable[..., DaliLoader]


@pytest.fixture
def load() -> Iterator[Load]:
    """Makes loaders. Closes all loaders at the end."""
    made: list[DaliLoader] = []

    def make(
        source: Source,
        batch_size: int = 8,
        augments: tuple[AugmentConfig, ...] = (V2, V1),
        device: torch.device = CPU,
        workers: int = 2,
        **options: int | bool,
    ) -> DaliLoader:
        loader = DaliLoader(
            source,
            augments,
            BatchSlice(batch_size, **options),
            SEED,
            device,
            workers,  # type: ignore[arg-type]
        )
        made.append(loader)
        return loader

    yield make
    for loader in made:
        loader.close()


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies 41 real photos. 41 is prime: the last batch is never full."""
    out = tmp_path_factory.mktemp("photos")
    for path in sorted(photos.rglob("*.JPEG"))[::12][:41]:
        shutil.copy(path, out)
    return out


def epochs(loader: DaliLoader, *numbers: int) -> Iterator[Batch]:
    for epoch in numbers:
        yield from loader.epoch(epoch)


def difference(left: list[Batch], right: list[Batch], view: int) -> torch.Tensor:
    assert len(left) == len(right) > 0
    return torch.cat([differences(a.views[view], b.views[view]) for a, b in zip(left, right)])


# Against torchvision


@pytest.mark.data
def test_crop_and_resize_are_pils_to_rounding(folder: Path, load: Load) -> None:
    ours = list(load(files(folder), augments=(CROP_ONLY,)).epoch(0))
    expected = list(
        TorchvisionLoader(files(folder), (CROP_ONLY,), BatchSlice(8), SEED, CPU, 0).epoch(0)
    )
    error = difference(ours, expected, 0)
    assert error.max() <= 1  # the weights have another fixed-point format
    assert error.mean() < 0.1


@pytest.mark.data
def test_both_loaders_show_the_same_views_of_the_same_images(folder: Path, load: Load) -> None:
    ours = list(load(files(folder)).epoch(1))
    expected = list(
        TorchvisionLoader(files(folder), (V2, V1), BatchSlice(8), SEED, CPU, 0).epoch(1)
    )
    assert len(ours) == len(expected) == 5
    for left, right in zip(ours, expected):
        assert torch.equal(left.index, right.index)
        assert left.labels is not None
        assert right.labels is not None
        assert torch.equal(left.labels, right.labels)
        assert torch.equal(left.labels, left.index % 3)
    for view in range(2):
        error = difference(ours, expected, view)
        # Most of the error is hue: PIL quantises hue and saturation, and v1 shifts the hue
        # by up to .4. Wrong parameters of a single view would show in the mean: they
        # differ by about 40.
        assert error.mean() < 0.5
        assert error.max() <= 40
        assert error.flatten(1).mean(1).max() < 2  # of every image
        for statistic in (torch.mean, torch.std):
            mine, theirs = (
                statistic(torch.cat([b.views[view].float() for b in batches]), dim=(0, 2, 3))
                for batches in (ours, expected)
            )
            assert (mine - theirs).abs().max() < 0.3  # per channel, of about 115 and 65


def odd_files(out: Path, photo: Path) -> None:
    with Image.open(photo) as opened:
        image = opened.convert("RGB").resize((97, 61))
    alpha = image.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    image.save(out / "turned.jpg", exif=exif)
    image.save(out / "progressive.jpg", progressive=True)
    image.save(out / "subsampled.jpg", subsampling=2, quality=60)
    image.save(out / "large-header.jpg", icc_profile=bytes(200_000))
    image.save(out / "rgb.webp", lossless=True)
    image.save(out / "rgb.bmp")
    image.save(out / "rgb.jp2")
    image.save(out / "rgb.ppm")
    for mode in ("L", "CMYK"):
        image.convert(mode).save(out / f"{mode}.jpg")
    for mode in ("1", "L", "P"):
        image.convert(mode).save(out / f"{mode}.png")
    image.convert("CMYK").save(out / "cmyk.tif")
    alpha.save(out / "alpha.png")
    alpha.convert("LA").save(out / "gray-alpha.png")
    alpha.save(out / "alpha.webp", lossless=True)
    wide = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(wide).save(out / "wide.png")
    Image.fromarray(wide).save(out / "wide.tif")
    image.resize((1, 1)).save(out / "one-pixel.png")


@pytest.mark.data
def test_gray_cmyk_palette_16_bit_alpha_and_turned_images_look_as_with_torchvision(
    folder: Path, load: Load, tmp_path: Path
) -> None:
    odd_files(tmp_path, next(folder.iterdir()))
    source = files(tmp_path)
    count = len(source)
    assert count == 20
    loader = load(source, batch_size=count, augments=(CROP_ONLY,))
    ours = list(loader.epoch(0))
    expected = list(
        TorchvisionLoader(source, (CROP_ONLY,), BatchSlice(count), SEED, CPU, 0).epoch(0)
    )
    assert not loader.skipped
    error = difference(ours, expected, 0).flatten(1)
    shown = [source.name(int(i)) for i in ours[0].index]
    # Rounding of the conversion (CMYK, palettes, 16 bits) and of the resize: 1 for each.
    assert {name: float(e) for name, e in zip(shown, error.mean(1)) if e > 0.5} == {}
    assert error.max() <= 2


# The stream


@pytest.mark.data
def test_a_stream_resumed_in_mid_epoch_is_bit_identical_whatever_the_number_of_threads(
    folder: Path, load: Load
) -> None:
    whole = list(epochs(load(files(folder)), 2, 3))
    resumed = load(files(folder), workers=1)
    tail = [*resumed.epoch(2, 3), *resumed.epoch(3)]
    assert len(tail) == 2 + 5
    assert_same_batches(tail, whole[3:])


@pytest.mark.data
def test_iteration_can_be_abandoned_and_restarted_anywhere(folder: Path, load: Load) -> None:
    expected = list(load(files(folder)).epoch(0))
    loader = load(files(folder))
    first = loader.epoch(0)
    assert_same_batches([next(first)], expected[:1])
    second = loader.epoch(0, 3)
    assert_same_batches([next(second)], expected[3:4])
    assert list(first) == []  # a loader is one stream
    assert_same_batches([next(loader.epoch(0, 1))], expected[1:2])
    third = loader.epoch(0, 2)  # the position of the stream
    assert_same_batches(third, expected[2:])
    assert list(loader.epoch(0, 5)) == []  # a run that stopped at the end of an epoch
    assert_same_batches(loader.epoch(0), expected)


@pytest.mark.data
def test_epochs_are_shuffled_from_the_first_on_and_show_each_image_once(
    folder: Path, load: Load
) -> None:
    loader = load(files(folder), drop_last=False)
    for epoch in (0, 1):
        batches = list(loader.epoch(epoch))
        assert [len(b.index) for b in batches] == [8, 8, 8, 8, 8, 1]
        assert [tuple(b.views[0].shape) for b in batches[-2:]] == [(8, 3, 65, 65), (1, 3, 65, 65)]
        order = torch.cat([b.index for b in batches]).numpy()
        np.testing.assert_array_equal(order, epoch_order(41, SEED, epoch))
        assert (order != np.arange(41)).any()


@pytest.mark.data
def test_two_ranks_together_show_what_one_process_shows(folder: Path, load: Load) -> None:
    whole = list(load(files(folder)).epoch(0))
    halves = [list(load(files(folder), rank=rank, world_size=2).epoch(0)) for rank in (0, 1)]
    assert [len(batch.index) for batch in halves[0]] == [4] * 5
    assert_same_batches(joined(halves), whole)


@pytest.mark.data
def test_batches_are_channels_last_and_stay_as_they_were_handed_out(
    folder: Path, load: Load
) -> None:
    loader = load(files(folder))
    threads = torch.get_num_threads()
    held, copies = [], []
    for batch in epochs(loader, 0, 1):
        held.append(batch)
        copies.append(batch._replace(views=tuple(view.clone() for view in batch.views)))
        for view, augment in zip(batch.views, (V2, V1)):
            assert view.shape == (8, 3, augment.size, augment.size)
            assert view.dtype == torch.uint8
            assert view.is_contiguous(memory_format=torch.channels_last)
    assert_same_batches(held, copies)  # DALI reuses its buffers
    assert torch.get_num_threads() == threads


def test_decoded_images_reach_pytorch_without_a_copy() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    pipeline = dali_pipeline.decode_and_crop(
        lambda: [[picture]],
        (CROP_ONLY,),
        False,
        np.ndarray,
        DataConfig(),
        batch_size=1,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    (images,) = pipeline.run()
    tensor = torch.from_dlpack(images[0])
    assert tensor.data_ptr() == images[0].data_ptr()
    assert images.dtype == types.UINT8
    assert np.array_equal(tensor.numpy(), picture)


def test_images_in_memory_are_served_like_files(load: Load) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
    source = ArraySource(pictures, None, ())
    (ours,) = load(source, batch_size=11, augments=(CROP_ONLY,)).epoch(0)
    (expected,) = TorchvisionLoader(source, (CROP_ONLY,), BatchSlice(11), SEED, CPU, 0).epoch(0)
    assert ours.labels is None
    assert difference([ours], [expected], 0).mean() < 0.5


# Bad files


def spoil(folder: Path) -> dict[str, str]:
    """Spoils some of the photos. Returns {name: a word of the expected reason}."""
    names = [path.name for path in sorted(folder.iterdir())]
    good = (folder / names[0]).read_bytes()

    def rewrite(position: int, content: bytes) -> str:
        (folder / names[position]).write_bytes(content)
        return names[position]

    bomb = bytearray(good)
    frame = bomb.index(b"\xff\xc0")
    bomb[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    expected = {
        rewrite(3, good[: len(good) // 2]): "truncated",
        rewrite(4, b""): "cannot identify",
        rewrite(7, b"no image " * 100): "cannot identify",
        rewrite(8, good[:2000]): "truncated",
        rewrite(20, bytes(bomb)): "bomb",
        rewrite(40, good[:-2000]): "truncated",  # the last file, whose substitute is the first
    }
    (folder / names[30]).unlink()
    (folder / names[30]).symlink_to(folder / "nowhere")
    return {**expected, names[30]: "No such file"}


@pytest.fixture
def spoilt(folder: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    copy = tmp_path / "spoilt"
    shutil.copytree(folder, copy)
    return copy, spoil(copy)


@pytest.mark.data
def test_bad_files_are_replaced_and_named_and_all_other_samples_are_bit_identical(
    folder: Path, spoilt: tuple[Path, dict[str, str]], load: Load
) -> None:
    clean = list(epochs(load(files(folder), drop_last=False), 0, 1))
    source = files(spoilt[0])
    loader = load(source, drop_last=False)
    batches = list(epochs(loader, 0, 1))
    assert len(batches) == 2 * 6
    assert {source.name(i) for i in loader.skipped} == set(spoilt[1])
    for index, reason in loader.skipped.items():
        assert spoilt[1][source.name(index)] in reason
    substituted = 0
    for ours, whole in zip(batches, clean):
        for row, slot in enumerate(whole.index.tolist()):
            shown = slot
            while shown in loader.skipped:
                shown = (shown + 1) % len(source)
            assert ours.index[row] == shown
            if shown == slot:
                assert all(torch.equal(a[row], b[row]) for a, b in zip(ours.views, whole.views))
            substituted += shown != slot
    assert substituted == 2 * len(spoilt[1])
    # A resumed run knows the bad files beforehand, and sees the same stream.
    knowing = load(source, drop_last=False)
    knowing.skipped.update(loader.skipped)
    assert_same_batches(epochs(knowing, 0, 1), batches)


@pytest.mark.data
def test_a_file_that_disappears_during_the_run_is_skipped(
    spoilt: tuple[Path, dict[str, str]], load: Load
) -> None:
    path, _ = spoilt
    source = files(path)
    loader = load(source)
    list(loader.epoch(0))
    before = dict(loader.skipped)
    gone = next(i for i in range(len(source)) if i not in before)
    (path / source.name(gone)).unlink()
    # The first batches of the next epoch are ready already. A jump to another epoch reads
    # the file.
    shown = torch.cat([batch.index for batch in epochs(loader, 5, 6)])
    assert set(loader.skipped) == {*before, gone}
    assert gone not in shown


@pytest.mark.data
def test_where_no_file_is_good_the_error_says_so_and_nothing_hangs(
    tmp_path: Path, load: Load
) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(b"no image")
    loader = load(files(tmp_path, labelled=False), batch_size=2)
    for _ in range(2):  # again after the error
        with pytest.raises(ValueError, match="none of the 4 images can be decoded"):
            next(iter(loader.epoch(0)))


@pytest.mark.data
def test_an_image_of_another_size_than_its_headers_is_skipped(
    folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = files(folder)
    wrong = Path(source.load(5)).read_bytes()
    sizes = {wrong: (3000, 2000)}
    monkeypatch.setattr(
        planning,
        "read_header",
        lambda file: Header(*sizes[file], "JPEG", True) if file in sizes else read_header(file),
    )
    loader = load(source, drop_last=False)
    shown = torch.cat([batch.index for batch in loader.epoch(0)])
    assert set(loader.skipped) == {5}
    assert "header states (3000, 2000)" in loader.skipped[5]
    assert len(shown) == 41
    assert 5 not in shown


@pytest.mark.data
def test_an_error_that_is_no_bad_file_is_raised(
    folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = load(files(folder))

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(dali_loader.Pipeline, "run", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(iter(loader.epoch(0)))
    monkeypatch.undo()
    assert len(next(iter(loader.epoch(0))).index) == 8


@pytest.mark.data
def test_sizes_are_read_from_headers_and_decoding_is_what_finds_bad_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd_files(tmp_path, next(folder.iterdir()))
    paths = [str(path) for path in sorted((*folder.iterdir(), *tmp_path.iterdir()))]
    sizes = []
    for path in paths:
        with Image.open(path) as image:
            sizes.append((image.height, image.width))
    assert [image_size(path) for path in paths] == sizes
    (tmp_path / "half.jpg").write_bytes(Path(paths[0]).read_bytes()[:5000])
    probed, wrong = [*paths, str(tmp_path / "half.jpg")], np.array([*sizes, sizes[0]])
    wrong[2] += 8
    for fallback in (False, True):
        if fallback:
            monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
        bad = undecodable(probed, wrong)
        assert set(bad) == {2, len(paths)}
        assert "header states" in bad[2]
        assert "truncated" in bad[len(paths)]


@pytest.mark.data
def test_a_script_that_ends_in_the_middle_of_an_epoch_exits_cleanly(folder: Path) -> None:
    script = textwrap.dedent(
        f"""
        import torch
        from mocofast.config import AugmentConfig
        from mocofast.data.dali_loader import DaliLoader
        from mocofast.data.interface import BatchSlice
        from mocofast.data.sources import FolderSource, find_images
        source = FolderSource({str(folder)!r}, find_images({str(folder)!r}))
        views = (AugmentConfig(size=64),) * 2
        loader = DaliLoader(source, views, BatchSlice(8), 0, torch.device("cpu"), 2)
        print(len(next(loader.epoch(0)).index))
        """
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "8"), done.stderr


@pytest.mark.gpu
@pytest.mark.data
def test_a_gpu_serves_the_same_stream_to_rounding_and_resumes_it_exactly(
    folder: Path, load: Load
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    expected = list(load(files(folder)).epoch(0))
    batches = list(load(files(folder), device=device).epoch(0))
    again = list(load(files(folder), device=device).epoch(0, 2))
    for view in range(2):
        assert batches[0].views[view].device == device
        assert batches[0].views[view].is_contiguous(memory_format=torch.channels_last)
        # The two decoders round differently, by 1 or 2. Resize and jitter change the
        # differences.
        assert difference(batches, expected, view).mean() < 1.5
    assert len(batches) == 5
    assert_same_batches(again, batches[2:])


@pytest.mark.gpu
@pytest.mark.data
def test_the_hardware_decoders_share_changes_pixels_by_rounding_alone(folder: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    streams = []
    for data in (
        DataConfig(hw_decoder_load=0.0),
        DataConfig(hw_decoder_load=1.0, preallocate=(1000, 1000)),
    ):
        loader = DaliLoader(files(folder), (CROP_ONLY,), BatchSlice(8), SEED, device, 2, data)
        streams.append([b._replace(views=tuple(v.cpu() for v in b.views)) for b in loader.epoch(0)])
        loader.close()
    assert difference(*streams, view=0).mean() < 1
