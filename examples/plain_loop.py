"""Trains `mocofast.MoCo` in a plain loop of PyTorch, on scikit-learn's digits.

    python examples/plain_loop.py [--epochs 5]

The model updates its momentum encoder and its queue in `forward`. `examples/lightning_loop.py` and
`examples/accelerate_loop.py` train the same model with the same numbers.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from mocofast import MoCo
from mocofast.models.encoders import build_encoder

BATCH, RATE, MOMENTUM = 128, 0.06, 0.9


def digits() -> Tensor:
    """Returns 1797 normalised images, (1797, 3, 8, 8) float32."""
    images = torch.from_numpy(load_digits().images).float() / 8 - 1
    return images[:, None].expand(-1, 3, -1, -1).contiguous()


def view(images: Tensor) -> Tensor:
    """Returns images moved by up to a pixel, brighter or darker."""
    down, right = (int(shift) for shift in torch.randint(-1, 2, (2,)))
    return images.roll((down, right), (2, 3)) * (0.7 + 0.6 * torch.rand(len(images), 1, 1, 1))


def pairs(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns two views of a batch. images: as a DataLoader collects them."""
    batch = torch.stack(images)
    return view(batch), view(batch)


def build() -> MoCo:
    """Returns the untrained model."""
    return MoCo(build_encoder("resnet_tiny"), dim=32, queue_size=512, momentum=0.99, mlp=True)


def train(epochs: int = 5, seed: int = 0) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), RATE, MOMENTUM)
    loader = torch.utils.data.DataLoader(
        list(digits()), BATCH, shuffle=True, drop_last=True, collate_fn=pairs
    )
    losses = []
    for epoch in range(epochs):
        for im_q, im_k in loader:
            loss = model(im_q, im_k).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5)
    train(parser.parse_args().epochs)
