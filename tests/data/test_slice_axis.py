from __future__ import annotations

import logging

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation

from knowsam_monai.data import TurnSlicesd
from knowsam_monai.data.slice_axis import find_slice_axis, slice_axis
from knowsam_monai.data.transforms import AXES


def volume(shape=(6, 5, 4), spacing=(1.5, 1.5, 8.0), codes="LPS"):
    """A volume in LPS, stored with its axes in another order."""
    affine = np.diag([*spacing, 1.0]) * np.array([-1, -1, 1, 1])
    image = MetaTensor(torch.arange(float(np.prod(shape))).reshape(1, *shape), affine=torch.as_tensor(affine))
    return Orientation(axcodes=codes, labels=AXES)(image)


@pytest.mark.parametrize(
    "spacing, shape, axis",
    [
        ((1.5, 1.5, 8.0), (9, 9, 9), 2),
        ((8.0, 1.2, 1.5), (9, 9, 9), 0),
        ((0.98, 0.8, 0.98), (9, 9, 9), 1),  # thin slices: pixels are square
        ((1.0, 1.25, 1.0), (9, 9, 9), 1),
        ((1.0, 1.0, 1.0), (9, 1, 9), 1),
        ((1.0, 1.0, 1.0), (9, 9, 4), None),
        ((1.0, 1.0, 1.0), (109, 6, 122), 1),  # of a file that has lost its spacing
        ((1.0, 1.2, 1.4), (9, 9, 9), None),
        ((0.8, 1.0, 1.5), (9, 9, 9), 2),  # 1.5 times the second largest
        ((1.0, 1.4, 1.6), (9, 9, 9), None),
        ((1.0, 1.05, 1.3), (9, 9, 9), None),  # 1.0 and 1.05 are not equal
        ((1.0, 1.0, 1.0), (9, 3, 10), 1),  # a third of the second shortest
        ((1.0, 1.0, 1.0), (9, 4, 30), None),
        ((1.0, 1.0, 8.0), (1, 1, 9), 2),
    ],
)
def test_slice_axis_is_the_thick_one_or_the_one_that_differs(spacing, shape, axis):
    assert find_slice_axis(spacing, shape) == axis


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PSR", "IPL", "ASR", "SAL"])
@pytest.mark.parametrize("spacing", [(1.5, 1.5, 8.0), (1.5, 8.0, 1.5), (8.0, 1.5, 1.5)])
def test_slices_are_the_same_whatever_the_axes_of_the_file(codes, spacing):
    case = {"image": volume(spacing=spacing), "label": volume(spacing=spacing) + 1}
    stored = {key: Orientation(axcodes=codes, labels=AXES)(image) for key, image in case.items()}
    turn = TurnSlicesd()
    expected, turned = turn(case), turn(stored)
    for key in ("image", "label"):
        slices = [set(map(tuple, x[key][0].permute(2, 0, 1).flatten(1).tolist())) for x in (turned, expected)]
        assert turned[key].shape == expected[key].shape and slices[0] == slices[1]
        assert turned[key].pixdim.tolist() == [1.5, 1.5, 8.0]
    codes_of_plane = "".join(nibabel.aff2axcodes(turned["image"].affine.numpy())[:2])
    assert codes_of_plane == {8.0: "LP"}.get(spacing[2], {8.0: "LI"}.get(spacing[1], "PI"))
    restored = turn.inverse(turned)
    for key in ("image", "label"):
        assert torch.equal(restored[key].as_tensor(), stored[key].as_tensor())
        torch.testing.assert_close(restored[key].affine, stored[key].affine)


def test_axial_slices_are_taken_where_spacing_shows_none_and_one_warning_says_so(caplog):
    turn = TurnSlicesd()
    with caplog.at_level(logging.WARNING, logger="knowsam_monai"):
        for _ in range(2):
            turned = turn({"image": volume((6, 5, 4), (1.0, 1.0, 1.0), codes="SLP")})["image"]
    assert tuple(turned.shape) == (1, 6, 5, 4) and len(caplog.records) == 1
    assert "1 x 1 x 1 mm, which do not show along which axis its slices are: they are taken axially" in caplog.text


def test_label_of_unknown_geometry_is_turned_with_its_image():
    label = MetaTensor(torch.as_tensor(volume(codes="PSR")), affine=torch.eye(4), meta={"spacing_known": False})
    turned = TurnSlicesd()({"image": volume(codes="PSR"), "label": label})
    assert torch.equal(torch.as_tensor(turned["label"]), torch.as_tensor(turned["image"]))
    assert torch.equal(turned["label"].affine, turned["image"].affine)
    assert torch.equal(label.affine, torch.eye(4).double())  # the case itself stays as it is


@pytest.mark.parametrize("codes", ["LPS", "LPI"])
def test_slices_keep_their_order(codes):
    stored = volume(codes=codes)
    assert torch.equal(TurnSlicesd("image")({"image": stored})["image"].as_tensor(), stored.as_tensor())


def test_slices_of_a_file_of_unknown_geometry_are_along_its_last_axis():
    assert slice_axis(torch.rand(1, 3, 5, 4)) == 2


def test_slices_and_files_of_unknown_geometry_pass_unchanged():
    flat = MetaTensor(torch.rand(1, 5, 4), affine=torch.eye(4))
    pack = MetaTensor(torch.rand(1, 3, 5, 4), affine=torch.eye(4), meta={"spacing_known": False})
    for image in (flat, pack, torch.rand(1, 3, 5, 4)):
        turn = TurnSlicesd("image")
        case = turn({"image": image})
        assert torch.equal(case["image"], image) and torch.equal(turn.inverse(case)["image"], image)
