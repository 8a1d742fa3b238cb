"""Each script of examples/ runs as it is, and without its SKD lines as the host that it was."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import knowsam_monai.distillation.distiller
from knowsam_monai.distillation.distiller import SAMDistiller
from tests.toys import ToyTeacher, toy_batches

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ["monai_trainer", "plain_loop", "ignite_engine", "lightning_module"]
NUM_STEPS = 3  # of one epoch


def without_skd(source):
    """The lines that are left when those marked as SKD's are taken away."""
    lines, in_block = [], False
    for line in source.splitlines():
        if line == "# --- SKD":
            in_block = True
        if not in_block and not line.endswith("  # SKD"):
            lines.append(line)
        if line == "# ---":
            in_block = False
    assert not in_block
    return "\n".join(lines)


@pytest.fixture
def run(monkeypatch):
    """Trains for one epoch with a script's source; returns its student and the distillers that were called."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    discs = importlib.import_module("discs")

    def run(source):
        students, calls = [], []
        forward, mean_dice = SAMDistiller.forward, discs.mean_dice

        def recorded_dice(network):
            students.append(network)
            return mean_dice(network)

        def recorded_forward(self, *args, **kwargs):
            calls.append(self)
            return forward(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(discs, "mean_dice", recorded_dice)
            patch.setattr(SAMDistiller, "forward", recorded_forward)
            names = {"__name__": "example"}
            exec(compile(source, "example.py", "exec"), names)
            assert 0 <= names["main"](max_epochs=1) <= 1
        return students[0], calls

    return run


def source_of(script):
    if script == "lightning_module":
        pytest.importorskip("lightning")
    return (EXAMPLES / f"{script}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_short_and_its_teacher_steps_with_its_student(script, run):
    source = source_of(script)
    assert len(source.splitlines()) <= 60
    _, calls = run(source)
    assert len(calls) == NUM_STEPS and len(set(map(id, calls))) == 1
    steps = {int(state["step"]) for state in calls[0].optimizer.state.values()}
    assert steps == {NUM_STEPS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_without_skd_is_the_host_bit_for_bit(script, run, monkeypatch):
    source = source_of(script)
    left = without_skd(source)
    code = left.split('"""')[2].lower().replace("knowsam_monai", "")
    assert not any(word in code for word in ("sam", "skd", "distil", "teacher"))
    alone, calls = run(left)
    assert not calls
    monkeypatch.setattr(
        knowsam_monai.distillation.distiller, "DistillationLoss", lambda: lambda student, teacher: 0 * student.sum()
    )
    attached, calls = run(source)
    assert calls
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), attached.parameters(), strict=True))


@pytest.mark.parametrize("is_manual", [False, True], ids=["automatic", "manual"])
def test_lightning_callback_accumulates_as_a_plain_loop_does(is_manual, monkeypatch):
    lightning = pytest.importorskip("lightning.pytorch")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module("lightning_module")
    batches = [{key: value.float() for key, value in batch.items()} for batch in toy_batches(4)]

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.network, self.automatic_optimization = nn.Conv2d(1, 3, 3, padding=1), not is_manual

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.network(batch["image"])[:2], batch["label"][:, 0].long())
            if self.automatic_optimization:
                return loss
            self.manual_backward(loss / 2)
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def distiller():
        torch.manual_seed(1)
        teacher = ToyTeacher()
        return SAMDistiller(teacher, torch.optim.SGD(teacher.parameters(), lr=0.1), gate="none")

    ours, expected = [(Module(), distiller()) for _ in range(2)]
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[script.Distillation(ours[1], accumulation_steps=2 if is_manual else None)],
        accumulate_grad_batches=1 if is_manual else 2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(ours[0], torch.utils.data.DataLoader(batches, batch_size=None))
    network, optimizer = expected[0].network, expected[0].configure_optimizers()
    expected[1].follow(optimizer)
    for step, batch in enumerate(batches):
        logits = network(batch["image"])
        loss = F.cross_entropy(logits[:2], batch["label"][:, 0].long())
        ((loss + expected[1](batch["image"], logits, batch["label"]).loss) / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    for left, right in zip(ours, expected):
        assert all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))
