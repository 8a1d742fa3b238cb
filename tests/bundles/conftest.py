"""A tiny phantom, and train.json run in this process with tiny settings."""

from __future__ import annotations

import json
import logging
import signal
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.networks.nets import UNet
from monai.utils import set_determinism

from knowsam_monai.data import write_phantom
from knowsam_monai.handlers import scalar_terms
from knowsam_monai.runs import stop_signals, training_handlers
from knowsam_monai.runs.report import page
from tests.teachers.sam2_toys import toy_model

BUNDLES = Path(__file__).parents[2] / "bundles"
CONFIGS = BUNDLES / "knowsam_acdc" / "configs"
CONFIGS_3D = BUNDLES / "knowsam_la" / "configs"
SMALL_STUDENT = {
    "_target_": "knowsam_monai.networks.MultiViewNet",
    "in_channels": "@in_channels",
    "out_channels": "@num_classes",
    "channels": [4, 8, 8, 8, 8],
}
SMALL_UNET = {
    "_target_": "knowsam_monai.networks.UNet",
    "spatial_dims": 2,
    "in_channels": "@in_channels",
    "out_channels": "@num_classes",
    "channels": [4, 8, 8, 8, 8],
}
TINY = {
    "image_size": 32,
    "labeled_batch_size": 2,
    "unlabeled_batch_size": 2,
    "max_iterations": 2,
    "epoch_length": 2,
    "log_interval": 1,
    "num_workers": 0,
    "cache_workers": 2,
    "mixing_start": 0,
    "sam_variant": "stand_in",
    "device": "$torch.device('cpu')",
    "network_def": SMALL_STUDENT,
}
# over TINY, for the bundle of volumes
TINY_3D = {
    "image_size": [16, 16, 16],
    "spacing": [4.0, 4.0, 4.0],
    "sam_image_size": 32,
    "sam_slices": 2,
    "channels": [4, 4, 4, 4, 4],
    "aggregation_channels": [2, 2, 4],
    "network_def": None,
}
# handlers that do not affect the steps of a run
BESIDE_THE_STEP = (
    "Preflight",
    "StudentCurves",
    "Resume",
    "RunRecord",
    "ValidationHandler",
    "WholeCheckpointSaver",
    "TensorBoardStatsHandler",
)


def step_handlers(**options: Any) -> list[Any]:
    """The handlers of a run that take part in its steps."""
    return [handler for handler in training_handlers(**options) if type(handler).__name__ not in BESIDE_THE_STEP]


@contextmanager
def without_charts() -> Iterator[None]:
    """Reports of runs without the charts, which take longer than the steps of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("line_chart", "case_chart"):
            patch.setattr(page, name, lambda *args, **kwargs: "")
        yield


@without_charts()
def run_bundle(configs: Path, overlays: Sequence[str], options: dict[str, Any]) -> None:
    """What `python -m monai.bundle run` does with these configs over train.json and these options."""
    monai.bundle.run(config_file=[str(configs / name) for name in ("train.json", *overlays)], **options)


_trainings: weakref.WeakValueDictionary[int, Training] = weakref.WeakValueDictionary()


def watch(trainer: Any, training: int) -> None:
    """A step of `run`, before the trainer's own."""
    _trainings[training].watch(trainer)


class Training:
    """
    train.json with tiny settings as `workflow`; `history` and `rates` are terms and learning rates by iteration.

    `overlays` are configs over train.json; an override of None leaves the configs' own value. `whole` is with the
    handlers that do not affect the steps, and with `charts` in the report if asked for.
    """

    def __init__(
        self,
        folder: Path,
        /,
        whole: bool = False,
        charts: bool = False,
        overlays: Sequence[str] = (),
        configs: Path = CONFIGS,
        **override: Any,
    ) -> None:
        tiny = {**TINY, **TINY_3D} if configs == CONFIGS_3D else TINY
        options = {**tiny, "output_dir": str(folder), "ckpt_dir": str(folder / "models"), **override}
        options = {key: value for key, value in options.items() if value is not None}
        options["epoch_length"] = min(options["epoch_length"], options["max_iterations"])
        self.output_dir, self.charts = folder, charts
        self.history: list[dict[str, float]] = []
        self.rates: list[list[float]] = []
        self.workflow = ConfigWorkflow(
            config_file=[str(configs / name) for name in ("train.json", *overlays)],
            meta_file=str(configs / "metadata.json"),
            logging_file=False,
            workflow_type="train",
            **options,
        )
        _trainings[id(self)] = self
        steps = self.workflow.parser["run"]
        watching = {"_target_": f"{__name__}.watch", "trainer": "@train#trainer", "training": id(self)}
        steps.insert(steps.index("$@train#trainer.run()"), watching)
        if not whole:
            self.workflow.parser["train#all_handlers#_target_"] = f"{__name__}.step_handlers"

    def __getitem__(self, name: str) -> Any:
        """The parsed content of a key."""
        return self.workflow.parser.get_parsed_content(name)

    def run(self) -> Training:
        hook, level = sys.excepthook, logging.root.level
        try:
            with nullcontext() if self.charts else without_charts():
                self.workflow.initialize()
                self.workflow.run()
                self.workflow.finalize()
        finally:
            sys.excepthook = hook
            self.signals = [signal.getsignal(number) for number in stop_signals.NUMBERS]
            logging.root.setLevel(level)
            set_determinism(seed=None)
        return self

    def watch(self, trainer: Any) -> None:
        trainer.add_event_handler(Events.ITERATION_STARTED, lambda _: self.rates.append(self.learning_rates()))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._record)

    def learning_rates(self) -> list[float]:
        optimizers = (self[name] for name in ("optimizer", "sam_optimizer"))
        return [optimizer.param_groups[0]["lr"] for optimizer in optimizers if optimizer]

    def _record(self, engine) -> None:
        self.history.append({name: term.item() for name, term in scalar_terms(engine.state.output).items()})


@pytest.fixture(scope="session")
def small_phantom(tmp_path_factory) -> Path:
    """The data list of one patient of each kind."""
    folder = tmp_path_factory.mktemp("data") / "phantom"
    return write_phantom(folder, num_labeled=1, num_unlabeled=1, num_validation=1, num_test=0, max_size=32)


@pytest.fixture
def training(small_phantom, tmp_path):
    """`training(key=value, ...)`: a tiny training that has not been run yet."""

    def build(**override: Any) -> Training:
        return Training(tmp_path / "output", **{"dataset_dir": str(small_phantom), **override})

    return build


@pytest.fixture(scope="session")
def small_volumes(tmp_path_factory) -> Path:
    """The data list of two labeled and two unlabeled left atria, and one to validate on."""
    folder = tmp_path_factory.mktemp("data") / "volumes"
    counts = {"num_labeled": 2, "num_unlabeled": 2, "num_validation": 1, "num_test": 1}
    return write_phantom(folder, anatomy="left_atrium", max_size=32, **counts)


@pytest.fixture(scope="session")
def small_teachers(tmp_path_factory):
    """`small_teachers(configs, "sam2")`, or "network": options for the overlay of that teacher, with tiny weights."""
    folder = tmp_path_factory.mktemp("teachers")

    def sam2(configs: Path) -> dict[str, Any]:
        if not (folder / "sam2").is_dir():
            toy_model().save_pretrained(folder / "sam2")
        key = "teacher#variant" if configs == CONFIGS else "teacher#sam_teacher#variant"
        variant = {"_target_": "tests.teachers.sam2_toys.toy_config"}
        return {"sam_variant": None, "sam_checkpoint": str(folder / "sam2"), key: variant}

    def network(configs: Path) -> dict[str, Any]:
        spatial_dims, num_classes = (2, 4) if configs == CONFIGS else (3, 2)
        bundle = folder / f"network_{spatial_dims}d"
        if not bundle.is_dir():
            write_network_bundle(bundle, spatial_dims, num_classes)
        return {"sam_variant": None, "teacher_bundle": str(bundle)}

    return lambda configs, name: {"sam2": sam2, "network": network}[name](configs)


def write_network_bundle(folder: Path, spatial_dims: int, num_classes: int) -> None:
    """A bundle as the Model Zoo has them, of a network with random weights."""
    network = {"spatial_dims": spatial_dims, "in_channels": 1, "out_channels": num_classes}
    network |= {"channels": [4, 8], "strides": [2], "num_res_units": 1}
    names = ("background", "lv_pool", "myocardium", "rv_pool")[:num_classes]
    outputs = {"pred": {"channel_def": {str(index): name for index, name in enumerate(names)}}}
    for name, content in {
        "inference": {"network_def": {"_target_": "UNet", **network}},
        "metadata": {"data_source": "scans of 2019", "network_data_format": {"outputs": outputs}},
    }.items():
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        (folder / "configs" / f"{name}.json").write_text(json.dumps(content))
    (folder / "models").mkdir()
    torch.save(UNet(**network).state_dict(), folder / "models" / "model.pt")


@pytest.fixture
def training_3d(small_volumes, tmp_path):
    """`training_3d(key=value, ...)`: a tiny training of the bundle of volumes that has not been run yet."""

    def build(**override: Any) -> Training:
        return Training(tmp_path / "output", configs=CONFIGS_3D, **{"dataset_dir": str(small_volumes), **override})

    return build
