"""Sources: the images of a folder, their labels, the train and val sets, and fingerprints."""

from __future__ import annotations

import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mocofast.config import SOURCES, DataConfig
from mocofast.data import sources
from mocofast.data.names import stratified_holdout
from mocofast.data.sources import (
    ArraySource,
    Datasets,
    FolderSource,
    Subset,
    find_images,
    load_datasets,
)


def put(root: Path, *names: str) -> Path:
    """Writes a real image of 5 x 3 pixels at every name."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 3), (i % 256, 40, 200)).save(path.with_suffix(".png"))
        path.with_suffix(".png").rename(path)
    return root


def folder(path: Path, seed: int = 0, **options: object) -> Datasets:
    return load_datasets(DataConfig(path=str(path), **options), seed)  # type: ignore[arg-type]


def shown(source: object) -> list[tuple[str, str]]:
    """Returns (name, class) of every image."""
    assert isinstance(source, (FolderSource, Subset))
    assert source.labels is not None
    return [(source.name(i), source.classes[source.labels[i]]) for i in range(len(source))]


def test_images_are_found_recursively_sorted_and_by_extension_in_any_case(tmp_path: Path) -> None:
    wanted = [
        "a.JPEG",
        "b/deep/er/c.Png",
        "b/d.jp2",
        "e.tif",
        "f.webp",
        "z.ppm",
        "ü/ß.bmp",
        "two words.jpg",
        "b-/sorts/before/b.jpg",  # "-" comes before "/"
        "dots.in.a.name.jpg",
        "two..jpg",
    ]
    put(tmp_path, *wanted, ".hidden.jpg", ".cache/x.jpg", "b/.thumb/y.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "animation.gif").write_bytes(b"GIF89a")  # DALI reads no GIF
    (tmp_path / "folder.jpg").mkdir()
    for name in ("jpg", "nodot", "ends.with.", "jpg.txt"):
        (tmp_path / name).write_text("no image")
    assert find_images(tmp_path) == sorted(wanted)


def test_links_are_followed_and_a_loop_of_them_ends(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "x.jpg", "y.jpg")
    root = put(tmp_path / "root", "a/b.jpg")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "c.jpg").symlink_to(tmp_path / "elsewhere" / "x.jpg")
    (root / "a" / "up").symlink_to(root)
    assert find_images(root) == ["a/b.jpg", "c.jpg", "linked/x.jpg", "linked/y.jpg"]


def test_a_folder_without_images_or_no_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.md").write_text("text")
    with pytest.raises(ValueError, match=r"no image below .*empty.*\.jpeg"):
        folder(tmp_path / "empty")
    put(tmp_path, "one.jpg")
    with pytest.raises(NotADirectoryError, match=r"one\.jpg"):
        folder(tmp_path / "one.jpg")
    with pytest.raises(ValueError, match=r"data\.path must name a folder"):
        load_datasets(DataConfig(path=""))


@pytest.mark.parametrize(
    "names",
    [
        ("a.jpg", "b.jpg"),  # flat
        ("all/a.jpg", "all/b.jpg"),  # one subfolder: no classes to tell apart
        ("cat/a.jpg", "dog/b.jpg", "stray.jpg"),  # an image without a class
    ],
)
def test_images_without_a_class_level_are_unlabelled(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    datasets = folder(put(tmp_path, *names))
    assert datasets.train.labels is None
    assert datasets.train.classes == ()
    assert datasets.val is None
    assert "without labels" in datasets.note
    assert [datasets.train.name(i) for i in range(len(datasets.train))] == sorted(names)


def test_the_first_level_of_folders_is_the_class_however_deep_the_images(tmp_path: Path) -> None:
    datasets = folder(put(tmp_path, "dog/x/1.jpg", "dog/2.jpg", "cat/y/z/3.jpg"), holdout=0.0)
    assert shown(datasets.train) == [
        ("cat/y/z/3.jpg", "cat"),
        ("dog/2.jpg", "dog"),
        ("dog/x/1.jpg", "dog"),
    ]
    assert datasets.train.classes == ("cat", "dog")
    assert datasets.val is None
    assert datasets.train.load(0) == str(tmp_path / "cat/y/z/3.jpg")


@pytest.mark.parametrize("val", ["val", "test"])
def test_train_and_val_folders_are_the_train_and_val_sets(tmp_path: Path, val: str) -> None:
    # val lacks the class in the middle, so numbers of the classes of val alone would differ.
    root = put(
        tmp_path,
        "train/ant/1.jpg",
        "train/bee/2.jpg",
        "train/cat/3.jpg",
        f"{val}/ant/4.jpg",
        f"{val}/cat/5.jpg",
    )
    datasets = folder(root)
    assert shown(datasets.train) == [
        ("train/ant/1.jpg", "ant"),
        ("train/bee/2.jpg", "bee"),
        ("train/cat/3.jpg", "cat"),
    ]
    assert shown(datasets.val) == [(f"{val}/ant/4.jpg", "ant"), (f"{val}/cat/5.jpg", "cat")]
    assert datasets.val is not None
    assert datasets.val.classes == datasets.train.classes


def test_val_goes_before_test_and_neither_is_trained_on(tmp_path: Path) -> None:
    datasets = folder(
        put(
            tmp_path,
            *(f"{part}/{kind}/1.jpg" for part in ("train", "val", "test") for kind in "ab"),
        )
    )
    assert [name for name, _ in shown(datasets.val)] == ["val/a/1.jpg", "val/b/1.jpg"]
    assert [name for name, _ in shown(datasets.train)] == ["train/a/1.jpg", "train/b/1.jpg"]


def test_a_train_folder_beside_other_classes_is_a_class(tmp_path: Path) -> None:
    datasets = folder(put(tmp_path, "train/1.jpg", "car/2.jpg", "plane/3.jpg"), holdout=0.0)
    assert datasets.train.classes == ("car", "plane", "train")


def test_a_val_folder_without_classes_leaves_a_holdout_of_train_and_says_so(tmp_path: Path) -> None:
    names = [f"train/{kind}/{i}.jpg" for kind in "ab" for i in range(5)]
    datasets = folder(put(tmp_path, *names, "val/1.jpg"), holdout=0.2)
    assert datasets.val is not None
    assert len(datasets.train) == 8
    assert len(datasets.val) == 2
    assert "val/ has no class folders" in datasets.note


def test_images_of_classes_that_only_val_has_are_not_evaluated(tmp_path: Path) -> None:
    root = put(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/b/1.jpg", "val/zebra/1.jpg")
    datasets = folder(root)
    assert shown(datasets.val) == [("val/b/1.jpg", "b")]
    assert datasets.remarks == (
        "1 image of val/ not evaluated: of classes that train/ lacks (zebra)",
    )


def test_the_holdout_is_stratified_seeded_and_apart_from_train(tmp_path: Path) -> None:
    root = put(
        tmp_path, *(f"big/{i:02}.jpg" for i in range(40)), *(f"small/{i}.jpg" for i in range(10))
    )
    datasets = folder(root, holdout=0.2)
    train, val = dict(shown(datasets.train)), dict(shown(datasets.val))
    assert set(train) | set(val) == set(find_images(root))
    assert not set(train) & set(val)
    assert list(val.values()).count("big") == 8
    assert list(val.values()).count("small") == 2
    assert shown(folder(root, holdout=0.2).val) == shown(datasets.val)
    assert shown(folder(root, seed=1, holdout=0.2).val) != shown(datasets.val)
    with pytest.raises(ValueError, match=r"data\.holdout must be in \[0, 1\), got 1"):
        folder(root, holdout=1.0)


def test_a_holdout_never_takes_a_whole_class_and_rounds_up_to_one() -> None:
    labels = np.array([0] * 100 + [1] * 2 + [2])
    kept, held = stratified_holdout(labels, 0.1, seed=0)
    assert np.bincount(labels[held], minlength=3).tolist() == [10, 1, 0]
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(labels)))
    kept, held = stratified_holdout(labels, 0.99, seed=0)
    assert np.bincount(labels[kept], minlength=3).tolist() == [1, 1, 1]


def holdout_by_class(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`stratified_holdout`, one class at a time, as the first runs held images out."""
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(share * len(members)), int(share > 0)), len(members) - 1)
        chosen.append(members[:count])
    held_out = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 7])
def test_the_holdout_takes_the_images_that_a_loop_over_classes_takes(
    share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shuffled = rng.integers(0, 37, 1009) * 3  # numbers with gaps, in no order
    wide = shuffled * 2**16 - 1  # of more than 16 bits, and negative
    for labels in (shuffled, np.sort(shuffled), np.array([5]), np.arange(6)[::-1], wide):
        for ours, theirs in zip(
            stratified_holdout(labels, share, seed), holdout_by_class(labels, share, seed)
        ):
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)


def test_a_subset_of_a_folder_equals_a_subset_of_any_source(tmp_path: Path) -> None:
    names = [f"{kind}/{i}.jpg" for kind in ("a", "bcd") for i in range(9)]
    whole = folder(put(tmp_path, *names), holdout=0.0).train
    assert isinstance(whole, FolderSource)
    index = np.array([0, 3, 9, 17])
    own, any_source = whole.subset(index), Subset(whole, index)
    assert shown(own) == shown(any_source) == [shown(whole)[i] for i in index]
    assert own.fingerprint() == any_source.fingerprint() != whole.fingerprint()
    assert [own.load(i) for i in range(4)] == [any_source.load(i) for i in range(4)]
    assert len(whole) == 18


def test_the_fingerprint_follows_names_and_labels_but_not_the_place(tmp_path: Path) -> None:
    names = ["cat/1.jpg", "dog/2.jpg", "dog/3.jpg"]
    one = folder(put(tmp_path / "one", *names), holdout=0.0).train.fingerprint()
    assert folder(put(tmp_path / "two", *names), holdout=0.0).train.fingerprint() == one
    (tmp_path / "two/dog/3.jpg").rename(tmp_path / "two/cat/3.jpg")
    moved = folder(tmp_path / "two", holdout=0.0).train.fingerprint()
    labelled = FolderSource("x", names, np.array([0, 1, 1]), ("cat", "dog")).fingerprint()
    relabelled = FolderSource("x", names, np.array([0, 0, 1]), ("cat", "dog")).fingerprint()
    unlabelled = FolderSource("x", names).fingerprint()
    assert labelled == one
    assert len({one, moved, relabelled, unlabelled}) == 4


def test_an_array_sources_fingerprint_follows_its_pixels_and_labels() -> None:
    images = np.zeros((3, 2, 2, 3), np.uint8)
    labels = np.array([0, 1, 0])
    one = ArraySource(images, labels, ("a", "b")).fingerprint()
    assert ArraySource(images.copy(), labels, ("a", "b")).fingerprint() == one
    images[2, 1, 1, 2] = 1
    assert ArraySource(images, labels, ("a", "b")).fingerprint() != one


def test_wrong_labels_and_images_are_refused() -> None:
    images = np.zeros((3, 2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match=r"labels must be \(3,\), one per image, got \(2,\)"):
        ArraySource(images, np.array([0, 1]), ("a", "b"))
    with pytest.raises(ValueError, match="labels must index the 2 classes, got 0 to 2"):
        FolderSource("x", ["1", "2", "3"], np.array([0, 1, 2]), ("a", "b"))
    with pytest.raises(
        ValueError, match=r"images must be \(N, H, W, C\) uint8, .*, got \(3, 2, 2\) float64"
    ):
        ArraySource(np.zeros((3, 2, 2)), None, ())


def test_names_that_are_not_utf8_reach_the_file(tmp_path: Path) -> None:
    put(tmp_path, "plain.jpg")
    odd = b"\xff\xfe.jpg"
    try:
        (tmp_path / "plain.jpg").rename(tmp_path / odd.decode(errors="surrogateescape"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = pickle.loads(pickle.dumps(folder(tmp_path).train))
    assert Path(source.load(0)).exists()
    assert len(source.fingerprint()) == 32


def test_digits_are_held_out_the_same_at_any_seed_and_keep_their_values() -> None:
    from sklearn.datasets import load_digits

    datasets = load_datasets(DataConfig(source="digits"), seed=0)
    again = load_datasets(DataConfig(source="digits"), seed=9)
    assert datasets.train.fingerprint() == again.train.fingerprint()
    assert datasets.val is not None
    assert datasets.train.labels is not None
    assert datasets.val.labels is not None
    assert 0.19 < len(datasets.val) / 1797 < 0.21
    share = np.bincount(datasets.val.labels) / np.bincount(load_digits().target)
    assert np.abs(share - 0.2).max() < 0.005  # half an image of about 180
    seen = {
        (np.asarray(part.load(i)).tobytes(), int(part.labels[i]))
        for part in (datasets.train, datasets.val)
        for i in range(len(part))
        if part.labels is not None
    }
    digits = load_digits()
    gray = np.round(digits.images / 16 * 255).astype(np.uint8)
    assert seen == {
        (np.stack([image] * 3, axis=2).tobytes(), int(label))
        for image, label in zip(gray, digits.target)
    }
    assert len(datasets.train) + len(datasets.val) == 1797


def write_cifar10(root: Path) -> None:
    """Writes CIFAR-10 in the original file format, 20 images per file, with wrong checksums."""
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    for part, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data = np.random.default_rng(part).integers(0, 256, (20, 3072), dtype=np.uint8)
        with (base / name).open("wb") as file:
            pickle.dump({"data": data, "labels": [i % 10 for i in range(20)]}, file)
    with (base / "batches.meta").open("wb") as file:
        pickle.dump({"label_names": [f"class {i}" for i in range(10)]}, file)


def test_cifar10_is_read_from_its_own_files_with_the_test_set_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10, cifar

    write_cifar10(tmp_path)
    # torchvision knows the checksums of the real images.
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    datasets = load_datasets(DataConfig(source="cifar10", path=str(tmp_path)))
    assert isinstance(datasets.train, ArraySource)
    assert isinstance(datasets.val, ArraySource)
    assert np.array_equal(datasets.train.images, CIFAR10(tmp_path, train=True).data)
    assert np.array_equal(datasets.val.images, CIFAR10(tmp_path, train=False).data)
    assert datasets.val.labels is not None
    assert datasets.val.labels.tolist() == [i % 10 for i in range(20)]
    assert datasets.train.classes == tuple(f"class {i}" for i in range(10))


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_without_files_or_network_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def no_network(*args: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(
        ValueError, match=rf"{kind} is not in .* could not be downloaded .* put .*\.tar\.gz there"
    ):
        load_datasets(DataConfig(source=kind, path=str(tmp_path)))


def test_a_subset_has_the_names_labels_and_fingerprint_of_a_folder_of_its_images() -> None:
    names = ["cat/1.jpg", "cat/2.jpg", "dog/3.jpg", "dog/4.jpg"]
    labels, classes = np.array([0, 0, 1, 1]), ("cat", "dog")
    index = np.array([1, 2])
    subset = Subset(FolderSource("x", names, labels, classes), index)
    whole = FolderSource("x", names[1:3], labels[1:3], classes)
    assert [subset.name(i) for i in range(len(subset))] == names[1:3]
    assert [subset.load(i) for i in range(2)] == [whole.load(i) for i in range(2)]
    assert subset.labels is not None
    assert subset.labels.tolist() == [0, 1]
    assert subset.fingerprint() == whole.fingerprint()  # checkpoints of held-out runs hold it
    assert Subset(FolderSource("x", names), index).labels is None


def test_every_source_of_the_option_is_loaded_here() -> None:
    assert tuple(sources._LOAD) == SOURCES


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"data\.source must be folder, shards, list, zip, .* or cifar100, got 'mnist'",
    ):
        load_datasets(DataConfig(source="mnist", path="x"))


@pytest.mark.data
def test_real_folders_are_found_whole(photos: Path, cifar10_jpeg: Path) -> None:
    flat = folder(photos)
    assert len(flat.train) == 500
    assert flat.train.labels is None
    cifar = folder(cifar10_jpeg)
    assert cifar.val is not None
    assert cifar.train.labels is not None
    assert cifar.val.labels is not None
    assert np.bincount(cifar.train.labels).tolist() == [5000] * 10
    assert np.bincount(cifar.val.labels).tolist() == [1000] * 10


@pytest.mark.parametrize(
    ("name", "train", "val"),
    [
        ("flat", "c394d0944de4565a589809770538d6fa", ""),
        ("classes", "872d7700aca8aa82041c226f0ba698f1", "9547ec42a152df86afcbad255da30f26"),
        ("split", "e260e8f4a0aca6058ee6fa97ceaf8a95", "70f4200d3f737b7d74350b9db7bf8da0"),
        ("traffic", "d0563a2ac958843f5fda9684bc1d3a50", "3aa3f8133620f29c8e5d172fd4376327"),
        ("stray", "60bd28faa61c194e904a9e43ca26b75b", ""),
    ],
)
def test_fingerprints_are_those_of_old_checkpoints(
    tmp_path: Path, name: str, train: str, val: str
) -> None:
    """The numbers were computed before splits of other names, patterns and lists were known."""
    names = {
        "flat": [f"{i}.jpg" for i in range(5)],
        "classes": [f"{k}/{i}.jpg" for k in ("cat", "dog", "eel") for i in range(9)],
        "split": [
            f"{part}/{k}/{i}.jpg"
            for part in ("train", "val", "test")
            for k in ("cat", "dog")
            for i in range(3)
        ],
        "traffic": [f"{k}/{i}.jpg" for k in ("train", "car") for i in range(12)],
        "stray": ["cat/1.jpg", "dog/2.jpg", "3.jpg"],
    }
    datasets = folder(put(tmp_path, *names[name]))
    assert datasets.train.fingerprint() == train
    assert (datasets.val.fingerprint() if datasets.val else "") == val
