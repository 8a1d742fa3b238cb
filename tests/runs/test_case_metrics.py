import csv
import math
import os

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from knowsam_monai.runs.case_metrics import METRICS, CaseMetrics, case_metrics
from knowsam_monai.runs.validation_report import ValidationReport

SPACING = (1.5, 2.0, 10.0)


def cube(*start, size=4, shape=(24, 12, 8), value=1):
    volume = torch.zeros(shape, dtype=torch.long)
    volume[tuple(slice(s, s + size) for s in start)] = value
    return volume


def item(pred, label, name="/data/patient001_frame01.nii.gz", **meta):
    affine = torch.diag(torch.tensor([*SPACING, 1.0], dtype=torch.float64))
    return {
        "image": MetaTensor(torch.zeros(1, *label.shape), affine=affine, meta={"filename_or_obj": name}),
        "label": MetaTensor(label[None], affine=affine, meta=meta),
        "pred": MetaTensor(pred[None], affine=affine),
    }


def evaluate(tmp_path, outputs, class_names=("first", "second"), **kwargs):
    """Run a toy evaluator whose iterations give `outputs`, and read both files."""
    engine = Engine(lambda engine, output: output)
    CaseMetrics(tmp_path, class_names, **kwargs).attach(engine)
    engine.run(outputs)
    tables = []
    for name in ("raw", "summary"):
        with open(tmp_path / f"metrics_{name}.csv", encoding="utf-8") as file:
            tables.append(list(csv.DictReader(file)))
    return tables


def values(metrics):
    """Of the only class: {filter: {metric: value}}."""
    return {k: dict(zip(METRICS, metrics[i, 0].tolist())) for i, k in enumerate(("all", "largest"))}


@pytest.mark.parametrize("axis,shift", [(0, 2), (1, 2), (2, 1)])
def test_a_shifted_cube_has_the_shift_as_hd95_in_mm_and_in_voxels(axis, shift):
    start = [4, 4, 2]
    moved = list(start)
    moved[axis] += shift
    result = values(case_metrics(cube(*moved), cube(*start), 2, SPACING))["all"]
    # the face that sticks out holds 16 of 56 surface voxels, more than the 5 % that HD95 leaves out
    assert result["hd95_voxel"] == shift
    assert result["hd95_mm"] == pytest.approx(shift * SPACING[axis])
    assert result["dice"] == pytest.approx(1 - shift / 4)
    assert result["jaccard"] == pytest.approx((4 - shift) / (4 + shift))


@pytest.mark.parametrize("num_far, hd95", [(1, 0), (4, 5)])
def test_hd95_leaves_out_the_farthest_twentieth(num_far, hd95):
    label = torch.zeros(8, 40, dtype=torch.long)
    label[1, :38] = 1
    pred = label.clone()
    pred[6, :num_far] = 1  # 5 from the label; 1 of 39 distances, or 4 of 42
    assert values(case_metrics(pred, label, 2))["all"]["hd95_voxel"] == hd95


def test_asd_is_the_mean_of_both_surfaces_distances():
    # a plate one voxel thick, moved by 3: each of its voxels is 3 from the other plate, both ways
    pred, label = torch.zeros(10, 6, 6, dtype=torch.long), torch.zeros(10, 6, 6, dtype=torch.long)
    pred[5, 1:5, 1:5], label[2, 1:5, 1:5] = 1, 1
    result = values(case_metrics(pred, label, 2, SPACING))["all"]
    assert result["asd_voxel"] == pytest.approx(3)
    assert result["asd_mm"] == pytest.approx(4.5)
    # one voxel against that plate: 1 distance there, 16 back, all 17 weigh the same
    lone = torch.zeros_like(pred)
    lone[5, 1, 1] = 1
    there, back = [3.0], [math.sqrt(9 + i**2 + j**2) for i in range(4) for j in range(4)]
    expected = sum(there + back) / 17
    assert values(case_metrics(lone, label, 2))["all"]["asd_voxel"] == pytest.approx(expected, rel=1e-6)


def test_a_far_component_changes_hd95_and_asd_only_without_the_filter():
    pred = cube(4, 4, 2)
    clean = values(case_metrics(pred, cube(4, 4, 2), 2, SPACING))["all"]
    pred[20:22, 4:6, 2:4] = 1
    result = values(case_metrics(pred, cube(4, 4, 2), 2, SPACING))
    assert result["all"]["hd95_mm"] > 15 and result["all"]["asd_mm"] > 1 and result["all"]["dice"] < 1
    assert result["largest"] == clean
    assert clean["hd95_mm"] == 0 and clean["dice"] == 1


def test_components_that_touch_at_a_corner_in_the_next_slice_are_one():
    pred = cube(4, 4, 2, size=2) + cube(6, 6, 4, size=2)
    result = values(case_metrics(pred, pred, 2))
    assert result["all"]["dice"] == result["largest"]["dice"] == 1


def test_the_largest_component_is_kept_for_each_class_by_itself():
    pred = cube(2, 2, 2) + cube(12, 2, 2, value=2)
    metrics = case_metrics(pred, pred, 3)
    np.testing.assert_array_equal(metrics[:, :, 0], 1)


@pytest.mark.parametrize("empty", ["pred", "label"])
def test_distances_to_an_empty_set_are_nan_and_dice_is_0(empty):
    masks = {"pred": cube(4, 4, 2), "label": cube(4, 4, 2)}
    masks[empty] = torch.zeros_like(masks[empty])
    for result in values(case_metrics(masks["pred"], masks["label"], 2, SPACING)).values():
        assert result["dice"] == 0 and result["jaccard"] == 0
        assert all(math.isnan(result[m]) for m in METRICS[2:])


def test_a_class_that_is_nowhere_has_no_dice():
    metrics = case_metrics(cube(4, 4, 2), cube(4, 4, 2), 3)
    assert np.isnan(metrics[:, 1]).all() and not np.isnan(metrics[:, 0, :2]).any()


def test_a_volume_of_one_slice_is_measured_in_2d():
    pred, label = cube(6, 4, 0, shape=(24, 12, 1)), cube(4, 4, 0, shape=(24, 12, 1))
    result = case_metrics(pred, label, 2, SPACING)
    np.testing.assert_array_equal(result, case_metrics(pred[..., 0], label[..., 0], 2, SPACING[:2]))
    first = case_metrics(pred.movedim(2, 0), label.movedim(2, 0), 2, (SPACING[2], *SPACING[:2]))
    np.testing.assert_array_equal(result, first)
    assert values(result)["all"]["hd95_mm"] == 3


def test_raw_file_has_a_row_for_each_case_class_and_filter(tmp_path):
    first, second = cube(4, 4, 2), cube(12, 4, 2, value=2)
    outputs = [
        [item(first + second, first + second)],
        [item(cube(5, 4, 2) + second, first + second, "/data/patient002_frame01.nii.gz")],
    ]
    raw, _ = evaluate(tmp_path, outputs)
    assert len(raw) == 2 * 2 * 2
    assert [row["case"] for row in raw[::4]] == ["patient001_frame01", "patient002_frame01"]
    shifted = next(r for r in raw if r["case"].startswith("patient002") and r["class"] == "first")
    assert float(shifted["hd95_mm"]) == 1.5 and float(shifted["hd95_voxel"]) == 1
    assert shifted["spacing_mm"] == "1.5x2x10" and shifted["num_undefined"] == "0"


def test_summary_counts_undefined_cases_and_leaves_them_out(tmp_path):
    label = cube(4, 4, 2)
    outputs = [
        [item(cube(4 + shift, 4, 2), label, f"case{shift}.nii") for shift in (0, 1, 3)],
        [item(torch.zeros_like(label), label, "case_empty.nii")],
    ]
    raw, summary = evaluate(tmp_path, outputs, class_names=["cavity"])
    rows = {(r["metric"], r["class"], r["components"]): r for r in summary}
    distance, dice = rows["hd95_voxel", "cavity", "all"], rows["dice", "cavity", "all"]
    assert (distance["count"], distance["num_undefined"]) == ("3", "1")
    assert float(distance["mean"]) == pytest.approx(4 / 3, abs=1e-5) and float(distance["median"]) == 1
    assert float(distance["std"]) == pytest.approx(np.std([0, 1, 3]), abs=1e-5)
    assert (dice["count"], dice["num_undefined"]) == ("4", "0")
    assert float(dice["mean"]) == pytest.approx((1 + 0.75 + 0.25 + 0) / 4)
    empty = [r for r in raw if r["case"] == "case_empty"][0]
    assert empty["hd95_mm"] == "nan" and empty["num_undefined"] == "4"


def test_mean_class_is_the_mean_over_classes_of_each_case_first(tmp_path):
    both, one = cube(4, 4, 2) + cube(12, 4, 2, value=2), cube(4, 4, 2)
    # case a: Dice 1 and 0; case b: Dice 1 and nothing to find
    _, summary = evaluate(tmp_path, [[item(one, both, "a.nii")], [item(one, one, "b.nii")]])
    row = next(r for r in summary if (r["metric"], r["class"], r["components"]) == ("dice", "mean", "all"))
    assert float(row["mean"]) == 0.75 and row["count"] == "2" and row["num_undefined"] == "1"


def test_unknown_spacing_leaves_mm_empty_and_uncounted(tmp_path):
    raw, summary = evaluate(
        tmp_path, [[item(cube(5, 4, 2), cube(4, 4, 2), spacing_known=False)]], class_names=["cavity"]
    )
    assert raw[0]["hd95_mm"] == raw[0]["asd_mm"] == raw[0]["spacing_mm"] == "" and raw[0]["hd95_voxel"] == "1.000000"
    row = next(r for r in summary if r["metric"] == "hd95_mm" and r["class"] == "cavity")
    assert (row["count"], row["num_undefined"], raw[0]["num_undefined"]) == ("0", "0", "0")


@pytest.mark.parametrize(
    "axes",
    [
        [[2, 0, 0], [0, 3, 0], [0, 0, 8]],
        [[2, 0, 0], [0, 0, 8], [0, 3, 0]],  # coronal
        [[0, 0, 8], [2, 0, 0], [0, 3, 0]],  # sagittal
        [[2, 0, 0], [0, 1.8, 6.4], [0, 2.4, -4.8]],  # oblique
    ],
    ids=["axial", "coronal", "sagittal", "oblique"],
)
def test_slice_has_the_same_distances_in_mm_in_whatever_plane_it_lies(tmp_path, axes):
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = torch.tensor(axes)
    label = cube(4, 4, 2)[None, :, :, 3]
    meta = {"filename_or_obj": "a.nii"}
    pair = {"pred": label.roll(1, 2), "label": label}
    output = [{key: MetaTensor(x, affine=affine, meta={**meta, "affine": affine}) for key, x in pair.items()}]
    raw, _ = evaluate(tmp_path, [output], class_names=["cavity"])
    assert raw[0]["spacing_mm"] == "2x3" and float(raw[0]["hd95_mm"]) == 3 and float(raw[0]["hd95_voxel"]) == 1


def test_a_given_spacing_replaces_the_files_own(tmp_path):
    output = [item(cube(5, 4, 2), cube(4, 4, 2), spacing_known=False)]
    raw, _ = evaluate(tmp_path, [output], class_names=["cavity"], spacing=(7.0, 1.0, 1.0))
    assert float(raw[0]["hd95_mm"]) == 7


def test_a_batch_gives_the_same_rows_as_decollated_items(tmp_path):
    from monai.data.utils import list_data_collate

    items = [item(cube(4 + k, 4, 2), cube(4, 4, 2), f"/data/case{k}.nii.gz") for k in (0, 1)]
    decollated, _ = evaluate(tmp_path, [items])
    batched, _ = evaluate(tmp_path, [list_data_collate(items)])
    assert batched == decollated and batched[-1]["case"] == "case1"


def test_one_hot_maps_give_the_same_rows_as_class_numbers(tmp_path):
    plain = item(cube(5, 4, 2), cube(4, 4, 2))
    one_hot = dict(plain)
    for key in ("pred", "label"):
        one_hot[key] = MetaTensor(
            torch.nn.functional.one_hot(plain[key][0].as_tensor(), 3).movedim(-1, 0), meta=plain[key].meta
        )
    assert evaluate(tmp_path, [[one_hot]])[0] == evaluate(tmp_path, [[plain]])[0]


def test_a_case_that_a_sampler_repeats_counts_once(tmp_path):
    raw, _ = evaluate(tmp_path, [[item(cube(5, 4, 2), cube(4, 4, 2))]] * 2, class_names=["cavity"])
    assert len(raw) == 2


def test_files_of_the_same_name_keep_their_folder(tmp_path):
    outputs = [[item(cube(5, 4, 2), cube(4, 4, 2), f"/data/{p}/image.nii.gz")] for p in ("p1", "p2")]
    raw, _ = evaluate(tmp_path, outputs)
    assert {row["case"] for row in raw} == {"p1/image", "p2/image"}


def test_a_second_run_replaces_the_first_and_leaves_no_other_file(tmp_path):
    engine = Engine(lambda engine, output: output)
    CaseMetrics(tmp_path, ["cavity"]).attach(engine)
    for shift in (1, 2):
        engine.run([[item(cube(4 + shift, 4, 2), cube(4, 4, 2), f"/data/{shift}.nii.gz")]])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics_raw.csv", "metrics_summary.csv"]
    with open(tmp_path / "metrics_raw.csv", encoding="utf-8") as file:
        assert [row["hd95_voxel"] for row in csv.DictReader(file)] == ["2.000000"] * 2


def test_the_log_has_a_line_for_each_class_and_filter(tmp_path, caplog):
    with caplog.at_level("INFO", logger="knowsam_monai"):
        evaluate(tmp_path, [[item(cube(5, 4, 2), cube(4, 4, 2))]], class_names=["cavity"])
    lines = [r.message for r in caplog.records]
    assert sum(line.startswith(("cavity", "mean")) for line in lines) == 4
    assert len({len(line) for line in lines if line.startswith(("cavity", "mean", "class"))}) == 1


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda i: i.pop("label"), "every validation and test item needs a label file"),
        (lambda i: i.update(pred=torch.zeros(1, 8, 8, 8)), "must be on the label's grid"),
        (lambda i: i.update(pred=torch.zeros(5, 24, 12, 8)), "has 5"),
        (lambda i: i.update(label=torch.full((1, 24, 12, 8), 3)), "must have values from 0 to 2 but has 3 to 3"),
    ],
)
def test_outputs_that_do_not_fit_are_one_clear_error(tmp_path, change, message):
    output = item(cube(4, 4, 2), cube(4, 4, 2))
    change(output)
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path, [[output]])


@pytest.mark.parametrize("class_names", ["cavity", []])
def test_class_names_must_be_a_list(tmp_path, class_names):
    with pytest.raises(ValueError, match="`class_names` must be a list"):
        CaseMetrics(tmp_path, class_names)


def _evaluate_on_a_rank(rank, folder):
    shards = [["a", "b"], ["c", "a"]]  # a sampler gives the last rank a case twice to serve all alike
    shifts = {"a": 0, "b": 1, "c": 2}
    outputs = [[item(cube(4 + shifts[name], 4, 2), cube(4, 4, 2), f"{name}.nii")] for name in shards[rank]]
    engine = Engine(lambda engine, output: output)
    CaseMetrics(folder, ["cavity"]).attach(engine)
    report = ValidationReport(folder, ["cavity"])
    report.attach(engine)
    engine.run(outputs)
    assert (report.write() is None) == (rank > 0)
    assert report.score == pytest.approx((1 + 0.75 + 0.5) / 3)


@pytest.mark.slow
def test_two_ranks_write_every_case_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    idist.spawn("gloo", _evaluate_on_a_rank, (str(tmp_path),), nproc_per_node=2)
    with open(tmp_path / "metrics_raw.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["components"] == "all"]
    assert {row["case"]: float(row["hd95_voxel"]) for row in rows} == {"a": 0, "b": 1, "c": 2} and len(rows) == 3
    assert (tmp_path / "validation.png").is_file()
