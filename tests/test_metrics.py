"""Metrics by name: their means over steps, in a checkpoint, and when a method changes them."""

from __future__ import annotations

import math

import pytest
import torch

from mocofast.methods.base import MethodOutput, ranking_output
from mocofast.train.metrics import StepMetrics, Window, step_metrics
from mocofast.train.run_folder import describe_metric

CPU = torch.device("cpu")


def metrics(**values: float) -> StepMetrics:
    return StepMetrics(tuple(values), torch.tensor(list(values.values())))


def test_a_step_carries_the_loss_and_whatever_the_method_names() -> None:
    output = MethodOutput(torch.tensor(2.0), {"entropy": torch.tensor(3.0)})
    found = step_metrics(output, share=0.25)
    assert found.names == ("loss", "entropy")
    assert found.values.tolist() == [0.5, 0.75]
    assert float(found.loss) == 0.5


def test_positive_ranks_give_the_top_1_and_top_5_accuracy() -> None:
    output = ranking_output(torch.tensor(1.0), torch.tensor([0, 4, 5, 0]))
    assert {k: float(v) for k, v in output.metrics.items()} == {"acc1": 0.5, "acc5": 0.75}
    assert output.rank is not None and output.rank.tolist() == [0, 4, 5, 0]


def test_a_window_averages_leaves_nan_out_and_starts_anew() -> None:
    window = Window(CPU)
    window.add(metrics(loss=1.0, entropy=math.nan), 8, 0.0)
    window.add(metrics(loss=3.0, entropy=1.0), 8, 0.0)
    assert window.start_means().wait() == {"loss": 2.0}
    ended = window.flush()
    assert (window.steps, ended.images) == (0, 16)
    window.add(metrics(loss=math.nan, entropy=2.0), 8, 0.0)
    means = window.start_means().wait()
    assert math.isnan(means["loss"]) and means["entropy"] == 2.0
    values = ended.wait()
    assert values["loss"] == 2.0 and values["images_per_second"] > 0


def test_a_window_continues_from_its_state_and_from_an_older_checkpoints() -> None:
    window, continued = Window(CPU), Window(CPU)
    window.add(metrics(loss=1.0, acc1=0.25), 8, 0.0)
    continued.load_state(window.state())
    continued.add(metrics(loss=2.0, acc1=0.75), 8, 0.0)
    assert continued.start_means().wait() == {"loss": 1.5, "acc1": 0.5}
    old = Window(CPU)
    old.load_state({"sums": torch.tensor([1.0, math.nan, math.nan]), "steps": 1})
    old.add(metrics(loss=2.0), 8, 0.0)  # a method that ranks nothing
    assert old.start_means().wait() == {"loss": 1.5}


def test_a_method_with_a_new_metric_continues_an_older_run() -> None:
    window = Window(CPU)
    window.load_state({"sums": {"loss": 4.0}, "steps": 2})
    window.add(metrics(loss=1.0, entropy=0.5), 8, 0.0)
    assert window.start_means().wait() == {"loss": 1.0, "entropy": 0.5}
    assert window.steps == 1


def test_metrics_that_change_from_step_to_step_are_refused() -> None:
    window = Window(CPU)
    window.add(metrics(loss=1.0, entropy=0.5), 8, 0.0)
    with pytest.raises(ValueError, match="got loss after loss, entropy"):
        window.add(metrics(loss=1.0), 8, 0.0)
    assert window.steps == 1


def test_the_log_line_shows_accuracies_as_shares_and_other_metrics_as_numbers() -> None:
    assert describe_metric("acc1", 0.123) == "acc@1 12.3%"
    assert describe_metric("accuracy", 0.5) == "accuracy 0.5"
    assert describe_metric("entropy", 1234.567) == "entropy 1235"
