"""A teacher that does not teach, and the preflight, leave no trace in a bundle's student."""

from __future__ import annotations

import pytest

from knowsam_monai.runs import Preflight, training_handlers
from tests.bundles.conftest import CONFIGS, CONFIGS_3D, Training
from tests.bundles.test_overlays import SMALL_UNET_3D
from tests.same_bits import assert_same_bits


def without_preflight(**options):
    return [handler for handler in training_handlers(**options) if not isinstance(handler, Preflight)]


@pytest.mark.parametrize("overlays", [(), ("network_plain.json", "bcp.json")], ids=["knowsam", "bcp"])
@pytest.mark.parametrize("configs", [CONFIGS, CONFIGS_3D], ids=lambda configs: configs.parent.name)
def test_student_with_weight_0_and_preflight_is_the_one_without_either(
    configs, overlays, small_phantom, small_volumes, tmp_path
):
    options = {
        "dataset_dir": str(small_phantom if configs == CONFIGS else small_volumes),
        "overlays": overlays,
        "max_iterations": 5,
        "epoch_length": 5,
        "cache_workers": 2,
        "mixing_start": 2,
        "mixing_pseudo_label": "student",
        "distillation_weight": 0.0,
    }
    if overlays:
        options |= {"network_def": None, "pretraining_iterations": 2}
    if overlays and configs == CONFIGS_3D:  # pairs of rows become one: more than one voxel in the lowest level
        options |= {"network_def": SMALL_UNET_3D, "image_size": [32, 32, 16]}
    students = []
    for use_sam in (True, False):
        training = Training(tmp_path / str(use_sam), whole=True, configs=configs, use_sam=use_sam, **options)
        if not use_sam:
            training.workflow.parser["train#all_handlers#_target_"] = f"{__name__}.without_preflight"
        build = training.workflow.parser["run"][0]["build"]
        build.insert(
            0, build.pop(build.index("teacher_check"))
        )  # before the student, whose first weights must not notice
        assert training.workflow.parser["run"].pop()["_target_"].endswith(".finish_run")  # the report is of no interest
        training.run()
        averaged = training["ema_student"]
        students.append((training["network"].state_dict(), averaged and averaged.state_dict()))
        assert len(training.history) == 5
    assert_same_bits(*students)
