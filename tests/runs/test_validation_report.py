import logging

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from knowsam_monai.runs.validation_case import class_dice
from knowsam_monai.runs.validation_report import ValidationReport

NAMES = ["right ventricle", "myocardium"]


def label_map(offset=0, num_slices=3):
    """Class 1 grows from slice to slice; class 2 is a bar of its own."""
    label = torch.zeros(24, 20, num_slices, dtype=torch.long)
    for k in range(num_slices):
        label[4 + offset : 8 + 2 * k + offset, 4:10, k] = 1
        label[4:10, 14:17, k] = 2
    return label


def item(name, offset=0, teacher_offset=None, affine=None, **meta):
    label = label_map()
    affine = torch.eye(4) if affine is None else torch.as_tensor(affine, dtype=torch.float64)
    meta = {"filename_or_obj": f"/private/folder/{name}.nii.gz", **meta}
    result = {
        "image": MetaTensor(torch.rand(1, *label.shape), affine=affine, meta=dict(meta)),
        "label": MetaTensor(label[None], affine=affine, meta=dict(meta)),
        "pred": label_map(offset)[None],
    }
    return result if teacher_offset is None else result | {"teacher_pred": label_map(teacher_offset)[None]}


def validate(report, *validations):
    engine = Engine(lambda engine, output: output)
    report.attach(engine)
    for items in validations:
        engine.run([[output] for output in items])
    return report


def test_table_has_dice_per_structure_of_student_beside_teacher(tmp_path):
    report = validate(ValidationReport(tmp_path, NAMES), [item("a", 0, teacher_offset=2), item("b", 2, 2)])
    lines = report.table()
    assert "student" in lines[1] and "teacher" in lines[1]
    cells = {
        line[2:19].strip(): [float(x) for x in line[19:].split()] for line in lines if "0." in line or "1." in line
    }
    shifted = float(class_dice(label_map(2), label_map(), 3)[0])
    assert cells["right ventricle"] == pytest.approx([(1 + shifted) / 2, shifted], abs=5e-4)
    assert cells["myocardium"] == [1, 1]
    assert cells["mean"] == pytest.approx([(3 + shifted) / 4, (1 + shifted) / 2], abs=5e-4)
    assert len({len(line) for line in lines[1:]}) == 1


def test_table_without_a_teacher_has_one_column(tmp_path):
    lines = validate(ValidationReport(tmp_path, NAMES), [item("a")]).table()
    assert lines[1].split() == ["structure", "student"]


def test_best_validation_is_reported(tmp_path):
    report = validate(ValidationReport(tmp_path, NAMES), [item("a", 3)], [item("a", 0)], [item("a", 2)])
    assert "the best of 3 validations (number 2)" in report.table()[0]
    assert "1.000" in report.table()[3]


def test_best_is_that_of_the_evaluators_key_metric(tmp_path):
    """MONAI's Dice leaves out a case whose label is empty, and by it the checkpoint is chosen."""
    report = ValidationReport(tmp_path, NAMES)
    engine = Engine(lambda engine, output: output)
    engine.state.key_metric_name = "val_mean_dice"
    report.attach(engine)
    for number, (offset, score) in enumerate(((0, 0.5), (2, 0.9), (1, 0.7)), start=1):
        engine.state.metrics["val_mean_dice"] = score
        engine.run([[item("a", offset)]])
        engine.state.key_metric_name = "val_mean_dice"
    assert report._kept["validation"] == 2 and report.score == 0.9


def test_last_stands_beside_the_best_and_survives_a_resume(tmp_path):
    report = validate(ValidationReport(tmp_path, NAMES), [item("a", 0, 2)], [item("a", 3, 0)])
    lines = report.table()
    assert lines[1].split() == ["structure", "student", "teacher", "student,", "last"]
    teacher, last = (float(class_dice(label_map(offset), label_map(), 3)[0]) for offset in (2, 3))
    assert [float(x) for x in lines[3].split()[-3:]] == pytest.approx([1, teacher, last], abs=5e-4)
    resumed = ValidationReport(tmp_path, NAMES)
    resumed.load_state_dict(report.state_dict())
    assert resumed.table() == lines


def test_pictures_cases_and_table_are_written_and_only_they(tmp_path, caplog):
    report = validate(
        ValidationReport(tmp_path / "new", NAMES, num_slices=3), [item(n, k) for k, n in enumerate("abcd")]
    )
    with caplog.at_level(logging.INFO, logger="knowsam_monai"):
        path = report.write()
    written = {p.relative_to(tmp_path / "new").as_posix() for p in (tmp_path / "new").rglob("*.*")}
    slices = {f"validation_slices/{i}.png" for i in (1, 2, 3)}
    assert written == {"validation.png", "validation_cases.csv", *slices}
    from PIL import Image

    with Image.open(path) as picture:
        width, height = picture.size
        pixels = np.asarray(picture.convert("RGB"))
    assert 900 < width < 1300 and height > width * 0.9
    colors = {tuple(c) for c in pixels.reshape(-1, 3)}
    assert {(0xF0, 0xE4, 0x42), (0x56, 0xB4, 0xE9)} <= colors
    assert "right ventricle" in caplog.text and "/private" not in caplog.text


def test_cases_have_the_dice_of_student_and_teacher_in_each_structure(tmp_path):
    validate(ValidationReport(tmp_path, NAMES), [item("b", 2), item("a", 0, teacher_offset=2)]).write()
    shifted = float(class_dice(label_map(2), label_map(), 3)[0])
    assert (tmp_path / "validation_cases.csv").read_text().splitlines() == [
        "case,model,right ventricle,myocardium,mean",
        "a,student,1.0000,1.0000,1.0000",
        f"a,teacher,{shifted:.4f},1.0000,{(1 + shifted) / 2:.4f}",
        f"b,student,{shifted:.4f},1.0000,{(1 + shifted) / 2:.4f}",
    ]


def test_slices_of_a_run_before_are_removed(tmp_path):
    (tmp_path / "validation_slices").mkdir()
    (tmp_path / "validation_slices" / "9.png").write_text("")
    validate(ValidationReport(tmp_path, NAMES), [item("a")]).write()
    assert [p.name for p in (tmp_path / "validation_slices").iterdir()] == ["1.png"]


def test_report_that_is_loaded_writes_the_same_and_an_absent_structure_is_no_broken_weight(tmp_path):
    from knowsam_monai.files import _is_finite

    absent = item("a", teacher_offset=2)
    for key in ("label", "pred", "teacher_pred"):
        absent[key] = absent[key].clone()
        absent[key][absent[key] == 2] = 0
    first = validate(ValidationReport(tmp_path / "first", NAMES), [absent, item("b", 2)])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert _is_finite(state)
    second = ValidationReport(tmp_path / "second", NAMES)
    second.load_state_dict(state)
    assert second.table() == first.table() and first.write() and second.write()
    for name in ("validation_cases.csv", "validation_slices/1.png", "validation.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert "a,student,1.0000,,1.0000" in (tmp_path / "first" / "validation_cases.csv").read_text()


def test_without_a_validation_nothing_is_written_and_a_warning_says_so(tmp_path, caplog):
    assert ValidationReport(tmp_path / "new", NAMES).write() is None
    assert "No validation has run" in caplog.text and not (tmp_path / "new").exists()


def test_validation_of_empty_labels_alone_is_warned_of(tmp_path, caplog):
    empty = item("a")
    empty["label"].zero_(), empty["pred"].zero_()
    report = ValidationReport(tmp_path, NAMES)
    validate(report, [item("a"), empty])
    assert not caplog.messages
    validate(report, [empty])
    assert "No label of the validation has a structure, so there is no Dice; " in caplog.text


def test_one_slice_and_no_foreground_can_be_drawn(tmp_path):
    output = item("a")
    for key in ("image", "label", "pred"):
        output[key] = torch.zeros(1, 24, 20)
    report = validate(ValidationReport(tmp_path, NAMES), [output])
    assert report.write() is not None


@pytest.mark.parametrize(
    "options,message",
    [
        ({"class_names": "LV"}, "`class_names` must be a list"),
        ({"num_slices": 0}, "`num_slices` must be at least 1"),
    ],
)
def test_wrong_arguments_are_one_clear_error(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ValidationReport(**{"output_dir": tmp_path, "class_names": NAMES, **options})
