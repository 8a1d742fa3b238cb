"""The README is short, and its Python runs: the trainer as printed, the rest after it with what a user has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from monai.losses import DiceCELoss

from knowsam_monai.__main__ import parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINER, LOOP, ATTACH = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(source, **names):
    names = {"__name__": "readme", **names}
    exec(compile(source, "README.md", "exec"), names)
    return names


def with_objects_of_the_trainer(**names):
    """What the first block builds before its trainer, and more of the user's."""
    return {**run(TRAINER.split("trainer = SupervisedTrainer(")[0]), **names}


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(0)


def moved(teacher, before):
    return any(not torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def weights(teacher):
    return {name: value.clone() for name, value in teacher.state_dict().items()}


def test_readme_is_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_trainer_runs_as_printed_and_both_losses_are_there():
    names = run(TRAINER)
    output = names["trainer"].state.output
    assert output["sam_loss"] > 0 and "distillation_loss" in output and names["trainer"].state.iteration == 10
    assert names["distiller"].gate.num_measured > 0


def test_without_its_entry_the_trainer_runs_without_skd():
    names = run(re.sub(r"train_handlers=\[SAMDistillation\(distiller\)\],.*", "", TRAINER))
    assert "sam_loss" not in names["trainer"].state.output


def test_loop_trains_teacher_and_network():
    names = with_objects_of_the_trainer(supervised_loss=DiceCELoss(to_onehot_y=True, softmax=True))
    names["loader"] *= 2  # the gate is first measured at the tenth step
    before = weights(names["teacher"])
    names = run(LOOP, **names)
    assert names["distiller"].gate.num_measured > 0 and moved(names["teacher"], before)


def test_attachment_trains_the_teacher_and_leaves_no_hook():
    def their_training(network, optimizer, loader):
        loss = DiceCELoss(to_onehot_y=True, softmax=True)
        for batch in loader:
            optimizer.zero_grad()
            loss(network(batch["image"])[: len(batch["label"])], batch["label"]).backward()
            optimizer.step()

    names = with_objects_of_the_trainer(their_training=their_training)
    before = weights(names["teacher"])
    names = run(ATTACH, **names)
    assert moved(names["teacher"], before) and not names["network"]._forward_hooks


def test_knowsam_lines_are_understood():
    lines = [line for line in README.replace("\\\n", "").splitlines() if line.startswith("knowsam ")]
    assert len(lines) >= 4
    for line in lines:
        options, keys = parser().parse_known_args(shlex.split(line)[1:])
        assert options.call.__name__ == "train" or not keys
