import numpy as np
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, Spacing, SpatialCrop, SpatialPad

from knowsam_monai.data.transforms import AXES
from knowsam_monai.runs.validation_case import class_dice, validation_cases
from knowsam_monai.runs.validation_picture import choose_views, slice_views
from tests.runs.test_validation_report import item


def test_rows_run_from_the_best_case_to_the_worst_slice():
    items = [item(name, offset) for name, offset in (("c", 2), ("a", 0), ("d", 3), ("b", 1))]
    engine = Engine(lambda e, b: b)
    engine.state.output, engine.state.iteration = items, 1
    cases = validation_cases(engine, 3)
    views = [view for case in cases for view in slice_views(case, 3)]
    dice = {case.path: class_dice(case.preds["pred"], case.label, 3) for case in cases}
    chosen = [view.path[-8] for view in choose_views(views, dice, 4)]
    assert chosen[0] == "a" and chosen[-1] == "d" and len(chosen) == len(set(chosen)) == 4
    assert [v.path[-8] for v in choose_views(views, dice, 1)] == ["d"]
    assert len(choose_views(views, dice, 20)) == 4


def test_a_case_gives_its_largest_and_its_worst_slice():
    output = item("a")
    output["pred"][0, :, :, 1] = 0
    engine = Engine(lambda e, b: b)
    engine.state.output, engine.state.iteration = [output], 1
    views = slice_views(validation_cases(engine, 3)[0], 3)
    assert [view.position for view in views] == ["slice 3 of 3", "slice 2 of 3"]
    np.testing.assert_array_equal(views[1].dice, [0, 0])


def test_nifti_slices_are_turned_and_h5_slices_are_not():
    engine = Engine(lambda e, b: b)
    lps, ras = np.diag([-1.0, -2.0, 9, 1]), np.diag([1.0, 2.0, 9, 1])
    engine.state.output = [item("lps", affine=lps), item("ras", affine=ras), item("h5", spacing_known=False)]
    engine.state.iteration = 1
    lps, ras, h5 = (slice_views(case, 3)[0] for case in validation_cases(engine, 3))
    np.testing.assert_array_equal(lps.label, h5.label.T)
    np.testing.assert_array_equal(ras.label, h5.label.T[::-1, ::-1])
    assert (lps.aspect, h5.aspect) == (2, 1)


def test_slices_are_those_of_the_volume_whatever_the_axes_of_its_file():
    lps = item("a", affine=np.diag([-1.0, -1.0, 9, 1]))
    volumes = {key: MetaTensor(torch.as_tensor(image), meta=dict(lps["label"].meta)) for key, image in lps.items()}
    turned = {key: Orientation(axcodes="SRP", labels=AXES)(volume) for key, volume in volumes.items()}
    engine = Engine(lambda e, b: b)
    engine.state.output, engine.state.iteration = [volumes, turned], 1
    expected, views = (slice_views(case, 3)[0] for case in validation_cases(engine, 3))
    assert views.position == expected.position == "slice 3 of 3"
    for name in ("image", "label", "pred", "dice", "aspect"):
        np.testing.assert_array_equal(getattr(views, name), getattr(expected, name))


def test_an_image_on_the_network_s_grid_is_drawn_on_the_label_s():
    output = item("a", spacing_known=False)
    output["image"] = torch.zeros(1, 48, 40, 3)
    output["image"][..., :20, 2] = 1
    engine = Engine(lambda e, b: b)
    engine.state.output, engine.state.iteration = [output], 1
    view = slice_views(validation_cases(engine, 3)[0], 3)[0]
    assert view.image.shape == view.label.shape == (24, 20)
    assert view.image[:, :9].min() == 1 and view.image[:, 11:].max() == 0


def test_an_image_that_was_resampled_cropped_and_padded_lies_where_its_label_lies():
    output = item("a", affine=np.diag([-1.0, -2.0, 3.0, 1]))
    output["image"] = MetaTensor(output["label"].as_tensor().float() * 10, meta=dict(output["image"].meta))
    output["image"].affine = output["label"].affine
    # edges of a voxel halve, what is cut off has no foreground, and the grid's origin moves
    network_grid = Compose(
        [Spacing((0.5, 1.0, 1.5), mode="nearest"), SpatialCrop((4, 0, 0), (44, 36, 6)), SpatialPad((48, 40, 9))]
    )
    output["image"] = network_grid(output["image"])
    engine = Engine(lambda e, b: b)
    engine.state.output, engine.state.iteration = [output], 1
    view = slice_views(validation_cases(engine, 3)[0], 3)[0]
    assert view.image.shape == view.label.shape
    assert (
        np.abs(view.image - view.label * 10).mean() < 0.5 and np.corrcoef(view.image.flat, view.label.flat)[0, 1] > 0.9
    )
