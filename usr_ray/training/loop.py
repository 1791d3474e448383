"""The loop: Delta to loss, one way. No Ray; the same code on one CPU, under torchrun and inside Ray Train's workers.

Batches, random numbers and the order of every sum are functions of (manifest, seed, step): a run resumed at any step
ends with bitwise the weights of one never stopped (on a CPU), and any number of workers sees the same global batches.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from usr_ray.config import Config, UserError
from usr_ray.data.batch import UsrBatch
from usr_ray.data.feed import Feed
from usr_ray.data.manifest import Manifest
from usr_ray.data.order import stream_key
from usr_ray.model.unique import UniqueIds
from usr_ray.training.checkpoint import CHECKPOINTS, CheckpointStore
from usr_ray.training.embeddings import describe_memory
from usr_ray.training.evaluate import Evaluation, evaluate
from usr_ray.training.loss import usr_loss
from usr_ray.training.monitor import Monitor, StepMeter, progress, summarise
from usr_ray.training.rest import Rest
from usr_ray.training.rows import training_batches, training_reader
from usr_ray.training.state import TrainState, share_json
from usr_ray.training.worker import Worker


class TrainError(UserError):
    """A run that cannot continue."""


TrainFeed = Feed[tuple[UsrBatch, UniqueIds], Tensor]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended."""

    status: str
    """'finished'; 'early_stopped' (the evaluation grew); 'stopped' (asked to: resume to go on)."""
    step: int
    """Steps done by the run."""
    state: TrainState
    """Trained model and tables; with train.early_stopping those of the best epoch."""
    evaluation: Evaluation | None
    """Metrics of these weights on the held-out rows; None when stopped or without held-out rows."""


def train(
    config: Config,
    worker: Worker,
    *,
    train_manifest: Manifest,
    eval_manifest: Manifest | None = None,
    trained_dates: str = "",
    run_dir: Path,
    monitor: Monitor | None = None,
) -> TrainResult:
    """Train to the end, or until a rank is asked to stop; resumes from the newest valid checkpoint of `run_dir`.

    All ranks call it with the same arguments. Rank 0 writes `<run_dir>/checkpoints` and prints progress.

    Args:
        train_manifest: rows to train on; those whose labels close after the end of data.train_dates have weight 0.
        eval_manifest: held-out rows, for train.evaluate_every_epochs; None: no evaluation.
        trained_dates: as config.json has them, for the checkpoints; '': those of `train_manifest`.
        run_dir: on storage that rank 0 can write.

    Raises:
        CheckpointError: the checkpoint is of other rows or another model. TrainError: the loss is not a number.
    """
    run = _Run(config, worker, train_manifest, eval_manifest, Path(run_dir), monitor or Monitor())
    run.state.trained_dates = trained_dates or run.state.trained_dates
    with run.reader:
        return run.run()


class _Run:
    """One call of `train` on one rank."""

    def __init__(
        self,
        config: Config,
        worker: Worker,
        train_manifest: Manifest,
        eval_manifest: Manifest | None,
        run_dir: Path,
        monitor: Monitor,
    ) -> None:
        self.config, self.worker, self.monitor = config, worker, monitor
        self.eval_manifest = eval_manifest
        self.reader = training_reader(config, train_manifest, rank=worker.rank, world_size=worker.world_size)
        self.total_steps = config.train.num_epochs * self.reader.num_steps
        self.state = TrainState(
            config, train_manifest, worker, order=self.reader.fingerprint, total_steps=self.total_steps
        )
        self.store = CheckpointStore(run_dir / CHECKPOINTS, keep_last=config.train.keep_checkpoints)
        self.meter, self.rest = StepMeter(worker), Rest(self.state, worker)
        self.best: tuple[int, float] | None = None
        """Step and log loss of the best epoch so far, with early stopping."""

    def run(self) -> TrainResult:
        """Resume, train epoch after epoch, evaluate after each."""
        state, config = self.state, self.config.train
        self._say(describe_memory(state.tables, self.config, self.worker))
        if state.restore(self.store.newest_valid() if self.worker.is_main else None, self.worker):
            self._say(f"resumed at step {state.step} (epoch {state.epoch + 1}/{config.num_epochs})")
        elif config.warm_start:
            self._say(f"warm start from {state.warm_start(config.warm_start, self.worker)}")
        best = self.store.best_valid() if config.early_stopping and self.worker.is_main else None
        self.best = share_json(self.worker, best and (best.step, best.state["log_loss"]))
        epochs, model = range(state.epoch, config.num_epochs), self.config.model
        one_size = config.compile or model.has_twins
        batches = training_batches(
            self.reader, state.tables, epochs=epochs, start_step=state.epoch_step, config=model, of_a_size=one_size
        )
        with Feed(batches, self.worker.device) as feed:
            status, evaluation = self._train(feed)
        steps_done = state.step
        if config.early_stopping and status != "stopped":
            evaluation = self._restore_best(evaluation)
        return TrainResult(status, steps_done, state, evaluation)

    def _train(self, feed: TrainFeed) -> tuple[str, Evaluation | None]:
        """Epoch after epoch, to the end; (TrainResult.status, the last evaluation)."""
        state, config = self.state, self.config.train
        while True:
            if not self._train_epoch(feed):
                self._say(f"stopped at step {state.step}; the same command resumes it")
                return "stopped", None
            is_last = state.epoch + 1 >= config.num_epochs
            must_evaluate = is_last or (state.epoch + 1) % config.evaluate_every_epochs == 0
            evaluation, has_grown = self._evaluate() if must_evaluate else (None, False)
            if is_last or has_grown:
                if self.worker.is_main:
                    self.monitor.on_end()
                return "finished" if is_last else "early_stopped", evaluation
            state.epoch, state.epoch_step = state.epoch + 1, 0

    def _train_epoch(self, feed: TrainFeed) -> bool:
        """Train what is left of the current epoch; False when a rank was asked to stop."""
        state, config = self.state, self.config.train
        num_left = self.reader.num_steps - state.epoch_step
        for (batch, unique), counts_C in self.meter.timed(itertools.islice(feed, num_left)):
            must_stop = self._step(batch, unique, counts_C)
            is_last = state.epoch_step == self.reader.num_steps
            must_save = state.step % config.checkpoint_every_steps == 0 or is_last or must_stop
            if state.step % config.log_every_steps == 0 or must_save:
                self._log()  # also refuses to save what is not a number
            if is_last or must_stop:  # after the log, whose rates are those of steps
                self.rest.fit()
            if must_save:
                self._save()
            if must_stop:
                return False
        return True

    def _step(self, batch: UsrBatch, unique: UniqueIds, counts_C: Tensor) -> bool:
        """One step; True when some rank was asked to stop: the flag travels with the row counts, so all ranks agree."""
        state, worker, config = self.state, self.worker, self.config
        # On the CPU, and reduced over the CPU's group: the host never waits for a GPU's queue.
        totals = worker.all_reduce_sum(torch.cat([counts_C, counts_C.new_tensor([worker.should_stop()])]))
        seed = stream_key(config.train.seed, state.step) >> 33
        torch.manual_seed((seed << 20) + worker.rank)  # dropout; the twins' masks take the seed itself
        lookup = state.tables.lookup(batch, unique)
        # torch.compile would take a new number for a new constant, and compile each step again.
        step_seed = torch.full((), seed, device=worker.device) if config.train.compile else seed
        with torch.autocast(worker.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            outputs = state.model(batch, lookup, step_seed)
        names, counts_C = state.manifest.spec.scenarios, totals[:-1].to(worker.device, non_blocking=True)
        terms = usr_loss(outputs, batch, counts_C, config.model, known_labels=state.manifest.spec.known_labels)
        state.dense.zero_grad()
        terms.total.backward()
        norm = state.apply_gradients(lookup)
        self.meter.add(terms.named(names), terms.by_row(names), norm, num_rows=float(totals[:-2].sum()))
        return bool(totals[-1])

    def _log(self) -> None:
        state, num_epochs = self.state, self.config.train.num_epochs
        metrics = self.meter.read()
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        if not math.isfinite(loss + norm):
            found = f"the loss is {loss} and the gradient's norm {norm}, so the run has diverged"
            way_out = "lower train.learning_rate or train.embedding_learning_rate and train in another --run-dir"
            raise TrainError(f"step {state.step}: {found}; {way_out}")
        metrics |= {"epoch": state.epoch, "eta_s": (self.total_steps - state.step) * metrics["step_s"]}
        self.monitor.on_step(state.step, metrics)
        if self.meter.is_time_to_say(state.step, self.total_steps):
            self._say(f"epoch {state.epoch + 1}/{num_epochs} step {state.step}/{self.total_steps} {progress(metrics)}")

    def _save(self, *, best_log_loss: float | None = None) -> None:
        """Write a checkpoint, after making sure that the replicas agree; `best_log_loss`: as the best one."""
        state = self.state
        state.check_replicas(self.worker)
        tensors = state.tensors()  # all ranks take part: sharded tables are gathered
        if not self.worker.is_main:
            return
        best = best_log_loss is not None
        described = state.describe(self.worker) | ({"log_loss": best_log_loss} if best else {})
        # Steps in between can be trained again; the last one's weights, or the best one's, are the result.
        must = best or state.step == self.total_steps
        path = self.store.save(state.step, tensors, described, vectors=state.tables.frozen, best=best, must=must)
        self.monitor.on_checkpoint(state.step, path)

    def _evaluate(self) -> tuple[Evaluation | None, bool]:
        """Evaluate the epoch that has just ended; (evaluation, whether the log loss grew), the second on all ranks.

        The checkpoint of the epoch's last step is older than its evaluation: a run that dies in between evaluates again
        when it resumes. So the best epoch is the best checkpoint's, and nothing else remembers it.
        """
        if self.eval_manifest is None:
            return None, False
        state, evaluation = self.state, self._score(self.eval_manifest)
        if evaluation.metrics is not None:
            self.monitor.on_evaluation(state.step, evaluation.metrics)
        summary = share_json(self.worker, evaluation.metrics and summarise(evaluation.metrics))
        known = {k: v for k, v in summary.items() if v is not None}
        self.worker.report({"step": state.step, "epoch": state.epoch + 1} | known)
        self._say(f"evaluation after epoch {state.epoch + 1}: " + ", ".join(f"{k} {v:.4f}" for k, v in known.items()))
        log_loss = summary["log_loss"]
        if not self.config.train.early_stopping or log_loss is None:
            return evaluation, False
        if self.best is None or log_loss < self.best[1]:
            self.best = (state.step, log_loss)
            self._save(best_log_loss=log_loss)
        # A resumed run evaluates the same weights again, which on a GPU may give another last digit.
        return evaluation, self.best[0] != state.step and log_loss > self.best[1]

    def _restore_best(self, evaluation: Evaluation | None) -> Evaluation | None:
        """Put the best epoch's weights in place, also when no early stop fired; its evaluation."""
        last_step = self.state.step
        found = self.state.restore(self.store.best_valid() if self.worker.is_main else None, self.worker)
        if not found or self.state.step == last_step or self.eval_manifest is None:
            return evaluation
        self._say(f"restored the best epoch: {self.state.epoch + 1} (step {self.state.step})")
        return self._score(self.eval_manifest)

    def _score(self, manifest: Manifest) -> Evaluation:
        with self.state.averaged():
            return evaluate(self.state.model, self.state.tables, manifest, self.worker, self.config)

    def _say(self, text: str) -> None:
        if self.worker.is_main:
            print(f"[train] {text}", flush=True)
