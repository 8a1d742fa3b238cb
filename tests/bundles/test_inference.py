"""configs/inference.json: what goes in as NIfTI comes out as NIfTI of the same geometry, without SAM."""

import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, verify_net_in_out

from knowsam_monai.networks import MultiViewNet

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "knowsam_acdc"
BUNDLES = [pytest.param(BUNDLE.with_name(name), id=name) for name in ("knowsam_acdc", "knowsam_la")]
CONFIG = str(BUNDLE / "configs" / "inference.json")
ONE_CLASS = {"in_channels": 1, "out_channels": 2, "kernel_size": 1}

OBLIQUE = nibabel.eulerangles.euler2mat(0.3, -0.4, 0.5) @ np.diag([1.37, 1.37, 9.5])


def affine(matrix, origin=(-31.5, 12.25, 40.0)):
    return np.block([[np.asarray(matrix), np.array(origin)[:, None]], [np.zeros((1, 3)), np.ones((1, 1))]])


# name: (shape, qform, qform code, sform, sform code)
GEOMETRIES = {
    "ras": ((20, 16, 3), affine(np.diag([1.5, 1.5, 8])), 1, affine(np.diag([1.5, 1.5, 8])), 1),
    "lps": ((20, 16, 3), affine(np.diag([-1.5, -1.5, 8])), 1, affine(np.diag([-1.5, -1.5, 8])), 1),
    "left_handed": ((20, 16, 3), affine(np.diag([-1.5, 1.5, 8])), 1, affine(np.diag([-1.5, 1.5, 8])), 2),
    "axes_permuted": ((20, 16, 3), None, 0, affine(np.diag([1.5, 1.2, 8])[:, [2, 0, 1]]), 2),
    "oblique": ((20, 16, 3), affine(OBLIQUE), 1, affine(OBLIQUE), 1),
    "oblique_flipped": ((20, 16, 3), affine(OBLIQUE @ np.diag([1, -1, -1])), 1, None, 0),
    "only_sform": ((20, 16, 3), None, 0, affine(OBLIQUE), 4),
    "two_different_forms": ((20, 16, 3), affine(np.diag([1.5, 1.5, 8])), 1, affine(OBLIQUE), 2),
    "no_form": ((20, 16, 3), None, 0, None, 0),
    "one_slice": ((20, 16, 1), affine(OBLIQUE), 1, affine(OBLIQUE), 1),
    "trailing_axis": ((20, 16, 3, 1), affine(OBLIQUE), 1, affine(OBLIQUE), 1),
    "four_digit_size": ((1024, 16, 2), affine(np.diag([0.3, 0.3, 8])), 1, affine(np.diag([0.3, 0.3, 8])), 1),
}


def write_image(path, shape, qform, qform_code, sform, sform_code, dtype=np.int16):
    rng = np.random.default_rng(0)
    image = nibabel.Nifti1Image((rng.random(shape) > 0.5).astype(dtype) * 700, None)
    image.header.set_xyzt_units("mm")
    image.header.set_zooms((1.5, 1.5, 8.0, 1.0)[: len(shape)])
    image.header.set_qform(qform, qform_code) if qform is not None else None
    image.header.set_sform(sform, sform_code) if sform is not None else None
    image.header["descrip"] = b"Doe^John"
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header), path)


def workflow_of(dataset_dir, tmp_path, bundle=BUNDLE, **override):
    workflow = ConfigWorkflow(
        **files_of(bundle),
        logging_file=False,
        workflow_type="infer",
        bundle_root=str(bundle),
        dataset_dir=str(dataset_dir) if dataset_dir else dataset_dir,
        output_dir=str(tmp_path / "out"),
        device="$torch.device('cpu')",
        **override,
    )
    workflow.initialize()
    return workflow


def infer(dataset_dir, tmp_path, **override):
    workflow = workflow_of(dataset_dir, tmp_path, **override)
    workflow.run()
    workflow.finalize()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "model.pt"
    torch.save(MultiViewNet(spatial_dims=2, in_channels=1, out_channels=4).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def thresholded(tmp_path_factory):
    """All geometries segmented by a network that is exactly a threshold at half of the intensity range."""
    tmp_path = tmp_path_factory.mktemp("thresholded")
    (tmp_path / "in").mkdir()
    for name, geometry in GEOMETRIES.items():
        write_image(tmp_path / "in" / f"{name}.nii.gz", *geometry)
    network = torch.nn.Conv2d(1, 2, 1)
    state = {"weight": torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1), "bias": torch.tensor([0.5, 0.0])}
    network.load_state_dict(state)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    network_def = {"_target_": "torch.nn.Conv2d", **ONE_CLASS}
    options = {"ckpt_path": str(tmp_path / "model.pt"), "num_classes": 2, "image_size": 160}
    infer(tmp_path / "in", tmp_path, network_def=network_def, **options)
    return tmp_path


@pytest.mark.parametrize("name", GEOMETRIES)
def test_nibabel_and_simpleitk_agree_with_the_input_on_the_geometry(thresholded, name):
    sitk = pytest.importorskip("SimpleITK")
    source, output = str(thresholded / "in" / f"{name}.nii.gz"), str(thresholded / "out" / f"{name}_seg.nii.gz")
    ours, theirs = nibabel.load(output), nibabel.load(source)
    assert ours.shape == theirs.shape and ours.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(ours.affine, theirs.affine)
    assert ours.header.get_zooms() == theirs.header.get_zooms()
    assert ours.header.get_xyzt_units() == theirs.header.get_xyzt_units()
    ours, theirs = sitk.ReadImage(output), sitk.ReadImage(source)
    assert ours.GetSize() == theirs.GetSize()
    assert ours.GetOrigin() == theirs.GetOrigin()
    assert ours.GetSpacing() == theirs.GetSpacing()
    assert ours.GetDirection() == theirs.GetDirection()


@pytest.mark.parametrize("name", [n for n in GEOMETRIES if n != "four_digit_size"])
def test_every_voxel_of_the_prediction_lies_where_it_was_seen(thresholded, name):
    image = np.asarray(nibabel.load(thresholded / "in" / f"{name}.nii.gz").dataobj)
    pred = np.asarray(nibabel.load(thresholded / "out" / f"{name}_seg.nii.gz").dataobj)
    # 160 is a multiple of both sides: a voxel becomes a block, whose middle is what it was
    np.testing.assert_array_equal(pred, image > 350)


def test_only_the_geometry_of_the_header_is_copied(thresholded):
    header = nibabel.load(thresholded / "out" / "ras_seg.nii.gz").header
    assert not header["descrip"].tobytes().strip(b"\x00") and not header.extensions


def test_output_files_are_flat_and_named_after_their_input(thresholded):
    assert sorted(p.name for p in (thresholded / "out").iterdir()) == sorted(f"{n}_seg.nii.gz" for n in GEOMETRIES)


def test_folders_below_the_dataset_are_kept_apart(tmp_path, model):
    for patient in ("p1", "p2"):
        (tmp_path / "in" / patient).mkdir(parents=True)
        write_image(tmp_path / "in" / patient / "image.nii", *GEOMETRIES["ras"])
    infer(tmp_path / "in", tmp_path, ckpt_path=model, image_size=16, image_pattern="*/image.nii")
    written = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.nii.gz"))
    assert written == ["p1/image_seg.nii.gz", "p2/image_seg.nii.gz"]


def test_without_a_data_set_the_phantom_is_segmented_with_a_warning(tmp_path, model, monkeypatch, caplog):
    def small(folder):
        from knowsam_monai.data.phantom import write_phantom

        counts = {"num_labeled": 1, "num_unlabeled": 0, "num_validation": 1, "num_test": 1}
        return write_phantom(tmp_path / "phantom", max_size=32, **counts)

    monkeypatch.setattr("knowsam_monai.data.evaluation.write_phantom", small)
    with caplog.at_level("WARNING", logger="knowsam_monai"):
        infer(None, tmp_path, ckpt_path=model)
    assert "SYNTHETIC PHANTOM" in caplog.text
    outputs = list((tmp_path / "out").iterdir())
    assert len(outputs) == 2 and all(set(np.unique(nibabel.load(p).dataobj)) <= {0, 1, 2, 3} for p in outputs)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_data_that_a_program_sets_are_segmented_without_a_word_of_the_phantom_as_data(
    tmp_path, bundle, monkeypatch, caplog
):
    monkeypatch.setattr("knowsam_monai.data.evaluation.write_phantom", None)  # must not be called
    write_image(tmp_path / "scan.nii.gz", *GEOMETRIES["oblique"])
    workflow = workflow_of(None, tmp_path, bundle)
    workflow.dataset_data = [{"image": str(tmp_path / "scan.nii.gz")}]
    workflow.initialize()
    workflow.run()
    assert (tmp_path / "out" / "scan_seg.nii.gz").exists() and "SYNTHETIC PHANTOM" not in caplog.text
    assert "was trained on the synthetic phantom, so its segmentations of patients are useless" in caplog.text


def files_of(bundle):
    names = {"config_file": "inference.json", "meta_file": "metadata.json"}
    return {argument: str(bundle / "configs" / name) for argument, name in names.items()}


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("n", [1, 2])
def test_verify_net_in_out_passes(bundle, n):
    verify_net_in_out("network_def", device="cpu", n=n, **files_of(bundle))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"dataset_dir": "/nowhere"}, "`dataset_dir` must be a folder of images or an image file but /nowhere"),
        ({"image_pattern": "*.mha"}, "must contain files that match '\\*.mha'"),
        ({"ckpt_path": "/nowhere/model.pt"}, "must be a student but /nowhere/model.pt cannot be read"),
        ({"num_classes": 3}, "has 4 classes, not 3: set the class count"),
        ({"network_def#_target_": "monai.networks.nets.BasicUNet"}, "must hold the weights of BasicUNet"),
        ({"image_size": 40}, "multiples of 16"),
    ],
)
def test_wrong_input_is_one_clear_error(tmp_path, model, change, message):
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "ras.nii.gz", *GEOMETRIES["ras"])
    options = {"ckpt_path": model, "image_size": 16, **change}
    with pytest.raises(RuntimeError) as error:
        infer(options.pop("dataset_dir", tmp_path / "in"), tmp_path, **options)
    assert has_cause(error.value, message)


def test_a_truncated_image_is_named(tmp_path, model):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "broken.nii.gz"
    write_image(path, *GEOMETRIES["ras"])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RuntimeError) as error:
        infer(tmp_path / "in", tmp_path, ckpt_path=model, image_size=16)
    assert has_cause(error.value, "must be a readable image but .*broken.nii.gz is not")


def has_cause(error, message):
    """Whether the bundle runner's error, or one that it wraps, says so."""
    while error is not None and not re.search(message, str(error)):
        error = error.__cause__ or error.__context__
    return error is not None
