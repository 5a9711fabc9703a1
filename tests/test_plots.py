"""The curves show the numbers of metrics.jsonl, for complete runs and for very short runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mocofast.evaluate.pictures import plot_confusion
from mocofast.plots import (
    Bar,
    plot_curves,
    plot_metrics,
    plot_sides,
    read_metrics,
    save_figure,
)

CHANCE = math.log(4097)


def step(n: int, **values: float) -> dict[str, Any]:
    line = {
        "step": n,
        "epoch": n / 10,
        "loss": 8 - n / 100,
        "lr": 0.06 - n / 1000,
        "chance_loss": CHANCE,
    }
    return {**line, "acc1": n / 100, "acc5": n / 50, "images_per_second": 99.0, **values}


def lines(figure: Figure, panel: int) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (
            list(np.asarray(line.get_xdata())),
            list(np.asarray(line.get_ydata())),
        )
        for line in figure.axes[panel].lines
    }


def test_every_line_shows_the_numbers_of_the_metrics() -> None:
    records = [step(n) for n in range(0, 30, 10)]
    records += [
        {"step": 0, "epoch": 0.0, "knn_top1": 0.85, "few_shot_top1": 0.6},
        {"step": 20, "epoch": 2.0, "knn_top1": 0.97, "few_shot_top1": 0.8},
    ]
    figure = plot_metrics(records)
    epochs = [0.0, 1.0, 2.0]
    loss, pretext, knn, rate = (lines(figure, panel) for panel in range(4))
    assert loss["loss"] == (epochs, [8.0, 7.9, 7.8])
    assert loss[f"chance, log(K + 1) = {CHANCE:.2f}"][1] == [CHANCE, CHANCE]
    assert pretext["Acc@1: ranked first"] == (epochs, [0.0, 0.1, 0.2])
    assert pretext["Acc@5: among the first five"] == (epochs, [0.0, 0.2, 0.4])
    assert knn["kNN top-1"] == ([0.0, 2.0], [0.85, 0.97])
    assert knn["1-NN, few labels"] == ([0.0, 2.0], [0.6, 0.8])
    assert rate["learning rate"] == (epochs, pytest.approx([0.06, 0.05, 0.04]))
    texts = [text.get_text() for text in figure.axes[2].texts]
    assert texts == [
        "85.0%",
        "97.0%",
        "60.0%",
        "80.0%",
    ]  # values at the start and at the end


def test_every_panel_says_what_it_shows() -> None:
    figure = plot_metrics([step(0), step(10, knn_top1=0.5)])
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert axes.get_title()
        assert axes.get_ylabel()
        assert axes.get_xlabel() == "epoch (passes over the data)"
        assert axes.get_legend() is not None
    assert figure.axes[0].get_ylabel() == "loss, in nats"


def test_a_single_line_is_plotted_as_visible_points() -> None:
    figure = plot_metrics([step(1)])
    line = figure.axes[0].lines[0]
    assert line.get_marker() == "o"
    assert len(np.asarray(line.get_xdata())) == 1
    assert "not measured in this run" in [text.get_text() for text in figure.axes[2].texts]


def test_a_run_with_evaluations_only_is_plotted() -> None:
    figure = plot_metrics([{"step": 0, "epoch": 0.0, "knn_top1": 0.5}])
    assert lines(figure, 2)["kNN top-1"] == ([0.0], [0.5])
    assert [text.get_text() for text in figure.axes[2].texts] == ["50.0%"]
    assert not figure.axes[0].lines


def test_the_picture_is_written_without_a_display(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(step(n)) + "\n" for n in range(5)))
    assert plot_curves(metrics, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10  # not a blank page


def test_lines_are_sorted_by_step_and_an_incomplete_last_line_is_left_out(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 2, "epoch": 0.2}\n{"step": 1, "epoch": 0.1}\n{"step": 3, "epo')
    assert [record["step"] for record in read_metrics(metrics)] == [1, 2]
    metrics.write_text('{"step": 2, "ep\n{"step": 1, "epoch": 0.1}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_metrics(metrics)


def test_without_metrics_no_picture_is_written(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("")
    assert not plot_curves(metrics, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_metrics_that_a_method_names_have_panels_of_their_own() -> None:
    plain = {"step": 0, "epoch": 0.0, "loss": 9.0, "lr": 0.1, "data_wait": 0.5, "note": "x"}
    records = [{**plain, "invariance": 0.5}, {**plain, "epoch": 1.0, "invariance": 0.75}]
    figure = plot_metrics(records)
    assert len(figure.axes) == 5
    assert lines(figure, 4)["invariance"] == ([0.0, 1.0], [0.5, 0.75])
    assert (figure.axes[0].get_title(), figure.axes[4].get_ylabel()) == ("Loss", "invariance")


@pytest.mark.filterwarnings("error")
def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    sides = []
    for name in ("$_$", "猫", "abc"):
        figure = plot_confusion([[1, 0], [2, 3]], (name, "$x$"), f"runs/$^$ and {name}")
        save_figure(figure, tmp_path / "a.png")
        written = [t.get_text() for t in figure.axes[0].get_xticklabels()]
        assert written == [name, "$x$"]
        with Image.open(tmp_path / "a.png") as image:
            sides.append(np.asarray(image.convert("L")).std())
    assert min(sides) > 10


def test_texts_of_the_parts_of_a_step_stay_inside_the_picture() -> None:
    bars = [Bar("key forward", 42.1, 34.2), Bar("backward", 83.8, 68.2), Bar("other", 0.7, None)]
    figure = plot_sides("a step", {"images/s": {"mocofast": 181.5, "reference": 76.6}}, bars)
    figure.canvas.draw()
    below = figure.get_axes()[-1]
    for text in below.texts:
        left, right = text.get_window_extent().intervalx
        assert below.bbox.x0 < left < right < figure.bbox.x1, text.get_text()
