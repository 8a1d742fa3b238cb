"""Bundle runs that are killed or stopped from outside, and go on with the same command to the same bits."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import monai.bundle
import pytest
import torch

from ..processes import finish, start, wait_for
from .conftest import CONFIGS, CONFIGS_3D, TINY, TINY_3D

RUNS = {
    "knowsam": (CONFIGS, ()),
    "mean_teacher": (CONFIGS, ("network_plain.json", "mean_teacher.json")),
    "left_atrium": (CONFIGS_3D, ()),
}
LAST = "resume_6.pt"


def run_bundle(configs: Path, overlays: tuple[str, ...], options: dict) -> None:
    """What `python -m monai.bundle run` does with these options."""
    config_file = [str(configs / name) for name in ("train.json", *overlays)]
    monai.bundle.run(config_file=config_file, meta_file=str(configs / "metadata.json"), logging_file=False, **options)


class Run:
    """A command of a tiny training, with loader workers, that can be given again and again."""

    def __init__(self, folder: Path, name: str, dataset: Path, **override) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        folder.mkdir()
        configs, overlays = RUNS[name]
        options = {**TINY, **(TINY_3D if configs == CONFIGS_3D else {}), "max_iterations": 6, "num_workers": 2}
        options.update(dataset_dir=str(dataset), output_dir=str(folder), ckpt_dir=str(folder / "models"), **override)
        if overlays:
            options["network_def"] = {**SMALL_UNET}
        self.arguments = (configs, overlays, {key: value for key, value in options.items() if value is not None})

    def start(self):
        return start(self.log, run_bundle, *self.arguments)

    def finish(self) -> Run:
        process = self.start()
        assert finish(process, self.log) == 0, self.log.read_text()[-3000:]
        return self

    def parts(self) -> list[Path]:
        return list(self.folder.glob("*.part"))

    def result(self) -> dict:
        """Weights of everything, optimisers and all, the best model's, and every validation's numbers."""
        state = torch.load(self.folder / LAST, weights_only=True)
        assert not self.parts()
        models = [torch.load(self.folder / name, weights_only=True) for name in ("model.pt", "models/model.pt")]
        results = (self.folder / "results.csv").read_text()
        return {**{k: v for k, v in state.items() if k != "fingerprint"}, "models": models, "results": results}


SMALL_UNET = {
    "_target_": "knowsam_monai.networks.UNet",
    "spatial_dims": 2,
    "in_channels": "@in_channels",
    "out_channels": "@num_classes",
    "channels": [4, 8, 8, 8, 8],
}


def assert_same_bits(ours, theirs, name="") -> None:
    assert type(ours) is type(theirs), name
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs) or (ours.isnan().any() and ours.numpy().tobytes() == theirs.numpy().tobytes())
    elif isinstance(ours, Mapping):
        assert ours.keys() == theirs.keys(), name
        for key in ours:
            assert_same_bits(ours[key], theirs[key], f"{name}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), name
        for index, pair in enumerate(zip(ours, theirs)):
            assert_same_bits(*pair, f"{name}/{index}")
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), name


@pytest.fixture(scope="module")
def whole(small_phantom, small_volumes, tmp_path_factory):
    """`whole(name)`: the data of a run, what it comes to when nothing happens to it, and its seconds."""
    known: dict[str, tuple] = {}

    def build(name: str):
        if name not in known:
            dataset = small_volumes if name == "left_atrium" else small_phantom
            begin = time.monotonic()
            result = Run(tmp_path_factory.mktemp("whole") / name, name, dataset).finish().result()
            known[name] = (dataset, result, time.monotonic() - begin)
        return known[name]

    return build


def kill(run: Run, seconds: float, while_saving: bool = False) -> bool:
    """SIGKILL a run after so many seconds, or in the middle of its next save after that; whether it still ran."""
    process = run.start()
    until = time.monotonic() + seconds
    running = wait_for(lambda: time.monotonic() > until and (run.parts() or not while_saving), process)
    process.kill()
    process.join()
    return running


def kill_at_random(run: Run, seconds: float, draw: random.Random, while_saving: bool) -> None:
    """Kill once between the start and the end of a run that takes about so many seconds."""
    after = draw.uniform(0.2, 0.9) * seconds
    while not kill(run, after, while_saving):  # it was faster this time
        after /= 2
        for path in run.folder.glob("resume_*.pt"):
            path.unlink()


@pytest.mark.parametrize("name,while_saving", [("knowsam", True), ("mean_teacher", False), ("left_atrium", False)])
def test_killed_run_goes_on_to_the_same_bits(whole, tmp_path, name, while_saving):
    dataset, expected, seconds = whole(name)
    run = Run(tmp_path / "killed", name, dataset)
    if while_saving:
        assert kill(run, 0, while_saving=True) and run.parts()
    else:
        kill_at_random(run, seconds, random.Random(), while_saving=False)
    assert_same_bits(run.finish().result(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name,kills", [("knowsam", 7), ("mean_teacher", 7), ("left_atrium", 6)])
def test_run_killed_many_times_goes_on_to_the_same_bits(whole, tmp_path, name, kills):
    dataset, expected, seconds = whole(name)
    run, draw = Run(tmp_path / "killed", name, dataset), random.Random()
    for number in range(kills):
        kill_at_random(run, seconds, draw, while_saving=number % 3 == 0)
    assert_same_bits(run.finish().result(), expected)
