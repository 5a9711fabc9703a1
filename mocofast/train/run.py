"""Pretraining: one code path for a CPU, a GPU, and many processes under torchrun."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mocofast import distributed
from mocofast.config import Config, ConfigError
from mocofast.data.interface import Batch
from mocofast.device import choose_autocast, choose_device
from mocofast.errors import DivergedError
from mocofast.evaluate.features import EvaluationStopped
from mocofast.evaluate.monitor import KNNMonitor
from mocofast.health.watch import Watch
from mocofast.methods.base import Method
from mocofast.optim.schedule import learning_rate, scaled_by_batch
from mocofast.report.at_end import write_at_end
from mocofast.report.pictures import write_views
from mocofast.step_parts import step_part
from mocofast.train.announce import announce
from mocofast.train.auto import Choice, fit_on_all_ranks
from mocofast.train.build import check_gradients, load_on_rank_0_first, new_state
from mocofast.train.checkpoint import CheckpointWriter
from mocofast.train.claim import check_unused, claim_on_rank_0
from mocofast.train.divergence import check_loss, check_weights, way_out
from mocofast.train.engine import Engine, choose_mode, garbage_collection_paused
from mocofast.train.interrupt import StopRequest
from mocofast.train.metrics import LOSS, PendingWindow, duration, memory_gib
from mocofast.train.profile import STEPS, StepProfiler
from mocofast.train.result import Result as Result
from mocofast.train.resume import check_same_run, find_checkpoint
from mocofast.train.run_folder import PretrainingFolder, StepLine
from mocofast.train.threads import set_threads

log = logging.getLogger("mocofast")


def train(
    config: Config,
    resume: str = "",
    profile: bool = False,
    kept: Collection[str] | None = None,
    *,
    initialise: Callable[[Method], list[str]] | None = None,
    extend: bool = False,
) -> Result:
    """Runs a configuration from its start, or from a checkpoint.

    config: for example `mocofast.settings.load_recipe("digits")`.
    resume: "" for a new run, "auto" for the newest checkpoint of the run folder (a new run if there
        is none), or the path of a checkpoint or run folder.
    profile: rank 0 also times a few steps and writes mocofast.train.profile.FILES into the run
        folder. The results of the run stay the same.
    kept: None trains the configuration as it is. Otherwise a new run fits options to the images
        and the machine, as recipe `auto` says, all but the options named here.
    initialise: gives the method of a new run its first weights, and returns lines for the log (see
        mocofast.interop.initial). A continued run has its own weights.
    extend: a continued run may have other options of `optim`, and other `train.epochs`.
    Raises ConfigError for a configuration that cannot be used, and DivergedError if the loss or a
    weight is no finite number. The last finite checkpoint then stays.
    """
    device = choose_device(config.train.device)
    rank, world_size, local_rank = distributed.init_from_environment(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    try:
        with StopRequest() as stop, contextlib.ExitStack() as held:
            folder = claim_on_rank_0(held, config, bool(resume), rank)
            options = (profile, kept, initialise, extend)
            run = _Run(config, resume, folder, device, rank, world_size, *options)
            try:
                with stop.after_steps():
                    return run.train(stop)
            finally:
                del run  # DistributedDataParallel must not outlive the process group
    finally:
        distributed.shutdown()


class _Run:
    """The objects of one run, and its loop. folder and writer exist on rank 0 alone."""

    def __init__(
        self,
        config: Config,
        resume: str,
        path: Path,
        device: torch.device,
        rank: int,
        world_size: int,
        profile: bool,
        kept: Collection[str] | None,
        initialise: Callable[[Method], list[str]] | None,
        extend: bool,
    ) -> None:
        self.config, self.device, self.world_size, self.path = config, device, world_size, path
        saved = find_checkpoint(self.path, resume)
        if saved is not None:
            check_same_run(config, saved, extend)
        else:
            check_unused(self.path)

        # Data, model and optimiser.
        datasets = load_on_rank_0_first(config, rank)
        self.choices: list[Choice] = []
        if kept is not None and saved is None:
            self.choices = fit_on_all_ranks(config, datasets.train, kept, device, world_size)
        mode, reason = choose_mode(config.engine.mode, device, world_size)
        self.state = new_state(config, datasets, device, rank, world_size)
        set_threads(self.state.model.encoder_q, config, device, world_size, saved)
        self.autocast = choose_autocast(config.train.precision, device)
        for size in sorted({config.augment.size, *config.augment.training_sizes()}):
            check_gradients(self.autocast, self.state.model.encoder_q, size)
        self.monitor = KNNMonitor.of(datasets, config, device)
        if config.knn.patience and self.monitor is None:
            raise ConfigError("knn.patience: expected 0 for images without labels to evaluate on")
        self.steps_per_epoch = self.state.loader.steps_per_epoch
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.schedule = scaled_by_batch(config.optim, config.data.batch_size)
        self.first_lines: list[str] = []
        if saved is not None:
            self.state.restore(saved)
        elif initialise is not None:
            self.first_lines = initialise(self.state.model)

        # All checks are done, so a run that is refused leaves no files behind. Now open the files.
        resumed_step = self.state.step if saved else None
        self.folder = PretrainingFolder(self.path, config, resumed_step) if rank == 0 else None
        self.writer = None
        if rank == 0:
            self.writer = CheckpointWriter(self.path / "checkpoints", config.checkpoint.keep)
        model, optimizer = self.state.model, self.state.optimizer
        images = config.data.batch_size // world_size // config.train.accumulate
        self.engine = Engine(mode, model, optimizer, self.autocast, config.train.accumulate, images)
        self.rate = 0.0  # the learning rate of the last step
        self.evaluated_at = self.state.step  # the step of the last evaluation
        self.profiler: StepProfiler | None = None
        if profile and rank == 0:
            now = replace(config, augment=config.augment.at(self.state.epoch))
            self.profiler = StepProfiler(model, optimizer, self.autocast, now)
        self.batches: Iterator[Batch] | None = None  # the rest of the present epoch
        self.pending: tuple[StepLine, PendingWindow, tqdm[Any]] | None = None
        if rank == 0:
            lines = [f"engine {mode}: {reason}", *self.first_lines]
            lines += ["no kNN monitor"] * (self.monitor is None) + [f"writing to {self.path}"]
            seen = (self.state, datasets, self.choices, self.autocast, world_size)
            announce(*seen, lines, resumed_step)
        self.watch = Watch(self.path, config, model, datasets, resumed_step) if rank == 0 else None

    # ---- the loop ----

    def train(self, stop: StopRequest) -> Result:
        """Trains to the end, to train.max_steps, or until a signal. Always leaves a checkpoint."""
        state = self.state
        last_step = min(self.config.train.max_steps or self.total_steps, self.total_steps)
        began, first_step, saved_at = time.perf_counter(), state.step, -1
        try:
            untrained = state.step == 0 and self.config.knn.start
            interrupted = (untrained or state.evaluation_due) and not self._evaluate(stop)
            with self._progress_bar(last_step) as bar, garbage_collection_paused():
                state.window.start_clock()
                while state.step < last_step and not interrupted and not self._plateaued():
                    self._step()
                    bar.update()
                    self._write_pending()
                    interrupted = stop.agreed()
                    if self._log_due():
                        seconds_per_step = (time.perf_counter() - began) / (state.step - first_step)
                        self._end_window(bar, seconds_per_step * (self.total_steps - state.step))
                    epoch_ended = state.step_in_epoch == self.steps_per_epoch
                    if epoch_ended and not self._end_epoch(stop):
                        interrupted = True
                    if self._checkpoint_due(epoch_ended) or interrupted:
                        self._save()
                        saved_at = state.step
                        gc.collect()
                self._write_pending()
            if saved_at != state.step:
                self._save()
            if state.window.steps:
                # The averages so far. The window keeps the sums for a continued run.
                values = state.window.start_means().wait()
                log.info("loss %.3f over the last %d steps", values[LOSS], state.window.steps)
                check_loss(values, f"the last {state.window.steps} steps", self.rate)
            if state.step > first_step and not interrupted and self.evaluated_at != state.step:
                # train.max_steps ended the run between two evaluations.
                interrupted = not self._evaluate(stop, write=False)
            self._finish(interrupted, time.perf_counter() - began)
        except DivergedError as error:
            if self.writer is not None and self.watch is not None:
                self.writer.wait()
                self.watch.conclude(state.before, state.after)
            raise DivergedError(f"{error}. {way_out(self.path)}") from None
        finally:
            state.loader.close()
            if self.writer is not None:
                self.writer.wait()
            if self.folder is not None:
                self.folder.close()
        return Result(self.path, state.step, interrupted, state.before, state.after)

    def _step(self) -> None:
        """Makes one optimiser step on the next batch."""
        state = self.state
        if self.profiler is not None:
            self.profiler.begin()
        asked = time.perf_counter()
        with step_part("data wait"):
            batch = self._next_batch()
            views = tuple(view.to(self.device, non_blocking=True) for view in batch.views)
        waited = time.perf_counter() - asked
        if state.step == 0 and self.folder is not None:
            write_views(views, self.path / "views.png")
            state.window.leave_out(time.perf_counter() - asked - waited)

        self.rate = learning_rate(
            self.schedule, state.step, self.steps_per_epoch, self.config.train.epochs
        )
        self.engine.set_scheduled(state.step, self.total_steps, self.rate)
        fields = {
            name: getattr(batch, name).to(self.device, non_blocking=True)
            for name in state.model.batch_fields
        }
        metrics = self.engine.step(views, fields, state.step >= state.model.filling_steps)
        state.step += 1
        state.step_in_epoch += 1
        state.window.add(metrics, len(views[0]) * self.world_size, waited)
        if self.watch is not None and self._log_due():
            self.watch.look(views, metrics.pair)
        if self.profiler is not None:
            self._end_profiled_step(self.profiler)

    def _next_batch(self) -> Batch:
        if self.batches is None:
            self.batches = self.state.loader.epoch(self.state.epoch, self.state.step_in_epoch)
        if (batch := next(self.batches, None)) is None:
            raise RuntimeError(f"loader: fewer than {self.steps_per_epoch} batches in an epoch")
        return batch

    def _end_profiled_step(self, profiler: StepProfiler) -> None:
        """Ends the profile's step. Leaves the profiler's own work out of the rates."""
        ended = time.perf_counter()
        if profiler.end():
            profiler.write(self.path)
            log.info("profile of a step: %s", self.path / "profile.png")
            self.profiler = None
        self.state.window.leave_out(time.perf_counter() - ended)

    def _end_epoch(self, stop: StopRequest) -> bool:
        """Ends the epoch. Evaluates if an evaluation is due. Returns False if `stop` ended it."""
        self._write_pending()  # before the evaluation, which takes long
        assert self.batches is not None
        for _ in self.batches:  # lets the loader end its epoch
            raise RuntimeError(f"loader: more than {self.steps_per_epoch} batches in an epoch")
        self.batches = None
        self.state.epoch, self.state.step_in_epoch = self.state.epoch + 1, 0
        every = self.config.knn.every
        last = self.state.epoch == self.config.train.epochs
        if last or (every and self.state.epoch % every == 0):
            self._check_weights()  # NaN has no neighbours
            return self._evaluate(stop)
        return True

    def _plateaued(self) -> bool:
        patience = self.config.knn.patience
        return 0 < patience <= self.state.since_best

    def _log_due(self) -> bool:
        step = self.state.step
        return step % self.config.train.log_every == 0 or step == self.total_steps

    def _checkpoint_due(self, epoch_ended: bool) -> bool:
        c, state = self.config.checkpoint, self.state
        by_epoch = epoch_ended and state.epoch % c.every_epochs == 0
        by_step = c.every_steps and state.step % c.every_steps == 0
        return bool(by_epoch or by_step)

    # ---- output ----

    def _end_window(self, bar: tqdm[Any], remaining: float) -> None:
        """Ends the window. `_write_pending` writes the line after the next step's launch."""
        state = self.state
        line = StepLine(
            state.step,
            state.step / self.steps_per_epoch,
            self.rate,
            state.model.chance_loss,
            memory_gib(self.device),
            remaining,
            {},
        )
        self.pending = (line, state.window.flush(), bar)

    def _write_pending(self) -> None:
        """Writes the line of the window that ended before the last launch, if there is one."""
        if self.pending is None:
            return
        line, window, bar = self.pending
        self.pending = None
        values = window.wait()
        if self.folder is not None:
            self.folder.write_steps(line._replace(values=values), bar)
        if self.watch is not None:
            self.watch.write(line.step, {**values, "chance_loss": line.chance_loss, "lr": line.lr})
        check_loss(values, f"the steps up to {line.step}", line.lr)

    def _check_weights(self) -> None:
        """Raises DivergedError if weights are not finite. All ranks call it together."""
        tensors = [*self.state.model.parameters(), *self.state.model.buffers()]
        check_weights(tensors, self.state.step, self.rate)

    def _evaluate(self, stop: StopRequest, write: bool = True) -> bool:
        """Runs the kNN monitor, if there are labels. Returns False if `stop` ended it early.

        A continued run then evaluates first.
        write: write the figures. A run that train.max_steps stopped does not, because the
            continued run writes the metrics of a run that never stopped.
        """
        state = self.state
        self.evaluated_at = state.step
        if self.monitor is None:
            return True
        state.evaluation_due, pause = write, state.window.pause()
        try:
            encoder = state.model.encoder_q
            state.after = self.monitor.evaluate(encoder, self.autocast, stop.requested)
        except EvaluationStopped:
            log.info("evaluation stopped; a continued run evaluates first")
            return False
        state.evaluation_due, state.measured_at = False, state.step
        if state.step == 0:
            state.before = state.after
        elif write:
            top1 = state.after.get("knn_top1", 0.0)
            state.since_best = 0 if top1 > state.best else state.since_best + 1
            state.best = max(state.best, top1)
        if self.folder is not None and write:
            when = "before training" if state.step == 0 else f"after epoch {state.epoch}"
            self.folder.write_evaluation(
                state.step, state.step / self.steps_per_epoch, state.after, when
            )
        state.window.end_pause(pause)
        return True

    def _save(self) -> None:
        """Writes a checkpoint. All ranks call it together."""
        self._write_pending()  # before the checkpoint, which takes long
        self._check_weights()  # a checkpoint takes the place of an older one
        content = self.state.collect()
        if content is None or self.writer is None or self.folder is None:
            return
        name, skipped = self.state.source.name, content["data"]["skipped"]
        self.folder.write_skipped({name(index): reason for index, reason in skipped.items()})
        self.writer.save(content)

    def _progress_bar(self, last_step: int) -> tqdm[Any]:
        hidden = self.folder is None or not sys.stderr.isatty()
        return tqdm(total=last_step, initial=self.state.step, unit="step", disable=hidden)

    def _finish(self, interrupted: bool, seconds: float) -> None:
        """Logs how the run ended, and finishes the files. seconds: duration of the run."""
        if self.folder is None or self.writer is None:
            return
        self.writer.wait()
        ended = "trained" if self.state.step >= self.total_steps else "stopped"
        log.info("%s at step %d after %s", ended, self.state.step, duration(seconds))
        if self._plateaued():
            log.info(
                "kNN plateau: %d evaluations without a better accuracy than %.4f (knn.patience)",
                self.state.since_best,
                self.state.best,
            )
        if interrupted:
            log.info("to continue: mocofast pretrain --resume %s", self.path)
        if self.profiler is not None:
            log.info("no profile: it takes %d steps from the start", STEPS)
        if self.watch is not None:
            self.watch.conclude(self.state.before, self.state.after)
        if not interrupted:
            encoder, source = self.state.model.encoder_q, self.state.source
            write_at_end(self.path, source, self.config, encoder, self.device)
        measured_at = self.state.measured_at
        when = "" if measured_at is None else f" (measured at step {measured_at})"
        self.folder.finish(self.state.before, self.state.after, when)
