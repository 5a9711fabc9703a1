"""Pretraining: one code path for a CPU, a GPU, and many processes under torchrun."""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from mocofast import __version__, distributed, settings
from mocofast.config import Config, ConfigError
from mocofast.data.interface import BatchSlice, Loader, view_augments
from mocofast.data.loaders import build_loader, count_workers
from mocofast.data.sources import load_datasets
from mocofast.device import choose_autocast, choose_device, choose_threads
from mocofast.evaluate.monitor import KNNMonitor
from mocofast.methods.build import build_method
from mocofast.optim.schedule import key_momentum, learning_rate, scaled_by_batch, set_learning_rate
from mocofast.plots import plot_curves
from mocofast.step_parts import step_part
from mocofast.train.checkpoint import FORMAT, LAST, CheckpointWriter
from mocofast.train.engine import Engine, choose_mode, garbage_collection_paused
from mocofast.train.interrupt import StopRequest
from mocofast.train.metrics import Window, duration, memory_gib
from mocofast.train.optimizer import optimizer_of
from mocofast.train.profile import STEPS, StepProfiler
from mocofast.train.resume import check_same_run, find_checkpoint, random_state, set_random_state
from mocofast.train.run_folder import RunFolder, choose_folder

log = logging.getLogger("mocofast")


class Result(NamedTuple):
    """How a run ended."""

    folder: Path
    step: int
    interrupted: bool  # by a signal; the checkpoint holds where
    before: dict[str, float]  # kNN figures of the random encoder; empty without labels
    after: dict[str, float]


def train(config: Config, resume: str = "", profile: bool = False) -> Result:
    """Runs `config` from its start, or from a checkpoint.

    resume: "" for a new run, "auto" for the newest checkpoint of the run folder (a new run if there is none),
    or the path of a checkpoint or run folder. profile: rank 0 also looks at a few of its steps and writes
    mocofast.train.profile.FILES into the run folder; what is computed stays the same.
    """
    device = choose_device(config.train.device)
    rank, world_size, local_rank = distributed.init_from_environment(device)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:  # which torchrun sets, too
        torch.set_num_threads(choose_threads(count_workers(-1)))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    try:
        with StopRequest() as stop:
            return _Run(config, resume, device, rank, world_size, profile).train(stop)
    finally:
        distributed.shutdown()


class _Run:
    """The objects of one run and its loop."""

    def __init__(
        self,
        config: Config,
        resume: str,
        device: torch.device,
        rank: int,
        world_size: int,
        profile: bool,
    ) -> None:
        self.config, self.device, self.rank, self.world_size = config, device, rank, world_size
        self.path = path = distributed.from_main(
            choose_folder(config, bool(resume)) if rank == 0 else None
        )
        state = find_checkpoint(path, resume)
        if state is not None:
            check_same_run(config, state)
        elif (path / "checkpoints" / LAST).exists():
            raise ConfigError(
                f"train.dir: {path} holds a run already; --resume auto continues it, another --train.dir starts anew"
            )

        if rank:  # rank 0 may have to download the images
            distributed.barrier()
        datasets = load_datasets(config.data, config.train.seed)
        if rank == 0:
            distributed.barrier()
        self.sizes = {"images": len(datasets.train), "classes": len(datasets.train.classes)}

        mode, self.why_mode = choose_mode(config.engine.mode, device, world_size)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = (
                True  # every batch but an epoch's last has the same shape
            )
        torch.manual_seed(config.train.seed)
        self.model = build_method(config, **self.sizes).to(device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        self.optimizer = optimizer_of(self.model, config.optim)
        self.autocast = choose_autocast(config.train.precision, device)
        self.loader: Loader = build_loader(
            datasets.train,
            config.data,
            view_augments(config.augment, self.model.num_views),
            BatchSlice(config.data.batch_size, rank, world_size, config.data.drop_last),
            config.train.seed,
            device,
        )
        self.source, self.note = datasets.train, datasets.note
        self.monitor = KNNMonitor.of(datasets, config, device)

        self.steps_per_epoch = self.loader.steps_per_epoch
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.schedule = scaled_by_batch(config.optim, config.data.batch_size)
        self.step = self.epoch = self.step_in_epoch = 0
        self.window = Window(device)
        self.due: Callable[[], None] | None = None  # a line whose figures the device still computes
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        if state is not None:
            self._restore(state)
        # From here on nothing refuses the configuration, so a refused one leaves no files behind.
        self.folder = (
            RunFolder(path, config, state["step"] if state else None) if rank == 0 else None
        )
        images = config.data.batch_size // world_size // config.train.accumulate
        self.engine = Engine(
            mode, self.model, self.optimizer, self.autocast, config.train.accumulate, images
        )
        self.profiler = (
            StepProfiler(self.model, self.optimizer, self.autocast, config)
            if profile and not rank
            else None
        )
        self.writer = (
            CheckpointWriter(path / "checkpoints", config.checkpoint.keep) if rank == 0 else None
        )
        self._announce(path, state)

    # ---- the loop ----

    def train(self, stop: StopRequest) -> Result:
        """Trains to the end, to train.max_steps, or until a signal; always leaves a checkpoint."""
        limit = self.config.train.max_steps or self.total_steps
        interrupted = False
        began, first_step = time.perf_counter(), self.step
        try:
            if self.step == 0:
                self.before = self.after = self._evaluate()
            saved_at = -1
            with self._progress_bar(limit) as bar, garbage_collection_paused():
                self.window.restart_clock()
                while self.step < min(limit, self.total_steps) and not interrupted:
                    for _ in self._epoch(limit):
                        bar.update()
                        self._write_line()
                        interrupted = stop.agreed()
                        if (
                            self.step % self.config.train.log_every == 0
                            or self.step == self.total_steps
                        ):
                            elapsed = time.perf_counter() - began
                            self._log(
                                bar,
                                elapsed / (self.step - first_step) * (self.total_steps - self.step),
                            )
                        end = self.step_in_epoch == self.steps_per_epoch
                        if end:
                            self._end_epoch()
                        if self._checkpoint_due(end) or interrupted:
                            self._save()
                            saved_at = self.step
                            gc.collect()
                        if interrupted:
                            break
                self._write_line()
            if saved_at != self.step:
                self._save()
            if (
                self.window.steps
            ):  # the next line's averages so far; they stay in the window, for a continued run
                loss = self.window.means()()["loss"]
                log.info("loss %.3f over the last %d steps", loss, self.window.steps)
            self._finish(interrupted, time.perf_counter() - began)
        finally:
            self.loader.close()
            if self.writer is not None:
                self.writer.wait()
            if self.folder is not None:
                self.folder.close()
        return Result(self.path, self.step, interrupted, self.before, self.after)

    def _epoch(self, limit: int) -> Iterator[None]:
        """Trains through the rest of the current epoch; yields after every step."""
        batches = self.loader.epoch(self.epoch, self.step_in_epoch)
        while self.step < limit:
            if self.profiler is not None:
                self.profiler.begin()
            asked = time.perf_counter()
            with step_part("data wait"):
                batch = next(batches, None)
                views = (
                    tuple(view.to(self.device, non_blocking=True) for view in batch.views)
                    if batch
                    else ()
                )
            waited = time.perf_counter() - asked
            if batch is None:
                if self.profiler is not None:
                    self.profiler.abandon()
                return
            self.rate = learning_rate(
                self.schedule, self.step, self.steps_per_epoch, self.config.train.epochs
            )
            set_learning_rate(self.optimizer, self.rate)
            # The average that ends this step is the one that MoCo v3 takes as the next step begins.
            self.optimizer.ema_momentum = key_momentum(
                self.config.model, self.step + 1, self.total_steps
            )
            fields = {
                name: getattr(batch, name).to(self.device, non_blocking=True)
                for name in self.model.batch_fields
            }
            metrics = self.engine.step(views, fields)
            self.step += 1
            self.step_in_epoch += 1
            self.window.add(metrics, len(views[0]) * self.world_size, waited)
            if self.profiler is not None:
                ended = time.perf_counter()
                if self.profiler.end():
                    self.profiler.write(self.path)
                    log.info("profile of a step: %s", self.path / "profile.png")
                    self.profiler = None
                self.window.leave_out(time.perf_counter() - ended)
            yield

    def _end_epoch(self) -> None:
        self._write_line()  # before what takes its time
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        every = self.config.knn.every
        if self.epoch == self.config.train.epochs or (every and self.epoch % every == 0):
            self.after = self._evaluate()

    # ---- what it writes ----

    def _log(self, bar: tqdm[Any], remaining: float) -> None:
        """A line on the steps so far, which `_write_line` reads and writes when the device has the next one to do."""
        self.due = functools.partial(
            self._write, bar, self.step, self.rate, remaining, self.window.flush()
        )

    def _write_line(self) -> None:
        if self.due is not None:
            self.due()
            self.due = None

    def _write(
        self,
        bar: tqdm[Any],
        step: int,
        rate: float,
        remaining: float,
        read: Callable[[], dict[str, float]],
    ) -> None:
        values = read()
        if self.folder is None:
            return
        position = step / self.steps_per_epoch
        memory = memory_gib(self.device)
        self.folder.write(
            step=step,
            epoch=position,
            lr=rate,
            chance_loss=self.model.chance_loss,
            memory_gib=memory,
            **values,
        )
        loss = f"loss {values['loss']:.3f}"
        if self.model.chance_loss is not None:
            loss += f" (chance {self.model.chance_loss:.2f})"
        shares = "".join(
            f"  acc@{k} {values[f'acc{k}']:.1%}" for k in (1, 5) if f"acc{k}" in values
        )
        line = (
            f"epoch {position:6.2f}/{self.config.train.epochs}  step {step}  {loss}{shares}  lr {rate:.4g}  "
            f"{values['images_per_second']:.0f} images/s  data wait {values['data_wait']:.0%}  "
            f"ETA {duration(remaining)}  memory {memory:.1f} GiB"
        )
        bar.set_postfix_str(loss + shares)
        log.info(
            line, extra={"on_screen": bar.disable}
        )  # beside a progress bar, in train.log alone

    def _evaluate(self) -> dict[str, float]:
        if self.monitor is None:
            return {}
        values = self.monitor.evaluate(self.model.encoder_q)
        if self.folder is not None:
            self.folder.write(step=self.step, epoch=self.step / self.steps_per_epoch, **values)
            when = "before training" if self.step == 0 else f"after epoch {self.epoch}"
            log.info("%s: %s", when, _describe(values, self.config))
        self.window.restart_clock()
        return values

    def _checkpoint_due(self, epoch_ended: bool) -> bool:
        c = self.config.checkpoint
        return bool(
            (epoch_ended and self.epoch % c.every_epochs == 0)
            or (c.every_steps and self.step % c.every_steps == 0)
        )

    def _save(self) -> None:
        """All ranks together, since each one's random state and averages are kept."""
        self._write_line()  # before what takes its time
        random_states = distributed.gather_objects(random_state(self.device))
        windows = distributed.gather_objects(self.window.state())
        skipped = {
            k: v
            for part in distributed.gather_objects(dict(self.loader.skipped))
            for k, v in part.items()
        }
        if self.writer is None or self.folder is None:
            return
        self.folder.write_skipped({self.source.name(i): why for i, why in skipped.items()})
        self.writer.save(
            {
                "format": FORMAT,
                "version": __version__,
                "config": settings.to_dict(self.config),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "epoch": self.epoch,
                "step_in_epoch": self.step_in_epoch,
                "windows": windows,
                "random_states": random_states,
                "method_random_state": self.model.random_state(),
                "data": {"fingerprint": self.source.fingerprint(), "skipped": skipped},
                "sizes": self.sizes,
                "before": self.before,
                "after": self.after,
            }
        )

    def _restore(self, state: dict[str, Any]) -> None:
        found = self.source.fingerprint()
        if state["data"]["fingerprint"] != found:
            raise ConfigError(
                f"data.path: these are not the images of the run to continue (fingerprint {found}, not "
                f"{state['data']['fingerprint']}), so it would see other batches"
            )
        self.model.load_state_dict(state["model"])
        self.model.load_random_state(state["method_random_state"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.epoch, self.step_in_epoch = (
            state["step"],
            state["epoch"],
            state["step_in_epoch"],
        )
        windows = state["windows"]
        self.window.load_state(windows[self.rank % len(windows)])
        self.before, self.after = state["before"], state["after"]
        self.loader.skipped.update(state["data"]["skipped"])
        if self.rank < len(state["random_states"]):
            set_random_state(state["random_states"][self.rank], self.device)

    def _announce(self, path: Path, state: dict[str, Any] | None) -> None:
        if self.rank:
            return
        c = self.config
        shown = "bf16 autocast" if self.autocast._enabled else "fp32"
        log.info("recipe %s: %s, %d images in %d steps an epoch, %d epochs, %s", c.recipe, c.model.arch,
                 len(self.source), self.steps_per_epoch, c.train.epochs, self.model.describe())  # fmt: skip
        log.info("data: %s", self.note)
        log.info("device %s x %d, %s; loader %s: %s", self.device, self.world_size, shown, self.loader.name,
                 getattr(self.loader, "reason", ""))  # fmt: skip
        log.info("engine %s: %s", self.engine.mode, self.why_mode)
        if self.monitor is None:
            log.info("no kNN monitor")
        log.info("writing to %s", path)
        if state is not None:
            log.info(
                "continuing at step %d, epoch %d + %d steps",
                self.step,
                self.epoch,
                self.step_in_epoch,
            )

    def _progress_bar(self, limit: int) -> tqdm[Any]:
        plain = self.rank != 0 or not sys.stderr.isatty()
        return tqdm(
            total=min(limit, self.total_steps), initial=self.step, unit="step", disable=plain
        )

    def _finish(self, interrupted: bool, seconds: float) -> None:
        if self.folder is None:
            return
        path = self.path
        assert self.writer is not None
        self.writer.wait()
        plot_curves(self.folder.metrics_path, path / "curves.png")
        log.info("%s at step %d after %s", "trained" if self.step >= self.total_steps else "stopped", self.step,
                 duration(seconds))  # fmt: skip
        if interrupted:
            log.info("to continue: mocofast pretrain --resume %s", path)
        if self.profiler is not None:
            log.info("no profile: it takes %d steps from the start", STEPS)
        if self.before:
            log.info("before: %s", _describe(self.before, self.config))
            log.info("after:  %s", _describe(self.after, self.config))
        log.info("written to %s: config.yaml, metrics.jsonl, train.log, curves.png, TensorBoard events, "
                 "checkpoints/last.pt", path)  # fmt: skip
        log.info("next: look at %s; mocofast linear %s; mocofast export %s --format torchvision FILE",
                 path / "curves.png", path, path)  # fmt: skip


def _describe(values: dict[str, float], config: Config) -> str:
    text = f"kNN accuracy {values['knn_top1']:.4f}"
    if "few_shot_top1" in values:
        text += f"; 1-nearest neighbour with {config.knn.shots} labels a class {values['few_shot_top1']:.4f}"
    return text
