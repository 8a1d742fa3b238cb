"""The shipped preprocessing and augmentation of the ACDC bundle, on the phantom."""

from __future__ import annotations

from pathlib import Path

import nibabel
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, decollate_batch
from monai.inferers import SliceInferer
from monai.transforms import Compose, Invertd

from knowsam_monai.data import SemiSupervisedLoader, cached_dataset, phantom_datalist, write_phantom

SIZE = 64
PHANTOM = {"num_labeled": 1, "num_unlabeled": 1, "num_validation": 1, "num_test": 0, "max_size": 48}
TRAIN = Path(__file__).parents[2] / "bundles" / "knowsam_acdc" / "configs" / "train.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    items = phantom_datalist(write_phantom(tmp_path_factory.mktemp("data") / "phantom", **PHANTOM))
    return {
        "labeled": cached_dataset(items["labeled"], build("train#preprocessing"), progress=False),
        "unlabeled": cached_dataset(items["unlabeled"], build("train#preprocessing"), progress=False),
        "validation": items["validation"],
    }


def build(name: str) -> Compose:
    parser = ConfigParser(ConfigParser.load_config_file(TRAIN))
    parser.update({"image_size": SIZE, "sam_encoder": "adapted"})
    return parser.get_parsed_content(name)


def augmented(dataset, name: str):
    return cached_dataset([dict(item) for item in dataset], [], build(f"train#{name}_augmentation"), progress=False)


def test_slices_have_the_network_size_and_the_values_of_their_volume(data):
    for item in data["labeled"]:
        assert item["image"].shape == item["label"].shape == (1, SIZE, SIZE)
        assert item["image"].dtype == torch.float32
        assert 0 <= item["image"].min() and item["image"].max() <= 1
        assert set(item["label"].unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert max(item["image"].max() for item in data["labeled"]) > 0.9
    assert not any("label" in item for item in data["unlabeled"])


@pytest.mark.parametrize("name", ["train", "validate"])
def test_slices_are_the_same_whatever_the_axes_of_the_file(data, tmp_path, name):
    item, turned = data["validation"][0], {}
    for key in ("image", "label"):
        volume = nibabel.load(item[key])
        codes = nibabel.orientations.axcodes2ornt("ASR")
        turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(volume.affine), codes)
        turned[key] = str(tmp_path / f"{key}.nii.gz")
        nibabel.save(volume.as_reoriented(turn), turned[key])
    expected, found = (
        cached_dataset([case], build(f"{name}#preprocessing"), progress=False) for case in (item, turned)
    )
    images = [torch.stack([entry["image"].as_tensor() for entry in dataset]) for dataset in (expected, found)]
    order = 0 if name == "train" else -1  # of the slices, which is the file's
    torch.testing.assert_close(images[0], images[1].flip(order), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["weak", "strong"])
def test_augmentation_is_deterministic_with_workers_and_keeps_labels_whole_numbers(data, name):
    def batches(num_workers: int) -> list[dict]:
        return list(
            SemiSupervisedLoader(
                augmented(data["labeled"], name), augmented(data["unlabeled"], name), 4, 4, num_workers=num_workers
            )
        )

    straight = batches(0)
    for one, other in zip(straight, batches(2), strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["label"], other["label"])
        assert one["image"].shape == (8, 1, SIZE, SIZE) and one["label"].shape == (4, 1, SIZE, SIZE)
        assert one["image"].isfinite().all()
        assert set(one["label"].unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


@pytest.mark.parametrize("name", ["weak", "strong"])
def test_augmentation_changes_images_and_leaves_the_cache(data, name):
    before = [item["image"].clone() for item in data["labeled"]]
    changed = [not torch.equal(new["image"], old) for new, old in zip(augmented(data["labeled"], name), before)]
    assert sum(changed) > len(changed) / 2
    assert all(torch.equal(item["image"], old) for item, old in zip(data["labeled"], before))


def test_holes_hit_image_and_label_alike(data):
    item = next(item for item in data["labeled"] if (item["label"] > 0).float().mean() > 0.1)
    image = item["image"].clamp_min(0.01)
    drop_holes = build("train#weak_augmentation").transforms[-1]
    drop_holes.prob = 1.0
    holes = drop_holes({"image": image.clone(), "label": torch.ones_like(item["label"])})
    assert torch.equal(holes["image"] == 0, holes["label"] == 0)
    assert 5 * 9 / 4 < (holes["label"] == 0).sum() <= 8 * 9


def test_image_and_label_move_together(data):
    """An image that is its own label stays so, to what smooth interpolation changes at the border."""
    geometry = Compose([t for t in build("train#weak_augmentation").transforms if "Intensity" not in type(t).__name__])
    mask = (data["labeled"][4]["label"] > 0).float()
    for _ in range(8):
        moved = geometry({"image": mask.clone(), "label": mask.clone()})
        same = (moved["image"] > 0.5) == (moved["label"] > 0.5)
        assert same.float().mean() > 0.98


def test_validation_volume_goes_back_to_its_own_grid(data):
    """What a network would see, sent back as probabilities, is the truth again to the resolution of the grid."""
    preprocessing = build("validate#preprocessing")
    volumes = cached_dataset(data["validation"], preprocessing, progress=False)
    batch = next(iter(DataLoader(volumes, batch_size=1)))
    assert batch["image"].shape[2:4] == (SIZE, SIZE)
    shape = batch["label"].shape
    truth = torch.nn.functional.one_hot(batch["label"].as_tensor()[:, 0].long(), 4).movedim(-1, 1).float()
    seen = torch.nn.functional.interpolate(truth, batch["image"].shape[2:], mode="trilinear")
    inferer = SliceInferer(roi_size=(SIZE, SIZE), spatial_dim=2, sw_batch_size=4)
    output = inferer(torch.cat([batch["image"].as_tensor(), seen], 1), lambda slices: slices[:, 1:])
    batch["pred"] = type(batch["image"])(output, meta=batch["image"].meta)
    case = decollate_batch(batch)[0]
    back = Invertd("pred", transform=preprocessing, orig_keys="image", nearest_interp=False)(case)["pred"]
    found = back.argmax(0, keepdim=True)
    assert found.shape == shape[1:]
    for value in (1, 2, 3):
        one, other = found == value, case["label"] == value
        assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.95
