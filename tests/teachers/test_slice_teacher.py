from __future__ import annotations

import pytest
import torch

from knowsam_monai.teachers import SAMTeacher, SliceTeacher
from tests.networks.sam_toys import randomized
from tests.toys import ToyTeacher


def toy_volumes(size=(6, 5, 4), num_classes=3, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((batch_size, 1, *size), generator=generator, dtype=torch.float64)
    return image, torch.randn((batch_size, num_classes, *size), generator=generator, dtype=torch.float64)


def slice_by_slice(teacher, image, prompt_logits, axis):
    """Each slice of each row by itself, as one would write it down."""
    slices = [
        torch.stack(
            [
                teacher(image[row, None].select(axis + 2, i), prompt_logits[row, None].select(axis + 2, i))[0]
                for i in range(image.shape[axis + 2])
            ],
            dim=axis + 1,
        )
        for row in range(len(image))
    ]
    return torch.stack(slices)


@pytest.fixture
def sam_teacher():
    torch.manual_seed(0)
    return ToyTeacher().double()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_equals_sam_slice_by_slice(axis):
    torch.manual_seed(0)
    sam_teacher = randomized(SAMTeacher(3, image_size=32, variant="stand_in", trainable="all").double(), std=0.1)
    image, prompt_logits = toy_volumes((6, 5, 3))
    logits = SliceTeacher(sam_teacher, axes=axis)(image, prompt_logits)
    expected = slice_by_slice(sam_teacher, image, prompt_logits, axis)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert not torch.equal(logits[0], logits[1])


def test_logits_of_several_axes_are_averaged(sam_teacher):
    image, prompt_logits = toy_volumes()
    logits = SliceTeacher(sam_teacher, axes=(0, -1))(image, prompt_logits)
    expected = sum(slice_by_slice(sam_teacher, image, prompt_logits, axis) for axis in (0, 2)) / 2
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_all_slices_of_all_rows_along_an_axis_are_one_batch(sam_teacher):
    shapes = []
    sam_teacher.register_forward_pre_hook(lambda _, inputs: shapes.append([tuple(x.shape) for x in inputs]))
    SliceTeacher(sam_teacher, axes=(2, 0))(*toy_volumes())
    assert shapes == [[(8, 1, 6, 5), (8, 3, 6, 5)], [(12, 1, 5, 4), (12, 3, 5, 4)]]


def test_no_more_slices_are_taught_at_once_than_a_step_draws(sam_teacher):
    sizes, volumes = [], toy_volumes()
    expected = SliceTeacher(sam_teacher)(*volumes)
    sam_teacher.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    logits = SliceTeacher(sam_teacher, slices=3)(*volumes)  # 2 rows of 4 slices
    assert sizes == [6, 2]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_thin_volume_of_drawn_slices_gets_the_logits_of_the_whole_one(sam_teacher):
    image, prompt_logits = toy_volumes()
    teacher = SliceTeacher(sam_teacher, axes=(0, 1, 2), slices=2)
    for iteration in range(6):
        slices = teacher.draw_slices(prompt_logits, iteration)
        thin = teacher(slices.take(image), slices.take(prompt_logits), axes=slices.axis)
        expected = slices.take(slice_by_slice(sam_teacher, image, prompt_logits, slices.axis))
        torch.testing.assert_close(thin, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampling", ["uniform", "entropy"])
def test_iteration_decides_the_draw_and_a_loop_without_one_counts_draws(sam_teacher, sampling):
    prompt_logits = toy_volumes((2, 2, 40))[1]
    teacher = SliceTeacher(sam_teacher, slices=4, sampling=sampling, seed=7)
    drawn = [teacher.draw_slices(prompt_logits).index for _ in range(3)]
    other = SliceTeacher(sam_teacher, slices=4, sampling=sampling, seed=7)
    assert all(torch.equal(other.draw_slices(prompt_logits, t).index, drawn[t - 1]) for t in (3, 1, 2))
    assert not torch.equal(drawn[0], drawn[1])
    another = SliceTeacher(sam_teacher, slices=4, sampling=sampling, seed=8)
    assert not torch.equal(drawn[0], another.draw_slices(prompt_logits, 1).index)


def test_each_step_draws_one_of_several_axes_and_the_seed_decides_which(sam_teacher):
    prompt_logits = toy_volumes()[1]
    drawn = [
        [SliceTeacher(sam_teacher, axes=(0, 2), slices=1, seed=s).draw_slices(prompt_logits, t).axis for t in range(20)]
        for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and set(drawn[0]) == {0, 2}


def test_resumed_count_goes_on_where_it_was(sam_teacher):
    prompt_logits = toy_volumes((2, 2, 40))[1]
    teacher, resumed = (SliceTeacher(sam_teacher, slices=4) for _ in range(2))
    teacher.draw_slices(prompt_logits)
    resumed.load_state_dict(teacher.state_dict())
    assert torch.equal(resumed.draw_slices(prompt_logits).index, teacher.draw_slices(prompt_logits).index)


def test_nothing_is_drawn_where_all_slices_are_taught(sam_teacher):
    assert SliceTeacher(sam_teacher).draw_slices(toy_volumes()[1], iteration=1) is None


def test_teacher_of_slices_says_of_itself_what_sam_says_and_stays_in_eval_mode():
    sam_teacher = SAMTeacher(3, image_size=32, variant="stand_in", trainable="all")
    teacher = SliceTeacher(sam_teacher).train()
    assert (teacher.num_classes, teacher.variant, teacher.pretrained, teacher.stand_in) == (3, "stand_in", False, False)
    assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(axes=3), "`axes` must be one or more different spatial axes, 0..2 or -3..-1, but is 3"),
        (dict(axes=(2, -1)), "`axes` must be one or more different"),
        (dict(axes=()), "`axes` must be one or more different"),
        (dict(slices=0), "`slices` must be a number of slices, 1 or more, or None for all but is 0"),
        (dict(slices=2.5), "`slices` must be a whole number or None but is 2.5"),
        (dict(slices="8"), "`slices` must be a whole number or None but is '8'"),
        (dict(sampling="random"), "`sampling` must be 'uniform' or 'entropy' but is 'random'"),
    ],
)
def test_bad_arguments_are_errors(sam_teacher, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SliceTeacher(sam_teacher, **arguments)


def test_cached_encoder_is_an_error(sam_teacher):
    sam_teacher.encoder = "cached"
    with pytest.raises(ValueError, match="`sam_teacher` must have the encoder 'adapted'"):
        SliceTeacher(sam_teacher)


@pytest.mark.parametrize(("axis", "size"), [(0, 6), (1, 5), (2, 4)])
def test_as_many_slices_as_the_axis_has_are_all_of_them(sam_teacher, axis, size):
    slices = SliceTeacher(sam_teacher, axes=axis, slices=size).draw_slices(toy_volumes()[1], iteration=1)
    assert slices.index.tolist() == [list(range(size))] * 2


def test_more_slices_than_the_volume_has_are_an_error(sam_teacher):
    with pytest.raises(ValueError, match="`slices` must be at most 4, the slices of the volume along axis 2, but is 5"):
        SliceTeacher(sam_teacher, slices=5).draw_slices(toy_volumes()[1], iteration=1)


def test_image_for_the_teacher_of_volumes_and_volume_for_the_teacher_of_images_are_errors(sam_teacher):
    image, prompt_logits = toy_volumes()
    with pytest.raises(ValueError, match=r"`image` must have shape \(B, channels, H, W, D\) but has \(2, 1, 6, 5\)"):
        SliceTeacher(sam_teacher)(image[..., 0], prompt_logits[..., 0])
    with pytest.raises(ValueError, match="wrap the teacher in SliceTeacher for volumes"):
        SAMTeacher(3, image_size=32, variant="stand_in", trainable="all")(image, prompt_logits)
