"""Every case of a validation counts once and has a name of its own, in whatever batches and processes it comes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, Dataset, DistributedSampler, MetaTensor
from monai.engines import SupervisedEvaluator
from torch import nn

from knowsam_monai.runs import CaseMetrics, ValidationReport
from knowsam_monai.runs.validation_case import case_names
from tests.processes import finish, start_ranks

NAMES = ["disc"]


def items(num, file=None):
    """Images that differ from each other, and are their own labels."""
    found = []
    for i in range(num):
        image = torch.zeros(1, 12, 12)
        image[:, 2 : 4 + i, 2:8] = 1
        meta = {} if file is None else {"filename_or_obj": file.format(i)}
        found.append({"image": MetaTensor(image, meta=dict(meta)), "label": MetaTensor(image.clone(), meta=dict(meta))})
    return found


def evaluate(folder, loader):
    """The names in each table that CaseMetrics and ValidationReport write, and how many cases the report counts."""
    report = ValidationReport(folder, NAMES, num_slices=9)
    SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=loader,
        network=nn.Identity(),
        val_handlers=[CaseMetrics(folder, NAMES), report],
    ).run()
    return written(folder, report)


def written(folder, report):
    assert report.write()
    with (
        open(folder / "metrics_raw.csv", newline="") as raw,
        open(folder / "validation_cases.csv", newline="") as cases,
    ):
        tables = [row["case"] for row in csv.DictReader(raw) if row["components"] == "all"], [
            row["case"] for row in csv.DictReader(cases)
        ]
    assert sorted(tables[0]) == sorted(tables[1]) and f" {len(tables[0])} volumes" in report.table()[0]
    assert len(list((folder / "validation_slices").iterdir())) == len(tables[0])
    return sorted(tables[0])


def run_outputs(folder, outputs):
    """The same for outputs as they come."""
    engine, report = Engine(lambda engine, output: output), ValidationReport(folder, NAMES, num_slices=9)
    for handler in (CaseMetrics(folder, NAMES), report):
        handler.attach(engine)
    engine.run([[item | {"pred": item["label"]} for item in output] for output in outputs])
    return written(folder, report)


@pytest.mark.parametrize("file", [None, "/data/scan{}.nii.gz"])
@pytest.mark.parametrize("num,batch_size", [(3, 1), (4, 2), (3, 2), (5, 3)])
def test_batches_of_any_size_have_every_case(tmp_path, num, batch_size, file):
    name = "case_{:03d}" if file is None else "scan{}"
    found = evaluate(tmp_path, DataLoader(Dataset(items(num, file)), batch_size=batch_size))
    assert found == [name.format(i) for i in range(num)]


def test_named_and_nameless_cases_stay_apart(tmp_path):
    first, second, third = items(3)
    named = items(4, "/data/case_002.nii.gz")[3]
    found = run_outputs(tmp_path, [[first, named], [second], [third]])
    assert found == ["case_000", "case_002", "case_003", "data/case_002"]


def test_two_cases_of_one_file_are_numbered_and_one_that_comes_again_is_not(tmp_path):
    first, second, third = items(3, "/data/scan.nii.gz")
    assert run_outputs(tmp_path, [[first, second], [first], [third]]) == ["scan", "scan (2)", "scan (3)"]


@pytest.mark.parametrize(
    "paths, names",
    [
        (["/a/x/scan.nii.gz", "/b/x/scan.nii.gz", "/b/y/other.nii"], ["a/x/scan", "b/x/scan", "other"]),
        (["/a/scan.nii.gz", "/a/scan.nrrd", "scan.nii"], ["a/scan", "a/scan (2)", "scan"]),
        (["/a/p1/mri_norm2.h5", "/a/p2/mri_norm2.h5"], ["p1/mri_norm2", "p2/mri_norm2"]),
        (["/a/scan.nii.gz", "/a/scan.nii.gz//2", "/b/scan (2).nii.gz"], ["scan", "a/scan (2)", "b/scan (2)"]),
        (["case_000", "/data/case_000.nii.gz"], ["case_000", "data/case_000"]),
        (["/", "", "a\nb.nii"], ["", " (2)", "a\ufffdb"]),
        ([], []),
    ],
)
def test_names_are_short_and_all_different(paths, names):
    assert case_names(paths) == names


def _evaluate_on_a_rank(folder, num, file):
    dataset = Dataset(items(num, file))
    loader = DataLoader(dataset, batch_size=2, sampler=DistributedSampler(dataset, shuffle=False))
    report, metrics = ValidationReport(folder, NAMES, num_slices=9), CaseMetrics(folder, NAMES)
    SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=loader, network=nn.Identity(), val_handlers=[metrics, report]
    ).run()
    if report.write():
        assert f" {num} volumes" in report.table()[0]


@pytest.mark.parametrize(
    "file, names",
    [
        (None, [f"case_{i:03d}" for i in range(5)]),
        ("/data/scan{}.nii.gz", [f"scan{i}" for i in range(5)]),
        ("/data/scan.nii.gz", ["scan", *(f"scan ({i})" for i in range(2, 6))]),
    ],
)
def test_two_ranks_have_every_case_once(tmp_path, file, names):
    """The sampler gives the last rank the first case again to serve both alike."""
    ranks = start_ranks(tmp_path, 2, _evaluate_on_a_rank, str(tmp_path), 5, file)
    assert [finish(rank, Path(tmp_path) / f"rank{i}.log") for i, rank in enumerate(ranks)] == [0, 0]
    for table in ("metrics_raw.csv", "validation_cases.csv"):
        with open(tmp_path / table, newline="") as file:
            assert sorted({row["case"] for row in csv.DictReader(file)}) == names
