from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import DiskSaver
from monai.handlers import CheckpointSaver

from knowsam_monai.tensor_file import NotATensorFile, read_tensor_file

logger = logging.getLogger(__name__)

FILE = re.compile(r"resume_(\d+)\.pt")


class Resume:
    """
    A run that was broken off goes on with the same command, to the same weights.

    After every epoch all that training depends on is written to ``resume_<iteration>.pt``: the objects given, the
    trainer's iteration, the best metric so far and every random state. It is written under a temporary name and
    renamed; the file before stays until the next. SIGTERM and Ctrl-C write one more and end the process with 143 and
    130. A run that starts takes the newest file that is whole. The loader's order is a function of the iteration
    (:class:`knowsam_monai.data.SemiSupervisedLoader`), so nothing of it is saved.

    Put it last among the trainer's handlers that act after a step and before :class:`Preflight`.

    Args:
        objects: name to whatever has ``state_dict`` and ``load_state_dict``; None is left out.
        output_dir: folder of the files.
        evaluator: whose best metric is kept; None without one.
        best_saver: MONAI's saver of the best model, so that a worse one never takes its place.
        fingerprint: what a run must share with the one it goes on with, by config key; compared, not restored.
        enabled: False starts afresh and removes the files of a run before.
        save: False only reads (a preflight).

    Raises:
        ValueError: when the fingerprint differs; it names the keys.
        RuntimeError: when something that would be saved is not finite, or cannot be written.

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
        fingerprint: Mapping[str, Any] | None = None,
        enabled: bool = True,
        save: bool = True,
    ) -> None:
        self.objects = {name: item for name, item in objects.items() if item is not None}
        self.output_dir = Path(output_dir)
        self.evaluator = evaluator
        self.best_saver = best_saver
        self.fingerprint = {key: _digest(value) for key, value in (fingerprint or {}).items()}
        self.enabled = enabled
        self.saves = save
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer."""
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.stop_if_asked)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        """Restore the newest whole file, and listen to SIGTERM and Ctrl-C."""
        files = self.files()
        if not self.enabled and self.saves and idist.get_rank() == 0:
            for file in files:
                file.unlink()
        if self.enabled:
            self._restore(engine, files)
        if self.saves and not self._previous:
            for number in (signal.SIGTERM, signal.SIGINT):
                try:
                    self._previous[number] = signal.signal(number, self._ask_to_stop)
                except ValueError:  # not in the main thread: then somebody else listens
                    break

    def completed(self, engine: Engine | None = None) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def files(self) -> list[Path]:
        """The files of this folder, newest first."""
        files = [p for p in self.output_dir.glob("resume_*.pt") if FILE.fullmatch(p.name)]
        return sorted(files, key=lambda p: int(FILE.fullmatch(p.name)[1]), reverse=True)  # type: ignore[index]

    def stop_if_asked(self, engine: Engine) -> None:
        """Save and end the process after a step in which a signal came."""
        if self.signal is None:
            return
        self(engine)
        self.completed()
        logger.warning("Stopped at iteration %d by a signal; the same command goes on here.", engine.state.iteration)
        raise SystemExit(128 + self.signal)

    def __call__(self, engine: Engine) -> None:
        if not self.saves or idist.get_rank() != 0:
            return
        state: dict[str, Any] = {name: _inner(item).state_dict() for name, item in self.objects.items()}
        broken = sorted(name for name, item in state.items() if not _is_finite(item))
        if broken:
            raise RuntimeError(
                f"Weights must be finite but those of {', '.join(broken)} are not at iteration "
                f"{engine.state.iteration}; lower the learning rate. The checkpoint before this is whole."
            )
        best = (
            () if self.evaluator is None else (self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch)
        )
        state["trainer"] = dict(engine.state_dict())
        state["best"] = [float(value) for value in best]
        state["random"] = _random_state()
        state["fingerprint"] = self.fingerprint
        if engine.scaler is not None:
            state["scaler"] = engine.scaler.state_dict()
        name = f"resume_{engine.state.iteration}.pt"
        try:
            DiskSaver(self.output_dir, require_empty=False)(state, name)
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError when the disk is full
            raise RuntimeError(
                f"`output_dir` must have room for {name} but it could not be written to {self.output_dir} ({error}); "
                "free some space and give the same command: it goes on from the checkpoint before, which is whole."
            ) from error
        for old in self.files()[2:]:
            old.unlink()

    def _restore(self, engine: Engine, files: list[Path]) -> None:
        for file in files:
            try:
                state = read_tensor_file(file)
            except (OSError, NotATensorFile) as error:
                logger.warning("%s must be a whole checkpoint but is not: it %s; trying the one before.", file, error)
                continue
            self._check_fingerprint(file, state["fingerprint"])
            self._load(engine, state)
            if engine.state.epoch >= engine.state.max_epochs:
                logger.warning(
                    "This run has finished its %d iterations. `--resume False` trains anew.", engine.state.iteration
                )
            else:
                logger.warning("Going on from %s, iteration %d.", file, engine.state.iteration)
            return
        if files:
            logger.warning("No checkpoint in %s is whole: this run starts from its beginning.", self.output_dir)

    def _load(self, engine: Engine, state: Mapping[str, Any]) -> None:
        for name, item in self.objects.items():
            _inner(item).load_state_dict(state[name])
        engine.load_state_dict({**state["trainer"], "max_epochs": engine.state.max_epochs})
        if engine.scaler is not None and "scaler" in state:
            engine.scaler.load_state_dict(state["scaler"])
        if self.evaluator is not None and state["best"]:
            metric, epoch = state["best"]
            self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = metric, int(epoch)
            if self.best_saver is not None and epoch >= 0:
                self.best_saver.load_state_dict({"_saved": [(metric, "")]})
        if hasattr(engine.data_loader, "set_iteration"):
            engine.data_loader.set_iteration(engine.state.iteration)
        _set_random_state(state["random"])

    def _check_fingerprint(self, file: Path, found: Mapping[str, str]) -> None:
        keys = sorted(k for k in {*found, *self.fingerprint} if found.get(k) != self.fingerprint.get(k))
        if keys:
            raise ValueError(
                f"`{'`, `'.join(keys)}` must be as in the run that {file} is of but {'are' if keys[1:] else 'is'} not; "
                "name another --output_dir, or train anew with --resume False, which removes that run's checkpoints."
            )

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        if self.signal is not None:  # asked twice: now
            raise SystemExit(128 + number)
        self.signal = number


def _inner(item: Any) -> Any:
    """The module in a DistributedDataParallel."""
    return item.module if isinstance(item, torch.nn.parallel.DistributedDataParallel) else item


def _is_finite(state: Any) -> bool:
    if isinstance(state, torch.Tensor):
        return not state.is_floating_point() or bool(torch.isfinite(state).all())
    values = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else ()
    return all(_is_finite(value) for value in values)


def _digest(value: Any) -> str:
    """A value as text, a long one as the hash of its text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 80 else hashlib.sha256(text.encode()).hexdigest()


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = (kind, keys.tolist(), *rest)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
