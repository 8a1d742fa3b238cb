"""Shared by the tests of attaching: a host without SKD, and the same host with SKD in its loop."""

from __future__ import annotations

import torch

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.teachers import SliceTeacher
from tests.hosts import assert_same_weights
from tests.toys import ToyStudent, ToyTeacher, toy_batches


def build(num_classes=3, size=(8, 8), num_batches=3, num_labeled=2, dtype=torch.float64, device="cpu", **kwargs):
    """A student, its optimizer, a distiller and batches; for volumes, SAM sees two slices per step."""
    torch.manual_seed(0)
    student = ToyStudent(num_classes, len(size)).to(device, dtype)
    teacher = ToyTeacher(num_classes).to(device, dtype)
    if len(size) == 3:
        teacher = SliceTeacher(teacher, slices=2)
    sam_optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    distiller = SAMDistiller(teacher, sam_optimizer, taught_views=(1, 2), **{"gate": "none", **kwargs})
    batches = [
        {name: tensor.to(device, dtype) for name, tensor in batch.items()}
        for batch in toy_batches(num_batches, num_labeled, 4 - num_labeled, num_classes=num_classes, size=size)
    ]
    return student, torch.optim.SGD(student.parameters(), lr=0.1), distiller, batches


def loss_of(logits, batch):
    return PartiallyLabeledLoss(dice_ce_loss(logits.shape[2]))(logits, batch["label"])


def host(student, optimizer, batches, accumulation_steps=1):
    """A training loop that does not know SKD."""
    for t, batch in enumerate(batches, start=1):
        loss = loss_of(student(batch["image"]), batch)
        if (t - 1) % accumulation_steps == 0:
            optimizer.zero_grad()
        (loss / accumulation_steps).backward()
        if t % accumulation_steps == 0 or t == len(batches):
            optimizer.step()


def plain_loop(
    student, optimizer, distiller, batches, weight=lambda t: 1.0, skipped=(), accumulation_steps=1, labeled_rows=None
):
    """The same with SKD's two lines; the steps in `skipped`, counted from 1, are not taken."""
    distiller.follow(optimizer)
    for t, batch in enumerate(batches, start=1):
        logits = student(batch["image"])
        loss = loss_of(logits, batch)
        result = distiller(batch["image"], logits, batch["label"], labeled_rows, weight=weight(t), iteration=t)
        loss = loss + result.loss
        if (t - 1) % accumulation_steps == 0:
            optimizer.zero_grad()
        (loss / accumulation_steps).backward()
        if t not in skipped and (t % accumulation_steps == 0 or t == len(batches)):
            optimizer.step()


def assert_same(ours, expected):
    """Assert equal weights of students and teachers; each argument is (student, optimizer, distiller, ...)."""
    assert_same_weights(ours[0], expected[0])
    assert_same_weights(ours[2].teacher, expected[2].teacher)
