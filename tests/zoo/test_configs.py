"""Configs of the zip: what of the package evaluation brings itself, and sizes as the weights were trained with."""

from __future__ import annotations

import copy
import json

import pytest
from monai.bundle import ConfigParser

from knowsam_monai.runs.trained_student import student_options
from tests.bundles.conftest import BUNDLES, CONFIGS_3D
from zoo.configs import standalone_configs, training_config

# other than any default of the configs, as a run has them
STUDENTS = {
    "knowsam_acdc": {"image_size": "$64 * 2", "class_names": ["a", "b"]},
    "knowsam_la": {"image_size": [64, 64, 32], "spacing": [1.0] * 3, "crop_size": 120, "channels": [4, 8, 8, 8, 8]},
}
EXPECTED = {
    "knowsam_acdc": {"in_channels": 1, "num_classes": 3, "image_size": 128},
    "knowsam_la": {
        **{"in_channels": 1, "num_classes": 2, "image_size": [64, 64, 32], "spacing": [1.0] * 3, "crop_size": 120},
        **{"channels": [4, 8, 8, 8, 8], "aggregation_channels": [4, 4, 8]},
    },
}


@pytest.fixture
def student(bundle, tmp_path):
    """What a run of a bundle says of its student."""
    train = ConfigParser.load_config_file(BUNDLES / bundle / "configs" / "train.json")
    (tmp_path / "config.json").write_text(json.dumps({**train, **STUDENTS[bundle], "device": "cpu"}))
    inference = ConfigParser.load_config_file(BUNDLES / bundle / "configs" / "inference.json")
    return student_options(tmp_path / "config.json", [*inference, "class_names"])


@pytest.fixture(params=STUDENTS)
def bundle(request):
    return request.param


@pytest.mark.parametrize("name", ["evaluate.json", "inference.json"])
def test_sizes_are_those_of_the_run_that_trained_the_weights(bundle, student, name):
    configs = BUNDLES / bundle / "configs"
    config = standalone_configs(configs, student)[name]
    assert {key: config[key] for key in EXPECTED[bundle]} == EXPECTED[bundle]
    assert config["network_def"] == ConfigParser.load_config_file(configs / "train.json")["network_def"]
    assert name == "inference.json" or config["class_names"] == student["class_names"]


def test_windows_overlap_as_published_and_not_as_in_the_validations_of_a_training(bundle, student):
    inference = json.loads((BUNDLES / bundle / "configs" / "inference.json").read_text())
    for config in standalone_configs(BUNDLES / bundle / "configs", student).values():
        assert config.get("window_overlap") == inference.get("window_overlap") != 0.5


def test_another_network_of_the_run_is_the_zip_s_without_an_overlay():
    student = {"network_def": {"_target_": "VNet", "spatial_dims": 3}, "in_channels": 1, "channels": [8, 8]}
    configs = standalone_configs(CONFIGS_3D, student)
    assert [config["network_def"] for config in configs.values()] == [student["network_def"]] * 2
    assert training_config(CONFIGS_3D, student)["network_def"] == student["network_def"]
    assert "channels" not in configs["evaluate.json"]  # of the other network


OF_THE_NETWORK = ("class_names", "in_channels", "num_classes", "channels", "aggregation_channels")


def test_training_s_network_is_that_of_the_weights_which_monai_loads(bundle, student):
    configs = BUNDLES / bundle / "configs"
    config, own = training_config(configs, student), ConfigParser.load_config_file(configs / "train.json")
    parser = ConfigParser(copy.deepcopy(config))
    assert all(parser.get_parsed_content(key) == student[key] for key in OF_THE_NETWORK if key in student)
    changed = {key for key in own if config[key] != own[key]}
    assert changed == {
        "initialize",
        "run",
        "network_def",
        {"knowsam_acdc": "class_names", "knowsam_la": "channels"}[bundle],
    }


def test_training_of_the_zip_has_the_published_sizes_if_its_weights_are_the_phantom_s(bundle):
    configs = BUNDLES / bundle / "configs"
    own = ConfigParser.load_config_file(configs / "train.json")
    inference = ConfigParser.load_config_file(configs / "inference.json")
    config = training_config(configs, student_options(configs / "train.json", [*inference, "class_names"]))
    assert {key for key in own if config[key] != own[key]} == {"initialize", "run", "network_def"}


def test_evaluation_leaves_nothing_of_the_package_to_training_s_config(bundle, student):
    configs = BUNDLES / bundle / "configs"
    evaluation = standalone_configs(configs, student)["evaluate.json"]
    own = ConfigParser.load_config_file(configs / "evaluate.json")
    assert set(evaluation) >= {"datalist", "network_def", "validate#preprocessing", "imports", "initialize", "run"}
    assert {key: value for key, value in evaluation.items() if key in own} == {
        **{key: value for key, value in own.items() if not key.startswith("+")},
        **{key: evaluation[key] for key in ("initialize", "run", *student) if key in own},
    }
    assert not [statement for statement in evaluation["imports"] if "knowsam" in statement]


def test_what_initialize_did_run_does_first_because_the_copy_is_found_only_then(bundle, student):
    own = ConfigParser.load_config_file(BUNDLES / bundle / "configs" / "inference.json")
    config = standalone_configs(BUNDLES / bundle / "configs", student)["inference.json"]
    assert config["initialize"] == [] and config["run"] == own["initialize"] + own["run"]


def test_overlays_stay_the_package_s_which_training_needs_before_it_finds_the_copy(bundle, student):
    assert set(standalone_configs(BUNDLES / bundle / "configs", student)) == {"evaluate.json", "inference.json"}
