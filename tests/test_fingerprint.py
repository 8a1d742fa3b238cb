from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from monai.transforms import Compose, RandAffined, RandFlipd, RandScaleIntensityd
from torch import nn

from knowsam_monai.ema_student import EMAStudent
from knowsam_monai.fingerprint import describe, fingerprint
from knowsam_monai.handlers import MeanTeacher
from knowsam_monai.losses import PartiallyLabeledLoss, SigmoidRampUp, dice_ce_loss
from knowsam_monai.networks import UNet

from .toys import ToyStudent


def augmentation(prob=0.5, degrees=0.1):
    return Compose([RandFlipd("image", prob=prob), RandAffined("image", rotate_range=degrees, prob=1.0)])


def mean_teacher(noise_std=0.1, maximum=0.1):
    student = ToyStudent()
    ema_student = EMAStudent(student, torch.optim.SGD(student.parameters(), lr=0.1))
    return MeanTeacher(ema_student, weight=SigmoidRampUp(100, max=maximum), noise_std=noise_std)


@pytest.mark.parametrize(
    "build,other",
    [
        (augmentation, {"prob": 0.4}),
        (augmentation, {"degrees": 0.2}),
        (mean_teacher, {"noise_std": 0.2}),
        (mean_teacher, {"maximum": 0.2}),
        (partial(UNet, out_channels=3), {"channels": (8, 8, 8, 8, 8)}),
        (partial(nn.Dropout, p=0.5), {"p": 0.4}),
        (lambda weights=(1.0, 1.0): PartiallyLabeledLoss(dice_ce_loss(3), weights), {"weights": (1.0, 0.5)}),
        (lambda lr=0.1: torch.optim.Adam(ToyStudent().parameters(), lr=lr), {"lr": 0.2}),
        (lambda x=1.0: {"a": np.array([x]), "b": torch.tensor(x), "c": {1, 2}, "d": len}, {"x": 2.0}),
    ],
)
def test_equal_settings_have_equal_descriptions_and_others_do_not(build, other):
    texts = [json.dumps(describe(build(**settings)), sort_keys=True) for settings in ({}, {}, other)]
    assert texts[0] == texts[1] != texts[2]
    assert " at 0x" not in texts[0]  # an address would differ in the next process


def test_weights_and_drawn_numbers_are_no_settings():
    network, transform = ToyStudent(), RandScaleIntensityd("image", factors=0.5, prob=1.0)
    before = describe([network, transform.prob, network.training])
    nn.init.zeros_(network.first.weight)
    transform.set_random_state(seed=3)
    assert describe([network, transform.prob, network.training]) == before


def test_synchronised_batch_norm_is_the_same_network():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    assert describe(nn.SyncBatchNorm.convert_sync_batchnorm(network)) == describe(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    )


def test_short_values_stay_readable_and_long_ones_become_a_hash():
    found = fingerprint({"seed": 0, "items": ["patient"] * 100})
    assert found["seed"] == "0" and len(found["items"]) == 64
