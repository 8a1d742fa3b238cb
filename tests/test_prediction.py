from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.bundle import ConfigParser

from knowsam_monai.data import write_phantom
from knowsam_monai.networks import MultiViewNet
from knowsam_monai.prediction import predict_folder
from knowsam_monai.preparation import root_cause
from knowsam_monai.trained_student import PHANTOM, read_record

BUNDLE = Path(__file__).parents[1] / "bundles" / "knowsam_acdc"
STUDENT = {
    "_target_": "knowsam_monai.networks.MultiViewNet",
    "in_channels": "@in_channels",
    "out_channels": "@num_classes",
}
STUDENT["channels"] = [4, 8, 8, 8, 8]


@pytest.fixture(autouse=True)
def logging_as_it_was():
    names = ("monai.bundle.workflows", "monai.data.image_writer", "ignite")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantom"
    write_phantom(folder, num_labeled=1, num_unlabeled=0, num_validation=0, num_test=0, max_size=32)
    return folder / "phantom001"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a training of a small student of 3 classes at 32 x 32 leaves."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    config = ConfigParser.load_config_file(str(BUNDLE / "configs" / "train.json"))
    config |= {"image_size": "$16 * 2", "class_names": ["a", "b"], "network_def": STUDENT, "dataset_dir": "/of/the/run"}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    torch.save(MultiViewNet(out_channels=3, channels=(4, 8, 8, 8, 8)).state_dict(), folder / "model.pt")
    return folder


def test_student_of_a_run_segments_at_its_size_and_with_its_classes(scans, run, tmp_path, capsys):
    output = tmp_path / "segmentations"
    assert predict_folder(scans, BUNDLE, output, run=run, image_pattern="*_E[DS].nii.gz", device="cpu") == 2
    written = sorted(output.rglob("*.nii.gz"))
    assert [path.name for path in written] == ["phantom001_ED_seg.nii.gz", "phantom001_ES_seg.nii.gz"]
    for path in written:
        scan, segmentation = nibabel.load(scans / path.name.replace("_seg", "")), nibabel.load(path)
        assert segmentation.shape == scan.shape and np.allclose(segmentation.affine, scan.affine, atol=1e-4)
        assert set(np.unique(segmentation.dataobj)) <= {0, 1, 2}
    shown = capsys.readouterr()
    assert "Segmenting" in shown.err and "2/2" in shown.err and "writing" not in shown.out


def test_nifti_and_nrrd_files_are_segmented_where_no_pattern_is_given(scans, run, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    shutil.copy(scans / "phantom001_ED.nii.gz", folder)
    sitk.WriteImage(sitk.ReadImage(str(scans / "phantom001_ES.nii.gz")), str(folder / "phantom001_ES.nrrd"))
    (folder / "notes.txt").write_text("no scan")
    assert predict_folder(folder, BUNDLE, tmp_path / "out", run=run, device="cpu") == 2
    written = sorted(path.name for path in (tmp_path / "out").rglob("*_seg.nii.gz"))
    assert written == ["phantom001_ED_seg.nii.gz", "phantom001_ES_seg.nii.gz"]


@pytest.mark.parametrize(
    "name, anatomy, pattern, num_images, overrides",
    [
        ("knowsam_acdc", "short_axis", "*_E[DS].nii.gz", 2, {}),
        ("knowsam_la", "left_atrium", "*_LGE.nii.gz", 1, {"window_overlap": "0.25"}),
    ],
)
def test_student_of_the_repository_segments_a_phantom_that_it_has_not_seen(
    tmp_path, name, anatomy, pattern, num_images, overrides
):
    bundle = BUNDLE.with_name(name)
    if read_record(bundle / "models")["trained_on"] != PHANTOM:
        pytest.skip("models/model.pt is of a training of one's own")
    counts = {"num_labeled": 1, "num_unlabeled": 0, "num_validation": 0, "num_test": 0}
    write_phantom(tmp_path / "scans", anatomy=anatomy, seed=99, **counts)
    folder, options = tmp_path / "scans" / "phantom001", {"image_pattern": pattern, "overrides": overrides}
    assert predict_folder(folder, bundle, tmp_path / "out", device="cpu", **options) == num_images
    for path in (tmp_path / "out").rglob("*.nii.gz"):
        truth = np.asarray(nibabel.load(folder / path.name.replace("_seg", "_gt")).dataobj)
        found = np.asarray(nibabel.load(path).dataobj)
        classes = np.unique(truth)[1:]
        dice = [2 * ((found == c) & (truth == c)).sum() / ((found == c).sum() + (truth == c).sum()) for c in classes]
        assert len(dice) == {"short_axis": 3, "left_atrium": 1}[anatomy] and min(dice) > 0.6, (path.name, dice)


def test_bundle_s_own_student_and_further_keys(scans, run, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(BUNDLE / "configs", bundle / "configs")
    (bundle / "models").mkdir()
    shutil.copy(run / "model.pt", bundle / "models" / "model.pt")
    overrides = {"image_size": "32", "num_classes": "3", "network_def": json.dumps(STUDENT), "output_postfix": "mask"}
    assert (
        predict_folder(scans / "phantom001_ED.nii.gz", bundle, tmp_path / "out", overrides=overrides, device="cpu") == 1
    )
    assert [path.name for path in (tmp_path / "out").rglob("*.nii.gz")] == ["phantom001_ED_mask.nii.gz"]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"scans": "/nowhere"}, "`dataset_dir` must be a folder of images"),
        ({"bundle": "/nowhere"}, "`bundle` must be a bundle's folder but /nowhere has no configs"),
        ({"run": "/nowhere"}, "`run` must be the `output_dir` of a training but /nowhere has no model.pt"),
        (
            {"overrides": {"image_sizes": "3"}},
            "`image_sizes` must be a key of .*inference.json but is none; it has imports",
        ),
        ({"overrides": {"num_classes": "4"}}, "network of 4 classes but .*model.pt has 3"),
        ({"device": "cuda:99"}, "`device` must be one of this machine but is 'cuda:99'"),
        ({"device": "gpu"}, "`device` must be one of this machine but is 'gpu'"),
        ({"image_pattern": "*.mha"}, "`dataset_dir` must hold files that match '\\*.mha'"),
        ({"ckpt_path": "/nowhere.pt"}, "`load_path` must be a trained student but /nowhere.pt does not exist"),
    ],
)
def test_mistake_is_one_sentence(scans, run, tmp_path, change, message):
    with pytest.raises(Exception) as error:
        predict_folder(**{"scans": scans, "bundle": BUNDLE, "output": tmp_path, "run": run, "device": "cpu", **change})
    cause = root_cause(error.value)
    assert isinstance(cause, (ValueError, FileNotFoundError))
    assert re.search(message, str(cause)), str(cause)
