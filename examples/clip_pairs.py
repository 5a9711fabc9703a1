"""Pairs of images and descriptions: two encoders trained with CLIP's loss (Radford et al. 2021, arXiv:2103.00020).

    python examples/clip_pairs.py [--epochs 20]

The images are scikit-learn's handwritten digits, the descriptions short sentences about them ("a handwritten seven"),
of a few wordings each, as counts of their words. A minute on one CPU core. Printed are the loss and how often the
nearest description of a new image names the right digit.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mocofast.models.encoders import build_encoder
from mocofast.ops import clip_loss

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = ("a handwritten {}", "the digit {}", "a picture of a {}", "someone wrote {}")
SENTENCES = [wording.format(digit).split() for digit in DIGITS for wording in WORDINGS]
WORDS = sorted({word for sentence in SENTENCES for word in sentence})


def descriptions() -> Tensor:
    """(40, words): how often each word occurs in each sentence, the four of a digit together."""
    return torch.tensor([[float(sentence.count(word)) for word in WORDS] for sentence in SENTENCES])


def train(
    epochs: int = 20, batch_size: int = 64, dim: int = 32, seed: int = 0
) -> tuple[list[float], float]:
    """The mean loss of every epoch, and the accuracy of retrieval on 300 images that are not trained on."""
    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.from_numpy(
        np.repeat(digits.images[:, None] / 8 - 1, 3, axis=1)
    ).float()  # (1797, 3, 8, 8)
    labels = torch.from_numpy(digits.target)
    texts = descriptions()

    image_encoder = build_encoder("resnet_tiny")(num_classes=dim)
    text_encoder = nn.Sequential(nn.Linear(len(WORDS), 64), nn.ReLU(), nn.Linear(64, dim))
    log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # learnt; CLIP's start
    parameters = [*image_encoder.parameters(), *text_encoder.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)

    losses = []
    for epoch in range(epochs):
        order = torch.randperm(len(images) - 300)
        total, steps = 0.0, len(order) // batch_size
        for step in range(steps):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            wording = torch.randint(len(WORDINGS), (batch_size,))
            image_features = F.normalize(image_encoder(images[chosen]), dim=1)
            text_features = F.normalize(
                text_encoder(texts[labels[chosen] * len(WORDINGS) + wording]), dim=1
            )
            # A scale above 100 makes training unstable: CLIP's limit.
            loss = clip_loss(image_features, text_features, log_scale.exp().clamp(max=100))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / steps)
        print(f"epoch {epoch + 1}  loss {losses[-1]:.3f}  scale {log_scale.exp().item():.1f}")

    image_encoder.eval()
    with torch.no_grad():
        similarity = (
            F.normalize(image_encoder(images[-300:]), dim=1)
            @ F.normalize(text_encoder(texts), dim=1).t()
        )
    nearest = similarity.argmax(1) // len(WORDINGS)
    accuracy = (nearest == labels[-300:]).float().mean().item()
    print(f"nearest description names the right digit: {accuracy:.1%}")
    return losses, accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20)
    train(parser.parse_args().epochs)
