"""train.json checks its data list once, before a step, and refuses what is wrong with it."""

from __future__ import annotations

import json
import logging
import shutil

import nibabel
import numpy as np
import pytest

from knowsam_monai.data import check
from knowsam_monai.errors import root_cause

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


def test_masks_of_0_and_255_are_checked_and_trained(train, tmp_path, caplog):
    training, phantom = train
    shutil.copytree(phantom.parent, tmp_path / "data")
    for path in (tmp_path / "data").rglob("*_gt.nii.gz"):
        label = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image((np.asarray(label.dataobj) > 0) * np.uint8(255), label.affine), path)
    run = training(dataset_dir=str(tmp_path / "data" / phantom.name), class_names=["heart"], **ALONE).run()
    assert set(run["train#trainer"].state.output["label"].unique().tolist()) <= {0, 1}
    assert caplog.text.count("labels are masks of 0 and 255, such as") == caplog.text.count("0 and 255") == 1


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
