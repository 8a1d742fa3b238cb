from __future__ import annotations

import pytest
from torch import nn

from knowsam_monai.errors import KnowSAMError, root_cause
from knowsam_monai.runs.checks import check_student, check_writable


def test_fault_of_this_package_s_code_is_no_sentence(tmp_path):
    with pytest.raises(TypeError) as error:
        check_writable(output_dir=3.5)
    assert not isinstance(error.value, KnowSAMError)
    with pytest.raises(ValueError) as error:
        check_student(nn.Conv2d(1, 3, 1), 1, ["a"], 3, 8)
    assert isinstance(error.value, KnowSAMError)


def test_sentence_of_this_package_is_the_root_cause_and_not_what_the_system_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError) as error:
        try:
            check_writable(output_dir=tmp_path / "file" / "output")
        except PermissionError as sentence:
            raise RuntimeError("Failed to evaluate") from sentence
    assert isinstance(root_cause(error.value), PermissionError)
    assert str(root_cause(error.value)).startswith("`output_dir` must be a writable folder")


def test_last_cause_is_the_root_of_an_error_from_elsewhere():
    error = RuntimeError("Failed to evaluate")
    error.__cause__ = KeyError("bottom")
    assert root_cause(error) is error.__cause__ and root_cause(error.__cause__) is error.__cause__
