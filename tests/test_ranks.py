"""Two gloo processes on the CPU against one with the joined batch."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from ignite.engine import Events
from monai.losses import DiceCELoss
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from knowsam_monai.data import SemiSupervisedLoader
from knowsam_monai.distiller import SAMDistiller
from knowsam_monai.ema_student import EMAStudent
from knowsam_monai.handlers import MeanTeacher, MultiViewCoTraining, SAMDistillation, UncertaintyGuidedMixing
from knowsam_monai.losses import PartiallyLabeledLoss

from .processes import finish, start_ranks
from .toys import ToyStudent, ToyTeacher, toy_trainer


def items(count: int, labeled: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(int(labeled))
    images = torch.rand((count, 1, 8, 8), generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (count, 1, 8, 8), generator=generator).double()
    return [{"image": x, "label": y} if labeled else {"image": x} for x, y in zip(images, labels)]


def train(result: str | None = None, die_at: int | None = None, accumulation_steps: int = 1) -> dict:
    """Three steps of everything at once; what has been learned, which the first process writes to `result`."""
    torch.manual_seed(0)
    student, teacher = ToyStudent().double(), ToyTeacher().double()
    network: nn.Module = student
    if torch.distributed.is_initialized():
        network = DistributedDataParallel(student, find_unused_parameters=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    ema_student = EMAStudent(network, optimizer)
    per_sample = DiceCELoss(softmax=True, to_onehot_y=True, squared_pred=True, batch=False)  # adds up over ranks
    loss = PartiallyLabeledLoss(per_sample)
    distiller = SAMDistiller(
        teacher,
        torch.optim.Adam((p for p in teacher.parameters() if p.requires_grad), lr=0.01),
        sam_loss=per_sample,
        taught_views=(1, 2),
        gate="agreement",
        gate_tolerance=1.0,
    )
    handlers = [
        MultiViewCoTraining(),
        MeanTeacher(ema_student, weight=0.5, start=0, ema_mode="eval"),
        SAMDistillation(distiller, gate_interval=1),
        UncertaintyGuidedMixing(loss),
    ]
    loader = SemiSupervisedLoader(items(6, True), items(8, False), labeled_batch_size=4, unlabeled_batch_size=4)
    steps = 3 * accumulation_steps
    trainer = toy_trainer(
        network,
        loader,
        loss,
        handlers,
        optimizer=optimizer,
        epoch_length=steps,
        accumulation_steps=accumulation_steps,
    )
    rows = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: rows.append(len(e.state.output["image"])))
    if die_at is not None and torch.distributed.get_rank() == 1:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=die_at), lambda: os.kill(os.getpid(), signal.SIGKILL))
    trainer.run()
    learned = {
        "student": student.state_dict(),
        "teacher": teacher.state_dict(),
        "ema_student": ema_student.network.state_dict(),
        "gate": distiller.gate.state_dict(),
        "rows": rows,
    }
    if result is not None:
        torch.save(learned, f"{result}/rank{torch.distributed.get_rank()}.pt")
    return learned


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_two_processes_learn_what_one_learns_from_the_joined_batch(tmp_path, accumulation_steps):
    ranks = start_ranks(tmp_path, 2, train, str(tmp_path), accumulation_steps=accumulation_steps)
    one = train(accumulation_steps=accumulation_steps)
    for rank, process in enumerate(ranks):
        log = tmp_path / f"rank{rank}.log"
        assert finish(process, log) == 0, log.read_text()
        two = torch.load(tmp_path / f"rank{rank}.pt")
        assert two["rows"] == [4] * 3 * accumulation_steps and one["rows"] == [8] * 3 * accumulation_steps
        assert one["gate"]["weight"] > 0 and one["gate"]["num_measured"] == len(one["rows"])
        assert torch.allclose(two["gate"]["scores"], one["gate"]["scores"], rtol=0, atol=1e-6)
        for part in ("student", "teacher", "ema_student"):
            for name, value in one[part].items():
                assert torch.allclose(two[part][name], value, rtol=0, atol=1e-10), f"{part} {name} of rank {rank}"


def test_process_that_dies_ends_the_others_with_an_error(tmp_path):
    first, second = start_ranks(tmp_path, 2, train, die_at=2)
    log = tmp_path / "rank0.log"
    assert finish(first, log, seconds=180) == 1 and "RuntimeError" in log.read_text()
    assert finish(second, tmp_path / "rank1.log") == -signal.SIGKILL
