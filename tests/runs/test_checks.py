from __future__ import annotations

import pytest
import torch
from torch import nn

from knowsam_monai.runs.checks import check_student, check_writable
from tests.full_disk import full_disk


def test_folders_are_made_and_left_empty(tmp_path):
    check_writable(output_dir=tmp_path / "a" / "b", ckpt_dir=tmp_path / "c")
    assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "c").iterdir())


def test_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"file.*is not .*--output_dir"):
        check_writable(output_dir=tmp_path / "file" / "output")
    with pytest.raises(PermissionError, match="`ckpt_dir` must be a writable folder but .*--ckpt_dir"):
        check_writable(output_dir=tmp_path / "output", ckpt_dir=tmp_path / "file" / "models")
    with pytest.raises(PermissionError, match="`output` must be a writable folder but .*--output "):
        check_writable(output=tmp_path / "file" / "output")


def test_full_disk_is_seen_before_training(tmp_path):
    with (
        full_disk(1000),
        pytest.raises(PermissionError, match=r"`output_dir` must be .* \(File too large\); choose anot"),
    ):
        check_writable(output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


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
            r"accept images of `in_channels` and `image_size`, \(1, 1, 8, 8\), but Conv2d does not: ",
        ),
        (
            nn.Conv2d(1, 2, 1),
            {},
            r"return logits \(1, 3, 8, 8\) .* but Conv2d returns \(1, 2, 8, 8\); set its output channels",
        ),
        (nn.Conv2d(1, 1, 1), {}, "2 instead of one sigmoid channel"),
        (nn.Conv2d(1, 3, 3), {}, r"but Conv2d returns \(1, 3, 6, 6\)"),
        (Pair(), {}, "but Pair returns a tuple"),
    ],
)
def test_student_that_does_not_fit_the_config_is_one_clear_error(student, change, message):
    options = {"in_channels": 1, "class_names": ["a", "b"], "num_classes": 3, "image_size": 8, **change}
    with pytest.raises(ValueError, match=message):
        check_student(student, **options)
    assert student.training
