"""configs/evaluate.json over train.json: per-case metrics of a trained student, without SAM."""

import csv
import json
import logging
import re
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from knowsam_monai.runs import trained_student

CONFIGS = Path(__file__).parents[2] / "bundles" / "knowsam_acdc" / "configs"
SPACING = (2.0, 1.5, 10.0)


def write_case(folder, name):
    """Two bright boxes and their labels: 1 where the image is above 0.6 of its range, 2 above 0.9."""
    image, label = np.zeros((32, 32, 3), np.float32), np.zeros((32, 32, 3), np.uint8)
    for value, box in ((1, np.s_[4:12, 4:12]), (2, np.s_[20:28, 8:20])):
        image[box], label[box] = (0, 70, 100)[value], value
    for suffix, array in (("", image), ("_gt", label)):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([*SPACING, 1])), folder / f"{name}{suffix}.nii.gz")
    return {"image": f"{name}.nii.gz", "label": f"{name}_gt.nii.gz"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data list, and a network that is a perfect student of it: a threshold."""
    folder = tmp_path_factory.mktemp("trained")
    cases = [write_case(folder, name) for name in ("a", "b", "c", "d")]
    sections = {"labeled": cases[:1], "unlabeled": [], "validation": cases[1:3], "test": cases[3:]}
    (folder / "list.json").write_text(json.dumps(sections))
    state = {"weight": torch.tensor([0.0, 20.0, 60.0]).reshape(3, 1, 1, 1), "bias": torch.tensor([0.0, -10.0, -44.0])}
    torch.save(state, folder / "model.pt")
    return folder


def evaluate(trained, output_dir, **override):
    network_def = {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": "@num_classes", "kernel_size": 1}
    options = {
        "dataset_dir": str(trained / "list.json"),
        "ckpt_path": str(trained / "model.pt"),
        "output_dir": str(output_dir),
        "device": "$torch.device('cpu')",
        "class_names": ["first", "second"],
        "image_size": 32,
        "network_def": network_def,
    }
    workflow = ConfigWorkflow(
        config_file=[str(CONFIGS / name) for name in ("train.json", "evaluate.json")],
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        **{**options, **override},
    )
    hook = sys.excepthook
    try:
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    finally:
        sys.excepthook = hook
    with open(output_dir / "metrics_raw.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_tables_are_headed_by_the_split_and_the_phantom_s_student_is_named(trained, tmp_path, caplog, monkeypatch):
    record = {"trained_on": trained_student.PHANTOM, "run": "knowsam_phantom"}
    monkeypatch.setattr(trained_student, "read_record", lambda folder: record)
    caplog.set_level(logging.INFO)
    evaluate(trained, tmp_path, split="test")
    assert "Metrics of 1 case of the test split" in caplog.messages
    assert "Test Dice, 1 volume" in caplog.messages
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any("trained on the synthetic phantom" in message for message in warnings)


@pytest.mark.parametrize("split,cases", [("validation", {"b", "c"}), ("test", {"d"})])
def test_every_case_of_the_split_gets_its_metrics_in_mm(trained, tmp_path, split, cases):
    rows = evaluate(trained, tmp_path, split=split)
    assert {row["case"] for row in rows} == cases and len(rows) == len(cases) * 2 * 2
    assert {row["spacing_mm"] for row in rows} == {"2x1.5x10"}
    assert all(float(row["dice"]) == 1 and float(row["hd95_mm"]) == 0 for row in rows)
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert files == {"metrics_raw.csv", "metrics_summary.csv", "validation.png", "validation_cases.csv"}
    assert (tmp_path / "validation_slices" / "1.png").is_file()


def test_a_student_at_another_size_is_measured_on_the_native_grid(trained, tmp_path):
    rows = evaluate(trained, tmp_path, image_size=80)
    second = [
        row for row in rows if row["class"] == "second"
    ]  # the blurred edge of the second is as bright as the first
    assert len(second) == 4 and all(float(row["dice"]) > 0.8 and float(row["hd95_voxel"]) <= 1 for row in second)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"split": "training"}, "`split` must be one of 'labeled', 'validation', 'test' but is 'training'"),
        ({"ckpt_path": "/nowhere/model.pt"}, "must be a student but /nowhere/model.pt cannot be read"),
        ({"class_names": ["a", "b", "c"]}, "has 3 classes, not 4: set the class count"),
        ({"class_names": ["a"]}, "has 3 classes, not 2: set the class count"),
    ],
)
def test_wrong_input_is_one_clear_error(trained, tmp_path, change, message):
    with pytest.raises(RuntimeError) as error:
        evaluate(trained, tmp_path, **change)
    cause = error.value
    while cause is not None and not re.search(message, str(cause)):
        cause = cause.__cause__ or cause.__context__
    assert cause is not None
