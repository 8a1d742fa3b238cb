from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation
from PIL import Image

from knowsam_monai.data import CheckDatad, LoadCased, ScaleVolumed, SplitSlicesd, compare_streams
from knowsam_monai.data.transforms import AXES, known_spacing


def volume(*shape: int, name: str = "case.nii.gz", affine=None) -> MetaTensor:
    affine = torch.diag(torch.tensor([1.5, 1.4, 8.0, 1.0], dtype=torch.float64)) if affine is None else affine
    array = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    return MetaTensor(array, affine=affine, meta={"filename_or_obj": name})


def label(*shape: int, values=(0.0, 1.0, 2.0, 3.0)) -> MetaTensor:
    array = torch.tensor(values).repeat(torch.Size(shape).numel())[: torch.Size(shape).numel()].reshape(shape)
    return MetaTensor(array, affine=volume(1, 1).affine, meta={"filename_or_obj": "case_gt.nii.gz"})


def test_good_case_passes_unchanged():
    case = {"image": volume(2, 4, 5, 3), "label": label(1, 4, 5, 3), "patient": "a"}
    assert CheckDatad(num_classes=4)(case) is case
    assert CheckDatad(num_classes=4)({"image": volume(1, 4, 5)}).keys() == {"image"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_value_that_is_not_finite_is_an_error_naming_the_file(value):
    image = volume(1, 4, 5, 3)
    image[0, 1, 1, :2] = value
    with pytest.raises(ValueError, match="`image` must be finite but case.nii.gz has 2 NaN or infinite values"):
        CheckDatad()({"image": image})


def test_image_of_other_channels_than_the_network_takes_is_an_error_naming_the_file():
    case = {"image": volume(2, 4, 5)}
    assert CheckDatad(num_channels=2)(case) is case
    with pytest.raises(ValueError, match="`image` must have 1 channel but case.nii.gz has 2; set `in_channels`"):
        CheckDatad(num_channels=1)(case)


@pytest.mark.parametrize("shape", [(1, 4, 4, 3), (1, 4, 5), (2, 4, 5, 3)])
def test_label_of_another_shape_is_an_error_naming_both_files(shape):
    message = r"`label` must be one channel of the image's shape \(4, 5, 3\) but case_gt.nii.gz has .* case.nii.gz"
    with pytest.raises(ValueError, match=message):
        CheckDatad()({"image": volume(1, 4, 5, 3), "label": label(*shape)})


@pytest.mark.parametrize("value, shown", [(4.0, "4"), (-1.0, "-1"), (1.5, "1.5"), (float("nan"), "nan"), (255, "255")])
def test_label_value_outside_the_classes_is_an_error_naming_the_file(value, shown):
    case = {"image": volume(1, 4, 5), "label": label(1, 4, 5, values=(0.0, value))}
    with pytest.raises(ValueError, match=rf"integers 0 to 3 as values but case_gt.nii.gz has {shown};"):
        CheckDatad(num_classes=4)(case)


def test_fewer_classes_than_the_label_has_is_an_error():
    case = {"image": volume(1, 4, 5), "label": label(1, 4, 5)}
    with pytest.raises(ValueError, match="has 2, 3; name all classes"):
        CheckDatad(num_classes=2)(case)
    with pytest.raises(ValueError, match="`num_classes` must be at least 2"):
        CheckDatad(num_classes=1)


def test_masks_of_0_and_255_are_read_as_two_classes_with_one_warning(caplog):
    check = CheckDatad(num_classes=2)
    for _ in range(2):
        case = check({"image": volume(1, 4, 5), "label": label(1, 4, 5, values=(0.0, 255.0))})
        assert torch.equal(case["label"].as_tensor(), label(1, 4, 5, values=(0.0, 1.0)).as_tensor())
    assert ["has the values 0 and 255, which are read as 0 and 1" in message for message in caplog.messages] == [True]


def test_255_beside_other_classes_is_no_mask():
    with pytest.raises(ValueError, match="integers 0 to 1 as values but case_gt.nii.gz has 255;"):
        CheckDatad(num_classes=2)({"image": volume(1, 4, 5), "label": label(1, 4, 5, values=(0.0, 1.0, 255.0))})


def test_label_values_within_a_thousandth_of_a_class_are_rounded():
    case = CheckDatad()({"image": volume(1, 4, 5), "label": label(1, 4, 5, values=(0.0005, 0.9995))})
    assert torch.equal(case["label"].as_tensor(), label(1, 4, 5, values=(0.0, 1.0)).as_tensor())
    with pytest.raises(ValueError, match="has 0.002;"):
        CheckDatad()({"image": volume(1, 4, 5), "label": label(1, 4, 5, values=(0.0, 0.002))})


def test_label_in_another_place_is_warned_about(caplog):
    case = {"image": volume(1, 4, 5, affine=torch.eye(4)), "label": label(1, 4, 5)}
    with caplog.at_level(logging.WARNING):
        CheckDatad()(case)
    assert "case.nii.gz: its label has another spacing than the image; the voxels are assumed" in caplog.text


def test_label_that_is_taken_as_aligned_has_its_image_s_affine_and_so_its_spacing(caplog):
    image = volume(1, 4, 5, 3)
    turned = MetaTensor(label(1, 4, 5, 3).as_tensor(), affine=torch.eye(4))
    placed = CheckDatad()({"image": image, "label": turned})["label"]
    assert torch.equal(placed.affine, image.affine) and torch.equal(turned.affine, torch.eye(4).double())
    torch.testing.assert_close(placed.as_tensor(), turned.as_tensor())
    assert placed.affine.data_ptr() != image.affine.data_ptr() and "are assumed to be aligned" in caplog.text


def test_label_of_an_image_without_geometry_keeps_its_own():
    case = {"image": torch.zeros(1, 4, 5), "label": label(1, 4, 5)}
    assert CheckDatad()(case) is case


@pytest.mark.parametrize("geometry", ["rounded", "unknown"])
def test_label_whose_header_is_rounded_or_has_no_geometry_gets_its_image_s_without_a_warning(caplog, geometry):
    image, stored = volume(1, 4, 5, 3), label(1, 4, 5, 3)
    stored.affine = stored.affine + 0.02 if geometry == "rounded" else torch.eye(4)
    stored.meta["spacing_known"] = geometry == "rounded"
    placed = CheckDatad()({"image": image, "label": stored})["label"]
    assert torch.equal(placed.affine, image.affine) and known_spacing(placed).tolist() == [1.5, 1.4, 8.0]
    assert torch.equal(placed.as_tensor(), stored.as_tensor()) and not caplog.text


@pytest.mark.parametrize("shift", [0, 0.3])
@pytest.mark.parametrize("axcodes", ["LAS", "RPI", "SAR", "PIL"])
def test_label_with_axes_in_another_order_or_direction_is_turned_to_the_image_s(caplog, axcodes, shift):
    image, right = volume(1, 4, 5, 3), label(1, 4, 5, 3)
    stored = Orientation(axcodes=axcodes, labels=AXES)(right)
    stored.affine[:3, 3] += shift  # less than half a voxel, 0.7 mm
    placed = CheckDatad()({"image": image, "label": stored})["label"]
    assert torch.equal(placed.as_tensor(), right.as_tensor()) and torch.equal(placed.affine, image.affine)
    assert not placed.applied_operations and "; they are reoriented" in caplog.text


def test_line_is_no_image():
    with pytest.raises(ValueError, match="`image` must have 2 or 3 spatial axes but case.nii.gz has 1"):
        CheckDatad()({"image": volume(1, 4)})


def test_slice_for_a_network_of_volumes_is_refused_by_name():
    with pytest.raises(ValueError, match="`image` must have 3 spatial axes but case.nii.gz has 2"):
        CheckDatad(num_axes=3)({"image": volume(1, 4, 5)})


@pytest.mark.parametrize("shape", [(1, 4, 5), (1, 4, 5, 3)])
def test_image_is_scaled_over_its_volume(shape):
    image = volume(*shape)
    scaled = ScaleVolumed()({"image": image})["image"]
    torch.testing.assert_close(scaled.as_tensor(), (image / image.max()).as_tensor())
    assert scaled.meta["filename_or_obj"] == "case.nii.gz"


def test_each_channel_is_scaled_by_itself():
    image = torch.stack([torch.arange(5.0), 1e-6 * torch.arange(5.0)])[:, None]
    assert ScaleVolumed()({"image": image})["image"][:, 0].tolist() == [[0, 0.25, 0.5, 0.75, 1]] * 2


def test_the_channels_of_a_color_file_are_scaled_together(tmp_path):
    pixels = np.array([[[0, 60, 30], [120, 180, 240]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    case = LoadCased("image", ensure_channel_first=True)({"image": tmp_path / "a.png"})
    expected = torch.tensor(pixels[0].T / 240, dtype=torch.float32)
    torch.testing.assert_close(ScaleVolumed()(case)["image"][..., 0].as_tensor(), expected)


def test_values_beyond_a_window_are_clipped():
    image = torch.tensor([-5.0, 0.0, 2.0, 10.0, 20.0]).view(1, 1, 5)
    assert ScaleVolumed(window=(0, 10))({"image": image})["image"].flatten().tolist() == pytest.approx(
        [0, 0, 0.2, 1, 1]
    )


def test_slice_file_keeps_the_brightness_of_its_volume():
    image = volume(1, 4, 5) / 100
    assert torch.equal(ScaleVolumed()({"image": image, "slice": 3})["image"], image)


@pytest.mark.parametrize(("factor", "found"), [(1, "0 to 19"), (-0.05, "-0.95 to -?0")])
def test_slice_file_that_was_not_scaled_with_its_volume_is_an_error_naming_it(factor, found):
    with pytest.raises(
        ValueError, match=f"`image` of an item with a slice number must be in 0..1.* but case.nii.gz goes from {found}"
    ):
        ScaleVolumed()({"image": factor * volume(1, 4, 5), "slice": 3})


def test_window_for_a_slice_file_is_an_error_naming_it():
    with pytest.raises(ValueError, match=r"`intensity_window` must be None for .* is \[0, 1\] and case.nii.gz has a"):
        ScaleVolumed(window=(0, 1))({"image": volume(1, 4, 5) / 100, "slice": 3})


@pytest.mark.parametrize("channels", [1, 3])
def test_volume_becomes_its_slices_in_order(channels):
    case = {"image": volume(channels, 4, 5, 3), "label": label(1, 4, 5, 3), "patient": "a"}
    slices = SplitSlicesd()(case)
    assert [item["slice"] for item in slices] == [0, 1, 2]
    for index, item in enumerate(slices):
        assert item["image"].shape == (channels, 4, 5) and item["label"].shape == (1, 4, 5)
        torch.testing.assert_close(item["image"].as_tensor(), case["image"][..., index].as_tensor())
        torch.testing.assert_close(item["label"].as_tensor(), case["label"][..., index].as_tensor())
        assert item["patient"] == "a"


def test_each_slice_has_its_own_metadata_and_memory():
    slices = SplitSlicesd("image")({"image": volume(1, 4, 5, 3)})
    for index, item in enumerate(slices):
        image = item["image"]
        assert image.meta["filename_or_obj"] == "case.nii.gz"
        assert image.affine[:3, 3].tolist() == [0.0, 0.0, 8.0 * index]
        assert image.affine[:2, :2].tolist() == [[1.5, 0.0], [0.0, 1.4]]
        assert image.untyped_storage().nbytes() == 4 * 20
    slices[0]["image"].meta["filename_or_obj"] = "changed"
    slices[0]["image"].zero_()
    assert slices[1]["image"].meta["filename_or_obj"] == "case.nii.gz"
    assert slices[1]["image"].max() > 0


def test_image_that_is_already_2d_and_missing_label_pass():
    case = {"image": volume(1, 4, 5), "slice": 7}
    out = SplitSlicesd()(case)
    assert out["image"] is case["image"] and out["slice"] == 7


def test_spacing_of_a_slice_is_that_along_its_own_axes_in_any_plane():
    sagittal = torch.tensor([[0, 0, 5.0, 0], [1.5, 0, 0, 0], [0, 1.2, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    assert known_spacing(volume(1, 4, 5, affine=sagittal)).tolist() == [1.5, 1.2]
    assert known_spacing(volume(1, 4, 5, 3, affine=sagittal)).tolist() == [1.5, 1.2, 5.0]
    assert known_spacing(torch.rand(1, 4, 5)) is None


def test_stream_without_a_spacing_does_not_differ_from_one_that_has_it():
    pack = MetaTensor(volume(1, 4, 5, 3).as_tensor(), affine=torch.eye(4), meta={"spacing_known": False})
    assert compare_streams([volume(1, 4, 5, 3)], [pack]) == []
