from __future__ import annotations

import errno
import fcntl
import os
import re
import time

import pytest
import torch

from knowsam_monai.runs.lock import lock_folder, unlock_folder
from knowsam_monai.runs.starting import end_run, start_run
from tests.processes import start, wait_for


@pytest.fixture(autouse=True)
def unlocked():
    yield
    unlock_folder()


def hold(folder):
    lock_folder(folder)
    time.sleep(300)


@pytest.fixture
def holder(tmp_path):
    """Another process, which has locked `tmp_path / "run"`."""
    process = start(tmp_path / "console.txt", hold, tmp_path / "run")
    assert wait_for((tmp_path / "run" / ".lock.json").exists, process)
    yield process
    process.kill()
    process.join()


def test_second_run_names_the_process_that_uses_the_folder_until_it_is_killed(tmp_path, holder):
    sentence = rf"{tmp_path}/run is in use by process {holder.pid} on \S+ since \d{{4}}-.* \(.*python.*\); wait"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=sentence):
            lock_folder(tmp_path / "run")
    lock_folder(tmp_path / "another")
    holder.kill()
    holder.join()
    assert (tmp_path / "run" / ".lock.json").exists()
    lock_folder(tmp_path / "run")


def test_torn_note_of_the_holder_is_left_out(tmp_path, holder):
    (tmp_path / "run" / ".lock.json").write_text("{")
    with pytest.raises(RuntimeError, match=re.escape("is in use by another process; wait")):
        lock_folder(tmp_path / "run")


def test_next_run_of_the_same_process_takes_over(tmp_path):
    for name in ("a", "a", "b"):
        lock_folder(tmp_path / name)
    process = start(tmp_path / "console.txt", hold, tmp_path / "a")
    assert wait_for((tmp_path / "a" / ".lock.json").exists, process)
    process.kill()
    unlock_folder()
    assert not (tmp_path / "b" / ".lock.json").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_only_warned_of(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock_folder(tmp_path / "run")
    unlock_folder()
    assert f"run cannot be locked ({os.strerror(number)}), so nothing keeps a second run out of it" in caplog.text
    assert not (tmp_path / "run" / ".lock.json").exists()


def test_other_errors_of_the_lock_are_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "input/output error")))
    with pytest.raises(OSError, match="input/output"):
        lock_folder(tmp_path / "run")


@pytest.mark.parametrize("rank, preflight", [(1, False), (0, True)], ids=["second process", "preflight"])
def test_other_processes_and_a_preflight_take_no_lock_and_open_no_log(tmp_path, holder, monkeypatch, rank, preflight):
    monkeypatch.setattr("knowsam_monai.ranks.rank", lambda: rank)
    before = sorted((tmp_path / "run").iterdir())
    start_run(tmp_path / "run", tmp_path / "models", torch.device("cpu"), preflight=preflight)
    end_run()
    assert sorted((tmp_path / "run").iterdir()) == before
