"""Settings of both bundles: an invalid value is one sentence, a valid one in another form is converted."""

from __future__ import annotations

import math
import os
import re

import pytest
import torch
from monai.bundle import ConfigParser

from knowsam_monai.runs import values as models
from knowsam_monai.runs.config import SECTIONS, plain_values
from knowsam_monai.runs.values import COMPONENTS, MLFLOW, Inference, Overlays, Slices, Volumes, check_values
from tests.bundles.test_resolution import RUNS, files

ACDC, LA = "knowsam_acdc", "knowsam_la"
TRAIN, INFERENCE, EVALUATE = ("train",), ("inference",), ("train", "evaluate")
SAM2, NETWORK = ("train", "teacher_sam2"), ("train", "teacher_network")
FOLDER, LIST = "/data/folder", "/data/list.json"
NAN, INF, HUGE = math.nan, math.inf, 10**30


def merged(bundle, names, **override):
    parser = ConfigParser()
    parser.read_config(files(bundle, names))
    parser.update(override)
    return parser.config


def overlay(method):
    return ("train", "network_plain", method)


@pytest.mark.parametrize("data", [None, FOLDER, LIST])
@pytest.mark.parametrize("bundle, names", RUNS, ids=lambda value: "+".join(value) if isinstance(value, list) else value)
def test_shipped_values_are_right_and_stay_as_they_are(bundle, names, data):
    named = {"teacher_bundle": "/data/bundle"} if "teacher_network" in names else {}
    assert check_values(merged(bundle, names, dataset_dir=data, **named)) == {}


@pytest.mark.parametrize("cores, workers", [(1, 1), (2, 2), (64, 4)])
@pytest.mark.parametrize("bundle", [ACDC, LA])
@pytest.mark.parametrize("is_linux", [True, False])
def test_loader_has_no_more_workers_than_usable_cores(bundle, cores, workers, is_linux, monkeypatch):
    if is_linux:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 99 if is_linux else cores)
    for data, expected in {LIST: workers, None: 0}.items():
        assert ConfigParser(merged(bundle, TRAIN, dataset_dir=data)).get_parsed_content("num_workers") == expected


@pytest.mark.parametrize("bundle, names", RUNS, ids=lambda value: "+".join(value) if isinstance(value, list) else value)
def test_every_key_of_every_config_is_listed(bundle, names):
    listed = {field for model in (*models._models(merged(bundle, names)), Overlays) for field in model.model_fields}
    assert {key.lstrip("+").split("#")[0] for key in merged(bundle, names)} <= listed | {
        *COMPONENTS,
        *MLFLOW,
        *SECTIONS,
    }


def test_every_setting_has_a_meaning_and_words_for_errors():
    every = [model for model in vars(models).values() if isinstance(model, type) and hasattr(model, "model_fields")]
    fields = [(name, field) for model in every for name, field in model.model_fields.items()]
    assert len({name for name, _ in fields}) > 80
    for name, field in fields:
        sentence = models._sentence(name, field, object())
        assert field.description and re.match(rf"`{name}` must be \w.* but is <object", sentence), sentence
    assert {Inference, Slices, Volumes} <= set(every)


# configs, key, value, what the sentence says
SWITCHES = ("use_sam", "resume", "amp", "cpu_autocast", "fast_cpu_matmul", "preflight")
WRONG = [
    *((TRAIN, key, "false", "True or False but is 'false'; write True or False") for key in SWITCHES),
    *((TRAIN, key, value, "True or False") for key, value in zip(SWITCHES, ("no", 1, 0, None, "True", []))),
    *((TRAIN, "lr", value, "a number above 0") for value in (0, -0.1, "abc", None, True, NAN, INF, HUGE, [0.1])),
    *((TRAIN, "momentum", value, "below 1") for value in (2, 1, -0.1, "0.9", NAN)),
    *((TRAIN, "weight_decay", value, "below 1") for value in (-1e-4, 1, "1e-4")),
    *((TRAIN, "lr_power", value, "0 or more") for value in (-1, "linear", INF)),
    *((TRAIN, "sam_lr", value, "above 0") for value in (0, -1, "adam")),
    *((TRAIN, "seed", value, "a whole number, 0 to 4294967295") for value in (-1, 2**32, 0.5, "0", None)),
    *((TRAIN, "max_iterations", value, "a whole number, 1 or more") for value in (0, -5, 2.5, "100", None, HUGE)),
    *((TRAIN, "epoch_length", value, "a whole number, 1 or more") for value in (0, 1.5, False)),
    *((TRAIN, "val_interval", value, "a whole number, 1 or more") for value in (0, 0.5)),
    *((TRAIN, "log_interval", value, "a whole number, 1 or more") for value in (0, "ten")),
    *((TRAIN, "accumulation_steps", value, "a whole number, 1 or more") for value in (0, 1.5)),
    *((TRAIN, "labeled_batch_size", value, "a whole number, 1 or more") for value in (0, -2, 2.5, "2")),
    *((TRAIN, "unlabeled_batch_size", value, "a whole number, 0 or more") for value in (-1, 0.5, None)),
    *((TRAIN, "num_workers", value, "a number of processes") for value in (-1, 0.5, "two", 10**6)),
    *((TRAIN, "cache_workers", value, "a number of processes") for value in (-1, 1.5)),
    *((TRAIN, "in_channels", value, "a number of channels") for value in (0, 1.5, "1", HUGE)),
    *(
        (config, "intensity_window", value, "two numbers, the lower first, or None")
        for config in (TRAIN, INFERENCE)
        for value in ([240, -160], [0, 0], [0], [0, 1, 2], 240, ["low", "high"], [0, INF])
    ),
    *((TRAIN, "num_classes", value, "a number of classes") for value in (1, -4, "4", 10**9)),
    *((TRAIN, "labeled_patients", value, "a whole number, 1 or more, or None") for value in (0, -3, 3.5, "all")),
    *((TRAIN, "holdout_patients", value, "a whole number, 0 or more") for value in (-1, 0.5)),
    *(
        (TRAIN, "class_names", value, "a list of names")
        for value in ([], ["a", "a"], ["a", "A "], "a", ["a", 1], [" "], None, {"a": 1})
    ),
    *((TRAIN, "dataset_dir", value, "a path, or None") for value in ("", 5, ["a.json"], False)),
    *(
        (TRAIN, key, value, "a path but")
        for key in ("output_dir", "ckpt_dir", "bundle_root")
        for value in ("", None, 7)
    ),
    *((TRAIN, "run_name", value, "text without a slash") for value in ("", "a/b", 2024, ".", "..")),
    *((TRAIN, "method", value, "text but") for value in ("", 3)),
    *((TRAIN, "device", value, "a device of this machine") for value in ("gpu", "cuda:99", "meta", None, "", 99)),
    *((TRAIN, "amp_dtype", value, "one of 'bfloat16', 'float16'") for value in ("float32", None, 16)),
    (TRAIN, "amp_dtype", "bfloat", "did you mean 'bfloat16'?"),
    *((TRAIN, "process_timeout", value, "above 0, or None") for value in (0, -1, "10 min")),
    *((TRAIN, "mutual_weight", value, "0 or more") for value in (-1, "high", NAN)),
    *((TRAIN, "mutual_ramp_up_iterations", value, "1 or more") for value in (0, -10, 1.5)),
    *((TRAIN, "mutual_target", value, "one of 'hard', 'soft'") for value in ("firm", True)),
    (TRAIN, "entropy_weight", -0.9, "0 or more"),
    *((TRAIN, "view_weights", value, "a list of numbers") for value in ([], [0, 0, 0], [1, -1], 1.0, ["a"], [NAN])),
    *((TRAIN, "augmentation_hole", value, "1 or more") for value in (0, -1, 2.5)),
    *((TRAIN, "mixing_weight", value, "0 or more") for value in (-0.5, None)),
    *((TRAIN, "mixing_start", value, "a whole number, 0 or more") for value in (-1, 0.24)),
    *((TRAIN, "mixing_grid_size", value, "2 or more, or a list") for value in (0, 1, 2.5, [4], "4")),
    *((TRAIN, "mixing_num_cells", value, "1 or more") for value in (0, 2.5)),
    *((TRAIN, "mixing_pseudo_label", value, "'teacher', 'student'") for value in ("sam", 0)),
    (TRAIN, "mixing_pseudo_label", "techer", "did you mean 'teacher'?"),
    *((TRAIN, "sam_variant", value, "one of 'vit_b', 'vit_l', 'vit_h', 'mobile_sam'") for value in ("sam2", None)),
    (TRAIN, "sam_variant", "vit_t", "is 'mobile_sam' here, and this package's small SAM is 'stand_in'"),
    (TRAIN, "sam_variant", "vitb", "did you mean 'vit_b'?"),
    *((TRAIN, "sam_checkpoint", value, "a path, or None") for value in ("", 0, True)),
    *((TRAIN, "sam_trainable", value, "'adapters', 'all'") for value in ("none", None)),
    *((TRAIN, "sam_input", value, "the number of a channel, 'mean' or 'rgb'") for value in (-1, "red", 0.5)),
    *((TRAIN, "distillation_weight", value, "0 or more") for value in (-1, "1")),
    *((TRAIN, "distillation_temperature", value, "above 0") for value in (0, -2, INF)),
    *((TRAIN, "distillation_dice_weight", value, "0 or more") for value in (-1,)),
    *((TRAIN, "distillation_start", value, "0 or more") for value in (-1, 1.5)),
    *((TRAIN, "distillation_every", value, "1 or more") for value in (0, 1.5)),
    *((TRAIN, "distillation_gate", value, "one of 'none', 'agreement', 'validation'") for value in (None, "off")),
    (TRAIN, "distillation_gate", "validaton", "did you mean 'validation'?"),
    *((TRAIN, "distillation_gate_tolerance", value, "above 0") for value in (0, -0.1)),
    *((TRAIN, "prompt_view", value, "the number of a view") for value in (-1, 0.5, "fused")),
    *((TRAIN, "taught_views", value, "a list of view numbers") for value in ([], [1, 1], [-1], 1, ["vnet"])),
    *((TRAIN, "taught_rows", value, "one of 'all', 'unlabeled'") for value in ("labeled", [0])),
    (TRAIN, "taught_rows", "unlabelled", "did you mean 'unlabeled'?"),
    *((overlay("mean_teacher"), "ema_decay", value, "below 1") for value in (1, -0.1, "slow")),
    *((overlay("mean_teacher"), "consistency_weight", value, "0 or more") for value in (-1, NAN)),
    (overlay("ua_mt"), "num_passes", 0, "1 or more"),
    (overlay("ua_mt"), "passes_at_once", 0, "1 or more, or None"),
    *((overlay("fixmatch"), "pseudo_label_threshold", value, "a number, 0 to 1") for value in (95, -0.1)),
    *((overlay("bcp"), "box_fraction", value, "between 0 and 1") for value in (0, 1, 2)),
    (overlay("bcp"), "unlabeled_pixel_weight", -0.5, "0 or more"),
    (SAM2, "sam_variant", "base+", "did you mean 'base_plus'?"),
    *((TRAIN, "teacher_pretrained_on", value, "text, or None") for value in ("", 7)),
    *((NETWORK, "teacher_bundle", value, "a path, or None") for value in ("", 1)),
    *((NETWORK, "teacher_channels", value, "a number of channels, or a list") for value in (0, [], "lv", [-1], [[]])),
    *((NETWORK, "teacher_normalize", value, "z_score or None") for value in ("minmax", True)),
    (("train", "network_pair", "cps"), "mutual_rows", "labeled", "one of 'all', 'unlabeled'"),
    (("train", "multi_gpu_train"), "sync_batchnorm", "false", "True or False"),
    *((EVALUATE, "split", value, "one of 'labeled', 'validation', 'test'") for value in ("train", None, 0)),
    (EVALUATE, "split", "tests", "did you mean 'test'?"),
    *((EVALUATE, "ckpt_path", value, "a path but") for value in ("", None)),
    *((INFERENCE, "ckpt_path", value, "a path but") for value in ("", None)),
    *((INFERENCE, "image_pattern", value, "text but") for value in ("", 5)),
    *((INFERENCE, "output_postfix", value, "text without a slash") for value in ("../x", None)),
    (INFERENCE, "largest_component", "yes", "True or False"),
    (INFERENCE, "num_classes", 1, "a number of classes"),
]
WRONG_OF_SLICES = [
    *(
        (TRAIN, "image_size", value, "the side of a square slice")
        for value in ([64, 32], [64], [64, 64, 64], 0, 64.5, "64", HUGE)
    ),
    *((TRAIN, "augmentation_shift", value, "0 or more") for value in (-1, "far")),
    *((TRAIN, "sam_encoder", value, "one of 'adapted', 'cached'") for value in ("frozen", None)),
    *((TRAIN, "sam_cache_dir", value, "a path, or None") for value in ("", 1)),
    (INFERENCE, "image_size", [64, 32], "the side of a square slice"),
    *((INFERENCE, "slices_per_batch", value, "1 or more") for value in (0, 1.5)),
]
WRONG_OF_VOLUMES = [
    *(
        (TRAIN, "image_size", value, "three whole numbers")
        for value in (64, [64, 64], [64, 64, 0], [64, 64, 0.5], "64", [])
    ),
    *((TRAIN, "spacing", value, "three numbers, 0 to 1000") for value in (1.0, [1, 1], [1, 1, -1], [1, 1, INF])),
    *((TRAIN, "crop_size", value, "above 0, or None") for value in (0, -1, [200] * 3)),
    *((TRAIN, "channels", value, "a list of whole numbers") for value in ([], [16, 0], 16, [1.5])),
    *((TRAIN, "aggregation_channels", value, "three whole numbers") for value in ([16, 16], [0] * 3)),
    *((TRAIN, "window_overlap", value, "below 1, or a list of three") for value in (1, -0.1, [0.5, 0.5], "half")),
    *((TRAIN, "sam_image_size", value, "the side of a square slice") for value in (0, [64, 32])),
    *((TRAIN, "sam_axes", value, "an axis, -3 to 2") for value in (3, [0, 0], [], "z")),
    *((TRAIN, "sam_slices", value, "1 or more, or None") for value in (0, 1.5)),
    *((TRAIN, "sam_slice_sampling", value, "one of 'uniform', 'entropy'") for value in ("all", None)),
    (EVALUATE, "window_overlap", 1.5, "below 1"),
    (INFERENCE, "window_overlap", [0.5], "below 1"),
    (INFERENCE, "windows_per_batch", 0, "1 or more"),
]
CASES = [(bundle, *case) for bundle in (ACDC, LA) for case in WRONG]
CASES += [(ACDC, *case) for case in WRONG_OF_SLICES] + [(LA, *case) for case in WRONG_OF_VOLUMES]


@pytest.mark.parametrize("bundle, names, key, value, message", CASES)
def test_wrong_value_is_one_sentence_with_the_key(bundle, names, key, value, message):
    with pytest.raises(ValueError) as error:
        check_values(merged(bundle, names, **{key: value}))
    sentence = str(error.value)
    assert (
        re.fullmatch(rf"`{key}` must be [^\n]+ but is [^\n]+; [^\n]+[.?]", sentence) and message in sentence
    ), sentence


TWO_EPOCHS = {"max_iterations": 8, "epoch_length": 4, "mixing_start": 0}
CONTRADICTIONS = [
    (TRAIN, {**TWO_EPOCHS, "epoch_length": 9}, "`epoch_length` must be at most 8"),
    (TRAIN, {**TWO_EPOCHS, "val_interval": 3}, "`val_interval` must be 1 to 2"),
    (TRAIN, {**TWO_EPOCHS, "accumulation_steps": 5}, "`accumulation_steps` must be at most 4"),
    (
        TRAIN,
        {**TWO_EPOCHS, "max_iterations": 9, "accumulation_steps": 2},
        "`max_iterations` must end with an optimizer step",
    ),
    (TRAIN, {**TWO_EPOCHS, "mixing_start": 8}, "`mixing_start` must be below 8"),
    (TRAIN, {**TWO_EPOCHS, "distillation_start": 100}, "`distillation_start` must be below 8"),
    (TRAIN, {**TWO_EPOCHS, "unlabeled_batch_size": 0}, "`mixing_weight` must be 0 without unlabeled rows"),
    *(
        (TRAIN, {"mixing_weight": 0, "unlabeled_batch_size": 0, **gate}, "`distillation_gate` must be 'none' without")
        for gate in ({}, {"distillation_gate": "validation"})
    ),
    (TRAIN, {**TWO_EPOCHS, "distillation_every": 9}, "`distillation_every` must be at most 8"),
    (overlay("mean_teacher"), {**TWO_EPOCHS, "consistency_start": 8}, "`consistency_start` must be below 8"),
    (overlay("fixmatch"), {**TWO_EPOCHS, "pseudo_label_start": 8}, "`pseudo_label_start` must be below 8"),
    (overlay("bcp"), {**TWO_EPOCHS, "pretraining_iterations": 8}, "`pretraining_iterations` must be below 8"),
    (["train", "mean_teacher"], {}, "`taught_views` must be below 1, the number of `view_weights`, but are [1, 2]; a"),
    (TRAIN, {"mixing_num_cells": 4, "mixing_grid_size": [2, 2, 1]}, "`mixing_"),
    (TRAIN, {"mixing_grid_size": 500}, "`mixing_grid_size` must be at most the image's size"),
    (TRAIN, {"augmentation_hole": 500}, "`augmentation_hole` must be at most the image's size"),
    (TRAIN, {"augmentation_hole": [3] * 4}, "one number for each axis, but is [3, 3, 3, 3]"),
    (TRAIN, {"mixing_num_cells": 64}, "`mixing_num_cells` must be below"),
    (TRAIN, {"sam_checkpoint": None, "sam_trainable": "adapters"}, "`sam_checkpoint` must be a file of SAM's weights"),
    (TRAIN, {"sam_variant": "tiny"}, "but is 'tiny', a SAM 2; add the overlay teacher_sam2.json"),
    (SAM2, {"sam_variant": "vit_b"}, "but is 'vit_b', a SAM 1; leave out the overlay teacher_sam2.json"),
    (NETWORK, {}, "`teacher_bundle` must be the folder of a trained network's bundle but is None; name it, as in --"),
    (
        NETWORK,
        {"teacher_bundle": "/b", "teacher_channels": [0, 1, 2, 3, 4]},
        "`teacher_channels` must have an entry for each",
    ),
    (
        NETWORK,
        {"teacher_bundle": "/b", "teacher_channels": 9},
        "classes, background included, but has 9; name the network's",
    ),
    (
        NETWORK,
        {"teacher_bundle": "/b", "sam_checkpoint": "/models/sam.pth"},
        "`sam_checkpoint` must be left out if a network teaches but is '/models/sam.pth'; its weights are in `teacher_",
    ),
    (TRAIN, {"labeled_patients": 7}, "`labeled_patients` must be left out with the synthetic phantom but is 7"),
    (TRAIN, {"dataset_dir": LIST, "labeled_patients": 7}, f"must be left out with the data list {LIST} but is 7"),
    (TRAIN, {"dataset_dir": LIST, "holdout_patients": 2}, "`holdout_patients` must be left out"),
    (TRAIN, {"dataset_dir": FOLDER, "labeled_patients": None}, "`labeled_patients` must be a number of patients"),
    (EVALUATE, {"dataset_dir": LIST, "labeled_patients": 3}, "`labeled_patients` must be left out"),
    (TRAIN, {"is_phantom": False}, "`is_phantom` must be left out but is False; it follows from `dataset_dir`, so set"),
]


@pytest.mark.parametrize("bundle", [ACDC, LA])
@pytest.mark.parametrize("names, override, message", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_named(bundle, names, override, message):
    with pytest.raises(ValueError) as error:
        check_values(merged(bundle, names, **override))
    assert message in str(error.value)


def test_cache_folder_without_a_cached_encoder_is_an_error():
    with pytest.raises(ValueError, match="`sam_cache_dir` must be left out .*; add --sam_encoder cached"):
        check_values(merged(ACDC, TRAIN, sam_cache_dir="/cache"))
    assert check_values(merged(ACDC, TRAIN, sam_cache_dir="/cache", sam_encoder="cached")) == {}


@pytest.mark.parametrize(
    "bundle, names, key, size, message",
    [
        (ACDC, TRAIN, "image_size", 100, "must be a multiple of 16 for this teacher but is 100; try 96."),
        (LA, TRAIN, "sam_image_size", 8, "must be a multiple of 16 for this teacher but is 8; try 16."),
        (ACDC, SAM2, "image_size", 112, "must be a multiple of 32 for this teacher but is 112; try 128."),
        (LA, SAM2, "sam_image_size", 80, "must be a multiple of 32 for this teacher but is 80; try 64."),
    ],
)
def test_size_that_the_teacher_cannot_take_is_an_error(bundle, names, key, size, message):
    override = {key: size, "sam_trainable": "all"}
    with pytest.raises(ValueError) as error:
        check_values(merged(bundle, names, **override))
    assert str(error.value) == f"`{key}` {message}"
    assert check_values(merged(bundle, names, **override, use_sam=False)) == {}


def test_network_keeps_no_embeddings():
    with pytest.raises(ValueError, match="`sam_encoder` must be 'adapted' if a network teaches"):
        check_values(merged(ACDC, NETWORK, teacher_bundle="/bundle", sam_encoder="cached"))
    assert check_values(merged(ACDC, NETWORK, use_sam=False)) == {}


UNKNOWN = [
    (TRAIN, "labeld_patients", "did you mean `labeled_patients`?"),
    (TRAIN, "dataset_dri", "did you mean `dataset_dir`?"),
    (TRAIN, "sam_checkpiont", "did you mean `sam_checkpoint`?"),
    (TRAIN, "networkdef", "did you mean `network_def`?"),
    (TRAIN, "xyzzy", "leave it out."),
    (TRAIN, "ema_decay", "nothing here uses it; add the overlay that does"),
    (TRAIN, "split", "nothing here uses it"),
    (TRAIN, "image_pattern", "nothing in it refers to it"),
    (INFERENCE, "max_iterations", "nothing in it refers to it"),
    (INFERENCE, "output_postfx", "did you mean `output_postfix`?"),
    (EVALUATE, "ckpt_pth", "did you mean `ckpt_path`?"),
]


@pytest.mark.parametrize("bundle", [ACDC, LA])
@pytest.mark.parametrize("names, key, message", UNKNOWN)
def test_unknown_key_is_an_error(bundle, names, key, message):
    with pytest.raises(ValueError) as error:
        check_values(merged(bundle, names, **{key: 1}))
    assert re.match(rf"`{key}` must be [^\n]+$", str(error.value)) and message in str(error.value)


@pytest.mark.parametrize("bundle, key", [(ACDC, "spacing"), (LA, "augmentation_shift")])
def test_key_of_the_other_bundle_is_an_error(bundle, key):
    with pytest.raises(ValueError, match=f"`{key}` must be a key of this config but is not"):
        check_values(merged(bundle, TRAIN, **{key: 1}))


@pytest.mark.parametrize("names", [TRAIN, SAM2])
@pytest.mark.parametrize("key", ["sam_encoder", "sam_cache_dir"])
def test_cached_encoder_of_volumes_is_an_error_with_its_reason(names, key):
    with pytest.raises(ValueError, match=f"`{key}` must be left out in the 3D bundle but is set: slices of random"):
        check_values(merged(LA, names, **{key: "cached"}))


@pytest.mark.parametrize("bundle", [ACDC, LA])
def test_weights_of_sam2_are_random_on_the_phantom_alone(bundle):
    values = plain_values(merged(bundle, SAM2))
    assert (values["sam_checkpoint"], values["sam_trainable"]) == (None, "all")
    values = plain_values(merged(bundle, SAM2, dataset_dir=LIST, sam_variant="base_plus"))
    assert values["sam_checkpoint"].endswith("models/sam2.1-hiera-base-plus")
    assert values["sam_trainable"] == "adapters"


def test_all_mistakes_are_reported_together():
    with pytest.raises(ValueError) as error:
        check_values(merged(ACDC, TRAIN, lr=0, use_sam="false", labeld_patients=3))
    lines = str(error.value).splitlines()
    assert sorted(line.split("`")[1] for line in lines) == ["labeld_patients", "lr", "use_sam"]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("lr", "@lrr", "`lr` must refer to keys of this config but refers to `@lrr`, which is not; did you mean `@lr"),
        ("lr", "$0.01 *", r"`lr` must be a valid expression but is '\$0.01 \*'"),
        ("output_dir", "$NO_SUCH/run", "`output_dir` must be a valid expression"),
    ],
)
def test_only_the_key_of_a_failing_expression_is_reported(key, value, message):
    with pytest.raises(ValueError, match=message) as error:
        check_values(merged(ACDC, TRAIN, **{key: value}))
    assert len(str(error.value).splitlines()) == 1


RIGHT = [
    (ACDC, TRAIN, {"image_size": 32.0}, {"image_size": 32}),
    (ACDC, TRAIN, {"image_size": [64, 64]}, {"image_size": 64}),
    (ACDC, TRAIN, {"image_size": (64.0, 64.0)}, {"image_size": 64}),
    (LA, TRAIN, {"image_size": [64.0, 64, 32]}, {"image_size": [64, 64, 32]}),
    (LA, TRAIN, {"image_size": (64, 64, 32)}, {"image_size": [64, 64, 32]}),
    (LA, TRAIN, {"sam_image_size": [64, 64], "sam_axes": (0, -1)}, {"sam_image_size": 64, "sam_axes": [0, -1]}),
    (LA, TRAIN, {"spacing": [0, 1, 2], "crop_size": None, "sam_slices": None, "window_overlap": [0.5, 0.5, 0]}, {}),
    (ACDC, TRAIN, {"max_iterations": 1e4}, {"max_iterations": 10000}),
    (ACDC, TRAIN, {"device": "cpu"}, {"device": torch.device("cpu")}),
    (ACDC, INFERENCE, {"device": "cpu"}, {"device": torch.device("cpu")}),
    (ACDC, TRAIN, {"class_names": ("a", "b")}, {"class_names": ["a", "b"]}),
    (ACDC, TRAIN, {"lr": 1, "mixing_weight": 0, "momentum": 0, "lr_power": 0, "weight_decay": 0}, {}),
    (ACDC, TRAIN, {"max_iterations": 10, "epoch_length": 4, "accumulation_steps": 2}, {}),
    (ACDC, TRAIN, {"sam_checkpoint": None, "sam_input": "mean", "view_weights": [0.5, 1, 0]}, {}),
    (ACDC, TRAIN, {"dataset_dir": FOLDER, "labeled_patients": 3, "holdout_patients": 2}, {}),
    (ACDC, TRAIN, {"use_sam": False, "distillation_start": 10**6, "mixing_grid_size": [4, 2]}, {}),
    (ACDC, NETWORK, {"teacher_bundle": "/b", "teacher_channels": [0, ["a", 2], "b", 4]}, {}),
    (LA, NETWORK, {"teacher_bundle": "/b", "teacher_channels": (0, 1.0)}, {"teacher_channels": [0, 1]}),
    (LA, SAM2, {"sam_variant": "base_plus", "sam_checkpoint": "/models/sam2.1_hiera_base_plus.pt"}, {}),
    (ACDC, TRAIN, {"lr": {"_target_": "max", "_args_": [0.1, 0.2]}}, {}),
    # keys of the user's own that something refers to
    (ACDC, TRAIN, {"base_lr": 0.1, "lr": "$@base_lr / 2"}, {}),
    (ACDC, TRAIN, {"depth": [4] * 5, "network_def#channels": "@depth", "train#trainer#epoch_length": 10}, {}),
    (ACDC, TRAIN, {"train#method#_disabled_": True, "network_def": {"_target_": "BasicUNet"}}, {}),
]


@pytest.mark.parametrize("bundle, names, override, changed", RIGHT)
def test_right_value_is_accepted_in_the_config_s_own_form(bundle, names, override, changed):
    found = check_values(merged(bundle, names, **override))
    assert {key: repr(value) for key, value in found.items()} == {key: repr(value) for key, value in changed.items()}
