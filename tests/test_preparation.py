from __future__ import annotations

import subprocess
import sys

import pytest

from knowsam_monai.preparation import check_writable


def test_folders_are_made_and_left_empty(tmp_path):
    check_writable(tmp_path / "a" / "b", tmp_path / "c")
    assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "c").iterdir())


def test_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"file.*cannot .*--output_dir"):
        check_writable(tmp_path / "file" / "output")


def test_last_line_of_a_wrapped_error_is_its_root_cause():
    code = """
from knowsam_monai.preparation import explain_errors
explain_errors(); explain_errors()
try:
    raise ValueError("`dataset_dir` must be a folder.")
except ValueError as error:
    raise RuntimeError("Failed to evaluate") from error
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and lines[-1] == "ValueError: `dataset_dir` must be a folder."
    assert result.stderr.count("ValueError: `dataset_dir`") == 2  # once in the traceback, once as the last line
