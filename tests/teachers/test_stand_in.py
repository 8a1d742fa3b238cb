from __future__ import annotations

import logging

import pytest
import torch

from knowsam_monai.teachers import SAMTeacher, build_sam, stand_in


def test_the_name_loads_the_packages_file_and_says_that_it_is_not_sam(tmp_path, monkeypatch, caplog):
    torch.manual_seed(1)
    state = build_sam("stand_in", image_size=64).state_dict()
    torch.save(state, tmp_path / "stand_in.pt")
    monkeypatch.setattr(stand_in, "WEIGHTS", tmp_path / "stand_in.pt")
    with caplog.at_level(logging.WARNING):
        sam = build_sam("stand_in", image_size=64, checkpoint="procedural")
    assert all(torch.equal(value, state[name]) for name, value in sam.state_dict().items())
    assert "NOT SAM" in caplog.text
    assert SAMTeacher(2, 64, variant="stand_in", checkpoint="procedural").stand_in


def test_without_the_file_the_message_holds_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(stand_in, "WEIGHTS", tmp_path / "stand_in.pt")
    with pytest.raises(FileNotFoundError, match="python -m pretraining.pretrain_stand_in --output"):
        build_sam("stand_in", image_size=64, checkpoint="procedural")


def test_another_variant_has_no_stand_in():
    with pytest.raises(ValueError, match="exists for stand_in only"):
        build_sam("vit_b", image_size=64, checkpoint="procedural")
