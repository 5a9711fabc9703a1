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


def train(epochs: int = 5, seed: int = 0, *, cpu: bool = False) -> list[float]:
    """Returns the loss of every step. cpu: leave GPUs alone."""
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=cpu)
    model = build()
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), RATE, MOMENTUM)
    loader = torch.utils.data.DataLoader(
        list(digits()), BATCH, shuffle=True, drop_last=True, collate_fn=pairs
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for epoch in range(epochs):
        for im_q, im_k in loader:
            loss = model(im_q, im_k).loss
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        accelerator.print(f"epoch {epoch + 1}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5)
    train(parser.parse_args().epochs)
