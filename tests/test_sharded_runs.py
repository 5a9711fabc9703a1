"""Sharded runs (engine.parallel fsdp): equal to DDP, with checkpoints for any number of ranks."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mocofast_bench.processes import on_ranks

from mocofast import MoCo, cli, distributed, settings
from mocofast.config import ConfigError, OptimConfig
from mocofast.device import choose_autocast
from mocofast.methods.moco_v3 import MoCoV3
from mocofast.models.encoders import build_encoder
from mocofast.models.recompute import recompute_blocks
from mocofast.models.sync_batch_norm import sync_batch_norm
from mocofast.ops.local import whole_tensor
from mocofast.train import parts, train
from mocofast.train.checkpoint import load_checkpoint
from mocofast.train.checkpoint_writer import CheckpointWriter
from mocofast.train.engine import Engine
from mocofast.train.optimizer import optimizer_of
from mocofast.train.sharding import Sharding

CPU = torch.device("cpu")
IMAGES = 4  # of a rank in a step
Trained = tuple[list[list[float]], dict[str, torch.Tensor]]
# The options that a sharded step must know, in as few runs as possible.
CASES: dict[str, dict[str, Any]] = {
    "resnet": {},
    "resnet, all options": {"clip": 0.05, "accumulate": 2, "recompute": True},
    "vit": {"clip": 0.05, "recompute": True},
    "vit, bf16": {"precision": "bf16"},
}


def trained(
    rank: int,
    case: str,
    shard: bool,
    clip: float = 0.0,
    accumulate: int = 1,
    recompute: bool = False,
    precision: str = "fp32",
) -> Trained:
    """Makes three steps. Returns the metrics of all steps, and whole tensors."""
    torch.manual_seed(0)
    model: Any
    if case.startswith("resnet"):
        build = build_encoder("resnet_tiny")
        model = MoCo(build, dim=8, queue_size=32, bn_splits=2, mlp=True)
        options = OptimConfig(lr=0.05, clip_norm=clip)
    else:
        build = build_encoder("vit_micro_cifar", 8)
        model = MoCoV3(build, 8, 16, 0.9, 0.2, projector_layers=3, predictor_norm=True)
        sync_batch_norm(model)
        options = OptimConfig(name="adamw", lr=1e-3, weight_decay=0.1, clip_norm=clip)
    if recompute:
        recompute_blocks(model.encoder_q)
    autocast = choose_autocast(precision, CPU)
    sharding = Sharding(model, CPU, autocast) if shard else None
    optimizer = optimizer_of(model, options)
    if case == "vit":
        # Some gradients are 0 but for rounding: of the bias of attention's keys, and of the last
        # norm's bias before a BatchNorm. With an eps of 1e-8 AdamW divides rounding by rounding.
        for group in optimizer.param_groups:
            group["eps"] = 1e-5
    engine = Engine("eager", model, optimizer, autocast, accumulate, IMAGES // accumulate)
    generator = torch.Generator().manual_seed(1)
    values = []
    for step in range(3):
        engine.set_scheduled(step, 3, options.lr)
        # Two views, and small views for the ResNet.
        sides = (8, 8, 5, 5) if case.startswith("resnet") else (8, 8)
        views = [torch.randn(4 * IMAGES, 3, side, side, generator=generator) for side in sides]
        own = slice(rank * IMAGES, (rank + 1) * IMAGES)
        values.append(engine.step(tuple(view[own] for view in views)).values.tolist())
    state = {name: whole_tensor(t.detach()).clone() for name, t in model.state_dict().items()}
    if sharding is not None:
        plain = sharding.whole("encoder_k")
        assert all(torch.equal(t, state[f"encoder_k.{n}"]) for n, t in plain.state_dict().items())
    return values, state


def both_ways(rank: int) -> dict[str, list[Trained]]:
    return {
        case: [trained(rank, case, shard, **options) for shard in (True, False)]
        for case, options in CASES.items()
    }


def run(folder: Path, steps: int, resume: str = "", **options: Any) -> None:
    """Pretrains a small ViT on the digits, in one process or as a rank."""
    config = settings.load_recipe("digits")
    small = {"model.arch": "vit_micro_cifar", "model.queue_size": 256, "data.batch_size": 64}
    quiet = {"knn.every": 0, "knn.start": False, "data.workers": 0, "train.hang_after": 0}
    often = {"checkpoint.every_steps": 3, "train.log_every": 1, "train.device": "cpu"}
    often |= {"train.precision": "fp32"}  # bf16 rounds what ranks exchange
    place = {"train.dir": str(folder), "train.max_steps": steps}
    settings.apply(config, {**small, **quiet, **often, **place, **options})
    train(config, resume)


def stay_together() -> None:
    """Lets several runs of these ranks use one process group."""
    distributed.shutdown = lambda: None  # type: ignore[assignment]


def two_ranks(root: Path, rank: int) -> dict[str, list[Trained]]:
    stay_together()
    found = both_ways(rank)
    fsdp: dict[str, Any] = {"engine.parallel": "fsdp"}
    run(root / "fsdp", 4, **{**fsdp, "knn.start": True})
    run(root / "ddp", 4, **{"knn.start": True})
    for name in ("killed", "one"):
        if rank == 0:
            shutil.copytree(root / "fsdp", root / name)
    distributed.barrier()
    run(root / "ddp2", 6, str(root / "fsdp"))  # a sharded checkpoint in a run of DDP
    return found


def four_ranks(root: Path, rank: int) -> None:
    run(root / "one", 8, "auto", **{"engine.parallel": "fsdp"})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def on_two(root: Path) -> list[dict[str, list[Trained]]]:
    return on_ranks(partial(two_ranks, root), 2)


@pytest.fixture(scope="module")
def on_four() -> list[dict[str, list[Trained]]]:
    return on_ranks(both_ways, 4)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_sharded_trajectory_equals_ddp(
    case: str, ranks: int, request: pytest.FixtureRequest
) -> None:
    results = request.getfixturevalue({2: "on_two", 4: "on_four"}[ranks])
    weights, losses = (2e-2, 5e-2) if "bf16" in case else (1e-6, 1e-6)  # bf16 rounds norms, too
    for found in results:
        (ours, our_state), (theirs, their_state) = found[case]
        metrics = 1 if "bf16" in case else None  # the loss, or the accuracies, too
        got, expected = (torch.tensor(values)[:, :metrics] for values in (ours, theirs))
        torch.testing.assert_close(got, expected, rtol=losses, atol=losses)
        assert our_state.keys() == their_state.keys()
        for name, value in their_state.items():
            torch.testing.assert_close(our_state[name], value, rtol=0, atol=weights, msg=name)


def close(ours: Path, theirs: Path, atol: float = 2e-6) -> None:
    a, b = (load_checkpoint(folder) for folder in (ours, theirs))
    assert a["step"] == b["step"]
    assert a["model"].keys() == b["model"].keys()
    for name, value in b["model"].items():
        torch.testing.assert_close(a["model"][name], value, rtol=0, atol=atol, msg=name)
    for number, state in b["optimizer"]["state"].items():
        for name, value in state.items():
            got = a["optimizer"]["state"][number][name]
            torch.testing.assert_close(got, value, rtol=0, atol=atol)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_sharded_run_equals_a_run_of_ddp(root: Path, on_two: object) -> None:
    close(root / "fsdp", root / "ddp")
    for name, keys in (
        ("metrics.jsonl", ("loss", "acc1", "knn_top1")),
        ("signals.jsonl", ("gradient_norm", "weight_change", "key_distance", "queue_drift")),
    ):
        ours, theirs = lines(root / "fsdp", name), lines(root / "ddp", name)
        assert len(ours) == len(theirs)
        for key in keys:
            values = [[line[key] for line in found if key in line] for found in (ours, theirs)]
            assert values[0]
            assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_checkpoints_load_into_any_number_of_ranks(root: Path, on_two: object) -> None:
    run(root / "one", 6, "auto")
    on_ranks(partial(four_ranks, root), 4)
    run(root / "alone", 8)
    close(root / "one", root / "alone", atol=1e-5)  # 2 ranks, then 1, then 4
    assert "parts" in torch.load(root / "one" / "checkpoints" / "last.pt", weights_only=True)


def test_a_run_of_ddp_and_one_process_continue_a_sharded_run(root: Path, on_two: object) -> None:
    run(root / "two-one", 6, str(root / "fsdp"))
    close(root / "ddp2", root / "two-one", atol=1e-5)


def test_commands_read_sharded_checkpoints(
    root: Path, on_two: object, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("fsdp", "ddp"):
        words = ["--format", "safetensors", str(root / f"{name}.safetensors")]
        assert cli.main(["export", str(root / name), *words]) == 0
    from safetensors.torch import load_file

    ours, theirs = (load_file(root / f"{name}.safetensors") for name in ("fsdp", "ddp"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[n], theirs[n], rtol=0, atol=2e-6) for n in theirs)
    capsys.readouterr()
    assert cli.main(["doctor", str(root / "fsdp")]) == 0
    said = " ".join(capsys.readouterr().out.split())  # lines break by the folder's width
    assert "step_00000004.pt whole" in said
    assert "sharded: step_00000004.parts" in said


def test_damage_is_found_and_the_older_checkpoint_is_taken(
    root: Path, on_two: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(root / "fsdp", tmp_path / "run"))
    part = folder / "checkpoints" / "step_00000004.parts" / "__1_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert load_checkpoint(folder)["step"] == 3
    assert cli.main(["doctor", str(folder)]) == 1
    assert "wrong checksum" in capsys.readouterr().out
    part.unlink()
    assert load_checkpoint(folder)["step"] == 3
    shutil.rmtree(folder / "checkpoints" / "step_00000003.parts")
    with pytest.raises(ConfigError, match=r"no checkpoint of .* can be read.*is missing"):
        load_checkpoint(folder)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.getcwd, ()


def test_no_code_of_metadata_runs(root: Path, on_two: object, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "fsdp", tmp_path / "run"))
    file = folder / "checkpoints" / "step_00000004.pt"
    metadata = folder / "checkpoints" / "step_00000004.parts" / ".metadata"
    metadata.write_bytes(pickle.dumps(_Code()))
    state = torch.load(file, weights_only=True)
    size, total = metadata.stat().st_size, zlib.crc32(metadata.read_bytes())
    state["parts"]["files"][".metadata"] = [size, total]
    torch.save(state, file)
    with pytest.raises(ConfigError, match=r"\.metadata holds posix\.getcwd"):
        load_checkpoint(file)
    state["parts"]["folder"] = "../elsewhere"
    torch.save(state, file)
    with pytest.raises(ConfigError, match="the name of the folder"):
        load_checkpoint(file)


def test_old_folders_go_with_their_files(root: Path, on_two: object, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "fsdp" / "checkpoints", tmp_path / "checkpoints"))
    (folder / "step_00000006.parts").mkdir()  # of a process that was killed
    state = load_checkpoint(folder.parent)
    writer = CheckpointWriter(folder, keep=1)
    writer.save({**state, "step": 7})
    writer.wait()
    assert sorted(os.listdir(folder)) == ["last.pt", "step_00000007.pt"]


def killed(root: Path, rank: int) -> None:
    write = parts.write

    def dying(tensors: Any, folder: Path, group: Any) -> Any:
        files = write(tensors, folder, group)
        if rank == 1 and folder.name.startswith("step_00000006"):
            os.kill(os.getpid(), signal.SIGKILL)
        return files

    parts.write = dying
    run(root / "killed", 9, "auto", **{"engine.parallel": "fsdp"})


@pytest.mark.slow
def test_a_kill_during_a_write_loses_nothing(root: Path, on_two: object) -> None:
    with pytest.raises(Exception, match=r"SIGKILL|terminated"):
        on_ranks(partial(killed, root), 2)
    assert load_checkpoint(root / "killed")["step"] in (4, 6)
    run(root / "killed", 6, "auto")
    run(root / "again", 6)
    close(root / "killed", root / "again", atol=1e-5)
    assert not list((root / "killed" / "checkpoints").glob("step_00000006.parts*"))
