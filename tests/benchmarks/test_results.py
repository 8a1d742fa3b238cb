"""The benchmarks' commands run end to end, and the tables are what the result files give."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ACDC = os.environ.get("KNOWSAM_ACDC_DIR")


@pytest.fixture
def benchmarks(monkeypatch, tmp_path):
    """The modules of the folder, with results in a folder of the test."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import grid
    import hosts
    import tables

    monkeypatch.setattr(grid, "OUTPUT", tmp_path / "output")
    monkeypatch.setattr(grid, "RESULTS", tmp_path / "results")
    return grid, hosts, tables


def lines(row, dice):
    """Lines of a result file; dice: {(seed, patient): Dice of the only class}."""
    return [
        {"row": row, "seed": str(seed), "volume": f"{patient}_frame01", "dice heart": str(value)}
        for (seed, patient), value in dice.items()
    ]


def test_a_gain_and_its_error_are_those_of_a_calculation_by_hand(benchmarks):
    tables = benchmarks[2]
    without = lines("Mean Teacher", {(0, "a"): 50, (0, "b"): 60, (1, "a"): 40, (1, "b"): 70})
    with_skd = lines("Mean Teacher + SKD", {(0, "a"): 53, (0, "b"): 61, (1, "a"): 47, (1, "b"): 73})
    # differences: seed 0: 3 and 1, seed 1: 7 and 3; patients: 5 and 2, seeds: 2 and 5; both have error 1.5
    gain, error = tables.gain(with_skd, without, ["heart"])
    assert gain == pytest.approx(3.5)
    assert error == pytest.approx(1.5 * 2**0.5)
    assert tables.gain_text(gain, error) == "+3.5 ± 2.1, not distinguishable"
    one_seed = tables.gain(with_skd[:2], without[:2], ["heart"])
    assert one_seed == (pytest.approx(2), pytest.approx(1))
    assert tables.gain_text(*one_seed) == "+2.0 ± 1.0"


def test_a_class_that_is_absent_from_a_volume_is_left_out_of_its_mean(benchmarks):
    volumes = [{"dice left": "80", "dice right": ""}, {"dice left": "40", "dice right": "20"}]
    assert benchmarks[2].mean_of(volumes, "dice", ["left", "right"]) == pytest.approx((80 + 30) / 2)


def test_the_tables_in_the_pages_are_those_of_the_result_files(benchmarks):
    pages = [page.read_text(encoding="utf-8") for page in benchmarks[2].PAGES]
    assert all("<!-- table acdc_3_cpu" in page and "| Mean Teacher |" in page for page in pages)
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not ACDC, reason="KNOWSAM_ACDC_DIR is not set")
def test_no_patient_of_the_tables_is_in_training(benchmarks):
    grid = benchmarks[0]
    table, choices = (json.loads(grid.acdc_lists(3, name).read_text()) for name in ("tables", "choices"))
    measured, chosen = ({item["patient"] for item in data["validation"]} for data in (table, choices))
    assert (len(measured), len(table["validation"]), len(chosen)) == (30, 60, 20)
    assert not measured & chosen
    for data in (table, choices):
        trained = {item["patient"] for part in ("labeled", "unlabeled") for item in data[part]}
        assert not trained & measured
    assert not any("label" in item for item in table["unlabeled"])


@pytest.mark.slow
@pytest.mark.skipif(not ACDC, reason="KNOWSAM_ACDC_DIR is not set")
@pytest.mark.parametrize("protocol", ["cpu", "published"])
def test_a_grid_runs_from_training_to_the_result_files_and_resumes(benchmarks, monkeypatch, protocol, capsys):
    grid, hosts, _ = benchmarks
    tiny = ["image_size=32", "max_iterations=2", "epoch_length=1", "num_workers=0", "sam_variant=stand_in"]
    tiny += ["labeled_batch_size=1", "unlabeled_batch_size=1"]
    words = ["hosts.py", "--hosts", "Mean Teacher", "--table", "trial", "--set", *tiny]
    monkeypatch.setattr(sys, "argv", words + ["--published"] * (protocol == "published"))
    hosts.main()
    with open(grid.RESULTS / "trial.csv", newline="") as file:
        volumes = list(csv.DictReader(file))
    assert {(line["row"], line["seed"]) for line in volumes} == {("Mean Teacher", "0"), ("Mean Teacher + SKD", "0")}
    assert len(volumes) == 2 * (20 if protocol == "published" else 60)
    with open(grid.RESULTS / "trial_curves.csv", newline="") as file:
        points = list(csv.DictReader(file))
    assert [(line["row"], line["iteration"]) for line in points] == [
        (row, number) for row in ("Mean Teacher", "Mean Teacher + SKD") for number in "12"
    ]
    assert bool(points[-1]["teacher_dice"]) and not points[0]["teacher_dice"]
    # a second start trains nothing: it would fail where no command can be run
    monkeypatch.setattr(grid, "_run", None)
    hosts.main()
