"""Trains `mocofast.MoCo` with Hugging Face Accelerate, on scikit-learn's digits.

    pip install accelerate
    python examples/accelerate_loop.py [--epochs 5]
    accelerate launch examples/accelerate_loop.py

Model, data and numbers are those of `examples/plain_loop.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent))
from plain_loop import BATCH, MOMENTUM, RATE, build, digits, pairs


def train(epochs: int = 5, seed: int = 0, *, cpu: bool = False, accumulate: int = 1) -> list[float]:
    """Returns the loss of every batch.

    cpu: leave GPUs alone. accumulate: batches of a step. All of them meet one key encoder and one
    queue, as a large batch would.
    """
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=accumulate)
    model = build()
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), RATE, MOMENTUM)
    loader = torch.utils.data.DataLoader(
        list(digits()), BATCH, shuffle=True, drop_last=True, collate_fn=pairs
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, is_first = [], True
    for epoch in range(epochs):
        for im_q, im_k in loader:
            with accelerator.accumulate(model):
                is_last = accelerator.sync_gradients
                loss = model(im_q, im_k, update_keys=is_first, enqueue=is_last).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            is_first = is_last
        accelerator.print(f"epoch {epoch + 1}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5)
    train(parser.parse_args().epochs)
