"""The page that every run writes at its end: made in a second or two, from what is in memory."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from mocofast.config import Config, ConfigError
from mocofast.data.interface import Source
from mocofast.report.gallery import initial_encoder, make_gallery
from mocofast.report.page import load_run, write_page
from mocofast.report.parts import PAGE

log = logging.getLogger("mocofast")

IMAGES, SECONDS = 300, 1.0  # `mocofast report` takes more of both, and t-SNE


def write_at_end(
    folder: Path, source: Source, config: Config, encoder: nn.Module, device: torch.device
) -> str:
    """Writes the page into a run folder. Returns its name, or "" after a warning why not.

    source: the training images. encoder: as trained, on `device`.
    """
    try:
        first = initial_encoder(config, len(source), len(source.classes)).to(device)
        encoders = {"before": first, "after": encoder}
        gallery = make_gallery(source, config, encoders, device, SECONDS, most=IMAGES, tsne=False)
        run = load_run(folder)._replace(gallery=gallery, note="" if gallery else "No images.")
        write_page([run], folder / PAGE)
    except (OSError, ValueError, RuntimeError, ConfigError) as error:
        log.warning("no %s: %s", PAGE, str(error).splitlines()[0])
        return ""
    return PAGE
