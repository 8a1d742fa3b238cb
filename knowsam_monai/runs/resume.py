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
from knowsam_monai.runs.last_iteration import last_iteration
from knowsam_monai.seeds import random_state, set_random_state

logger = logging.getLogger(__name__)

KEYS = ("trainer", "best", "random", "validate", "settings", "data")  # of a file, beside the objects' names
FILE = re.compile(r"resume_(\d+)\.pt")
RANKS_ASK_EVERY = 10  # steps; processes must agree where to stop, and asking makes each wait for the device
REMEDY = "name another --output_dir, or begin anew with --resume False, which puts this run in the place of that one"


class Resume:
    """
    A run that was broken off goes on with the same command, to the same weights.

    After every epoch all that training depends on is written to ``resume_<iteration>.pt``: the objects given, the
    trainer's iteration, the best metric so far and every process's random states. The file is there whole or not at
    all, and the one before stays until the next. A run that starts takes the newest file that is whole, and refuses it
    when it is of other settings or other data. The loader's order is a function of the iteration
    (:class:`knowsam_monai.data.SemiSupervisedLoader`), so nothing of it is saved.

    SIGTERM and Ctrl-C write one more file and end the process with 143 and 130: after the step they came in, or in the
    middle of a validation, which is then made again. Several processes agree on the step, within ten, and finish a
    validation. A second signal ends the process at once.

    Put it after the ``ValidationHandler`` and all that acts after a step, and before :class:`Preflight`. Handlers of
    exceptions may stand anywhere.

    Args:
        objects: name to whatever has ``state_dict`` and ``load_state_dict``; None is left out.
        output_dir: folder of the files; several machines share it.
        evaluator: the validation engine, whose best metric is kept; None without one.
        best_saver: MONAI's saver of the best model, so that a worse one never takes its place.
        data: of each set the files and the hashes of what they hold, as ``DatalistReport.contents`` has them; compared,
            not restored. None: not compared.
        settings: names and plain values that a run must share with the one it goes on with; compared, not restored.
            None: what is configured, see :func:`knowsam_monai.runs.comparison.configured`, where the handler is built
            from a config, and nothing elsewhere.
        enabled: False starts afresh and removes the files of a run before.
        save: False only reads (a preflight).

    Raises:
        ValueError: when settings or data differ, naming keys or files, or the file is of other objects.
        RuntimeError: when something that would be saved is not finite, or a file of the run cannot be written.

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
        self._before_validation: dict[str, Any] | None = None  # random state, while a validation runs
        self._waits_for_batch: bool | None = None  # None before the first step
        self._kept: list[Path] = []  # the last two files written or gone on from

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._waiting, True)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._waiting, False)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.step_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.signals.give_back)
        add_exception_handler(engine, self.exception_raised)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.STARTED, self.validation_started)
            self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.stop_validation)
            self.evaluator.add_event_handler(Events.COMPLETED, self.validation_completed)

    def started(self, engine: Engine) -> None:
        """Restore the newest whole file, and listen to SIGTERM and Ctrl-C."""
        self._waits_for_batch = None
        if self.saves:
            if ranks.rank() == 0:
                remove_parts(self.output_dir)
                for file in [] if self.enabled else self.files():
                    file.unlink()
            self.signals.listen()
        if self.enabled:
            self._restore(engine)

    def files(self) -> list[Path]:
        """The files of this folder, newest first."""
        files = [p for p in self.output_dir.glob("resume_*.pt") if FILE.fullmatch(p.name)]
        return sorted(files, key=lambda p: int(FILE.fullmatch(p.name)[1]), reverse=True)  # type: ignore[index]

    def __call__(self, engine: Engine) -> None:
        """Save after an epoch; end the process when a signal has come since, or in this epoch's validation."""
        self._save(engine)
        if self._before_validation is not None or self._asked_to_stop():
            self._stop(engine)

    def step_completed(self, engine: Engine) -> None:
        """After a step in which a signal came, save and end the process."""
        epoch_length, steps = engine.state.epoch_length or math.inf, getattr(engine, "accumulation_steps", 1)
        place = (engine.state.iteration - 1) % epoch_length + 1  # in its epoch, whose end has its validation first
        every = steps * (RANKS_ASK_EVERY if ranks.world_size() > 1 else 1)
        ends = place == epoch_length or engine.state.iteration == last_iteration(engine)
        if place % every == 0 and not ends and self._asked_to_stop():  # between two optimiser steps
            self._save(engine)
            self._stop(engine)

    def exception_raised(self, engine: Engine, error: BaseException) -> None:
        """
        Save and stop when a signal to all processes has ended a loader worker, which is no error.

        Of a step that waits for its batch nothing is done yet, a validation is made again, and before the first step
        there is nothing to save.
        """
        in_step = self._waits_for_batch is False and self._before_validation is None
        if isinstance(error, RuntimeError) and self.signals.received and not in_step and ranks.world_size() == 1:
            logger.warning("After a signal: %s", str(error).partition("\n")[0])
            steps = getattr(engine, "accumulation_steps", 1)
            between_steps = engine.state.iteration % (engine.state.epoch_length or math.inf) % steps == 0
            if self._before_validation is not None or (self._waits_for_batch and between_steps):
                self._save(engine)
            self._stop(engine)
        self._give_signals_back()
        is_of_a_file = isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT))
        if isinstance(error, OSError) and is_of_a_file:
            file = os.fsdecode(error.filename or "a file of this run")
            raise KnowSAMRuntimeError(
                f"`output_dir` must be readable and have room but {file} cannot be read or written ({error.strerror}); "
                f"see to it and give the same command: it goes on from {self._newest_name()}."
            ) from error

    def validation_started(self, evaluator: Engine) -> None:
        """Keep the random state of before, from which a validation that is broken off is made again."""
        self._before_validation = random_state()

    def stop_validation(self, evaluator: Engine) -> None:
        """End a validation in which a signal came."""
        if self.signals.received and self.saves and ranks.world_size() == 1:
            evaluator.terminate(skip_completed=True)

    def validation_completed(self, evaluator: Engine) -> None:
        """The validation is whole."""
        self._before_validation = None

    def _waiting(self, engine: Engine, waits: bool) -> None:
        self._waits_for_batch = waits

    def _asked_to_stop(self) -> bool:
        if ranks.world_size() == 1 or not self.saves:
            return self.signals.received is not None
        asked = int(idist.all_reduce(self.signals.received or 0, "MAX"))
        if asked:  # else a signal that came meanwhile stays, for the next time
            self.signals.received = asked
        return asked > 0

    def _stop(self, engine: Engine) -> None:
        self._give_signals_back()
        iteration, newest = engine.state.iteration, self._newest_name()
        logger.warning("Stopped by a signal in iteration %d; the same command goes on from %s.", iteration, newest)
        raise SystemExit(128 + (self.signals.received or 0))

    def _give_signals_back(self) -> None:
        self.signals.give_back()
        stop_signals.give_back()

    def _newest_name(self) -> str:
        return next((file.name for file in self.files()), "its beginning")

    def _save(self, engine: Engine) -> None:
        if not self.saves:
            return
        random_states = idist.all_gather(self._before_validation or random_state())
        if ranks.rank() != 0:
            return
        state: dict[str, Any] = {name: _inner(item).state_dict() for name, item in self.objects.items()}
        state["trainer"] = dict(engine.state_dict())
        state["best"] = []
        if self.evaluator is not None:
            found = self.evaluator.state
            state["best"] = [float(found.best_metric), float(found.best_metric_epoch)]
        state["random"] = random_states if isinstance(random_states, list) else [random_states]
        state["validate"] = self._before_validation is not None  # before anything else
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
        if ranks.world_size() > 1:  # one process decides which file is whole
            name = idist.broadcast(file.name if file else "none", safe_mode=True)
            file = self.output_dir / name if FILE.fullmatch(name) else None
        if file is None:
            return
        state = read_tensor_file(file) if state is None else state
        self._check(file, state)
        self._load(engine, file, state)
        self._kept = [file]
        logger.warning("Going on from %s, iteration %d.", file, engine.state.iteration)
        if state["validate"] and self.evaluator is not None and self.saves:
            self.evaluator.run(engine.state.epoch)
            self(engine)
        if engine.state.epoch >= engine.state.max_epochs:
            logger.warning(
                "This run has finished its %d iterations. `--resume False` trains anew.", engine.state.iteration
            )

    def _newest(self) -> tuple[Path | None, dict[str, Any] | None]:
        """The newest whole file and what is in it."""
        for file in self.files():
            try:
                state = read_tensor_file(file)
                if not isinstance(state, dict) or "trainer" not in state:
                    raise InvalidCheckpointError("holds something else")
                return file, state
            except (OSError, InvalidCheckpointError) as error:
                logger.warning("%s must be a whole checkpoint but is not: it %s; trying the one before.", file, error)
        if self.files():
            logger.warning("No checkpoint in %s is whole: this run starts from its beginning.", self.output_dir)
        return None, None

    def _load(self, engine: Engine, file: Path, state: Mapping[str, Any]) -> None:
        try:
            for name, item in self.objects.items():
                _inner(item).load_state_dict(state[name])
            engine.load_state_dict({**state["trainer"], "max_epochs": engine.state.max_epochs})
            if engine.state.iteration >= last_iteration(engine):  # at the end of an epoch that is cut short
                engine.state.epoch = engine.state.max_epochs
            if engine.scaler is not None and "scaler" in state:
                engine.scaler.load_state_dict(state["scaler"])
            if self.evaluator is not None and state["best"]:
                metric, epoch = state["best"]
                self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = metric, int(epoch)
                if self.best_saver is not None and epoch >= 0:
                    self.best_saver.load_state_dict({"_saved": [(metric, "")]})
            if ranks.rank() < len(state["random"]):
                set_random_state(state["random"][ranks.rank()])
        except Exception as error:  # whatever the objects say of what is not theirs
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise KnowSAMValueError(
                f"{file} must be of this run but cannot be restored ({reason}); {REMEDY}."
            ) from error
        if hasattr(engine.data_loader, "set_iteration"):
            engine.data_loader.set_iteration(engine.state.iteration)

    def _check(self, file: Path, state: Mapping[str, Any]) -> None:
        missing = sorted({*KEYS, *self.objects} - state.keys())
        if missing:
            raise KnowSAMValueError(
                f"{file} must hold all that this run saves but lacks `{'`, `'.join(missing)}`, as one of other objects "
                f"or of another version does; {REMEDY}."
            )
        found = []
        if state["settings"] is not None and self.settings is not None:
            found = other_settings(state["settings"], self.settings)
        found += other_data(state["data"], self.data)
        if found:
            more = f" and {len(found) - 5} more differ" if found[5:] else ""
            raise KnowSAMValueError(f"{', '.join(found[:5])}{more}, to go on from {file}; {REMEDY}.")


def _inner(item: Any) -> Any:
    """The module in a DistributedDataParallel."""
    return item.module if isinstance(item, torch.nn.parallel.DistributedDataParallel) else item
