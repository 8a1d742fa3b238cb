"""The 3D bundle, where it differs from the 2D one: patches and slices, real data, geometry, and bad input."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.networks.nets import VNet
from monai.utils import set_determinism

from knowsam_monai.errors import root_cause
from knowsam_monai.teachers import SAMTeacher, SliceTeacher
from tests.bundles.conftest import BUNDLES, CONFIGS_3D

LA = os.environ.get("KNOWSAM_LA_DIR")


def resolved(*overlays, **override):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS_3D / name) for name in ("train.json", *overlays)])
    parser.update(override)
    return parser.get_parsed_content


def run_config(names, output_dir, workflow_type="infer", **options):
    workflow = ConfigWorkflow(
        config_file=[str(CONFIGS_3D / name) for name in names],
        meta_file=str(CONFIGS_3D / "metadata.json"),
        logging_file=False,
        workflow_type=workflow_type,
        bundle_root=str(CONFIGS_3D.parent),
        output_dir=str(output_dir),
        device="$torch.device('cpu')",
        **options,
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    set_determinism(seed=None)


# --- training ---------------------------------------------------------------------------------------------------------


def test_batch_has_patches_and_sam_gets_the_set_number_of_slices_of_each(training_3d, monkeypatch):
    asked, forward = [], SAMTeacher.forward

    def listen(self, image, prompt_logits):
        asked.append(tuple(image.shape))
        return forward(self, image, prompt_logits)

    monkeypatch.setattr(SAMTeacher, "forward", listen)
    run = training_3d(max_iterations=1, distillation_gate="none").run()
    assert isinstance(run["teacher"], SliceTeacher)
    output = run["train#trainer"].state.output
    assert output["image"].shape == (4, 1, 16, 16, 16) and output["label"].shape == (2, 1, 16, 16, 16)
    check, *steps = asked  # before training the teacher sees an empty slice
    assert check[0] == 1 and sum(shape[0] for shape in steps) == 4 * 2
    assert {shape[2:] for shape in asked} == {(16, 16)}


@pytest.mark.parametrize(
    "change", [{"sam_axes": [0, 1, 2]}, {"sam_slice_sampling": "entropy"}, {"sam_slices": "$None"}]
)
def test_ways_to_slice_train(training_3d, change):
    (step,) = training_3d(max_iterations=1, distillation_gate="none", **change).run().history
    assert step["sam_loss"] > 0 and step["distillation_loss"] > 0 and math.isfinite(step["loss"])


def test_plain_student_is_monai_s_vnet():
    network = resolved("network_plain.json", dataset_dir="/data/LA")("network_def")
    assert type(network) is VNet and sum(p.numel() for p in network.parameters()) > 40_000_000


@pytest.mark.parametrize(
    "method, published",
    [
        ("ua_mt", {"max_iterations": 6000, "ema_decay": 0.99, "consistency_weight": 0.1, "num_passes": 8}),
        ("mean_teacher", {"max_iterations": 6000, "ema_decay": 0.99, "consistency_weight": 0.1}),
        ("bcp", {"max_iterations": 17000, "pretraining_iterations": 2000, "labeled_batch_size": 4}),
    ],
)
def test_data_set_brings_the_published_numbers_of_a_host(method, published):
    get = resolved("network_plain.json", f"{method}.json", dataset_dir="/data/LA")
    assert {key: get(key) for key in published} == published


@pytest.mark.parametrize("split,overlap", [("evaluate.json", [0.839, 0.839, 0.9499]), ("inference.json", None)])
def test_windows_slide_by_the_published_strides(split, overlap):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS_3D / n) for n in (("train.json", split) if overlap else (split,))])
    parser.update({"dataset_dir": "/data/LA"})
    small = ConfigParser({**parser.config, "image_size": [32, 32, 32]})
    assert small.get_parsed_content("window_overlap") == 0.5
    overlap, size = parser.get_parsed_content("window_overlap"), parser.get_parsed_content("image_size")
    assert [int(s * (1 - o)) for s, o in zip(size, overlap)] == [18, 18, 4]


@pytest.mark.slow
@pytest.mark.skipif(not LA, reason="KNOWSAM_LA_DIR does not name a folder with left-atrium data")
def test_real_left_atria_train(training_3d):
    options = {"sam_checkpoint": "$None", "labeled_patients": 8, "image_size": [48, 48, 32], "window_overlap": 0.1}
    run = training_3d(whole=True, dataset_dir=LA, **options).run()
    assert run["train#trainer"].state.iteration == 2 and all(math.isfinite(s["loss"]) for s in run.history)
    assert len(run["train#dataset"]) == 8 and len(run["validate#dataset"]) == 4
    assert len(run["train#unlabeled_dataset"]) >= 16
    assert (run.output_dir / "model.pt").is_file()


@pytest.mark.slow
def test_whole_step_at_the_published_patch_costs_at_most_half_more_than_its_host():
    """Memory beside one pass of both views and HAM, operations beside the same step without SAM."""
    rows = ("la_views", "la_without_sam", "la_knowsam", "la_ua_mt", "la_ua_mt_sam")
    root = BUNDLES.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/memory.py", *rows]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split("|")[2:4] for line in done.stdout.splitlines()[2:]]
    cost = {row: dict(zip(("memory", "gflop"), map(float, line))) for row, line in zip(rows, lines, strict=True)}
    assert 10 < cost["la_views"]["memory"] <= cost["la_knowsam"]["memory"] <= 1.5 * cost["la_views"]["memory"]
    for host, with_sam in (("la_without_sam", "la_knowsam"), ("la_ua_mt", "la_ua_mt_sam")):
        assert cost[host]["gflop"] < cost[with_sam]["gflop"] <= 1.5 * cost[host]["gflop"]


# --- inference and evaluation -----------------------------------------------------------------------------------------


OBLIQUE = nibabel.eulerangles.euler2mat(0.3, -0.4, 0.5)
DIRECTIONS = {"straight": np.eye(3), "flipped": np.diag([1.0, -1.0, 1.0]), "oblique": OBLIQUE @ np.diag([-1, 1, -1])}


def write_scan(path, dtype=np.int16, direction="straight", brightness=100):
    """A bright box and a bright corner in a volume of 20 x 24 x 18 voxels of 1.5 x 1.5 x 2 mm."""
    sitk = pytest.importorskip("SimpleITK")
    array = np.zeros((20, 24, 18), dtype)
    array[5:14, 6:15, 4:12] = brightness
    array[17:, 20:, 15:] = brightness
    image = sitk.GetImageFromArray(array.T)
    image.SetSpacing((1.5, 1.5, 2.0))
    image.SetOrigin((7.0, -3.0, 11.0))
    image.SetDirection(DIRECTIONS[direction].ravel())
    sitk.WriteImage(image, str(path))
    return array


def threshold(folder):
    """A network that is a threshold at zero of the normalized image, and its weights."""
    state = {"weight": torch.tensor([0.0, 10.0]).reshape(2, 1, 1, 1, 1), "bias": torch.zeros(2)}
    torch.save(state, folder / "model.pt")
    return {
        "ckpt_path": str(folder / "model.pt"),
        "network_def": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1},
        "image_size": [16, 16, 16],
        "spacing": [0.0, 0.0, 0.0],
        "window_overlap": 0.25,
    }


@pytest.mark.parametrize(
    "name,direction,largest",
    [
        ("scan.nii.gz", "straight", True),
        ("scan.nii.gz", "flipped", False),
        ("scan.nii.gz", "oblique", False),
        ("lgemri.nrrd", "flipped", True),
        ("lgemri.nrrd", "oblique", False),
    ],
)
def test_prediction_is_nifti_in_the_geometry_of_the_input(tmp_path, name, direction, largest):
    sitk = pytest.importorskip("SimpleITK")
    (tmp_path / "in" / "case").mkdir(parents=True)
    source = tmp_path / "in" / "case" / name
    array = write_scan(source, direction=direction)
    options = {"image_pattern": f"*/{name}", "largest_component": largest, **threshold(tmp_path)}
    run_config(["inference.json"], tmp_path / "out", dataset_dir=str(tmp_path / "in"), **options)
    output = str(tmp_path / "out" / "case" / f"{name.split('.')[0]}_seg.nii.gz")
    pred = np.asarray(nibabel.load(output).dataobj)
    expected = array > 0
    if largest:
        expected[17:, 20:, 15:] = False
    assert nibabel.load(output).get_data_dtype() == np.uint8
    np.testing.assert_array_equal(pred, expected)
    ours, theirs = sitk.ReadImage(output), sitk.ReadImage(str(source))
    for get in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(ours, get)(), getattr(theirs, get)(), atol=1e-5, err_msg=get)
    lps = np.array(theirs.GetDirection()).reshape(3, 3) * theirs.GetSpacing()
    affine = np.diag([-1, -1, 1, 1]) @ np.block([[lps, np.array(theirs.GetOrigin())[:, None]], [0, 0, 0, 1]])
    np.testing.assert_allclose(nibabel.load(output).affine, affine, atol=1e-5)


@pytest.mark.parametrize("bundle", ["knowsam_acdc", "knowsam_la"])
def test_folder_of_nifti_and_nrrd_files_needs_no_pattern(tmp_path, bundle):
    for name in ("a.nii.gz", "b.nrrd", "c.nii", "readme.txt", "list.json"):
        (tmp_path / name).touch()
    parser = ConfigParser()
    parser.read_config(str(BUNDLES / bundle / "configs" / "inference.json"))
    parser["dataset_dir"] = str(tmp_path)
    found = [os.path.basename(item["image"]) for item in parser.get_parsed_content("datalist")]
    assert found == ["a.nii.gz", "b.nrrd", "c.nii"]


@pytest.mark.parametrize("config", ["inference.json", "train.json"])
def test_network_sees_a_scan_the_same_way_however_it_was_stored(tmp_path, config):
    affine = np.diag([-2.0, -2.0, 2.5, 1.0])
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((20, 24, 16), np.float32), affine)
    label = nibabel.Nifti1Image(np.ones((20, 24, 16), np.uint8), affine)
    parser = ConfigParser()
    parser.read_config(str(CONFIGS_3D / config))
    parser.update({"image_size": [16, 16, 16], "spacing": [2.0, 2.0, 2.0], "dataset_dir": str(tmp_path)})
    preprocessing = parser.get_parsed_content(
        "preprocessing" if config == "inference.json" else "validate#preprocessing"
    )
    seen = []
    for number, axes in enumerate(("LPS", "RAS", "SPL")):
        turn = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(axes)
        )
        nibabel.save(image.as_reoriented(turn), tmp_path / f"{number}.nii")
        item = {"image": str(tmp_path / f"{number}.nii")}
        if config == "train.json":
            nibabel.save(label.as_reoriented(turn), tmp_path / f"{number}_gt.nii")
            item["label"] = str(tmp_path / f"{number}_gt.nii")
        seen.append(preprocessing(item))
    for other in seen[1:]:
        torch.testing.assert_close(other["image"].as_tensor(), seen[0]["image"].as_tensor(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("empty", [False, True])
def test_evaluation_is_on_the_native_grid_and_an_empty_prediction_is_counted(tmp_path, empty, caplog):
    array = write_scan(tmp_path / "a.nii.gz")
    label = nibabel.Nifti1Image((array > 0).astype(np.uint8) * 255, nibabel.load(tmp_path / "a.nii.gz").affine)
    nibabel.save(label, tmp_path / "a_gt.nii.gz")
    write_scan(tmp_path / "b.nii.gz")
    nibabel.save(label, tmp_path / "b_gt.nii.gz")
    case = {name: {"image": f"{name}.nii.gz", "label": f"{name}_gt.nii.gz"} for name in "ab"}
    sections = {"labeled": [case["a"]], "unlabeled": [], "validation": [case["b"]]}
    (tmp_path / "list.json").write_text(json.dumps(sections))
    options = threshold(tmp_path)
    if empty:
        torch.save({"weight": torch.zeros(2, 1, 1, 1, 1), "bias": torch.tensor([1.0, 0.0])}, options["ckpt_path"])
    options["dataset_dir"] = str(tmp_path / "list.json")
    run_config(["train.json", "evaluate.json"], tmp_path / "out", workflow_type="train", **options)
    raw = (tmp_path / "out" / "metrics_raw.csv").read_text().splitlines()
    row = dict(zip(raw[0].split(","), raw[1].split(",")))
    assert caplog.text.count("values 0 and 255, which are read as 0 and 1") == 1
    assert row["class"] == "left atrium" and float(row["dice"]) == (0 if empty else 1)
    assert row["spacing_mm"] == "1.5x1.5x2"
    assert (row["hd95_mm"], int(row["num_undefined"])) == (("nan", 4) if empty else ("0.000000", 0))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """A good data list of volumes that are no cubes of voxels, to be spoilt."""
    folder = tmp_path / "data"
    folder.mkdir()
    sections = {}
    for number, name in enumerate(("labeled", "unlabeled", "validation")):
        array = write_scan(folder / f"{name}.nii.gz", brightness=100 + number)
        sections[name] = [{"image": f"{name}.nii.gz"}]
        if name != "unlabeled":
            image = nibabel.load(folder / f"{name}.nii.gz")
            nibabel.save(nibabel.Nifti1Image((array > 0).astype(np.uint8), image.affine), folder / f"{name}_gt.nii.gz")
            sections[name][0]["label"] = f"{name}_gt.nii.gz"
    (folder / "list.json").write_text(json.dumps(sections))
    return folder


ONE = {"max_iterations": 1, "use_sam": False, "labeled_batch_size": 1, "unlabeled_batch_size": 1}


def test_volume_smaller_than_the_patch_and_without_cubes_is_padded_and_trains(training_3d, data, caplog):
    run = training_3d(dataset_dir=str(data / "list.json"), spacing=[0.0, 0.0, 0.0], **ONE).run()
    assert run["train#trainer"].state.output["image"].shape == (2, 1, 16, 16, 16)
    assert "smaller" not in caplog.text
    run = training_3d(dataset_dir=str(data / "list.json"), **ONE).run()
    assert run["train#trainer"].state.output["image"].shape == (2, 1, 16, 16, 16)
    assert re.search(
        r"labeled.nii.gz has .* voxels, fewer than a patch, \(16, 16, 16\), and is padded with 0", caplog.text
    )


@pytest.mark.parametrize(
    "spoil,change,message",
    [
        ("label", {}, "`label` must be a path but item 0 of `labeled` in .* has none"),
        (None, {"image_size": [24, 16, 16]}, r"`image_size`.* multiples of 16"),
        (None, {"spacing": [4.0] * 3, "class_names": []}, "return logits|`class_names`|`num_classes`|output channels"),
    ],
    ids=["labeled case without a label", "patch", "no class"],
)
def test_bad_input_is_one_clear_error_before_a_step(training_3d, data, spoil, change, message):
    if spoil:
        sections = json.loads((data / "list.json").read_text())
        del sections["labeled"][0][spoil]
        (data / "list.json").write_text(json.dumps(sections))
    run = training_3d(dataset_dir=str(data / "list.json"), **ONE, **change)
    with pytest.raises(RuntimeError) as error:
        run.run()
    assert re.search(message, str(root_cause(error.value))), str(root_cause(error.value))
    assert run.history == []


def test_more_slices_than_the_patch_has_is_an_error(training_3d):
    with pytest.raises(RuntimeError) as error:
        training_3d(sam_slices=17).run()
    assert "`slices` must be at most 16" in str(root_cause(error.value))


def test_folder_of_unknown_form_is_an_error_that_lists_the_known_ones(training_3d, tmp_path):
    (tmp_path / "LA").mkdir()
    with pytest.raises(RuntimeError) as error:
        training_3d(dataset_dir=str(tmp_path / "LA")).run()
    assert "with <case>/lgemri.nrrd" in str(root_cause(error.value))
