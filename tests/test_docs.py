"""The documentation: it builds without a warning, and its commands and tables hold."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mocofast import cli, ops, optim, settings
from mocofast.config import Config
from mocofast.interop import reference_commands, reference_flags

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the site, built without a warning."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_opens_from_disk_without_a_network(site: Path) -> None:
    ops_page = (site / "reference/ops.html").read_text(encoding="utf-8")
    # An argument of a docstring is an item of a list.
    assert "<li><code>positive_key</code>: " in re.sub(r"</?p>|\n", "", ops_page)
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = r'<script[^>]+src="https?:|<img[^>]+src="https?:|<link[^>]+stylesheet[^>]+https?:'
        assert not re.search(loaded, text), page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_search_works_from_disk_without_a_network(site: Path) -> None:
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu"]
    chromium += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000"]
    url = f"{(site / 'reference/ops.html').as_uri()}?q=momentum"
    shown = subprocess.run(
        [*chromium, f"--user-data-dir={site}/profile", "--dump-dom", url],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert re.search(r'md-search-result__meta">[1-9]\d* matching documents', shown)


def test_the_reference_has_every_op_and_optimiser() -> None:
    page = (ROOT / "docs/reference/ops.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: (\S+)$", page, re.M))
    assert listed == {
        *(f"mocofast.ops.{name}" for name in ops.__all__),
        *(f"mocofast.optim.{name}" for name in optim.__all__),
    }


def flags_table() -> list[tuple[str, str]]:
    """Returns the rows of the table of flags, (flag, option or "")."""
    rows = re.findall(r"^\| (`-[^|]+) \| ([^|]*) \|", (ROOT / "docs/flags.md").read_text(), re.M)
    return [(re.findall("`([^`]+)`", flags)[-1], option.strip("` ")) for flags, option in rows]


PROBES = {
    "--arch": ["resnet18"],
    "--schedule": ["7", "9"],
    "--optimizer": ["adamw"],
    "--crop-min": ["0.3"],
    **{name: [] for name in ("--mlp", "--aug-plus", "--cos", "--moco-m-cos")},
}


def test_every_flag_has_a_row() -> None:
    parser = argparse.ArgumentParser()
    reference_flags.add_flags(parser, linear=False)
    known = {name for action in parser._actions for name in action.option_strings}
    rows = [flag for flag, _ in flags_table()]
    actions = [a for a in parser._actions if a.option_strings and a.dest != "help"]
    assert len(rows) == len(set(rows)) == len(actions)
    assert set(rows) <= known


@pytest.mark.parametrize(("flag", "option"), [row for row in flags_table() if row[1]])
def test_a_flag_changes_the_named_option(tmp_path: Path, flag: str, option: str) -> None:
    if flag in ("--resume", "--gpu"):  # no option of a recipe, and a device that may be absent
        return
    parser = argparse.ArgumentParser()
    reference_flags.add_flags(parser, linear=False)
    first = ["--moco-m-cos"] if flag in ("--moco-mlp-dim", "--optimizer", "--warmup-epochs") else []
    first = ["--optimizer", "lars"] if flag in ("--moco-m-cos", "--crop-min") else first

    def config(*words: str) -> Config:
        given = vars(parser.parse_args([str(tmp_path), *first, *words]))
        run = reference_commands.pretraining(given)
        base = settings.load_recipe(run.recipe)
        settings.apply(base, run.options)
        return base

    probe = config(flag, *PROBES.get(flag, ["0.5" if "." in flag else "3"]))
    assert option.removeprefix("--") in settings.differences(probe, config())


@pytest.fixture
def photos_folder(tmp_path: Path) -> Path:
    """Makes 60 images of two classes in PHOTOS."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "PHOTOS" / name).mkdir(parents=True)
        for index in range(30):
            pixels = rng.integers(0, 100, (24, 24, 3), np.uint8) + np.uint8(100 * label)
            Image.fromarray(pixels).save(tmp_path / "PHOTOS" / name / f"{index}.png")
    return tmp_path


def test_the_tutorial_runs(
    photos_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photos_folder)
    text = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"^\$ mocofast (.*)$", text, re.M)]
    assert len(commands) >= 9
    for words in commands:
        short = ["--train.epochs", "1"] if words[0] == "pretrain" and "PHOTOS" in words else []
        status = cli.main([*words, *short])
        assert status == 0, (words, capsys.readouterr())
    (python,) = re.findall(r"```python\n(.*?)```", text, re.S)
    found: dict[str, Any] = {}
    exec(python, found)  # the tutorial's own lines
    nearest, features = (found[name].numpy() for name in ("nearest", "features"))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = -np.sort(-unit @ unit.T)[:, :6]
    for row, (mine, wanted) in enumerate(zip(nearest, cosines)):
        assert unit[mine] @ unit[row] == pytest.approx(wanted, abs=1e-5)
