"""Pictures of images: pixels of any kind as RGB, and sheets of view pairs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mocofast.files import refusal

log = logging.getLogger("mocofast")

COLUMNS = 8  # pairs on a sheet
SIDES = (64, 128)  # smallest and largest side of a view on a sheet, in pixels
GAP, TEXT = 4, 18  # between views, and height of a line of text, in pixels


def as_rgb(images: Tensor) -> np.ndarray:
    """Returns pixels (N, S, S, 3) uint8 to look at.

    images: (N, C, S, S), uint8, uint16, or floats, whose range over the batch becomes 0 to 255.
    One channel becomes gray. Of two channels, and of more than three, the first is shown in gray.
    """
    shown = images[:, :3] if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
    shown = shown.detach().cpu()
    if shown.dtype == torch.uint16:
        shown = shown.float() / 257
    elif shown.is_floating_point():
        low, high = shown.amin().float(), shown.amax().float()
        shown = (shown.float() - low) * 255 / (high - low).clamp_min(1e-6)
    return shown.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def scaled(pixels: np.ndarray, side: int) -> Image.Image:
    """Returns an image of `side` pixels. Small images keep their pixels as blocks.

    pixels: (S, S, 3) uint8.
    """
    method = Image.Resampling.NEAREST if len(pixels) < side else Image.Resampling.BICUBIC
    return Image.fromarray(pixels).resize((side, side), method)


def write_views(views: Sequence[Tensor], path: Path) -> None:
    """Writes `sheet_of` the views as a PNG file.

    A file that the system refuses is only said in the log.
    """
    try:
        sheet_of(views).save(path)
    except OSError as error:
        log.warning("%s", refusal(path, error))


def sheet_of(views: Sequence[Tensor]) -> Image.Image:
    """Returns a picture of the views of a few images: a column for an image, a row for a view.

    views: every view (N, C, S, S), as the loader gives them, before the normalisation.
    """
    sizes = sorted({view.shape[-1] for view in views}, reverse=True)
    side = min(max(SIDES[0], sizes[0]), SIDES[1])
    count = min(COLUMNS, len(views[0]))
    sheet = Image.new("RGB", (count * (side + GAP) + GAP, len(views) * (side + GAP) + TEXT + GAP))
    words = "Both views, a column for an image" if len(views) == 2 else "Views of images"
    draw = ImageDraw.Draw(sheet)
    pixels = " and ".join(f"{size} x {size}" for size in sizes)
    draw.text((GAP, 3), f"{words}: as the encoder sees them, {pixels} pixels", "white")
    for row, view in enumerate(views):
        shown = round(side * view.shape[-1] / sizes[0])  # small views look small
        for column, image in enumerate(as_rgb(view[:count])):
            place = (GAP + column * (side + GAP), TEXT + GAP + row * (side + GAP))
            sheet.paste(scaled(image, shown), place)
    return sheet
