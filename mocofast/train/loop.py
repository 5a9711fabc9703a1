"""The objects of a run, and its loop."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mocofast.config import Config, ConfigError
from mocofast.data.interface import Batch
from mocofast.device import loss_scaler, run_autocast, short_name
from mocofast.errors import DivergedError
from mocofast.evaluate.features import EvaluationStopped, EvaluationTooLongError
from mocofast.evaluate.monitor import KNNMonitor
from mocofast.health.watch import Attendant, Watch
from mocofast.methods.base import Method
from mocofast.optim.schedule import learning_rate, scaled_by_batch
from mocofast.report.at_end import write_at_end
from mocofast.report.pictures import write_views
from mocofast.step_parts import step_part
from mocofast.train import evidence
from mocofast.train.announce import announce
from mocofast.train.auto import Choice, fit_on_all_ranks
from mocofast.train.build import check_gradients, load_on_rank_0_first, new_state
from mocofast.train.checkpoint_writer import CheckpointWriter
from mocofast.train.claim import check_unused
from mocofast.train.divergence import check_loss, check_weights, way_out
from mocofast.train.engine import Engine, choose_mode, garbage_collection_paused
from mocofast.train.heartbeat import Heartbeat
from mocofast.train.interrupt import StopRequest
from mocofast.train.metrics import LOSS, PendingWindow, duration, memory_gib
from mocofast.train.profile import STEPS, StepProfiler
from mocofast.train.result import Result
from mocofast.train.resume import check_same_run, find_checkpoint, keep_precision
from mocofast.train.run_folder import PretrainingFolder, StepLine
from mocofast.train.sharded_writer import ShardedCheckpointWriter
from mocofast.train.sharding import is_sharded
from mocofast.train.suspects import skip_fatal_files
from mocofast.train.threads import set_threads

log = logging.getLogger("mocofast")


class Run:
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
        heart: Heartbeat,
    ) -> None:
        self.heart = heart
        self.config, self.device, self.world_size, self.path = config, device, world_size, path
        sharded = is_sharded(config, world_size)
        saved = find_checkpoint(self.path, resume, whole=not sharded)
        if saved is not None:
            check_same_run(config, saved, extend)
            keep_precision(config, saved, device)
        else:
            check_unused(self.path)

        # Data, model and optimiser.
        datasets = load_on_rank_0_first(config, rank)
        self.choices: list[Choice] = []
        if kept is not None and saved is None:
            self.choices = fit_on_all_ranks(config, datasets.train, kept, device, world_size)
        mode, reason = choose_mode(config.engine.mode, device, world_size, sharded)
        self.state = new_state(config, datasets, device, rank, world_size, saved is not None)
        encoder = self.state.whole_encoder()
        crowded = set_threads(encoder, config, device, world_size, saved)
        self.autocast = run_autocast(config, encoder, device)
        self.state.precision = short_name(self.autocast)
        self.state.scaler = loss_scaler(self.autocast, mode)
        check_gradients(self.autocast, encoder, config)
        self.monitor = KNNMonitor.of(datasets, config, device)
        if config.knn.patience and self.monitor is None:
            raise ConfigError("knn.patience: expected 0 for images without labels to evaluate on")
        self.pace = self.state.pace
        self.total_steps = self.pace.before(config.train.epochs)
        self.schedule = scaled_by_batch(config.optim, config.data.batch_size)
        self.remarks: list[str] = []
        if saved is not None:
            self.remarks = self.state.restore(saved, extend)
        elif initialise is not None:
            self.remarks = self.state.initialise(initialise)

        # All checks are done, so a run that is refused leaves no files behind. Now open the files.
        self.remarks += skip_fatal_files(self.state.loader, self.state.source, self.path)
        resumed_step = self.state.step if saved else None
        self.folder = PretrainingFolder(self.path, config, resumed_step) if rank == 0 else None
        self.writer = None
        if rank == 0 or sharded:
            files, place = config.checkpoint, self.path / "checkpoints"
            kind = ShardedCheckpointWriter if sharded else CheckpointWriter
            self.writer = kind(place, files.keep, files.make_room)
        model, optimizer, scaler = self.state.model, self.state.optimizer, self.state.scaler
        parts, shares = config.train.accumulate, self.state.shares_of_a_batch()
        images = shares.micro_batches(parts)[0].counts[rank]
        of_step = (mode, model, optimizer, self.autocast, parts, images)
        self.engine = Engine(*of_step, scaler=scaler, shares=shares)
        self.rate, self.evaluated_at = 0.0, self.state.step  # of the last step and evaluation
        self.profiler: StepProfiler | None = None
        if profile and sharded:
            raise ConfigError("--profile: times a step with --engine.parallel ddp only")
        if profile and rank == 0:
            now = replace(config, augment=config.augment.at(self.state.epoch))
            self.profiler = StepProfiler(model, optimizer, self.autocast, now)
        self.batches: Iterator[Batch] | None = None  # the rest of the present epoch
        self.pending: tuple[StepLine, PendingWindow, tqdm[Any]] | None = None
        self.watch: Watch | Attendant | None = None
        self.forward_seconds = 0.0  # of an image. 0: not known
        if rank == 0:
            lines = [f"engine {mode}: {reason}", *crowded, *self.remarks, f"writing to {self.path}"]
            seen = (self.state, encoder, datasets, self.choices, self.autocast, world_size)
            self.forward_seconds = announce(*seen, lines, resumed_step)
            pretrained = bool(self.remarks)
            self.watch = Watch(self.path, config, model, datasets, resumed_step, pretrained)
        elif sharded:
            self.watch = Attendant(model)

    # ---- the loop ----

    def train(self, stop: StopRequest) -> Result:
        """Trains to the end, to train.max_steps, or until a signal. Always leaves a checkpoint."""
        state = self.state
        last_step = min(self.config.train.max_steps or self.total_steps, self.total_steps)
        began, first_step, saved_at = time.perf_counter(), state.step, -1
        calm = contextlib.nullcontext()
        try:
            untrained = state.step == 0 and self.config.knn.start
            interrupted = (untrained or state.evaluation_due) and not self._evaluate(stop)
            hidden = self.folder is None or not sys.stderr.isatty()
            bar = tqdm(total=last_step, initial=state.step, unit="step", disable=hidden)
            with bar, garbage_collection_paused():
                state.window.start_clock()
                while state.step < last_step and not interrupted and not self._plateaued():
                    # The first step compiles, and loads kernels.
                    with self.heart.patient("the first step") if state.step == first_step else calm:
                        self._step()
                    bar.update()
                    self._write_pending()
                    interrupted = stop.agreed()
                    if self._log_due():
                        seconds_per_step = (time.perf_counter() - began) / (state.step - first_step)
                        self._end_window(bar, seconds_per_step * (self.total_steps - state.step))
                    epoch_ended = state.step_in_epoch == self.pace.steps(state.epoch)
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
                means = state.window.start_means()
                values, count = means.wait(), state.window.steps
                log.info("loss %.3f over the last %d steps", values[LOSS], count)
                check_loss(values, f"the last {count} steps", self.rate, means.first_wrong())
            if state.step > first_step and not interrupted and self.evaluated_at != state.step:
                # train.max_steps ended the run between two evaluations.
                interrupted = not self._evaluate(stop, write=False)
            with self.heart.patient("the end of the run"):
                self._finish(interrupted, time.perf_counter() - began)
        except DivergedError as error:
            if self.writer is not None and self.watch is not None:
                self.writer.wait()
                self.watch.conclude(state.before, state.after)
            said = evidence.save_batches(state, error.step, self.path)
            log.warning("%s. %s", error, said.text)
            if len(state.left_out) < 2 * self.config.train.skip_nonfinite:
                raise evidence.GoBack(said.steps) from None
            raise DivergedError(f"{error}. {said.text}. {way_out(self.path)}") from None
        except Exception as error:
            if self.writer is not None:
                evidence.save_state(state, error, self.path)
            raise
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
        self.heart.at(f"the data of step {state.step + 1}")
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
        self.heart.at(f"step {state.step + 1}")

        seen, batches = state.batches_seen(), state.loader.steps_per_epoch
        self.rate = learning_rate(self.schedule, seen, batches, self.config.train.epochs)
        self.engine.set_scheduled(state.step, self.total_steps, self.rate)
        fields = {
            name: values.to(self.device, non_blocking=True)
            for name, values in state.model.batch_inputs(batch, state.source).items()
        }
        learns = state.step >= state.model.filling_steps
        shares = state.shares()
        state.step += 1
        state.step_in_epoch += 1
        if state.step in state.left_out:
            log.info("step %d leaves its batch out", state.step)
        else:
            metrics = self.engine.step(views, fields, learns, shares)
            state.window.add(metrics, shares.total, waited, state.step)
            if self.watch is not None and self._log_due():
                self.watch.look(views, metrics.pair)
        if self.profiler is not None:
            self._end_profiled_step(self.profiler)

    def _next_batch(self) -> Batch:
        if self.batches is None:
            place = self.state.epoch, self.state.step_in_epoch
            self.batches = self.pace.epoch(self.state.loader, *place)
        if (batch := next(self.batches, None)) is None:
            raise RuntimeError(f"loader: too few batches in epoch {self.state.epoch}")
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
            raise RuntimeError(f"loader: too many batches in epoch {self.state.epoch}")
        self.batches, self.state.epoch, self.state.step_in_epoch = None, self.state.epoch + 1, 0
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
        """Ends the window. On a GPU its line is written after the launch of the next step."""
        state = self.state
        if not state.window.steps:  # all were left out
            return
        known = state.step, state.epochs_done(), self.rate, state.model.chance_loss
        line = StepLine(*known, memory_gib(self.device), remaining, {})
        self.pending = (line, state.window.flush(), bar)
        if self.device.type == "cpu":  # nothing to wait for
            self._write_pending()

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
            known = {"epoch": line.epoch, "chance_loss": line.chance_loss, "lr": line.lr}
            self.watch.write(line.step, {**known, **values})
        first_wrong = window.means.first_wrong()
        check_loss(values, f"the steps up to {line.step}", line.lr, first_wrong)

    def _check_weights(self) -> None:
        """Raises DivergedError if weights are not finite. All ranks call it together."""
        tensors = [*self.state.model.parameters(), *self.state.model.buffers()]
        check_weights(tensors, self.state.step, self.rate)

    def _evaluate(self, stop: StopRequest, write: bool = True) -> bool:
        """Runs the kNN monitor, if there are labels. False: a continued run evaluates first.

        write: write the figures. A run that train.max_steps stopped does not, because the
            continued run writes the metrics of a run that never stopped.
        """
        state = self.state
        self.evaluated_at = state.step
        if self.monitor is None:
            return True
        state.evaluation_due, pause = write, state.window.pause()
        self.heart.at(f"the evaluation after step {state.step}")

        def stopped() -> bool:
            self.heart.alive()
            return stop.requested()

        limit = self.config.knn.start_limit if state.step == 0 < self.total_steps else 0
        try:
            seconds = limit or math.inf, self.forward_seconds
            figures = self.monitor.evaluate(state.whole_encoder(), stopped, *seconds)
        except EvaluationStopped:
            log.info("evaluation stopped; a continued run evaluates first")
            return False
        except EvaluationTooLongError as error:
            log.info("no kNN before training: %s (knn.start_limit: %g s)", error, limit)
            state.evaluation_due = False
        else:
            state.measured(figures, counts=write)
            if self.folder is not None and write:
                when = "before training" if state.step == 0 else f"after epoch {state.epoch}"
                self.folder.write_evaluation(state.step, state.epochs_done(), state.after, when)
        state.window.end_pause(pause)
        return True

    def _save(self) -> None:
        """Writes a checkpoint. All ranks call it together."""
        self.heart.at(f"the checkpoint of step {self.state.step}")
        self._write_pending()  # before the checkpoint, which takes long
        self._check_weights()  # a checkpoint takes the place of an older one
        content = self.state.collect()
        if content is None or self.writer is None:
            return
        if self.folder is not None:
            name, skipped = self.state.source.name, content["data"]["skipped"]
            self.folder.write_skipped({name(index): reason for index, reason in skipped.items()})
        with self.heart.patient("the copy of the checkpoint, or the write of the last"):
            self.writer.save(content)

    def _finish(self, interrupted: bool, seconds: float) -> None:
        """Logs how the run ended, and finishes the files. seconds: duration of the run."""
        encoder = None if interrupted else self.state.whole_encoder()
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
            log.info("to continue: mocofast pretrain --resume %s", shlex.quote(str(self.path)))
        if self.profiler is not None:
            log.info("no profile: it takes %d steps from the start", STEPS)
        if self.watch is not None:
            self.watch.conclude(self.state.before, self.state.after)
        page = ""
        if encoder is not None:
            page = write_at_end(self.path, self.state.source, self.config, encoder, self.device)
        measured_at = self.state.measured_at
        when = "" if measured_at is None else f" (measured at step {measured_at})"
        self.folder.finish(self.state.before, self.state.after, when, page)
