from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from knowsam_monai.runs.messages import ignore_known_warnings


def test_last_line_of_a_wrapped_error_is_its_root_cause():
    code = """
from knowsam_monai.runs.messages import explain_errors
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


def test_exit_that_became_an_error_keeps_its_code(tmp_path):
    """MONAI imports components with pydoc, which turns the exit of a signal during an import into an error."""
    (tmp_path / "stopped.py").write_text("raise SystemExit(143)")
    code = f"""
import sys
from pydoc import locate
from knowsam_monai.runs.messages import explain_errors
sys.path.insert(0, {str(tmp_path)!r})
explain_errors()
locate("stopped.Component")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (143, "")


SENTENCE = """
import logging, sys
from knowsam_monai.errors import KnowSAMPermissionError
from knowsam_monai.runs.messages import explain_errors
explain_errors()
logging.getLogger().addHandler(logging.FileHandler(sys.argv[1]))
try:
    raise KnowSAMPermissionError("`output_dir` must be a writable folder.")
except PermissionError as error:
    raise RuntimeError("Failed to evaluate") from error
"""


@pytest.mark.parametrize("options,shows_traceback", [([], False), (["-X", "dev"], True)])
def test_mistake_is_a_sentence_without_traceback_which_the_log_has(tmp_path, options, shows_traceback):
    command = [sys.executable, *options, "-c", SENTENCE, str(tmp_path / "log.txt")]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and lines[-1].startswith("PermissionError: `output_dir` must be a writable folder")
    assert ("Traceback" in result.stderr) == shows_traceback and (len(lines) == 1) != shows_traceback
    log = (tmp_path / "log.txt").read_text()
    assert log.startswith("`output_dir` must be a writable folder") and "Failed to evaluate" in log


def test_known_warnings_are_left_out_and_others_are_not():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ignore_known_warnings()
        warnings.warn("`torch.cuda.amp.GradScaler(args...)` is deprecated.", FutureWarning)
        warnings.warn("Detected call of `lr_scheduler.step()` before `optimizer.step()`.", UserWarning)
        warnings.warn("`torch.cuda.amp.autocast(args...)` is deprecated.", FutureWarning)
    assert [str(warning.message) for warning in caught] == ["`torch.cuda.amp.autocast(args...)` is deprecated."]
