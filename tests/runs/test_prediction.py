from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
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
from knowsam_monai.errors import KnowSAMError, root_cause
from knowsam_monai.networks import MultiViewNet
from knowsam_monai.runs.prediction import predict_folder
from knowsam_monai.runs.trained_student import PHANTOM, read_record
from tests.processes import run_module

BUNDLE = Path(__file__).parents[2] / "bundles" / "knowsam_acdc"
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


@pytest.mark.parametrize("name", ["model.pt", "last_model_epoch=4.pt"])
def test_weights_of_a_run_alone_are_used_with_the_settings_of_its_training(scans, tmp_path, monkeypatch, name):
    """And no code that a stranger may have put there runs."""
    settings = {"image_size": 48, "spacing": ["$__import__('os').mkdir('ran')"], "bundle_root": "/", "num_classes": 3}
    student = {"run": "a", "trained_on": "b", "settings": settings}
    (tmp_path / "run.json").write_text(json.dumps({"starts": [{"student": None}, {"student": student}]}))
    (tmp_path / name).touch()
    used = []
    monkeypatch.setattr("knowsam_monai.runs.prediction._segment", lambda workflow, output: used.append(workflow))
    with pytest.raises(AttributeError):  # no loader
        predict_folder(scans, bundle=BUNDLE, output=tmp_path / "out", ckpt_path=tmp_path / name, device="cpu")
    parser = used[0].parser
    parser.parse(True)
    assert [parser.get_parsed_content(key) for key in ("image_size", "num_classes")] == [48, 3]
    assert parser.get_parsed_content("bundle_root") == str(BUNDLE) and "mkdir" not in str(parser.config)


@pytest.mark.parametrize("codes", ["PSR", "IPL", "ASR", "RAS"])
def test_scan_gets_the_same_segmentation_whatever_the_order_of_its_axes(scans, run, tmp_path, codes):
    (tmp_path / "in").mkdir()
    scan = nibabel.load(scans / "phantom001_ED.nii.gz")
    own = nibabel.io_orientation(scan.affine)
    turn = nibabel.orientations.ornt_transform(own, nibabel.orientations.axcodes2ornt(codes))
    nibabel.save(scan, tmp_path / "in" / "own.nii.gz")
    nibabel.save(scan.as_reoriented(turn), tmp_path / "in" / "turned.nii.gz")
    assert predict_folder(tmp_path / "in", BUNDLE, tmp_path / "out", run=run, device="cpu") == 2
    expected, turned = (nibabel.load(tmp_path / "out" / f"{name}_seg.nii.gz") for name in ("own", "turned"))
    assert nibabel.aff2axcodes(turned.affine) == tuple(codes)
    back = turned.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(turned.affine), own))
    assert len(np.unique(expected.dataobj)) > 1
    np.testing.assert_array_equal(np.asarray(back.dataobj), np.asarray(expected.dataobj))


def test_nifti_and_nrrd_files_are_segmented_where_no_pattern_is_given(scans, run, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    shutil.copy(scans / "phantom001_ED.nii.gz", folder)
    sitk.WriteImage(sitk.ReadImage(str(scans / "phantom001_ES.nii.gz")), str(folder / "phantom001_ES.nrrd"))
    (folder / "notes.txt").write_text("no scan")
    assert predict_folder(folder, BUNDLE, tmp_path / "out", run=run, device="cpu") == 2
    written = sorted(path.name for path in (tmp_path / "out").rglob("*_seg.nii.gz"))
    assert written == ["phantom001_ED_seg.nii.gz", "phantom001_ES_seg.nii.gz"]


def test_label_beside_its_scan_is_left_out_with_one_warning(scans, run, tmp_path, caplog):
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a_image.nii.gz", "a_label.nii.gz"):
        shutil.copy(scans / "phantom001_ED.nii.gz", folder / name)
    assert predict_folder(folder, BUNDLE, tmp_path / "out", run=run, device="cpu") == 1
    assert caplog.text.count("named as labels of others") == 1


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
    config = json.loads((bundle / "configs" / "inference.json").read_text()) | {"network_def": STUDENT}
    (bundle / "configs" / "inference.json").write_text(json.dumps(config))
    (bundle / "models").mkdir()
    shutil.copy(run / "model.pt", bundle / "models" / "model.pt")
    overrides = {"image_size": "32", "num_classes": "3", "output_postfix": "mask#@x"}
    overrides |= {"largest_component": "True", "intensity_window": "(0, 500)"}  # as in Python
    assert (
        predict_folder(scans / "phantom001_ED.nii.gz", bundle, tmp_path / "out", overrides=overrides, device="cpu") == 1
    )
    assert [path.name for path in (tmp_path / "out").rglob("*.nii.gz")] == ["phantom001_ED_mask#@x.nii.gz"]


@pytest.mark.parametrize("is_shipped", [True, False])
def test_bundle_without_a_student_names_the_command_that_trains_one(scans, tmp_path, monkeypatch, is_shipped):
    bundle = tmp_path / "shipped" / "knowsam_acdc"
    shutil.copytree(BUNDLE / "configs", bundle / "configs")
    if is_shipped:
        monkeypatch.setattr("knowsam_monai.runs.prediction.SHIPPED", bundle.parent)
    with pytest.raises(FileNotFoundError) as error:
        predict_folder(scans, bundle, tmp_path / "out", device="cpu")
    name = "acdc" if is_shipped else str(bundle)
    assert f"model.pt does not exist; run `knowsam train {name}` first" in str(error.value)
    assert not (tmp_path / "out").exists()


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
            "`image_sizes` must be a key of .*inference.json but is not; its keys are imports",
        ),
        ({"overrides": {"num_classes": "4"}}, "model.pt holds another model .*; it has 3 classes, not 4"),
        ({"device": "cuda:99"}, "`device` must be a device of this machine, .* but is 'cuda:99'"),
        ({"device": "gpu"}, "`device` must be a device of this machine, .* but is 'gpu'"),
        ({"image_pattern": "*.mha"}, "`dataset_dir` must contain files that match '\\*.mha'"),
        ({"ckpt_path": "/nowhere.pt"}, "`ckpt_path` must be a file with .* weights but /nowhere.pt does not exist"),
        ({"ckpt_path": BUNDLE}, "`ckpt_path` must be a file with .* weights but .*knowsam_acdc is a folder"),
        ({"output": BUNDLE, "scans": BUNDLE}, "`output` must not be the folder of the images but"),
        ({"output": __file__}, "`output` must be a writable folder but .*; choose another, such as --output "),
        ({"overrides": {"image_size": "abc"}}, "`image_size` must be a whole number, .* but is 'abc'"),
        ({"overrides": {"num_classes": "x"}}, "`num_classes` must be a number of classes, .* but is 'x'"),
        ({"overrides": {"slices_per_batch": "0"}}, "`slices_per_batch` must be a whole number, 1 or more, .* but is 0"),
    ],
)
def test_mistake_is_one_sentence(scans, run, tmp_path, change, message):
    with pytest.raises(Exception) as error:
        own = {"scans": scans, "bundle": BUNDLE, "output": tmp_path / "out", "run": run, "device": "cpu"}
        predict_folder(**{**own, **change})
    assert not list(tmp_path.rglob("*.nii.gz")) and (not (tmp_path / "out").exists() or "num_classes" in str(change))
    cause = root_cause(error.value)
    assert isinstance(cause, (ValueError, OSError)) and isinstance(cause, KnowSAMError)
    assert re.search(message, str(cause)) and "\n" not in str(cause), str(cause)


def test_setting_that_no_scan_can_be_segmented_with_is_named_before_the_scans(scans, run, tmp_path):
    with pytest.raises(ValueError, match="; correct --set image_size=24, or repair or remove:") as error:
        predict_folder(scans, BUNDLE, tmp_path / "out", run=run, overrides={"image_size": "24"}, device="cpu")
    assert "but has [24, 24]; resize it (`image_size` of a bundle), or pad it" in str(error.value)


TRACE = "it_ran"
CODE = f"$__import__('os').mkdir('{TRACE}')"


@pytest.mark.parametrize("bundle", ["knowsam_acdc", "knowsam_la"])
@pytest.mark.parametrize(
    "key, value",
    [
        ("image_size", CODE),
        ("output_postfix", CODE),
        ("output_postfix", "@num_classes"),
        ("output_postfix", f"%{BUNDLE}/configs/metadata.json::version"),
        ("image_size", json.dumps([64, CODE])),
        ("run", json.dumps([CODE])),
        ("image_size", repr((64, CODE))),
        ("image_size", repr({1: {CODE}})),
        ("network_def", json.dumps({"_target_": "os.mkdir", "path": TRACE})),
        ("network_def", json.dumps({"nested": [{"_target_": "os.mkdir", "path": TRACE}]})),
        ("network_def#_target_", "os.mkdir"),
        ("postprocessing#transforms#4#output_dir", ".."),
        ("network_def::_target_", "os.mkdir"),
        ("output_dir", ".."),
        ("bundle_root", ".."),
        ("dataset_dir", ".."),
        ("device", "cpu"),
        ("ckpt_path", "model.pt"),
        ("image_pattern", "../*.nii.gz"),
        ("output_postfix", "../.."),
        ("output_postfix", "a/b"),
        ("output_postfix", ""),
    ],
)
def test_further_key_is_a_value_and_leads_nowhere_else(scans, tmp_path, monkeypatch, bundle, key, value):
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(Exception) as error:
        predict_folder(scans, BUNDLE.with_name(bundle), "out", overrides={key: value}, device="cpu")
    cause = root_cause(error.value)
    assert isinstance(cause, KnowSAMError) and str(cause).startswith(f"`{key}` must ") and "\n" not in str(cause)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and not list(tmp_path.rglob(TRACE))


@pytest.mark.parametrize("bundle", ["knowsam_acdc", "knowsam_la"])
@pytest.mark.parametrize("pattern", ["../*.nii.gz", "a/../../*.nii.gz", "/tmp/*.nii.gz", "..", "**/../*.nii.gz"])
def test_pattern_stays_below_the_scans(scans, tmp_path, bundle, pattern):
    with pytest.raises(Exception) as error:
        predict_folder(scans, BUNDLE.with_name(bundle), tmp_path / "out", image_pattern=pattern, device="cpu")
    assert str(root_cause(error.value)).startswith("`image_pattern` must be relative to the folder of the images but")


def test_names_are_no_expressions(scans, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("@num_classes") / "a..b#1"
    folder.mkdir(parents=True)
    for name in ("a...nii.gz", "%b.nii.gz", "@device.nii.gz", "$1.nii.gz", 'it\'s "c".nii.gz'):
        shutil.copy(scans / "phantom001_ED.nii.gz", folder / name)
    assert predict_folder("@num_classes", BUNDLE, "%out", run=run, image_pattern="a..b#1/*.nii.gz", device="cpu") == 5
    written = {path.name for path in (tmp_path / "%out" / "a..b#1").iterdir()}
    assert written == {f"{name}_seg.nii.gz" for name in ("a..", "%b", "@device", "$1", 'it\'s "c"')}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["%out", "@num_classes"]


def test_images_of_a_list_are_written_below_the_output_wherever_they_lie(scans, run, tmp_path):
    for place in ("data", "more/below"):
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(scans / "phantom001_ED.nii.gz", tmp_path / place / "a.nii.gz")
    label = str(scans / "phantom001_ES_gt.nii.gz")
    sections = {"labeled": [{"image": str(scans / "phantom001_ES.nii.gz"), "label": label}]}
    sections["validation"] = [{"image": str(scans / "phantom001_ED_gt.nii.gz"), "label": label}]
    sections["test"] = ["../data/a.nii.gz", "below/../below/a.nii.gz"]
    (tmp_path / "more" / "list.json").write_text(json.dumps(sections))
    before = set(tmp_path.rglob("*"))
    assert predict_folder(tmp_path / "more" / "list.json", BUNDLE, tmp_path / "out", run=run, device="cpu") == 2
    written = {str(path.relative_to(tmp_path)) for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert written == {"out/data/a_seg.nii.gz", "out/more/below/a_seg.nii.gz"}


def test_output_among_the_scans_is_not_segmented_the_next_time(scans, run, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    shutil.copy(scans / "phantom001_ED.nii.gz", folder / "a.nii.gz")
    (folder / "linked.nii.gz").symlink_to(scans / "phantom001_ED.nii.gz")
    options = {"run": run, "image_pattern": "**/*.nii.gz", "device": "cpu"}
    for _ in range(2):
        assert predict_folder(folder, BUNDLE, folder / "out", **options) == 2
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a_seg.nii.gz", "linked_seg.nii.gz"]
    shutil.rmtree(folder / "out")
    assert predict_folder(folder, BUNDLE, tmp_path, **options) == 2  # the folder above
    (tmp_path / "link").symlink_to(folder)
    for output in (folder, tmp_path / "link"):
        with pytest.raises(Exception) as error:
            predict_folder(folder, BUNDLE, output, **options)
        assert "`output` must not be the folder of the images" in str(root_cause(error.value))


@pytest.mark.parametrize(
    "of_the_run, message",
    [
        (
            {"network_def": {**STUDENT, "channels": "@channels"}},
            "`run` must be .*needs `channels`, which the bundle does not have",
        ),
        (
            {"network_def": {**STUDENT, "spatial_dims": 3}},
            "`run` must be .*is 3D and the bundle's is 2D; choose the",
        ),
        ({"image_size": "$1/0"}, "`image_size` in .*config.json cannot be \\(division by zero\\)"),
        ("{", "`run` must lead to a config with .* but .*config.json is not one \\(line 1: "),
        ("[]", "`run` must lead to a config with .* but .*config.json is not one \\(it has no keys"),
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
    with pytest.raises(ValueError, match="`bundle` must lead to a config with .* but .*inference.json is not one"):
        predict_folder(scans, tmp_path, tmp_path / "out")


def spoiled(path, **fields):
    """A scan whose header says something else."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    header = nibabel.Nifti1Header(bytes(content[:348]), check=False)
    for field, value in fields.items():
        header[field] = value
    path.write_bytes(gzip.compress(header.binaryblock + bytes(content[348:])))


def without_voxels(path):
    spoiled(path, dim=[3, 32, 0, 3, 1, 1, 1, 1])


def with_nan_in_the_affine(path):
    spoiled(path, srow_x=[1, 0, 0, np.nan])


def with_two_channels(path):
    nibabel.save(nibabel.Nifti1Image(np.ones((32, 32, 3, 2), np.float32), np.eye(4)), path)


def with_nan(path):
    nibabel.save(nibabel.Nifti1Image(np.full((32, 32, 3), np.nan, np.float32), np.eye(4)), path)


def cut(path):
    path.write_bytes(path.read_bytes()[:500])


def in_place_of(path, make):
    path.unlink()
    make(path)


def a_second_time(path):
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))


def with_labels(path):
    spoiled(path, intent_code=1002)


BROKEN = {
    "b": (cut, "must be a readable image"),
    "c": (with_two_channels, "must have 1 channel"),
    "d": (with_nan, "has 3072 NaN"),
    "e": (with_nan_in_the_affine, "must be finite and invertible"),
    "f": (without_voxels, "it is empty or damaged"),
    "g": (lambda path: in_place_of(path, lambda file: file.symlink_to("nowhere")), "No such file"),
    "h": (lambda path: in_place_of(path, Path.mkdir), "is not: "),
    "i": (lambda path: in_place_of(path, os.mkfifo), "it is a pipe"),
    "j": (lambda path: (path.parents[1] / "out" / "j_seg.nii.gz").mkdir(parents=True), "Is a directory"),
    "k": (a_second_time, "k.nii.gz would write the same output file; rename one"),
    "l": (with_labels, "is a label map by its header"),
}
NUM_BROKEN = len(BROKEN) + 1  # k is two images


@pytest.fixture
def mixed(scans, tmp_path):
    """Scans of which the first and the last can be segmented; the others break, from reading to writing."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("a", *BROKEN, "z"):
        shutil.copy(scans / "phantom001_ED.nii.gz", folder / f"{name}.nii.gz")
    for name, (spoil, _) in BROKEN.items():
        spoil(folder / f"{name}.nii.gz")
    return folder


@pytest.mark.parametrize("name", ["knowsam_acdc", "knowsam_la"])
def test_scans_that_cannot_be_segmented_are_listed_and_all_others_are_segmented(mixed, tmp_path, capsys, name):
    bundle, options = BUNDLE.with_name(name), {"device": "cpu"}
    if name == "knowsam_la":
        options["overrides"] = {"window_overlap": "0.25"}
    with pytest.raises(ValueError) as error:
        predict_folder(mixed, bundle, tmp_path / "out", **options)
    assert capsys.readouterr().err.endswith("\n")  # of the bar, before the error
    first, *lines = str(error.value).splitlines()
    assert first.startswith(f"`scans` must be images that can be segmented but {NUM_BROKEN} of 14 could")
    assert len(lines) == len(BROKEN)
    for (broken, (_, reason)), line in zip(BROKEN.items(), lines):
        assert str(mixed / f"{broken}.nii.gz") in line and reason in line
    written = [path.name for path in sorted((tmp_path / "out").rglob("*.nii.gz")) if path.is_file()]
    assert written == ["a_seg.nii.gz", "z_seg.nii.gz"]
    good = nibabel.load(tmp_path / "out" / "a_seg.nii.gz")
    assert predict_folder(mixed / "a.nii.gz", bundle, tmp_path / "alone", **options) == 1
    assert np.array_equal(good.dataobj, nibabel.load(tmp_path / "alone" / "a_seg.nii.gz").dataobj)


OF_THE_STUDENT = {
    "knowsam_acdc": {"image_size": 64},
    "knowsam_la": {
        **{"image_size": [32] * 3, "spacing": [2.0] * 3, "window_overlap": 0.25},
        **{"channels": [8, 16, 32, 64, 128], "aggregation_channels": [4, 4, 8]},
    },
}


@pytest.mark.parametrize("name", ["knowsam_acdc", "knowsam_la"])
def test_bundle_line_segments_all_others_too_and_exits_with_1(mixed, tmp_path, name):
    bundle = BUNDLE.with_name(name)
    options = {"bundle_root": bundle, "dataset_dir": mixed, "output_dir": tmp_path / "out", **OF_THE_STUDENT[name]}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    config = bundle / "configs" / "inference.json"
    code, log = run_module(tmp_path / "log.txt", "monai.bundle", "run", "--config_file", config, *words)
    *_, first = (line for line in log.splitlines() if line.startswith("ValueError: "))
    said = f"ValueError: `dataset_dir` must be images that can be segmented but {NUM_BROKEN} of 14 could not be; "
    assert first.startswith(said)
    assert code == 1 and len(log.partition(first)[2].strip().splitlines()) == len(BROKEN)
    written = [path.name for path in sorted((tmp_path / "out").rglob("*.nii.gz")) if path.is_file()]
    assert written == ["a_seg.nii.gz", "z_seg.nii.gz"]


def test_folder_of_broken_images_alone_is_listed(mixed, run, tmp_path):
    for name in "az":
        (mixed / f"{name}.nii.gz").unlink()
    with pytest.raises(ValueError, match=f"but {NUM_BROKEN} of {NUM_BROKEN} could not be; "):
        predict_folder(mixed, BUNDLE, tmp_path / "out", run=run, device="cpu")


def test_error_in_the_bundle_is_not_blamed_on_the_images(scans, run, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(BUNDLE / "configs", bundle / "configs")
    config = json.loads((bundle / "configs" / "inference.json").read_text())
    config["preprocessing"]["transforms"][3]["keys"] = "another"
    (bundle / "configs" / "inference.json").write_text(json.dumps(config))
    with pytest.raises(KeyError, match="another"):
        predict_folder(scans, bundle, tmp_path / "out", run=run, device="cpu")


def test_phantom_student_is_warned_about_if_the_scans_are_not_a_phantom(scans, run, tmp_path, caplog):
    student = tmp_path / "models"
    shutil.copytree(run, student)
    hashes = {name: hashlib.sha256((student / name).read_bytes()).hexdigest() for name in ("model.pt", "config.json")}
    record = {"run": "its_run", "trained_on": PHANTOM, "metrics": {}, "sha256": hashes}
    (student / "model.json").write_text(json.dumps(record))
    (tmp_path / "scans").mkdir()
    with pytest.raises(Exception) as error:
        predict_folder(tmp_path / "scans", BUNDLE, tmp_path / "out", run=student, device="cpu")
    assert "must contain files that match" in str(root_cause(error.value)) and not caplog.messages
    predict_folder(scans / "phantom001_ED.nii.gz", BUNDLE, tmp_path / "out", run=student, device="cpu")
    assert "its_run" not in caplog.text
    shutil.copy(scans / "phantom001_ED.nii.gz", tmp_path / "scans")
    predict_folder(tmp_path / "scans", BUNDLE, tmp_path / "out", run=student, device="cpu")
    assert "from the run its_run" in caplog.text and "--ckpt_path FILE" in caplog.text and "--run FOLDER" in caplog.text
