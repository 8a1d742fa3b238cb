from __future__ import annotations

import os

from ignite.engine import Engine, Events

from knowsam_monai import ranks
from knowsam_monai.runs.config import running_config
from knowsam_monai.runs.run_record import write_record


class RunRecord:
    """
    ``config.json`` and ``run.json`` in a run's folder: the config as it runs, and an entry for each start.

    They are written when training starts. Put it after :class:`Resume`: a start that is refused there leaves the record
    as it was. Built from a bundle's config, it takes the merged config from the parser
    that builds it; built elsewhere it writes ``run.json`` alone.

    Args:
        output_dir: the run's folder, made when missing.
        seed: noted as it is.
        resume: True adds to what an earlier start has left, False begins anew.
        enabled: False does nothing (a preflight).

    Example::

        SupervisedTrainer(..., train_handlers=[Resume(objects, "output"), RunRecord("output", seed=0)])
    """

    def __init__(
        self, output_dir: str | os.PathLike, seed: int | None = None, resume: bool = True, enabled: bool = True
    ) -> None:
        self.output_dir = output_dir
        self.seed = seed
        self.resume = resume
        self.enabled = enabled
        self.config = running_config()

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, after :class:`Resume`."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if self.enabled and ranks.rank() == 0:
            write_record(self.output_dir, self.config, self.seed, self.resume)
