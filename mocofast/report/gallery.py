"""A few hundred images of a set: thumbnails, neighbours before and after training, and a map."""

from __future__ import annotations

import base64
import copy
import io
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mocofast.config import Config
from mocofast.data.interface import Source
from mocofast.data.loaders import eval_batches
from mocofast.data.sources import Subset
from mocofast.device import run_autocast
from mocofast.errors import printable
from mocofast.evaluate.features import embed, evaluating
from mocofast.methods.build import build_method
from mocofast.models.pixels import pixel_statistics
from mocofast.report.pictures import as_rgb, scaled

IMAGES = 600  # in a gallery
QUERIES, NEIGHBOURS = 8, 6
BATCH = 32  # images that are embedded at once: the time is looked at after every batch
SIDE = 56  # pixels of a thumbnail, at most
SPRITE_COLUMNS = 25


class Gallery(NamedTuple):
    """N images of a set, and what encoders make of them.

    names, classes: N names of files and of classes ("" without labels).
    sprite: a data URL of all thumbnails in rows of SPRITE_COLUMNS. side: of a thumbnail, pixels.
    queries: numbers of the images on the sheet of neighbours. neighbours: for every encoder the
    nearest images of each query, nearest first, (QUERIES, NEIGHBOURS). agreement: for every
    encoder the share of neighbours of the query's class, over all images. {} without labels.
    points: (N, 2), from 0 to 1. method: how the map was made.
    """

    names: list[str]
    classes: list[str]
    sprite: str
    side: int
    queries: list[int]
    neighbours: dict[str, np.ndarray]
    agreement: dict[str, float]
    points: np.ndarray
    method: str


def initial_encoder(config: Config, images: int, classes: int) -> nn.Module:
    """Returns the encoder with the random weights that the run's seed gives.

    images, classes: numbers of the training set.
    A run builds its method in the same way, so these are its weights before the first step, unless
    it started from a file (--init). The random state of the process stays.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return build_method(config, images, classes).encoder_q


def make_gallery(
    source: Source,
    config: Config,
    encoders: Mapping[str, nn.Module],
    device: torch.device,
    seconds: float,
    most: int = IMAGES,
    tsne: bool = True,
    kilobytes: int = 1500,
) -> Gallery | None:
    """Embeds a random sample of a set with every encoder. None for fewer than two good images.

    encoders: {"before": ..., "after": ...}. The last encoder makes the map.
    seconds: for the embedding, at most. The gallery then has fewer images.
    most: images. tsne: make the map by t-SNE, where scikit-learn is installed, else by PCA.
    kilobytes: of the sprite, about.
    """
    rng = np.random.default_rng(config.train.seed)
    chosen = rng.permutation(len(source))[:most]  # in random order: any first part is a sample
    sample = Subset(source, chosen)
    end = time.monotonic() + seconds
    data, size = config.data, config.augment.size
    mean, std = (x.to(device) for x in pixel_statistics(config.augment))
    autocast = run_autocast(config, next(iter(encoders.values())), device)
    features: dict[str, list[Tensor]] = {name: [] for name in encoders}
    pixels, numbers = [], []
    for images, _, index in eval_batches(sample, size, BATCH, data.workers, device, data.channels):
        for name, encoder in encoders.items():
            with evaluating(encoder), torch.no_grad(), copy.copy(autocast):
                found = embed(encoder, images, mean, std, config.knn.features)
            features[name].append(F.normalize(found.float().cpu(), dim=1))
        pixels.append(as_rgb(images))
        numbers += chosen[index.numpy()].tolist()
        if time.monotonic() > end and len(numbers) >= 2:
            break
    if len(numbers) < 2:
        return None
    vectors = {name: torch.cat(parts) for name, parts in features.items()}
    labels = None if source.labels is None else np.asarray(source.labels)[numbers]
    sprite, side = _sprite(np.concatenate(pixels), kilobytes)
    queries = list(range(min(QUERIES, len(numbers) - 1)))
    nearest = {name: _nearest(x) for name, x in vectors.items()}
    points, method = place(list(vectors.values())[-1].numpy(), tsne)
    return Gallery(
        [printable(source.name(number)) for number in numbers],
        [printable(source.classes[i]) if i >= 0 else "" for i in labels]
        if labels is not None and source.classes
        else [""] * len(numbers),
        sprite,
        side,
        queries,
        {name: found[queries] for name, found in nearest.items()},
        {} if labels is None else {name: _agreement(f, labels) for name, f in nearest.items()},
        points,
        method,
    )


def _nearest(vectors: Tensor) -> np.ndarray:
    """Returns the nearest other images of every image, (N, k), by cosine. vectors: (N, D)."""
    similar = (vectors @ vectors.T).nan_to_num().fill_diagonal_(-2)
    return similar.topk(min(NEIGHBOURS, len(vectors) - 1), 1).indices.numpy()


def _agreement(nearest: np.ndarray, labels: np.ndarray) -> float:
    known = labels >= 0
    return float((labels[nearest] == labels[:, None])[known].mean()) if known.any() else 0.0


def place(vectors: np.ndarray, tsne: bool) -> tuple[np.ndarray, str]:
    """Returns places of vectors (N, D) on a map, (N, 2) from 0 to 1, and the name of the method."""
    centred = np.nan_to_num(vectors - vectors.mean(0)).astype(np.float64)
    points = None
    if tsne and len(vectors) >= 12 and centred.any():
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            pass
        else:
            perplexity = min(30.0, (len(vectors) - 1) / 3)
            maker = TSNE(perplexity=perplexity, init="pca", metric="cosine", random_state=0)
            points, method = maker.fit_transform(centred.astype(np.float32)), "t-SNE"
    if points is None:
        left, values, _ = np.linalg.svd(centred, full_matrices=False)
        points, method = np.zeros((len(vectors), 2)), "PCA"
        found = (left * values)[:, :2]
        points[:, : found.shape[1]] = found
    low, high = points.min(0), points.max(0)
    return (points - low) / np.maximum(high - low, 1e-9), method


def _sprite(pixels: np.ndarray, kilobytes: int) -> tuple[str, int]:
    """Returns a data URL with all images in one picture, and the side of an image, in pixels."""
    side = min(SIDE, max(pixels.shape[1:3]))
    tiny = side <= 16  # pixels that one can count: no JPEG
    rows = -(-len(pixels) // SPRITE_COLUMNS)
    sheet = Image.new("RGB", (SPRITE_COLUMNS * side, rows * side))
    for i, image in enumerate(pixels):
        row, column = divmod(i, SPRITE_COLUMNS)
        picture = scaled(image, side)
        margins = [(side - each) // 2 for each in picture.size]
        sheet.paste(picture, (column * side + margins[0], row * side + margins[1]))
    for quality in (80, 60, 40, 20):
        url = data_url(sheet, "PNG" if tiny else "JPEG", quality)
        if len(url) <= 1000 * kilobytes:
            break
    return url, side


def data_url(image: Image.Image, kind: str, quality: int = 85) -> str:
    """Returns an image as a data URL. kind: PNG or JPEG."""
    content = io.BytesIO()
    image.save(content, kind, quality=quality, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
