"""The scripts in examples/ run and do what their docstrings say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mocofast.interop.reference_checkpoints import load_any

FOLDER = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_images_find_their_descriptions_after_training_with_clips_loss() -> None:
    losses, accuracy = example("clip_pairs").train(epochs=3)
    assert losses[-1] < 0.8 * losses[0]
    assert accuracy > 0.6  # chance is 0.1


def test_lightlys_training_code_has_the_same_losses_with_ours_in_place_of_its_own() -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    lightly_moco = example("lightly_moco")
    ours, theirs = (lightly_moco.train(epochs=2, fused=fused) for fused in (True, False))
    # The two sides round in another order over 28 steps of float32. With another negative,
    # temperature or normalisation the losses differ by 1e-2.
    assert ours == pytest.approx(theirs, abs=2e-3)


def in_steps_of_two(loop: ModuleType) -> list[float]:
    """Returns the losses of an epoch of the plain loop with two batches a step."""
    torch.manual_seed(0)
    model = loop.build()
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), loop.RATE, loop.MOMENTUM)
    loader = torch.utils.data.DataLoader(
        list(loop.digits()), loop.BATCH, shuffle=True, drop_last=True, collate_fn=loop.pairs
    )
    losses = []
    for number, (im_q, im_k) in enumerate(loader):
        is_last = number % 2 == 1
        loss = model(im_q, im_k, update_keys=not is_last, enqueue=is_last).loss
        (loss / 2).backward()
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_moco_trains_in_a_plain_loop_in_lightning_and_in_accelerate_alike(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    pytest.importorskip("accelerate")
    plain_loop = example("plain_loop")
    plain = plain_loop.train(epochs=2)
    assert len(plain) == 28
    assert sum(plain[-5:]) < sum(plain[14:19]) - 0.5  # the queue is full, and the loss falls
    checkpoint = tmp_path / "lightning.ckpt"
    theirs = example("lightning_loop").train(epochs=2, checkpoint=str(checkpoint))
    assert theirs == plain
    accelerated = example("accelerate_loop")
    assert accelerated.train(epochs=2, cpu=True) == plain
    assert accelerated.train(epochs=1, cpu=True, accumulate=2) == in_steps_of_two(plain_loop)
    loaded = load_any(str(checkpoint))
    assert loaded.config.model.arch == "resnet_tiny"
