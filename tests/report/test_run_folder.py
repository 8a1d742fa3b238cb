from __future__ import annotations

import json
import time

import pytest

from knowsam_monai.report import read_run

from .conftest import TERMS, write_run, write_scalars


def test_run_is_what_its_writers_wrote(run_folder):
    run = read_run(run_folder)
    assert run.name == "my run" and run.starts[0]["seed"] == 7 and run.config["train"] == {"lr": [0.1, 0.2]}
    assert set(run.terms) == set(TERMS)
    assert run.terms["loss"] == ([10, 20, 30], pytest.approx([0.3, 0.15, 0.1]))
    assert run.structures == ["right ventricle", "myocardium"]
    assert run.validation_curve("val_mean_dice") == ([1, 2, 3], [0.25, 0.875, 0.75])
    assert run.validation_curve("val_teacher_dice") == ([2, 3], [0.5, 0.5])
    assert run.validation_curve("val_mean_dice/myocardium") == ([], [])
    assert [(row["case"], row["model"]) for row in run.cases[:2]] == [("a", "student"), ("a", "SAM teacher")]


def test_slices_tell_case_structure_and_which_is_the_worst(run_folder):
    slices = read_run(run_folder).slices
    assert [one.kind for one in slices] == ["best case", "between best and median", "worst slice"]
    assert slices[0].title == "a, slice 3 of 3" and slices[0].dice == {"right ventricle": 1.0, "myocardium": 1.0}
    assert slices[-1].title.startswith("c, ") and slices[-1].dice["right ventricle"] < 1
    assert all(one.png.startswith(b"\x89PNG") for one in slices)


def test_step_that_was_repeated_counts_once_with_its_later_value(run_folder):
    time.sleep(0.05)
    write_scalars(run_folder, [20, 30, 40], scale=2.0)  # broken off after 30, gone on from 10
    assert read_run(run_folder).terms["loss"] == ([10, 20, 30, 40], pytest.approx([0.3, 0.3, 0.2, 0.15]))


def test_steps_of_a_run_before_this_one_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run", started=time.time() + 60)
    assert read_run(folder).terms == {}


def test_run_without_anything_but_validations_can_be_read(tmp_path):
    (tmp_path / "results.csv").write_text("epoch,val_mean_dice\n1,0.5\n")
    run = read_run(tmp_path)
    assert run.validation_curve("val_mean_dice") == ([1], [0.5])
    assert not (run.terms or run.cases or run.slices or run.starts or run.config or run.structures)


@pytest.mark.parametrize("name,content", [("run.json", "{}"), ("config.json", "{"), ("results.csv", "epoch\none\n")])
def test_broken_file_is_one_sentence_with_the_folder(run_folder, name, content):
    (run_folder / name).write_text(content)
    with pytest.raises(ValueError, match="The record in .*my run must be whole"):
        read_run(run_folder)


def test_folder_of_no_run_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "a.json").write_text(json.dumps({}))
    with pytest.raises(FileNotFoundError, match="has neither results.csv nor tensorboard/"):
        read_run(tmp_path)
