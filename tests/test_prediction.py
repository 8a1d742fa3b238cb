from __future__ import annotations

import gzip
import hashlib
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
from knowsam_monai.preparation import is_said_by_this_package, root_cause
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


def test_home_folder_is_meant_in_every_path(scans, run, tmp_path, monkeypatch):
    (tmp_path / "run").symlink_to(run)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert predict_folder(scans / "phantom001_ED.nii.gz", BUNDLE, "~/out", run="~/run", device="cpu") == 1
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 1 and not (tmp_path / "~").exists()


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
        ({"ckpt_path": "/nowhere.pt"}, "`ckpt_path` must be a file of .* weights but /nowhere.pt does not exist"),
        ({"ckpt_path": BUNDLE}, "`ckpt_path` must be a file of .* weights but .*knowsam_acdc is a folder"),
        ({"output": __file__}, "`output` must be a folder that can be written but .*; name another, as in --output "),
        ({"overrides": {"image_size": "abc"}}, "`image_size` must be a whole number, .* but is 'abc'"),
        (
            {"overrides": {"network_def": '{"_target_": "UNet", "dim": "$1"}'}},
            "`network_def` must be JSON or text",
        ),
        ({"overrides": {"image_size": "$1/0"}}, "`image_size` must be JSON or text .* nothing is evaluated, but is"),
        ({"overrides": {"output_postfix": "../.."}}, "`output_postfix` must be text without a slash but is '../..'"),
        ({"image_pattern": "../*.json"}, "`image_pattern` must be a pattern below the folder of the images but is "),
        ({"image_pattern": __file__}, "`image_pattern` must be a pattern below the folder of the images but is "),
        ({"overrides": {"num_classes": "x"}}, "`num_classes` must be a number of classes, .* but is 'x'"),
        ({"overrides": {"slices_per_batch": "0"}}, "`slices_per_batch` must be a whole number, 1 or more, .* but is 0"),
    ],
)
def test_mistake_is_one_sentence(scans, run, tmp_path, change, message):
    with pytest.raises(Exception) as error:
        predict_folder(**{"scans": scans, "bundle": BUNDLE, "output": tmp_path, "run": run, "device": "cpu", **change})
    cause = root_cause(error.value)
    assert isinstance(cause, (ValueError, OSError)) and is_said_by_this_package(cause)
    assert re.search(message, str(cause)) and "\n" not in str(cause), str(cause)


@pytest.mark.parametrize(
    "of_the_run, message",
    [
        (
            {"network_def": {**STUDENT, "channels": "@channels"}},
            "`run` must be .*needs `channels`, which it does not have",
        ),
        (
            {"network_def": {**STUDENT, "spatial_dims": 3}},
            "`run` must be .*is in 3D and its own in 2D; name the bundle",
        ),
        ({"image_size": "$1/0"}, "`image_size` of .*config.json cannot \\(division by zero\\)"),
        ("{", "`run` must have a whole config but .*config.json is damaged \\("),
        ("[]", "`run` must have a config of keys and values but .*config.json has none"),
    ],
)
def test_run_that_does_not_fit_the_bundle_is_one_sentence(scans, run, tmp_path, of_the_run, message):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    if isinstance(of_the_run, dict):
        of_the_run = json.dumps(json.loads((run / "config.json").read_text()) | of_the_run)
    (other / "config.json").write_text(of_the_run)
    with pytest.raises(ValueError, match=message):
        predict_folder(scans, BUNDLE, tmp_path / "out", run=other, device="cpu")


def test_damaged_config_of_the_bundle_is_one_sentence(scans, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "inference.json").write_text("{")
    with pytest.raises(ValueError, match="`bundle` must have a whole config but .*inference.json is damaged"):
        predict_folder(scans, tmp_path, tmp_path / "out")


@pytest.fixture
def mixed(scans, tmp_path):
    """A cut file, one of two channels, a good scan, and one with NaN."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    scan = scans / "phantom001_ED.nii.gz"
    (folder / "a.nii.gz").write_bytes(scan.read_bytes()[:500])
    nibabel.save(nibabel.Nifti1Image(np.ones((32, 32, 3, 2), np.float32), np.eye(4)), folder / "b.nii.gz")
    shutil.copy(scan, folder / "c.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.full((32, 32, 3), np.nan, np.float32), np.eye(4)), folder / "d.nii.gz")
    return folder


def test_images_that_cannot_be_segmented_are_listed_and_the_rest_is_segmented(mixed, run, tmp_path, capsys):
    with pytest.raises(ValueError) as error:
        predict_folder(mixed, BUNDLE, tmp_path / "out", run=run, device="cpu")
    assert capsys.readouterr().err.endswith("\n")  # of the bar, before the error
    first, *lines = str(error.value).splitlines()
    assert first.startswith("`scans` must be images that can be segmented but 3 of 4 could not; ")
    assert [sorted(mixed.glob(f"{name}.*"))[0].name in line for name, line in zip("abd", lines)] == [True] * 3
    assert "must be a readable image" in lines[0] and "has 3072 NaN" in lines[2]
    assert [path.name for path in (tmp_path / "out").rglob("*.nii.gz")] == ["c_seg.nii.gz"]
    good = nibabel.load(tmp_path / "out" / "c_seg.nii.gz")
    assert predict_folder(mixed / "c.nii.gz", BUNDLE, tmp_path / "alone", run=run, device="cpu") == 1
    assert np.array_equal(good.dataobj, nibabel.load(tmp_path / "alone" / "c_seg.nii.gz").dataobj)


@pytest.fixture(params=["short_axis", "left_atrium"])
def bundle_and_scans(request, tmp_path):
    """A bundle with its own student, and three scans a, b and c for it."""
    counts = {"num_labeled": 1, "num_unlabeled": 0, "num_validation": 0, "num_test": 0, "max_size": 32}
    write_phantom(tmp_path / "phantom", anatomy=request.param, **counts)
    image = next(
        (tmp_path / "phantom" / "phantom001").glob("*_ED.nii.gz" if request.param == "short_axis" else "*_LGE*")
    )
    (tmp_path / "scans").mkdir()
    for name in "abc":
        shutil.copy(image, tmp_path / "scans" / f"{name}.nii.gz")
    return BUNDLE.with_name("knowsam_acdc" if request.param == "short_axis" else "knowsam_la"), tmp_path / "scans"


def nan_in_the_affine(scan, output):
    raw = bytearray(gzip.decompress(scan.read_bytes()))
    raw[292:296] = np.float32("nan").tobytes()  # srow_x[3]
    scan.write_bytes(gzip.compress(bytes(raw)))


def link_to_nothing(scan, output):
    scan.unlink()
    scan.symlink_to("nowhere.nii.gz")


def empty_file(scan, output):
    scan.write_bytes(b"")


def no_place_for_the_segmentation(scan, output):
    (output / f"{scan.name[0]}_seg.nii.gz").mkdir(parents=True)


@pytest.mark.parametrize("spoil", [nan_in_the_affine, link_to_nothing, empty_file, no_place_for_the_segmentation])
def test_one_broken_scan_stops_no_other_whatever_step_breaks(bundle_and_scans, tmp_path, spoil):
    (bundle, scans), output = bundle_and_scans, tmp_path / "out"
    spoil(scans / "b.nii.gz", output)
    with pytest.raises(ValueError, match="but 1 of 3 could not; .*\n.*b.nii.gz") as error:
        predict_folder(scans, bundle, output, device="cpu")
    assert len(str(error.value).splitlines()) == 2
    assert sorted(path.name for path in output.iterdir() if path.is_file()) == ["a_seg.nii.gz", "c_seg.nii.gz"]


def test_folder_of_broken_images_alone_is_listed(mixed, run, tmp_path):
    (mixed / "c.nii.gz").unlink()
    with pytest.raises(ValueError, match="but 3 of 3 could not; "):
        predict_folder(mixed, BUNDLE, tmp_path / "out", run=run, device="cpu")


def test_fault_of_the_bundle_is_no_fault_of_the_images(scans, run, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(BUNDLE / "configs", bundle / "configs")
    config = json.loads((bundle / "configs" / "inference.json").read_text())
    config["preprocessing"]["transforms"][2]["keys"] = "another"
    (bundle / "configs" / "inference.json").write_text(json.dumps(config))
    with pytest.raises(KeyError, match="another"):
        predict_folder(scans, bundle, tmp_path / "out", run=run, device="cpu")


def test_phantom_student_is_warned_of_once_there_are_scans_that_are_none_of_a_phantom(scans, run, tmp_path, caplog):
    student = tmp_path / "models"
    shutil.copytree(run, student)
    hashes = {name: hashlib.sha256((student / name).read_bytes()).hexdigest() for name in ("model.pt", "config.json")}
    record = {"run": "its_run", "trained_on": PHANTOM, "metrics": {}, "sha256": hashes}
    (student / "model.json").write_text(json.dumps(record))
    (tmp_path / "scans").mkdir()
    with pytest.raises(Exception) as error:
        predict_folder(tmp_path / "scans", BUNDLE, tmp_path / "out", run=student, device="cpu")
    assert "must hold files that match" in str(root_cause(error.value)) and not caplog.messages
    predict_folder(scans / "phantom001_ED.nii.gz", BUNDLE, tmp_path / "out", run=student, device="cpu")
    assert "its_run" not in caplog.text
    shutil.copy(scans / "phantom001_ED.nii.gz", tmp_path / "scans")
    predict_folder(tmp_path / "scans", BUNDLE, tmp_path / "out", run=student, device="cpu")
    assert "of the run its_run" in caplog.text and "--ckpt_path FILE" in caplog.text and "--run FOLDER" in caplog.text
