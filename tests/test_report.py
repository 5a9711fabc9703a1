"""The page of a run stands alone, reads in words, and shows what the run was; views need no run."""

from __future__ import annotations

import re
import resource
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mocofast import cli, interrupts, settings
from mocofast.detection.options import DetectConfig
from mocofast.report.charts import chart, line_of, ticks
from mocofast.report.gallery import Gallery, initial_encoder, place
from mocofast.report.page import load_run, page
from mocofast.report.pictures import TEXT, as_rgb, sheet_of
from mocofast.report.sheets import map_of
from tests import runs
from tests.test_run_files import run

EMPTY = {"meta", "img", "path", "circle", "br"}


class Page(HTMLParser):
    """Checks that tags close, that nothing is fetched, and that pictures have words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        for name in ("src", "href"):
            value = given.get(name)
            assert value is None or value.startswith(("#", "data:image/")), value
        assert tag != "link"
        if tag == "img":
            assert given["alt"]
        if given.get("role") in ("img", "application", "region"):
            assert given["aria-label"]
        if "id" in given:
            self.ids.append(str(given["id"]))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag


def checked(path: Path, later: str = "map") -> str:
    """Returns the text of a page that stands alone. later: a section after the curves."""
    text = path.read_text(encoding="utf-8")
    found = Page(text)
    assert len(found.ids) == len(set(found.ids))
    for target in re.findall(r'href="#([^"]*)"', text):
        assert target in found.ids
    assert not re.search(r"url\((?!data:)|@import|https?://(?!www\.w3\.org)", text)
    assert path.stat().st_size <= 5e6
    assert text.index('id="verdict"') < text.index('id="curves"')
    assert text.index('id="curves"') < text.index(f'id="{later}"')
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "first run"
    run(path, 5)
    return path


def test_the_words_of_a_sheet_fit_on_the_sheet_of_a_single_pair() -> None:
    view = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    words = np.asarray(sheet_of((view, view)))[:TEXT].any((0, 2))
    assert words[8:].any() and not words[-4:].any()


def test_every_run_ends_with_a_page(folder: Path) -> None:
    text = checked(folder / "report.html")
    assert "300 images by PCA" in text and "Before training" in text
    assert "data:image/png" in text  # views and thumbnails
    assert "train.log_every" in text and "PyTorch" in text


def test_the_command_shows_runs_side_by_side(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(folder, tmp_path / "b <i>")
    (other / "skipped.jsonl").write_text('{"file": "a.jpg", "reason": "truncated"}\n{"fi')
    out = tmp_path / "new/folder/both.html"
    assert cli.main(["report", str(folder), str(other), "--out", str(out)]) == 0
    text = checked(out)
    assert "first run" in text and "b &lt;i&gt;" in text and "a.jpg" in text
    assert 'class="line run1' in text and text.count('class="map"') == 2
    assert f"written: {out}" in capsys.readouterr().out


def test_a_run_without_its_images_or_files_still_has_a_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.yaml", bare)
    assert cli.main(["report", str(bare)]) == 0
    text = checked(bare / "report.html")
    assert "no neighbours and no map" in text and "No log line yet" in text
    (bare / "metrics.jsonl").write_text('{"step": 1}\n7\n{"step": 2}\n')
    assert cli.main(["report", str(bare)]) == 2
    assert "metrics.jsonl is damaged" in capsys.readouterr().err
    (bare / "config.yaml").write_text("- 1")
    assert cli.main(["report", str(bare)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    (bare / "metrics.jsonl").unlink()
    (bare / "config.yaml").write_text(yaml.safe_dump(settings.to_dict(DetectConfig())))
    for command, said in (
        ("report", "expected runs of one command"),
        ("compare", "the options of a run of mocofast detect"),
    ):
        assert cli.main([command, str(bare), str(folder)]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["report", str(bare)]) == 0
    assert "too early to tell: no log line yet" in capsys.readouterr().out
    assert "No log line yet" in checked(bare / "report.html", "predictions")
    (bare / "config.yaml").unlink()
    assert cli.main(["report", str(bare)]) == 2
    assert "it has no config.yaml" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "none")]) == 2


def test_the_initial_encoder_is_the_runs(tmp_path: Path) -> None:
    run(tmp_path / "run", 0, **{"train.epochs": 0, "train.seed": 3})
    config = settings.load_recipe("digits")
    config.train.seed = 3
    state = torch.random.get_rng_state()
    encoder = initial_encoder(config, 1438, 10)
    assert torch.equal(torch.random.get_rng_state(), state)
    saved = runs.weights(tmp_path / "run")
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, saved[f"encoder_q.{name}"]), name


def test_names_of_files_do_not_end_the_script() -> None:
    gallery = Gallery(
        *(["</script><b>", 'a"b'], ["x", "x"], "data:image/png;base64,", 8, [0], {}, {}),
        *(np.zeros((2, 2)), "PCA"),
    )
    html = map_of(gallery, 0)
    Page(html)
    assert html.count("</script>") == 1


def test_a_diverged_run_is_called_a_problem(folder: Path) -> None:
    seen = load_run(folder)
    lines = [*seen.evidence.lines, {"step": 6, "loss": None, "gradient_norm": 1e9}]
    html = page([seen._replace(evidence=seen.evidence._replace(lines=lines))])
    assert "Problem: the run diverged" in html and "What to do" in html


def test_lines_leave_out_what_is_no_number_and_ticks_are_round() -> None:
    records = [{"epoch": i, "loss": value} for i, value in enumerate([2.0, None, float("nan"), 1])]
    line = line_of(0, "", "", records, "loss")
    assert line.points == [(0.0, 2.0), (3.0, 1.0)]
    assert "from 2 to 1" in chart("Loss", [line])
    assert chart("Loss", []) == ""
    long = line_of(0, "", "", [{"epoch": i, "loss": 1.0} for i in range(5000)], "loss")
    assert len(long.points) <= 240
    assert ticks(0, 1) == [0, 0.5, 1]
    assert ticks(5, 5) == [5]


def test_the_map_by_pca_keeps_the_largest_directions() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((40, 2)) * [9, 3]
    vectors = hidden @ np.linalg.qr(rng.standard_normal((16, 2)))[0].T
    points, method = place(vectors, tsne=False)
    assert method == "PCA" and points.min() == 0 and points.max() == 1
    for i in range(2):
        assert abs(np.corrcoef(points[:, i], hidden[:, i])[0, 1]) > 0.95
    assert np.isfinite(place(np.ones((5, 4)), tsne=True)[0]).all()


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_images_of_any_kind_become_rgb(kind: str, channels: int) -> None:
    images = torch.arange(2 * channels * 16).reshape(2, channels, 4, 4) % 251
    shown = as_rgb((images * (257 if kind == "uint16" else 1)).to(getattr(torch, kind)))
    assert shown.shape == (2, 4, 4, 3) and shown.dtype == np.uint8
    if kind != "float32":
        assert (shown[..., 0] == images[:, 0].numpy()).all()


def test_views_need_no_run_and_take_the_settings_of_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = runs.make_images(tmp_path / "photos", 12)
    out = tmp_path / "new/folder/v.png"
    assert cli.main(["views", str(photos), "--out", str(out), "--augment.blur", "1"]) == 0
    with Image.open(out) as picture:
        assert picture.width > 8 * 64 and np.asarray(picture).std() > 10
    assert "8 images, views of 24 pixels" in capsys.readouterr().out
    recipe = ["--recipe", "cifar10_r18", "--out", str(out)]
    assert cli.main(["views", str(photos), *recipe]) == 0
    assert "views of 32 pixels" in capsys.readouterr().out
    assert cli.main(["views", str(folder), "--out", str(out)]) == 0
    assert "8 images, views of 8 pixels" in capsys.readouterr().out
    for wrong, said in (
        ([str(tmp_path / "none")], "there is no"),
        ([str(photos), "--out", "a.jpg"], "expected a name in .png"),
        ([str(photos), "--out", str(out / "v.png")], f"--out: {out} cannot be a folder"),
        ([str(photos), "--recipe", "cifar"], "unknown recipe"),
    ):
        assert cli.main(["views", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_refused_file_is_an_error_without_a_traceback(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = runs.make_images(tmp_path / "photos", 3)
    export = ("export", str(folder), "--format")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes
    try:
        for *words, out in (
            ("views", str(photos), "--out", str(tmp_path / "v.png")),
            (*export, "torchvision", str(tmp_path / "a.pt")),
            (*export, "torchvision", str(tmp_path / "a.safetensors")),
        ):
            assert cli.main([*words, out]) == interrupts.EXIT_SYSTEM, out
            captured = capsys.readouterr()
            assert "File too large" in captured.err and "written" not in captured.out
            assert out.endswith(".png") or not Path(out).exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*tmp_path.glob("*.tmp")]
