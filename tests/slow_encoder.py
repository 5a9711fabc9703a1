"""An encoder of few weights whose evaluation takes long: half a second of a core an image."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn


class SlowInEvaluation(nn.Module):
    """Repeats a convolution in evaluation. A training step stays fast, and a checkpoint small."""

    def __init__(self, num_classes: int, repeats: int = 30) -> None:
        super().__init__()
        self.repeats = repeats
        self.stem = nn.Conv2d(3, 32, 1)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images if not self.training else images[..., ::8, ::8])
        for _ in range(1 if self.training else self.repeats):
            x = self.conv(x).relu_()
        return self.fc(x.mean((2, 3)))


def build_encoder(image_size: int) -> partial[SlowInEvaluation]:
    return partial(SlowInEvaluation)
