"""Configs of the zip: what of the package evaluation brings itself, and sizes as the weights were trained with."""

from __future__ import annotations

import json

import pytest
from monai.bundle import ConfigParser

from tests.bundles.conftest import BUNDLES
from zoo.configs import standalone_configs

SIZES = {
    "knowsam_acdc": {"image_size": (64, 256)},
    "knowsam_la": {
        "image_size": ([32, 32, 32], [112, 112, 80]),
        "spacing": ([2.0] * 3, [0.625] * 3),
        "channels": ([8, 16, 32, 64, 128], [16, 32, 64, 128, 256]),
        "aggregation_channels": ([4, 4, 8], [16, 16, 32]),
        "window_overlap": (0.5, [0.839, 0.839, 0.9499]),
    },
}


@pytest.fixture(params=SIZES)
def bundle(request):
    return request.param


@pytest.mark.parametrize("phantom", [True, False])
@pytest.mark.parametrize("name", ["evaluate.json", "inference.json"])
def test_sizes_are_those_of_the_weights_whatever_the_data(bundle, name, phantom):
    config = standalone_configs(BUNDLES / bundle / "configs", phantom)[name]
    expected = {key: value[not phantom] for key, value in SIZES[bundle].items()}
    assert {key: config[key] for key in expected} == expected
    assert "if @dataset_dir else" not in json.dumps(config)


def test_evaluation_leaves_nothing_of_the_package_to_training_s_config(bundle):
    configs = BUNDLES / bundle / "configs"
    evaluation = standalone_configs(configs, phantom=True)["evaluate.json"]
    own = ConfigParser.load_config_file(configs / "evaluate.json")
    assert set(evaluation) >= {"datalist", "network_def", "validate#preprocessing", "imports", "initialize", "run"}
    assert {key: value for key, value in evaluation.items() if key in own} == {
        **{key: value for key, value in own.items() if not key.startswith("+")},
        **{key: evaluation[key] for key in ("initialize", "run", *SIZES[bundle]) if key in own},
    }
    assert [one for one in evaluation["imports"] if "knowsam" in one] == [
        "$import knowsam_monai.preparation as preparation"
    ]


def test_what_initialize_did_run_does_first_because_the_copy_is_found_only_then(bundle):
    own = ConfigParser.load_config_file(BUNDLES / bundle / "configs" / "inference.json")
    config = standalone_configs(BUNDLES / bundle / "configs", phantom=True)["inference.json"]
    assert config["initialize"] == [] and config["run"] == own["initialize"] + own["run"]


def test_overlays_of_networks_come_along_and_those_of_methods_do_not(bundle):
    names = set(standalone_configs(BUNDLES / bundle / "configs", phantom=True))
    assert names == {"evaluate.json", "inference.json", "network_plain.json", "network_pair.json"}
