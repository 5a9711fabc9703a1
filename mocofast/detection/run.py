"""Trains a detector or a segmentation network: the same code for a CPU, a GPU, and torchrun."""

from __future__ import annotations

import contextlib
import gc
import logging
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mocofast import __version__, distributed, settings
from mocofast.config import ConfigError
from mocofast.data.finding import counted
from mocofast.detection.batches import Reader, TrainingBatches
from mocofast.detection.folder import TaskFolder, format_of
from mocofast.detection.layouts import load_sets
from mocofast.detection.optim import learning_rate, optimizer_of
from mocofast.detection.options import SegmentData, TaskConfig
from mocofast.detection.page import load_task_run, write_task_page
from mocofast.detection.pictures import plot_curves, plot_predictions
from mocofast.detection.start import Start, find_start
from mocofast.detection.tasks import DetectionTask, evaluate, predictions, task_of
from mocofast.device import choose_autocast
from mocofast.errors import DivergedError
from mocofast.evaluate.features import EvaluationStopped
from mocofast.optim.schedule import set_learning_rate
from mocofast.report.parts import PAGE
from mocofast.train.checkpoint import fitting
from mocofast.train.checkpoint_writer import CheckpointWriter
from mocofast.train.claim import check_unused, claim_on_rank_0
from mocofast.train.divergence import check_loss, check_weights, way_out
from mocofast.train.heartbeat import Heartbeat, stop_launcher
from mocofast.train.interrupt import StopRequest
from mocofast.train.metrics import LOSS, StepMetrics, Window, duration, memory_gib
from mocofast.train.random_states import random_state, set_random_state
from mocofast.train.run_folder import StepLine
from mocofast.train.step import FlatGradients

log = logging.getLogger("mocofast")

PICTURED = 6  # images in predictions.png


class Outcome(NamedTuple):
    """How a run ended. values: figures of the last evaluation, {name: share}, maybe empty."""

    folder: Path
    step: int
    interrupted: bool
    values: dict[str, float]


def train(config: TaskConfig, device: torch.device, saved: dict[str, Any] | None) -> Outcome:
    """Runs a configuration from the start, or from the content of a checkpoint.

    device: of this rank. The process group exists, where there are several ranks.
    Raises ConfigError for an unusable configuration, and DivergedError if the loss or a
    weight is not finite. The last finite checkpoint then stays.
    """
    with StopRequest() as stop, contextlib.ExitStack() as held:
        rank, _ = distributed.rank_and_world_size()
        folder = claim_on_rank_0(held, config, saved is not None, rank)
        held.enter_context(Heartbeat(0.0))
        run = _Run(config, folder, device, saved)
        with stop.after_steps():
            outcome = run.train(stop)
    if outcome.interrupted:
        stop_launcher()
    return outcome


class _Run:
    """The objects and the loop of a run. folder and writer exist on rank 0 alone."""

    def __init__(
        self, config: TaskConfig, path: Path, device: torch.device, saved: dict[str, Any] | None
    ) -> None:
        self.config, self.path, self.device = config, path, device
        self.rank, self.world_size = distributed.rank_and_world_size()
        batch = config.data.batch_size
        if batch % self.world_size:
            raise ConfigError(
                f"data.batch_size: expected a multiple of {self.world_size} ranks, got {batch}"
            )
        if saved is None:
            check_unused(path)
        self.task = task_of(config)
        self.sets = load_sets(config.data, self.task.kind)
        m = config.model
        # A continued run has its weights in its checkpoint.
        start = Start(None, m.arch, m.channels, m.mean, m.std) if saved else find_start(m)
        m.arch, m.channels, m.mean, m.std = start[1:]
        torch.manual_seed(config.train.seed)
        self.model = self.task.build(start, self.sets).to(device)
        torch.manual_seed(config.train.seed + 1000003 * self.rank)  # samples of regions
        self.autocast = choose_autocast(config.train.precision, device)
        self.optimizer = optimizer_of(self.model, config.optim)
        self.gradients = FlatGradients(self.model.parameters())
        self.window = Window(device)

        def reader(images: Any) -> Reader:
            return Reader(images, m.channels, self.task.kind)

        self.val = reader(self.sets.val)
        seed, workers = config.train.seed, config.data.workers
        self.batches = TrainingBatches(
            *(reader(self.sets.train), self.task.sample, batch, workers),
            *(seed, self.rank, self.world_size),
        )
        if self.batches.batch_size < self.world_size:
            raise ConfigError(
                f"data.train: {len(self.sets.train)} images are fewer than {self.world_size} ranks"
            )
        self._check_norms()
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.step = self.epoch = self.step_in_epoch = 0
        self.values: dict[str, float] = {}
        self.measured_at = -1  # the step of `values`
        self.rate = 0.0
        self.rest: Iterator[list[Any]] | None = None  # the rest of the present epoch
        if saved is not None:
            with fitting():
                self._restore(saved)
        self.folder = self.writer = None
        if self.rank == 0:
            self.folder = TaskFolder(path, config, self.step if saved else None)
            self.writer = CheckpointWriter(path / "checkpoints", config.checkpoint.keep)
            self._announce(saved is not None)

    def _check_norms(self) -> None:
        """Raises ConfigError where BatchNorm has no statistics, or a single value."""
        m, data = self.config.model, self.config.data
        if m.norm == "frozen" and m.init == "scratch":
            raise ConfigError(
                "model.norm: frozen keeps the statistics of a checkpoint, and scratch has none; "
                "take sync"
            )
        side = data.crop if isinstance(data, SegmentData) else min(data.sizes)
        single = side <= 32 or m.name == "deeplabv3"  # which pools to 1 x 1
        if m.norm == "sync" and single and self.batches.batch_size // self.world_size < 2:
            raise ConfigError(
                "data.batch_size: BatchNorm on maps of 1 x 1 needs 2 images or more a rank, got "
                f"{self.batches.batch_size // self.world_size}; larger images need no more"
            )

    # ---- the loop ----

    def train(self, stop: StopRequest) -> Outcome:
        """Trains to the end, to train.max_steps, or until a signal. Always leaves a checkpoint."""
        train = self.config.train
        last_step = min(train.max_steps or self.total_steps, self.total_steps)
        began, first, saved_at, interrupted = time.perf_counter(), self.step, -1, False
        try:
            hidden = self.folder is None or not sys.stderr.isatty()
            with tqdm(total=last_step, initial=first, unit="step", disable=hidden) as bar:
                self.window.start_clock()
                if self.step and self._evaluation_due():  # a signal ended it
                    interrupted = not self._evaluate(stop)
                while self.step < last_step and not interrupted:
                    self._step()
                    bar.update()
                    interrupted = stop.agreed()
                    if self.step % train.log_every == 0 or self.step == self.total_steps:
                        per_step = (time.perf_counter() - began) / (self.step - first)
                        self._log(bar, per_step * (self.total_steps - self.step))
                    epoch_ended = self.step_in_epoch == self.steps_per_epoch
                    if epoch_ended:
                        self.rest, self.step_in_epoch = None, 0
                        self.epoch += 1
                    if self._evaluation_due() and not interrupted:
                        interrupted = not self._evaluate(stop)
                    if self._checkpoint_due(epoch_ended) or interrupted:
                        self._save()
                        saved_at = self.step
            if saved_at != self.step:
                self._save()
            if not interrupted and self.measured_at != self.step:
                # train.max_steps ended the run between two evaluations.
                interrupted = not self._evaluate(stop, write=False)
            self._finish(interrupted, time.perf_counter() - began)
        except DivergedError as error:
            if self.writer is not None:
                self.writer.wait()
            raise DivergedError(f"{error}. {way_out(self.path)}") from None
        finally:
            self.rest = None  # ends the threads that read ahead
            if self.writer is not None:
                self.writer.wait()
            if self.folder is not None:
                self.folder.close()
        return Outcome(self.path, self.step, interrupted, self.values)

    def _step(self) -> None:
        """Makes an optimiser step on the next batch."""
        asked = time.perf_counter()
        if self.rest is None:
            self.rest = self.batches.epoch(self.epoch, self.step_in_epoch)
        batch = next(self.rest)
        waited = time.perf_counter() - asked
        c = self.config
        self.rate = learning_rate(c.optim, c.data.batch_size, self.step, self.total_steps)
        set_learning_rate(self.optimizer, self.rate)
        self.model.train()
        self.gradients.zero_()
        with self.autocast:
            parts = self.task.losses(self.model, batch, self.device)
            loss = torch.stack([part.float() for part in parts.values()]).sum()
        loss.backward()
        self.gradients.average_()
        self.optimizer.step()
        self.step += 1
        self.step_in_epoch += 1
        values = torch.stack([loss.detach(), *(p.detach().float() for p in parts.values())])
        metrics = StepMetrics((LOSS, *parts), values)
        self.window.add(metrics, len(batch) * self.world_size, waited)

    def _evaluation_due(self) -> bool:
        """Returns whether the evaluation of the present step is due."""
        every = self.config.train.eval_every
        ended = self.step_in_epoch == 0 and self.step > 0
        by_epoch = ended and every > 0 and self.epoch % every == 0
        return (by_epoch or self.step == self.total_steps) and self.measured_at != self.step

    def _checkpoint_due(self, epoch_ended: bool) -> bool:
        c = self.config.checkpoint
        by_step = c.every_steps and self.step % c.every_steps == 0
        return bool(by_step or (epoch_ended and self.epoch % c.every_epochs == 0))

    def _evaluate(self, stop: StopRequest, write: bool = True) -> bool:
        """Measures the model. Returns False if `stop` ended it early, all ranks alike.

        write: write the figures. A run that train.max_steps stopped does not, because the
            continued run writes the metrics of a run that never stopped.
        """
        self._check_weights()
        pause = self.window.pause()
        try:
            workers = self.config.data.workers
            values = evaluate(self.task, self.model, self.val, workers, self.device, stop.requested)
        except EvaluationStopped:
            log.info("evaluation stopped; a continued run evaluates first")
            return False
        self.values = values
        if write:
            self.measured_at = self.step
        if self.folder is not None and write:
            epoch = self.step / self.steps_per_epoch
            self.folder.write_evaluation(self.step, epoch, values, f"after epoch {self.epoch}")
        self.window.end_pause(pause)
        return True

    # ---- checkpoints ----

    def _save(self) -> None:
        """Writes a checkpoint. All ranks call it together."""
        self._check_weights()
        gather = distributed.gather_objects
        states, windows = gather(random_state(self.device)), gather(self.window.state())
        skipped: dict[str, str] = {}
        for own in gather(self._skipped()):
            skipped |= own
        if self.writer is None or self.folder is None:
            return
        self.folder.write_skipped(skipped)
        self.writer.save(
            {
                "format": format_of(self.config.recipe),
                "version": __version__,
                "config": settings.to_dict(self.config),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "epoch": self.epoch,
                "step_in_epoch": self.step_in_epoch,
                "random_states": states,
                "windows": windows,
                "fingerprint": self.sets.train.fingerprint(),
                "threads": torch.get_num_threads(),
                "values": self.values,
                "measured_at": self.measured_at,
            }
        )
        gc.collect()

    def _restore(self, saved: dict[str, Any]) -> None:
        """Continues from the content of a checkpoint. Raises ConfigError for changed images."""
        found = self.sets.train.fingerprint()
        if found != saved["fingerprint"]:
            raise ConfigError(
                "data.path: these are not the images and boxes of the run to continue "
                f"(fingerprint {found}, not {saved['fingerprint']})"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.epoch = saved["step"], saved["epoch"]
        self.step_in_epoch = saved["step_in_epoch"]
        self.values, self.measured_at = saved["values"], saved["measured_at"]
        windows, states = saved["windows"], saved["random_states"]
        self.window.load_state(windows[self.rank % len(windows)])
        if self.device.type == "cpu" and self.world_size == 1:
            torch.set_num_threads(saved["threads"])  # sums of other numbers differ by rounding
        if self.rank < len(states):
            set_random_state(states[self.rank], self.device)

    def _skipped(self) -> dict[str, str]:
        """Returns the unreadable files, {path: reason}."""
        return {
            reader.images.name(index): reason
            for reader in (self.batches.reader, self.val)
            for index, reason in reader.skipped.items()
        }

    def _check_weights(self) -> None:
        tensors: list[Tensor] = [*self.model.parameters(), *self.model.buffers()]
        check_weights(tensors, self.step, self.rate)

    # ---- output ----

    def _log(self, bar: tqdm[Any], remaining: float) -> None:
        """Writes the metrics of the last steps. All ranks call it together."""
        values = self.window.flush().wait()
        epoch, memory = self.step / self.steps_per_epoch, memory_gib(self.device)
        line = StepLine(self.step, epoch, self.rate, None, memory, remaining, values)
        if self.folder is not None:
            self.folder.write_steps(line, bar)
        check_loss(values, f"the steps up to {self.step}", self.rate)

    def _announce(self, resumed: bool) -> None:
        """Logs model, images, device and run folder."""
        m, train, val = self.config.model, self.sets.train, self.sets.val
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        log.info(
            "%s on %s, from %s: %.1f million weights, %s in %s",
            *(m.name, m.arch, m.init or "scratch", count / 1e6),
            *(counted(self.total_steps, "step"), counted(self.config.train.epochs, "epoch")),
        )
        log.info(
            "data: %d images to train on, %d to evaluate on, %d classes: %s",
            *(len(train), len(val), len(train.classes), ", ".join(train.classes[:20])),
        )
        for remark in dict.fromkeys([*train.remarks, *val.remarks]):
            log.warning("%s", remark)
        if 0 < self.total_steps < self.config.optim.warmup_steps:
            log.warning(
                "optim.warmup_steps: %d, and the run has %s, so the rate stays below its peak. "
                "Take fewer, or more --train.epochs",
                *(self.config.optim.warmup_steps, counted(self.total_steps, "step")),
            )
        precision = "bf16 autocast" if self.autocast._enabled else "fp32"
        log.info("device %s x %d, %s", self.device, self.world_size, precision)
        log.info("writing to %s", self.path)
        if resumed:
            log.info("continuing at step %d", self.step)

    def _finish(self, interrupted: bool, seconds: float) -> None:
        """Logs how the run ended, and draws the pictures. seconds: duration of the run."""
        if self.folder is None or self.writer is None:
            return
        self.writer.wait()
        self.folder.write_skipped(self._skipped())
        ended = "trained" if self.step >= self.total_steps else "stopped"
        log.info("%s at step %d after %s", ended, self.step, duration(seconds))
        if interrupted:
            path = shlex.quote(str(self.path))
            log.info("to continue: mocofast %s --resume %s", self.config.recipe, path)
            return
        is_detection = isinstance(self.task, DetectionTask)
        keys = ("ap", "ap50", "ap75") if is_detection else ("miou", "pixel_accuracy")
        plot_curves(self.folder.metrics_path, keys, self.path / "curves.png")
        shown = predictions(self.task, self.model, self.val, PICTURED, self.device)
        plot_predictions(shown, self.sets.val.classes, self.path / "predictions.png")
        write_task_page([load_task_run(self.path)], self.path / PAGE)
        log.info("result: %s", self.folder.describe(self.values))
        log.info(
            "written to %s: config.yaml, metrics.jsonl, train.log, curves.png, predictions.png, "
            "report.html, TensorBoard events, checkpoints/last.pt",
            self.path,
        )
