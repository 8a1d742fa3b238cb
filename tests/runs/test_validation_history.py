from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import torch
from monai.engines import SupervisedEvaluator
from monai.handlers import MeanDice, from_engine
from torch import nn

from knowsam_monai.runs import ValidationHistory


def validate(history, epochs, labels=((1, 2), (1, 1))):
    """Predicts class 1 in every pixel of 1 x 2 images; Dice by hand: see the test."""

    class Ones(nn.Module):
        def forward(self, x):
            return torch.ones_like(x)

    data = [{"image": torch.zeros(1, 1, 2), "label": torch.tensor([[row]]).float()} for row in labels]
    metric = MeanDice(include_background=False, num_classes=3, output_transform=from_engine(["pred", "label"]))
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{key: value[None] for key, value in item.items()} for item in data],
        network=Ones(),
        key_val_metric={"val_mean_dice": metric},
        val_handlers=[history],
    )
    for epoch in epochs:
        evaluator.run(global_epoch=epoch)


def rows_of(folder):
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_row_has_the_metric_and_the_dice_of_each_structure(tmp_path):
    validate(ValidationHistory(tmp_path / "run", ["first", "second"]), epochs=[1])
    (row,) = rows_of(tmp_path / "run")
    # case 1: Dice 2 * 1 / (2 + 1) and 0; case 2: 1, and no truth of class 2, which is left out
    assert float(row["val_mean_dice/first"]) == pytest.approx((2 / 3 + 1) / 2)
    assert float(row["val_mean_dice/second"]) == 0
    assert row["epoch"] == "1" and set(row) == {"epoch", "val_mean_dice", *(k for k in row if "/" in k)}


def test_case_without_a_structure_is_left_out_of_its_mean(tmp_path):
    validate(ValidationHistory(tmp_path, ["first", "second"]), epochs=[1], labels=((1, 2), (2, 2)))
    assert float(rows_of(tmp_path)[0]["val_mean_dice/first"]) == pytest.approx(2 / 3)


def test_rows_of_earlier_epochs_stay_and_later_ones_are_replaced(tmp_path):
    validate(ValidationHistory(tmp_path, ["first", "second"]), epochs=[1, 2, 3])
    validate(ValidationHistory(tmp_path, ["first", "second"]), epochs=[3], labels=((1, 1), (1, 1)))
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["1", "2", "3"]
    assert float(rows_of(tmp_path)[2]["val_mean_dice"]) == 1 > float(rows_of(tmp_path)[1]["val_mean_dice"])
    validate(ValidationHistory(tmp_path, ["first", "second"]), epochs=[1])
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["1"]
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


@pytest.mark.parametrize(
    "torn",
    ["epoch,val_mean_dice\r\n1,0.5\r\n2", "epoch,val_mean_dice\r\n1,0.5\r\nx,0.5\r\n", "epoch,a\n1,2\n3,4,5\n"],
    ids=["half a row", "no number", "too many columns"],
)
def test_whole_rows_of_a_torn_file_stay(tmp_path, caplog, torn):
    (tmp_path / "results.csv").write_text(torn, newline="")
    validate(ValidationHistory(tmp_path, ["first", "second"]), epochs=[3])
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["1", "3"]
    assert "results.csv is damaged" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"name,age\nA,5\n", b"\x00" * 40])
def test_file_of_something_else_is_replaced(tmp_path, content):
    (tmp_path / "results.csv").write_bytes(content)
    validate(ValidationHistory(tmp_path, ["first", "second"]), epochs=[3])
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["3"]


def test_each_validation_is_one_line_with_the_best_so_far(tmp_path, caplog):
    history = ValidationHistory(tmp_path, ["first", "second"])
    with caplog.at_level("INFO", logger="knowsam_monai"):
        validate(history, epochs=[1, 2])
    assert caplog.messages == [
        "Validation 1  mean dice 0.667 (best)",
        "Validation 2  mean dice 0.667 (best 0.667 of 1)",
    ]


def engine_of(**state):
    metrics = {"val_mean_dice": 0.5, "val_teacher_dice": torch.tensor(0.25)}
    details = {"val_mean_dice": torch.tensor([[0.5, 1.0]]), "val_teacher_dice": torch.tensor([[0.25, 0.5, 1.0]])}
    defaults = {"epoch": 4, "iteration": 9, "metrics": metrics, "metric_details": details}
    best = {"key_metric_name": "val_mean_dice", "best_metric": 0.75, "best_metric_epoch": 3}
    return SimpleNamespace(state=SimpleNamespace(**{**defaults, **best, **state}))


def test_best_is_that_of_the_key_metric_alone_once_there_is_one(tmp_path):
    history = ValidationHistory(tmp_path, ["first", "second"])
    assert history.line(engine_of()) == "Validation 4  mean dice 0.500 (best 0.750 of 3)  teacher dice 0.250"
    assert history.line(engine_of(best_metric_epoch=-1)) == "Validation 4  mean dice 0.500  teacher dice 0.250"


def test_scalars_are_those_of_the_row_by_epoch(tmp_path):
    written, writer = [], SimpleNamespace(add_scalar=lambda *scalar: written.append(scalar))
    writer.flush = lambda: written.append("flushed")
    ValidationHistory(tmp_path, ["first", "second"]).write_scalars(engine_of(), writer)
    assert written == [
        ("val_mean_dice", 0.5, 4),
        ("val_mean_dice/first", 0.5, 4),
        ("val_mean_dice/second", 1.0, 4),
        ("val_teacher_dice", 0.25, 4),  # whose details are of other structures
        "flushed",
    ]
