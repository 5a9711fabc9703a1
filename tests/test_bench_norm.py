"""`mocofast bench norm`: the reported row, and the results of every side."""

from __future__ import annotations

import json

import pytest
import torch
from mocofast_bench import norm
from mocofast_bench.commands import main

CPU = torch.device("cpu")


def test_it_reports_every_mode_with_its_floor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "LAYERS", ((8, 6), (24, 3)))
    monkeypatch.setattr(norm, "ROTATED", 3 * 6 * 8 * 6 * 6 * 4)
    sizes = ["--n", "6", "--splits", "3", "--layer", "1"]
    assert main(["norm", *sizes, "--repeats", "1", "--device", "cpu"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["benchmark"], row["splits"], row["dtype"]) == ("norm", 3, "float32")
    assert row["computed_by"] == norm.computed_by(CPU, torch.float32)
    assert [r["mode"] for r in row["rows"]] == list(norm.MODES)
    for r in row["rows"]:
        assert r["shape"] == [6, 8, 6, 6]
        assert set(r["milliseconds"]) == {"mocofast", "unsplit", "loop", "fold"}
        assert r["bytes"] == norm.MODES[r["mode"]].sweeps * 6 * 8 * 6 * 6 * 4
        assert r["floor_milliseconds"] == pytest.approx(
            1e-6 * r["bytes"] / r["memory_gigabytes_per_second"], rel=1e-2, abs=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_row_says_what_computes(dtype: torch.dtype) -> None:
    inputs = norm.activations(6, 5, 4, dtype, CPU)[0]
    inputs.x.requires_grad_()
    node = type(norm.ghost(inputs, 3, fused=False).grad_fn)
    kernel = node.__name__ == "_GhostBatchNormBackward"
    assert norm.computed_by(CPU, dtype) == ("C" if kernel else "PyTorch")
    assert not (kernel and dtype == torch.float16)


def test_a_batch_that_does_not_divide_exits_with_a_message() -> None:
    with pytest.raises(SystemExit, match="--n must be divisible by --splits: got 6 and 4"):
        main(["norm", "--n", "6", "--splits", "4", "--device", "cpu"])


@pytest.mark.parametrize("fused", [False, True])
def test_all_splitting_sides_give_the_same_and_the_unsplit_one_does_not(fused: bool) -> None:
    inputs = norm.activations(6, 5, 4, torch.float32, CPU)[0]
    expected = norm.loop(inputs, 3, fused)
    for side in (norm.ghost, norm.fold):
        torch.testing.assert_close(side(inputs, 3, fused), expected)
    assert not torch.allclose(norm.unsplit(inputs, 3, fused), expected, atol=1e-2)


def test_inputs_take_turns_and_differ() -> None:
    inputs = norm.activations(2, 64, 64, torch.float32, CPU)
    assert len(inputs) == 32  # the maximum
    assert not torch.equal(inputs[0].x, inputs[1].x)
    calls: list[int] = []
    step = norm._rotated([lambda i=i: calls.append(i) for i in range(3)])  # type: ignore[misc]
    for _ in range(4):
        step()
    assert calls == [0, 1, 2, 0]
