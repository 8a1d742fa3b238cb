"""The student is published whatever else fails, and any name of a case or class can be in what a run leaves."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import shlex
import shutil
import sys
import time
from html import escape
from pathlib import Path

import pytest
import torch

from knowsam_monai.runs import CaseMetrics, ValidationReport
from knowsam_monai.runs.finishing import finish_run
from knowsam_monai.runs.run_record import close_log, open_log
from knowsam_monai.runs.trained_student import read_record
from knowsam_monai.texts import printable
from tests.bundles.conftest import (  # noqa: F401
    CONFIGS,
    CONFIGS_3D,
    Training,
    small_phantom,
    small_volumes,
    without_charts,
)
from tests.runs.report.conftest import write_run
from tests.runs.test_validation_report import NAMES, item, validate

HOSTILE = [
    "$_$",
    "$\\frac{$",
    "=HYPERLINK(1)",
    "+1+2",
    "-2+3",
    "@SUM(A1)",
    "\tcell",
    "\rcell",
    "two\nlines",
    "<script>alert('x')</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}",
    "%s %(name)s {0}",
    "../../etc/passwd",
    "..",
    ".hidden",
    "C:con",
    "a\0b",
    "_left out of legends",
    "'=quoted",
    "\udcff",
    "x" * 300,
]
PRODUCTS = ["validation_cases.csv", "validation_slices", "validation.png", "report.html"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a training has left before it ends."""
    folder = write_run(tmp_path_factory.mktemp("finished") / "run")
    for name in PRODUCTS[:3]:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps({"dataset_dir": None}))
    return folder


@pytest.fixture
def training(finished, tmp_path, root_logging_as_it_was):
    logging.getLogger().setLevel(logging.INFO)
    shutil.copytree(finished, tmp_path / "run")
    report = validate(ValidationReport(tmp_path / "run", NAMES), [item("a", 1), item("b", 2)])
    open_log(tmp_path / "run")
    yield tmp_path / "run", report
    close_log()


def made(folder):
    return [name for name in PRODUCTS if (folder / name).is_file() or list((folder / name).glob("*.png"))]


@pytest.mark.parametrize("broken", PRODUCTS)
@without_charts()
def test_failure_is_one_sentence_and_does_not_prevent_the_other_products(training, broken, capsys, caplog):
    folder, report = training
    if broken == "validation_slices":
        (folder / broken).write_text("a file where the folder belongs")
    else:
        (folder / broken).mkdir()
    finish_run(report, folder, folder / "models")
    assert read_record(folder / "models")["run"] == "run"
    assert set(made(folder)) >= set(PRODUCTS) - {broken}
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage().startswith(f"{broken} could not be written (") and "\n" not in record.getMessage()
    assert (
        "knowsam_monai report " if broken == "report.html" else shlex.join(sys.orig_argv)[:40]
    ) in record.getMessage()
    log = (folder / "log.txt").read_text()
    assert f"{broken} could not be written" in log and log.count("Traceback (most recent call last)") >= 1
    assert "Traceback" not in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize("missing", ["config.json", "results.csv"])
@without_charts()
def test_student_that_cannot_be_published_is_an_error_after_everything_else_was_written(training, missing, caplog):
    folder, report = training
    (folder / missing).unlink()
    with pytest.raises(
        RuntimeError, match=r"published in .*models \(see above\)\. It is intact in .*run the same comm"
    ):
        finish_run(report, folder, folder / "models")
    assert made(folder) == PRODUCTS and not (folder / "models" / "model.json").exists()
    assert "the published student could not be written (FileNotFoundError" in caplog.text


@pytest.mark.parametrize("content, reason", [(None, "FileNotFoundError"), (b"garbage!", r"a run's student but it \(8")])
@without_charts()
def test_missing_or_damaged_student_is_not_published_and_not_called_intact(training, content, reason, caplog):
    folder, report = training
    (folder / "model.pt").unlink()
    if content is not None:
        (folder / "model.pt").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"\(see above\)\. \S+model.pt is missing or damaged; restore it and run "):
        finish_run(report, folder, folder / "models")
    assert made(folder) == PRODUCTS and not (folder / "models").exists()
    assert re.search(rf"the published student could not be written \(.*{reason}", caplog.text)


@pytest.mark.parametrize("is_published", [True, False])
@without_charts()
def test_repeated_run_replaces_only_what_is_older_than_its_student(training, is_published, caplog):
    folder, report = training
    other, models = Path(shutil.copytree(folder, folder.parent / "other")), folder / "models"
    report.load_state_dict(report.state_dict())
    finish_run(validate(ValidationReport(other, NAMES), [item("a", 1)]), other, models)
    if not is_published:  # this run's was trained later, and its disk was full
        os.utime(folder / "model.pt", (time.time() + 60,) * 2)
    finish_run(report, folder, models)
    replaced, still = (
        f"Student: {models / 'model.pt'} (replaces that of other)",
        "is still that of other, which is newer",
    )
    assert (still in caplog.text, replaced in caplog.messages) == (is_published, not is_published)
    assert read_record(models)["run"] == ("other" if is_published else "run")
    (models / "model.pt").unlink()
    finish_run(report, folder, models)
    assert read_record(models)["run"] == "run" and caplog.messages.count(f"Student: {models / 'model.pt'}") == 2


@without_charts()
def test_class_without_a_validation_label_is_left_out_of_the_record(training):
    folder, report = training
    table = "epoch,val_mean_dice,val_mean_dice/a,val_mean_dice/b\n1,nan,nan,nan\n2,0.25,0.25,nan\n3,0.125,0.125,nan\n"
    (folder / "results.csv").write_text(table)
    finish_run(report, folder, folder / "models")
    text = (folder / "models" / "model.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["metrics"] == {"val_mean_dice": 0.25, "val_mean_dice/a": 0.25}


@pytest.mark.parametrize("content", [b"epoch,val_mean_dice\n", b"\xff\x00\x9c" * 50, b""])
@without_charts()
def test_damaged_table_of_validations_does_not_prevent_publishing_the_student(training, content, caplog):
    folder, report = training
    (folder / "results.csv").write_bytes(content)
    finish_run(report, folder, folder / "models")
    assert (folder / "models" / "model.pt").is_file() and (folder / "models" / "model.json").is_file()
    assert "results.csv cannot be read" in caplog.text


def test_nothing_is_published_where_no_validation_has_run(training, caplog):
    folder, _ = training
    finish_run(ValidationReport(folder, NAMES), folder, folder / "models")
    assert "no student to publish" in caplog.text and not (folder / "models").exists()


@pytest.mark.parametrize("enabled, rank", [(False, 0), (True, 1)])
def test_preflight_and_other_ranks_do_nothing(training, enabled, rank, monkeypatch):
    folder, report = training
    monkeypatch.setattr("knowsam_monai.ranks.rank", lambda: rank)
    finish_run(report, folder, folder / "models", enabled)
    assert made(folder) == [] and not (folder / "models").exists()


@without_charts()
def test_picture_that_cannot_be_taken_ends_no_validation(training, caplog):
    folder, report = training
    validate(report, [item("a", affine=torch.zeros(4, 4))])  # a broken header: nowhere in space
    finish_run(report, folder, folder / "models")
    assert "No picture of /private/folder/a.nii.gz: " in caplog.text
    assert (folder / "models" / "model.pt").is_file() and "ERROR" not in {r.levelname for r in caplog.records}


@pytest.mark.parametrize("names", [HOSTILE[first::6] for first in range(6)], ids=ascii)
def test_any_name_is_data(training, names, caplog):
    """As a case's and as a class's, in pictures, tables, the page and the log."""
    folder, _ = training
    report, metrics = ValidationReport(folder, names), CaseMetrics(folder, names)
    for handler in (report, metrics):
        validate(handler, [item(name.replace("/", ":"), offset) for offset, name in enumerate(names, 1)])
    finish_run(report, folder, folder / "models")
    assert made(folder) == PRODUCTS and not [r for r in caplog.records if r.levelname == "ERROR"]
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert all(path.resolve().is_relative_to(folder.parent) for path in folder.parent.rglob("*"))
    for table in ("validation_cases.csv", "metrics_raw.csv", "metrics_summary.csv"):
        with open(folder / table, newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "<img src=x" not in page
    for name in names:
        if name == printable(name) and len(name) < 100:
            assert escape(name).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page


@pytest.mark.parametrize("configs", [CONFIGS, CONFIGS_3D], ids=["knowsam_acdc", "knowsam_la"])
def test_bundle_publishes_its_student_whatever_cases_and_classes_are_called(configs, tmp_path, request):
    data = Path(request.getfixturevalue("small_phantom" if configs == CONFIGS else "small_volumes"))
    shutil.copytree(data.parent, tmp_path / "data")
    datalist = tmp_path / "data" / data.name
    sections = json.loads(datalist.read_text())
    case = sections["validation"][0]
    image = Path(case["image"])
    case["image"] = str(image.with_name("=$_$ <b>" + "".join(image.suffixes)))
    shutil.copy(datalist.parent / image, datalist.parent / case["image"])
    datalist.write_text(json.dumps(sections))
    classes = ["a $_$", "=1+1", "<i>"][: 3 if configs == CONFIGS else 1]
    run = Training(tmp_path / "run", whole=True, configs=configs, dataset_dir=str(datalist), class_names=classes).run()
    assert made(run.output_dir) == PRODUCTS
    assert read_record(run.output_dir / "models")["metrics"].keys() >= {"val_mean_dice", f"val_mean_dice/{classes[0]}"}
    page = (run.output_dir / "report.html").read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page.split("=$_$")[1][:9]


@pytest.mark.parametrize("configs", [CONFIGS, CONFIGS_3D], ids=["knowsam_acdc", "knowsam_la"])
def test_command_of_a_finished_run_leaves_the_newer_student_of_another(configs, tmp_path, request):
    data = request.getfixturevalue("small_phantom" if configs == CONFIGS else "small_volumes")
    for name in ("pa", "pb"):
        options = {"dataset_dir": str(data), "ckpt_dir": str(tmp_path / "models"), "use_sam": False}
        Training(tmp_path / name, whole=True, configs=configs, **options).run()
        assert read_record(tmp_path / "models")["run"] == name
    Training(tmp_path / "pa", whole=True, configs=configs, **options).run()
    assert read_record(tmp_path / "models")["run"] == "pb"
    assert "This run has finished" in (tmp_path / "pa" / "log.txt").read_text()
