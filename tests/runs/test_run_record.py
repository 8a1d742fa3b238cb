from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser

from knowsam_monai import __version__
from knowsam_monai.runs import RunRecord
from knowsam_monai.runs.run_record import close_log, git_revision, open_log, read_starts, versions
from tests.full_disk import full_disk


def run(*handlers):
    engine = Engine(lambda engine, batch: None)
    for handler in handlers:
        handler.attach(engine)
    engine.run([0], max_epochs=1)


def built_by_a_config(folder, **changes):
    """The handler of a bundle's config in small, with an override."""
    handler = {"_target_": "knowsam_monai.runs.RunRecord", "output_dir": str(folder), "seed": 5, "resume": True}
    parser = ConfigParser({"lr": 0.1, "rate": "$@lr * 2", "handler": {**handler, **changes}})
    parser["lr"] = 0.5  # the command line
    return parser.get_parsed_content("handler")


@pytest.fixture(autouse=True)
def closed_log():
    yield
    close_log()


def test_each_start_is_recorded_until_a_run_starts_over(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "monai.bundle", "run", "--class_names", "['a', 'b']"])
    run(RunRecord(tmp_path, seed=5))
    run(RunRecord(tmp_path, seed=5))
    first, second = read_starts(tmp_path)
    assert first["seed"] == 5 and first["timestamp"] <= second["timestamp"]
    assert first["command"] == """python -m monai.bundle run --class_names "['a', 'b']\""""
    assert first["versions"] == versions() and versions()["knowsam_monai"] == __version__
    assert {"python", "torch", "monai", "machine"} <= set(versions())
    run(RunRecord(tmp_path, resume=False))
    assert len(read_starts(tmp_path)) == 1 and read_starts(tmp_path / "nowhere") == []


@pytest.mark.parametrize("content", ["", "{", '{"starts": [', "[]", "{}", '{"starts": 3}', '{"starts": [4]}', "\udcff"])
def test_damaged_record_is_replaced_with_a_warning(tmp_path, caplog, content):
    (tmp_path / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    run(RunRecord(tmp_path, seed=5))
    assert [start["seed"] for start in read_starts(tmp_path)] == [5]
    assert "run.json must list the run's starts but cannot be read" in caplog.text


def test_config_as_run_has_the_overrides_and_can_be_parsed_again(tmp_path):
    run(built_by_a_config(tmp_path / "run"))
    again = ConfigParser()
    again.read_config(str(tmp_path / "run" / "config.json"))
    assert again.get_parsed_content("rate") == 1.0
    assert set(json.loads((tmp_path / "run" / "config.json").read_text())) == {"lr", "rate", "handler"}
    assert [start["seed"] for start in read_starts(tmp_path / "run")] == [5]


class Refuses:
    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine):
        raise ValueError("another run's folder")


@pytest.mark.parametrize("cause", ["full disk", "refused start"])
def test_start_that_fails_leaves_the_record_unchanged(tmp_path, cause):
    run(built_by_a_config(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if cause == "full disk":
        with full_disk(50), pytest.raises(OSError, match="File too large"):
            run(built_by_a_config(tmp_path, seed=6))
    else:
        with pytest.raises(ValueError, match="another run's folder"):
            run(Refuses(), built_by_a_config(tmp_path, seed=6))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_outside_a_config_only_the_starts_are_recorded(tmp_path):
    run(RunRecord(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("obstacle", ["folder", "no folder"])
def test_log_that_cannot_be_opened_is_one_sentence(tmp_path, obstacle):
    if obstacle == "folder":
        (tmp_path / "run" / "log.txt").mkdir(parents=True)
    else:
        (tmp_path / "run").touch()
    with pytest.raises(PermissionError, match="`output_dir` must be writable but .*log.txt is not"):
        open_log(tmp_path / "run")


def test_log_that_cannot_be_written_anymore_is_reported_once_and_the_run_continues(
    tmp_path, caplog, capsys, root_logging_as_it_was
):
    logging.getLogger().handlers[:] = [caplog.handler]  # the screen of an earlier test is a file too
    open_log(tmp_path)
    with full_disk(2**15):
        for _ in range(3):
            logging.getLogger("knowsam_monai.test").warning("x" * 2**17)
    assert caplog.text.count("log.txt cannot be written anymore ([Errno 27] File too large)") == 1
    assert "Traceback" not in capsys.readouterr().err


def test_log_has_what_is_logged_from_there_on_and_one_run_at_a_time(tmp_path):
    logger = logging.getLogger("knowsam_monai.test")
    logger.warning("before")
    for name, resume in (("a", True), ("b", True), ("a", True), ("b", False)):
        open_log(tmp_path / name, resume=resume)
        logger.warning("of %s, resume is %s", name, resume)
    close_log()
    logger.warning("after")
    lines = [(tmp_path / name / "log.txt").read_text().splitlines() for name in "ab"]
    found = [[line.split("  ", 1)[1] for line in log] for log in lines]
    assert found == [["of a, resume is True"] * 2, ["of b, resume is False"]]


def test_revision_is_of_the_tree_that_the_file_is_part_of(tmp_path):
    assert git_revision(tmp_path / "code.py") is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    model = tmp_path / "bundles" / "knowsam_acdc" / "models" / "model.pt"
    model.parent.mkdir(parents=True)
    for path in (tmp_path / "code.py", model):
        path.write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    revision = git_revision(tmp_path / "code.py")
    assert len(revision) == 40 and int(revision, 16)
    model.write_text("of another training")  # as every training of the shipped bundle writes it
    assert git_revision(tmp_path / "code.py") == revision
    (tmp_path / "code.py").write_text("changed")
    assert git_revision(tmp_path / "code.py") == f"{revision}-dirty"
    (tmp_path / "installed.py").write_text("")  # in the repository's folder, but no part of it
    assert git_revision(tmp_path / "installed.py") is None
