"""Every teacher of this package keeps the contract, and a teacher that does not is told where."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
from monai.networks.nets import UNet

from knowsam_monai.teachers import NetworkTeacher, Sam2Teacher, SAMTeacher, SliceTeacher, check_teacher, origin
from tests.teachers.sam2_toys import toy_config


def sam_teacher(**options):
    return SAMTeacher(num_classes=3, image_size=64, **({"variant": "stand_in", "trainable": "all"} | options))


def network(spatial_dims=2, channels=3):
    return UNet(spatial_dims, 1, channels, channels=(4, 8), strides=(2,), norm="batch", dropout=0.2)


def teacher_network(**options):
    return NetworkTeacher(network(), channels=3, **options)


def sam2_teacher(**options):
    return Sam2Teacher(num_classes=3, image_size=64, variant=toy_config(), **options)


IMAGE, VOLUME = (2, 1, 64, 64), (2, 1, 32, 32, 4)
TEACHERS = {
    "SAM 1": (sam_teacher, IMAGE),
    "SAM 1, adapters alone": (lambda: sam_teacher(trainable="adapters"), IMAGE),
    "SAM 1, cached": (lambda: sam_teacher(encoder="cached"), IMAGE),
    "SAM 1, slices": (lambda: SliceTeacher(sam_teacher()), VOLUME),
    "SAM 1, some slices a step": (lambda: SliceTeacher(sam_teacher(), slices=2), VOLUME),
    "network": (teacher_network, IMAGE),
    "network, float64": (lambda: teacher_network().double(), IMAGE),
    "network, windows": (lambda: teacher_network(patch_size=(32, 32)), IMAGE),
    "network, z-score": (lambda: teacher_network(normalize="z_score"), IMAGE),
    "network, merged": (lambda: NetworkTeacher(network(channels=4), channels=[(0, 3), 2, 1]), IMAGE),
    "network, 3D": (lambda: NetworkTeacher(network(spatial_dims=3), channels=3), VOLUME),
    "network, 3D windows": (
        lambda: NetworkTeacher(network(spatial_dims=3), channels=3, patch_size=(16, 16, 8)),
        VOLUME,
    ),
    "network, slices": (lambda: SliceTeacher(teacher_network()), VOLUME),
    "network, TorchScript": (
        lambda: NetworkTeacher(torch.jit.script(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1))), channels=3),
        IMAGE,
    ),
    "SAM 2": (sam2_teacher, IMAGE),
    "SAM 2, all": (lambda: sam2_teacher(trainable="all"), IMAGE),
    "SAM 2, cached": (lambda: sam2_teacher(encoder="cached"), IMAGE),
    "SAM 2, slices": (lambda: SliceTeacher(sam2_teacher()), VOLUME),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_of_this_package_keep_the_contract(name):
    build, shape = TEACHERS[name]
    torch.manual_seed(0)
    facts = check_teacher(build(), torch.rand(shape))
    assert facts.num_classes == 3
    assert facts.frozen == name.startswith("network")
    assert facts.pretrained == name.startswith("network")


def test_what_sams_weights_were_trained_on_is_known_by_the_files_name():
    """SliceTeacher passes on the description of its 2D teacher."""
    teacher = sam_teacher()
    teacher.checkpoint = "/models/sam_vit_b_01ec64.pth"
    for taught, shape in ((teacher, IMAGE), (SliceTeacher(teacher), VOLUME)):
        facts = check_teacher(taught, torch.rand(shape))
        assert "SA-1B" in facts.pretrained_on and facts.license == "Apache-2.0"
    network_teacher = teacher_network(pretrained_on="our scans of 2019", license="CC-BY-4.0")
    assert origin(SliceTeacher(network_teacher)) == ("our scans of 2019", "CC-BY-4.0")
    teacher.checkpoint = "/models/medsam_vit_b.pth"
    assert "for your test patients" in origin(teacher).pretrained_on
    stand_in = sam_teacher(checkpoint="procedural")
    assert origin(stand_in).pretrained_on == "procedural images: a stand-in, not SAM"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("models/sam2.1-hiera-tiny/model.safetensors", "SA-V"),
        ("hub/models--facebook--sam2.1-hiera-tiny/snapshots/4f2a", "SA-V"),
        ("sam2.1-hiera-tiny/medsam_vit_b.pth", "10 modalities"),
        ("models/own.pth", None),
    ],
)
def test_the_whole_path_of_a_checkpoint_is_compared_and_the_files_name_first(path, found):
    teacher = nn.Identity()
    teacher.checkpoint = path
    pretrained_on = origin(teacher).pretrained_on
    assert pretrained_on is None if found is None else found in pretrained_on


@pytest.mark.parametrize("name", ["SAM 1, adapters alone", "network", "SAM 2"])
def test_other_sizes_go_in_and_come_out(name):
    teacher, image = TEACHERS[name][0](), torch.rand(2, 1, 48, 40)
    check_teacher(teacher, image)


def test_a_check_leaves_teacher_and_random_states_as_they_were():

    def drop_out(net, image, prompt):
        random.random(), np.random.rand()
        return nn.functional.dropout(net.train()(image)) + prompt.detach()

    teacher = Trains(drop_out).train()
    values = {name: value.clone() for name, value in teacher.state_dict().items()}
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(ValueError):
        check_teacher(teacher, torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()
    assert all(module.training for module in teacher.modules())
    assert all(torch.equal(value, values[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


class Kept(nn.Module):
    """Keeps the contract; each entry of `BREAKS` breaks one line of it."""

    num_classes = 3

    def __init__(self, forward=lambda net, image, prompt: net(image) + prompt.detach(), **attributes):
        super().__init__()
        self.net = nn.Conv2d(1, 3, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.forward_of_net = forward
        for name, value in attributes.items():
            setattr(self, name, value)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    def forward(self, image, prompt_logits):
        return self.forward_of_net(self.net, image, prompt_logits)


class Trains(Kept):
    def train(self, mode=True):
        return nn.Module.train(self, mode)


class CountsCalls(Kept):
    def forward(self, image, prompt_logits):
        self.calls += 1
        return self.net(image)


class FailsToTrain(Kept):
    def train(self, mode=True):
        return {}["mode"] if mode else super().train(False)


BREAKS = {
    "trains": (Trains, r"stay in eval mode after `train\(\)`.*itself"),
    "draws": (lambda: Kept(lambda net, image, prompt: net(image) + torch.rand(())), "same logits for the same image"),
    "turns rows around": (
        lambda: Kept(lambda net, image, prompt: net(image.flip(0))),
        "same logits for a row alone and in a batch",
    ),
    "subtracts the batch's mean": (
        lambda: Kept(lambda net, image, prompt: net(image) - image.mean()),
        "same logits for a row alone and in a batch",
    ),
    "normalizes by the batch": (
        lambda: Kept(lambda net, image, prompt: nn.functional.batch_norm(net(image), None, None, training=True)),
        "same logits for a row alone and in a batch",
    ),
    "mixes rows": (
        lambda: Kept(lambda net, image, prompt: net(image - image.mean())),
        "same logits for a row alone and in a batch",
    ),
    "downsamples": (
        lambda: Kept(lambda net, image, prompt: net(image[..., ::2])),
        r"logits of shape \(2, 3, 8, 8\)",
    ),
    "gives two": (lambda: Kept(lambda net, image, prompt: (net(image), prompt)), "returns a tuple"),
    "halves": (lambda: Kept(lambda net, image, prompt: net(image).half()), "float32 but returns torch.float16"),
    "takes logarithms": (lambda: Kept(lambda net, image, prompt: net(image).relu().log()), "finite logits"),
    "writes into the image": (lambda: Kept(lambda net, image, prompt: net(image.sub_(0.5))), "not change the image"),
    "writes into the prompt": (
        lambda: Kept(torch.no_grad()(lambda net, image, prompt: net(image) + 0 * prompt.clamp_(-10, 10))),
        "not change the prompt but changes it in place",
    ),
    "counts calls": (CountsCalls, "not change its weights and buffers in a call but changes calls"),
    "moves its weights": (
        lambda: Kept(lambda net, image, prompt: (net.weight.data.add_(1), net(image))[1]),
        "not change its weights and buffers in a call but changes net.weight",
    ),
    "fails with a graph": (
        lambda: Kept(lambda net, image, prompt: net(image) if not torch.is_grad_enabled() else 1 / 0),
        "but raises ZeroDivisionError: division by zero",
    ),
    "gives two with a graph": (
        lambda: Kept(lambda net, image, prompt: net(image) if not torch.is_grad_enabled() else (image, prompt)),
        "returns a tuple",
    ),
    "fails for one row": (
        lambda: Kept(lambda net, image, prompt: net(image if len(image) > 1 else None)),
        r"accept images of shape \(1, 1, 8, 8\)",
    ),
    "cuts one row": (
        lambda: Kept(lambda net, image, prompt: net(image) if len(image) > 1 else net(image)[..., :4]),
        r"logits of shape \(1, 3, 8, 8\)",
    ),
    "fails to train": (FailsToTrain, r"accept `train\(\)` but raises KeyError"),
    "says a text": (lambda: Kept(num_classes="3"), "a whole number, 1 or more, as `num_classes` but has '3'"),
    "says a truth": (lambda: Kept(num_classes=True), "a whole number, 1 or more, as `num_classes` but has True"),
    "ends with a dot": (
        lambda: Kept(lambda net, image, prompt: exec("raise OSError('gone.')")),
        r"but raises OSError: gone\.$",
    ),
    "leads to the prompt": (lambda: Kept(lambda net, image, prompt: net(image) + prompt), "no gradient to the prompt"),
    "has no graph": (
        lambda: Kept(torch.no_grad()(lambda net, image, prompt: net(image))),
        "graph to its trainable parameters",
    ),
    "has an idle layer": (
        lambda: Kept(idle=nn.Linear(2, 2)),
        "every trainable parameter but does not use 2 of them, such as idle.weight",
    ),
    "says a number": (lambda: Kept(pretrained_on=7), "have a str or None as `pretrained_on` but has 7"),
    "says four": (
        lambda: Kept(num_classes=4),
        r"prompts of shape \(2, 4, 8, 8\) but raises RuntimeError: The size of tensor",
    ),
    "says no classes": (lambda: Kept(num_classes=None), "have `num_classes` but does not"),
}


def test_a_teacher_that_keeps_the_contract_passes():
    facts = check_teacher(Kept(), torch.rand(2, 1, 8, 8))
    assert facts.trainable == ("net.weight", "net.bias") and facts.pretrained is None


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_contract_is_one_sentence(name):
    build, message = BREAKS[name]
    torch.manual_seed(0)
    teacher = build()
    values = {key: value.clone() for key, value in teacher.state_dict().items()}
    for image in (torch.rand(2, 1, 8, 8), torch.full((2, 1, 8, 8), 0.5)):
        with pytest.raises(ValueError, match=message) as error:
            check_teacher(teacher, image)
        assert str(error.value).startswith("`teacher` must ") and re.search(r"[^.]\.$", str(error.value))
        assert "\n" not in str(error.value)
        assert all(torch.equal(value, values[key]) for key, value in teacher.state_dict().items())


def test_classes_of_teacher_and_student_agree():
    with pytest.raises(ValueError, match="must have the student's 4 classes but has 3"):
        check_teacher(Kept(), torch.rand(2, 1, 8, 8), num_classes=4)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(1, 1, 8, 8), "two or more images"),
        (torch.rand(2, 8, 8), "two or more images"),
        (torch.rand(2, 1, 8, 0), "none of them empty"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.long), "of floats"),
        (torch.full((2, 1, 8, 8), 300.0), r"in 0\.\.1 but is in 300\.\.300"),
    ],
)
def test_an_image_that_serves_no_check_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        check_teacher(Kept(), image)


def test_an_array_is_no_image():
    with pytest.raises(TypeError, match="`image` must be a tensor but is a ndarray"):
        check_teacher(Kept(), np.zeros((2, 1, 8, 8)))


def test_a_function_is_no_teacher():
    with pytest.raises(TypeError, match="must be a torch module but is a function"):
        check_teacher(lambda image, prompt_logits: prompt_logits, torch.rand(2, 1, 8, 8))
