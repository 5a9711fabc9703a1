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
    """Returns an image whose longer side has `side` pixels. Small images keep pixels as blocks.

    pixels: (H, W, 3) uint8.
    """
    longer = max(pixels.shape[:2])
    method = Image.Resampling.NEAREST if longer < side else Image.Resampling.BICUBIC
    tall, wide = (max(1, round(side * each / longer)) for each in pixels.shape[:2])
    return Image.fromarray(pixels).resize((wide, tall), method)


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
    shapes = sorted({tuple(view.shape[2:]) for view in views}, reverse=True)
    longest = max(map(max, shapes))
    side = min(max(SIDES[0], longest), SIDES[1])
    count = min(COLUMNS, len(views[0]))
    # Small views look small.
    sides = [round(side * max(view.shape[2:]) / longest) for view in views]
    pictures = [
        [scaled(image, shown) for image in as_rgb(view[:count])]
        for view, shown in zip(views, sides)
    ]
    wide, tall = (max(row[0].size[axis] for row in pictures) for axis in (0, 1))
    words = "Both views, a column for an image" if len(views) == 2 else "Views of images"
    pixels = " and ".join(f"{height} x {width}" for height, width in shapes)
    text = f"{words}: as the encoder sees them, {pixels} pixels"
    written = round(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(text))
    size = max(count * (wide + GAP), written + GAP) + GAP, len(views) * (tall + GAP) + TEXT + GAP
    sheet = Image.new("RGB", size)
    ImageDraw.Draw(sheet).text((GAP, 3), text, "white")
    for row, pictures_of_view in enumerate(pictures):
        for column, picture in enumerate(pictures_of_view):
            place = (GAP + column * (wide + GAP), TEXT + GAP + row * (tall + GAP))
            sheet.paste(picture, place)
    return sheet
