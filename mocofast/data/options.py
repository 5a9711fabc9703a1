"""The options of `mocofast prepare` and `mocofast stats`, apart from what loads PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from mocofast.data_config import ReadingOptions
from mocofast.option import option


@dataclass
class PrepareConfig(ReadingOptions):
    """A compact copy of a folder of images, as tar shards that are
    smaller and decode faster.

    Measured on 125 photos (median short side 375 pixels), two random crops of 20 to 100% of
    the area per photo, views of 224 pixels. With the defaults the copy has half the bytes,
    decoding takes half the time, and the whole DALI loader a fifth less CPU time. The views
    differ from the views of the originals by 2.6 of 255 on average (PSNR 37.6 dB), because
    crops that were shrunk to 224 pixels before are enlarged now. With --size 384 the
    difference is .7 (48 dB), and decoding takes .83 of the time. The effect on a trained
    encoder was not measured.
    """

    size: int = option(256, "short side of the stored images, in pixels; larger images are shrunk")
    quality: int = option(95, "JPEG quality of shrunk images, 1 to 100")
    shard_mb: int = option(1024, "size of a shard, in MB; the next image begins a new shard")
    range: str = option("auto", "the numbers that mean black and white, as data.range")
    workers: int = option(-1, "number of threads; -1 takes all cores")


@dataclass
class StatsConfig(ReadingOptions):
    """The channel means, deviations and ranges of a set of images.

    Prints the options to paste into a `mocofast pretrain` command. Every image has the same
    weight. MoCo trains better where the means and deviations are those of the set.
    """

    images: int = option(1000, "number of images to measure, from everywhere in the set; 0 is all")
    range: str = option(
        "auto", "as data.range; auto measures the numbers, and suggests a range where one is needed"
    )
    percentiles: tuple[float, float] = option(
        (0.0, 0.0),
        "such as 1,99: the range is from one percentile of the set's numbers to the other, a pair "
        "a channel; 0,0 leaves the range as above",
    )
    channels: int = option(3, "channels of an image, as data.channels")
    source: str = option("folder", "as data.source")
    workers: int = option(-1, "number of threads; -1 takes all cores")
