"""Trains `mocofast.MoCo` with PyTorch Lightning, on scikit-learn's digits.

    pip install pytorch-lightning
    python examples/lightning_loop.py [--epochs 5]

Model, data and numbers are those of `examples/plain_loop.py`. Checkpoints of Lightning are read by
`mocofast knn`, `linear`, `finetune`, `export` and `pretrain --init`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytorch_lightning as lightning
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from plain_loop import BATCH, MOMENTUM, RATE, build, digits, pairs


class LitMoCo(lightning.LightningModule):
    """MoCo with its optimiser."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build()
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        output = self.model(*batch)
        self.losses.append(output.loss.item())
        return output.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.encoder_q.parameters(), RATE, MOMENTUM)


def train(epochs: int = 5, seed: int = 0, checkpoint: str = "") -> list[float]:
    """Returns the loss of every step. checkpoint: a file to write, or ""."""
    torch.manual_seed(seed)
    module = LitMoCo()
    loader = torch.utils.data.DataLoader(
        list(digits()), BATCH, shuffle=True, drop_last=True, collate_fn=pairs
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    if checkpoint:
        trainer.save_checkpoint(checkpoint)
    return module.losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5)
    print(f"loss {train(parser.parse_args().epochs)[-1]:.4f}")
