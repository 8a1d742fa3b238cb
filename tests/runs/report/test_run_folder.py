from __future__ import annotations

import io
import json
import time

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tensorboard.summary.writer.record_writer import RecordWriter

from knowsam_monai.__main__ import main
from knowsam_monai.runs.report import read_run
from tests.runs.report.conftest import TERMS, write_run, write_scalars

pytestmark = pytest.mark.usefixtures("root_logging_as_it_was")


def test_run_is_what_its_writers_wrote(run_folder):
    run = read_run(run_folder)
    assert run.name == "my run" and run.starts[0]["seed"] == 7 and run.config["train"] == {"lr": [0.1, 0.2]}
    assert set(run.terms) == set(TERMS)
    assert run.terms["loss"] == ([10, 20, 30], pytest.approx([0.3, 0.15, 0.1]))
    assert run.structures == ["right ventricle", "myocardium"]
    assert run.validation_curve("val_mean_dice") == ([1, 2, 3], [0.25, 0.875, 0.75])
    assert run.validation_curve("val_teacher_dice") == ([2, 3], [0.5, 0.5])
    assert run.validation_curve("val_mean_dice/myocardium") == ([], [])
    assert [(row["case"], row["model"]) for row in run.cases[:2]] == [("a", "student"), ("a", "teacher")]


def test_slices_tell_case_structure_and_which_is_the_worst(run_folder):
    slices = read_run(run_folder).slices
    assert [image.kind for image in slices] == ["best case", "between best and median", "worst slice"]
    assert slices[0].title == "a, slice 3 of 3" and slices[0].dice == {"right ventricle": 1.0, "myocardium": 1.0}
    assert slices[-1].title.startswith("c, ") and slices[-1].dice["right ventricle"] < 1
    assert all(image.png.startswith(b"\x89PNG") for image in slices)


def test_step_that_was_repeated_counts_once_with_its_later_value(run_folder):
    time.sleep(0.05)
    write_scalars(run_folder, [20, 30, 40], scale=2.0)  # interrupted after 30, resumed from 10
    assert read_run(run_folder).terms["loss"] == ([10, 20, 30, 40], pytest.approx([0.3, 0.3, 0.2, 0.15]))


def test_steps_of_a_run_before_this_one_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run", started=time.time() + 60)
    assert read_run(folder).terms == {}


def test_run_without_anything_but_validations_can_be_read(tmp_path):
    (tmp_path / "results.csv").write_text("epoch,val_mean_dice\n1,0.5\n")
    run = read_run(tmp_path)
    assert run.validation_curve("val_mean_dice") == ([1], [0.5])
    assert not (run.terms or run.cases or run.slices or run.starts or run.config or run.structures)


CASES, SLICE = "validation_cases.csv", "validation_slices/1.png"
EVENTS = "tensorboard/train/events.out.tfevents.9.host"


def png(description):
    """A picture as the report's writer writes them, but for its description."""
    fields, file = PngInfo(), io.BytesIO()
    fields.add_text("Description", description)
    Image.new("L", (64, 64), 7).save(file, "png", pnginfo=fields)
    return file.getvalue()


def event_record(event):
    """A whole record of an event file, its checksums included."""
    file = io.BytesIO()
    RecordWriter(file).write(event)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("run.json", b"{}", "it has no list of `starts`"),
        ("run.json", b'{"starts": [{"time": "2026-01-02"}]}', "it has no 'timestamp'"),
        ("config.json", b"{", "Expecting property name"),
        ("config.json", b"[1]", "cannot convert"),
        ("results.csv", b"epoch\none\n", "could not convert string to float: 'one'"),
        ("results.csv", b"val_mean_dice\n0.5\n", "it has no 'epoch'"),
        (CASES, b"case,model,mean\na,student,high\n", "could not convert string to float: 'high'"),
        (CASES, b"case,model,mean\na,student,0.5\nb,stu", "row 2 has more or fewer columns"),
        (CASES, b"model,mean\nstudent,0.5\n", "it has no 'case'"),
        (CASES, b"\xff\xfe\x00", "can't decode byte"),
        (SLICE, b"no picture", "cannot identify image file"),
        (SLICE, png("{}")[:90], "truncated"),
        (SLICE, png("{"), "Expecting property name"),
        (SLICE, png('{"myocardium": "good"}'), "could not convert string to float: 'good'"),
        (EVENTS, event_record(b"\xff\xff"), "Error parsing message"),
    ],
)
def test_broken_file_is_one_sentence_that_names_it(run_folder, name, content, reason, capsys):
    (run_folder / name).write_bytes(content)
    assert main(["report", str(run_folder)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: `folder` must have intact files but ") and message.count("\n") == 1
    assert f"{run_folder / name} cannot be read (" in message and reason in message


def test_event_file_that_is_torn_counts_up_to_the_tear(run_folder):
    file = next((run_folder / "tensorboard" / "train").glob("events*"))
    whole = read_run(run_folder).terms["loss"]
    file.write_bytes(file.read_bytes()[:-20])  # within the last record, which is of the last of TERMS
    terms = read_run(run_folder).terms
    assert terms["loss"] == whole and terms[list(TERMS)[-1]][0] == whole[0][:-1]


def test_folder_of_no_run_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "a.json").write_text(json.dumps({}))
    with pytest.raises(FileNotFoundError, match="has neither results.csv nor tensorboard/"):
        read_run(tmp_path)
