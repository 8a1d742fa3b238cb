"""`intensity_window`: CT is clipped to it before it is scaled, alike in training, validation and inference."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from tests.bundles.conftest import BUNDLES

SIZES = {"knowsam_acdc": {"image_size": 32}, "knowsam_la": {"image_size": [16] * 3, "spacing": [0.0] * 3}}
PLACES = [("train", "train#preprocessing"), ("train", "validate#preprocessing"), ("inference", "preprocessing")]


def prepared(bundle, config, key, image, label, **options):
    parser = ConfigParser()
    parser.read_config(BUNDLES / bundle / "configs" / f"{config}.json")
    parser.update({**SIZES[bundle], "dataset_dir": "list.json", **options})
    case = {"image": str(image)} if config == "inference" else {"image": str(image), "label": str(label)}
    result = parser.get_parsed_content(key)(case)
    return torch.cat([case["image"] for case in (result if isinstance(result, list) else [result])])


@pytest.mark.parametrize("config, key", PLACES, ids=[key for _, key in PLACES])
@pytest.mark.parametrize("bundle", SIZES)
def test_ct_is_prepared_as_the_ct_that_was_clipped_and_scaled_by_hand(tmp_path, bundle, config, key):
    hounsfield = np.random.default_rng(0).integers(-1000, 3000, (20, 18, 4)).astype(np.float32)
    images = {
        "ct": hounsfield,
        "by_hand": (hounsfield.clip(-160, 240) + 160) / 400,  # the window's ends are 0 and 1
        "label": (hounsfield > 0).astype(np.uint8),
    }
    for name, voxels in images.items():
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.0, 1.0, 5.0, 1.0])), tmp_path / f"{name}.nii")
    ct, by_hand, label = (tmp_path / f"{name}.nii" for name in images)
    windowed = prepared(bundle, config, key, ct, label, intensity_window=[-160, 240])
    assert torch.allclose(windowed, prepared(bundle, config, key, by_hand, label), atol=1e-5)
    assert not torch.allclose(windowed, prepared(bundle, config, key, ct, label), atol=0.1)
