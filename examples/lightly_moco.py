"""Trains lightly's MoCo with `mocofast.ops.info_nce` in place of lightly's NTXentLoss.

    pip install lightly
    python examples/lightly_moco.py [--epochs 5] [--fused false]

The training loop is written as in lightly's examples, with lightly's heads, memory bank, shuffle
and momentum update, on scikit-learn's digits. `--fused false` runs the loop with lightly's own
loss. The values of the losses are the same.
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.loss.memory_bank import MemoryBankModule
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.models.utils import (
    batch_shuffle,
    batch_unshuffle,
    deactivate_requires_grad,
    update_momentum,
)
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mocofast.models.encoders import build_encoder
from mocofast.ops import info_nce


class MoCo(nn.Module):
    """Holds a backbone, a projection head, and momentum copies of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build_encoder("resnet_tiny")(num_classes=1)
        self.backbone.fc = nn.Identity()
        self.projection_head = MoCoProjectionHead(64, 64, 32)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))

    def forward_momentum(self, x: Tensor) -> Tensor:
        x, shuffle = batch_shuffle(x)
        return batch_unshuffle(
            self.projection_head_momentum(self.backbone_momentum(x)).detach(), shuffle
        )


def views(images: Tensor) -> Tensor:
    """Returns images (N, 3, 8, 8) moved by up to a pixel, brighter or darker."""
    down, right = (int(shift) for shift in torch.randint(-1, 2, (2,)))
    return images.roll((down, right), (2, 3)) * (0.7 + 0.6 * torch.rand(len(images), 1, 1, 1))


def train(epochs: int = 5, fused: bool = True, batch_size: int = 128, seed: int = 0) -> list[float]:
    """Returns the mean loss of every epoch. fused: takes `info_nce` instead of lightly's loss."""
    torch.manual_seed(seed)
    digits = load_digits().images[:, None] / 8 - 1
    images = torch.from_numpy(np.repeat(digits, 3, axis=1)).float()
    model = MoCo()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)
    criterion = NTXentLoss(temperature=0.1, memory_bank_size=(512, 32))
    bank: MemoryBankModule = criterion.memory_bank

    losses = []
    for epoch in range(epochs):
        order = torch.randperm(len(images))
        total, steps = 0.0, len(order) // batch_size
        for step in range(steps):
            batch = images[order[step * batch_size : (step + 1) * batch_size]]
            x_query, x_key = views(batch), views(batch)
            update_momentum(model.backbone, model.backbone_momentum, m=0.99)
            update_momentum(model.projection_head, model.projection_head_momentum, m=0.99)
            query, key = model(x_query), model.forward_momentum(x_key)
            if fused:
                # The bank returns the old keys (32, 512) and then stores the new keys.
                _, negatives = bank(F.normalize(key, dim=1), update=True)
                loss = info_nce(
                    query, key, negatives.t(), temperature=0.1, negatives_normalized=True
                )
            else:
                loss = criterion(query, key)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / steps)
        print(f"epoch {epoch + 1}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--fused", choices=("true", "false"), default="true")
    arguments = parser.parse_args()
    train(arguments.epochs, arguments.fused == "true")
