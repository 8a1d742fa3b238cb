from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from knowsam_monai.errors import KnowSAMError, root_cause
from knowsam_monai.runs import preparation
from knowsam_monai.runs.preparation import check_student, check_writable, fast_cpu_matmul
from tests.full_disk import full_disk


@pytest.fixture
def usual_precision():
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


def test_fast_route_is_taken_only_where_the_probe_is_exact(usual_precision):
    taken = fast_cpu_matmul()
    assert torch.get_float32_matmul_precision() == ("medium" if taken else "highest")
    assert not taken or preparation._linear_error() <= 1e-5


@pytest.mark.parametrize("rounded", range(3))
def test_route_that_rounds_a_linear_layer_or_either_gradient_is_refused(usual_precision, monkeypatch, caplog, rounded):
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return rounds(x @ weight.T, 0)

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return rounds(grad @ weight, 1), rounds(grad.T @ x, 2)

    def rounds(result, which):
        return result.bfloat16().float() if which == rounded and result.dtype == torch.float32 else result

    monkeypatch.setattr(preparation.F, "linear", Rounded.apply)
    with caplog.at_level(logging.WARNING):
        assert not fast_cpu_matmul()
    assert torch.get_float32_matmul_precision() == "highest" and "off by" in caplog.text


def test_folders_are_made_and_left_empty(tmp_path):
    check_writable(tmp_path / "a" / "b", tmp_path / "c")
    assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "c").iterdir())


def test_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"file.*cannot .*--output_dir"):
        check_writable(tmp_path / "file" / "output")
    with pytest.raises(PermissionError, match="`ckpt_dir` must be a folder that can be written but .*--ckpt_dir"):
        check_writable(tmp_path / "output", tmp_path / "file" / "models")
    with pytest.raises(PermissionError, match="`output` must be a folder that can be written but .*--output "):
        check_writable(tmp_path / "file" / "output", arguments=("output",))


def test_full_disk_is_seen_before_training(tmp_path):
    with (
        full_disk(1000),
        pytest.raises(PermissionError, match=r"`output_dir` must be .* \(File too large\); name anot"),
    ):
        check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


def test_last_line_of_a_wrapped_error_is_its_root_cause():
    code = """
from knowsam_monai.runs.preparation import explain_errors
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


SENTENCE = """
import logging, sys
from knowsam_monai.runs import preparation
preparation.explain_errors()
logging.getLogger().addHandler(logging.FileHandler(sys.argv[1]))
try:
    preparation.check_writable(sys.argv[1] + "/folder")
except PermissionError as error:
    raise RuntimeError("Failed to evaluate") from error
"""


@pytest.mark.parametrize("options,shows_traceback", [([], False), (["-X", "dev"], True)])
def test_mistake_is_a_sentence_without_traceback_which_the_log_has(tmp_path, options, shows_traceback):
    command = [sys.executable, *options, "-c", SENTENCE, str(tmp_path / "log.txt")]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and lines[-1].startswith("PermissionError: `output_dir` must be a folder")
    assert ("Traceback" in result.stderr) == shows_traceback and (len(lines) == 1) != shows_traceback
    log = (tmp_path / "log.txt").read_text()
    assert log.startswith("`output_dir` must be a folder") and "Failed to evaluate" in log


def test_fault_of_this_package_s_code_is_no_sentence(tmp_path):
    with pytest.raises(TypeError) as error:
        check_writable(3.5)
    assert not isinstance(error.value, KnowSAMError)
    with pytest.raises(ValueError) as error:
        check_student(nn.Conv2d(1, 3, 1), 1, ["a"], 3, 8)
    assert isinstance(error.value, KnowSAMError)


def test_known_warnings_are_left_out_and_others_are_not():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        preparation.ignore_known_warnings()
        warnings.warn("`torch.cuda.amp.GradScaler(args...)` is deprecated.", FutureWarning)
        warnings.warn("Detected call of `lr_scheduler.step()` before `optimizer.step()`.", UserWarning)
        warnings.warn("`torch.cuda.amp.autocast(args...)` is deprecated.", FutureWarning)
    assert [str(one.message) for one in caught] == ["`torch.cuda.amp.autocast(args...)` is deprecated."]


def test_sentence_of_this_package_is_the_root_cause_and_not_what_the_system_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError) as error:
        try:
            check_writable(tmp_path / "file" / "output")
        except PermissionError as sentence:
            raise RuntimeError("Failed to evaluate") from sentence
    assert isinstance(root_cause(error.value), PermissionError)
    assert str(root_cause(error.value)).startswith("`output_dir` must be a folder")


def test_last_cause_is_the_root_of_an_error_from_elsewhere():
    error = RuntimeError("Failed to evaluate")
    error.__cause__ = KeyError("bottom")
    assert root_cause(error) is error.__cause__ and root_cause(error.__cause__) is error.__cause__


def test_student_that_fits_is_left_in_its_mode_and_without_gradients():
    student = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    mean = student[1].running_mean.clone()
    check_student(student, in_channels=2, class_names=["a", "b"], num_classes=3, image_size=8)
    assert student.training and torch.equal(student[1].running_mean, mean)
    check_student(student.eval(), in_channels=2, class_names=["a", "b"], num_classes=3, image_size=8)
    assert not student.training and all(parameter.grad is None for parameter in student.parameters())


class Pair(nn.Module):
    def forward(self, image):
        return image, image


@pytest.mark.parametrize(
    "student,change,message",
    [
        (nn.Conv2d(1, 3, 1), {"class_names": ["a"]}, r"`class_names` must name 2 classes, .* but is \['a'\]"),
        (
            nn.Conv2d(4, 3, 1),
            {},
            r"take images of `in_channels` and `image_size`, \(1, 1, 8, 8\), but Conv2d does not: ",
        ),
        (
            nn.Conv2d(1, 2, 1),
            {},
            r"give logits \(1, 3, 8, 8\) .* but Conv2d gives \(1, 2, 8, 8\); set its output channels",
        ),
        (nn.Conv2d(1, 1, 1), {}, "a network of one sigmoid channel to 2"),
        (nn.Conv2d(1, 3, 3), {}, r"but Conv2d gives \(1, 3, 6, 6\)"),
        (Pair(), {}, "but Pair gives a tuple"),
    ],
)
def test_student_that_does_not_fit_the_config_is_one_clear_error(student, change, message):
    options = {"in_channels": 1, "class_names": ["a", "b"], "num_classes": 3, "image_size": 8, **change}
    with pytest.raises(ValueError, match=message):
        check_student(student, **options)
    assert student.training
