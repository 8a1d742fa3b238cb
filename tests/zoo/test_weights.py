"""Whose weights a zip gets: refused in one sentence where that is not known, or where they are of another student."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple_rep

from knowsam_monai.data import write_phantom
from knowsam_monai.runs.trained_student import (
    PHANTOM,
    publish_student,
    read_record,
    warn_of_other_settings,
    warn_of_phantom,
)
from tests.bundles.conftest import BUNDLES
from tests.bundles.test_documents import ROOT
from tests.zoo.conftest import RUN
from zoo.configs import standalone_configs
from zoo.weights import find_training


@pytest.fixture
def bundle(tmp_path):
    """A bundle whose run wrote a model of one weight."""
    folder = tmp_path / "knowsam_acdc"
    shutil.copytree(BUNDLES / "knowsam_acdc" / "configs", folder / "configs")
    publish_student(run_of_one_weight(folder / "output" / RUN), folder / "models")
    return folder


def run_of_one_weight(folder, dataset_dir=None, **settings):
    folder.mkdir(parents=True)
    torch.save({"weight": torch.zeros(1)}, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps({"dataset_dir": dataset_dir and str(dataset_dir), **settings}))
    (folder / "results.csv").write_text("epoch,val_mean_dice,val_teacher_dice\n1,0.25,0.5\n2,0.75,\n3,0.5,0.5\n")
    return folder


def test_missing_weights_name_the_command_that_trains(bundle):
    (bundle / "models" / "model.pt").unlink()
    with pytest.raises(
        ValueError, match=f"models/model.pt does not exist; train one with `make train BUNDLE={bundle}`"
    ):
        find_training(bundle)


def test_weights_of_another_network_are_refused(bundle):
    with pytest.raises(ValueError, match="must hold the weights of MultiViewNet but .*model.pt holds another model"):
        find_training(bundle)


def test_weights_that_no_run_wrote_are_refused(bundle):
    torch.save({"weight": torch.ones(1)}, bundle / "models" / "model.pt")
    with pytest.raises(ValueError, match="model.pt must be next to the model.json and config.json of the run"):
        find_training(bundle)


def test_record_names_the_run_and_what_its_best_validation_measured(tmp_path):
    publish_student(run_of_one_weight(tmp_path / RUN), tmp_path / "models")
    assert read_record(tmp_path / "models")["run"] == RUN
    assert read_record(tmp_path / "models")["metrics"] == {"val_mean_dice": 0.75}


@pytest.fixture
def data(tmp_path):
    """`data(kind)`: what a run was given as `dataset_dir`."""
    write_phantom(tmp_path / "made", num_unlabeled=0, num_labeled=1, num_validation=0, num_test=0, max_size=32)
    (tmp_path / "phantom.json").write_text('{"labeled": []}')
    (tmp_path / "phantom").mkdir()
    paths = {"list of the phantom": "made/dataset.json", "own list": "phantom.json", "folder": "phantom"}
    return lambda kind: kind and tmp_path / paths[kind]


@pytest.mark.parametrize(
    "kind, trained_on",
    [(None, PHANTOM), ("list of the phantom", PHANTOM), ("own list", "phantom.json"), ("folder", "phantom")],
)
@pytest.mark.parametrize("name", ["phantom_seed0", "acdc"])
def test_what_the_student_was_trained_on_is_its_data_whatever_the_run_is_called(
    tmp_path, data, caplog, kind, trained_on, name
):
    publish_student(run_of_one_weight(tmp_path / name, data(kind)), tmp_path / "models")
    record = read_record(tmp_path / "models")
    assert record["trained_on"] == trained_on and str(tmp_path) not in json.dumps(record)
    warn_of_phantom(tmp_path / "models" / "model.pt", None)
    for scans in ("", "dataset.json", "phantom001", "phantom001/phantom001_ED.nii.gz"):
        warn_of_phantom(tmp_path / "models" / "model.pt", tmp_path / "made" / scans)
    assert not caplog.messages
    warn_of_phantom(tmp_path / "models" / "model.pt", "scans")
    warned = [
        f"comes from the run {name}, which was trained on the synthetic phantom" in text for text in caplog.messages
    ]
    assert warned == [True] * (trained_on == PHANTOM)


def test_images_of_another_size_than_in_training_are_warned_of(tmp_path, caplog):
    settings = {"image_size": [32, 32, 8], "intensity_window": None}
    publish_student(run_of_one_weight(tmp_path / "run", **settings), tmp_path)
    weights = tmp_path / "model.pt"
    warn_of_other_settings(weights, {**settings, "spacing": [1, 1, 1]})
    assert read_record(tmp_path)["settings"] == settings and not caplog.messages
    warn_of_other_settings(weights, {**settings, "image_size": [32, 32, 16]})
    assert caplog.messages == [
        f"`image_size` is [32, 32, 16] but {weights} was trained with [32, 32, 8]; set it to that "
        "(--image_size '[32, 32, 8]'; in `knowsam predict` --run FOLDER without --set image_size)."
    ]


@pytest.mark.parametrize("weights", ["model.pt", "last_model_epoch=4.pt"])
def test_student_in_the_folder_of_its_run_is_warned_of_too(tmp_path, caplog, weights):
    student = {"run": "my_run", "trained_on": PHANTOM, "settings": {"image_size": 64, "intensity_window": None}}
    (tmp_path / "run.json").write_text(json.dumps({"starts": [{"student": student}]}))
    warn_of_other_settings(tmp_path / weights, {"image_size": 64, "intensity_window": None})
    warn_of_phantom(tmp_path / weights, None)
    assert not caplog.messages
    warn_of_other_settings(tmp_path / weights, {"image_size": 256, "intensity_window": (0, 1)})
    assert "was trained with 64; set it to that (--image_size 64;" in caplog.messages[0]
    assert "set it to that (--intensity_window '$None';" in caplog.messages[1]
    warn_of_phantom(tmp_path / weights, "scans")
    assert "comes from the run my_run, which was trained on the synthetic phantom" in caplog.messages[2]


@pytest.mark.parametrize("name", ["model.pt", "model.json", "config.json"])
@pytest.mark.parametrize("content", [None, b"of another run"])
def test_weights_without_a_record_or_with_another_s_warn_of_nothing_and_stop_nothing(bundle, caplog, name, content):
    path = bundle / "models" / name
    path.unlink() if content is None else path.write_bytes(content)
    warn_of_phantom(bundle / "models" / "model.pt", "scans")
    assert not caplog.messages


def test_run_in_the_folder_of_the_weights_leaves_its_record_there(tmp_path):
    folder = run_of_one_weight(tmp_path / RUN)
    publish_student(folder, folder)
    assert read_record(folder)["run"] == RUN


@pytest.mark.parametrize("content", ["", "[]", '{"run": "a"}'])
def test_broken_record_is_one_sentence(tmp_path, content):
    publish_student(run_of_one_weight(tmp_path / RUN), tmp_path / "models")
    (tmp_path / "models" / "model.json").write_text(content)
    with pytest.raises(ValueError, match="but they are missing or belong to another run; copy all three"):
        read_record(tmp_path / "models")


@pytest.fixture
def published(tmp_path):
    """`published(bundle, **config)`: a copy of a bundle with the student that its train.json builds with these keys."""

    def publish(name, **config):
        train = ConfigParser.load_config_file(BUNDLES / name / "configs" / "train.json") | config
        bundle, run = tmp_path / name, run_of_one_weight(tmp_path / RUN)
        (run / "config.json").write_text(json.dumps(train))
        network = ConfigParser(train).get_parsed_content("network_def")
        torch.save(network.state_dict(), run / "model.pt")
        shutil.copytree(BUNDLES / name / "configs", bundle / "configs")
        publish_student(run, bundle / "models")
        return bundle

    return publish


def test_student_of_other_sizes_than_the_published_is_taken_with_its_own(published):
    training = find_training(published("knowsam_acdc", dataset_dir="/data/ACDC", image_size=128))
    assert training.trained_on == "ACDC" and training.student["image_size"] == 128
    assert training.sentence.endswith(f"from the run {RUN}, trained on ACDC; mean validation Dice 0.750.")


def test_student_of_other_channels_and_classes_than_the_published_is_taken_with_its_own(published):
    own = {"channels": [4, 4, 4, 4, 4], "aggregation_channels": [2, 2, 4], "class_names": ["a", "b"]}
    training = find_training(published("knowsam_la", dataset_dir="/data/LA", **own))
    assert {key: training.student[key] for key in own} == own and training.student["num_classes"] == 3
    assert training.student["image_size"] == [112, 112, 80]


def test_every_student_of_the_repository_loads_into_inference_at_the_sizes_that_it_was_trained_with():
    bundles = [path.parents[1] for path in BUNDLES.glob("*/models/model.pt")]
    assert BUNDLES / "knowsam_acdc" in bundles
    for bundle in bundles:
        student = find_training(bundle).student
        config = standalone_configs(bundle / "configs", student)["inference.json"]
        network = ConfigParser(config).get_parsed_content("network_def")
        network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True), strict=True)
        spatial_dims = 3 if bundle.name == "knowsam_la" else 2
        size = ensure_tuple_rep(config["image_size"], spatial_dims)
        with torch.no_grad():
            pred = network.eval()(torch.zeros(1, config["in_channels"], *size))
        assert pred.shape == (1, config["num_classes"], *size)


def test_no_file_of_the_repository_is_over_the_zoo_s_limit():
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no git: {error}")
    if done.returncode or "setup.cfg" not in done.stdout.split("\0"):
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert not [path for path in files if path.stat().st_size > 25e6]
