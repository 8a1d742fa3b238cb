from __future__ import annotations

from operator import itemgetter

import pytest
import torch
from torch import nn

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.teachers import SliceTeacher
from tests.toys import ToyStudent, ToyTeacher, distiller_of, toy_batches


@pytest.mark.parametrize("has_label", [True, False])
def test_validation_gate_measures_training_rows_too_but_waits_for_a_validation(student, teacher, has_label, caplog):
    batch = toy_batches(1)[0]  # 2 labeled rows, 2 unlabeled ones
    distiller, asked = distiller_of(teacher, gate="validation"), []
    teacher.register_forward_hook(lambda module, arguments, output: asked.append(len(output)))
    distiller.measure_agreement(student, batch["image"], batch["label"] if has_label else None)
    rest = 2 if has_label else 4
    assert asked == [rest, rest] + [2] * has_label  # agreement as they are and turned; the labels once
    assert (distiller.gate.agreement_scores >= 0).all() and not caplog.messages
    assert (distiller.gate.labeled_scores[0] > 0) == has_label
    assert not distiller.gate.is_measured and distiller.gate.weight == 0


def test_frozen_teacher_is_judged_on_unlabeled_rows_which_the_student_has_not_memorized(student, teacher):
    batch, judged = toy_batches(1)[0], []  # 2 labeled rows, 2 unlabeled ones
    teacher.register_forward_pre_hook(lambda module, arguments: judged.append(arguments[0]))
    image, label = batch["image"], batch["label"]
    SAMDistiller(teacher.requires_grad_(False)).measure_agreement(student, image, label)
    assert [len(rows) for rows in judged] == [2, 2, 2] and torch.equal(judged[0], image[2:])  # the labels come last
    judged.clear()
    SAMDistiller(teacher).measure_agreement(student, image[:2], label)  # nothing else is left
    assert torch.equal(judged[0], image[:2])


@pytest.mark.parametrize("gate", ["agreement", "validation"])
@pytest.mark.parametrize(
    "change,is_compared",
    [
        (lambda label: label.masked_fill(label == 2, 255), True),
        (lambda label: label.masked_fill(label == 2, -1), True),
        (lambda label: label + 7, True),  # no pixel is of a class
        (lambda label: label[:, 0], False),
        (lambda label: torch.cat([label] * 3, 1), False),
    ],
    ids=["255", "-1", "classes of another network", "no channel", "one-hot"],
)
def test_labels_that_a_frozen_teacher_does_not_need_never_stop_it(student, teacher, caplog, gate, change, is_compared):
    batch = toy_batches(1)[0]
    distiller = SAMDistiller(teacher.requires_grad_(False), gate=gate)
    distiller.measure_agreement(student, batch["image"], change(batch["label"]))
    warnings = [line for line in caplog.messages if "the gate compares nothing on the labeled rows" in line]
    assert len(warnings) == (not is_compared) and distiller.gate.num_measured == 1


@pytest.mark.parametrize("learns", [True, False])
def test_teacher_at_its_students_level_teaches_only_if_it_learns(student, teacher, learns):
    """A frozen teacher cannot rise with its student, but it can hold the student at its own level."""

    class Repeats(type(teacher)):
        def forward(self, image, prompt_logits):
            return prompt_logits + 0 * super().forward(image, prompt_logits)

    teacher = Repeats().double()
    image = toy_batches(1)[0]["image"]
    distiller = distiller_of(teacher, gate="agreement") if learns else SAMDistiller(teacher, gate="agreement")
    distiller.measure_agreement(student, image)
    assert distiller.gate.agreement_scores[0] == distiller.gate.agreement_scores[1] > 0
    assert distiller.gate.weight == learns


def test_agreement_is_measured_in_eval_mode_and_under_the_teachers_autocast(student, teacher):
    image = toy_batches(1)[0]["image"].float()
    seen = []
    student.float().train().register_forward_hook(lambda m, args, out: seen.append(m.training))
    teacher.float().register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    SAMDistiller(teacher, gate="agreement", autocast_dtype=torch.bfloat16).measure_agreement(student, image)
    assert seen == [False, False, torch.bfloat16, torch.bfloat16] and student.training


def unpacked(output):
    logits, _ = output
    return logits


@pytest.mark.parametrize(
    "output, logits_of",
    [
        (lambda logits: ("features", logits), itemgetter(1)),
        (lambda logits: torch.cat([logits, logits], 1), lambda output: output[:, :3]),
        # the logits alone, in eval mode
        (lambda logits: logits, itemgetter(0)),
        (lambda logits: logits, itemgetter("logits")),
        (lambda logits: logits, lambda output: output[:, 0]),
        (lambda logits: logits, lambda output: output.logits),
        (lambda logits: logits, lambda output: list(output.values())[0]),
        (lambda logits: logits, unpacked),
    ],
)
def test_agreement_of_a_student_with_several_outputs_is_that_of_its_logits(teacher, output, logits_of):
    student = nn.Conv2d(1, 3, 3, padding=1).double()

    class Several(nn.Module):
        def forward(self, x):
            return output(student(x))

    image = toy_batches(1)[0]["image"]
    distillers = SAMDistiller(teacher), SAMDistiller(teacher)
    distillers[0].measure_agreement(student, image)
    distillers[1].measure_agreement(Several(), image, logits_of=logits_of)
    torch.testing.assert_close(*(distiller.gate.agreement_scores for distiller in distillers))
    assert distillers[0].gate.num_measured == 1


def test_gate_of_a_student_that_takes_more_than_an_image_is_one_clear_error(student, teacher):
    class WithSpacing(nn.Module):
        def forward(self, x, spacing):
            return student(x)

    image = toy_batches(1)[0]["image"]
    with pytest.raises(
        TypeError, match="images alone, which fails: .*'spacing'. Build the distiller with `gate='none'`"
    ):
        SAMDistiller(teacher).measure_agreement(WithSpacing(), image)
    SAMDistiller(teacher, gate="none").measure_agreement(WithSpacing(), image)


def test_without_a_gate_nothing_is_measured(student, teacher):
    def never(*_):
        raise AssertionError("no work whose result nobody uses")

    student.register_forward_hook(never)
    teacher.register_forward_hook(never)
    SAMDistiller(teacher, gate="none").measure_agreement(student, toy_batches(1)[0]["image"])


def test_probabilities_of_a_sigmoid_student_in_eval_mode_are_no_logits(teacher):
    """As of a network that applies its sigmoid in eval mode only."""

    class InEvalMode(ToyStudent):
        def forward(self, x):
            logits = 4 * super().forward(x)
            return logits if self.training else logits.sigmoid()

    batch, scores = toy_batches(1, num_classes=2)[0], []
    for kind in (ToyStudent, InEvalMode):
        torch.manual_seed(0)
        student, distiller = kind(1).double(), distiller_of(ToyTeacher(1).double(), gate="agreement")
        distiller(batch["image"], student(batch["image"]), batch["label"])
        distiller.measure_agreement(student, batch["image"], batch["label"])
        scores.append(distiller.gate.agreement_scores[0])
    assert 0 < scores[0] < 1
    torch.testing.assert_close(*scores, rtol=0, atol=0)


def test_teacher_is_asked_about_its_own_image_of_each_row_in_question(student, teacher):
    """What SAM sees, before intensity augmentation, is never the student's image."""
    batch, students, teachers = toy_batches(1)[0], [], []
    student.register_forward_pre_hook(lambda module, arguments: students.append(arguments[0]))
    teacher.register_forward_pre_hook(lambda module, arguments: teachers.append(arguments[0]))
    image = batch["image"]
    distiller_of(teacher, gate="agreement").measure_agreement(
        student, image, batch["label"], turn=1, sam_image=10 + image
    )
    for images in (students, [seen - 10 for seen in teachers]):  # unlabeled, the same flipped, and labeled
        torch.testing.assert_close(images[0], image[2:])
        torch.testing.assert_close(images[1].sum((2, 3)), image[2:].sum((2, 3)))
        assert not torch.allclose(images[1], image[2:])
        torch.testing.assert_close(images[2], image[:2])
        assert len(images) == 3
    torch.testing.assert_close(teachers[1] - 10, students[1])


def test_view_that_prompts_the_teacher_is_measured(teacher):
    batch, scores = toy_batches(1)[0], []
    views = ToyStudent().double().train()  # as a function it stays in train mode and stacks its views

    for student, view in ((views.forward, 2), (lambda x: views(x)[:, 2], 0), (views.forward, 1)):
        distiller = distiller_of(teacher, gate="agreement", prompt_view=view)
        distiller.measure_agreement(student, batch["image"], batch["label"])
        scores.append(torch.cat([distiller.gate.agreement_scores, distiller.gate.labeled_scores]))
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=0)
    assert not torch.equal(scores[0], scores[2])


def test_networks_that_change_their_input_in_place_leave_the_batch_alone(student, teacher):
    batch = toy_batches(1)[0]
    images = [batch["image"], batch["image"] + 1]
    kept = [image.clone() for image in images]

    def halve(module, arguments):
        arguments[0].mul_(0.5)

    for network in (student, teacher):
        network.register_forward_pre_hook(halve)
    image, sam_image = images
    distiller_of(teacher, gate="agreement").measure_agreement(student, image, batch["label"], sam_image=sam_image)
    SAMDistiller(teacher, gate="agreement").measure_agreement(student, image, sam_image=sam_image)
    torch.testing.assert_close(images, kept, rtol=0, atol=0)


def measurements_of(distiller, monkeypatch):
    """The arguments of each measurement that the gate is asked for, in place of the measurement."""
    seen = []
    monkeypatch.setattr(
        distiller.gate,
        "measure_agreement",
        lambda student, teacher, image, turn, is_counted, sam_image, labeled, axes: seen.append(
            {"turn": turn, "labeled": labeled, "axes": axes}
        ),
    )
    return seen


def test_each_measurement_at_an_interval_turns_the_images_otherwise(student, teacher, monkeypatch):
    image = toy_batches(1)[0]["image"]
    distiller = distiller_of(teacher, gate="agreement")
    seen = measurements_of(distiller, monkeypatch)
    for run in range(1, 21):
        distiller.measure_if_due(run, 5, student, image)
    assert [measurement["turn"] for measurement in seen] == [1, 2, 3, 4]


@pytest.mark.parametrize("axes, sliced", [((0, 2), [-3, -1]), (-1, [-1])])
def test_gate_hears_of_the_axes_along_which_a_teacher_sees_slices(monkeypatch, axes, sliced):
    student, image = ToyStudent(spatial_dims=3), torch.rand(2, 1, 4, 4, 4)
    distiller = distiller_of(SliceTeacher(ToyTeacher(), axes=axes), gate="agreement")
    seen = measurements_of(distiller, monkeypatch)
    distiller.measure_agreement(student, image)
    assert seen[0]["axes"] == sliced


def test_pixels_that_the_loss_ignores_judge_nobody(student, teacher):
    """Even if their label is the number of a class."""
    batch = toy_batches(1)[0]
    distiller = distiller_of(teacher, gate="agreement", sam_loss=nn.CrossEntropyLoss(ignore_index=2))
    distiller.measure_agreement(student, batch["image"], batch["label"])
    common = distiller.gate.labeled_counts[:, 0]  # pixels of classes 1 and 2 that label and model share
    assert common[:, 0].any() and not common[:, 1].any()


def test_labels_of_every_row_judge_nobody_until_somebody_says_which_the_student_sees(student, teacher, monkeypatch):
    batch = toy_batches(1, num_labeled=4, num_unlabeled=0)[0]
    distiller = SAMDistiller(teacher.requires_grad_(False))
    seen = measurements_of(distiller, monkeypatch)
    distiller.measure_agreement(student, batch["image"], batch["label"])
    distiller.measure_agreement(student, batch["image"], batch["label"], labeled_rows=1)
    assert seen[0]["labeled"] is None and torch.equal(seen[1]["labeled"].label, batch["label"][:1].long())


def test_teacher_that_is_thawed_need_not_lead_any_more(student, teacher):
    distiller = distiller_of(teacher.requires_grad_(False), gate="agreement")
    assert distiller.gate.must_lead  # before the first measurement too, as for a gate that is loaded
    teacher.requires_grad_(True)
    distiller.measure_agreement(student, toy_batches(1)[0]["image"])
    assert not distiller.gate.must_lead


def test_random_numbers_of_teacher_and_measurement_are_not_taken_from_those_of_the_run(student):
    class Noisy(ToyTeacher):
        def forward(self, image, prompt_logits):
            return super().forward(image, prompt_logits) + torch.rand(())

    batch = toy_batches(1)[0]
    distiller = distiller_of(Noisy().double(), gate="agreement")
    logits = student(batch["image"])
    before = torch.get_rng_state()
    distiller(batch["image"], logits, batch["label"])
    distiller.measure_agreement(lambda x: student(x) + torch.rand(()), batch["image"], batch["label"])
    answer = distiller.ask_teacher(batch["image"], logits[:, 0])
    assert torch.equal(torch.get_rng_state(), before) and not answer.requires_grad
