"""Two gloo processes on the CPU against one with the joined batch."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, DistributedSampler, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import MeanDice, from_engine
from monai.losses import DiceCELoss
from monai.transforms import AsDiscreted
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from knowsam_monai.data import SemiSupervisedLoader
from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.handlers import (
    MeanTeacher,
    MultiViewCoTraining,
    SAMDistillation,
    TeacherValidation,
    UncertaintyGuidedMixing,
)
from knowsam_monai.losses import PartiallyLabeledLoss
from knowsam_monai.networks.ema_student import EMAStudent
from knowsam_monai.runs import ValidationReport
from tests.processes import finish, start_ranks
from tests.toys import ToyStudent, ToyTeacher, toy_trainer


def items(count: int, labeled: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(int(labeled))
    images = torch.rand((count, 1, 8, 8), generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (count, 1, 8, 8), generator=generator).double()
    return [{"image": x, "label": y} if labeled else {"image": x} for x, y in zip(images, labels)]


def train(result: str | None = None, die_at: int | None = None, accumulation_steps: int = 1) -> dict:
    """Three steps of everything at once; what has been learned, which each process writes to `result`."""
    torch.manual_seed(
        torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    )  # the first one's count
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


def validate(result: str | None = None) -> dict:
    """Student and teacher on three volumes, shared unevenly; this process's metrics, gate and table."""
    torch.manual_seed(0)
    student, teacher = ToyStudent().eval(), ToyTeacher()
    distiller = SAMDistiller(teacher, torch.optim.SGD(teacher.parameters()), gate="validation", gate_tolerance=1.0)
    distiller.gate.agreement_scores.fill_(0.5)  # equal
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "image": MetaTensor(torch.rand((1, 8, 8), generator=generator), meta={"filename_or_obj": f"case{number}"}),
            "label": torch.randint(3, (1, 8, 8), generator=generator),
        }
        for number in range(3)
    ]
    sampler = DistributedSampler(data, even_divisible=False) if torch.distributed.is_initialized() else None
    report = ValidationReport(str(result), ["first", "second"])
    dice = {
        name: MeanDice(include_background=False, num_classes=3, output_transform=from_engine([key, "label"]))
        for name, key in (("val_mean_dice", "pred"), ("val_teacher_dice", "teacher_pred"))
    }
    evaluator = SupervisedEvaluator(
        torch.device("cpu"),
        DataLoader(data, batch_size=1, sampler=sampler),
        student,
        postprocessing=AsDiscreted(["pred", "teacher_pred"], argmax=True),
        key_val_metric={"val_mean_dice": dice.pop("val_mean_dice")},
        additional_metrics=dice,
        val_handlers=[TeacherValidation(distiller), report],
    )
    evaluator.run()
    found = {"metrics": evaluator.state.metrics, "gate": distiller.gate.state_dict(), "table": report.table()}
    if result is not None:
        torch.save(found, f"{result}/rank{torch.distributed.get_rank()}.pt")
    return found


def test_metrics_gate_and_table_of_a_validation_are_of_the_volumes_of_all_processes(tmp_path):
    ranks, one = start_ranks(tmp_path, 2, validate, str(tmp_path)), validate()
    assert one["gate"]["validation_scores"].min() > 0 and one["gate"]["weight"] > 0
    for rank, process in enumerate(ranks):
        log = tmp_path / f"rank{rank}.log"
        assert finish(process, log) == 0, log.read_text()
        two = torch.load(tmp_path / f"rank{rank}.pt")
        assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-6) and two["table"] == one["table"]
        for name in ("weight", "validation_scores"):
            assert torch.allclose(two["gate"][name], one["gate"][name], rtol=0, atol=1e-6)


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
        assert torch.allclose(two["gate"]["agreement_scores"], one["gate"]["agreement_scores"], rtol=0, atol=1e-6)
        for part in ("student", "teacher", "ema_student"):
            for name, value in one[part].items():
                assert torch.allclose(two[part][name], value, rtol=0, atol=1e-10), f"{part} {name} of rank {rank}"


def test_process_that_dies_ends_the_others_with_an_error(tmp_path):
    first, second = start_ranks(tmp_path, 2, train, die_at=2)
    log = tmp_path / "rank0.log"
    assert finish(first, log, seconds=180) == 1 and "RuntimeError" in log.read_text()
    assert finish(second, tmp_path / "rank1.log") == -signal.SIGKILL
