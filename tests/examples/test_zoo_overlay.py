"""The overlays of examples/ over small supervised bundles in forms that the Model Zoo has."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import yaml
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.engines import IterationEvents
from monai.utils import set_determinism
from PIL import Image

from knowsam_monai import SAMDistillation
from knowsam_monai.errors import KnowSAMError, root_cause
from knowsam_monai.handlers import scalar_terms

OVERLAY = Path(__file__).parents[2] / "examples" / "zoo_overlay.json"
FLAT = OVERLAY.with_name("zoo_overlay_flat.json")
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
        **dataset("$[{'image': i, 'label': l} for i, l in zip(@images[:-2], @labels[:-2])]", load(CROP), "train"),
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
        **dataset("$[{'image': i, 'label': l} for i, l in zip(@images[-2:], @labels[-2:])]", load(), "validate"),
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
TINY = {"skd_sam_variant": "stand_in", "skd_sam_checkpoint": "$None", "skd_sam_image_size": 32}
WINDOW = {
    "_target_": "ScaleIntensityRanged",
    "keys": "image",
    "a_min": -50,
    "a_max": 150,
    "b_min": 0.0,
    "b_max": 1.0,
    "clip": True,
}
ORIENT = {"_target_": "Orientationd", "keys": BOTH, "axcodes": "RAS"}
SPACE = {"_target_": "Spacingd", "keys": BOTH, "pixdim": [1.0, 1.0, 2.0], "mode": ["bilinear", "nearest"]}
FLIP = {"_target_": "RandFlipd", "keys": BOTH, "prob": 0.5, "spatial_axis": 0}


def spleen():
    """Volumes, oriented, resampled, windowed and cropped around the label, as in spleen_ct_segmentation."""
    config = copy.deepcopy(SUPERVISED)
    config["network_def"]["spatial_dims"] = 3
    loading = load()
    config["train"]["preprocessing"]["transforms"] = [
        *loading[:2],
        ORIENT,
        SPACE,
        WINDOW,
        {**CROP, "spatial_size": [32, 32, 8]},
        FLIP,
        loading[-1],
    ]
    config["validate"]["inferer"] = {"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 8]}
    config["validate"]["preprocessing"]["transforms"] = [*loading[:2], ORIENT, SPACE, WINDOW, loading[-1]]
    return config


def prostate(folder):
    """Z-scored, in a PersistentDataset, run by `training`, with keys of its own, as in prostate_mri_anatomy."""
    config = copy.deepcopy(SUPERVISED)
    config.update(spatial_size=[32, 32], num_classes="$1 / 0", training=config.pop("run"))
    config["train"]["preprocessing"]["transforms"][2] = {"_target_": "NormalizeIntensityd", "keys": "image"}
    config["train"]["dataset"] = {
        "_target_": "PersistentDataset",
        "data": config["train"]["dataset"]["data"],
        "transform": "@train#preprocessing",
        "cache_dir": str(folder / "cache"),
    }
    return config


def flat():
    """No sections, as in ventricular_short_axis_3label and segmentation_template."""
    config = copy.deepcopy(SUPERVISED)
    text = json.dumps(
        {
            **{key: value for key, value in config.items() if key not in ("train", "validate")},
            **{f"train_{key}": value for key, value in config["train"].items() if key != "trainer"},
            **{f"validate_{key}": value for key, value in config["validate"].items() if key != "evaluator"},
            "trainer": config["train"]["trainer"],
            "evaluator": config["validate"]["evaluator"],
        }
    )
    for name in ("train#trainer", "validate#evaluator"):
        text = text.replace(f"@{name}", f"@{name.split('#')[1]}")
    return json.loads(text.replace("@train#", "@train_").replace("@validate#", "@validate_"))


def ventricular(folder):
    """Arrays in a file, a sampler, and a loader that repeats its batches, as in ventricular_short_axis_3label."""
    config = flat()
    labels = np.zeros((6, 32, 32), np.uint8)
    labels[:, 8:20, 10:22] = 1
    images = labels * 100 + np.random.default_rng(0).normal(0, 10, labels.shape)
    np.savez(folder / "labeled.npz", images=images[:4], segs=labels[:4])
    np.savez(folder / "unlabeled.npz", images=images[4:])
    config["imports"] += ["$import numpy as np", "$import torch"]
    keys = {"images": "image", "segs": "label"}
    config["npz"] = {"_target_": "NPZDictItemDataset", "npzfile": str(folder / "labeled.npz"), "keys": keys}
    transforms = [
        {"_target_": "CastToTyped", "keys": BOTH, "dtype": "$(np.float32, np.int32)"},
        {"_target_": "ScaleIntensityd", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": BOTH, "channel_dim": "no_channel"},
        {"_target_": "EnsureTyped", "keys": BOTH},
    ]
    for name, rows in (("train", [0, 1]), ("validate", [2, 3])):
        config[f"{name}_preprocessing"]["transforms"] = transforms
        config[f"{name}_dataset"]["data"] = f"$torch.utils.data.Subset(@npz, {rows})"
    sampler = {"_target_": "torch.utils.data.WeightedRandomSampler", "weights": "$torch.ones(2)", "num_samples": 4}
    loader = {"_target_": "ThreadDataLoader", "repeats": 2, "num_workers": 0, "sampler": sampler}
    config["train_dataloader"] |= loader
    return config


def surgery():
    """RGB pictures, as in endoscopic_tool_segmentation, and one sigmoid channel."""
    config = copy.deepcopy(SUPERVISED)
    config["network_def"].update(in_channels=3, out_channels=1)
    config["loss"] = {"_target_": "DiceLoss", "sigmoid": True}
    config["images"] = config["images"].replace(".nii.gz", ".png")
    config["labels"] = config["labels"].replace(".nii.gz", ".png")
    for part in ("train", "validate"):
        binary = {"_target_": "AsDiscreted", "keys": "label", "threshold": 0.5}
        config[part]["preprocessing"]["transforms"].insert(2, binary)
        activate, discrete = copy.deepcopy(config[part]["postprocessing"]["transforms"])
        activate = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
        discrete = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}
        config[part]["postprocessing"] = {"_target_": "Compose", "transforms": [activate, discrete]}
        metric = next(iter(config[part]["key_metric"]))
        config[part]["key_metric"] = {metric: {**METRIC, "include_background": True}}
    return config


MODALITIES = ("t1c", "t1", "t2", "flair")


def brats(folder):
    """Regions that overlap, made of class numbers, in volumes of four files each, as in brats_mri_segmentation."""
    random = np.random.default_rng(0)
    cases = {"training": 2, "validation": 1, "unlabeled": 3}
    datalist = {name: [] for name in cases}
    for number, name in enumerate(name for name, count in cases.items() for _ in range(count)):
        classes = np.zeros((20, 24, 10), np.float32)
        row, column = random.integers(2, 6, 2)
        classes[row : row + 12, column : column + 14, 1:9] = 2  # edema
        classes[row + 2 : row + 8, column + 2 : column + 10, 2:8] = 1  # necrotic core
        classes[row + 3 : row + 6, column + 3 : column + 8, 3:7] = 4  # enhancing tumor
        for part in (*MODALITIES, "seg"):
            values = classes if part == "seg" else classes * 100 + random.normal(300, 20, classes.shape)
            nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.eye(4)), folder / f"{number}_{part}.nii.gz")
        item = {"image": [f"{number}_{modality}.nii.gz" for modality in MODALITIES], "label": f"{number}_seg.nii.gz"}
        datalist[name].append(item["image"] if name == "unlabeled" else item)
    (folder / "datalist.json").write_text(json.dumps(datalist))

    config = copy.deepcopy(SUPERVISED)
    config["training"] = config.pop("run")
    config["network_def"] = {
        "_target_": "SegResNet",
        "blocks_down": [1, 1],
        "blocks_up": [1],
        "init_filters": 8,
        "in_channels": 4,
        "out_channels": 3,
    }
    config["loss"] = {
        "_target_": "DiceLoss",
        "smooth_nr": 0,
        "squared_pred": True,
        "to_onehot_y": False,
        "sigmoid": True,
    }
    postprocessing = [
        {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
        {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
    ]
    for part, name in (("train", "training"), ("validate", "validation")):
        config[part]["dataset"][
            "data"
        ] = f"$monai.data.load_decathlon_datalist(@bundle_root + '/datalist.json', data_list_key='{name}')"
        config[part]["postprocessing"]["transforms"] = postprocessing
        metric = next(iter(config[part]["key_metric"]))
        config[part]["key_metric"] = {metric: {**METRIC, "include_background": True}}
    config["train"]["preprocessing_transforms"] = [
        {"_target_": "LoadImaged", "keys": BOTH},
        {"_target_": "ConvertToMultiChannelBasedOnBratsClassesd", "keys": "label"},
        {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True},
    ]
    config["train"]["random_transforms"] = [
        {"_target_": "RandSpatialCropd", "keys": BOTH, "roi_size": [16, 16, 8], "random_size": False},
        FLIP,
        {"_target_": "RandShiftIntensityd", "keys": "image", "offsets": 0.1, "prob": 1.0},
    ]
    config["train"]["preprocessing"]["transforms"] = "$@train#preprocessing_transforms + @train#random_transforms"
    config["validate"]["preprocessing"]["transforms"] = "$@train#preprocessing_transforms"
    config["validate"]["inferer"] = {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, 8]}
    return config


def write_bundle(folder, config, shape, affine=None, suffix=".nii.gz", ending="json"):
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
                    path = folder / "data" / name / f"case{index}{suffix}"
                    if suffix == ".png":
                        pixels = np.stack([array] * 3, 2).clip(0, 255) if name != "labelsTr" else array
                        Image.fromarray(pixels.astype(np.uint8)).save(path)
                    else:
                        affine = np.eye(4) if affine is None else affine
                        nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), affine), path)
    (folder / "configs").mkdir()
    dump = {"json": json.dumps, "yaml": yaml.safe_dump}[ending]
    (folder / "configs" / f"train.{ending}").write_text(dump(config))
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("zoo_bundle"), SUPERVISED, shape=(48, 40))


@pytest.fixture(scope="module")
def bundle_of_volumes(tmp_path_factory):
    """Voxels of 2 x 2 x 2 mm, stored as LPS."""
    folder = tmp_path_factory.mktemp("zoo_bundle_of_volumes")
    return write_bundle(folder, spleen(), shape=(48, 40, 10), affine=np.diag([-2.0, -2.0, 2.0, 1.0]))


def run(bundle, *overlays, trainer="train#trainer", run_id="run", **override):
    workflow = ConfigWorkflow(
        config_file=[*map(str, (bundle / "configs").glob("train.*")), *map(str, overlays)],
        meta_file=None,
        logging_file=False,
        workflow_type="train",
        run_id=run_id,
        bundle_root=str(bundle),
        **override,
    )
    history = []
    try:
        workflow.initialize()
        engine = workflow.parser.get_parsed_content(trainer)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: history.append(terms(engine)))
        workflow.run()
        workflow.finalize()
    finally:
        set_determinism(seed=None)
    return workflow.parser.get_parsed_content, history


def terms(engine):
    return scalar_terms(engine.state.output) if isinstance(engine.state.output, dict) else {}


def distillation(trainer):
    attached = (handler for handler, *_ in trainer._event_handlers[IterationEvents.LOSS_COMPLETED])
    return next(handler for handler in attached if isinstance(handler, SAMDistillation))


def cause_of(error):
    return str(root_cause(error.value))


def test_bundle_runs_without_the_overlay(bundle):
    get, history = run(bundle)
    assert len(history) == 4 and get("validate#evaluator").state.metrics["val_mean_dice"] >= 0


@pytest.mark.parametrize("gate", ["agreement", "none"])
def test_overlay_adds_distillation_and_the_unlabeled_stream(bundle, gate, caplog):
    caplog.set_level("INFO")
    get, history = run(bundle, OVERLAY, skd_gate=gate, skd_unlabeled_batch_size=3, **TINY)
    logged = [line for line in caplog.messages if "distillation_loss: " in line and " loss: " in line]
    assert len(logged) == 4  # the bundle's own log goes on
    assert len(history) == 4  # as many as without the overlay
    assert all({"loss", "distillation_loss", "sam_loss", "gate_weight"} <= set(step) for step in history)
    assert all(torch.isfinite(value) for step in history for value in step.values())
    assert gate != "none" or all(step["distillation_loss"] > 0 for step in history)
    output = get("train#trainer").state.output
    assert output["image"].shape == (5, 1, 32, 32) and output["label"].shape == (2, 1, 32, 32)
    assert distillation(get("train#trainer")).distiller.optimizer.state  # SAM has learned too
    assert get("validate#evaluator").state.metrics["val_mean_dice"] >= 0  # validation is the bundle's own


def test_unlabeled_images_get_the_bundles_own_preprocessing(bundle_of_volumes, caplog):
    caplog.set_level("INFO")
    tiny = {**TINY, "skd_slices": 2, "train#trainer#max_epochs": 1, "skd_unlabeled_batch_size": 3}
    get, _ = run(bundle_of_volumes, OVERLAY, **tiny)
    dataset = get("train#trainer").data_loader.datasets[1]
    names = [type(step).__name__ for step in dataset.transform.transforms]
    assert names == [
        *("LoadImaged", "EnsureChannelFirstd", "Orientationd", "Spacingd", "ScaleIntensityRanged"),
        *("RandSpatialCropd", "ResizeWithPadOrCropd", "RandFlipd", "EnsureTyped"),
    ]
    prepare = get("validate#preprocessing")  # what the bundle makes of a labeled image, without crop and flip
    whole = prepare({name: str(bundle_of_volumes / "data" / folder / "case0.nii.gz") for name, folder in FILES.items()})
    image = dataset[0]["image"]
    assert image.shape == (1, 32, 32, 8) and image.pixdim.tolist() == whole["image"].pixdim.tolist() == [1, 1, 2]
    assert (
        nibabel.aff2axcodes(image.affine.numpy()) == ("R", "A", "S") or dataset.transform.transforms[-2]._do_transform
    )
    assert abs(image.quantile(0.1) - whole["image"].quantile(0.1)) < 0.1 and 0 <= image.min() < image.max() <= 1
    assert any("RandCropByPosNegLabeld (a random crop of the same size" in line for line in caplog.messages)
    assert not any("differ in" in line for line in caplog.messages)


FILES = {"image": "unlabeled", "label": "labelsTr"}


def test_streams_that_differ_are_reported(bundle, tmp_path, caplog):
    (tmp_path / "bright").mkdir()
    for path in (bundle / "data" / "unlabeled").iterdir():
        scan = nibabel.load(path)
        nibabel.save(
            nibabel.Nifti1Image(scan.get_fdata() + 5000, np.diag([3, 3, 3, 1])), tmp_path / "bright" / path.name
        )
    config = json.loads((bundle / "configs" / "train.json").read_text())
    transforms = config["train"]["preprocessing"]["transforms"]
    transforms[2] = WINDOW
    run(bundle, OVERLAY, skd_unlabeled=f"{tmp_path}/bright/*", **{"train#preprocessing#transforms": transforms}, **TINY)
    warnings = [line for line in caplog.messages if "differ in" in line]
    assert len(warnings) == 1 and "standard deviation, voxel size" in warnings[0]


def test_unlabeled_images_come_from_a_json_list(bundle, tmp_path):
    files = sorted((bundle / "data" / "unlabeled").iterdir())
    (tmp_path / "list.json").write_text(json.dumps({"unlabeled": [str(files[0]), {"image": str(files[1])}]}))
    get, _ = run(bundle, OVERLAY, skd_unlabeled=str(tmp_path / "list.json"), **TINY)
    assert [item["image"] for item in get("train#trainer").data_loader.datasets[1].data] == list(map(str, files[:2]))
    with pytest.raises(RuntimeError) as error:
        run(bundle, OVERLAY, skd_unlabeled=f"{tmp_path}/*.nii.gz", **TINY)
    assert "`skd_unlabeled` must name at least one image" in cause_of(error)


def test_sam_teaches_slices_of_volumes(bundle_of_volumes):
    tiny = {**TINY, "skd_slices": 2, "skd_gate": "none", "train#trainer#max_epochs": 1}
    get, history = run(bundle_of_volumes, OVERLAY, skd_unlabeled_batch_size=3, **tiny)
    teacher = distillation(get("train#trainer")).distiller.teacher
    assert all(step["distillation_loss"] > 0 and step["sam_loss"] > 0 for step in history)
    assert type(teacher).__name__ == "SliceTeacher" and teacher.slices == 2 and teacher.num_classes == 2
    assert get("train#trainer").state.output["image"].shape == (5, 1, 32, 32, 8)


def test_without_sam_only_the_unlabeled_stream_is_left(bundle):
    _, history = run(bundle, OVERLAY, skd_use_sam=False, **TINY)
    assert history and all(set(step) == {"loss"} for step in history)


def test_overlays_differ_only_in_the_section_of_the_trainer():
    overlay, of_flat = (json.loads(path.read_text()) for path in (OVERLAY, FLAT))
    assert {key.removeprefix("train#"): value for key, value in overlay.items()} == of_flat
    assert all(key.startswith("skd_") for key in of_flat if "#" not in key)


ONE_HOT = {"train#preprocessing#transforms#2": {"_target_": "AsDiscreted", "keys": "label", "to_onehot": 2}}
REFUSED = {
    "gate that the evaluator cannot measure": (
        {"skd_gate": "validation"},
        "`skd_gate` must be 'none' or 'agreement' but is 'validation'",
    ),
    "interactive": ({"train#trainer#iteration_update": "$print"}, "`iteration_update` must be None"),
    "deep supervision": (
        {"network": {"_target_": "tests.examples.test_zoo_overlay.WithHeads"}},
        "returns a list; SKD cannot be added",
    ),
    "one-hot labels for a softmax": (ONE_HOT, "combine its channels into one of class indices"),
    "class numbers for a sigmoid": ({"loss#sigmoid": True, "loss#softmax": False}, "has one of class numbers; add"),
    "sigmoid or softmax": (
        {**ONE_HOT, "loss": {"_target_": "DiceLoss"}, "train#postprocessing": "$lambda data: data"},
        "`skd_overlapping` must be true or false",
    ),
    "missing weights": (
        {"skd_sam_variant": "vit_b", "skd_sam_checkpoint": "/nowhere/sam.pth"},
        "`skd_sam_checkpoint` must be a file with the weights of SAM's vit_b but /nowhere/sam.pth does not exist",
    ),
    "sizes": (
        {"train#preprocessing#transforms#3": {"_target_": "SpatialPadd", "keys": BOTH, "spatial_size": [33, 1]}},
        "end the bundle's training transforms with a crop",
    ),
}


class WithHeads(torch.nn.Conv2d):
    def __init__(self):
        super().__init__(1, 2, 1)

    def forward(self, image):
        return [super().forward(image)] * 2


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_one_sentence_at_the_start(bundle, case, tmp_path):
    override, message = REFUSED[case]
    if case == "sizes":
        odd = tmp_path / "odd.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.zeros((50, 40), np.float32), np.eye(4)), odd)
        override = {**override, "skd_unlabeled": [str(odd)], "skd_unlabeled_batch_size": 1}
    with pytest.raises(RuntimeError) as error:
        run(bundle, OVERLAY, **{**TINY, **override})
    assert message in cause_of(error)
    assert isinstance(root_cause(error.value), KnowSAMError)


def test_smoothly_resampled_labels_are_named(bundle, caplog):
    zoom = {"_target_": "RandZoomd", "keys": BOTH, "prob": 0.0}
    run(bundle, OVERLAY, **{"train#preprocessing#transforms#2": zoom}, **TINY)
    assert any("RandZoomd of the training transforms interpolates labels" in line for line in caplog.messages)


@pytest.mark.slow
def test_overlay_runs_over_a_bundle_with_keys_of_its_own_and_z_scores(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = write_bundle(tmp_path, prostate(tmp_path), shape=(48, 40))
    get, history = run(folder, OVERLAY, run_id="training", **TINY)
    assert history and all("distillation_loss" in step for step in history)
    assert any("SAM gets the intensities" in line for line in caplog.messages)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["json", "yaml"])  # the Zoo's own template is flat YAML
def test_flat_overlay_runs_over_a_bundle_without_sections(tmp_path, ending):
    folder = write_bundle(tmp_path, flat(), shape=(48, 40), ending=ending)
    _, history = run(folder, FLAT, trainer="trainer", **TINY)
    assert history and all("distillation_loss" in step for step in history)


@pytest.mark.slow
def test_unlabeled_images_may_be_arrays(tmp_path):
    (tmp_path / "bundle").mkdir()
    folder = write_bundle(tmp_path / "bundle", ventricular(tmp_path), shape=(48, 40))
    unlabeled = f"$list(np.load('{tmp_path}/unlabeled.npz')['images'])"
    get, history = run(folder, FLAT, trainer="trainer", skd_unlabeled=unlabeled, **TINY)
    assert len(history) == 8 and all("distillation_loss" in step for step in history)  # 2 epochs of 4 drawn items
    assert get("trainer").state.output["image"].shape == (3, 1, 32, 32)


@pytest.mark.slow
def test_rgb_images_go_straight_to_sam(tmp_path):
    folder = write_bundle(tmp_path, surgery(), shape=(48, 40), suffix=".png")
    get, history = run(folder, OVERLAY, skd_unlabeled=f"{folder}/data/unlabeled/*.png", **TINY)
    teacher = distillation(get("train#trainer")).distiller.teacher
    assert teacher.to_rgb == "rgb" and teacher.num_classes == 1 and all("sam_loss" in step for step in history)


def test_overlapping_regions_get_a_sigmoid_for_each(tmp_path):
    folder = tmp_path
    (folder / "configs").mkdir()
    (folder / "configs" / "train.json").write_text(json.dumps(brats(folder)))
    tiny = {**TINY, "skd_slices": 2, "skd_gate": "none", "skd_temperature": 3.0}
    get, history = run(folder, OVERLAY, run_id="training", skd_unlabeled=f"{folder}/datalist.json", **tiny)
    trainer = get("train#trainer")
    assert history and all(step["distillation_loss"] > 0 and step["sam_loss"] > 0 for step in history)
    assert trainer.state.output["image"].shape == (3, 4, 16, 16, 8)
    assert trainer.state.output["label"].shape == (1, 3, 16, 16, 8)
    assert get("validate#evaluator").state.metrics["val_mean_dice"] >= 0

    distiller = distillation(trainer).distiller
    assert distiller.teacher.num_classes == 3 and distiller.optimizer.state
    assert distiller.overlapping and distiller.distillation_loss.temperature == 3


SIGMOID = {"_target_": "DiceCELoss", "sigmoid": True}
UNKNOWN = "$torch.nn.functional.binary_cross_entropy_with_logits"
ACTIVATION = {"_target_": "Compose", "transforms": [{"_target_": "Activationsd", "keys": "pred", "sigmoid": True}]}


@pytest.mark.parametrize(
    ("override", "overlapping"),
    [
        ({**ONE_HOT, "loss": SIGMOID}, True),
        ({**ONE_HOT, "loss": UNKNOWN, "train#postprocessing": ACTIVATION}, True),
        ({**ONE_HOT, "loss": UNKNOWN, "skd_overlapping": True}, True),
        ({"loss": {**SIGMOID, "to_onehot_y": True}, "skd_overlapping": False}, False),
        ({}, False),
    ],
)
def test_sigmoid_or_softmax_comes_from_the_loss_or_the_postprocessing_or_the_key(bundle, override, overlapping, caplog):
    get, history = run(bundle, OVERLAY, **override, **TINY)
    distiller = distillation(get("train#trainer")).distiller
    assert history and distiller.overlapping == distiller.gate.overlapping == overlapping
    warned = [line for line in caplog.messages if "has a sigmoid for each channel but the distiller a softmax" in line]
    assert len(warned) == ("skd_overlapping" in override and not overlapping)


# the Zoo's multi_gpu_train.json, on CPUs
MULTI_GPU = {
    "network": {"_target_": "torch.nn.parallel.DistributedDataParallel", "module": "$@network_def.to(@device)"},
    "train#sampler": {
        "_target_": "DistributedSampler",
        "dataset": "@train#dataset",
        "even_divisible": True,
        "shuffle": True,
    },
    "train#dataloader#sampler": "@train#sampler",
    "train#dataloader#shuffle": False,
    "train#trainer#train_handlers": "$@train#handlers[: -1 if dist.get_rank() > 0 else None]",
    "validate#sampler": {"_target_": "DistributedSampler", "dataset": "@validate#dataset", "even_divisible": False},
    "validate#dataloader#sampler": "@validate#sampler",
    "validate#evaluator#val_handlers": "$None if dist.get_rank() > 0 else @validate#handlers",
    "initialize": [
        "$import torch.distributed as dist",
        "$dist.is_initialized() or dist.init_process_group(backend='gloo')",
        "$monai.utils.set_determinism(seed=123)",
    ],
    "run": [
        "$@train#trainer.run()",
        "$print('terms:', *sorted(k for k in @train#trainer.state.output if '_loss' in k))",
    ],
    "finalize": ["$dist.is_initialized() and dist.destroy_process_group()"],
}


@pytest.mark.slow
def test_overlay_runs_before_multi_gpu_train(tmp_path):
    folder = write_bundle(tmp_path, SUPERVISED, shape=(48, 40))
    (folder / "configs" / "multi_gpu_train.json").write_text(json.dumps(MULTI_GPU))
    files = [str(folder / "configs" / "train.json"), str(OVERLAY), str(folder / "configs" / "multi_gpu_train.json")]
    tiny = {**TINY, "skd_unlabeled_batch_size": 1}
    options = [part for key, value in tiny.items() for part in (f"--{key}", str(value))]
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--config_file", str(files), "--bundle_root", str(folder), *options],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("terms: distillation_loss sam_loss") == 2  # in both processes
