from __future__ import annotations

from operator import itemgetter

import pytest
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import MeanDice, from_engine
from monai.inferers import SimpleInferer, SliceInferer, SlidingWindowInferer
from monai.transforms import AsDiscreted

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.handlers.teacher_validation import TeacherValidation
from knowsam_monai.teachers import SliceTeacher
from tests.toys import ToyStudent, ToyTeacher


def evaluator_of(distiller, student, handler=None, with_metric=True):
    volumes = [{"image": torch.rand(1, 1, 8, 8, 3), "label": torch.randint(3, (1, 1, 8, 8, 3))} for _ in range(2)]
    metric = {"val_teacher_dice": MeanDice(num_classes=3, output_transform=from_engine(["teacher_pred", "label"]))}
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=volumes,
        network=student,
        inferer=SliceInferer(roi_size=(8, 8), spatial_dim=2, sw_batch_size=2),
        postprocessing=AsDiscreted(keys=["pred", "teacher_pred"], argmax=True, allow_missing_keys=True),
        key_val_metric={"val_mean_dice": MeanDice(num_classes=3, output_transform=from_engine(["pred", "label"]))},
        additional_metrics=metric if with_metric else None,
        val_handlers=[handler or TeacherValidation(distiller)],
    )


def test_teacher_sees_each_slice_with_the_students_logits_as_prompt():
    torch.manual_seed(0)
    student, teacher = ToyStudent().eval(), ToyTeacher()
    image = torch.rand(1, 1, 8, 8, 3)
    evaluator = evaluator_of(SAMDistiller(teacher), student)
    evaluator.state.output = {"image": image, "pred": evaluator.inferer(image, student)}
    TeacherValidation(SAMDistiller(teacher))(evaluator)
    for k in range(3):
        expected = teacher(image[..., k], student(image[..., k]))
        torch.testing.assert_close(evaluator.state.output["teacher_pred"][..., k], expected)


def test_teacher_sees_the_batch_s_own_image_for_it():
    torch.manual_seed(0)
    student, teacher = ToyStudent().eval(), ToyTeacher()
    image, sam_image = torch.rand(2, 1, 1, 8, 8, 3)
    evaluator = evaluator_of(SAMDistiller(teacher), student)
    evaluator.state.output = {"image": image, "pred": evaluator.inferer(image, student)}
    evaluator.state.batch = {"image": image, "sam_image": sam_image}
    TeacherValidation(SAMDistiller(teacher))(evaluator)
    expected = teacher(sam_image[..., 1], student(image[..., 1]))
    torch.testing.assert_close(evaluator.state.output["teacher_pred"][..., 1], expected)


def test_teacher_sees_all_channels_as_plain_tensors_of_its_own_precision():
    student, teacher, seen = torch.nn.Conv2d(2, 3, 1).double(), ToyTeacher(), []
    teacher.image_conv = torch.nn.Conv2d(2, 3, 1)
    teacher.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    image = MetaTensor(torch.rand(1, 2, 4, 4, dtype=torch.float64))
    evaluator = evaluator_of(SAMDistiller(teacher), student)
    evaluator.inferer = SimpleInferer()
    evaluator.state.output = {"image": image, "pred": student(image)}
    TeacherValidation(SAMDistiller(teacher))(evaluator)
    assert [(type(x), x.dtype) for x in seen] == [(torch.Tensor, torch.float32)] * 2
    assert torch.equal(seen[0], image.as_tensor().float()) and seen[1].shape == (1, 3, 4, 4)


def test_teacher_of_slices_sees_the_windows_of_a_3d_student_whole():
    torch.manual_seed(0)
    student, teacher = ToyStudent(spatial_dims=3).eval(), SliceTeacher(ToyTeacher(), slices=2)
    image = torch.rand(1, 1, 8, 8, 4)
    evaluator = evaluator_of(SAMDistiller(teacher), student)
    evaluator.inferer = SlidingWindowInferer(roi_size=(8, 8, 4))
    evaluator.state.output = {"image": image, "pred": student(image)}
    TeacherValidation(SAMDistiller(teacher))(evaluator)
    for k in range(4):
        expected = teacher.sam_teacher(image[..., k], student(image)[..., k])
        torch.testing.assert_close(evaluator.state.output["teacher_pred"][..., k], expected)


def test_logits_are_picked_from_the_output_of_a_network_that_has_more():
    torch.manual_seed(0)
    student, teacher = ToyStudent().eval(), ToyTeacher()
    image = torch.rand(2, 1, 8, 8)
    evaluator = evaluator_of(SAMDistiller(teacher), student)
    evaluator.inferer = SimpleInferer()
    evaluator.state.output = {"image": image, "pred": (student(image), "features")}
    with pytest.raises(TypeError, match="`pred` must be logits but is a tuple; pick the logits with `logits_of`"):
        TeacherValidation(SAMDistiller(teacher))(evaluator)
    TeacherValidation(SAMDistiller(teacher), logits_of=itemgetter(0))(evaluator)
    torch.testing.assert_close(evaluator.state.output["teacher_pred"], teacher(image, student(image)))


def test_validation_sets_the_gate_from_both_dice_values():
    torch.manual_seed(0)
    teacher = ToyTeacher()
    distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.parameters()), gate="validation")
    distiller.gate.agreement_scores.fill_(0.5)  # equal
    evaluator = evaluator_of(distiller, ToyStudent())
    evaluator.run()
    metrics = evaluator.state.metrics
    expected = min(1.0, max(0.0, 1 + (metrics["val_teacher_dice"] - metrics["val_mean_dice"]) / 0.1))
    assert distiller.gate.weight.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("gate", ["none", "agreement"])
def test_validation_leaves_a_gate_that_measures_otherwise_alone(gate):
    teacher = ToyTeacher()
    distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.parameters()), gate=gate)
    before = distiller.gate.weight.item()
    evaluator_of(distiller, ToyStudent()).run()
    assert distiller.gate.weight == before and (distiller.gate.validation_scores == -1).all()


def test_missing_metric_is_one_clear_error():
    evaluator = evaluator_of(SAMDistiller(ToyTeacher()), ToyStudent(), with_metric=False)
    with pytest.raises(ValueError, match="'val_teacher_dice' is not one of val_mean_dice"):
        evaluator.run()


def test_validation_gate_of_overlapping_regions_has_the_mean_dice_of_all_of_them():
    torch.manual_seed(0)
    student, teacher = ToyStudent().eval(), ToyTeacher()
    batch = {"image": torch.rand(2, 1, 8, 8), "label": torch.randint(2, (2, 3, 8, 8))}
    adam = torch.optim.Adam(teacher.parameters())
    distiller = SAMDistiller(teacher, adam, gate="validation", gate_tolerance=0.9, overlapping=True)
    distiller.gate.agreement_scores.fill_(0.5)  # equal
    metrics = {
        name: MeanDice(include_background=True, output_transform=from_engine([key, "label"]))
        for name, key in (("val_mean_dice", "pred"), ("val_teacher_dice", "teacher_pred"))
    }
    SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[batch],
        network=student,
        postprocessing=AsDiscreted(keys=["pred", "teacher_pred"], threshold=0),
        key_val_metric={"val_mean_dice": metrics.pop("val_mean_dice")},
        additional_metrics=metrics,
        val_handlers=[TeacherValidation(distiller)],
    ).run()
    logits = student(batch["image"])
    for found, score in zip((logits, teacher(batch["image"], logits)), distiller.gate.validation_scores):
        mask, label = (found > 0).flatten(2), batch["label"].bool().flatten(2)
        dice = 2 * (mask & label).sum(2) / (mask.sum(2) + label.sum(2))
        assert score.item() == pytest.approx(dice.mean().item(), abs=1e-5)
    assert 0 < distiller.gate.weight < 1 or (
        distiller.gate.weight == 1 and distiller.gate.validation_scores[1] >= distiller.gate.validation_scores[0]
    )
