from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNet
from torch import nn

from knowsam_monai.runs.checks import check_data, check_student, check_teacher_input, check_writable
from knowsam_monai.teachers import NetworkTeacher, SAMTeacher, SliceTeacher
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


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_refuses_fewer_validation_volumes_than_processes(monkeypatch, rank):
    monkeypatch.setattr("knowsam_monai.ranks.world_size", lambda: 2)
    monkeypatch.setattr("knowsam_monai.ranks.rank", lambda: rank)
    with pytest.raises(ValueError, match=r"`validation` .* each of the 2 processes but has 1; .* start fewer"):
        check_data({"labeled": [], "validation": [{"image": "a.nii", "label": "b.nii"}]}, num_classes=2)


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


def network(spatial_dims=2, out_channels=3):
    options = {"channels": (4, 8, 8), "strides": (2, 2), "in_channels": 1, "out_channels": out_channels}
    return UNet(spatial_dims=spatial_dims, **options)


def sam(**options):
    return SAMTeacher(num_classes=3, image_size=32, variant="stand_in", trainable="all", **options)


@pytest.mark.parametrize(
    "teacher, size",
    [
        (lambda: NetworkTeacher(network(), channels=3), 24),
        (lambda: NetworkTeacher(network(), channels=3, patch_size=(16, 16)), 42),
        (lambda: NetworkTeacher(network(3), channels=3), (16, 16, 8)),
        (lambda: SliceTeacher(NetworkTeacher(network(), channels=3), axes=(0, -1)), (16, 24, 8)),
        (sam, 42),
        (lambda: SliceTeacher(sam(), axes=(0, -1), slices=4), (16, 24, 6)),
    ],
)
def test_teacher_that_fits_is_left_as_it_was(teacher, size, caplog):
    teacher = teacher()
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    check_teacher_input(teacher, in_channels=1, num_classes=3, image_size=size)
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    if isinstance(teacher, SAMTeacher):  # its warning about the first images is still to come
        teacher(torch.full((1, 1, 8, 8), 9.0) * torch.rand(8), torch.zeros(1, 3, 8, 8))
        assert "expects images in 0..1" in caplog.text


@pytest.mark.parametrize(
    "teacher, size, message",
    [
        (
            lambda: NetworkTeacher(network(), channels=3),
            30,
            r"`in_channels` and `image_size`, \(1, 1, 30, 30\), .* but NetworkTeacher fails: `network` must take",
        ),
        (lambda: SliceTeacher(NetworkTeacher(network(), channels=3), axes=(0, -1)), (16, 24, 6), r"\(1, 1, 1, 24, 6\)"),
        (lambda: NetworkTeacher(network(out_channels=4), channels=3), 32, "must name each of the network's 4 channels"),
        (
            lambda: NetworkTeacher(network(out_channels=4), channels=4),
            32,
            r"but NetworkTeacher returns \(1, 4, 32, 32\)",
        ),
        (lambda: sam(to_rgb=1), 32, "`to_rgb` must be the index of one of the image's 1 channels"),
    ],
)
def test_teacher_that_does_not_fit_the_config_is_one_clear_error(teacher, size, message):
    with pytest.raises(ValueError, match=f"`teacher` must take images.*{message}"):
        check_teacher_input(teacher(), in_channels=1, num_classes=3, image_size=size)
