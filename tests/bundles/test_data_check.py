"""train.json checks its data list once, before a step, and refuses what is wrong with it."""

from __future__ import annotations

import json
import logging
import shutil

import pytest

from knowsam_monai.data import check
from knowsam_monai.preparation import root_cause

ALONE = {"use_sam": False, "mixing_weight": 0, "max_iterations": 1}


@pytest.fixture(params=["training", "training_3d"])
def train(request):
    """Of each bundle: `train(key=value)`, a tiny training, and the data list of its phantom."""
    phantom = {"training": "small_phantom", "training_3d": "small_volumes"}[request.param]
    return request.getfixturevalue(request.param), request.getfixturevalue(phantom)


def test_the_list_is_checked_once_before_the_first_step(train, monkeypatch, caplog):
    run, steps = train[0](**ALONE), []

    class Reader(check.CaseReader):
        def __call__(self, item):
            steps.append((item["image"], len(run.history)))
            return super().__call__(item)

    monkeypatch.setattr(check, "CaseReader", Reader)
    monkeypatch.setenv("KNOWSAM_CACHE_DIR", str(run.output_dir / "cache"))
    with caplog.at_level(logging.INFO):
        run.run()
    assert len(run.history) == 1 and caplog.text.count("items checked in") == 1
    assert len(steps) == len(set(steps)) > 2 and {step for _, step in steps} == {0}


def test_patient_of_two_names_is_refused(train, tmp_path):
    training, phantom = train
    folder = tmp_path / "data"
    shutil.copytree(phantom.parent, folder)
    datalist = json.loads((folder / phantom.name).read_text())
    shutil.copyfile(folder / datalist["labeled"][0]["image"], folder / datalist["validation"][0]["image"])
    run = training(dataset_dir=str(folder / phantom.name), **ALONE)
    with pytest.raises(RuntimeError) as error:
        run.run()
    assert "`validation` must share no image with `labeled` but" in str(root_cause(error.value))
    assert run.history == []
