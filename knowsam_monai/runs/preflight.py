from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import torch
from ignite.engine import Engine, Events
from monai.utils import CommonKeys as Keys
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from knowsam_monai import ranks
from knowsam_monai.data.orientation import NUM_ORIENTATIONS
from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.networks.ema_student import EMAStudent
from knowsam_monai.runs.cpu import matmul_precision
from knowsam_monai.runs.last_iteration import last_iteration
from knowsam_monai.seeds import kept_random_state
from knowsam_monai.teachers.embedding_cache import EmbeddingCache
from knowsam_monai.teachers.provenance import describe
from knowsam_monai.wrappers import plain_network

logger = logging.getLogger(__name__)


class Preflight:
    """
    Before the first step, report what this run is: rows, trained weights, teacher, time, memory and expected finish.

    Four trial iterations run on one real batch: the first one twice, to warm up, then the middle and the last one, so
    that terms that start later are counted; there the gate is open, so that all rows of the teacher are counted.
    Afterwards weights, optimizers, modes, the engine's state and the global random generators are restored. A loader
    that seeds its transforms for each row, as :class:`knowsam_monai.data.SemiSupervisedLoader` does, then yields the
    same first batch again; one whose transforms keep their own random generators does not.

    With a cached encoder, iterations are timed without the encoding of new images. The report says how many images the
    run will encode, and how long this takes; a warning follows if this is more than half of the run, or if most of the
    embeddings that it uses are new.

    Args:
        network: the student.
        optimizer: the student's optimizer.
        distiller: the teacher with its optimizer, or None for a run without SAM.
        num_rows: numbers of labeled and unlabeled rows, for the report.
        stop: end the run after the report.
        ema_student: the averaged student of the method, restored like the student; None if there is none.

    Example::

        preflight = Preflight(network, optimizer, distiller, num_rows=(136, 1176))
        SupervisedTrainer(..., train_handlers=[*handlers, preflight])
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        distiller: SAMDistiller | None = None,
        num_rows: tuple[int, int] = (0, 0),
        stop: bool = False,
        ema_student: EMAStudent | None = None,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.distiller = distiller
        self.num_rows = tuple(num_rows)
        self.stop = stop
        self.ema_student = ema_student
        self._lookups_per_iteration = (0.0, 0.0)  # of labeled and of other rows
        self._seconds_per_embedding = 0.0

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer, after all handlers that take part in a step."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.state.epoch >= engine.state.max_epochs:  # resumed after its last step
            return
        seconds = self._seconds_per_iteration(engine)
        if ranks.rank() == 0:  # every rank runs the trial iterations, because they wait for each other
            for line in self.report(engine, seconds):
                logger.info(line)
            if engine.amp and torch.device(engine.state.device).type == "cpu":
                logger.warning("`amp` has no effect on a CPU; for bfloat16 there, use --cpu_autocast True.")
            self._warn_of_encoding(engine, seconds)
        if self.stop:
            engine.terminate()

    def report(self, engine: Engine, seconds: float) -> list[str]:
        """The lines of the table, given the seconds per iteration."""
        remaining = last_iteration(engine) - engine.state.iteration
        embeddings = self._embeddings(engine)
        finish = timedelta(seconds=round(seconds * remaining + self._encoding_seconds(embeddings)))
        if torch.device(engine.state.device).type == "cuda":
            memory = torch.cuda.max_memory_allocated(engine.state.device) / 2**30
        else:
            memory = _peak_process_memory()
        rows = [
            ("rows", f"{self.num_rows[0]} labeled, {self.num_rows[1]} unlabeled"),
            ("student", f"{type(plain_network(self.network)).__name__}, {_trainable(self.network)}"),
            *self._teacher_rows(),
            *self._process_rows(),
            ("device", self._device(engine)),
            ("iterations", f"{remaining} of {seconds:.2f} s each (mean of start, middle and end)"),
            *self._embedding_rows(embeddings),
            ("peak memory", f"{memory:.1f} GiB"),
            ("expected finish", f"{datetime.now() + finish:%Y-%m-%d %H:%M} (in {finish}, validation not counted)"),
        ]
        width = max(len(name) for name, _ in rows)
        return ["Preflight", *(f"  {name:<{width}}  {value}" for name, value in rows)]

    def _teacher_rows(self) -> list[tuple[str, str]]:
        if self.distiller is None:
            return [("teacher", "none (use_sam is False)")]
        teacher = self.distiller.teacher
        groups: dict[str, int] = {}
        for name, parameter in getattr(teacher, "sam_teacher", teacher).named_parameters():
            if parameter.requires_grad:
                group = "adapters" if "adapter" in name else name.split(".")[0]
                groups[group] = groups.get(group, 0) + parameter.numel()
        trains = ", ".join(f"{name} {count:,}" for name, count in groups.items()) or "nothing"
        gate = self.distiller.gate
        return [
            ("teacher", describe(teacher)),
            ("teacher trains", f"{_trainable(teacher)}: {trains}" if self.distiller.learns else "nothing"),
            (
                "gate",
                f"{gate.mode}, weight {gate.weight.item():.2f}{'' if gate.is_measured else ' until it is measured'}",
            ),
        ]

    @property
    def _cache(self) -> EmbeddingCache | None:
        return None if self.distiller is None else getattr(self.distiller.teacher, "cache", None)

    def _embeddings(self, engine: Engine) -> _Embeddings:
        """
        What the run will ask of a cached encoder.

        Labeled rows fill their share of every batch, however few there are, so they repeat more often than the others.
        Within each kind, rows and orientations are taken as drawn with equal probability.
        """
        if self._cache is None or sum(self.num_rows) == 0:
            return _Embeddings(0, 0, 0)
        remaining = last_iteration(engine) - engine.state.iteration
        different = [NUM_ORIENTATIONS * number for number in self.num_rows]
        asked = [lookups * remaining for lookups in self._lookups_per_iteration]
        seen = sum(d * (1 - (1 - 1 / d) ** n) for d, n in zip(different, asked) if d > 0)
        encoded = seen * max(0.0, 1 - len(self._cache) / sum(different))
        return _Embeddings(sum(different), round(sum(asked)), round(encoded))

    def _encoding_seconds(self, embeddings: _Embeddings) -> float:
        return embeddings.encoded * self._seconds_per_embedding

    def _embedding_rows(self, embeddings: _Embeddings) -> list[tuple[str, str]]:
        if embeddings.asked == 0:
            return []
        itemsize = torch.empty((), dtype=self._cache.dtype).element_size()
        memory = embeddings.different * math.prod(self._cache.shape) * itemsize / 2**30
        each = self._seconds_per_embedding
        return [
            (
                "embeddings",
                f"{embeddings.different:,} different, {NUM_ORIENTATIONS} of each row ({memory:.1f} GiB); the "
                f"run uses {embeddings.asked:,} and encodes about {embeddings.encoded:,} of them, {each:.2f} s each "
                f"({timedelta(seconds=round(self._encoding_seconds(embeddings)))} in all)",
            )
        ]

    def _warn_of_encoding(self, engine: Engine, seconds: float) -> None:
        embeddings = self._embeddings(engine)
        encoding = self._encoding_seconds(embeddings)
        steps = seconds * (last_iteration(engine) - engine.state.iteration)
        if encoding > steps or 2 * embeddings.encoded > embeddings.asked:
            logger.warning(
                "Encoding new images takes about %.0f %% of this run: it uses %s embeddings and encodes about %s of "
                "them. The cached encoder pays in a longer run, where more of them recur, or if `sam_cache_dir` keeps "
                "them for later runs.",
                100 * encoding / (encoding + steps),
                f"{embeddings.asked:,}",
                f"{embeddings.encoded:,}",
            )

    def _device(self, engine: Engine) -> str:
        device = torch.device(engine.state.device)
        is_fast = device.type == "cpu" and matmul_precision() == "medium"
        return f"{device}, {torch.get_num_threads()} threads{', matrix products by oneDNN' if is_fast else ''}"

    def _process_rows(self) -> list[tuple[str, str]]:
        """The number of processes, and whether batch normalization is synchronized between them."""
        if ranks.world_size() == 1:
            return []
        kinds = {type(module) for module in self.network.modules() if isinstance(module, _BatchNorm)}
        norm = "none" if not kinds else "synchronized" if kinds == {nn.SyncBatchNorm} else "per process"
        return [("processes", f"{ranks.world_size()}, batch normalization: {norm}")]

    @kept_random_state()
    def _seconds_per_iteration(self, engine: Engine) -> float:
        """Mean seconds per step at the start, in the middle and at the end of the run."""
        states = [_copied_to_cpu(item.state_dict()) for item in self._objects(engine)]
        if torch.device(engine.state.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats(engine.state.device)
        modes = [(module, module.training) for module in self.network.modules()]
        is_followed = self.ema_student is not None and self.ema_student.is_followed
        state = engine.state
        before = (state.iteration, state.batch, state.output)
        batch = next(iter(engine.data_loader))
        num_labeled = len(batch[Keys.LABEL]) if isinstance(batch, Mapping) and Keys.LABEL in batch else 0
        if hasattr(engine.data_loader, "set_iteration"):  # the first batch is drawn again
            engine.data_loader.set_iteration(state.iteration)
        last = last_iteration(engine)
        cache = self._cache

        def clock() -> float:
            """Seconds, without those spent on encoding new images."""
            return time.perf_counter() - (0.0 if cache is None else cache.encoding_seconds)

        times, lookups = [], []
        for number, trial in enumerate((1, 1, last // 2, last)):  # the first warms up
            state.iteration, state.batch = max(trial, 1), batch
            if number > 1 and self.distiller is not None:
                self.distiller.gate.weight.fill_(1.0)  # restored below, as the rest of the state
            start, lookups_before = clock(), 0 if cache is None else cache.num_lookups
            engine.fire_event(Events.ITERATION_STARTED)  # a method may change the batch here
            engine._process_function(engine, state.batch)
            if torch.device(state.device).type == "cuda":
                torch.cuda.synchronize(state.device)
            times.append(clock() - start)
            lookups.append(0 if cache is None else cache.num_lookups - lookups_before)
            if number == 0 and cache is not None:
                warm_up = cache.encoding_seconds, cache.num_encoded
                cache.num_repeats = 1  # so that at least one encoding is timed
        if cache is not None:
            cache.num_repeats = 0
            of_labeled = sum(min(count, num_labeled) for count in lookups[1:])
            self._lookups_per_iteration = of_labeled / 3, (sum(lookups[1:]) - of_labeled) / 3
            num_timed = max(cache.num_encoded - warm_up[1], 1)
            self._seconds_per_embedding = (cache.encoding_seconds - warm_up[0]) / num_timed
        state.iteration, state.batch, state.output = before
        for item, item_state in zip(self._objects(engine), states):
            item.load_state_dict(item_state)
        for module, mode in modes:
            module.training = mode
        if self.ema_student is not None:
            self.ema_student.follow() if is_followed else self.ema_student.unfollow()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(times[1:]) / 3

    def _objects(self, engine: Engine) -> list[Any]:
        objects = [self.network, self.optimizer, self.distiller, self.ema_student, engine.scaler]
        objects.append(None if self.distiller is None else self.distiller.optimizer)
        return [item for item in objects if item is not None]


class _Embeddings(NamedTuple):
    """Of a cached encoder: different images, and how many a run asks for and encodes."""

    different: int
    asked: int
    encoded: int


def _copied_to_cpu(state: Any) -> Any:
    """A copy of a state dict that takes no memory of a GPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy.copy(state)  # with the versions of its modules
        copied.update({key: _copied_to_cpu(value) for key, value in state.items()})
        return copied
    return [_copied_to_cpu(value) for value in state] if isinstance(state, list) else copy.deepcopy(state)


def _peak_process_memory() -> float:
    """Largest resident size of this process so far in GiB; nan if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _trainable(module: nn.Module) -> str:
    total = sum(p.numel() for p in module.parameters())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return f"{trainable:,} of {total:,} parameters train"
