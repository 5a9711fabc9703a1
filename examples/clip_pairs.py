"""Trains an image encoder and a text encoder with CLIP's loss.

CLIP: Radford et al. 2021, arXiv:2103.00020.

    python examples/clip_pairs.py [--epochs 20]

Images: scikit-learn's handwritten digits. Texts: short sentences ("a handwritten seven") in four
wordings, given as word counts. Takes a minute on one CPU core. Prints the loss of every epoch, and
how often the nearest description of a new image names the right digit.
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
    """Returns word counts of the sentences, (40, words). Rows 4 d to 4 d + 3 describe digit d."""
    return torch.tensor([[float(sentence.count(word)) for word in WORDS] for sentence in SENTENCES])


def train(
    epochs: int = 20, batch_size: int = 64, dim: int = 32, seed: int = 0
) -> tuple[list[float], float]:
    """Returns the mean loss of every epoch, and the accuracy of retrieval on 300 held-out images.

    dim: dimension of both features.
    seed: seeds the weights, the order of images and the wordings.
    """
    torch.manual_seed(seed)
    digits = load_digits()
    pixels = np.repeat(digits.images[:, None] / 8 - 1, 3, axis=1)
    images = torch.from_numpy(pixels).float()  # (1797, 3, 8, 8), values in [-1, 1]
    labels = torch.from_numpy(digits.target)  # (1797,)
    texts = descriptions()  # (40, words)

    # Two encoders, and the logarithm of the scale (1 / temperature). CLIP starts at 1 / 0.07.
    image_encoder = build_encoder("resnet_tiny")(num_classes=dim)
    text_encoder = nn.Sequential(nn.Linear(len(WORDS), 64), nn.ReLU(), nn.Linear(64, dim))
    log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
    parameters = [*image_encoder.parameters(), *text_encoder.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)

    losses = []
    for epoch in range(epochs):
        order = torch.randperm(len(images) - 300)
        total, steps = 0.0, len(order) // batch_size
        for step in range(steps):
            # Each image meets a random wording of its digit.
            chosen = order[step * batch_size : (step + 1) * batch_size]
            wording = torch.randint(len(WORDINGS), (batch_size,))
            image_features = F.normalize(image_encoder(images[chosen]), dim=1)
            text_features = F.normalize(
                text_encoder(texts[labels[chosen] * len(WORDINGS) + wording]), dim=1
            )
            # CLIP limits the scale to 100. A larger scale makes training unstable.
            loss = clip_loss(image_features, text_features, log_scale.exp().clamp(max=100))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / steps)
        print(f"epoch {epoch + 1}  loss {losses[-1]:.3f}  scale {log_scale.exp().item():.1f}")

    # Retrieval: the nearest of the 40 descriptions for every held-out image.
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
