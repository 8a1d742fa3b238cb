"""The overlays of teachers over train.json, with each method: they train, say who teaches, and go on after a stop."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from knowsam_monai.errors import root_cause
from knowsam_monai.teachers import NetworkTeacher, Sam2Teacher
from tests.bundles.conftest import CONFIGS, CONFIGS_3D, Training
from tests.bundles.test_last_iteration import SignalBefore
from tests.bundles.test_overlays import METHODS, QUICK, SMALL_UNET_3D

TEACHERS = {"sam2": Sam2Teacher, "network": NetworkTeacher}
BUNDLES = pytest.mark.parametrize(
    "configs", [CONFIGS, CONFIGS_3D], ids=lambda configs: configs.parent.name, scope="module"
)
EACH_TEACHER = pytest.mark.parametrize("teacher", TEACHERS, scope="module")


@pytest.fixture(scope="module")
def taught_in(small_phantom, small_volumes, small_teachers):
    """`taught_in(folder, configs, teacher, *overlays)`: a tiny training with that teacher that has not been run yet."""

    def build(folder, configs, teacher, *overlays, **override):
        options = {"dataset_dir": str(small_phantom if configs == CONFIGS else small_volumes), "sam_variant": None}
        options |= ({} if teacher == "sam" else small_teachers(configs, teacher)) | override
        overlays = (*([] if teacher == "sam" else [f"teacher_{teacher}.json"]), *overlays)
        return Training(folder, configs=configs, overlays=overlays, **options)

    return build


@pytest.fixture
def taught(taught_in, tmp_path):
    return partial(taught_in, tmp_path / "output")


FOUR_STEPS = {"whole": True, "max_iterations": 4, "epoch_length": 2, "distillation_gate": "none"}


@pytest.fixture(scope="module")
def whole(configs, teacher, taught_in, tmp_path_factory):
    """Two epochs with everything, the preflight in log.txt included."""
    logger = logging.getLogger("knowsam_monai")
    logger.setLevel(logging.INFO)
    yield taught_in(tmp_path_factory.mktemp("whole") / "run", configs, teacher, **FOUR_STEPS).run()
    logger.setLevel(logging.NOTSET)


def of_a_method(configs, method):
    options = dict(QUICK)
    if method == "bcp":
        options["pretraining_iterations"] = 1
    if configs == CONFIGS_3D and method != "cps":  # as good a test, and faster than MONAI's VNet
        options["network_def"] = SMALL_UNET_3D
    if configs == CONFIGS_3D and method == "bcp":  # pairs of rows become one: more than one voxel in the lowest level
        options["image_size"] = [32, 32, 16]
    return options


@BUNDLES
@EACH_TEACHER
@pytest.mark.parametrize("method", ["knowsam", *METHODS])
def test_every_method_trains_with_the_teacher(taught, configs, teacher, method):
    overlays = () if method == "knowsam" else ("network_plain.json", f"{method}.json")
    options = {"max_iterations": 3, "distillation_gate": "none"}
    if method != "knowsam":
        options = of_a_method(configs, method)
    run = taught(configs, teacher, *overlays, **options).run()
    assert len(run.history) == 3 and all(math.isfinite(value) for step in run.history for value in step.values())
    assert all(step["distillation_loss"] > 0 for step in run.history)
    inner = getattr(run["teacher"], "sam_teacher", run["teacher"])
    assert type(inner) is TEACHERS[teacher] and inner.pretrained
    learns = teacher == "sam2"
    assert all(("sam_loss" in step) == learns for step in run.history)
    assert [run[name] is not None for name in ("sam_optimizer", "sam_lr_scheduler")] == [learns, learns]
    assert run["distiller"].gate.must_lead == (not learns)


@BUNDLES
@EACH_TEACHER
def test_what_the_teacher_was_trained_on_can_be_stated(taught, configs, teacher):
    run = taught(configs, teacher, teacher_pretrained_on="our scans of 2021")
    run.workflow.initialize()
    assert run["teacher"].pretrained_on == "our scans of 2021"


def test_embeddings_of_sam2_are_kept(taught):
    run = taught(CONFIGS, "sam2", sam_encoder="cached", max_iterations=2, distillation_gate="none").run()
    assert len(run["teacher"].cache) > 1 and run.history[-1]["distillation_loss"] > 0


@BUNDLES
@EACH_TEACHER
def test_its_overlay_and_those_of_networks_and_methods_set_different_parts(configs, teacher):
    """So that their order on the command line is nobody's concern."""
    own = {key.split("#")[0] for key in json.loads((configs / f"teacher_{teacher}.json").read_text())}
    for path in configs.glob("*.json"):
        if path.stem not in ("metadata", "train", "inference") and not path.stem.startswith("teacher_"):
            assert not own & {key.split("#")[0] for key in json.loads(path.read_text())}, path


@BUNDLES
@EACH_TEACHER
def test_preflight_record_and_report_say_who_teaches(whole, configs, teacher):
    (start,) = json.loads((whole.output_dir / "run.json").read_text())["starts"]
    log = [" ".join(line.split()) for line in (whole.output_dir / "log.txt").read_text().splitlines()]
    who = {
        ("sam2", CONFIGS): "Sam2Teacher custom config, weights of sam2",
        ("sam2", CONFIGS_3D): "Sam2Teacher custom config on slices, weights of sam2",
        ("network", CONFIGS): "NetworkTeacher UNet, weights of network_2d, trained on scans of 2019, license unknown",
        (
            "network",
            CONFIGS_3D,
        ): "NetworkTeacher UNet, weights of network_3d, trained on scans of 2019, license unknown",
    }[teacher, configs]
    assert start["teacher"].startswith(who)
    assert any(line.endswith(f" teacher {start['teacher']}") for line in log)
    assert start["teacher"] in (whole.output_dir / "report.html").read_text()
    assert any(" teacher trains " in line for line in log)
    assert math.isfinite(whole["validate#evaluator"].state.metrics["val_teacher_dice"])


@BUNDLES
@EACH_TEACHER
def test_run_that_is_broken_off_goes_on_to_the_same_end_and_not_with_other_weights(
    whole, taught, configs, teacher, small_teachers, tmp_path
):
    stopped = taught(configs, teacher, **FOUR_STEPS)
    stopped.workflow.parser["train#handlers"].append(SignalBefore(3))
    with pytest.raises(SystemExit):
        stopped.run()
    key = {"sam2": "sam_checkpoint", "network": "teacher_bundle"}[teacher]
    file = {"sam2": "model.safetensors", "network": "models/model.pt"}[teacher]
    moved = Path(shutil.copytree(small_teachers(configs, teacher)[key], tmp_path / "moved"))
    retrained = Path(shutil.copytree(moved, tmp_path / "retrained"))
    change(retrained / file)
    with pytest.raises(RuntimeError) as error:
        taught(configs, teacher, **FOUR_STEPS, **{key: str(retrained)}).run()
    assert f"`{key}` must be" in str(root_cause(error.value))
    on = taught(configs, teacher, **FOUR_STEPS, **{key: str(moved)}).run()
    assert len(on.history) == 1
    ends = [(run["network"].state_dict(), run["teacher"].state_dict()) for run in (whole, on)]
    for one, other in zip(*ends):
        assert all(torch.equal(one[name], value) for name, value in other.items() if torch.is_tensor(value))


def change(file):
    if file.suffix == ".pt":
        torch.save({name: value * 2 for name, value in torch.load(file).items()}, file)
    else:
        from safetensors.torch import load_file, save_file

        save_file({name: value * 2 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def test_path_of_the_network_is_expanded(taught, small_teachers, monkeypatch):
    folder = Path(small_teachers(CONFIGS, "network")["teacher_bundle"])
    monkeypatch.setenv("SCRATCH", str(folder.parent))
    run = taught(CONFIGS, "network", teacher_bundle=f"/${{SCRATCH}}/{folder.name}", max_iterations=1).run()
    assert run["teacher"].checkpoint == f"/{folder}"


@BUNDLES
@pytest.mark.parametrize(
    "teacher, override, message",
    [
        (
            "sam",
            {"sam_variant": "vit_b"},
            "`sam_checkpoint` must be a file with the weights of SAM's vit_b but .* does",
        ),
        (
            "sam2",
            {"sam_checkpoint": None, "teacher#variant": None, "teacher#sam_teacher#variant": None},
            "`sam_checkpoint` must hold .*models/sam2.1-hiera-tiny does not exist; .* get it with `hf download ",
        ),
        ("sam2", {}, "`sam_checkpoint` must hold the weights of a SAM 2 .* does not exist"),
        ("network", {"teacher_channels": [[0, 1], "no such"]}, "`teacher_channels` must be among background, "),
        ("network", {"teacher_channels": [0, 9]}, "`teacher` must take .*: `teacher_channels` must name each of the"),
    ],
)
def test_what_does_not_fit_is_called_by_its_key_before_any_data_is_read(
    taught, monkeypatch, tmp_path, configs, teacher, override, message
):
    monkeypatch.setattr("knowsam_monai.data.load_datalist", lambda *args, **kwargs: pytest.fail("data was read"))
    if teacher != "network":
        override = {"sam_checkpoint": str(tmp_path / "missing"), **override}
    elif configs == CONFIGS:
        override = {key: [*value, [2, 3], 1] for key, value in override.items()}
    with pytest.raises(RuntimeError) as error:
        taught(configs, teacher, **override).run()
    assert re.match(message, str(root_cause(error.value)))


def test_network_of_slices_is_no_teacher_of_volumes(taught, small_teachers, monkeypatch):
    monkeypatch.setattr("knowsam_monai.data.load_datalist", lambda *args, **kwargs: pytest.fail("data was read"))
    bundle = small_teachers(CONFIGS, "network")["teacher_bundle"]
    run = taught(CONFIGS_3D, "network", teacher_bundle=bundle, teacher_channels=[0, [1, 2, 3]])
    with pytest.raises(RuntimeError) as error:
        run.run()
    assert "`network` must take images of shape (1, 1, 16, 16, 16) but UNet does not" in str(root_cause(error.value))


@BUNDLES
@pytest.mark.parametrize("content", [None, "empty"])
def test_network_that_is_missing_is_named_by_its_key_before_anything_is_built(taught, configs, content, tmp_path):
    folder = tmp_path / "missing"
    if content == "empty":
        folder.mkdir()
    run = taught(configs, "network", teacher_bundle=str(folder))
    with pytest.raises(RuntimeError) as error:
        run.workflow.initialize()
    assert str(root_cause(error.value)).startswith("`teacher_bundle` must be a bundle")


@BUNDLES
def test_network_that_is_not_named_is_one_sentence(taught, configs):
    with pytest.raises(RuntimeError) as error:
        taught(configs, "network", teacher_bundle=None).run()
    assert str(root_cause(error.value)).startswith("`teacher_bundle` must be the folder of a trained network's bundle")
