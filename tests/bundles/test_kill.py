"""Bundle runs that are killed or stopped from outside, and resume with the same command, bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from knowsam_monai.files import PART
from tests.bundles.conftest import CONFIGS, CONFIGS_3D, SMALL_UNET, TINY, TINY_3D, run_bundle
from tests.processes import finish, start, wait_for
from tests.same_bits import assert_same_bits

RUNS = {
    "knowsam": (CONFIGS, ()),
    "mean_teacher": (CONFIGS, ("network_plain.json", "mean_teacher.json")),
    "left_atrium": (CONFIGS_3D, ()),
}
LAST = "resume_6.pt"
NUMBERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Run:
    """A command of a tiny training, with the default workers, that can be given again and again."""

    def __init__(self, folder: Path, name: str, dataset: Path, **override) -> None:
        self.folder, self.log = folder, folder / "console.txt"
        folder.mkdir()
        configs, overlays = RUNS[name]
        options = {**TINY, **(TINY_3D if configs == CONFIGS_3D else {}), "max_iterations": 6}
        options.update(num_workers=None, cache_workers=None)  # as train.json has them: some of both
        options.update(dataset_dir=str(dataset), output_dir=str(folder), ckpt_dir=str(folder / "models"), **override)
        if overlays:
            options["network_def"] = SMALL_UNET
        self.arguments = (configs, overlays, {key: value for key, value in options.items() if value is not None})

    def start(self):
        return start(self.log, run_bundle, *self.arguments)

    def finish(self, **override) -> Run:
        configs, overlays, options = self.arguments
        process = start(self.log, run_bundle, configs, overlays, {**options, **override})
        assert finish(process, self.log) == 0, self.log.read_text()[-3000:]
        return self

    def stop(self, when: Callable[[], Any], number: int, with_workers: bool = False) -> int:
        """Give the command, send the signal when the condition comes true, and return the exit code."""
        process = self.start()
        assert wait_for(when, process), self.log.read_text()[-3000:]
        (os.killpg if with_workers else os.kill)(process.pid, number)
        return finish(process, self.log)

    def says(self, words: str) -> bool:
        return self.log.is_file() and words in self.log.read_text()

    def parts(self) -> list[Path]:
        return list(self.folder.glob(f"*{PART}"))

    def result(self) -> dict:
        """Weights of everything, optimizers included, the best model's, and every validation's numbers."""
        state = torch.load(self.folder / LAST, weights_only=True)
        assert not self.parts()
        models = [torch.load(self.folder / name, weights_only=True) for name in ("model.pt", "models/model.pt")]
        results = (self.folder / "results.csv").read_text()
        assert len(list(self.folder.glob("last_model_epoch=*.pt"))) == 1
        return {**state, "models": models, "results": results}


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


def kill(run: Run, seconds: float, number: int = signal.SIGKILL, while_saving: bool = False) -> bool:
    """
    Send a signal after so many seconds, or in the middle of the next save after that, and wait for the end.

    Returns:
        Whether the run still ran.
    """
    process = run.start()
    until = time.monotonic() + seconds

    def due() -> bool:
        return time.monotonic() > until and (not while_saving or pause_in_save(run, process.pid))

    running = wait_for(due, process)
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(process.pid, number)
        os.kill(process.pid, signal.SIGCONT)
    finish(process, run.log)
    return running


def pause_in_save(run: Run, pid: int) -> bool:
    """Pause a run that has a half-written file, and return whether it still has one then."""
    if not run.parts():
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)  # for the signal to arrive
        if run.parts():
            return True
        os.kill(pid, signal.SIGCONT)
    return False


def kill_at_random(run: Run, seconds: float, draw: random.Random, numbers: Sequence[int] = NUMBERS) -> None:
    """
    End a run once, somewhere from its start-up to its end, in a run that takes about so many seconds.

    Each signal is equally likely; one time in three it comes while the run saves.
    """
    number = draw.choice(numbers)
    after, while_saving = draw.uniform(0, 0.9) * seconds, draw.random() < 0.3
    while not kill(run, after, number, while_saving):  # it was faster this time
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
        kill_at_random(run, seconds, random.Random(), [signal.SIGKILL])
    assert_same_bits(run.finish().result(), expected)


def test_stopped_run_goes_on_and_a_finished_one_says_so(whole, tmp_path):
    dataset, expected, _ = whole("knowsam")
    run = Run(tmp_path / "stopped", "knowsam", dataset)
    validates = run.folder / "last_model_epoch=2.pt"  # written before the second validation
    assert run.stop(validates.exists, signal.SIGINT) == 130
    assert torch.load(run.folder / "resume_4.pt", weights_only=True)["validate"] and not run.says("Traceback")
    assert run.says("a second signal stops it at once")
    assert run.says("Stopped by a signal in iteration 4; run the same command to resume from resume_4.pt.")
    assert_same_bits(run.finish().result(), expected)

    table = run.log.read_text().count("right ventricle")
    assert_same_bits(run.finish().result(), expected)
    assert run.says("This run has finished its 6 iterations.")
    assert table > 0 and run.log.read_text().count("right ventricle") == 2 * table and not run.says("Traceback")

    with pytest.raises(
        AssertionError,
        match="ValueError: This run differs from the one in .*_6.pt: `augmentation_hole` must be 2 but is 3;",
    ):
        run.finish(augmentation_hole=3)


def test_data_may_be_moved_and_a_file_of_other_content_is_refused_by_name(whole, tmp_path):
    dataset, expected, _ = whole("knowsam")
    here = Path(shutil.copytree(dataset.parent, tmp_path / "here"))
    run = Run(tmp_path / "run", "knowsam", here / dataset.name)
    validates = run.folder / "last_model_epoch=2.pt"
    run.stop(validates.exists, signal.SIGTERM)
    moved = here.rename(tmp_path / "there")
    relative = os.path.relpath(moved / dataset.name)
    (label,) = (moved / item["label"] for item in json.loads((moved / dataset.name).read_text())["labeled"][:1])
    image = nibabel.load(label)
    voxels = np.asarray(image.dataobj)
    whole_label = label.read_bytes()
    nibabel.save(nibabel.Nifti1Image(np.where(voxels == 1, 2, voxels), image.affine, image.header), label)
    with pytest.raises(
        AssertionError,
        match=r"ValueError: This run differs .*: \S+ or its label must be unchanged but is new or has different",
    ):
        run.finish(dataset_dir=relative)
    label.write_bytes(whole_label)
    result = run.finish(dataset_dir=relative).result()
    assert_same_bits({**result, "report": None}, {**expected, "report": None})  # it has the names of files


def test_event_files_that_are_removed_meanwhile_end_the_run_with_one_sentence(whole, tmp_path):
    dataset, _, _ = whole("knowsam")
    run = Run(tmp_path / "run", "knowsam", dataset, max_iterations=400)
    process = run.start()
    assert wait_for((run.folder / "resume_2.pt").exists, process)
    shutil.rmtree(run.folder / "tensorboard")
    assert finish(process, run.log) == 1
    sentence = (
        r"`output_dir` must be readable and have free space but \S+tfevents\S+ cannot be read or written \(No such file"
    )
    assert re.search(sentence + r".* it resumes from resume_\d+\.pt", run.log.read_text())


def test_second_run_in_the_same_folder_is_refused_and_disturbs_nothing(whole, tmp_path):
    dataset, expected, _ = whole("knowsam")
    run = Run(tmp_path / "run", "knowsam", dataset)
    first = run.start()
    assert wait_for((run.folder / "resume_2.pt").exists, first)
    second = start(tmp_path / "second.txt", run_bundle, *run.arguments)
    assert finish(second, tmp_path / "second.txt") == 1
    assert f"run is in use by process {first.pid} on " in (tmp_path / "second.txt").read_text()
    assert finish(first, run.log) == 0 and not run.says("in use by")
    assert_same_bits(run.result(), expected)


def test_first_reading_of_the_data_is_stopped_in_one_line(small_phantom, tmp_path):
    run = Run(tmp_path / "stopped", "knowsam", small_phantom)
    assert run.stop(lambda: run.says("SAM stand_in: all"), signal.SIGTERM) == 143
    assert run.says("Stopped by a signal outside of training; run the same command") and not run.says("Traceback")


@pytest.mark.slow
@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_the_loader_s_workers_too_saves_and_stops(whole, tmp_path, number, code):
    dataset, expected, _ = whole("knowsam")
    run = Run(tmp_path / "stopped", "knowsam", dataset)
    assert run.stop((run.folder / "resume_2.pt").exists, number, with_workers=True) == code
    assert not run.says("Traceback") and run.says("run the same command to resume from resume_")
    assert_same_bits(run.finish().result(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name,kills", [("knowsam", 10), ("mean_teacher", 10), ("left_atrium", 10)])
def test_run_ended_many_times_goes_on_to_the_same_bits(whole, tmp_path, name, kills):
    dataset, expected, seconds = whole(name)
    run, draw = Run(tmp_path / "killed", name, dataset), random.Random()
    for _ in range(kills):
        kill_at_random(run, seconds, draw)
    assert_same_bits(run.finish().result(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name,starts", [("knowsam", 14), ("mean_teacher", 13), ("left_atrium", 13)])
def test_same_command_always_goes_on(whole, tmp_path, name, starts):
    dataset, expected, _ = whole(name)
    run = Run(tmp_path / "run", name, dataset).finish()
    for _ in range(starts):
        run.finish()
    assert_same_bits(run.result(), expected)
