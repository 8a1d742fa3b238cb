from __future__ import annotations

import json

import pytest
import torch
from monai.data import Dataset
from monai.transforms import (
    Compose,
    ConcatItemsd,
    CopyItemsd,
    CropForegroundd,
    LabelToMaskd,
    Lambdad,
    OneOf,
    RandCropByLabelClassesd,
    RandFlipd,
    RandSpatialCropd,
    ScaleIntensityd,
    SpatialPadd,
    Zoomd,
)

from knowsam_monai.data import unlabeled_dataset, unlabeled_items
from knowsam_monai.data.unlabeled_stream import smooths_labels, without_label

BOTH = ["image", "label"]
ITEM = {"image": torch.rand(1, 12, 10)}


def labeled(*transforms):
    return Dataset([{**ITEM, "label": torch.zeros(1, 12, 10)}], Compose(transforms))


def names(compose):
    return [type(step).__name__ for step in compose.transforms]


def read_label(item):
    return {**item, "image": item["image"] * (item["label"] > 0)}


def test_transforms_that_need_a_label_are_left_out_and_named(caplog):
    caplog.set_level("INFO")
    dataset = labeled(
        ScaleIntensityd("image"),
        Compose([CropForegroundd(BOTH, source_key="label"), RandFlipd(BOTH)]),  # the first looks at the label
        LabelToMaskd("label", select_labels=1),
        OneOf([RandFlipd(BOTH), CropForegroundd(BOTH, source_key="label")]),
        read_label,  # shows only when it is tried
        Lambdad(BOTH, lambda x: x + 1),
    )
    transform = without_label(dataset, ITEM)
    assert names(transform) == ["ScaleIntensityd", "RandFlipd", "Lambdad"]
    assert caplog.messages[-1].endswith("need a label: CropForegroundd, LabelToMaskd, OneOf, function.")
    assert set(transform(ITEM)) == {"image"}


def test_choice_between_transforms_passes_over_the_missing_label():
    transform = without_label(labeled(OneOf([RandFlipd(BOTH, prob=1), RandFlipd(BOTH, prob=1)])), ITEM)
    assert names(transform) == ["OneOf"]
    assert torch.equal(transform(ITEM)["image"].as_tensor(), ITEM["image"].flip(1, 2))


@pytest.mark.parametrize("key", ["label", "label4crop"])
def test_crop_around_a_label_becomes_a_random_crop_of_its_size_padded_where_the_image_is_smaller(key, caplog):
    """In the Model Zoo's DiNTS bundles it is around a copy of the label, which they dilate, pad and forget."""
    caplog.set_level("INFO")
    copied, dilate = CopyItemsd("label", names="label4crop"), Lambdad("label4crop", lambda x: x, overwrite=True)
    pad = SpatialPadd([*BOTH, "label4crop"], spatial_size=[12, 12])
    crop = RandCropByLabelClassesd(BOTH, label_key=key, spatial_size=[8, 16], num_classes=2, allow_smaller=True)
    forget = Lambdad("label4crop", lambda x: 0)
    transform = without_label(labeled(copied, dilate, pad, crop, forget), ITEM)
    assert names(transform) == ["SpatialPadd", "RandSpatialCropd", "ResizeWithPadOrCropd"]
    assert transform(ITEM)["image"].shape == (1, 8, 16)
    assert "RandCropByLabelClassesd (a random crop of the same size" in caplog.messages[-1]


def test_labeled_dataset_stays_as_it_is():
    flip = RandFlipd(BOTH)
    dataset = labeled(flip, RandSpatialCropd(BOTH, [4, 4], random_size=False))
    unlabeled = unlabeled_dataset(dataset, [ITEM])
    assert unlabeled[0]["image"].shape == (1, 4, 4) and "label" not in unlabeled[0]
    assert not flip.allow_missing_keys and dataset.transform.transforms[0] is flip


def test_transform_that_fails_on_an_image_is_named():
    with pytest.raises(ValueError, match="Lambdad fails on the first image: no 3"):
        unlabeled_dataset(labeled(Lambdad("image", refuse)), [ITEM])
    with pytest.raises(ValueError, match="must be a dataset with its transforms"):
        unlabeled_dataset([ITEM], [ITEM])


def refuse(image):
    raise ArithmeticError("no 3")


def test_json_list_is_relative_to_its_folder(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(["a.nii", {"image": ["t1.nii", "/far/t2.nii"], "label": "seg.nii"}]))
    expected = [{"image": f"{tmp_path}/a.nii"}, {"image": [f"{tmp_path}/t1.nii", "/far/t2.nii"]}]
    assert unlabeled_items(str(path)) == expected


def test_pattern_gives_its_files_sorted_in_any_depth(tmp_path):
    for name in ("b.nii", "c/d/a.nii", "a.nii", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert unlabeled_items(f"{tmp_path}/*.nii") == [{"image": f"{tmp_path}/{name}"} for name in ("a.nii", "b.nii")]
    found = unlabeled_items(f"{tmp_path}/**/*.nii")
    assert found == [{"image": f"{tmp_path}/{name}"} for name in ("a.nii", "b.nii", "c/d/a.nii")]
    with pytest.raises(FileNotFoundError, match="`unlabeled` must name at least one image but there is none for"):
        unlabeled_items(f"{tmp_path}/*.nrrd")


@pytest.mark.parametrize(("cache_rate", "num_cached"), [(1.0, 4), (0.5, 2), (0.0, 0)])
def test_part_of_the_images_is_kept_in_memory(cache_rate, num_cached):
    seen = []
    dataset = labeled(Lambdad("image", lambda image: seen.append(None) or image))
    unlabeled = unlabeled_dataset(dataset, [ITEM] * 4, cache_rate=cache_rate)
    del seen[:]
    assert len([unlabeled[i] for i in range(4)]) == 4 and len(seen) == 4 - num_cached


def test_trying_the_transforms_leaves_the_random_state_as_it_was():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    without_label(labeled(Lambdad("image", lambda image: image + torch.rand(1))), ITEM)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("mode", [["bilinear", "nearest"], ["nearest", "bilinear"], [0, 1], [1, 0], "area"])
def test_interpolation_of_labels_that_invents_values_is_found(mode):
    expected = mode == "area" or mode[1] in ("bilinear", 1)
    assert smooths_labels(Zoomd(BOTH, 2, mode=mode)) == expected
    assert not smooths_labels(Zoomd("image", 2, mode="bilinear"))


def test_crop_of_same_size_is_the_same_size_each_time_and_lazy_transforms_stay_lazy():
    crop = RandCropByLabelClassesd(BOTH, label_key="label", spatial_size=[4, 4], num_classes=2)
    transform = without_label(Dataset([ITEM], Compose([crop], lazy=True)), ITEM)
    assert transform.lazy and {transform(ITEM)["image"].shape for _ in range(10)} == {(1, 4, 4)}


@pytest.mark.parametrize(
    "content, message",
    [("{", "but .* is not"), ('{"labeled": []}', "under its key 'unlabeled'"), ("[1]", "item 0 in .* has 1")],
)
def test_json_of_another_form_is_one_sentence(tmp_path, content, message):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        unlabeled_items(str(tmp_path / "list.json"))


def test_parts_of_an_image_may_have_keys_of_their_own(tmp_path):
    """As in the Model Zoo's renalStructures_CECT_segmentation, whose phases are three files."""
    parts = {"artery": torch.zeros(1, 12, 10), "vein": torch.ones(1, 12, 10)}
    dataset = Dataset([{**parts, "label": ITEM["image"]}], Compose([ConcatItemsd(list(parts), name="image")]))
    unlabeled = unlabeled_dataset(dataset, [{**parts, "label": ITEM["image"]}])
    assert torch.equal(unlabeled[0]["image"].mean((1, 2)), torch.tensor([0.0, 1.0]))
    (tmp_path / "list.json").write_text(json.dumps([{"artery": "a.nii", "vein": "b.nii"}]))
    assert unlabeled_items(f"{tmp_path}/list.json") == [{"artery": f"{tmp_path}/a.nii", "vein": f"{tmp_path}/b.nii"}]
    assert unlabeled_items([{"artery": "a.nii", "label": "seg.nii"}]) == [{"artery": "a.nii"}]
    with pytest.raises(ValueError, match=r"must have `image`, or keys .* but the first has \['img'\]"):
        unlabeled_dataset(dataset, [{"img": ITEM["image"]}])
