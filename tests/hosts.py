"""Shared by the tests of the semi-supervised methods: a hand-written step and its noise."""

from __future__ import annotations

import copy

import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.seeds import derive_seed
from tests.toys import ToyStudent, ToyTeacher, toy_batches

CASES = [(2, (8, 8)), (4, (8, 8)), (2, (4, 4, 4)), (4, (4, 4, 4))]  # classes, image size


def toy_host(num_classes: int, size: tuple[int, ...], scale: float = 8.0):
    """A student of varied confidence, batches with strong images, and a distiller with a toy teacher, in float64."""
    torch.manual_seed(0)
    student, teacher = (kind(num_classes, len(size)).double() for kind in (ToyStudent, ToyTeacher))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(scale)
    batches = toy_batches(3, num_classes=num_classes, size=size)
    for batch in batches:
        batch["image_strong"] = 1.5 * batch["image"] - 0.2
    return (
        student,
        batches,
        SAMDistiller(teacher, torch.optim.Adam(teacher.parameters(), lr=0.01), taught_views=(0,), gate="none"),
    )


def hand_written_run(student: nn.Module, batches: list, loss, term, distiller: SAMDistiller | None = None) -> nn.Module:
    """One SGD step a batch on loss + term(t, batch, pred, ema) + SKD; returns the averaged student."""
    ema = copy.deepcopy(student).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for t, batch in enumerate(batches, start=1):
        pred = student(batch["image"])
        total = loss(pred, batch["label"]) + term(t, batch, pred, ema)
        optimizer.zero_grad()
        if distiller is not None:
            distiller.optimizer.zero_grad()
            total = total + distiller(batch["image"], pred, batch["label"]).loss
        total.backward()
        optimizer.step()
        if distiller is not None:
            distiller.optimizer.step()
        decay = min(1 - 1 / t, 0.99)
        for averaged, parameter in zip(ema.parameters(), student.parameters()):
            averaged.data = decay * averaged.data + (1 - decay) * parameter.data
    return ema


def hand_written_noise(image: Tensor, t: int, num_passes: int = 1) -> Tensor:
    rows = [
        torch.randn(
            (num_passes, *image.shape[1:]),
            generator=torch.Generator().manual_seed(derive_seed(0, t, row)),
            dtype=image.dtype,
        )
        for row in range(len(image))
    ]
    return (0.1 * torch.stack(rows, dim=1)).clamp(-0.2, 0.2)


class NotingInferer(SimpleInferer):
    """Keeps what each network was called with last."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[nn.Module, Tensor] = {}

    def __call__(self, inputs: Tensor, network: nn.Module, *args, **kwargs) -> Tensor:
        self.inputs[network] = inputs
        return super().__call__(inputs, network, *args, **kwargs)


def assert_same_weights(ours: nn.Module, expected: nn.Module) -> None:
    for parameter, other in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-10, atol=1e-12)


class TwoHeads(nn.Module):
    """Deep supervision: view 0 from `head`, view 1 from `extra_head`, both from `body`; view 0 alone in eval mode."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Conv2d(4, num_classes, 1)
        self.extra_head = nn.Conv2d(4, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        features = self.body(image)
        if not self.training:
            return self.head(features)
        return torch.stack([self.head(features), self.extra_head(features)], dim=1)


def no_loss(pred: Tensor, label: Tensor) -> Tensor:
    """Leaves the handler's terms alone in the trainer's loss."""
    return 0.0 * pred.sum()
