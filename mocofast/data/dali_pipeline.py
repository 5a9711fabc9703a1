"""The pipeline of DALI operators: decodes images, and on a GPU crops and resizes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from mocofast.config import AugmentConfig, DataConfig


@pipeline_def
def decode_and_crop(
    read: Callable[[], list[Any]],
    augments: Sequence[AugmentConfig],
    on_gpu: bool,
    kind: type,
    data: DataConfig,
    files: int = 1,
) -> tuple[Any, ...]:
    """Builds the pipeline. DALI's decorator adds the arguments of `nvidia.dali.Pipeline`.

    read: returns the input of a batch: the images of every file of a sample and, if `on_gpu`, for
        every view the corners (B, 2) and the shapes (B, 2) of the crops, int32.
    kind: np.ndarray for levels of 8 or 16 bits and any number of channels, bytes for contents of
        files.
    data: options `hw_decoder_load` and `preallocate`.
    files: of a sample. View v shows file v, modulo `files`.

    Output on a CPU: the decoded images, (H, W, C), of every file of a sample.
    Output on a GPU: for every view the resized crops, (B, H, W, C).
    """
    num_boxes = 2 * len(augments) if on_gpu else 0
    layout = files * ["HWC"] + num_boxes * [""] if kind is np.ndarray else None
    inputs = fn.external_source(
        source=read, num_outputs=files + num_boxes, batch=True, layout=layout
    )
    images, boxes = inputs[:files], inputs[files:]
    # Decode.
    if kind is not np.ndarray:
        images = [
            fn.decoders.image(
                file,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                hw_decoder_load=data.hw_decoder_load,
                preallocate_width_hint=data.preallocate[0],
                preallocate_height_hint=data.preallocate[1],
                jpeg_fancy_upsampling=True,  # as libjpeg: a CPU and a GPU decode to the same pixels
            )
            for file in images
        ]
    elif on_gpu:
        images = [file.gpu() for file in images]
    if not on_gpu:
        return tuple(images)
    # Crop with a slice before the resize. The resize has a region of interest of its own,
    # but its filter would read pixels outside of the crop.
    return tuple(
        fn.resize(
            fn.slice(images[view % files], corner, shape, axes=(0, 1)),
            size=augment.shape,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        for view, (corner, shape, augment) in enumerate(zip(boxes[::2], boxes[1::2], augments))
    )
