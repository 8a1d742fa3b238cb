"""Method and network overlays over train.json: each trains with and without SAM, and its student can train on."""

from __future__ import annotations

import json
import math

import nibabel
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import set_determinism

from knowsam_monai.networks import StackedNetworks, UNet
from tests.bundles.conftest import CONFIGS, CONFIGS_3D, Training

SAM = {"sam_loss", "distillation_loss", "gate_weight", "teacher_labeled_dice", "student_labeled_dice"}
QUICK = {
    "max_iterations": 3,
    "epoch_length": 3,
    "network_def": None,
    "distillation_gate": "none",
    "distillation_dice_weight": 1.0,
    "taught_rows": "unlabeled",
}
SMALL_UNET_3D = {
    "_target_": "knowsam_monai.networks.UNet",
    "spatial_dims": 3,
    "in_channels": "@in_channels",
    "out_channels": "@num_classes",
    "channels": "@channels",
}
# the terms beside the supervised loss that a method writes in its last iteration
METHODS = {
    "supervised": set(),
    "mean_teacher": {"consistency_loss"},
    "ua_mt": {"consistency_loss", "certain_fraction"},
    "cps": {"mutual_loss"},
    "fixmatch": {"pseudo_label_loss", "sure_fraction"},
    "bcp": {"pseudo_label_loss"},
}


def parser(*names, **override):
    config = ConfigParser()
    config.read_config([str(CONFIGS / name) for name in names])
    config.update(override)
    return config


@pytest.mark.parametrize("use_sam", [True, False], ids=["with SAM", "without SAM"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", ["training", "training_3d"], ids=["slices", "volumes"])
def test_method_trains(request, build, method, use_sam):
    training = request.getfixturevalue(build)
    options = {**QUICK, "use_sam": use_sam}
    if method == "bcp":
        options["pretraining_iterations"] = 1
    if method == "supervised":
        options["unlabeled_batch_size"] = None if not use_sam else 2
    if build == "training_3d" and method != "cps":  # as good a test, and faster than MONAI's VNet
        options["network_def"] = SMALL_UNET_3D
    if build == "training_3d" and method == "bcp":  # pairs of rows become one: more than one voxel in the lowest level
        options["image_size"] = [32, 32, 16]
    run = training(overlays=("network_plain.json", f"{method}.json"), **options).run()
    assert len(run.history) == 3 and all(math.isfinite(value) for step in run.history for value in step.values())
    assert set(run.history[-1]) == {"loss"} | METHODS[method] | (SAM if use_sam else set())
    assert (run["distiller"] is None) != use_sam
    if use_sam:
        assert all(step["distillation_loss"] > 0 and step["sam_loss"] > 0 for step in run.history)
        assert run["sam_optimizer"].state


def test_supervised_baseline_loads_and_sees_labeled_rows_only(training):
    options = {**QUICK, "use_sam": False, "unlabeled_batch_size": None}
    run = training(overlays=("network_plain.json", "supervised.json"), **options).run()
    assert len(run["train#unlabeled_dataset"]) == 0
    assert len(run["train#trainer"].state.output["image"]) == len(run["train#trainer"].state.output["label"]) == 2


def test_strong_images_differ_from_the_weak_ones_in_intensities_alone(training):
    run = training(overlays=("network_plain.json", "fixmatch.json"), **QUICK)
    for batch in zip(range(3), run["train#dataloader"]):
        weak, strong = batch[1]["image"][2:], batch[1]["image_strong"]
        assert weak.shape == strong.shape and not torch.equal(weak, strong)
        for one, other in zip(weak, strong):
            stacked = torch.stack([one.flatten(), other.flatten()])
            assert torch.corrcoef(stacked)[0, 1] > 0.6  # another geometry would leave little of it


def test_copy_paste_mixes_labeled_rows_first_and_gives_sam_no_pseudo_label(training):
    options = {**QUICK, "max_iterations": 1, "epoch_length": 1}
    pretraining = {"pretraining_iterations": 1, "unlabeled_pixel_weight": 0}
    first = training(overlays=("network_plain.json", "bcp.json"), **options, **pretraining).run()
    assert set(first["train#trainer"].state.output["label"].unique().tolist()) <= {0, 1, 2, 3}
    assert len(first["train#trainer"].state.output["image"]) == 1
    second = training(overlays=("network_plain.json", "bcp.json"), **{**options, "pretraining_iterations": 0}).run()
    batch = second["train#trainer"].state.batch
    assert len(batch["image"]) == 2 and ((batch["label"] == 255) == (batch["pseudo_label"] != 255)).all()


def test_whole_run_with_preflight_and_checkpoints_has_the_weights_of_the_plain_one(small_phantom, tmp_path):
    options = {**QUICK, "epoch_length": 2, "max_iterations": 2, "dataset_dir": str(small_phantom)}
    weights = []
    for whole in (True, False):
        overlays = ("network_plain.json", "mean_teacher.json")
        run = Training(tmp_path / str(whole), whole=whole, overlays=overlays, use_sam=False, **options).run()
        weights.append([*run["network"].parameters(), *run["ema_student"].network.parameters()])
        assert run["ema_student"].average.n_averaged == 3
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    saved = torch.load(next((tmp_path / "True").glob("resume_2.pt")), weights_only=True)
    assert any(name.startswith("module.") for name in saved["ema_student"])


@pytest.mark.parametrize(
    "network, method", [("network_plain.json", "mean_teacher.json"), ("network_pair.json", "cps.json")]
)
def test_trained_student_is_taken_by_evaluation_and_inference_with_the_network_overlay(
    small_phantom, tmp_path, network, method
):
    options = {**QUICK, "dataset_dir": str(small_phantom), "max_iterations": 1, "use_sam": False}
    trained = Training(tmp_path, whole=True, overlays=(network, method), **options).run()
    expected = StackedNetworks if network == "network_pair.json" else UNet
    assert type(trained["network"]) is expected
    common = {"ckpt_path": str(tmp_path / "model.pt"), "image_size": 32, "device": "$torch.device('cpu')"}
    for base, folder in ((["train.json", network, "evaluate.json"], "eval"), (["inference.json", network], "infer")):
        data = str(small_phantom if folder == "eval" else small_phantom.parent)
        workflow = ConfigWorkflow(
            config_file=[str(CONFIGS / name) for name in base],
            meta_file=str(CONFIGS / "metadata.json"),
            logging_file=False,
            workflow_type="train" if folder == "eval" else "inference",
            output_dir=str(tmp_path / folder),
            dataset_dir=data,
            **({"image_pattern": "*/*[!t].nii.gz"} if folder == "infer" else {}),
            **common,
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()
        network_used = workflow.parser.get_parsed_content("network")
        assert type(network_used) is expected
        best = torch.load(tmp_path / "model.pt", weights_only=True)
        assert all(torch.equal(value, best[name]) for name, value in network_used.state_dict().items())
    assert (tmp_path / "eval" / "metrics_raw.csv").is_file()
    assert any(nibabel.load(path).ndim >= 2 for path in (tmp_path / "infer").rglob("*_seg.nii.gz"))
    set_determinism(seed=None)


def test_pair_of_cross_pseudo_supervision_is_the_network_overlay_s():
    pair, method = (json.loads((CONFIGS / name).read_text()) for name in ("network_pair.json", "cps.json"))
    keys = ("network_def", "prompt_view", "taught_views")
    assert [pair[key] for key in keys] == [method[key] for key in keys]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bundle", [CONFIGS, CONFIGS_3D], ids=["slices", "volumes"])
def test_overlays_of_network_and_method_set_different_keys(bundle, method):
    """So that their order on the command line is nobody's concern."""
    network, method = (json.loads((bundle / f"{name}.json").read_text()) for name in ("network_plain", method))
    own_network = {"network_def", "prompt_view", "taught_views"} if method["method"] == "cps" else set()
    assert set(network) & set(method) == own_network


PUBLISHED = {
    "max_iterations": 30000,
    "lr": 0.01,
    "lr_power": 0.9,
    "max_grad_norm": None,
    "labeled_batch_size": 12,
    "view_weights": [0.5],
}


@pytest.mark.parametrize(
    "method, published",
    [
        ("mean_teacher", {**PUBLISHED, "ema_decay": 0.99, "consistency_weight": 0.1, "consistency_start": 1000}),
        ("ua_mt", {**PUBLISHED, "ema_decay": 0.99, "consistency_weight": 0.1, "num_passes": 8}),
        ("cps", {**PUBLISHED, "view_weights": [0.5, 0.5], "mutual_weight": 0.1, "mutual_rows": "unlabeled"}),
        ("fixmatch", {**PUBLISHED, "pseudo_label_threshold": 0.95, "pseudo_label_weight": 1.0}),
        (
            "bcp",
            {
                "max_iterations": 40000,
                "pretraining_iterations": 10000,
                "unlabeled_pixel_weight": 0.5,
                "lr_power": 0,
                "max_grad_norm": None,
            },
        ),
        ("supervised", PUBLISHED),
    ],
)
def test_data_set_brings_the_published_numbers(method, published):
    config = parser("train.json", "network_plain.json", f"{method}.json", dataset_dir="/data/ACDC")
    assert {key: config.get_parsed_content(key) for key in published} == published
    assert config.get_parsed_content("run_name") == f"{method}_7_patients_seed0"


@pytest.mark.parametrize("bundle", [CONFIGS, CONFIGS_3D], ids=["slices", "volumes"])
def test_gradients_of_the_student_without_normalization_are_clipped(bundle):
    config = ConfigParser()
    config.read_config(bundle / "train.json")
    assert config.get_parsed_content("train#clipping").max_norm == 10
