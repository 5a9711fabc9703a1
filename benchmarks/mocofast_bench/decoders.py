"""Decoders of JPEG files on a CPU: the one of the DALI loader beside others.

mocofast: the pipeline of the DALI loader, with a thread.
DALI: a pipeline that only decodes, upsampling as libjpeg does, with a thread.
torchvision, PIL: an image at a time.
imagecodecs: libjpeg-turbo, an image at a time, if installed.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from mocofast.config import DataConfig
from mocofast.data.dali_pipeline import decode_and_crop
from mocofast_bench.timing import Call

BATCH = 32  # files that DALI decodes together
# Levels of 255. torchvision's libjpeg was seen to differ by 2 in a photo of 500.
ROUNDING = 2


class Decoder(NamedTuple):
    """A side."""

    decode: Call  # decodes all files
    pixels: Callable[[], Iterator[np.ndarray]]  # decodes all files and yields RGB (H, W, 3)


def build_sides(files: Sequence[bytes]) -> dict[str, Decoder]:
    """Returns {side: its decoder}. files: contents of JPEG files."""
    options = {
        "batch_size": min(BATCH, len(files)),
        "num_threads": 1,
        "device_id": None,
        "prefetch_queue_depth": 1,  # nothing is decoded while another side is timed
        "exec_dynamic": True,
    }
    sides = {
        "mocofast": _of_pipeline(
            files,
            lambda read: decode_and_crop(read, (), False, bytes, DataConfig(path="."), **options),
        ),
        "DALI": _of_pipeline(files, lambda read: _only_decode(read, **options)),
        "torchvision": _of_function(files, _torchvision),
        "PIL": _of_function(files, _pil),
    }
    if find_spec("imagecodecs"):
        import imagecodecs

        def decode(file: bytes) -> np.ndarray:
            return np.asarray(imagecodecs.jpeg8_decode(file, outcolorspace="rgb"))

        sides["imagecodecs"] = _of_function(files, decode)
    return sides


def check_equal(files: Sequence[bytes], sides: Mapping[str, Decoder]) -> None:
    """Raises RuntimeError if a side decodes a file to other pixels than PIL.

    Of our side every level must be equal. Others may round otherwise, by at most ROUNDING.
    """
    expected = [_pil(file).astype(np.int16) for file in files]
    for side, decoder in sides.items():
        most = 0 if side == "mocofast" else ROUNDING
        for number, (got, pixels) in enumerate(zip(decoder.pixels(), expected, strict=True)):
            if got.shape != pixels.shape or np.abs(got - pixels).max() > most:
                raise RuntimeError(f"{side} decodes file {number} to other pixels than PIL")


def _of_function(files: Sequence[bytes], decode: Callable[[bytes], np.ndarray]) -> Decoder:
    def decode_all() -> None:
        for file in files:
            decode(file)

    return Decoder(decode_all, lambda: map(decode, files))


def _torchvision(file: bytes) -> np.ndarray:
    from torchvision.io import ImageReadMode, decode_image

    content = torch.frombuffer(bytearray(file), dtype=torch.uint8)
    pixels: np.ndarray = decode_image(content, ImageReadMode.RGB).permute(1, 2, 0).numpy()
    return pixels


def _pil(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


@pipeline_def
def _only_decode(read: Callable[[], list[Any]]) -> Any:
    return fn.decoders.image(
        fn.external_source(source=read, num_outputs=1, batch=True)[0],
        device="cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )


def _of_pipeline(
    files: Sequence[bytes], build: Callable[[Callable[[], list[Any]]], Any]
) -> Decoder:
    """Returns a decoder that runs a pipeline. build: given the function that reads a batch."""
    batches = [
        [np.frombuffer(file, np.uint8) for file in files[first : first + BATCH]]
        for first in range(0, len(files), BATCH)
    ]
    endless = itertools.cycle(batches)
    pipeline = build(lambda: [next(endless)])
    pipeline.build()

    def decode_all() -> None:
        for _ in batches:
            pipeline.run()

    def pixels() -> Iterator[np.ndarray]:
        for _ in batches:
            (images,) = pipeline.run()
            yield from (np.array(images[i]) for i in range(len(images)))

    return Decoder(decode_all, pixels)
