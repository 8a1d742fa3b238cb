from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from knowsam_monai.distillation.gate import LabeledImages, TeacherGate


def images():
    """Bright discs on a dark background, which an equivariant threshold finds."""
    grid = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"))
    centers = torch.tensor([[5.0, 6.0], [9.0, 7.0], [10.0, 11.0]])
    return torch.stack([((grid - c[:, None, None]).norm(dim=0) < 3.5).float()[None] for c in centers])


def threshold_student(x):
    return torch.cat([torch.full_like(x, 0.5), x], 1)


def with_agreement(gate):
    """The gate, after a measurement in which teacher and student agree with themselves."""
    gate.measure_agreement(threshold_student, lambda x, prompt: prompt, images(), 0)
    return gate


@pytest.mark.parametrize(
    ("student", "teacher", "weight"),
    [(0.6, 0.7, 1.0), (0.6, 0.6, 1.0), (0.6, 0.55, 0.5), (0.6, 0.5, 0.0), (0.6, 0.1, 0.0), (0.0, 0.0, 0.0)],
)
def test_weight_falls_linearly_to_zero_over_the_tolerance(student, teacher, weight):
    gate = with_agreement(TeacherGate("validation", tolerance=0.1))
    gate.update(student, teacher)
    assert gate.weight.item() == pytest.approx(weight, abs=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "weight"),
    [
        (0.6, 1, 1),
        (0.6, 0.9, 0.75),
        (0.6, 0.7, 0.25),
        (0, 0.5, 0.5),
        (0.6, 0.6, 0),
        (0.6, 0.5, 0),
        (0, 0, 0),
        (1, 1, 0),
    ],
)
def test_teacher_that_must_lead_weighs_as_much_as_it_has_of_what_the_student_lacks(student, teacher, weight):
    gate = TeacherGate("validation", tolerance=0.1, must_lead=True)

    def one_sided(x):  # finds nothing in an image turned by 180 degrees, so it does not agree with itself
        return threshold_student(x * (torch.arange(16) < 8))

    gate.measure_agreement(one_sided, lambda x, prompt: threshold_student(x), images()[:1], 2)
    assert gate.agreement_scores[1] - gate.agreement_scores[0] > 0.1
    gate.update(student, teacher)
    assert gate.weight.item() == pytest.approx(weight, abs=1e-6)


def test_gate_is_shut_until_the_first_measurement_and_open_without_a_gate():
    assert TeacherGate("validation").weight == 0 and TeacherGate("agreement").weight == 0
    assert TeacherGate("none").weight == 1


def test_no_gate_stays_open_whatever_is_measured():
    gate = TeacherGate("none")
    gate.update(0.9, 0.1)
    gate.measure_agreement(threshold_student, lambda x, prompt: 0 * prompt, images(), 0)
    assert gate.weight == 1 and gate.validation_scores.tolist() == pytest.approx([0.9, 0.1])
    assert gate.agreement_scores.tolist() == [1, 0]


def test_measurement_that_is_not_finite_changes_nothing():
    gate = TeacherGate("validation")
    gate.update(float("nan"), 0.5)
    assert gate.weight == 0 and gate.validation_scores.tolist() == [-1, -1] and not gate.is_measured


def test_unknown_mode_and_tolerance_are_errors():
    with pytest.raises(ValueError, match="`gate` must be 'none', 'agreement' or 'validation'"):
        TeacherGate("open")
    with pytest.raises(ValueError, match="`gate_tolerance` must be a positive"):
        TeacherGate("none", tolerance=0)
    with pytest.raises(ValueError, match="`gate_tolerance` must be a positive Dice difference but is 0.0"):
        TeacherGate("none", tolerance=0.0)


@pytest.mark.parametrize("interval,due", [(1, [1, 2, 3, 4]), (3, [3, 6, 9, 12]), (50, [10, 60, 110, 160])])
def test_training_rows_are_measured_soon_and_then_at_intervals(interval, due):
    runs = range(1, 161)
    for gate in ("agreement", "validation"):
        assert [run for run in runs if TeacherGate(gate).is_due(run, interval)][:4] == due
    assert not any(TeacherGate("none").is_due(run, interval) for run in runs)


@pytest.mark.parametrize("num_tries, is_of_use", [(9, True), (10, False)])
def test_measurement_that_lacked_rows_is_made_up_for_by_one_of_the_next_ten_batches(num_tries, is_of_use):
    gate = TeacherGate("agreement")
    assert gate.is_of_use({"labeled"}, run=10, is_due=True)
    assert not any(gate.is_of_use({"labeled"}, run, is_due=False) for run in range(11, 11 + num_tries))
    assert gate.is_of_use({"unlabeled"}, 11 + num_tries, is_due=False) == is_of_use


def test_equivariant_teacher_opens_the_agreement_gate():
    gate = TeacherGate("agreement")
    for turn in range(5):
        gate.measure_agreement(threshold_student, lambda x, prompt: prompt, images(), turn)
    assert gate.weight == 1 and gate.agreement_scores.tolist() == pytest.approx([1.0, 1.0])


def test_each_model_is_measured_on_its_own_image():
    gate = TeacherGate("agreement")
    seen = {"student": [], "teacher": []}

    def student(x):
        seen["student"].append(x)
        return threshold_student(x)

    def teacher(x, prompt):
        seen["teacher"].append(x)
        return prompt

    gate.measure_agreement(student, teacher, images(), 0, sam_image=10 * images().expand(-1, 3, -1, -1))
    for ours, theirs in zip(*seen.values(), strict=True):
        assert torch.equal(10 * ours.expand(-1, 3, -1, -1), theirs)


@pytest.mark.parametrize("num_classes", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_teacher_that_is_not_finite_does_not_agree_with_itself(num_classes, bad):
    gate = TeacherGate("agreement")
    for turn in range(3):
        gate.measure_agreement(
            lambda x: threshold_student(x) if num_classes == 2 else x - 0.5,
            lambda x, prompt: torch.cat([prompt[:, :-1], torch.full_like(prompt[:, -1:], bad)], 1),
            images(),
            turn,
        )
    assert gate.num_measured == 3 and gate.weight == 0 and gate.agreement_scores.tolist() == pytest.approx([1.0, 0.0])


def test_agreement_of_overlapping_regions_is_the_mean_of_their_dice_counted_by_hand():
    student = torch.full((1, 3, 2, 2), -1.0)
    student[0, 0] = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # 3 pixels; upside down, 2 of them in common
    student[0, 1] = torch.tensor([[1.0, -1.0], [1.0, -1.0]])  # 2 pixels; upside down, the same
    teacher = student.clone()
    teacher[0, 1] = torch.tensor([[1.0, float("nan")], [float("inf"), -1.0]])  # 1 pixel, none in common
    teacher[0, 2] = torch.tensor([[-1.0, 1.0], [-1.0, -1.0]])  # a region that the student does not find
    gate = TeacherGate("agreement", overlapping=True)
    gate.measure_agreement(lambda x: student, lambda x, prompt: teacher, torch.zeros(1, 1, 2, 2), turn=1)
    first = 2 * 2 / (3 + 3)
    assert gate.agreement_scores.tolist() == pytest.approx([(first + 1 + 0) / 3, (first + 0 + 0) / 3])


def test_sigmoid_student_and_teacher_of_two_classes_are_compared():
    gate = TeacherGate("agreement")
    gate.measure_agreement(lambda x: x - 0.5, lambda x, prompt: torch.cat([0 * prompt, prompt], 1), images(), 0)
    assert gate.weight == 1 and gate.agreement_scores.tolist() == pytest.approx([1.0, 1.0])


def test_teacher_that_finds_nothing_shuts_the_agreement_gate():
    gate = TeacherGate("agreement")
    gate.measure_agreement(threshold_student, lambda x, prompt: torch.cat([x + 1, x * 0], 1), images(), 0)
    assert gate.weight == 0 and gate.agreement_scores[1] == 0


def test_teacher_that_memorized_its_labeled_rows_shuts_the_agreement_gate():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2 * 256))
    shapes, labeled = images(), images()[:1]
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(60):  # a network without spatial structure memorizes its one labeled row
        loss = nn.functional.cross_entropy(teacher(labeled).reshape(1, 2, 16, 16), labeled[:, 0].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (teacher(labeled).reshape(1, 2, 16, 16).argmax(1) == labeled[:, 0]).all()  # perfect on its training row
    gate = TeacherGate("agreement", tolerance=0.1)
    for turn in range(5):
        gate.measure_agreement(threshold_student, lambda x, prompt: teacher(x).reshape(-1, 2, 16, 16), shapes[1:], turn)
    assert gate.weight == 0 and gate.agreement_scores[0] == 1


def test_teacher_with_one_answer_for_every_image_is_shut_out_by_the_labels():
    """It agrees with itself perfectly."""

    def constant(x, prompt):
        return torch.cat([x * 0, x * 0 + 1], 1)

    gate, shapes = TeacherGate("agreement"), images()
    gate.measure_agreement(threshold_student, constant, shapes, 0)
    assert gate.weight == 1 and gate.agreement_scores.tolist() == pytest.approx([1.0, 1.0])
    gate.measure_agreement(threshold_student, constant, shapes, 0, labeled=LabeledImages(shapes, shapes, shapes))
    assert gate.weight == 0 and gate.labeled_scores[0] > 2 * gate.labeled_scores[1] > 0


@pytest.mark.parametrize("validation, weight", [((0.6, 0.6), 1.0), ((0.6, 0.55), 0.5), ((0.6, 0.1), 0.0)])
@pytest.mark.parametrize("common, agreement", [(20, 1.0), (19, 0.5), (0, 0.0)])
def test_validation_gate_is_the_product_of_both_factors(common, agreement, validation, weight):
    """A teacher that holds its student back at its own level looks as good as the student in validation."""
    gate, image = TeacherGate("validation", tolerance=0.1), answer(40, size=40)
    # the student finds all 40 pixels, the teacher 20 and in the turned image as many, some of which are the same
    answers = [answer(20, size=40), answer(20, size=40).roll(20 - common, -1).flip(-1)]
    gate.measure_agreement(lambda x: image, lambda x, prompt: answers.pop(0), image, 0)
    assert gate.weight == 0 and not gate.is_measured  # not validated yet
    gate.update(*validation)
    assert gate.weight.item() == pytest.approx(weight * agreement, abs=1e-6) and gate.is_measured


def test_validation_alone_does_not_open_the_validation_gate():
    gate = TeacherGate("validation")
    gate.update(0.03, 0.03)
    assert gate.weight == 0 and not gate.is_measured
    assert with_agreement(gate).weight == 1 and gate.is_measured


def test_labels_shut_the_validation_gate_and_open_it_again():
    """A student that has learned nothing yet is no better in validation than a random teacher."""
    gate, shapes = with_agreement(TeacherGate("validation", momentum=0.0)), images()
    labeled = LabeledImages(shapes, shapes, shapes)
    gate.update(0.01, 0.02)
    assert gate.weight == 1
    gate.measure_agreement(
        threshold_student, lambda x, prompt: -prompt, images()[:0], 0, is_counted=False, labeled=labeled
    )
    assert gate.weight == 0 and gate.num_measured == 1
    gate.update(0.01, 0.02)
    assert gate.weight == 0
    gate.measure_agreement(threshold_student, lambda x, prompt: prompt, shapes, 0, is_counted=False, labeled=labeled)
    assert gate.weight == 1 and gate.num_measured == 1


@pytest.mark.parametrize("pixels, weight", [(9, 1.0), (6, 1.0), (5, 6 / 7), (4, 6 / 13), (3, 0.0), (0, 0.0)])
@pytest.mark.parametrize("num_classes, ignore_index", [(1, 255), (2, 255), (3, 2)])
def test_factor_of_the_labels_is_that_counted_by_hand(pixels, weight, num_classes, ignore_index):
    """The student finds the label's 9 pixels; the teacher finds n of them, so its Dice is 2 n / (9 + n)."""
    label = torch.zeros(1, 1, 4, 4)
    label[..., :3, :3] = 1
    student = torch.where(label > 0, 1.0, -1.0)
    student[..., 3, :] = 1  # where the label has holes, which do not count
    teacher = torch.full_like(label, -1.0)
    teacher.view(-1)[label.flatten().nonzero().flatten()[:pixels]] = 1
    holes = label.index_fill(2, torch.tensor([3]), ignore_index)

    def as_logits(x):
        return x if num_classes == 1 else torch.cat([-x, x, *[-2 * x.abs()] * (num_classes - 2)], 1)

    gate, image = TeacherGate("agreement"), label + 1
    gate.measure_agreement(
        lambda x: as_logits(student),
        lambda x, prompt: as_logits(teacher) if x.max() > 1 else prompt,
        label,
        turn=0,
        labeled=LabeledImages(image, image, holes, ignore_index),
    )
    assert gate.weight.item() == pytest.approx(weight, abs=1e-6)


@pytest.mark.parametrize("size, found, weight", [(19, 1, 0.0), (9, 1, 0.5), (17, 3, 1.0)])
def test_useless_teacher_beside_a_student_that_has_just_begun_teaches_nothing(size, found, weight):
    """Both find the same n of N pixels, Dice 2 n / (N + n), and agree with themselves."""
    label, logits = torch.zeros(1, 1, 5, 5), torch.full((1, 1, 5, 5), -1.0)
    label.view(-1)[:size], logits.view(-1)[:found] = 1, 1
    gate = TeacherGate("agreement")
    labeled = LabeledImages(label + 1, label + 1, label)
    gate.measure_agreement(
        lambda x: logits if x.max() > 1 else x - 0.5, lambda x, prompt: prompt, images(), 0, labeled=labeled
    )
    assert gate.agreement_scores.tolist() == [1, 1]
    assert gate.weight.item() == pytest.approx(weight, abs=1e-6)


def answer(pixels, size=10):
    """Logits of one channel, and the image that has them, of a row of pixels; those below `pixels` are found."""
    return torch.where(torch.arange(size) < pixels, 1.0, -1.0).reshape(1, 1, 1, size)


def test_old_measurements_count_less_and_each_by_its_part_of_the_pixels():
    """
    The label has 4 pixels. The student finds them, the teacher none and then all: it has 4 of 12, then 8 of 16.

    The first five measurements leave half of those before them, and later ones 0.8.
    """
    gate, image, scores = TeacherGate("agreement", momentum=0.8), answer(4), []
    labeled = LabeledImages(image, image, (image > 0).float())
    for number in range(7):
        teacher = answer(4) if number else answer(0)
        gate.measure_agreement(lambda x: image, lambda x, prompt: teacher, image, 0, labeled=labeled)
        scores.append(gate.labeled_scores[1].item())
    expected, common, total = [0.0], 0.0, 4 / 12
    for kept in (0.5, 0.5, 0.5, 0.5, 0.8, 0.8):
        common, total = kept * common + 4 / 16, kept * total + 8 / 16
        expected.append(2 * common / total)
    assert scores == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("must_lead", [False, True])
def test_perfect_teacher_of_a_rare_structure_teaches(must_lead):
    """One slice of ten has it. The student finds its left half, and one false pixel in each other slice."""
    gate, weights = TeacherGate("agreement", must_lead=must_lead), []
    column = torch.arange(200).reshape(1, 1, 1, 200)
    structure, left_half, false_pixel = ((column >= 50) & (column < 150), (column >= 50) & (column < 100), column == 9)
    for number in range(200):
        label = (structure if number % 10 == 0 else column < 0).float()
        student = (left_half if number % 10 == 0 else false_pixel).float() - 0.5
        labeled = LabeledImages(label, label, label)
        gate.measure_agreement(lambda x: student, lambda x, prompt: label - 0.5, label, 0, labeled=labeled)
        weights.append(gate.weight.item())
    assert min(weights[100:]) > 0.8


@pytest.mark.parametrize(("first", "open_again"), [(0, 5), (2, 7), (8, 20)])
def test_class_that_a_young_student_finds_everywhere_is_soon_forgotten(first, open_again):
    """Once both models find it in the whole image, and the teacher not in the turned one."""
    gate, weights = TeacherGate("agreement"), []
    column = torch.arange(200).reshape(1, 1, 1, 200)
    structure = ((column >= 97) & (column < 103)).float() - 0.5  # as its mirror image
    everywhere, nowhere = torch.ones_like(structure), -torch.ones_like(structure)
    for number in range(30):
        answers = [everywhere, nowhere] if number == first else [structure, structure]
        student = everywhere if number == first else structure
        gate.measure_agreement(lambda x: student, lambda x, prompt: answers.pop(0), structure, 0)
        weights.append(gate.weight.item())
    assert weights[first] == 0 and set(weights[:first]) <= {1} and min(weights[open_again:]) > 0.5


def test_teacher_that_no_longer_finds_anything_is_shut_out():
    gate = TeacherGate("agreement")
    weights = []
    for number in range(30):
        logits = images() - 0.5
        teacher = logits if number < 10 else torch.full_like(logits, -1.0)
        gate.measure_agreement(lambda x: x - 0.5, lambda x, prompt: teacher if number >= 10 else prompt, images(), 0)
        weights.append(gate.weight.item())
    assert weights[9] == 1 and weights[12] < 1 and weights[-1] == 0


def test_saved_gate_goes_on_with_the_pixels_that_it_has_counted():
    gate, other = with_agreement(TeacherGate("agreement")), TeacherGate("agreement")
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.agreement_counts, gate.agreement_counts) and gate.agreement_counts.numel() > 0
    other.load_state_dict(TeacherGate("agreement").state_dict())
    assert other.agreement_counts.numel() == 0


def test_agreement_of_not_square_images_uses_flips_only():
    gate = TeacherGate("agreement")
    for turn in range(6):
        gate.measure_agreement(threshold_student, lambda x, prompt: prompt, images()[..., :12], turn)
    assert gate.num_measured == 6


def volumes(size=(8, 8, 6)):
    """Bright blocks on a dark background, different in every orientation."""
    image = torch.zeros(2, 1, *size)
    image[0, 0, 1:4, 2:4, 1:3] = 1
    image[1, 0, 3:7, 1:6, 2:5] = 1
    return image


@pytest.mark.parametrize(("size", "num_turns"), [((8, 8), 3 + 2), ((8, 6), 3), ((8, 8, 6), 7 + 2), ((6, 6, 6), 7 + 6)])
def test_turns_are_flips_of_all_axes_and_quarters_of_square_planes_each_once(size, num_turns):
    image = torch.rand(1, 1, *size)
    seen = set()

    def student(x):
        seen.add(tuple(x.flatten().tolist()))
        return threshold_student(x)

    for turn in range(num_turns):
        TeacherGate("agreement").measure_agreement(student, lambda x, prompt: prompt, image, turn)
    assert len(seen) == 1 + num_turns  # as it is, and in each orientation
    TeacherGate("agreement").measure_agreement(student, lambda x, prompt: prompt, image, num_turns)
    assert len(seen) == 1 + num_turns  # and from the start again


@pytest.mark.parametrize(
    ("size", "sliced_axes", "num_turns"),
    [
        ((6, 6, 6), (-1,), 7 + 2),
        ((6, 6, 6), (-3, -2, -1), 7 + 6),
        ((6, 6, 6), (-2, -1), 7 + 2),
        ((8, 8, 6), (-1,), 7 + 2),
    ],
)
def test_teacher_is_not_judged_on_slices_along_an_axis_that_it_never_sees(size, sliced_axes, num_turns):
    """A rotation never makes a sliced axis of one that is not, nor the other way round."""
    image, seen = torch.zeros(1, 1, *size), set()
    image[..., 0, 1, 2] = 1

    def student(x):
        seen.add(tuple(x.flatten().tolist()))
        return threshold_student(x)

    for turn in range(13):
        TeacherGate("agreement").measure_agreement(
            student, lambda x, prompt: prompt, image, turn, sliced_axes=sliced_axes
        )
    others = {turned for turned in seen if turned != tuple(image.flatten().tolist())}
    assert len(others) == num_turns
    if sliced_axes == (-1,):
        depths = {int(torch.tensor(turned).reshape(size).nonzero()[0, 2]) for turned in others}
        assert depths == {2, size[2] - 1 - 2}


def test_equivariant_teacher_of_volumes_opens_the_agreement_gate():
    gate = TeacherGate("agreement")
    for turn in range(9):
        gate.measure_agreement(threshold_student, lambda x, prompt: prompt, volumes(), turn)
    assert gate.weight == 1 and gate.agreement_scores.tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_teacher_that_looks_at_one_side_of_the_volumes_shuts_the_agreement_gate(axis):
    gate = TeacherGate("agreement")

    def teacher(x, prompt):
        side = torch.arange(x.shape[axis]) < x.shape[axis] // 2
        return prompt * side.view([-1 if i == x.ndim + axis else 1 for i in range(x.ndim)]) + torch.tensor(
            [0.1, 0.0]
        ).view(1, 2, 1, 1, 1)

    for turn in range(9):
        gate.measure_agreement(threshold_student, teacher, volumes(), turn)
    assert gate.weight == 0 and gate.agreement_scores[0] == 1


def test_state_of_another_mode_is_weighed_by_the_mode_that_loads_it():
    gates = {mode: TeacherGate(mode) for mode in ("none", "agreement", "validation")}
    fresh = {mode: gate.state_dict() for mode, gate in copy.deepcopy(gates).items()}
    measured = TeacherGate("agreement")
    measured.agreement_scores.copy_(torch.tensor([0.5, 0.45]))
    for state, expected in (
        (fresh["agreement"], {"none": 1, "agreement": 0, "validation": 0}),
        (fresh["none"], {"none": 1, "agreement": 0, "validation": 0}),
        (measured.state_dict(), {"none": 1, "agreement": 0.5, "validation": 0}),
    ):
        for mode, gate in gates.items():
            gate.load_state_dict(state)
            assert gate.weight.item() == pytest.approx(expected[mode]) and gate.is_open == (expected[mode] > 0)


def test_gate_asks_its_device_once_for_each_written_weight():
    gate = TeacherGate("validation")
    asked = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(func) if func is torch.ops.aten._local_scalar_dense.default else None
            return func(*args, **(kwargs or {}))

    with Counted():
        assert [gate.is_open for _ in range(3)] == [False] * 3 and len(asked) == 1
        gate.weight.fill_(0.5)
        assert [gate.is_open for _ in range(3)] == [True] * 3 and len(asked) == 2
    other = copy.deepcopy(gate)
    other.load_state_dict(TeacherGate("validation").state_dict())
    assert gate.is_open and not other.is_open
