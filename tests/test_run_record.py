from __future__ import annotations

import logging
import subprocess

import pytest
from monai.bundle import ConfigParser

from knowsam_monai import __version__
from knowsam_monai.run_record import close_log, git_revision, read_starts, record_run


@pytest.fixture(autouse=True)
def closed_log():
    yield
    close_log()


def run(folder, **config):
    """`initialize` of a bundle in small."""
    parser = ConfigParser({"imports": ["$import knowsam_monai.run_record as run_record"], "lr": 0.1})
    parser.update(
        {"initialize": "$run_record.record_run(@folder, 5, @resume)", "folder": str(folder), "resume": True} | config
    )
    parser.get_parsed_content("initialize")
    return parser


def test_config_as_run_has_the_overrides_and_runs_again(tmp_path):
    run(tmp_path / "run", lr=0.5, note={"_target_": "x.Y", "of": "@lr"})
    again = ConfigParser()
    again.read_config(str(tmp_path / "run" / "config.json"))
    assert again["lr"] == 0.5 and again["note"] == {"_target_": "x.Y", "of": "@lr"} and "_meta_" not in again
    again.get_parsed_content("initialize")
    assert len(read_starts(tmp_path / "run")) == 2


def test_each_start_is_noted_until_a_run_begins_anew(tmp_path):
    run(tmp_path)
    run(tmp_path)
    first, second = read_starts(tmp_path)
    assert first["seed"] == 5 and first["timestamp"] <= second["timestamp"] and "pytest" in first["command"]
    assert first["versions"]["knowsam_monai"] == __version__ and {"python", "torch", "monai"} <= set(first["versions"])
    run(tmp_path, resume=False)
    assert len(read_starts(tmp_path)) == 1


def test_log_has_what_is_logged_from_there_on_and_one_run_at_a_time(tmp_path):
    logger = logging.getLogger("knowsam_monai.test")
    logger.warning("before")
    run(tmp_path / "a")
    logger.warning("of a")
    run(tmp_path / "b")
    logger.warning("of b")
    close_log()
    logger.warning("after")
    lines = [(tmp_path / name / "log.txt").read_text().splitlines() for name in "ab"]
    assert [[line.split("  ", 1)[1] for line in one] for one in lines] == [["of a"], ["of b"]]


@pytest.mark.parametrize("rank,enabled", [("1", True), ("0", False)], ids=["second process", "preflight"])
def test_nothing_is_written_by_other_processes_and_by_a_preflight(tmp_path, monkeypatch, rank, enabled):
    monkeypatch.setenv("RANK", rank)
    record_run(tmp_path / "run", enabled=enabled)
    assert not (tmp_path / "run").exists()


def test_outside_a_config_the_rest_is_written(tmp_path):
    record_run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "log.txt"}


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
