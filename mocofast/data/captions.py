"""The captions of images: of lists and tables a column, of tar shards a member beside the image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
from torch import Tensor

from mocofast.config import ConfigError, DataConfig
from mocofast.data.finding import counted
from mocofast.data.interface import Source

if TYPE_CHECKING:
    from mocofast.data.sources import Datasets

CAPTION = ("caption", "text", "title", "description", "alt_text", "sentence")  # names of columns
LOOKED_AT = 10_000  # captions that are compared with one another


def captions_of(source: Source, index: Tensor) -> list[str]:
    """Returns the captions of some samples. index: (B,) int64 on the CPU."""
    caption = cast(Callable[[int], str], source.caption)  # type: ignore[attr-defined]
    return [caption(i) for i in index.tolist()]


def with_captions(
    datasets: Datasets, data: DataConfig, part: Callable[[Source, np.ndarray], Source]
) -> Datasets:
    """Returns the sets with the training images that have a caption, and remarks on the captions.

    part: returns some samples of a source.
    Raises ConfigError for training images without captions.
    """
    source, remarks = datasets.train, list(datasets.remarks)
    has = cast("np.ndarray | None", getattr(source, "has_caption", None))
    if has is None or not has.any():
        raise ConfigError(
            f"data.captions: model.method needs captions, and data.source={data.source} has none. "
            f"A list or a table has a column {CAPTION[0]} (--data.captions NAME for another name), "
            "tar shards have KEY.txt beside KEY.jpg"
        )
    if not has.all():
        remarks.append(f"{counted(int((~has).sum()), 'image')} without a caption left out")
        source = part(source, np.flatnonzero(has))
    return datasets._replace(train=source, remarks=(*remarks, *_repeats(source)))


def _repeats(source: Source) -> list[str]:
    """Returns a line on captions that many images share: they are negatives of one another."""
    few = np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(int)
    texts = Counter(source.caption(int(i)) for i in few)  # type: ignore[attr-defined]
    if 2 * len(texts) > len(few):
        return []
    return [
        f"{counted(len(few), 'image')} looked at have {len(texts):,} different captions: images "
        "with equal captions are negatives of one another"
    ]
