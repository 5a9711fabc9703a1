"""The options of images and views: default, meaning and valid values, in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from mocofast.option import SHARE, Valid, above, at_least, between, option
from mocofast.view_sizes import Size, as_size, height_width, last, staged, stages

_RANGE = r"auto|dtype|((divide|percentile):)?[-+.0-9e]+(,[-+.0-9e]+)*"
_FUNCTION = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*"
TABLES = ("parquet", "hf")  # names of one source
OWN_IMAGES = ("folder", "shards", "list", "zip", *TABLES)  # data.path names the user's images
SOURCES = (*OWN_IMAGES, "digits", "cifar10", "cifar100")  # mocofast.data.sources loads them
LOADERS = ("auto", "device", "dali", "torchvision")  # mocofast.data.loaders builds them


@dataclass
class ReadingOptions:
    """How files that are no photos are read."""

    reader: str = option(
        "auto",
        "who reads the files: auto (files with known extensions, by their content), any (files of "
        "all names, by their content), or a function of yours, package.module:function, which "
        "takes a path or bytes and returns an array (H, W, C)",
        valid=Valid(
            lambda value: value in ("auto", "any") or re.fullmatch(_FUNCTION, value) is not None,
            "auto, any or package.module:function",
        ),
    )
    bands: tuple[int, ...] = option(
        (),
        "channels of a file that are read, from 1, in this order, such as 4,3,2; empty reads the "
        "first data.channels",
        valid=Valid(lambda value: min(value, default=1) >= 1, "numbers of channels, from 1"),
    )
    slices: str = option(
        "auto",
        "images that a volume, stack or film gives: middle (one image), all, or BEGIN:END or "
        "BEGIN:END:STEP, from 0; auto takes all slices of NIfTI, and the middle of other files",
        valid=Valid(
            lambda value: re.fullmatch(r"auto|all|middle|\d*:\d*(:[1-9]\d*)?", value) is not None,
            "auto, all, middle, BEGIN:END or BEGIN:END:STEP",
        ),
    )
    plane: str = option("axial", "slices of NIfTI volumes", ("axial", "coronal", "sagittal"))
    window: int = option(
        0,
        "side of the windows, in pixels, that large images are cut into (GeoTIFF, slides); 0 reads "
        "whole images",
        valid=at_least(0),
    )
    stride: int = option(0, "pixels between windows; 0: as data.window", valid=at_least(0))
    level: int = option(
        0, "level of whole slides, 0 has most pixels; windows are of this level", valid=at_least(0)
    )
    cover: float = option(
        0.1,
        "least share of a window that shows tissue (slides) or values (scenes with nodata), 0 to 1",
        valid=between(0, 1, "a share, 0 to 1"),
    )


def reading_values(options: ReadingOptions) -> dict[str, Any]:
    """Returns the values of ReadingOptions, {name: value}, of options with more values."""
    return {field.name: getattr(options, field.name) for field in fields(ReadingOptions)}


@dataclass
class _SourceOptions:
    """The source of the images, and the loader that decodes them."""

    source: str = option(
        "folder",
        "folder (of images, recursive), tar shards, list (CSV or parquet, a row for every image), "
        "zip archive, parquet files with image bytes, hf (a folder of datasets.save_to_disk), "
        "embedded digits, torchvision's CIFAR, or the dotted name of a module with load_datasets",
        SOURCES,
        plugins=True,
    )
    path: str = option(
        "",
        "folder of images or of *.tar shards; shards also as a pattern or URL, x-{000..099}.tar; "
        "or a list, a zip archive, tables (a file, a pattern or a folder), or the folder of CIFAR",
    )
    train: tuple[str, ...] = option(
        (),
        "folders of training images, or sets of a list or a table; "
        "empty finds train/, training/ and unlabeled/",
    )
    val: str = option(
        "",
        "folder of evaluation images below data.path, or a set of a list or a table; "
        "empty finds val/, valid/, validation/, dev/, test/ or testing/ beside train/",
    )
    include: tuple[str, ...] = option(
        (),
        "use only files whose path below data.path (in shards: name) matches one of these "
        "patterns, such as 'images/*' or '*.tif'; * also matches /",
    )
    exclude: tuple[str, ...] = option(
        (),
        "leave out files and folders whose path matches one of these patterns, such as '*/masks'",
    )
    labels: str = option(
        "auto",
        "auto: by folders, or as the shards or the list say; none; a list with columns path "
        "and label, FILE.csv or FILE.csv:COLUMN (source=list, parquet, hf: the column); or few of "
        "the training labels: a share of every class, such as 0.01, or FILE.txt with names of "
        "images. Images without a label stay in the set",
    )
    target: str = option(
        "class",
        "what a label of a list says, for knn, linear and finetune: class, tags (several, between "
        "; | or commas; - for none) or number",
        ("class", "tags", "number"),
    )
    captions: str = option(
        "auto",
        "texts of images, for method clip: the column of a list or a table, auto (caption, text, "
        "title, ...; in shards KEY.txt), or none",
    )
    column: str = option(
        "", "source=parquet, hf: the column of images; empty finds image, img, jpg, ..."
    )
    group: str = option(
        "",
        "images that stay together in the hold-out, such as a patient's: the level of the folders "
        "that are groups (1 is the first), or the column of a list",
    )
    pairs: str = option(
        "",
        "views of a sample from two files, such as two dates of a place: folder pairs files that "
        "follow one another in a folder, or a list FILE.csv with columns path and path_2",
    )
    channels: int = option(
        3,
        "channels of an image; other numbers than 3 keep 16 bits, and read .npy files too",
        valid=between(1, 64),
    )
    shuffle_window: int = option(
        0,
        "source=shards: number of shards whose samples are shuffled together; 0 shuffles all",
        valid=at_least(0),
    )
    range: str = option(
        "auto",
        "the numbers of a file that mean black and white: auto, dtype (all that the type of number "
        "holds), min,max (0,4095), divide:N (divide:10000) or percentile:a,b of every image "
        "(percentile:1,99); a pair, or an N, per channel is allowed; auto keeps 8 and 16 unsigned "
        "bits, and takes the lowest and highest value of an image of other numbers",
        valid=Valid(
            lambda value: re.fullmatch(_RANGE, value) is not None,
            "auto, dtype, min,max, divide:N or percentile:a,b",
        ),
    )
    decode: str = option(
        "full",
        "full, or scaled: decode a JPEG at 1/2, 1/4 or 1/8 of its size where every view is at most "
        "as large as its crop there; less CPU time on large photos, slightly different pixels "
        "(needs views made on a CPU)",
        ("full", "scaled"),
    )
    depth: int = option(
        8,
        "bits of a level where data.channels is 3: 8 scales deeper files to 8 bits when they are "
        "decoded, 16 keeps their levels up to the view and beyond; views of 8 and 16 bits differ "
        "by rounding",
        valid=Valid(lambda value: value in (8, 16), "8 or 16"),
    )
    checksum: bool = option(
        False,
        "checkpoints hold a checksum of all image files, and a continued run refuses files of "
        "another content; reads every file at the start",
    )
    loader: str = option("auto", "who decodes and augments; auto says which and why", LOADERS)
    batch_size: int = option(
        256,
        "images per optimiser step, over all ranks and accumulation steps",
        valid=at_least(1),
    )
    batch_sizes: tuple[str, ...] = option(
        (),
        "images per optimiser step by epoch, multiples of batch_size: 0:256,60:512 joins two "
        "batches from epoch 60 on; the rate stays that of batch_size; empty means batch_size",
        valid=staged(
            lambda value: len(value) == 1 and value[0] >= 1 and value[0] == int(value[0]),
            "EPOCH:IMAGES,... such as 0:256,60:512 (in YAML with quotes)",
        ),
    )
    workers: int = option(
        -1, "loader threads or processes per rank; -1 takes all cores, 0 loads in the main process"
    )
    prefetch: int = option(
        2,
        "batches decoded ahead, and as many finished batches waiting (torchvision: per worker)",
        valid=at_least(1),
    )
    hw_decoder_load: float = option(
        0.65,
        "DALI on a GPU with a JPEG decoder: the decoder's share of the images, 0 to 1",
        valid=between(0, 1, "a share, 0 to 1"),
    )
    preallocate: tuple[int, int] = option(
        (0, 0),
        "DALI on a GPU: width and height of an image to reserve memory for at the start",
        valid=at_least(0),
    )
    drop_last: bool = option(True, "leave out the last batch of an epoch if it is smaller")
    holdout: float = option(
        0.1,
        "share of a labelled set without a val/ or test/ folder that is kept for kNN, 0 to 1",
        valid=SHARE,
    )


@dataclass
class DataConfig(ReadingOptions, _SourceOptions):
    """The source of the images, how files are read, and the loader that decodes them."""

    def largest_batch(self) -> int:
        """Returns the images of the largest optimiser step, over all ranks."""
        sizes = [int(size) for (size,) in stages(self.batch_sizes).values()]
        return max(sizes, default=self.batch_size)


_CROP_AREA = Valid(
    lambda value: 0 < value[0] <= value[1] <= 1, "two shares, 0 < smallest <= largest <= 1"
)
_PROBABILITY = between(0, 1, "a probability, 0 to 1")
_AS_CHANNELS = ", one value a channel of data.channels, or one value for all channels"
_PROBABILITY_OR_SAME = Valid(lambda value: value == -1 or 0 <= value <= 1, "a probability, or -1")


@dataclass
class AugmentConfig:
    """Random views. The defaults are MoCo v1's. The recipes hold the differences of v2."""

    size: int | tuple[int, int] = option(
        224,
        "side of a view in training and evaluation, in pixels, or HEIGHT,WIDTH of views that are "
        "no squares",
        valid=at_least(1),
    )
    sizes: tuple[str, ...] = option(
        (),
        "sides of the views in training by epoch: 0:96,100:160,150:224 makes views of 96 pixels "
        "from epoch 0 on, and of 160 from epoch 100 on (0:96:192 of 96 x 192); empty means size",
        valid=staged(
            lambda value: (
                len(value) in (1, 2) and all(each >= 1 and each == int(each) for each in value)
            ),
            "EPOCH:SIZE,... such as 0:96,100:224 (in YAML with quotes), or EPOCH:HEIGHT:WIDTH,...",
        ),
    )
    crop_scale: tuple[float, float] = option(
        (0.2, 1.0),
        "area of the random crop, as a share of the image",
        valid=_CROP_AREA,
    )
    crop_ratio: tuple[float, float] = option(
        (3 / 4, 4 / 3),
        "smallest and largest width / height of the random crop in the image, which is then resized"
        " to the size of a view, of any shape",
        valid=Valid(lambda value: 0 < value[0] <= value[1], "0 < smallest <= largest"),
    )
    crop_scales: tuple[str, ...] = option(
        (),
        "area of the random crop by epoch: 0:0.5:1,100:0.2:1 takes shares of 0.5 to 1 from epoch 0 "
        "on, and of 0.2 to 1 from epoch 100 on; empty means crop_scale",
        valid=staged(
            lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
            "EPOCH:SMALLEST:LARGEST,... such as 0:0.5:1,100:0.2:1 (in YAML with quotes)",
        ),
    )
    rotate: float = option(0.0, "largest random rotation in either direction, in degrees")
    flip: float = option(0.5, "probability of a horizontal flip", valid=_PROBABILITY)
    jitter: tuple[float, float, float, float] = option(
        (0.4, 0.4, 0.4, 0.4),
        "strength of brightness, contrast, saturation and hue jitter",
        valid=Valid(
            lambda value: min(value) >= 0 and value[3] <= 0.5, "at least 0; hue at most 0.5"
        ),
    )
    jitter_p: float = option(1.0, "probability of colour jitter", valid=_PROBABILITY)
    gray: float = option(0.2, "probability of grayscale", valid=_PROBABILITY)
    gray_first: bool = option(
        True, "grayscale before the colour jitter (MoCo v1) instead of after it (v2)"
    )
    blur: float = option(0.0, "probability of Gaussian blur", valid=_PROBABILITY)
    blur_sigma: tuple[float, float] = option(
        (0.1, 2.0),
        "standard deviation of the blur, in pixels",
        valid=Valid(lambda value: 0 < value[0] <= value[1], "0 < smallest <= largest"),
    )
    solarize: float = option(
        0.0, "probability of inverting all values of 128 and more", valid=_PROBABILITY
    )
    blur_2: float = option(
        -1.0,
        "probability of blur in the second view; -1: as in the first",
        valid=_PROBABILITY_OR_SAME,
    )
    solarize_2: float = option(
        -1.0,
        "probability of solarize in the second view; -1: as in the first",
        valid=_PROBABILITY_OR_SAME,
    )
    local_crops: int = option(
        0,
        "small views of an image beside the two views, as SwAV has 6; 0: none",
        valid=between(0, 64),
    )
    local_size: int | tuple[int, int] = option(
        96, "side of a small view, in pixels, or HEIGHT,WIDTH", valid=at_least(1)
    )
    local_scale: tuple[float, float] = option(
        (0.05, 0.14),
        "area of the random crop of a small view, as a share of the image",
        valid=_CROP_AREA,
    )
    vertical_flip: float = option(0.0, "probability of a vertical flip", valid=_PROBABILITY)
    quarter_turns: float = option(
        0.0, "probability of 0 to 3 turns by 90 degrees, all equally likely", valid=_PROBABILITY
    )
    channel_jitter: tuple[float, float] = option(
        (0.0, 0.0),
        "strength of brightness and contrast jitter with own factors for every channel",
        valid=at_least(0),
    )
    hed: float = option(
        0.0,
        "strength s of jitter of haematoxylin, eosin and DAB on slides: a factor in [1 - s, 1 + s] "
        "and an optical density in [-s, s] for every stain",
        valid=between(0, 1),
    )
    noise: float = option(
        0.0,
        "largest standard deviation of Gaussian noise, as a share of the range of pixels",
        valid=between(0, 1),
    )
    color_ops: str = option(
        "on",
        "hue, saturation, grayscale, solarize and hed: on, as asked (an error unless data.channels "
        "is 3), or auto, which turns all five off unless data.channels is 3",
        ("on", "auto"),
    )
    mean: tuple[float, ...] = option(
        (0.485, 0.456, 0.406),
        "channel means that normalise pixels in [0, 1]" + _AS_CHANNELS,
    )
    std: tuple[float, ...] = option(
        (0.229, 0.224, 0.225),
        "channel standard deviations that normalise pixels in [0, 1]" + _AS_CHANNELS,
        valid=above(0),
    )

    def at(self, epoch: int) -> AugmentConfig:
        """Returns the augmentation of an epoch, whose size and crop_scale follow no schedule."""
        if not self.sizes and not self.crop_scales:
            return self
        sides = last(self.sizes, epoch, height_width(self.size))
        low, high = last(self.crop_scales, epoch, self.crop_scale)
        size = as_size(int(sides[0]), int(sides[-1]))
        return replace(self, size=size, crop_scale=(low, high), sizes=(), crop_scales=())

    def local(self) -> AugmentConfig:
        """Returns the augmentation of a small view, which follows no schedule."""
        return replace(
            self,
            size=self.local_size,
            crop_scale=self.local_scale,
            sizes=(),
            crop_scales=(),
            local_crops=0,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of a view, in pixels."""
        return height_width(self.size)

    def training_sizes(self) -> tuple[Size, ...]:
        """Returns the sizes of all views of a training, in the order of the epochs.

        The size of small views comes last.
        """
        sizes: tuple[Size, ...] = tuple(self.at(epoch).size for epoch in stages(self.sizes) or (0,))
        return (*sizes, self.local_size) if self.local_crops else sizes
