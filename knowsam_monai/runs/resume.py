from __future__ import annotations

import errno
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.handlers import CheckpointSaver

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMRuntimeError, KnowSAMValueError
from knowsam_monai.files import InvalidCheckpointError, read_tensor_file, remove_parts, save_checkpoint
from knowsam_monai.runs import stop_signals
from knowsam_monai.runs.at_exception import add_exception_handler
from knowsam_monai.runs.comparison import configured, digests, other_data, other_settings
from knowsam_monai.runs.config import running_config
from knowsam_monai.runs.cpu import match_matmul, matmul_precision
from knowsam_monai.runs.last_iteration import last_iteration
from knowsam_monai.runs.starting import release
from knowsam_monai.seeds import random_state, set_random_state
from knowsam_monai.wrappers import plain_network

logger = logging.getLogger(__name__)

# what a run writes beside its checkpoints: its students and all that shows how good they are
PRODUCTS = (
    *("model.pt", "last_model_epoch=*.pt", "results.csv", "validation_cases.csv", "validation.png"),
    *("validation_slices/*.png", "report.html"),
)
KEYS = ("trainer", "best", "random", "matmul", "validate", "settings", "data")  # of a file, besides the objects' names
FILE = re.compile(r"resume_(\d+)\.pt")
STEPS_BETWEEN_AGREEMENTS = 10  # several processes must agree where to stop, and each agreement waits for the device
REMEDY = "choose another --output_dir, or start over with --resume False, which replaces that run"


class Resume:
    """
    Save everything a run depends on, so that the same command resumes it after an interruption, on a CPU bit for bit.

    After every epoch ``resume_<iteration>.pt`` is written: the given objects, the trainer's iteration, the best metric
    so far and the random states of every process. A file is complete or does not exist, and the previous one is kept.
    When a run starts, it loads the newest intact file, but refuses one with other settings or other data. The order of
    the batches is a function of the iteration (:class:`knowsam_monai.data.SemiSupervisedLoader`) and is not saved. A
    run that its validation ended, as by MONAI's ``EarlyStopHandler``, is finished and is not resumed.

    A trainer that goes on after its own run with a larger `max_epochs`, as in each round of MONAI's ``MonaiAlgo``,
    loads nothing: its weights may have been replaced in between. In federated learning start clients with
    ``--resume False``, so that one that is restarted keeps the server's weights too.

    SIGTERM and Ctrl-C write one more file and end the process with exit code 143 or 130, after the current step or in
    the middle of a validation, which is then repeated. Several processes agree on a step, within ten, and complete a
    validation first, for which ``TORCH_ELASTIC_SHUTDOWN_TIMEOUT`` must be long enough. A second signal ends the process
    at once, except for a second SIGTERM below torchrun, which SLURM sends too.

    Put it after the ``ValidationHandler`` and everything else that runs after a step, and before :class:`Preflight`.
    Handlers of exceptions may be anywhere. Directly after the ``ValidationHandler`` a single process also saves when a
    validation after an epoch starts, so it loses no step if it is killed there.

    Args:
        objects: name to any object with ``state_dict`` and ``load_state_dict``; None is skipped.
        output_dir: folder of the files, shared by all machines of a run.
        evaluator: the validation engine, whose best metric is saved; None if there is none.
        best_saver: MONAI's saver of the best model, so that a resumed run does not replace it by a worse one.
        data: for each set, the files and the hashes of their contents (``DatalistReport.contents``). They are compared,
            not restored. None: not compared.
        settings: names and plain values that must not change when a run resumes. They are compared, not restored.
            None: the settings of the config that builds this handler, if any; see
            :func:`knowsam_monai.runs.comparison.configured`.
        enabled: False starts over: when training starts, the checkpoints of an earlier run are removed, and so are its
            students, validations, pictures and report.
        save: False only reads (a preflight).

    Raises:
        ValueError: if settings or data differ, naming keys or files, or if the file has other objects.
        RuntimeError: if something to be saved is not finite, or a file of the run cannot be written.

    Example::

        resume = Resume({"network": network, "optimizer": optimizer, "distiller": distiller}, output_dir="output")
        SupervisedTrainer(..., train_handlers=[*handlers, resume])
    """

    def __init__(
        self,
        objects: Mapping[str, Any],
        output_dir: str | os.PathLike,
        evaluator: Engine | None = None,
        best_saver: CheckpointSaver | None = None,
        data: Mapping[str, Sequence[tuple[str, str]]] | None = None,
        settings: Mapping[str, Any] | None = None,
        enabled: bool = True,
        save: bool = True,
    ) -> None:
        self.objects = {name: item for name, item in objects.items() if item is not None}
        self.output_dir = Path(output_dir)
        self.evaluator = evaluator
        self.best_saver = best_saver
        self.data = data
        config = running_config() if settings is None else None
        self.settings = settings if config is None else configured(config)
        self.enabled = enabled
        self.saves = save
        self.signals = stop_signals.StopSignals()
        self._before_validation: dict[str, Any] | None = None  # the random state before the validation that is running
        self._waits_for_batch: bool | None = None  # None before the first step
        self._has_started_over = False
        self._completed = (-1, 0)  # the iteration and `max_epochs` of this trainer's last run, once it has completed
        self._kept: list[Path] = []  # the last two files written or loaded

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._waiting, True)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._waiting, False)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.step_completed)
        before = engine._event_handlers[Events.EPOCH_COMPLETED][-1:]  # Ignite has no public way to see this
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.completed)
        add_exception_handler(engine, self.exception_raised)
        if self.evaluator is not None:
            is_next = any(getattr(handler, "validator", None) is self.evaluator for handler, *_ in before)
            self.evaluator.add_event_handler(Events.STARTED, self.validation_started, engine if is_next else None)
            self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.stop_validation)
            self.evaluator.add_event_handler(Events.COMPLETED, self.validation_completed)

    def started(self, engine: Engine) -> None:
        """Restore the newest intact file, and handle SIGTERM and Ctrl-C from now on."""
        self._waits_for_batch = None
        if self.saves:
            if ranks.rank() == 0:
                remove_parts(self.output_dir)
                if not (self.enabled or self._has_started_over):  # a second run of this trainer goes on
                    self._remove_earlier_run()
            self._has_started_over = True
            self.signals.listen()
        (iteration, max_epochs), self._completed = self._completed, (-1, 0)
        if engine.state.iteration == iteration and engine.state.max_epochs > max_epochs:
            _continue_loader(engine)
        elif self.enabled:
            self._restore(engine)

    def completed(self, engine: Engine) -> None:
        """Give the signals back, and note where the run ended."""
        self.signals.give_back()
        self._completed = (engine.state.iteration, engine.state.max_epochs)

    def files(self) -> list[Path]:
        """The checkpoints in the folder, newest first."""
        files = [p for p in self.output_dir.glob("resume_*.pt") if FILE.fullmatch(p.name)]
        return sorted(files, key=lambda p: int(FILE.fullmatch(p.name)[1]), reverse=True)  # type: ignore[index]

    def _remove_earlier_run(self) -> None:
        """A run that starts over has no student until it chooses one, and only its own validations count."""
        for file in (*self.files(), *(file for name in PRODUCTS for file in self.output_dir.glob(name))):
            file.unlink()

    def __call__(self, engine: Engine) -> None:
        """Save after an epoch; end the process if a signal has arrived since, or during this epoch's validation."""
        self._save(engine)
        if self._before_validation is not None or self._must_stop():
            self._stop(engine)

    def step_completed(self, engine: Engine) -> None:
        """After a step in which a signal arrived, save and end the process."""
        epoch_length, steps = engine.state.epoch_length or math.inf, getattr(engine, "accumulation_steps", 1)
        iteration = (engine.state.iteration - 1) % epoch_length + 1  # in this epoch
        every = steps * (STEPS_BETWEEN_AGREEMENTS if ranks.world_size() > 1 else 1)
        # the end of an epoch is left to `__call__`, which runs after the validation
        ends_epoch = iteration == epoch_length or engine.state.iteration == last_iteration(engine)
        if iteration % every == 0 and not ends_epoch and self._must_stop():  # between two optimizer steps
            self._save(engine)
            self._stop(engine)

    def exception_raised(self, engine: Engine, error: BaseException) -> None:
        """
        Save and stop if a signal to all processes ended a loader worker; this is not an error.

        A step that still waits for its batch has changed nothing, and an interrupted validation is repeated. Before the
        first step there is nothing to save.
        """
        in_step = self._waits_for_batch is False and self._before_validation is None
        if isinstance(error, RuntimeError) and self.signals.received and not in_step and ranks.world_size() == 1:
            logger.warning("After a signal: %s", str(error).partition("\n")[0])
            steps = getattr(engine, "accumulation_steps", 1)
            between_steps = engine.state.iteration % (engine.state.epoch_length or math.inf) % steps == 0
            if self._before_validation is not None or (self._waits_for_batch and between_steps):
                self._save(engine)
            self._stop(engine)
        self._release()
        if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
            file = os.fsdecode(error.filename or "a file of this run")
            raise KnowSAMRuntimeError(
                f"`output_dir` must be readable and have free space but {file} cannot be read or written "
                f"({error.strerror}); fix this and run the same command: it resumes from {self._newest_name()}."
            ) from error

    def validation_started(self, evaluator: Engine, trainer: Engine | None = None) -> None:
        """Keep the random state, so that an interrupted validation can be repeated; after an epoch, save it too."""
        self._before_validation = random_state()
        is_alone = ranks.world_size() == 1  # otherwise saving is collective, and a process may have no case
        if is_alone and trainer is not None and trainer.last_event_name == Events.EPOCH_COMPLETED:
            self._save(trainer)

    def stop_validation(self, evaluator: Engine) -> None:
        """End a validation in which a signal arrived."""
        if self.signals.received and self.saves and ranks.world_size() == 1:
            evaluator.terminate(skip_completed=True)

    def validation_completed(self, evaluator: Engine) -> None:
        """Note that the validation is complete."""
        self._before_validation = None

    def _waiting(self, engine: Engine, waits: bool) -> None:
        self._waits_for_batch = waits

    def _must_stop(self) -> bool:
        if ranks.world_size() == 1 or not self.saves:
            return self.signals.received is not None
        signal = int(idist.all_reduce(self.signals.received or 0, "MAX"))
        if signal:  # otherwise keep one that arrived in the meantime, for the next time
            self.signals.received = signal
        return signal > 0

    def _stop(self, engine: Engine) -> None:
        self._release()
        iteration, newest = engine.state.iteration, self._newest_name()
        logger.warning(
            "Stopped by a signal in iteration %d; run the same command to resume from %s.", iteration, newest
        )
        raise SystemExit(128 + (self.signals.received or 0))

    def _release(self) -> None:
        self.signals.give_back()
        release()

    def _newest_name(self) -> str:
        return next((file.name for file in self.files()), "the beginning")

    def _save(self, engine: Engine) -> None:
        if not self.saves:
            return
        random_states = idist.all_gather(self._before_validation or random_state())
        if ranks.rank() == 0:
            self._write(engine, random_states)
        idist.barrier()  # torchrun ends all processes once one has ended, and this one may be about to

    def _write(self, engine: Engine, random_states: Any) -> None:
        state: dict[str, Any] = {name: plain_network(item).state_dict() for name, item in self.objects.items()}
        state["trainer"] = dict(engine.state_dict())
        state["best"] = []
        if self.evaluator is not None:
            best = self.evaluator.state
            state["best"] = [float(best.best_metric), float(best.best_metric_epoch)]
        state["random"] = random_states if isinstance(random_states, list) else [random_states]
        state["matmul"] = matmul_precision()  # a run may choose it by a measurement
        state["finished"] = bool(engine.should_terminate)  # by this epoch's validation, as of EarlyStopHandler
        state["validate"] = self._before_validation is not None  # a resumed run starts with this validation
        state["settings"] = None if self.settings is None else dict(self.settings)
        state["data"] = digests(self.data)
        if engine.scaler is not None:
            state["scaler"] = engine.scaler.state_dict()
        path = self.output_dir / f"resume_{engine.state.iteration}.pt"
        save_checkpoint(state, path)
        self._kept = [path, *(file for file in self._kept if file != path)][:2]
        for old in self.files() if self._kept[1:] else []:
            if old not in self._kept:
                old.unlink(missing_ok=True)

    def _restore(self, engine: Engine) -> None:
        file, state = self._newest() if ranks.rank() == 0 else (None, None)
        if ranks.world_size() > 1:  # one process decides which file is intact
            name = idist.broadcast(file.name if file else "none", safe_mode=True)
            file = self.output_dir / name if FILE.fullmatch(name) else None
        if file is None:
            return
        state = read_tensor_file(file) if state is None else state
        self._check(file, state)
        self._load(engine, file, state)
        self._kept = [file]
        logger.warning("Resuming from %s, iteration %d.", file, engine.state.iteration)
        if state["validate"] and self.evaluator is not None and self.saves:
            self.evaluator.run(engine.state.epoch)
            self(engine)
        if engine.state.epoch >= engine.state.max_epochs:
            logger.warning(
                "This run has finished its %d iterations. To train again, add --resume False.", engine.state.iteration
            )

    def _newest(self) -> tuple[Path | None, dict[str, Any] | None]:
        """The newest intact file and its content."""
        for file in self.files():
            try:
                state = read_tensor_file(file)
                if not isinstance(state, dict) or "trainer" not in state:
                    raise InvalidCheckpointError("holds something else")
                return file, state
            except (OSError, InvalidCheckpointError) as error:
                logger.warning("Skipping checkpoint %s: it %s. Trying the previous one.", file, error)
        if self.files():
            logger.warning("No checkpoint in %s is intact, so this run starts from the beginning.", self.output_dir)
        return None, None

    def _load(self, engine: Engine, file: Path, state: Mapping[str, Any]) -> None:
        try:
            for name, item in self.objects.items():
                plain_network(item).load_state_dict(state[name])
            engine.load_state_dict({**state["trainer"], "max_epochs": engine.state.max_epochs})
            is_over = engine.state.iteration >= last_iteration(engine)  # in an epoch that was cut short
            if state.get("finished") or is_over:
                engine.state.epoch = engine.state.max_epochs
            if engine.scaler is not None and "scaler" in state:
                engine.scaler.load_state_dict(state["scaler"])
            if self.evaluator is not None and state["best"]:
                metric, epoch = state["best"]
                self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = metric, int(epoch)
                if self.best_saver is not None and epoch >= 0:
                    self.best_saver.load_state_dict({"_saved": [(metric, "")]})
            if torch.device(engine.state.device).type == "cpu":
                match_matmul(state["matmul"])
            if ranks.rank() < len(state["random"]):
                set_random_state(state["random"][ranks.rank()])
        except Exception as error:  # every object refuses a foreign state in its own way
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise KnowSAMValueError(
                f"{file} must be a checkpoint of this run but cannot be restored ({reason}); {REMEDY}."
            ) from error
        _continue_loader(engine)

    def _check(self, file: Path, state: Mapping[str, Any]) -> None:
        missing = sorted({*KEYS, *self.objects} - state.keys())
        if missing:
            raise KnowSAMValueError(
                f"{file} must hold everything this run saves but lacks `{'`, `'.join(missing)}`: it was written for "
                f"other objects or by another version; {REMEDY}."
            )
        differences = []
        if state["settings"] is not None and self.settings is not None:
            differences = other_settings(state["settings"], self.settings)
        differences += other_data(state["data"], self.data)
        if differences:
            more = f" and {len(differences) - 5} more" if differences[5:] else ""
            raise KnowSAMValueError(
                f"This run differs from the one in {file}: {', '.join(differences[:5])}{more}; {REMEDY}."
            )


def _continue_loader(engine: Engine) -> None:
    """Let a loader that knows its place, such as `SemiSupervisedLoader`, go on after the trainer's last iteration."""
    if hasattr(engine.data_loader, "set_iteration"):
        engine.data_loader.set_iteration(engine.state.iteration)
