from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from knowsam_monai import __version__
from knowsam_monai.runs.run_record import close_log, git_revision, open_log, read_starts, versions, write_record
from tests.full_disk import full_disk


@pytest.fixture(autouse=True)
def closed_log():
    yield
    close_log()


def test_each_start_is_noted_until_a_run_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "monai.bundle", "run"])
    write_record(tmp_path, {"lr": 0.1}, seed=5)
    write_record(tmp_path, seed=5)
    first, second = read_starts(tmp_path)
    assert first["seed"] == 5 and first["timestamp"] <= second["timestamp"]
    assert first["command"] == "python -m monai.bundle run"
    assert first["versions"] == versions() and versions()["knowsam_monai"] == __version__
    assert {"python", "torch", "monai", "machine"} <= set(versions())
    write_record(tmp_path, resume=False)
    assert len(read_starts(tmp_path)) == 1 and read_starts(tmp_path / "nowhere") == []


@pytest.mark.parametrize("content", ["", "{", '{"starts": [', "[]", "{}", '{"starts": 3}', '{"starts": [4]}', "\udcff"])
def test_torn_record_begins_anew_with_a_warning(tmp_path, caplog, content):
    (tmp_path / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    write_record(tmp_path, seed=5)
    assert [start["seed"] for start in read_starts(tmp_path)] == [5]
    assert "run.json must list the run's starts but can't be read" in caplog.text


def test_full_disk_leaves_the_record_before(tmp_path):
    write_record(tmp_path, {"lr": 0.1}, seed=5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(50), pytest.raises(OSError, match="File too large"):
        write_record(tmp_path, seed=6)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("obstacle", ["folder", "no folder"])
def test_log_that_cannot_be_opened_is_one_sentence(tmp_path, obstacle):
    if obstacle == "folder":
        (tmp_path / "run" / "log.txt").mkdir(parents=True)
    else:
        (tmp_path / "run").touch()
    with pytest.raises(PermissionError, match="`output_dir` must be a folder that can be written but .*log.txt cannot"):
        open_log(tmp_path / "run")


def test_log_that_can_not_be_written_any_more_is_told_once_and_the_run_goes_on(tmp_path, caplog, capsys):
    open_log(tmp_path)
    with full_disk(2**15):
        for _ in range(3):
            logging.getLogger("knowsam_monai.test").warning("x" * 2**17)
    assert caplog.text.count("log.txt can't be written any more ([Errno 27] File too large)") == 1
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
    found = [[line.split("  ", 1)[1] for line in one] for one in lines]
    assert found == [["of a, resume is True"] * 2, ["of b, resume is False"]]


@pytest.mark.parametrize("rank,enabled", [("1", True), ("0", False)], ids=["second process", "preflight"])
def test_other_processes_and_a_preflight_open_no_log(tmp_path, monkeypatch, rank, enabled):
    monkeypatch.setenv("RANK", rank)
    open_log(tmp_path / "run", enabled=enabled)
    assert not (tmp_path / "run").exists()


def test_revision_is_of_the_tree_that_the_file_is_part_of(tmp_path):
    assert git_revision(tmp_path / "code.py") is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "code.py").write_text("")
    git("init")
    git("add", "code.py")
    git("commit", "-m", "x")
    revision = git_revision(tmp_path / "code.py")
    assert len(revision) == 40 and int(revision, 16)
    (tmp_path / "code.py").write_text("changed")
    assert git_revision(tmp_path / "code.py") == f"{revision}-dirty"
    (tmp_path / "installed.py").write_text("")  # in the repository's folder, but no part of it
    assert git_revision(tmp_path / "installed.py") is None
