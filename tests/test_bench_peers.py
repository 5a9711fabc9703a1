"""Every peer that `mocofast bench` times computes our loss, on rotating inputs."""

from __future__ import annotations

import json
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from mocofast_bench import batch, ema, kernels, peers, sweep, timing
from mocofast_bench.commands import main
from torch import Tensor
from torch.nn import functional as F

from tests.oracle import info_nce_oracle

CPU = torch.device("cpu")
SIZES = (5, 67, 24)  # odd rows and a prime K: no block divides them
PACKAGES = {
    "cut-cross-entropy": "cut_cross_entropy",
    "cut-cross-entropy compiled": "cut_cross_entropy",
    "Liger": "liger_kernel",
    "lightly": "lightly",
}
HERE = [name for name, peer in peers.all_peers(torch.float32).items() if not peer.gpu_reason]


def loss_and_gradient(peer: peers.Peer) -> tuple[Tensor, Tensor]:
    """Checks loss and gradient of the peer against a float64 oracle and returns the pair."""
    query, positive, negatives = peers.input_sets(SIZES, torch.float32, CPU, 1)[0]
    exact = info_nce_oracle(query, positive, negatives, peers.TEMPERATURE).mean()
    (want,) = torch.autograd.grad(exact, query)
    loss = peer.build(SIZES, torch.float32)(query, positive, negatives.clone())
    (gradient,) = torch.autograd.grad(loss, query)
    # Sums of 67 float32 terms have errors of a few units in the last place of numbers around 1.
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), want.double(), rtol=1e-4, atol=1e-6)
    return loss, gradient


@pytest.mark.parametrize("name", HERE)
def test_a_peer_has_our_loss_and_gradient(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    if name == "linear_cross_entropy" and not hasattr(F, name):
        pytest.skip("needs torch 2.13")
    # Runs the formula without compiling, which takes a minute.
    with torch.compiler.set_stance("force_eager"):
        loss_and_gradient(peers.all_peers(torch.float32)[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in HERE if peers.all_peers(torch.float32)[name].compiles]
)
def test_a_compiled_peer_has_our_loss_and_gradient(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    loss_and_gradient(peers.all_peers(torch.float32)[name])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the test below runs its kernel on the GPU")
def test_ligers_kernel_has_our_loss_and_gradient_in_tritons_interpreter() -> None:
    pytest.importorskip("liger_kernel")
    loss_and_gradient(peers.all_peers(torch.float32)["Liger"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_peers_agree_on_a_gpu(dtype: torch.dtype) -> None:
    cuda, sizes = torch.device("cuda"), (128, 4096, 128)  # sizes that every kernel supports
    _, skipped = peers.prepare_calls(peers.all_peers(dtype), sizes, dtype, cuda, 1)
    absent = {name for name, package in PACKAGES.items() if find_spec(package) is None}
    float32_only = {"cut-cross-entropy"} if dtype == torch.float32 else set()
    absent |= {"linear_cross_entropy"} if not hasattr(F, "linear_cross_entropy") else set()
    assert set(skipped) <= absent | float32_only, skipped
    query, positive, negatives = peers.input_sets(sizes, dtype, cuda, 1)[0]
    exact = info_nce_oracle(query, positive, negatives, peers.TEMPERATURE).mean()
    (want,) = torch.autograd.grad(exact, query)
    for name, peer in peers.all_peers(dtype).items():
        if name in skipped or peer.dtype is not None:
            continue
        loss = peer.build(sizes, dtype)(query, positive, negatives.clone())
        (gradient,) = torch.autograd.grad(loss, query)
        low = dtype == torch.bfloat16  # peers that write logits (up to 5) round to 8 bits
        torch.testing.assert_close(
            loss.double(), exact, rtol=2e-2 if low else 1e-3, atol=0, msg=name
        )
        error = (gradient.double() - want.double()).norm() / want.double().norm()
        assert error < (5e-2 if low else 5e-3), name


def test_peers_that_cannot_run_are_named_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    everyone = peers.all_peers(torch.float32, compiling=False)
    steps, skipped = peers.prepare_calls(everyone, SIZES, torch.float32, CPU, 1)
    assert set(steps) - {"linear_cross_entropy"} == {"mocofast", "with rank", "eager"}
    by_version = {"linear_cross_entropy"} - set(steps)
    assert set(skipped) == {"eager bfloat16", "cut-cross-entropy", "Liger", "lightly", *by_version}
    assert not by_version or "2.13" in skipped["linear_cross_entropy"]
    assert "GPU" in skipped["Liger"] and "GPU" in skipped["eager bfloat16"]
    assert "lightly.loss" in skipped["lightly"]


def test_an_error_of_our_own_is_not_hidden_as_a_peer_left_out() -> None:
    def broken(*_: Any) -> peers.Loss:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        peers.prepare_calls({"mocofast": peers.Peer(broken)}, SIZES, torch.float32, CPU, 1)
    assert peers.prepare_calls({"other": peers.Peer(broken)}, SIZES, torch.float32, CPU, 1)[1] == {
        "other": "RuntimeError: broken"
    }


def test_pytorchs_linear_cross_entropy_gives_our_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the documented formula in its place, as in releases before 2.13."""

    def documented(x: Tensor, weight: Tensor, target: Tensor, *, reduction: str) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target, reduction=reduction)

    monkeypatch.setattr(F, "linear_cross_entropy", documented, raising=False)
    loss_and_gradient(peers.all_peers(torch.float32)["linear_cross_entropy"])


def test_cut_cross_entropys_kernels_say_that_they_take_no_float32() -> None:
    with pytest.raises(peers.Unavailable, match="bfloat16 and float16"):
        peers.cut_cross_entropy(SIZES, torch.float32)


def test_inputs_rotate_through_more_than_the_cache() -> None:
    seen = []

    def loss(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
        seen.append(negatives)
        return (query * positive).sum()

    sets = peers.input_sets(SIZES, torch.float32, CPU, 3)
    step = peers.call_over(loss, sets)
    for _ in range(4):
        step()
    assert [x is y[2] for x, y in zip(seen, [*sets, sets[0]])] == [True] * 4
    assert not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(seen[0].norm(dim=1), torch.ones(SIZES[1]))

    large = (256, 65536, 128)
    count = peers.sets_past_the_cache(large, torch.float32, CPU)
    assert (count - 1) * 4 * (2 * 256 + 65536) * 128 >= timing.cache_size(CPU) > 2**18
    assert peers.sets_past_the_cache(SIZES, torch.float32, CPU) == peers.MAX_SETS


@pytest.mark.usefixtures("measured_here")
def test_sides_of_the_losses_of_a_batch_agree_and_the_others_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["batch", "--n", "20", "--c", "8", "--repeats", "1", "--device", "cpu"]
    assert main(options) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("clip, inf-cl", "siglip, siglip-kernel"):
        assert "GPUs only" in row["skipped"][name]
    assert {"clip, mocofast", "clip, eager", "siglip, mocofast"} <= row["milliseconds"].keys()
    if not hasattr(F, "linear_cross_entropy"):
        assert "2.13" in row["skipped"]["clip, linear_cross_entropy"]

        def documented(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, weight), target)

        monkeypatch.setattr(F, "linear_cross_entropy", documented, raising=False)
    image, text = batch.pairs(20, 8, torch.float32, CPU)
    for sides in batch.SIDES.values():
        results = []
        for name, build in sides.items():
            if name not in ("inf-cl", "siglip-kernel"):
                loss = build(CPU)(image, text)
                results.append((loss, *torch.autograd.grad(loss, (image, text))))
        for result in results[1:]:
            for got, want in zip(result, results[0]):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the test below runs its kernels on the GPU")
def test_siglip_kernel_has_our_loss_in_tritons_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The package asks for a GPU while it is imported.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    pytest.importorskip("siglip_kernel")
    image, text = batch.pairs(12, 16, torch.float32, CPU)
    results = []
    for build in (batch.eager_siglip, partial(batch.siglip_kernel, backend="chunked_bf16")):
        loss = build(CPU)(image, text)
        results.append((loss, *torch.autograd.grad(loss, (image, text))))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("loss_name", "name"), [("clip", "inf-cl"), ("siglip", "siglip-kernel")])
def test_packages_for_pairs_agree_on_a_gpu(loss_name: str, name: str) -> None:
    pytest.importorskip(name.replace("-", "_"))
    image, text = batch.pairs(256, 128, torch.float32, torch.device("cuda"))
    results = []
    for side in ("eager", name):
        loss = batch.SIDES[loss_name][side](image.device)(image, text)
        results.append((loss, *torch.autograd.grad(loss, (image, text))))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-4)


def test_every_side_of_the_ema_averages_alike() -> None:
    shapes = [(7, 3), (5,), (2, 3, 1, 1)]
    torch.manual_seed(0)
    sources, sides, skipped = ema.build_averagers(shapes, torch.float32, CPU)
    assert {"mocofast", "loop", "foreach_lerp", "swa_utils.AveragedModel", "timm.ModelEmaV3"} == {
        *sides,
        *skipped,
    }
    for side in sides.values():
        with torch.no_grad():
            for average in side.averages:
                average.fill_(1.0)
        side.update()
        for average, source in zip(side.averages, sources):
            assert average is not source
            # 1 - 0.999 loses 3 digits in float32. Some implementations use 0.001 in float64.
            want = ema.MOMENTUM + (1 - ema.MOMENTUM) * source.detach().double()
            torch.testing.assert_close(average.detach().double(), want, rtol=0, atol=3e-7)


@pytest.mark.usefixtures("measured_here")
def test_the_sweep_writes_rows_and_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--n", "3", "8", "--k", "64", "32", "--c", "16", "--middle", "3", "64", "16"]
    assert (
        main(["sweep", str(tmp_path), *sizes, "--no-compile", "--repeats", "1", "--device", "cpu"])
        == 0
    )
    out = capsys.readouterr().out
    assert "a CPU" in out and "Liger is left out" in out
    rows = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    # In order of size, without repetition. All three axes share the middle.
    assert [(row["n"], row["k"], row["c"]) for row in rows] == [
        (3, 32, 16),
        (3, 64, 16),
        (8, 64, 16),
    ]
    for row in rows:
        assert {"mocofast", "eager"} <= set(row["milliseconds"])
        assert set(row["extra_bytes"]) == set(row["milliseconds"])
        time = row["milliseconds"]["mocofast"]
        assert row["fraction_of_floor"] == pytest.approx(row["floor_milliseconds"] / time, abs=2e-3)
        best = min(value for name, value in row["milliseconds"].items() if name != "mocofast")
        assert row["milliseconds"][row["best_peer"]] == best
    for name in ("time", "memory", "floor"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads(out.splitlines()[-1])
    assert summary["problems"] == 3
    assert summary["least_speedup"] == min(row["speedup"] for row in rows)


def test_plots_take_the_graph_where_it_is_faster() -> None:
    row = {
        "milliseconds": {"mocofast": 2.0, "mocofast" + kernels.GRAPH: 0.5, "eager": 4.0},
        "floor_milliseconds": 0.25,
    }
    assert sweep.shortest_time(row, "mocofast") == 0.5
    assert sweep.fraction_of_floor(row, "eager") == 0.25 / 4.0
    assert sweep.shortest_time(row, "Liger") is None
    assert [sweep.short_number(value) for value in (1000, 1024, 65536, 2**20)] == [
        "1000",
        "1K",
        "64K",
        "1M",
    ]
