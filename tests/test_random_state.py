from __future__ import annotations

import random

import numpy as np
import torch

from knowsam_monai.random_state import random_state, set_random_state


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
