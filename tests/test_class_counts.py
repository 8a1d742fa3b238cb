"""Every default of the public API on students of one sigmoid channel, of two classes, and of four."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanDice, from_engine
from monai.transforms import Activationsd, AsDiscreted, Compose
from monai.utils import set_determinism
from torch import nn

from knowsam_monai import handlers, losses, runs
from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.networks import MultiViewNet, UNet
from knowsam_monai.networks.ema_student import EMAStudent
from knowsam_monai.teachers import SAMTeacher
from knowsam_monai.tensors import class_logits

CLASSES = pytest.mark.parametrize("num_classes", [1, 2, 4])


class Answer(nn.Module):
    """A teacher that returns its prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, image, prompt_logits):
        return prompt_logits + self.shift


def sam_loss(logits, label):
    teacher = Answer()
    distiller = SAMDistiller(teacher, torch.optim.SGD(teacher.parameters(), lr=0.1), gate="none").train()
    result = distiller(torch.zeros(len(logits), 1, *logits.shape[2:]), logits, label, labeled_rows="all")
    assert result.distillation_loss.item() == pytest.approx(0, abs=1e-6)  # the teacher agrees with the student
    return result.sam_loss


SUPERVISED = {
    "PartiallyLabeledLoss": losses.PartiallyLabeledLoss(),
    "dice_ce_loss": losses.dice_ce_loss(),
    "dice_ce_loss that ignores": losses.dice_ce_loss(ignore_index=255),
    "sam_loss of SAMDistiller": sam_loss,
}
OF_TWO = {
    "DistillationLoss": losses.DistillationLoss(),
    "DistillationLoss with Dice": losses.DistillationLoss(dice_weight=1.0),
    "MutualConsistencyLoss": losses.MutualConsistencyLoss(),
    "PseudoLabelLoss": losses.PseudoLabelLoss(),
    "SoftmaxMSELoss": losses.SoftmaxMSELoss(),
    "EntropyLoss": losses.EntropyLoss(),
}
of_all_losses = pytest.mark.parametrize("loss", SUPERVISED | OF_TWO)


def value_of(loss, logits, other, label):
    return SUPERVISED[loss](logits, label) if loss in SUPERVISED else OF_TWO[loss](logits, other)


def blocks(num_classes):
    """A label (2, 1, 16, 16) of all classes, and logits that are sure of it."""
    label = torch.zeros(2, 1, 16, 16)
    for c in range(1, max(num_classes, 2)):
        label[:, :, 4 * c - 2 : 4 * c + 1, 3:9] = c
    if num_classes == 1:
        return label, 20 * (2 * label - 1)
    return label, 20 * nn.functional.one_hot(label[:, 0].long(), num_classes).movedim(-1, 1).float()


@CLASSES
@of_all_losses
def test_perfect_prediction_costs_nothing(loss, num_classes):
    label, logits = blocks(num_classes)
    assert value_of(loss, logits, logits.clone(), label).item() == pytest.approx(0, abs=1e-5)


@CLASSES
def test_no_knowledge_costs_log_of_the_classes(num_classes):
    label, logits = blocks(num_classes)
    logits, chance = torch.zeros_like(logits), 1 / max(num_classes, 2)
    sizes = [(label == c).sum().item() for c in range(max(num_classes, 2))]
    dice = [1 - 2 * chance * size / (label.numel() * chance**2 + size) for size in sizes]
    expected = -math.log(chance) + sum(dice) / len(dice)
    assert losses.PartiallyLabeledLoss()(logits, label).item() == pytest.approx(expected, rel=1e-5)
    assert losses.EntropyLoss()(logits).item() == pytest.approx(1)
    assert losses.entropy_map(logits).max().item() == pytest.approx(-math.log(chance))
    assert losses.MutualConsistencyLoss()(logits, logits).item() == pytest.approx(-2 * math.log(chance))


@of_all_losses
def test_sigmoid_logits_cost_what_their_two_classes_cost(loss):
    label = torch.randint(2, (2, 1, 16, 16)).float()
    logits, other = (3 * torch.randn(2, 1, 16, 16) for _ in range(2))
    one, two = logits.clone().requires_grad_(), class_logits(logits).requires_grad_()
    values = [value_of(loss, one, other, label), value_of(loss, two, class_logits(other), label)]
    torch.testing.assert_close(*values)
    for value in values:
        value.backward()
    if loss != "sam_loss of SAMDistiller":  # whose gradient is the teacher's alone
        torch.testing.assert_close(one.grad, two.grad[:, 1:])


# --- methods ----------------------------------------------------------------------------------------------------------


class TwoClasses(nn.Module):
    """The softmax form of a sigmoid student or teacher: (0, z), in views too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image, prompt_logits=None):
        if prompt_logits is None:
            logits = self.network(image)
        else:
            logits = self.network(image, prompt_logits[:, 1:] - prompt_logits[:, :1])
        return torch.cat((torch.zeros_like(logits), logits), dim=1 - image.ndim)


def distillation(student, optimizer, wrap, num_classes, **kwargs):
    teacher = wrap(SAMTeacher(num_classes=num_classes, image_size=32, variant="stand_in", trainable="all"))
    distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.parameters(), lr=1e-3), **{"gate": "none", **kwargs})
    return handlers.SAMDistillation(distiller, log_interval=1, gate_interval=1)


METHODS = {
    "distillation": distillation,
    "distillation behind a gate": partial(distillation, gate="agreement"),
    "mean_teacher": lambda student, optimizer, *_: handlers.MeanTeacher(EMAStudent(student, optimizer), start=0),
    "ua_mt": lambda student, optimizer, *_: handlers.UncertaintyAwareMeanTeacher(
        EMAStudent(student, optimizer), max_iterations=2
    ),
    "fixmatch": lambda *_: handlers.FixMatch(threshold=0.6),
    "bcp": lambda student, optimizer, *_: handlers.BidirectionalCopyPaste(
        EMAStudent(student, optimizer, warm_up=False, buffers="average"),
        losses.PartiallyLabeledLoss(losses.dice_ce_loss(ignore_index=255)),
        pretraining=1,
    ),
    "mixing": lambda *_: handlers.UncertaintyGuidedMixing(losses.PartiallyLabeledLoss()),
    "co_training": lambda *_: handlers.MultiViewCoTraining(),
}


def train(method, wrap, num_classes=1):
    """Two steps of a shipped student with a shipped method; its weights, and the terms of each step."""
    set_determinism(seed=0)
    network = MultiViewNet if method == "co_training" else partial(UNet, spatial_dims=2, in_channels=1)
    student = wrap(network(out_channels=num_classes, channels=(4, 8, 8, 8, 8)))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(2):
        image = torch.rand(4, 1, 32, 32, generator=generator)
        label = torch.randint(max(num_classes, 2), (2, 1, 32, 32), generator=generator).float()
        batches.append({"image": image, "label": label, "image_strong": image**2})
    loss = losses.dice_ce_loss(ignore_index=255) if method == "bcp" else None
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=batches,
        network=student,
        optimizer=optimizer,
        loss_function=losses.PartiallyLabeledLoss(loss),
        train_handlers=[METHODS[method](student, optimizer, wrap, num_classes)],
        decollate=False,
    )
    terms = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: terms.append(handlers.scalar_terms(e.state.output)))
    trainer.run()
    set_determinism(seed=None)
    assert all(bool(value.isfinite()) for step in terms for value in step.values())
    return list(student.parameters()), terms


@pytest.mark.parametrize("method", METHODS)
def test_sigmoid_student_trains_as_its_two_classes_do(method):
    (one, terms), (two, expected) = train(method, lambda network: network), train(method, TwoClasses)
    torch.testing.assert_close(terms, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_four_classes_train(method):
    train(method, lambda network: network, num_classes=4)


# --- validation -------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Sure of what the image shows, which is its label."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, image):
        if self.num_classes == 1:
            return 20 * (2 * image - 1)
        return 20 * nn.functional.one_hot(image[:, 0].long(), self.num_classes).movedim(-1, 1).float()


@CLASSES
def test_perfect_student_and_teacher_have_dice_1_in_every_table(num_classes, tmp_path):
    label, _ = blocks(num_classes)
    classes, keys = max(num_classes, 2), ["pred", "teacher_pred"]
    names = [f"class {c}" for c in range(1, classes)]
    report = runs.ValidationReport(tmp_path, names)
    activation = {"sigmoid": True} if num_classes == 1 else {"softmax": True}
    discrete = {"threshold": 0.5} if num_classes == 1 else {"argmax": True}
    teacher = Answer()
    distiller = SAMDistiller(teacher, torch.optim.SGD(teacher.parameters(), lr=0.1), gate="validation")
    distiller.gate.agreement_scores.fill_(0.5)  # equal
    dice = partial(MeanDice, include_background=False, num_classes=classes)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{"image": label, "label": label}],
        network=Reader(num_classes),
        postprocessing=Compose([Activationsd(keys, **activation), AsDiscreted(keys, **discrete)]),
        key_val_metric={"val_mean_dice": dice(output_transform=from_engine(["pred", "label"]))},
        additional_metrics={"val_teacher_dice": dice(output_transform=from_engine(["teacher_pred", "label"]))},
        val_handlers=[
            report,
            handlers.TeacherValidation(distiller),
            runs.CaseMetrics(tmp_path, names),
            runs.ValidationHistory(tmp_path, names),
        ],
    )
    evaluator.run()
    assert evaluator.state.metrics == {"val_mean_dice": 1, "val_teacher_dice": 1} and distiller.gate.weight == 1
    assert [line.split()[-2:] for line in report.table()[3:] if "---" not in line] == [["1.000", "1.000"]] * classes
    rows = (tmp_path / "metrics_summary.csv").read_text().splitlines()
    assert [row.split(",")[3] for row in rows if row.startswith("dice,")] == ["1.000000"] * 2 * classes
    assert (tmp_path / "results.csv").read_text().splitlines()[1].split(",") == ["1"] + ["1.0"] * 2 * classes


@pytest.mark.parametrize("make", [runs.CaseMetrics, runs.ValidationReport])
def test_raw_logits_of_one_channel_are_not_taken_for_class_numbers(make, tmp_path):
    label, _ = blocks(1)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{"image": 0.7 * label, "label": label}],
        network=nn.Identity(),
        val_handlers=[make(tmp_path, ["disc"])],
    )
    with pytest.raises(ValueError, match="`pred` must be class numbers or one-hot but has 0.7; .*threshold=0.5"):
        evaluator.run()
