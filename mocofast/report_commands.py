"""The commands that show pictures: `mocofast report` and `mocofast views`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mocofast import settings
from mocofast.config import AugmentConfig, ConfigError, DataConfig
from mocofast.parser import Parser, add_device, add_settings, given_settings
from mocofast.view_sizes import pixels_text

if TYPE_CHECKING:
    import torch

    from mocofast.report.page import Run

SECONDS = 12.0  # for the embeddings of all runs together
MEGABYTES = 3.6  # of thumbnails of all runs together, in base64


def report(argv: Sequence[str]) -> int:
    """a page about one run or several: verdict, curves, views, neighbours, a map"""
    parser = Parser(
        prog="mocofast report",
        description="Writes one HTML file that opens from the disk, without a network: the verdict "
        "first, curves, view pairs, nearest neighbours before and after, a map of the embeddings, "
        "settings and machine. Of runs of detect and segment: figures, predictions, classes. "
        "Several runs stand side by side.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--out", metavar="FILE", default="", help="the file to write [RUN/report.html of the first]"
    )
    parser.add_argument(
        "--data.path",
        metavar="PATH",
        dest="path",
        default="",
        help="where the images are now, if they have moved",
    )
    add_device(parser)
    given = parser.parse(argv)
    from mocofast import files
    from mocofast.detection.page import load_task_run, task_of_folder, write_task_page
    from mocofast.detection.page import verdict as verdict_of_task
    from mocofast.device import choose_device
    from mocofast.report.page import write_page
    from mocofast.report.parts import PAGE

    folders = [Path(name) for name in given.runs]
    for folder in folders:
        if not folder.is_dir():
            raise NotADirectoryError(f"there is no run folder {str(folder)!r}")
    device = choose_device(given.device)
    out = Path(given.out) if given.out else folders[0] / PAGE
    files.require_writable(out.parent, "--out")
    tasks = {folder: task_of_folder(folder) or "pretrain" for folder in folders}
    if len({*tasks.values()}) > 1:
        kinds = "; ".join(f"{folder}: {task}" for folder, task in tasks.items())
        raise ConfigError(f"RUN: expected runs of one command, to compare on a page, got {kinds}")
    out.parent.mkdir(parents=True, exist_ok=True)
    if "pretrain" not in tasks.values():
        task_runs = [load_task_run(folder) for folder in folders]
        write_task_page(task_runs, out)
        for each in task_runs:
            print(f"{each.name}: {verdict_of_task(each)[1]}")
        return _written(out)
    runs = [_run(folder, given.path, device, len(folders)) for folder in folders]
    write_page(runs, out)
    from mocofast.health.verdict import verdict

    for run in runs:
        print(f"{run.name}: {verdict(run.evidence)}")
        if run.note:
            print(f"{run.name}: {run.note}")
    return _written(out)


def _written(out: Path) -> int:
    print(f"written: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


def _run(folder: Path, path: str, device: torch.device, runs: int) -> Run:
    """Returns a run with its gallery, or with the reason why there is none.

    path: of the images, or "" for the path of the run. runs: that share the time and the bytes.
    """
    from mocofast.data.sources import load_datasets
    from mocofast.report.gallery import initial_encoder, make_gallery
    from mocofast.report.page import load_run
    from mocofast.train.checkpoint import load_checkpoint, model_from_checkpoint

    known = load_run(folder)
    try:
        state = load_checkpoint(folder)
        model, config = model_from_checkpoint(state)
        if path:
            config.data.path = path
        datasets = load_datasets(config.data, config.train.seed)
        sizes = state.get("sizes", {})
        first = initial_encoder(config, sizes.get("images", 0), sizes.get("classes", 0))
        gallery = make_gallery(
            datasets.train,
            config,
            {"before": first.to(device), "after": model.encoder_q.to(device)},
            device,
            SECONDS / runs,
            kilobytes=int(1000 * MEGABYTES / runs),
        )
    except (ConfigError, OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return known._replace(note=f"no neighbours and no map: {reason}")
    note = "" if gallery else "no neighbours and no map: fewer than two images can be read"
    return known._replace(gallery=gallery, note=note)


def views(argv: Sequence[str]) -> int:
    """what augmentations make of images, before anything is trained: a picture"""
    parser = Parser(
        prog="mocofast views",
        usage="mocofast views [PATH] [--recipe NAME] [--out FILE] [--OPTION VALUE ...]",
        description="Writes a picture of view pairs, as the encoder would see them. Trains nothing."
        "\nWithout --recipe the settings fit the images, as `mocofast pretrain PATH` fits them.",
        often=("--recipe", "--out", "--augment.size", "--augment.crop_scale"),
        examples=(
            "mocofast views PHOTOS",
            "mocofast views PHOTOS --recipe moco_v2_r50_200ep --augment.crop_scale 0.4,1",
        ),
    )
    parser.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="the images, as data.path, or a run folder, whose images and settings are taken",
    )
    parser.add_argument("--recipe", metavar="NAME", help="a recipe, a .yaml file, or a run folder")
    parser.add_argument(
        "--out", metavar="FILE", default="views.png", help="the picture to write [views.png]"
    )
    without = ("data.batch_size", "data.checksum", "data.drop_last")
    add_settings(parser, {"data": DataConfig, "augment": AugmentConfig}, without)
    given = parser.parse(argv)
    import torch

    from mocofast import files
    from mocofast.data.interface import BatchSlice, view_augments
    from mocofast.data.loaders import build_loader
    from mocofast.data.sources import load_datasets
    from mocofast.report.pictures import COLUMNS, sheet_of
    from mocofast.train import auto, configure

    out = Path(given.out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out: expected a name in .png, got {given.out!r}")
    files.require_writable(out.parent, "--out")
    recipe, place, options = given.recipe, given.path or "", given_settings(given)
    if recipe is None and configure.is_run_folder(place):
        recipe, place = place, ""
    if recipe and (Path(recipe) / "config.yaml").is_file():
        recipe = os.path.join(recipe, "config.yaml")
    config = configure.configure(recipe, "", options, place, check=False)
    datasets = load_datasets(config.data, config.train.seed)
    device = torch.device("cpu")
    if config.recipe == configure.AUTO and "augment.size" not in options:
        side = auto.short_side(datasets.train, config.data.channels)
        largest = auto.LARGEST_VIEW["cuda" if torch.cuda.is_available() else "cpu"]
        config.augment.size = auto.view_size(side, largest)
    settings.validate(config)
    augment = config.augment
    count = min(COLUMNS, len(datasets.train))
    loader = build_loader(
        datasets.train,
        config.data,
        view_augments(augment, 2),
        BatchSlice(count),
        config.train.seed,
        device,
    )
    try:
        batch = next(iter(loader.epoch(0)))
    finally:
        loader.close()
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet_of(batch.views).save(out)
    print(datasets.lines())
    sizes = f"views of {pixels_text(augment.size)} pixels"
    if augment.local_crops:
        sizes += f"; {augment.local_crops} of {pixels_text(augment.local_size)}"
    print(f"written: {out}, {count} images, {sizes}")
    return 0
