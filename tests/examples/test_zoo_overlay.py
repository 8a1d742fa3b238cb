"""The overlays of examples/ over a small supervised bundle in the Model Zoo's usual form."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism

from knowsam_monai.handlers import scalar_terms

OVERLAY = Path(__file__).parents[2] / "examples" / "zoo_overlay.json"
VOLUMES = OVERLAY.with_name("zoo_overlay_volumes.json")
BOTH = ["image", "label"]


def load(*more):
    return [
        {"_target_": "LoadImaged", "keys": BOTH},
        {"_target_": "EnsureChannelFirstd", "keys": BOTH},
        {"_target_": "ScaleIntensityd", "keys": "image"},
        *more,
        {"_target_": "EnsureTyped", "keys": BOTH},
    ]


CROP = {
    "_target_": "RandCropByPosNegLabeld",
    "keys": BOTH,
    "label_key": "label",
    "spatial_size": [32, 32],
    "pos": 1,
    "neg": 1,
    "num_samples": 2,
}
POSTPROCESSING = {
    "_target_": "Compose",
    "transforms": [
        {"_target_": "Activationsd", "keys": "pred", "softmax": True},
        {"_target_": "AsDiscreted", "keys": ["pred", "label"], "argmax": [True, False], "to_onehot": 2},
    ],
}
METRIC = {
    "_target_": "MeanDice",
    "include_background": False,
    "output_transform": "$monai.handlers.from_engine(['pred', 'label'])",
}


def dataset(items, transforms, name):
    return {
        "preprocessing": {"_target_": "Compose", "transforms": transforms},
        "dataset": {
            "_target_": "CacheDataset",
            "data": items,
            "transform": f"@{name}#preprocessing",
            "progress": False,
        },
        "dataloader": {"_target_": "DataLoader", "dataset": f"@{name}#dataset", "batch_size": 1, "num_workers": 0},
        "postprocessing": POSTPROCESSING,
        "inferer": {"_target_": "SimpleInferer"},
    }


# spleen_ct_segmentation's train.json with a small 2D network
SUPERVISED = {
    "imports": ["$import glob", "$import os", "$import ignite"],
    "bundle_root": ".",
    "ckpt_dir": "$@bundle_root + '/models'",
    "output_dir": "$@bundle_root + '/eval'",
    "dataset_dir": "$@bundle_root + '/data'",
    "images": "$list(sorted(glob.glob(@dataset_dir + '/imagesTr/*.nii.gz')))",
    "labels": "$list(sorted(glob.glob(@dataset_dir + '/labelsTr/*.nii.gz')))",
    "val_interval": 1,
    "device": "$torch.device('cpu')",
    "network_def": {
        "_target_": "UNet",
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 2,
        "channels": [4, 8],
        "strides": [2],
        "norm": "batch",
    },
    "network": "$@network_def.to(@device)",
    "loss": {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True, "squared_pred": True, "batch": True},
    "optimizer": {"_target_": "torch.optim.Adam", "params": "$@network.parameters()", "lr": 0.001},
    "train": {
        **dataset("$[{'image': i, 'label': l} for i, l in zip(@images[:-1], @labels[:-1])]", load(CROP), "train"),
        "handlers": [
            {
                "_target_": "LrScheduleHandler",
                "lr_scheduler": {
                    "_target_": "torch.optim.lr_scheduler.StepLR",
                    "optimizer": "@optimizer",
                    "step_size": 5000,
                },
                "print_lr": True,
            },
            {
                "_target_": "ValidationHandler",
                "validator": "@validate#evaluator",
                "epoch_level": True,
                "interval": "@val_interval",
            },
            {
                "_target_": "StatsHandler",
                "tag_name": "train_loss",
                "output_transform": "$monai.handlers.from_engine(['loss'], first=True)",
            },
        ],
        "key_metric": {"train_dice": METRIC},
        "trainer": {
            "_target_": "SupervisedTrainer",
            "max_epochs": 2,
            "device": "@device",
            "train_data_loader": "@train#dataloader",
            "network": "@network",
            "loss_function": "@loss",
            "optimizer": "@optimizer",
            "inferer": "@train#inferer",
            "postprocessing": "@train#postprocessing",
            "key_train_metric": "@train#key_metric",
            "train_handlers": "@train#handlers",
            "amp": False,
        },
    },
    "validate": {
        **dataset("$[{'image': i, 'label': l} for i, l in zip(@images[-1:], @labels[-1:])]", load(), "validate"),
        "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
        "key_metric": {"val_mean_dice": METRIC},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@validate#dataloader",
            "network": "@network",
            "inferer": "@validate#inferer",
            "postprocessing": "@validate#postprocessing",
            "key_val_metric": "@validate#key_metric",
            "val_handlers": "@validate#handlers",
        },
    },
    "initialize": ["$monai.utils.set_determinism(seed=123)"],
    "run": ["$@train#trainer.run()"],
}
TINY = {"sam_variant": "stand_in", "sam_checkpoint": "$None", "sam_image_size": 32, "spatial_size": [32, 32]}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("zoo_bundle"), SUPERVISED, shape=(48, 40))


@pytest.fixture(scope="module")
def bundle_of_volumes(tmp_path_factory):
    config = copy.deepcopy(SUPERVISED)
    config["network_def"]["spatial_dims"] = 3
    config["train"]["preprocessing"]["transforms"][3]["spatial_size"] = [32, 32, 8]
    return write_bundle(tmp_path_factory.mktemp("zoo_bundle_of_volumes"), config, shape=(48, 40, 10))


def write_bundle(folder, config, shape):
    random = np.random.default_rng(0)
    for kind, count in (("imagesTr", 4), ("unlabeled", 3)):
        for index in range(count):
            label = np.zeros(shape, np.uint8)
            row, column = random.integers(4, 20, 2)
            label[row : row + 16, column : column + 14] = 1
            image = label * 100 + random.normal(0, 10, label.shape)
            for name, array in ((kind, image), ("labelsTr", label)):
                if name != "labelsTr" or kind == "imagesTr":
                    (folder / "data" / name).mkdir(parents=True, exist_ok=True)
                    path = folder / "data" / name / f"case{index}.nii.gz"
                    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.eye(4)), path)
    (folder / "train.json").write_text(json.dumps(config))
    return folder


def run(bundle, *overlays, **override):
    workflow = ConfigWorkflow(
        config_file=[str(bundle / "train.json"), *map(str, overlays)],
        meta_file=None,
        logging_file=False,
        workflow_type="train",
        bundle_root=str(bundle),
        **override,
    )
    history = []
    try:
        workflow.initialize()
        trainer = workflow.parser.get_parsed_content("train#trainer")
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: history.append(terms(engine)))
        workflow.run()
        workflow.finalize()
    finally:
        set_determinism(seed=None)
    return workflow.parser.get_parsed_content, history


def terms(engine):
    return scalar_terms(engine.state.output) if isinstance(engine.state.output, dict) else {}


def test_bundle_runs_without_the_overlay(bundle):
    get, history = run(bundle)
    assert len(history) == 6 and get("validate#evaluator").state.metrics["val_mean_dice"] >= 0


@pytest.mark.parametrize("gate", ["agreement", "none"])
def test_overlay_adds_distillation_and_the_unlabelled_stream(bundle, gate, caplog):
    caplog.set_level("INFO")
    get, history = run(bundle, OVERLAY, distillation_gate=gate, unlabeled_batch_size=3, **TINY)
    logged = [line for line in caplog.messages if "distillation_loss: " in line and " loss: " in line]
    assert len(logged) == 2  # the bundle's own log goes on
    assert len(history) == 2  # one batch shows every unlabelled image once
    assert all({"loss", "distillation_loss", "sam_loss", "gate_weight"} <= set(step) for step in history)
    assert all(torch.isfinite(value) for step in history for value in step.values())
    assert gate != "none" or all(step["distillation_loss"] > 0 for step in history)
    output = get("train#trainer").state.output
    assert output["image"].shape == (7, 1, 32, 32) and output["label"].shape == (4, 1, 32, 32)
    assert get("distiller").optimizer.state  # SAM has learned too
    assert get("validate#evaluator").state.metrics["val_mean_dice"] >= 0  # validation is the bundle's own


def test_overlay_of_volumes_has_sam_teach_slices(bundle_of_volumes):
    tiny = {**TINY, "spatial_size": [32, 32, 8], "sam_slices": 2, "distillation_gate": "none"}
    get, history = run(bundle_of_volumes, OVERLAY, VOLUMES, unlabeled_batch_size=3, **tiny)
    assert all(step["distillation_loss"] > 0 and step["sam_loss"] > 0 for step in history)
    assert type(get("distiller").teacher).__name__ == "SliceTeacher" and get("distiller").teacher.slices == 2
    assert get("train#trainer").state.output["image"].shape == (7, 1, 32, 32, 8)
    assert get("distiller").optimizer.state and get("teacher").num_classes == 2


def test_without_sam_no_slices_are_taught_either(bundle_of_volumes):
    get, history = run(bundle_of_volumes, OVERLAY, VOLUMES, use_sam=False, spatial_size=[32, 32, 8])
    assert get("distiller") is None and all(set(step) == {"loss"} for step in history)


def test_without_sam_only_the_unlabelled_stream_is_left(bundle):
    get, history = run(bundle, OVERLAY, use_sam=False, **TINY)
    assert get("distiller") is None and all(set(step) == {"loss"} for step in history)
