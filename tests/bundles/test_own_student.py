"""
A student of one's own in train.json, by `--network_def`, under SKD and mixing.

Each is what a user types after ``python -m monai.bundle run --config_file bundles/knowsam_acdc/configs/train.json``.
Co-training, the first handler, needs the two views of MultiViewNet: it is switched off. `view_weights`, where not all
are 1, are one for each tensor that the network stacks in train mode: for DynUNet main output and supervised heads, of
which the main one, number 0, is taught.
"""

from __future__ import annotations

import re
import shlex

import pytest
import torch
from fire.parser import DefaultParseValue

from knowsam_monai.errors import root_cause

BASIC_UNET = """
    --network_def '{"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 4}'
    --train#method#_disabled_ True
"""
DYN_UNET = """
    --network_def '{"_target_": "DynUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 4,
        "kernel_size": [3, 3, 3, 3], "strides": [1, 2, 2, 2], "upsample_kernel_size": [2, 2, 2],
        "deep_supervision": True, "deep_supr_num": 2}'
    --view_weights '[1.0, 0.5, 0.25]' --taught_views '[0]' --train#method#_disabled_ True
"""
SWIN_UNETR = """
    --network_def '{"_target_": "SwinUNETR", "spatial_dims": 2, "in_channels": 1, "out_channels": 4,
        "feature_size": 12}'
    --train#method#_disabled_ True
"""
NARROW = {"BasicUNet": {"features": [4, 4, 8, 8, 8, 4]}, "DynUNet": {"filters": [4, 8, 8, 8]}}


def from_command_line(text):
    """The overrides as `python -m monai.bundle run` reads them."""
    words = shlex.split(text)
    options = {name.removeprefix("--"): DefaultParseValue(value) for name, value in zip(words[::2], words[1::2])}
    options["network_def"].update(NARROW.get(options["network_def"]["_target_"], {}))  # as good a test, and faster
    return options


@pytest.mark.parametrize(
    "command_line,image_size,num_views",
    [(BASIC_UNET, 32, None), (DYN_UNET, 32, 3), (SWIN_UNETR, 64, None)],
    ids=["BasicUNet", "DynUNet", "SwinUNETR"],
)
def test_monai_network_is_taught_by_sam(training, command_line, image_size, num_views):
    options = from_command_line(command_line)
    run = training(image_size=image_size, distillation_gate="none", max_iterations=3, epoch_length=3, **options)
    run.run()
    assert type(run["network"]).__name__ == options["network_def"]["_target_"]
    assert len(run.history) == 3 and all("mutual_loss" not in step for step in run.history)
    assert all(step["distillation_loss"] > 0 and step["mixing_loss"] > 0 for step in run.history)
    pred = run["train#trainer"].state.output["pred"]
    assert tuple(pred.shape) == (4, *([num_views] if num_views else []), 4, image_size, image_size)
    taught = [name for name, p in run["network"].named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(taught) > 0.9 * len(list(run["network"].parameters()))


def test_model_of_a_deeply_supervised_student_is_the_deployed_network(training):
    run = training(whole=True, use_sam=False, max_iterations=1, **from_command_line(DYN_UNET)).run()
    state = torch.load(run.output_dir / "model.pt", weights_only=True)
    network = run["network"].eval()
    network.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 4, 32, 32)


@pytest.mark.parametrize(
    "command_line,change,message",
    [
        (DYN_UNET, {"view_weights": [1.0, 1.0]}, r"`view_weights` must be one weight for each of the 3 views"),
        (DYN_UNET, {"taught_views": [0, 5]}, "`taught_views` must be below 3, the number of `view_weights`"),
        (BASIC_UNET, {"view_weights": [1.0] * 3}, "each of the 1 views .* A plain network has one view"),
        (BASIC_UNET, {"train#method#_disabled_": False}, "co-training needs a multi-view student"),
        (
            DYN_UNET,
            {"train#method#_disabled_": False},
            "DynUNet stacks heads of its deep supervision; leave co-training",
        ),
        (
            DYN_UNET.replace("True,", "true,"),
            {},
            "`network_def#deep_supervision` must not be the text 'true'; write True, as in Python",
        ),
        (DYN_UNET, {"taught_views": [1, 2]}, r"`taught_views` must be \[0\], the output of DynUNet, but is \[1, 2\]"),
    ],
    ids=[
        "weights of heads",
        "taught views",
        "weights of a plain network",
        "co-training",
        "co-trained heads",
        "a word of JSON",
        "taught heads",
    ],
)
def test_views_that_do_not_fit_the_student_are_one_clear_error(training, command_line, change, message):
    with pytest.raises(RuntimeError) as error:
        training(max_iterations=1, **{**from_command_line(command_line), **change}).run()
    assert re.search(message, str(root_cause(error.value)))


@pytest.mark.parametrize("use_sam", [True, False])
def test_sigmoid_student_of_one_channel_is_one_clear_error_before_training(training, use_sam):
    options = from_command_line(BASIC_UNET)
    options["network_def"]["out_channels"] = 1
    with pytest.raises(RuntimeError) as error:
        training(class_names=["left ventricle"], use_sam=use_sam, **options).run()
    message = str(root_cause(error.value))
    assert (
        "`network_def` must return logits (1, 2, 32, 32)" in message and "2 instead of one sigmoid channel" in message
    )
