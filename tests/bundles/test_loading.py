"""Loading a bundle's network into somebody else's program, the Zoo's one-line API."""

from __future__ import annotations

import logging
import signal
import sys

import monai.bundle
import pytest
import torch
from monai.utils import set_determinism

from knowsam_monai.networks import MultiViewNet
from knowsam_monai.runs import stop_signals
from knowsam_monai.teachers import sam_teacher
from tests.bundles.conftest import BUNDLES


@pytest.mark.parametrize("bundle", ["knowsam_acdc", "knowsam_la"])
def test_loading_gives_the_network_and_leaves_the_program_as_it_was(bundle, tmp_path, monkeypatch):
    def state():
        handlers = [signal.getsignal(number) for number in stop_signals.NUMBERS]
        return sys.excepthook, handlers, sorted(tmp_path.rglob("*")), sorted((BUNDLES / bundle).rglob("*"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sam_teacher, "build_sam", None)  # must not be called
    before, root = state(), (logging.root.level, logging.root.handlers[:])
    try:
        network = monai.bundle.load(bundle, bundle_dir=str(BUNDLES), device="cpu")
    finally:
        set_determinism(seed=None)
        logging.root.setLevel(root[0])
        logging.root.handlers[:] = root[1]
    assert state() == before
    weights = torch.load(BUNDLES / bundle / "models" / "model.pt", weights_only=True)
    assert isinstance(network, MultiViewNet)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
