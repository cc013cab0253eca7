"""The training loop, the same for every recipe and every layout."""

import contextlib
import functools
import gc
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch

from megavar import logs
from megavar.data.batch import Batch
from megavar.errors import ExitCode, MegavarError, NonFiniteError
from megavar.frozen import Identity
from megavar.parallel import seeds
from megavar.training import ledger, schedules
from megavar.training.checkpoint import Checkpointer, ModuleState
from megavar.training.ema import moving_averages
from megavar.training.metrics import MetricAccumulator
from megavar.training.monitor import Monitor, Stopwatch
from megavar.training.observers import Observers
from megavar.training.parameter_rows import write_rows
from megavar.training.preemption import StopRequest
from megavar.training.profiler import Profiler
from megavar.training.provenance import provenance
from megavar.training.recovery import Recovery, Verdict
from megavar.training.run import Run, first_error, micro_batch_size, on_first_rank
from megavar.training.step import build_engines, train_step
from megavar.training.watchdog import Watchdog

_log = logging.getLogger(__name__)
_REPLACED = "replaced_samples"


class Trainer:
    """Trains a :class:`Run` from wherever it stands to its end, or to an agreed stop."""

    def __init__(self, run: Run) -> None:
        """Check the batch arithmetic and build the engines. Collective; writes nothing.

        Raises:
            ConfigError: batch sizes do not divide, or the layout does not work.
        """
        self.stop = StopRequest().install()
        self.setup, self.topology, self.recipe, self.directory = run, run.topology, run.recipe, run.directory
        train = run.train
        self.total_steps = train.total_steps(run.samples)
        self.steps_per_epoch = run.samples / train.global_batch_size
        schedules.check_warmup(run.optimizer.schedule, self.total_steps, self.steps_per_epoch)
        self.micro_batch_size = micro_batch_size(train, run.topology)
        self.engines = build_engines(
            run.recipe,
            optimizer=run.optimizer,
            deepspeed=run.deepspeed,
            deepspeed_origin=run.deepspeed_origin,
            global_batch_size=train.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            precision=train.precision,
            topology=run.topology,
        )
        self.averages = moving_averages(self.engines, train.ema)
        self.checkpointer = Checkpointer(
            run.directory.checkpoints, train.checkpoint, self._layout(), provenance(run.config),
        )
        self.monitor = Monitor(run.logging, run.directory, run.name, run.topology.rank, self.total_steps)
        self.profiler = Profiler(run.logging.profile, run.directory.path / "profiles", run.topology.rank)
        self.watchdog = Watchdog(train.watchdog)
        self.recovery = Recovery(train.recovery)
        self.metrics, self.stopwatch = MetricAccumulator(several_modules=len(self.engines) > 1), Stopwatch()
        self.step = 0
        """Steps taken, skipped ones included."""
        self.data_step = 0
        """Global batches gone through: ``step``, plus those that rollbacks have passed over."""
        self._kept_step = 0
        """The step that the newest checkpoint holds."""
        self._save_owed = False
        """A save is due, and waits for the end of a streak of steps that are not applied."""
        self._batches: Iterator[list[Batch]] = iter(())
        self.observers = Observers(run.observers)
        self.observers.begin(self)

    def run(self) -> ExitCode:
        """Train to the last step, or until all ranks agree to stop. A finished run returns at once.

        Raises:
            ConfigError: the run directory is another run's.
            RunInUseError: another process trains this run.
            CheckpointError: there are checkpoints, but none can be used.
            DataError: a sample is damaged, and the configuration does not allow going on without it.
            NonFiniteError: losses or gradients stay non-finite after the allowed rollbacks.
        """
        code: ExitCode | None = None
        devices = ledger.devices()
        try:
            self.checkpointer.frozen = on_first_rank(functools.partial(self._open_directory, devices))
            if self.directory.done:
                _log.info("%s is finished already.", self.directory.path)
                return ExitCode.FINISHED
            with (
                self.watchdog,
                _manual_garbage_collection(),
                contextlib.closing(self.monitor),
                self.observers.watching(),
            ):
                code = self._loop()
                return code
        except MegavarError:
            raise
        except Exception:
            _log.critical("Ended by an exception after step %d.", self.step, exc_info=True)
            raise
        finally:
            self.directory.release()
            if code != ExitCode.PREEMPTED:  # else a late signal would kill a process that is about to leave
                self.stop.restore()
            logs.set_step(None)

    def _loop(self) -> ExitCode:
        train, reports = self.setup.train, self.setup.logging
        fresh = self._fresh()
        begins = not self._restore(fresh=fresh)
        initial = self._take_initial_weights(fresh) if begins else None
        began_with = on_first_rank(lambda: self.directory.note_weights(self.checkpointer.frozen, initial, begins))
        if began_with is not None:
            self.checkpointer.provenance["initial_weights"] = began_with.to_json()
        if fresh:
            on_first_rank(self.directory.note_fresh_start)
        while self.step < self.total_steps:
            self.profiler.step_begins()
            self.stopwatch.step_begins()
            micro_batches = self._read()
            applied = self._train_step(micro_batches)
            self.step, self.data_step = self.step + 1, self.data_step + 1
            self.stopwatch.step_done()
            self.watchdog.beat(self.step)
            self.observers.stepped(self.step)
            logs.set_step(self.step)
            last = self.step == self.total_steps
            if not self._recovered(applied, last):
                continue
            if last or self._due(reports.interval):
                self._log()
            self.monitor.advance(self.step)
            stopping = self._due(train.agreement_interval) and self.stop.agreed() and not last
            self._save_owed |= last or stopping or self._due(train.checkpoint.interval)
            if self._save_owed:
                self._save()
            if stopping:
                self.checkpointer.close()
                _log.info("Stopped after step %d of %d, as agreed; step %d is saved.", self.step, self.total_steps,
                          self._kept_step)  # fmt: skip
                return ExitCode.PREEMPTED
            if last or self._due(reports.samples_interval):
                self._preview()
                self.observers.previewed(self.step)
            if self._due(train.garbage_collection_interval):
                gc.collect()
        self.checkpointer.close()
        on_first_rank(self.directory.check_held)
        on_first_rank(lambda: self.directory.finish({"steps": self.total_steps}))
        return ExitCode.FINISHED

    # -- one step -----------------------------------------------------------------------------------------------------

    def _read(self) -> list[Batch]:
        """This rank's micro-batches of the next step.

        Raises:
            MegavarError: what this rank or, on the steps of ``agreement_interval``, any rank met in reading its own.
                In the latter case all ranks raise it, and the run is saved.
        """
        batches: list[Batch] = []
        met: MegavarError | None = None
        with self.stopwatch.part("data"):
            try:
                batches = next(self._batches)
            except MegavarError as error:
                met = error
        if self._due(self.setup.train.agreement_interval):
            met = first_error(met)
            if met is not None and self.step > self._kept_step:
                _log.error("Saving and ending the run after step %d: %s", self.step, met)
                self._save()
                self.checkpointer.close()
        if met is not None:
            raise met
        return batches

    def _train_step(self, micro_batches: list[Batch]) -> bool:
        """Train every active module on one global batch; return whether all updates were applied."""
        # Our randomness is counter-based. A plugin's modules may draw from the global generator, which depends on the
        # ranks (the log warns of it): with this they resume exactly at least, and ranks draw different numbers.
        torch.manual_seed(int(seeds.random_bits(self.setup.train.seed, "step", self.step, self.topology.data_rank)))
        replaced = [batch.replaced.sum() for batch in micro_batches if batch.replaced is not None]
        if replaced:  # damaged samples whose place others took
            count = torch.stack(replaced).sum().to(micro_batches[0].labels.device)
            self.metrics.add_statistics({_REPLACED: count})
        applied = train_step(
            self.recipe,
            self.engines,
            micro_batches,
            self.step,
            rates=self._rates,
            metrics=self.metrics,
            topology=self.topology,
        )
        if applied:
            self.recipe.after_step(self.step, functools.partial(write_rows, self.engines.values()))
            for average in self.averages.values():
                average.update(self.step)
        return applied

    def _rates(self, name: str, step: int) -> tuple[float, float]:
        """Learning rate and weight decay of module ``name`` at ``step``."""
        config = self.setup.optimizer
        peak = schedules.peak_learning_rate(config, self.setup.train.global_batch_size, name)
        rate = schedules.learning_rate(config.schedule, peak, step, self.total_steps, self.steps_per_epoch)
        return rate * self.recipe.rate_factor(step), schedules.weight_decay(config, step, self.total_steps, name)

    # -- around the step ----------------------------------------------------------------------------------------------

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.step % interval == 0

    def _recovered(self, applied: bool, last: bool) -> bool:
        """Deal with a step that was not applied. False after a rollback."""
        verdict = self.recovery.judge(applied, last)
        if applied:
            return True
        failed_at, reached = self.step, self.data_step
        self.tell(failed_at, "not_finite", verdict=verdict.value, consecutive=self.recovery.consecutive)
        _log.warning("Step %d was not applied: its loss or gradient is not finite.", failed_at)
        if verdict is Verdict.CONTINUE:
            return True
        reason = f"train.recovery.rollbacks={self.setup.train.recovery.rollbacks} are used up"
        if verdict is Verdict.ROLL_BACK:
            if self._restore(at_most=failed_at):
                self.recovery.rolled_back()
                self.data_step = reached  # the batches in between are not seen again
                self._open_data()
                self.tell(self.step, "rolled_back", from_step=failed_at, data_step=reached)
                _log.warning("Rolled back from step %d to %d, with later data.", failed_at, self.step)
                return False
            reason = "there is no checkpoint to go back to"
        raise NonFiniteError(
            f"Loss or gradient of {self.setup.name} was not finite in the last {self.recovery.consecutive} steps up to "
            f"{failed_at}, and {reason}. See {self.directory.metrics} for the losses before; lower optimizer.lr or "
            f"optimizer.gradient_clipping, or look at the data, and start again."
        )

    def _log(self) -> None:
        values, statistics = self.metrics.reduce(self.recipe.collect())
        if (replaced := statistics.pop(_REPLACED, torch.zeros(()))) > 0:
            values[_REPLACED] = float(replaced)
        values |= self.recipe.summarize(statistics)
        for name in self.engines:
            suffix = f"/{name}" if len(self.engines) > 1 else ""
            rate, decay = self._rates(name, self.step - 1)  # with which this step was taken
            values |= {f"learning_rate{suffix}": rate, f"weight_decay{suffix}": decay}
        if self.recovery.skipped:
            values["skipped_steps"] = self.recovery.skipped
        if (median := self.recovery.spike(values.get("loss"))) is not None:
            self.tell(self.step, "loss_spike", loss=values["loss"], median=median)
        self._check_divergence(values.get("loss"))
        speed = self.stopwatch.read(self.setup.train.global_batch_size)
        if self.setup.flops_per_image and self.setup.peak_flops and speed:
            per_device = speed["images_per_second"] * self.setup.flops_per_image / self.topology.world_size
            speed["model_flops_utilization"] = per_device / self.setup.peak_flops
        if torch.cuda.is_available():
            speed["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.checkpointer.last_save_seconds is not None:
            speed["last_save_seconds"] = self.checkpointer.last_save_seconds
        self.monitor.log({"step": self.step, "epoch": self.data_step / self.steps_per_epoch} | values | speed)
        self.observers.logged(self.step, values | speed, statistics)

    def tell(self, step: int, event: str, **facts: Any) -> None:
        """Write down what is no regular metric, and let all observers know."""
        self.monitor.event(step, event, **facts)
        self.observers.happened(step, event, facts)

    def _check_divergence(self, loss: float | None) -> None:
        """All ranks have the same losses, so they end together.

        Raises:
            NonFiniteError: the run has diverged, though its losses are finite.
        """
        if (found := self.recovery.diverged(loss)) is not None:
            self.tell(self.step, "diverged", first_loss=found[0], median=found[1])
            raise NonFiniteError(
                f"{self.setup.name} has diverged: its last logged losses up to step {self.step} have the median "
                f"{found[1]:.4g}, it began with {found[0]:.4g} (train.recovery.divergence_factor="
                f"{self.setup.train.recovery.divergence_factor}). Lower optimizer.lr or optimizer.gradient_clipping, "
                f"or lengthen the warm-up; then start anew (train.fresh=true), or remove the checkpoints of the steps "
                f"after which the loss rose, and start again."
            )

    def _preview(self) -> None:
        if self.setup.preview is None:
            return
        with self.watchdog.pause(), self.stopwatch.part("preview"), contextlib.ExitStack() as stack, torch.no_grad():
            for average in self.averages.values():
                stack.enter_context(average.as_weights())
            picture = None
            try:
                picture = self.setup.preview(self.step)
            except (MegavarError, OSError) as error:  # no run ends for a picture
                _log.warning("No preview of step %d: %s", self.step, error)
        if picture is not None:
            self.monitor.save_picture(self.step, picture)

    # -- state --------------------------------------------------------------------------------------------------------

    def _open_directory(self, devices: list[dict[str, Any]]) -> dict[str, Identity]:
        """On rank 0: take the lock, check that the directory is this run's, and record this start."""
        self.directory.acquire()
        plans = {name: engine.plan.json for name, engine in self.engines.items()}
        return self.directory.open(
            self.setup.config, self._layout(), plans, self._fresh(), devices, self.total_steps
        )  # fmt: skip

    def _fresh(self) -> bool:
        """Once only. Launchers start the configuration that the run directory keeps, which forgets it then."""
        by_launcher = bool(os.environ.get("MEGAVAR_ATTEMPT"))
        return self.setup.train.fresh and (by_launcher or int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0)

    def _layout(self) -> dict[str, Any]:
        stage = max(engine.plan.stage for engine in self.engines.values())
        sizes = {"world_size": self.topology.world_size, "data": self.topology.data, "zero_stage": stage}
        return sizes | self.topology.config.model_dump()

    def _module_states(self) -> dict[str, ModuleState]:
        averages = {name: average.tensors for name, average in self.averages.items()}
        return {name: ModuleState(engine.deepspeed, averages.get(name)) for name, engine in self.engines.items()}

    def _save(self) -> None:
        """Save, unless steps are not being applied: such a checkpoint holds nothing new, and would push good ones out.

        The step after the streak saves instead; a run that ends meanwhile continues from the checkpoint before it.
        """
        if self.recovery.consecutive:
            _log.warning("Not saving after step %d: the last %d steps were not applied.", self.step,
                         self.recovery.consecutive)  # fmt: skip
            return
        self._save_owed = False
        state = {"step": self.step, "data_step": self.data_step, "recovery": self.recovery.state()}
        with self.watchdog.pause(), self.stopwatch.part("checkpoint"):
            on_first_rank(self.directory.check_held)
            self.checkpointer.save(self.step, self._module_states(), state)
        self._kept_step = self.step
        self.recovery.saved()
        self.observers.saved(self.step)

    def _restore(self, fresh: bool = False, at_most: int | None = None) -> bool:
        """Continue from the newest whole checkpoint (of a step up to ``at_most``); False if there is none."""
        with self.watchdog.pause():
            state = self.checkpointer.load(self._module_states(), fresh=fresh, at_most=at_most)
        if state is not None:
            self.step, self.data_step = state["step"], state["data_step"]
            self._kept_step = self.step
        if state is not None and at_most is None:
            self.recovery.load_state(state["recovery"])
            _log.info("Continuing after step %d of %d.", self.step, self.total_steps)
        self.metrics.forget()
        self.recipe.collect()
        self.monitor.open(self.step, dict(self.setup.config))
        self._open_data()
        self.observers.opened(self.step)
        return state is not None

    def _take_initial_weights(self, fresh: bool) -> Identity | None:
        """Put the weights that the configuration names, if any, into the recipe's first module; say what they are."""
        initial = self.setup.initial
        if initial is None:
            return None
        with self.watchdog.pause():
            identity = on_first_rank(lambda: self.directory.identify_initial(fresh))
            name, state = next(iter(self._module_states().items()))
            self.checkpointer.begin(name, state, initial)
        _log.info("Beginning with the weights of %s.", identity)
        return identity

    def _open_data(self) -> None:
        self._batches = iter(self.setup.loader(self.data_step, self.micro_batch_size))


@contextlib.contextmanager
def _manual_garbage_collection() -> Iterator[None]:
    """Without the automatic collector ranks would not pause at different times and make each other wait."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
