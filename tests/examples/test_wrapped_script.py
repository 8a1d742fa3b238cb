"""examples/wrapped_script.py adds SKD to a script of which it edits nothing."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_STEPS = 4


@pytest.fixture
def modules(monkeypatch):
    """The script and its wrapper, imported afresh: the wrapper changes names in the script."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["somebodys_train.py", "--max_iterations", str(NUM_STEPS)])

    def modules(*names):
        for name in ("somebodys_train", "wrapped_script"):
            sys.modules.pop(name, None)
        return [importlib.import_module(name) for name in names]

    yield modules
    modules()


def train(script):
    """As the script's `__main__` block does."""
    np.random.seed(0)
    torch.manual_seed(0)
    return script.train(script.args)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_it_is_short():
    lines = (EXAMPLES / "wrapped_script.py").read_text(encoding="utf-8").splitlines()
    assert sum(1 for line in lines if line.strip()) <= 25


def test_script_gets_skd_on_its_student_alone(modules):
    (alone,) = modules("somebodys_train")
    student_alone = train(alone)
    script, wrapped = modules("somebodys_train", "wrapped_script")
    wrapped.distiller.gate.mode = "none"
    wrapped.distiller.gate.weight.fill_(1)
    student = train(script)
    (skd,) = wrapped.distiller.wiring.attachments
    assert skd.student is student and skd.iteration == NUM_STEPS
    assert skd.terms["sam_loss"] > 0 and skd.terms["distillation_loss"] > 0
    assert {int(state["step"]) for state in wrapped.distiller.optimizer.state.values()} == {NUM_STEPS}
    assert not same_weights(student, student_alone)


def test_sam_learns_from_the_labels_that_the_script_may_see_alone(modules, monkeypatch):
    script, wrapped = modules("somebodys_train", "wrapped_script")
    seen = []

    def sam_loss(logits, label):
        seen.append((len(logits), len(label)))
        return logits.square().mean()

    monkeypatch.setattr(wrapped.distiller, "sam_loss", sam_loss)
    train(script)
    assert seen == [(script.args.labeled_bs,) * 2] * NUM_STEPS


def test_with_a_weight_of_0_it_is_the_script_bit_for_bit(modules, monkeypatch):
    (alone,) = modules("somebodys_train")
    student_alone = train(alone)
    script, wrapped = modules("somebodys_train", "wrapped_script")
    loss = type(wrapped.distiller.distillation_loss)
    monkeypatch.setattr(loss, "forward", lambda self, student, teacher: 0 * student.sum())
    assert same_weights(train(script), student_alone)
    assert len(wrapped.distiller.wiring.attachments) == 1
