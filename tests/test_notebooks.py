"""The cells of the notebooks run, in order, at small settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot

from tests import runs

FOLDER = runs.ROOT / "examples/notebooks"


def run_cells(name: str, **parameters: Any) -> dict[str, Any]:
    """Runs the code of a notebook. Returns its variables.

    parameters: replace values of the cell with the tag `parameters`.
    """
    found: dict[str, Any] = {}
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, {cell['id']}", "exec"), found)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert parameters.keys() <= found.keys()
            found |= parameters
    return found


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the notebooks write into a folder of the test, and draw without a display."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
    assert path.stat().st_size < 10_000


def test_photos_that_look_alike_are_found(tmp_path: Path) -> None:
    photos = runs.make_images(tmp_path / "photos", 24)
    good = sorted(path.relative_to(photos) for path in photos.rglob("*") if path.is_file())
    (photos / good[3]).with_name("0.jpg").write_bytes(b"no picture")
    options = {"train": {"epochs": 1}, "data": {"workers": 0}}
    found = run_cells("own_photos", PHOTOS=str(photos), OPTIONS=options)
    assert [path.relative_to(photos) for path in found["files"]] == good
    assert found["nearest"].shape == (24, 6)
    assert found["nearest"][:, 0].tolist() == list(range(24))
    assert sum(place.has_data() for place in found["figure"].axes) == 24
    pyplot.close("all")


def test_an_own_loop_learns() -> None:
    found = run_cells("own_loop", EPOCHS=4)
    assert found["after"] > found["before"] + 0.01


def test_methods_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    methods = {"MoCo": {}, "SimCLR": {"method": "simclr", "hidden_dim": 128}}
    found = run_cells("compare_methods", METHODS=methods, EPOCHS=1)
    assert "| --model.method" in capsys.readouterr().out
    (legend,) = found["figure"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["MoCo", "SimCLR"]
