"""Samples of shards: their images and labels, and what is said of other members."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mocofast.config import ConfigError, DataConfig
from mocofast.data.finding import Patterns
from mocofast.data.shard_index import INDEX, local_index, read_index
from mocofast.data.shard_places import find_shards
from mocofast.data.shard_samples import choose_samples, number_labels
from mocofast.data.shards import ShardSource, open_shards
from mocofast.data.sources import load_datasets
from tests.pictures import jpeg

Content = bytes | tuple[bytes, str]  # of a file, or the type of a link and its target


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write_tar(path: Path, members: Sequence[tuple[str, Content]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def source_of(path: Path, **patterns: tuple[str, ...]) -> ShardSource:
    return open_shards(find_shards(str(path)), patterns=Patterns(**patterns))


def labels(source: ShardSource) -> list[str | None]:
    """Returns the class of every sample, None for an unlabelled sample."""
    assert source.labels is not None
    return [source.classes[i] if i >= 0 else None for i in source.labels]


def keys(source: ShardSource) -> list[str]:
    return [source.name(i).partition(":")[2] for i in range(len(source))]


# Samples


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # Keys as in WebDataset.
        (("a.jpg", "b.png", "d.1/c.jpg"), ("a", "b", "d.1/c")),
        # Names with dots: every image is a sample.
        (("a.jpg", "b.v1.jpg", "c.v1.jpg"), ("a", "b.v1", "c.v1")),
        (("x.01.jpg", "x.02.jpg"), ("x.01", "x.02")),
        (("s0.input.jpg", "s1.input.jpg"), ("s0.input", "s1.input")),
        # An image with a name of its own goes before the others of the key.
        (("a.mask.png", "a.jpg"), ("a",)),
        (("a.seg.png", "a.rgb.png", "b.label.png"), ("a.rgb", "b.label")),
        (("a.v1.jpg", "a.v1.png"), ("a.v1",)),
    ],
)
def test_samples_of_names(names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    found, chosen, left_out = choose_samples(names)
    assert tuple(found) == expected
    assert left_out.get("twins", 0) == len(names) - len(expected)
    for key, position in zip(found, chosen, strict=True):
        assert names[position].startswith(key)
    assert chosen == sorted(chosen)


def test_the_choice_of_two_images_is_said_and_can_be_made(tmp_path: Path) -> None:
    members = [(f"{i}.{kind}", f"{kind} {i}".encode()) for i in range(3) for kind in ("png", "tif")]
    path = write_tar(tmp_path / "x.tar", members)
    source = source_of(path)
    assert [source.load(i) for i in range(3)] == [b"png 0", b"png 1", b"png 2"]
    (line,) = source.remarks
    assert line.startswith("3 images not used, because another image has the same key: 0.png is")
    other = source_of(path, exclude=(line.split("'")[1],))
    assert [other.load(i) for i in range(3)] == [b"tif 0", b"tif 1", b"tif 2"]
    assert keys(other) == keys(source)
    assert other.remarks == (
        "members of shards left out: 3 images that data.include and data.exclude leave out",
    )
    assert len(source_of(path, include=("0.*", "2.tif"))) == 2
    data = DataConfig(source="shards", path=str(tmp_path), include=("*.tif",))
    assert load_datasets(data).train.load(1) == b"tif 1"


def test_links_are_the_files_that_they_name(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("d/a.jpg", b"image a"),
            ("d/a.cls", b"0"),
            ("b.jpg", (tarfile.LNKTYPE, "d/a.jpg")),
            ("b.cls", b"1"),
            ("d/c.jpg", (tarfile.SYMTYPE, "../b.jpg")),
            ("d/c.cls", (tarfile.SYMTYPE, "../b.cls")),
            ("d/e.jpg", (tarfile.SYMTYPE, "f.jpg")),  # before its target
            ("d/f.jpg", b"image f"),
            ("gone.jpg", (tarfile.SYMTYPE, "nowhere.jpg")),
            ("loop.jpg", (tarfile.SYMTYPE, "loop.jpg")),
        ],
    )
    source = source_of(path)
    assert keys(source) == ["d/a", "b", "d/c", "d/e", "d/f"]
    contents = [source.load(i) for i in range(5)]
    assert contents == [b"image a", b"image a", b"image a", b"image f", b"image f"]
    assert labels(source) == ["0", "1", "1", None, None]
    assert source.remarks == ("members of shards left out: 2 links to images that the shard lacks",)


def test_members_left_out_are_counted_with_the_reason(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"first"),
        ("a.jpg", b"second"),
        ("._a.jpg", b""),
        ("a.txt", b""),
        ("b.txt", b""),
        ("b.npy", b""),
        ("README", b""),
    ]
    write_tar(tmp_path / "1.tar", members)
    write_tar(tmp_path / "2.tar", [("c.jpg", b"c"), ("c.txt", b"")])
    for _ in range(2):  # the second time from the kept index
        source = source_of(tmp_path)
        assert source.load(0) == b"first"
        assert source.remarks == (
            "members of shards left out: 1 images whose name occurs twice; 1 hidden files; "
            "5 members of other kinds (3 .txt, 1 without extension, 1 .npy)",
        )


def test_packed_shards_are_said_and_named_as_a_path_refused(tmp_path: Path) -> None:
    packed = tmp_path / "y.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(0))]))
    datasets = load_datasets(DataConfig(source="shards", path=str(tmp_path)))
    assert datasets.remarks == ("packed shards are left out: 1 .gz; gunzip unpacks .tar.gz",)
    with pytest.raises(ConfigError, match=r"y\.tar\.gz' is not a whole, .* gunzip unpacks"):
        source_of(packed)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(ConfigError, match=r"no \*\.tar file .* \(1 \.gz: gunzip unpacks"):
        source_of(tmp_path)


# Labels


def test_labels_are_found_by_the_key_of_the_image(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("s0.input.jpg", b"0"),
            ("s0.output.cls", b"7"),
            ("s1.v1.jpg", b"1"),
            ("s1.v1.cls", b"1"),
            ("s1.v2.jpg", b"2"),
            ("s1.v2.json", b'{"label": 2}'),
            ("s2.a.jpg", b"3"),
            ("s2.b.jpg", b"4"),
            ("s2.cls", b"3"),  # of both images
            ("s3.a.jpg", b"5"),
            ("s3.b.jpg", b"6"),
            ("s3.c.cls", b"4"),  # of neither image, for all that is known
            ("s4.jpg", b"7"),
            ("s4.cls", b"cat"),
            ("s5.jpg", b"8"),
            ("s5.json", b'{"label": "\\ud800"}'),  # half a character is no text
            ("s6.jpg", b"9"),
            ("s6.cls", b"-1"),
            ("s7.jpg", b"10"),
            ("s7.json", b'{"label": true}'),
            ("s4.json", b'{"label": 5}'),  # an integer goes before a text, as ever
        ],
    )
    source = source_of(path)
    assert labels(source) == ["7", "1", "2", "3", "3", None, None, "5", *[None] * 3]
    assert source.classes == tuple("01234567")


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_texts_are_names_of_classes(tmp_path: Path, kind: str) -> None:
    def write(path: Path, names: Sequence[str]) -> Path:
        path.mkdir()
        members: list[tuple[str, Content]] = []
        for i, name in enumerate(names):
            label = name if kind == "cls" else json.dumps({"label": name})
            members += [(f"{i}.jpg", jpeg(i)), (f"{i}.{kind}", label.encode())]
        write_tar(path / "x.tar", members)
        return path

    train = write(tmp_path / "train", ["dog", "cat", "dog", "größe"])
    write(tmp_path / "val", ["cat", "bird", "dog"])
    source = source_of(train)
    assert source.classes == ("cat", "dog", "größe")
    assert labels(source) == ["dog", "cat", "dog", "größe"]
    datasets = load_datasets(DataConfig(source="shards", path=str(tmp_path)))
    assert isinstance(datasets.val, ShardSource)
    assert labels(datasets.val) == ["cat", "dog"]
    assert datasets.note == "4 images of 3 classes; held out: val/, 2"
    assert datasets.remarks == ("1 image of val/ not evaluated: no class of the training",)
    (tmp_path / "meta.json").write_text(json.dumps({"classes": ["größe", "dog", "cat", "ant"]}))
    source = source_of(train)
    assert source.classes == ("größe", "dog", "cat", "ant")
    assert labels(source) == ["dog", "cat", "dog", "größe"]


def test_one_unlabelled_sample_does_not_cost_the_labels_of_the_others(tmp_path: Path) -> None:
    members: list[tuple[str, Content]] = []
    for i in range(16):
        members.append((f"{i:02}.jpg", jpeg(i)))
        if i != 7:
            members.append((f"{i:02}.cls", str(i % 2).encode()))
    write_tar(tmp_path / "x.tar", members)
    datasets = load_datasets(DataConfig(source="shards", path=str(tmp_path), holdout=0.2))
    assert datasets.note == "16 images of 2 classes, 1 unlabelled; 3 of them held out"
    assert isinstance(datasets.train, ShardSource)
    assert isinstance(datasets.val, ShardSource)
    found = {
        key: label
        for part in (datasets.train, datasets.val)
        for key, label in zip(keys(part), labels(part), strict=True)
    }
    assert found == {f"{i:02}": None if i == 7 else str(i % 2) for i in range(16)}
    assert None not in labels(datasets.val)
    unlabelled = load_datasets(DataConfig(source="shards", path=str(tmp_path), labels="none"))
    assert unlabelled.note == "16 images without labels"
    assert unlabelled.train.labels is None
    with pytest.raises(ConfigError, match=r"data\.labels: .* expected auto or none, got 'x\.csv'"):
        load_datasets(DataConfig(source="shards", path=str(tmp_path), labels="x.csv"))


def test_numbers_of_labels() -> None:
    dense = number_labels({"0", "3"}, (), "x")
    assert dense.classes == ("0", "1", "2", "3")  # as checkpoints have it
    assert number_labels({"0", "9999"}, (), "x").classes[-1] == "9999"
    sparse = number_labels({"20000000", "5", "300"}, (), "x")
    assert sparse.classes == ("5", "300", "20000000")
    assert sparse.number == {"5": 0, "300": 1, "20000000": 2}
    # 10,001 labels up to 50,000: no large gaps.
    assert len(number_labels({str(5 * i) for i in range(10_001)}, (), "x").classes) == 50_001
    assert number_labels({"4"}, (), "x").classes == ()
    assert number_labels({"1", "0"}, ("ant", "bee"), "x").number == {"0": 0, "1": 1}
    with pytest.raises(ConfigError, match="label 2 in x, but there are 2 classes"):
        number_labels({"1", "2"}, ("ant", "bee"), "x")


# URLs and indices


def test_urls_that_differ_in_their_query_are_different_shards() -> None:
    def places(pattern: str) -> tuple[list[str], int]:
        shards = find_shards(pattern)
        return [shard.name for shard in shards], len({shard.path for shard in shards})

    assert places("https://x.org/get?id={0..3}&v=2") == ([f"get?id={i}" for i in range(4)], 4)
    # A signature is no part of the name: tomorrow's differs, and the cache stays valid.
    assert places("https://x.org/d/a{0,1}.tar?sig={7}") == (["a0.tar", "a1.tar"], 2)
    (today,), (later,) = (find_shards(f"https://x.org/a.tar?sig={i}") for i in "12")
    assert today.path == later.path


def test_an_index_of_the_first_version_on_a_server_still_serves(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar",
        [("a.jpg", b"aa"), ("a.cls", b"12"), ("b.jpg", b"b"), ("c.jpg", b"c"), ("c.cls", b"3")],
    )
    new = local_index(path)
    place = Path(f"{path}{INDEX}")
    with place.open("wb") as file:
        np.savez(
            file,
            stamp=np.array([1, new.shard_size, 0]),
            keys=new.keys,
            offsets=new.offsets,
            sizes=new.sizes,
            labels=np.array([12, -1, 3]),
        )
    old = read_index(place, old=True)
    for column in ("keys", "offsets", "sizes"):
        assert np.array_equal(getattr(old, column), getattr(new, column))
    names = [*old.members.label_names.tolist(), None]
    assert [names[i] for i in old.labels] == [b"12", None, b"3"]
    with pytest.raises(ValueError, match="another version"):
        read_index(place)
    again = local_index(path)  # made anew
    assert again.members.names.tolist() == [b"a.jpg", b"b.jpg", b"c.jpg"]


@pytest.mark.parametrize(
    ("kinds", "train", "val"),
    [
        (("jpg", "cls"), "2f2dad855ff0773a1cf121c77ea330a2", "14ec5a10f979cb22394e9a4ca4aa26f1"),
        (("png",), "e6af14966e5db7b9d36dea2b672e5b9a", ""),
    ],
)
def test_fingerprints_are_those_of_old_checkpoints(
    tmp_path: Path, kinds: tuple[str, ...], train: str, val: str
) -> None:
    """The numbers were computed when keys with dots, links and texts were left out."""
    for shard in range(2):
        members = [(f"{i}.{kind}", str(i % 3).encode()) for i in range(10) for kind in kinds]
        write_tar(tmp_path / f"{shard}.tar", [*members, ("notes.txt", b"text")])
    datasets = load_datasets(DataConfig(source="shards", path=str(tmp_path)))
    assert datasets.train.fingerprint() == train
    assert (datasets.val.fingerprint() if datasets.val else "") == val
