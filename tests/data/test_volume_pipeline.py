"""Loading, checking and random 3D patches of volumes, written as MONAI config, on the phantom and on official files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd

from knowsam_monai.data import SemiSupervisedLoader, cached_dataset, phantom_datalist, write_phantom

PHANTOM = {"num_labeled": 2, "num_unlabeled": 3, "num_validation": 1, "num_test": 0, "max_size": 32}
PATCH = (16, 16, 16)
BOTH = {"keys": ["image", "label"], "allow_missing_keys": True}
CONFIG = {
    "volumes": [
        {"_target_": "knowsam_monai.data.LoadCased", **BOTH, "slice_axis": -1, "ensure_channel_first": True},
        {"_target_": "knowsam_monai.data.CheckDatad", "num_classes": 2},
        {"_target_": "knowsam_monai.data.ResampleVolumed", "pixdim": [3.0, 3.0, 3.0]},
        {"_target_": "knowsam_monai.data.CropCenterd", "size": 80},
        {"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True},
        {"_target_": "knowsam_monai.data.PadVolumed", "spatial_size": PATCH},
    ],
    "patches": [{"_target_": "RandSpatialCropd", **BOTH, "roi_size": PATCH, "random_size": False}],
}


def build(name: str) -> Compose:
    return Compose(ConfigParser(CONFIG).get_parsed_content(name))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("data") / "phantom"
    items = phantom_datalist(write_phantom(folder, anatomy="left_atrium", **PHANTOM))
    patches = {
        name: cached_dataset(items[name], build("volumes"), build("patches"), progress=False)
        for name in ("labeled", "unlabeled")
    }
    return {**patches, "volumes": cached_dataset(items["labeled"], build("volumes"), progress=False)}


def batches(data: dict, num_workers: int = 0, first: int = 0, seed: int = 0) -> list[dict]:
    loader = SemiSupervisedLoader(data["labeled"], data["unlabeled"], 2, 2, seed=seed, num_workers=num_workers)
    loader.set_iteration(first)
    return [*loader, *loader]


def test_patches_of_volumes_make_a_batch_with_labels_of_the_labeled_rows_alone(data):
    for batch in batches(data):
        assert batch["image"].shape == (4, 1, *PATCH) and batch["label"].shape == (2, 1, *PATCH)
        assert set(batch["label"].unique().tolist()) <= {0.0, 1.0}


def test_patches_depend_on_the_seed_and_the_iteration_alone(data):
    straight = batches(data)
    for one, other in zip(straight, batches(data, num_workers=2), strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["label"], other["label"])
    resumed = batches(data, first=2)
    assert torch.equal(straight[2]["image"], resumed[0]["image"])
    assert not torch.equal(straight[0]["image"], batches(data, seed=1)[0]["image"])


def test_each_epoch_cuts_another_patch_of_the_same_volume(data):
    patches: dict[str, list[torch.Tensor]] = {}
    for batch in batches(data):
        for patient, patch in zip(batch["patient"], batch["image"]):
            patches.setdefault(patient, []).append(patch)
    assert all(len(cut) > 1 for cut in patches.values())
    for first, *others in patches.values():
        assert not any(torch.equal(first, other) for other in others)


def test_image_and_label_of_a_patch_are_cut_at_the_same_place(data):
    """An image that is its own label stays so."""
    items = [{**item, "image": item["label"].clone()} for item in data["volumes"]]
    masks = {"labeled": cached_dataset(items, [], build("patches"), progress=False), "unlabeled": data["unlabeled"]}
    for batch in batches(masks):
        assert torch.equal(batch["image"][:2], batch["label"])
        assert 0 < batch["label"].sum()


def write_official(folder: Path) -> dict:
    """A volume as the challenge has it: much air around, label 0 and 255, one axis flipped, no cubes."""
    sitk = pytest.importorskip("SimpleITK")
    image, label = np.full((60, 50, 10), 5, np.uint8), np.zeros((60, 50, 10), np.uint8)
    image[20:50, 15:40] = 100
    label[30:42, 22:30, 3:7] = 255
    image[label > 0] = 200
    for name, array in (("lgemri", image), ("laendo", label)):
        volume = sitk.GetImageFromArray(array.T)
        volume.SetSpacing((2.0, 2.0, 4.0))
        volume.SetOrigin((7.0, -3.0, 11.0))
        volume.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
        sitk.WriteImage(volume, str(folder / f"{name}.nrrd"))
    return {"image": str(folder / "lgemri.nrrd"), "label": str(folder / "laendo.nrrd")}


def test_official_volume_is_cropped_without_its_label_and_the_truth_goes_back_to_its_place(tmp_path, caplog):
    preprocessing = build("volumes")
    item = write_official(tmp_path)
    case = preprocessing(item)
    assert "laendo.nrrd has the values 0 and 255" in caplog.text
    assert "lgemri.nrrd has (27, 27, 13) voxels, fewer than a patch, (16, 16, 16)" in caplog.text
    assert case["image"].shape == case["label"].shape == (1, 27, 27, 16)
    assert torch.equal(preprocessing({"image": item["image"]})["image"].as_tensor(), case["image"].as_tensor())
    probability = MetaTensor(case["label"].as_tensor(), meta=case["image"].meta)
    back = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False)({**case, "pred": probability})[
        "pred"
    ]
    original = build("volumes").transforms[0](item)
    assert back.shape == original["label"].shape == (1, 60, 50, 10)
    torch.testing.assert_close(back.affine, original["image"].affine)
    truth, found = original["label"] > 0, back > 0.5
    assert 2 * (truth & found).sum() / (truth.sum() + found.sum()) > 0.9
