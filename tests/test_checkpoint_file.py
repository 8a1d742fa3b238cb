from __future__ import annotations

import os
import stat

import pytest
import torch

from knowsam_monai.files import copy_whole, remove_parts, save_checkpoint, write_csv, write_whole
from tests.full_disk import full_disk

SMALL, LARGE = {"weight": torch.zeros(2)}, {"weight": torch.rand(500_000)}


def test_file_is_loaded_without_running_code_and_others_may_read_it(tmp_path):
    save_checkpoint(SMALL, tmp_path / "new" / "a.pt")
    assert torch.equal(torch.load(tmp_path / "new" / "a.pt", weights_only=True)["weight"], SMALL["weight"])
    assert stat.S_IMODE((tmp_path / "new" / "a.pt").stat().st_mode) == 0o666 & ~_umask()


def test_full_disk_is_one_sentence_and_leaves_the_file_before(tmp_path):
    save_checkpoint(SMALL, tmp_path / "a.pt")
    sentence = "must have room for a.pt but it could not be written to .*; free some space"
    with full_disk(), pytest.raises(RuntimeError, match=sentence):
        save_checkpoint(LARGE, tmp_path / "a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert torch.equal(torch.load(tmp_path / "a.pt")["weight"], SMALL["weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_never_written(tmp_path, value):
    content = {"good": torch.ones(2), "count": torch.tensor(3), "state": {0: [torch.tensor([1.0, value])]}}
    with pytest.raises(RuntimeError, match=r"must be finite in a checkpoint but state is not"):
        save_checkpoint(content, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_writer_that_fails_half_way_leaves_the_file_before(tmp_path):
    (tmp_path / "a").write_bytes(b"before")

    def write(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", write)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_table_has_the_columns_of_all_rows(tmp_path):
    write_csv(tmp_path / "folder" / "a.csv", [{"epoch": 1, "dice": 0.5}, {"epoch": 2, "teacher": "a,b"}])
    assert (tmp_path / "folder" / "a.csv").read_bytes() == b'epoch,dice,teacher\r\n1,0.5,\r\n2,,"a,b"\r\n'
    assert [path.name for path in tmp_path.rglob("*.*")] == ["a.csv"]


def test_copy_takes_the_place_of_an_older_one_and_of_itself_nothing(tmp_path):
    source, target = tmp_path / "a", tmp_path / "folder" / "b"
    source.write_bytes(b"content")
    copy_whole(source, target)
    assert target.read_bytes() == b"content"
    copy_whole(source, source)
    assert source.read_bytes() == b"content"


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    def die(file):
        parts.extend(tmp_path.rglob("*"))
        raise KeyboardInterrupt

    parts = []
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "folder" / "a.pt", die)
    parts[1].touch()  # as a SIGKILL leaves it
    theirs = {tmp_path / name for name in ("a.pt", "video.mp4.part", "a.pt.x1.part")}
    for path in theirs:
        path.touch()
    remove_parts(tmp_path)
    assert set(tmp_path.iterdir()) == {*theirs, tmp_path / "folder"} and not list((tmp_path / "folder").iterdir())


def test_writing_leaves_the_umask_of_the_process_alone(tmp_path, monkeypatch):
    before = _umask()
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("other threads write with it"))
    save_checkpoint(SMALL, tmp_path / "a.pt")
    assert stat.S_IMODE((tmp_path / "a.pt").stat().st_mode) == 0o666 & ~before


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
