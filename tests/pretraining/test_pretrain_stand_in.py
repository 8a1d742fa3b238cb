from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from knowsam_monai.teachers import SAMTeacher
from knowsam_monai.teachers.sam import WEIGHTS
from knowsam_monai.teachers.sam_checkpoint import resize_positions
from pretraining import pretrain_stand_in
from pretraining.pretrain_stand_in import (
    ProceduralDataset,
    _iou,
    _mask_losses,
    _requested_masks,
    learning_rate,
    parse,
    pretrain,
)

SMALL = "--image_size 64 --batch_size 2 --objects 2 --rounds 2 --device cpu --held_out_images 2 --log_every 1"


def run(output: Path, options: str) -> dict:
    precision = torch.get_float32_matmul_precision()
    try:
        return pretrain(parse(["--output", str(output), *SMALL.split(), *options.split()]))
    finally:
        torch.set_float32_matmul_precision(precision)  # the recipe's is bfloat16 on some processors


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "stand_in.pt"
    run(path, "--steps 4")
    return path


def test_the_file_is_a_plain_state_dict_with_a_record_of_what_made_it(weights):
    state = torch.load(weights, weights_only=True)
    assert all(isinstance(value, torch.Tensor) and value.isfinite().all() for value in state.values())
    assert weights.stat().st_size < 20e6
    record = json.loads(weights.with_suffix(".json").read_text())
    script = Path(pretrain_stand_in.__file__).read_bytes()
    assert record["script_sha256"] == hashlib.sha256(script).hexdigest()
    assert record["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["steps"] == 4 and record["images"] == 8 and "NOT SAM" in record["what"]
    assert set(record["held_out_iou"]) == {"box", "point"}


def test_the_packages_weights_are_those_of_the_record_and_of_these_sources():
    record = json.loads(WEIGHTS.with_suffix(".json").read_text())
    sources = sorted(Path(pretrain_stand_in.__file__).parent.glob("*.py"))
    assert record["weights_sha256"] == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert record["sources_sha256"] == hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    assert WEIGHTS.stat().st_size < 10e6


@pytest.mark.parametrize("image_size", [64, 128])
def test_a_teacher_loads_every_tensor_and_freezes_all_but_adapters(weights, image_size):
    teacher = SAMTeacher(num_classes=4, image_size=image_size, variant="stand_in", checkpoint=weights)
    state = torch.load(weights, weights_only=True)
    kept = {name.replace(".attention.", "."): value for name, value in teacher.sam.state_dict().items()}
    kept = {name.replace(".mlp.mlp.", ".mlp."): value for name, value in kept.items() if ".adapter." not in name}
    assert kept.keys() == state.keys()
    for name, value in kept.items():
        expected = state[name]
        assert torch.equal(
            value, expected if value.shape == expected.shape else resize_positions(expected, value.shape)
        )
    trains = {name for name, parameter in teacher.named_parameters() if parameter.requires_grad}
    assert all("adapter" in name or name.startswith("prompt.") for name in trains)
    assert teacher.stand_in


def test_a_resumed_run_is_the_uninterrupted_one(weights, tmp_path):
    run(tmp_path / "stand_in.pt", "--steps 4 --stop_after 2")
    assert not (tmp_path / "stand_in.pt").exists()
    run(tmp_path / "stand_in.pt", "--steps 4 --resume")
    resumed, whole = (torch.load(path, weights_only=True) for path in (tmp_path / "stand_in.pt", weights))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "stand_in.pt.log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_run_from_initial_weights_starts_there_and_records_them(weights, tmp_path):
    record = run(tmp_path / "stand_in.pt", f"--steps 1 --lr 1e-12 --initial {weights}")
    state, initial = (torch.load(path, weights_only=True) for path in (tmp_path / "stand_in.pt", weights))
    assert all(torch.allclose(state[name], initial[name], atol=1e-6) for name in initial)
    assert record["initialized_from"] == json.loads(weights.with_suffix(".json").read_text())


def test_a_resume_with_other_options_is_an_error(tmp_path):
    run(tmp_path / "stand_in.pt", "--steps 2 --stop_after 1")
    with pytest.raises(ValueError, match="`resume` needs the options"):
        run(tmp_path / "stand_in.pt", "--steps 2 --resume --lr 0.1")


def test_every_parameter_but_the_unused_gets_a_gradient():
    torch.manual_seed(0)
    sam = pretrain_stand_in.build_sam("stand_in", 64)
    items = [ProceduralDataset(0, 64, num_objects=12, num_images=9)[index] for index in range(2)]
    batch = [torch.stack(tensors) for tensors in zip(*items)]
    losses = pretrain_stand_in.promptable_loss(sam, *batch, torch.Generator().manual_seed(0), num_rounds=3)
    losses["loss"].backward()
    assert {name for name, parameter in sam.named_parameters() if parameter.grad is None} == set()
    assert losses["loss"].item() == pytest.approx((losses["mask"] + losses["iou"]).item())


def test_a_lone_point_asks_for_three_masks_and_anything_else_for_one():
    assert _requested_masks(torch.tensor([True, False])).tolist() == [
        [False, True, True, True],
        [True, False, False, False],
    ]


def test_mask_loss_is_twenty_times_focal_plus_dice():
    logits, target = torch.zeros(1, 1, 2, 2), torch.tensor([[[True, True], [False, False]]])
    # focal: 1/4 ln 2 each pixel, times alpha 0.25 on the object and 0.75 off it; dice: 1 - 2 * 1 / (2 + 2)
    assert _mask_losses(logits, target).item() == pytest.approx(20 * 0.25 * math.log(2) * 0.5 + 0.5, abs=1e-4)


def test_iou_is_overlap_over_union():
    predicted = torch.tensor([[[[True, True], [False, False]], [[False, False], [False, False]]]])
    assert _iou(predicted, torch.tensor([[[True, False], [True, False]]])).tolist() == [[pytest.approx(1 / 3), 0.0]]


@pytest.mark.parametrize(
    "progress, rate", [(0.0, 0.01), (0.015, 0.5), (0.03, 1.0), (0.515, 0.5), (1.0, 0.0), (1.2, 0.0)]
)
def test_the_learning_rate_warms_up_and_falls_as_a_cosine(progress, rate):
    assert learning_rate(progress, peak=1.0) == pytest.approx(rate, abs=1e-9)
