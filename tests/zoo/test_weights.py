"""Whose weights a zip gets: refused in one sentence where that is not known, or where they are of another student."""

from __future__ import annotations

import shutil

import pytest
import torch

from knowsam_monai.trained_student import publish_student, read_record, warn_of_phantom
from tests.bundles.conftest import BUNDLES
from zoo.weights import find_training

from .conftest import RUN


@pytest.fixture
def bundle(tmp_path):
    """A bundle whose run wrote a model of one weight."""
    folder = tmp_path / "knowsam_acdc"
    shutil.copytree(BUNDLES / "knowsam_acdc" / "configs", folder / "configs")
    publish_student(run_of_one_weight(folder / "output" / RUN), folder / "models")
    return folder


def run_of_one_weight(folder):
    folder.mkdir(parents=True)
    torch.save({"weight": torch.zeros(1)}, folder / "model.pt")
    (folder / "config.json").write_text("{}")
    (folder / "results.csv").write_text("epoch,val_mean_dice,val_teacher_dice\n1,0.25,0.5\n2,0.75,\n3,0.5,0.5\n")
    return folder


def test_missing_weights_name_the_command_that_trains(bundle):
    (bundle / "models" / "model.pt").unlink()
    with pytest.raises(
        ValueError, match=f"models/model.pt does not exist; train one with `make train BUNDLE={bundle}`"
    ):
        find_training(bundle)


def test_weights_of_another_network_are_refused(bundle):
    with pytest.raises(ValueError, match="must hold the weights of MultiViewNet but .*model.pt is of another network"):
        find_training(bundle)


def test_weights_that_no_run_wrote_are_refused(bundle):
    torch.save({"weight": torch.ones(1)}, bundle / "models" / "model.pt")
    with pytest.raises(ValueError, match="model.pt must have beside it the model.json of the run that trained it"):
        find_training(bundle)


def test_record_names_the_run_and_what_its_best_validation_measured(tmp_path):
    publish_student(run_of_one_weight(tmp_path / RUN), tmp_path / "models")
    assert read_record(tmp_path / "models")["run"] == RUN
    assert read_record(tmp_path / "models")["metrics"] == {"val_mean_dice": 0.75}


@pytest.mark.parametrize(
    "run, dataset_dir, warns", [(RUN, "scans", True), (RUN, None, False), ("acdc", "scans", False)]
)
def test_student_of_the_phantom_warns_who_segments_scans(tmp_path, caplog, run, dataset_dir, warns):
    publish_student(run_of_one_weight(tmp_path / run), tmp_path / "models")
    warn_of_phantom(tmp_path / "models" / "model.pt", dataset_dir)
    warn_of_phantom(tmp_path / run / "model.pt", dataset_dir)  # weights without a record tell nothing
    assert [f"is of the run {RUN}, trained on the synthetic phantom" in text for text in caplog.messages] == [
        True
    ] * warns


def test_run_in_the_folder_of_the_weights_leaves_its_record_there(tmp_path):
    folder = run_of_one_weight(tmp_path / RUN)
    publish_student(folder, folder)
    assert read_record(folder)["run"] == RUN


@pytest.mark.parametrize("content", ["", "[]", '{"run": "a"}'])
def test_broken_record_is_one_sentence(tmp_path, content):
    publish_student(run_of_one_weight(tmp_path / RUN), tmp_path / "models")
    (tmp_path / "models" / "model.json").write_text(content)
    with pytest.raises(ValueError, match="but has none or another's; copy both"):
        read_record(tmp_path / "models")


def test_phantom_is_read_from_the_name_of_the_run(hosted, tmp_path):
    assert find_training(hosted.bundle).phantom
    run, bundle = tmp_path / "knowsam_7_patients_seed0", tmp_path / hosted.name
    shutil.copytree(hosted.bundle / "configs", bundle / "configs")
    shutil.copytree(hosted.bundle / "output" / RUN, run)
    publish_student(run, bundle / "models")
    if hosted.name == "knowsam_la":  # the published student is wider than the phantom's
        with pytest.raises(ValueError, match="weights of this MultiViewNet"):
            find_training(bundle)
    else:
        training = find_training(bundle)
        assert training[:2] == (run.name, False) and "phantom" not in training.sentence
