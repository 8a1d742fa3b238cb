from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as functional
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import DynUNet, UNet

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.networks import MultiViewNet
from knowsam_monai.teachers import NetworkTeacher, SliceTeacher, check_teacher

# configs/inference.json of the Model Zoo's ventricular_short_axis_3label, as far as the network goes
VENTRICULAR = {
    "bundle_root": ".",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "network_def": {
        "_target_": "UNet",
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 4,
        "channels": [16, 32, 64, 128, 256],
        "strides": [2, 2, 2, 2],
        "num_res_units": 2,
    },
    "network": "$@network_def.to(@device)",
}
VENTRICULAR_METADATA = {
    "network_data_format": {
        "inputs": {"image": {"num_channels": 1, "spatial_shape": [256, 256], "is_patch_data": False}},
        "outputs": {
            "pred": {"channel_def": {"0": "background", "1": "lv_pool", "2": "myocardium", "3": "rv_pool"}},
        },
    },
}
ACDC_FROM_VENTRICULAR = ["background", "rv_pool", "myocardium", "lv_pool"]


class Fixed(nn.Module):
    """Gives these logits, whatever the image."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, image):
        return self.logits.expand(len(image), -1, *image.shape[2:])


def fixed(*logits):
    return Fixed(torch.tensor(logits, dtype=torch.float64).view(1, -1, 1, 1))


def small_unet(spatial_dims=2, out_channels=3):
    torch.manual_seed(0)
    return UNet(spatial_dims, 1, out_channels, channels=(4, 8), strides=(2,)).eval()


@pytest.fixture
def bundle(tmp_path):
    """What `monai.bundle download` leaves, with random weights."""

    def write(config=VENTRICULAR, metadata=VENTRICULAR_METADATA, weights=True, name="ventricular_short_axis_3label"):
        folder = tmp_path / name
        (folder / "configs").mkdir(parents=True)
        (folder / "models").mkdir()
        (folder / "configs" / "inference.json").write_text(json.dumps(config))
        (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
        (folder / "LICENSE").write_text("\nMIT License\n\nCopyright (c) 2022\n")
        torch.manual_seed(0)
        network = UNet(2, 1, 4, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2)
        if weights:
            torch.save(network.state_dict(), folder / "models" / "model.pt")
        return folder, network.eval()

    return write


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (4, [[0.1], [0.2], [0.3], [0.4]]),
        ((0, 3, 2, 1), [[0.1], [0.4], [0.3], [0.2]]),
        ([0, (1, 2), 3], [[0.1], [0.5], [0.4]]),
        ([(0, 3), (2, 1)], [[0.5], [0.5]]),
    ],
)
def test_softmax_of_merged_logits_is_the_sum_of_probabilities(channels, expected):
    network = fixed(*(torch.tensor([0.1, 0.2, 0.3, 0.4]).log() + 5).tolist())
    logits = NetworkTeacher(network, channels)(torch.zeros(1, 1, 1, 1))
    assert torch.allclose(logits.softmax(1).view(-1, 1), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_a_sigmoid_networks_one_channel_is_background_and_foreground():
    logits = NetworkTeacher(fixed(1.5), channels=2)(torch.zeros(1, 1, 1, 1))
    assert logits.flatten().tolist() == [0, 1.5]
    swapped = NetworkTeacher(fixed(1.5), channels=(1, 0))(torch.zeros(1, 1, 1, 1))
    assert swapped.flatten().tolist() == [1.5, 0]


@pytest.mark.parametrize(("network", "channels"), [(fixed(1.5), [1]), (fixed(0.5, 2.0), [1])])
def test_a_sigmoid_student_has_the_foreground_against_the_rest(network, channels):
    teacher = NetworkTeacher(network, channels)
    assert teacher.num_classes == 1
    assert teacher(torch.zeros(1, 1, 1, 1)).item() == 1.5


def test_one_channel_for_one_class_is_the_foreground_and_of_several_it_must_be_named():
    for channels in (1, [0]):
        assert NetworkTeacher(fixed(1.5), channels)(torch.zeros(1, 1, 1, 1)).item() == 1.5
    with pytest.raises(
        ValueError, match=r"`channels` must name the foreground for a student of one class, as in \[1\]"
    ):
        NetworkTeacher(fixed(0.5, 2.0), 1)(torch.zeros(1, 1, 1, 1))


def test_a_sigmoid_student_of_many_classes_has_the_right_probability():
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    teacher = NetworkTeacher(fixed(*probabilities.log().tolist()), channels=[(1, 3)])
    assert teacher(torch.zeros(1, 1, 1, 1)).sigmoid().item() == pytest.approx(0.6)


@pytest.mark.parametrize(("channels", "expected"), [(3, [3.0, 0.0, -2.0]), ((2, 0), [-2.0, 3.0]), ([1], [0.0])])
def test_regions_of_a_sigmoid_network_are_picked_by_channel(channels, expected):
    teacher = NetworkTeacher(fixed(3.0, 0.0, -2.0), channels, overlapping=True)
    assert teacher(torch.rand(1, 1, 4, 4), None)[0, :, 0, 0].tolist() == expected
    assert check_teacher(teacher.float(), torch.rand(2, 1, 4, 4)).num_classes == len(expected)
    assert SAMDistiller(SliceTeacher(teacher), overlapping=True).overlapping  # it knows through its slices


@pytest.mark.parametrize("channels", [[(2, 3)], [0, (1, 2), 3], [(0, 1), 2, 3]])
def test_logarithms_of_certain_probabilities_teach_finite_losses(channels):
    """The rest of one channel is certain too, which makes it +inf without care."""

    class Certain(nn.Module):
        def forward(self, image):
            return functional.one_hot((4 * image[:, 0]).long(), 4).movedim(-1, 1).float().log()

    image = torch.rand(2, 1, 8, 8)
    teacher = NetworkTeacher(Certain(), channels)
    logits = torch.randn(2, len(channels), 8, 8, requires_grad=True)
    result = SAMDistiller(teacher, gate="none")(image, logits)
    result.loss.backward()
    found = teacher(image)
    truth = (4 * image[:, :1]).long()
    if len(channels) == 1:
        assert torch.equal(found > 0, truth >= 2) and (found < torch.inf).all()
    assert 0 < result.loss < 100 and logits.grad.isfinite().all() and logits.grad.flatten(1).any(1).all()


def test_regions_are_never_merged_and_exist():
    with pytest.raises(ValueError, match="`channels` must have one channel for each overlapping region but are"):
        NetworkTeacher(fixed(3.0, 0.0, -2.0), [0, (1, 2)], overlapping=True)
    with pytest.raises(
        ValueError, match=r"`channels` must be below 3, the network's channels, but are \(\(0,\), \(3,\)\)"
    ):
        NetworkTeacher(fixed(3.0, 0.0, -2.0), [0, 3], overlapping=True)(torch.rand(1, 1, 4, 4), None)


def test_softmax_network_does_not_teach_overlapping_regions():
    for teacher in (NetworkTeacher(fixed(3.0, 0.0, -2.0), 3), SliceTeacher(NetworkTeacher(fixed(3.0, 0.0, -2.0), 3))):
        with pytest.raises(ValueError, match="`overlapping` must be False, as in `teacher`, but is True"):
            SAMDistiller(teacher, overlapping=True)


@pytest.mark.parametrize("patch_size", [16, (16,), (16, 0), (8, 8.5), (8, 8, 8, 8)])
def test_patch_size_that_is_no_size_is_refused(patch_size):
    with pytest.raises(ValueError, match="`patch_size` must be two or three whole numbers above 0, or None, but is "):
        NetworkTeacher(fixed(0, 0), 2, patch_size=patch_size)


@pytest.mark.parametrize("channels", [3, (0, 1, 2, 4), [0, (1, 2)], 5])
def test_channels_that_do_not_fit_the_network_are_named(channels):
    with pytest.raises(ValueError, match="each of the network's 4 channels once but are"):
        NetworkTeacher(fixed(0, 0, 0, 0), channels)(torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize(
    "channels", [0, (), [0, ()], (0, 1, 1), (0, -1), (0, True), [0, "heart"], (0, 1.0), None, 2.0, True, "background"]
)
def test_channels_that_are_no_map_are_refused(channels):
    with pytest.raises(ValueError, match="`channels` must have one or more channels of the network for each class"):
        NetworkTeacher(fixed(0, 0), channels)


@pytest.mark.parametrize("channels", [None, 2.0, True, "background"])
def test_channels_of_a_bundle_that_are_no_map_are_refused(bundle, channels):
    with pytest.raises(ValueError, match="for each class, 0 or above, each only once, but are " + repr(channels)):
        NetworkTeacher.from_bundle(bundle()[0], channels)


def test_channels_may_be_an_array():
    assert NetworkTeacher(fixed(0, 0), torch.tensor([1, 0])).channels == ((1,), (0,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"overlap": value}, "`overlap` must be a number, 0 or more and below 1") for value in (1.0, -1, "x")),
        ({"windows_per_call": 0}, "`windows_per_call` must be at least 1 but is 0"),
        ({"windows_per_call": 1.5}, "`windows_per_call` must be a whole number but is 1.5"),
    ],
)
def test_windows_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NetworkTeacher(fixed(0, 0), 2, patch_size=(16, 16), **options)


def test_what_is_no_network_is_refused():
    with pytest.raises(TypeError, match="`network` must be a torch module but is a str; for a file use"):
        NetworkTeacher("model.ts", 2)


@pytest.mark.parametrize(
    ("network", "image", "message"),
    [
        (small_unet(3), (1, 1, 16, 16), "use a 2D network, since this one takes volumes, or a 3D student"),
        (small_unet(2), (1, 1, 16, 16, 16), "put this 2D network into SliceTeacher"),
        (small_unet(2), (1, 2, 16, 16), "give its `patch_size`, and check its input channels"),
        (torch.jit.script(nn.Conv2d(2, 3, 1)), (1, 1, 16, 16), r"\(RuntimeError: Given groups=1, .*\); give"),
    ],
)
def test_network_for_other_images_is_named_with_a_remedy(network, image, message):
    with pytest.raises(ValueError, match=f"`network` must take images of shape .*{message}"):
        NetworkTeacher(network, 3)(torch.rand(image))


def test_network_that_returns_probabilities_is_warned_of_once(caplog):
    teacher, image = NetworkTeacher(nn.Sequential(small_unet(), nn.Softmax(1)), 3), torch.rand(1, 1, 16, 16)
    teacher(image), teacher(image)
    assert caplog.text.count("returns probabilities, which sum to 1; remove its last softmax") == 1
    caplog.clear()
    NetworkTeacher(small_unet(), 3)(image)
    assert not caplog.text


@pytest.mark.parametrize(("spatial_dims", "size", "patch"), [(2, (40, 24), (16, 16)), (3, (24, 16, 12), (16, 16, 8))])
def test_a_smaller_patch_slides_over_the_image_as_monai_does_it(spatial_dims, size, patch):
    network, image = small_unet(spatial_dims), torch.rand(2, 1, *size)
    expected = SlidingWindowInferer(patch, sw_batch_size=4, overlap=0.25, mode="gaussian")(image, network)
    got = NetworkTeacher(network, 3, patch_size=patch, overlap=0.25)(image, torch.zeros(2, 3, *size))
    assert torch.equal(got, torch.cat([expected[:, [i]] for i in range(3)], dim=1))


def test_an_image_smaller_than_the_patch_is_padded():
    assert NetworkTeacher(small_unet(), 3, patch_size=(32, 32))(torch.rand(1, 1, 17, 9)).shape == (1, 3, 17, 9)


@pytest.mark.parametrize("normalize", ["z_score", lambda image: (image - 0.5) * 4])
def test_the_network_sees_the_values_it_was_trained_on(normalize):
    seen = []
    network = nn.Conv2d(1, 2, 1)
    network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    image = torch.rand(2, 1, 8, 8) * torch.tensor([1, 0.1]).view(2, 1, 1, 1)
    NetworkTeacher(network, 2, normalize=normalize)(image)
    if normalize == "z_score":
        assert torch.allclose(seen[0].mean((1, 2, 3)), torch.zeros(2), atol=1e-6)
        assert torch.allclose(seen[0].std((1, 2, 3)), torch.ones(2), atol=1e-5)
    else:
        assert torch.equal(seen[0], normalize(image))


def test_a_constant_image_has_no_deviation_and_stays_finite():
    assert NetworkTeacher(small_unet(), 3, normalize="z_score")(torch.ones(1, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize("normalize", ["zscore", 3])
def test_other_normalizations_are_refused(normalize):
    with pytest.raises(ValueError, match="`normalize` must be 'z_score', a callable or None"):
        NetworkTeacher(small_unet(), 3, normalize=normalize)


def test_the_prompt_is_ignored_and_metadata_left_behind():
    teacher, image = NetworkTeacher(small_unet(), 3), torch.rand(2, 1, 16, 16)
    logits = teacher(MetaTensor(image), torch.randn(2, 3, 16, 16))
    assert type(logits) is torch.Tensor
    assert torch.equal(logits, teacher(image))


def test_deep_supervision_and_another_size_are_named():
    network = DynUNet(
        2, 1, 3, kernel_size=(3, 3, 3), strides=(1, 2, 2), upsample_kernel_size=(2, 2), deep_supervision=True
    )
    assert NetworkTeacher(network, 3)(torch.rand(1, 1, 16, 16)).shape == (1, 3, 16, 16)  # one output in eval mode
    with pytest.raises(ValueError, match="`network` must return one tensor but returns a list"):
        NetworkTeacher(Listing(), 3)(torch.rand(1, 1, 16, 16))
    with pytest.raises(
        ValueError, match=r"of the image's batch and spatial size, \(1, 1, 16, 16\), but returns \(1, 3, 8, 8\)"
    ):
        NetworkTeacher(nn.Conv2d(1, 3, 1, stride=2), 3)(torch.rand(1, 1, 16, 16))


class Listing(nn.Module):
    def forward(self, image):
        return [image]


def test_a_copy_has_its_own_network():
    teacher = NetworkTeacher(small_unet(), 3, patch_size=(8, 8))
    other, image = copy.deepcopy(teacher), torch.rand(1, 1, 16, 16)
    nn.init.zeros_(next(other.network.parameters()))
    assert not torch.equal(teacher(image), other(image))
    assert set(teacher.state_dict()) == {f"network.{name}" for name in small_unet().state_dict()}


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_frozen_teacher_needs_no_optimizer(spatial_dims):
    """The student learns from all rows, the teacher from none."""
    size = (16, 16, 8)[:spatial_dims]
    teacher, student = NetworkTeacher(small_unet(spatial_dims), 3), small_unet(spatial_dims).train()
    nn.init.zeros_(list(student.parameters())[-1])
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distiller = SAMDistiller(teacher, gate="none")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    image, label = torch.rand(2, 1, *size), torch.zeros(1, 1, *size, dtype=torch.long)
    losses = []
    for _ in range(5):
        result = distiller(image, student(image), label)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(result.distillation_loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_torchscript_file_teaches_as_its_network(tmp_path):
    network, image = small_unet(), torch.rand(2, 1, 16, 16)
    torch.jit.script(network).save(tmp_path / "model.ts")
    teacher = NetworkTeacher.from_torchscript(tmp_path / "model.ts", channels=(2, 1, 0), license="MIT License")
    assert torch.allclose(teacher(image), NetworkTeacher(network, (2, 1, 0))(image), atol=1e-6)
    assert check_teacher(teacher, image).license == "MIT License"


def test_frozen_torchscript_has_no_parameters_and_teaches():
    network, image = torch.jit.freeze(torch.jit.script(small_unet())), torch.rand(2, 1, 16, 16)
    facts = check_teacher(NetworkTeacher(network, 3), image)
    assert facts.frozen and facts.num_parameters == 0


def test_a_file_that_is_no_torchscript_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.ts does not exist"):
        NetworkTeacher.from_torchscript(tmp_path / "missing.ts", 3)
    with pytest.raises(ValueError, match="is a folder; for a bundle use `from_bundle`"):
        NetworkTeacher.from_torchscript(tmp_path, 3)
    torch.save(small_unet().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt is damaged or something else; for a `state_dict`"):
        NetworkTeacher.from_torchscript(tmp_path / "model.pt", 3)


def test_the_zoos_ventricular_network_teaches_acdcs_classes(bundle):
    folder, network = bundle()
    teacher = NetworkTeacher.from_bundle(folder, channels=ACDC_FROM_VENTRICULAR)
    assert teacher.channels == ((0,), (3,), (2,), (1,))
    image = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(teacher(image), network(image)[:, [0, 3, 2, 1]])
    facts = check_teacher(teacher, image, num_classes=4)
    assert facts.frozen and facts.pretrained and facts.license == "MIT License" and facts.pretrained_on is None
    assert teacher.patch_size is None


def test_a_bundle_of_patches_slides_and_names_its_data(bundle):
    metadata = json.loads(json.dumps(VENTRICULAR_METADATA))
    metadata["network_data_format"]["inputs"]["image"] |= {"spatial_shape": [32, 32], "is_patch_data": True}
    metadata["data_source"] = "http://medicaldecathlon.com/"
    folder, _ = bundle(metadata=metadata)
    teacher = NetworkTeacher.from_bundle(folder, channels=4)
    assert teacher.patch_size == (32, 32) and teacher.pretrained_on == "http://medicaldecathlon.com/"
    assert NetworkTeacher.from_bundle(folder, channels=4, patch_size=None).patch_size is None


def test_a_name_that_the_bundle_does_not_have_is_refused(bundle):
    folder, _ = bundle()
    with pytest.raises(
        ValueError, match="among background, lv_pool, myocardium, rv_pool, .*but one of them is 'heart'"
    ):
        NetworkTeacher.from_bundle(folder, channels=["background", "heart", "myocardium", "lv_pool"])


def test_torchscript_serves_where_a_bundle_has_no_state_dict(bundle):
    folder, network = bundle(weights=False)
    with pytest.raises(FileNotFoundError, match="has neither models/model.pt nor models/model.ts; .*monai.bundle down"):
        NetworkTeacher.from_bundle(folder, channels=4)
    torch.jit.script(network).save(folder / "models" / "model.ts")
    assert NetworkTeacher.from_bundle(folder, channels=4)(torch.rand(1, 1, 32, 32)).shape == (1, 4, 32, 32)


def test_a_student_of_this_projects_bundle_teaches_the_next_one(bundle):
    folder, _ = bundle()
    shipped = Path(__file__).parents[2] / "bundles" / "knowsam_acdc" / "configs" / "inference.json"
    (folder / "configs" / "inference.json").write_text(shipped.read_text())
    network = MultiViewNet(spatial_dims=2, in_channels=1, out_channels=4).eval()
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    image = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(NetworkTeacher.from_bundle(folder, 4)(image), network(image))


def test_references_to_plain_values_are_followed(bundle):
    config = VENTRICULAR | {"sizes": {"classes": 4, "widths": [16, 32, 64, 128, 256]}}
    config["network_def"] = VENTRICULAR["network_def"] | {
        "out_channels": "@sizes::classes",
        "channels": "@sizes#widths",
    }
    folder, _ = bundle(config)
    assert NetworkTeacher.from_bundle(folder, channels=4).network.out_channels == 4


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"_target_": "os.system", "command": "touch {marker}"}, "the target os.system"),
        ({"_target_": "torch.load"}, "the target torch.load"),
        ({"_target_": "torch.nn.init.zeros_"}, "the target torch.nn.init.zeros_"),
        ({"_target_": "monai.networks.utils.torch.load"}, "the target monai.networks.utils.torch.load"),
        ({"act": {"_target_": "builtins.exec"}}, "the target builtins.exec"),
        ({"out_channels": "$__import__('os').system('touch {marker}')"}, r"the expression \$__import__"),
        ({"out_channels": "%configs/other.json::out"}, "the expression %configs"),
        ({"out_channels": "@missing::key"}, "the reference @missing::key, which has no plain value"),
        ({"out_channels": "@network_def::out_channels"}, "the reference @network_def::out_channels"),
        ({"out_channels": "@network"}, r"the expression \$@network_def"),
        ({"_mode_": "debug"}, "`_mode_`"),
        ({"_target_": "TorchVisionFCModel", "pretrained": True}, "`pretrained`, which would download"),
    ],
)
def test_a_config_that_is_more_than_plain_values_is_refused_and_not_run(bundle, tmp_path, change, found):
    marker = tmp_path / "ran"
    change = json.loads(json.dumps(change).replace("{marker}", str(marker)))
    folder, _ = bundle(VENTRICULAR | {"network_def": VENTRICULAR["network_def"] | change})
    with pytest.raises(ValueError, match=rf"only network classes and plain values but has {found}") as error:
        NetworkTeacher.from_bundle(folder, channels=4)
    assert "does not run the code of downloaded files" in str(error.value)
    assert not marker.exists()


def test_the_rest_of_a_config_is_not_run(bundle, tmp_path):
    marker = tmp_path / "ran"
    config = {"imports": [f"$open({str(marker)!r}, 'w')"], "initialize": f"$open({str(marker)!r}, 'w')"} | VENTRICULAR
    NetworkTeacher.from_bundle(bundle(config)[0], channels=4)
    assert not marker.exists()


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "network_weights"])
def test_weights_of_trainers_are_found(bundle, wrapper):
    folder, network = bundle()
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 3, wrapper: state}, folder / "models" / "model.pt")
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(NetworkTeacher.from_bundle(folder, 4)(image), network(image))


def test_weights_of_another_network_are_named(bundle):
    folder, _ = bundle()
    torch.save(UNet(2, 1, 4, channels=(4, 8), strides=(2,)).state_dict(), folder / "models" / "model.pt")
    with pytest.raises(ValueError, match="model.pt holds another model .*; copy the config and weights again"):
        NetworkTeacher.from_bundle(folder, channels=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"network": 3}, "inference.json has no `network_def`; build the network yourself"),
        (VENTRICULAR | {"network_def": 7}, "must be a network but is 7"),
        (
            VENTRICULAR | {"network_def": {"_target_": "UNet", "width": 3}},
            "must have valid arguments but UNet refuses them",
        ),
        (
            VENTRICULAR | {"network_def": VENTRICULAR["network_def"] | {"strides": [2]}},
            r"inference.json must have valid arguments but UNet refuses them \(.*\); correct it, or build",
        ),
        (
            VENTRICULAR | {"sizes": [4], "network_def": VENTRICULAR["network_def"] | {"out_channels": "@sizes#1"}},
            "the reference @sizes#1, which has no plain value",
        ),
    ],
)
def test_a_bundle_without_a_network_is_named(bundle, config, message):
    with pytest.raises(ValueError, match=message):
        NetworkTeacher.from_bundle(bundle(config)[0], channels=4)


def test_folders_that_are_no_bundle_are_named(tmp_path, bundle):
    with pytest.raises(FileNotFoundError, match="bundle's folder but .*missing is not; unpack"):
        NetworkTeacher.from_bundle(tmp_path / "missing", channels=4)
    folder, _ = bundle()
    (folder / "configs" / "inference.json").write_text("{")
    with pytest.raises(ValueError, match="inference.json cannot be read"):
        NetworkTeacher.from_bundle(folder, channels=4)
    (folder / "configs" / "inference.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no configs/inference.json"):
        NetworkTeacher.from_bundle(folder, channels=4)


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        {"network_data_format": None},
        {"network_data_format": []},
        {"network_data_format": {"inputs": []}},
        {"network_data_format": {"inputs": {"image": {"spatial_shape": 96, "is_patch_data": True}}}},
        {"network_data_format": {"outputs": {"pred": {"channel_def": ["a", "b"]}}}},
        {"network_data_format": {"outputs": {"pred": {"channel_def": {"zero": "background"}}}}},
        {"network_data_format": {"outputs": {"pred": {"channel_def": {"0": "tumor", "1": "tumor"}}}}},
        {"data_source": 7},
    ],
)
def test_metadata_of_another_format_is_one_sentence(bundle, metadata):
    folder, _ = bundle(metadata=metadata)
    with pytest.raises(ValueError) as error:
        NetworkTeacher.from_bundle(folder, channels=4)
    start = "`path` must be a bundle whose configs/metadata.json has the Model Zoo's format but "
    assert str(error.value).startswith(f"{start}{folder / 'configs' / 'metadata.json'} does not")
    assert str(error.value).endswith("; correct it, or remove it and give `channels` as numbers.")


def test_several_sources_are_listed_and_a_license_in_any_encoding_is_read(bundle):
    folder, _ = bundle(metadata={"data_source": ["ACDC", "M&Ms"]})
    (folder / "LICENSE").write_bytes("Lizenz für alle".encode("latin-1"))
    teacher = NetworkTeacher.from_bundle(folder, channels=4, pretrained_on=None)
    assert teacher.pretrained_on == "ACDC, M&Ms" and teacher.license.startswith("Lizenz f")
    assert NetworkTeacher.from_bundle(folder, channels=4, pretrained_on="ours").pretrained_on == "ours"
