"""Whose weights a zip gets: refused in one sentence where that is not known, or where they are of another student."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.bundles.conftest import BUNDLES
from zoo.weights import find_training

from .conftest import RUN


@pytest.fixture
def bundle(tmp_path):
    """A bundle whose run wrote a model of one weight."""
    folder = tmp_path / "knowsam_acdc"
    shutil.copytree(BUNDLES / "knowsam_acdc" / "configs", folder / "configs")
    for path in (folder / "models", folder / "output" / RUN):
        path.mkdir(parents=True)
        torch.save({"weight": torch.zeros(1)}, path / "model.pt")
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


@pytest.mark.parametrize("given", [True, False])
def test_weights_that_no_run_wrote_are_refused(bundle, given):
    torch.save({"weight": torch.ones(1)}, bundle / "models" / "model.pt")
    run = bundle / "output" / RUN if given else None
    with pytest.raises(ValueError, match="`run` must be the folder of the run that wrote .* has no such model.pt"):
        find_training(bundle, run)


def test_run_elsewhere_is_given_by_its_folder_and_phantom_is_read_from_its_name(hosted, tmp_path):
    assert find_training(hosted.bundle).phantom
    run = tmp_path / "knowsam_7_patients_seed0"
    run.mkdir()
    shutil.copyfile(hosted.bundle / "models" / "model.pt", run / "model.pt")
    if hosted.name == "knowsam_la":  # the published student is wider than the phantom's
        with pytest.raises(ValueError, match="weights of this MultiViewNet"):
            find_training(hosted.bundle, run)
    else:
        training = find_training(hosted.bundle, run)
        assert training == (run.name, False, {}) and "phantom" not in training.sentence
