from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from monai.utils import set_determinism
from torch.utils.data import DataLoader, Dataset

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.handlers import SAMDistillation
from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.networks import UNet, VNet
from knowsam_monai.seeds import kept_random_state, random_state, set_random_state
from knowsam_monai.teachers import SAMTeacher, SliceTeacher, build_sam
from tests.same_bits import assert_same_bits
from tests.toys import toy_trainer


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_generators_go_on_from_a_state_that_was_stored_without_pickled_code(tmp_path):
    outside = random_state()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draw()
    assert draw() != expected
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected
    set_random_state(outside)


def test_generators_are_kept_also_when_an_error_ends_it():
    before = random_state()
    inside = []
    with pytest.raises(KeyError), kept_random_state():
        inside.append(draw())
        raise KeyError
    assert_same_bits(random_state(), before)
    assert kept_random_state()(draw)() == inside[0]  # drawn from the state as it is
    assert_same_bits(random_state(), before)


def sam2(folder):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install 'knowsam-monai[sam2]')")
    from knowsam_monai.teachers import Sam2Teacher
    from tests.teachers.sam2_toys import toy_config

    return Sam2Teacher(4, 64, toy_config(), trainable="all")


BUILDERS = {
    "SAM": lambda folder: build_sam("stand_in", 32),
    "random": lambda folder: SAMTeacher(4, 32, "stand_in", trainable="all"),
    "stand-in": lambda folder: SAMTeacher(4, 32, "stand_in", "procedural"),
    "cached": lambda folder: SAMTeacher(4, 32, "stand_in", "procedural", encoder="cached", cache_dir=folder),
    "slices": lambda folder: SliceTeacher(SAMTeacher(4, 32, "stand_in", "procedural"), slices=2),
    "SAM 2": sam2,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_building_and_calling_a_teacher_leave_the_generators_as_they_were(name, tmp_path):
    teachers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        before = random_state()
        teachers.append(BUILDERS[name](tmp_path))
        if name != "SAM":
            size = (1, 1, 32, 32, 2) if name == "slices" else (1, 1, 32, 32)
            teachers[-1](torch.zeros(size), torch.zeros(1, 4, *size[2:]))
        assert_same_bits(random_state(), before)
    assert_same_bits(teachers[0].state_dict(), teachers[1].state_dict())  # its first weights are a function of the seed
    assert any(not torch.equal(a, b) for a, b in zip(teachers[0].parameters(), teachers[2].parameters()))


class DrawingDataset(Dataset):
    """Random rows from Python's and NumPy's generators, as in a custom augmentation; the first have labels."""

    def __init__(self, size: tuple[int, ...]) -> None:
        self.size = size

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = torch.full((1, *self.size), index / 20 + random.random())
        return {"image": image + torch.from_numpy(np.random.rand(1, *self.size)).float()}


def loader_of(size):
    def collate(rows):
        image = torch.stack([row["image"] for row in rows])
        return {"image": image, "label": (image[:2] > 1).float()}

    return DataLoader(DrawingDataset(size), batch_size=4, shuffle=True, collate_fn=collate)


def noisy(image: torch.Tensor) -> torch.Tensor:
    """A custom `to_rgb`."""
    return image.expand(-1, 3, -1, -1) + random.random() + np.random.rand() + torch.rand_like(image)


def train(way: str, spatial_dims: int, gate: str) -> dict[str, torch.Tensor]:
    """Five steps of a shipped student, dropout and batch normalization included, from seed 0; `way` attaches SKD."""
    set_determinism(0)
    size = (16,) * spatial_dims
    if way != "alone":
        teacher = SAMTeacher(2, 16, "stand_in", "procedural", to_rgb=noisy)
        teacher = teacher if spatial_dims == 2 else SliceTeacher(teacher, slices=2)
        sam_optimizer = torch.optim.Adam([p for p in teacher.parameters() if p.requires_grad], lr=0.001)
        distiller = SAMDistiller(teacher, sam_optimizer, gate=gate)
        distiller.gate.update(0.5, 0.5)
    network = UNet if spatial_dims == 2 else VNet
    student = network(in_channels=1, out_channels=2, channels=(4, 4, 4, 4, 4), spatial_dims=spatial_dims).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    loss = PartiallyLabeledLoss(dice_ce_loss(2))
    loader = loader_of(size)
    if way == "handler":
        handler = SAMDistillation(distiller, weight=0, gate_interval=2)
        toy_trainer(student, loader, loss, [handler], optimizer=optimizer).run()
    elif way == "attach":
        attachment = distiller.attach(student, optimizer, weight=0, gate_interval=2)
        loop(student, optimizer, loss, attachment.watch(loader))
        attachment.remove()
    elif way == "two lines":
        distiller.follow(optimizer)
        loop(student, optimizer, loss, loader, distiller)
    else:
        loop(student, optimizer, loss, loader)
    set_determinism(None)
    return student.state_dict()


def loop(student, optimizer, loss_function, batches, distiller=None):
    for batch in batches:
        optimizer.zero_grad()
        logits = student(batch["image"])
        loss = loss_function(logits, batch["label"])
        if distiller is not None:
            loss = loss + distiller(batch["image"], logits, batch["label"], weight=0).loss
            distiller.measure_agreement(student, batch["image"], batch["label"])
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("spatial_dims", "gate"), [(2, "agreement"), (3, "none")])
def test_student_that_is_taught_with_weight_0_is_the_one_without_a_teacher(spatial_dims, gate):
    alone = train("alone", spatial_dims, gate)
    for way in ("handler", "two lines", "attach"):
        assert_same_bits(train(way, spatial_dims, gate), alone)
