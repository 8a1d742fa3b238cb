"""The settings of both bundles: every key with its type, its range and its meaning."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.runs.config import SECTIONS, is_plain, plain_values, referred_keys

# what the configs build: these keys hold components, not settings
PARTS = (
    *("data_check", "datalist", "dataloader", "dataset", "distiller", "ema_student", "evaluator"),
    *("handlers", "inferer", "key_metric", "loss", "lr_scheduler", "network", "network_def", "optimizer"),
    *("postprocessing", "preprocessing", "sam_lr_scheduler", "sam_optimizer", "teacher", "train", "validate"),
    *("experiment_name", "is_not_rank0", "save_execute_config", "tracking_uri"),  # of MONAI's --tracking mlflow
)
LARGEST_SEED = 2**32 - 1


def _whole(value: Any) -> Any:
    """32.0 is 32."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _side(value: Any) -> Any:
    """[64, 64] is 64: slices are square."""
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return _whole(value)


def _listed(value: Any) -> Any:
    """A tuple, as Python has it, is a list, as JSON has it."""
    return [_whole(item) for item in value] if isinstance(value, (list, tuple)) else value


def _different(values: list) -> list:
    """None is there twice, whatever its case and spaces."""
    if len({" ".join(str(value).split()).casefold() for value in values}) < len(values):
        raise KnowSAMValueError("twice")
    return values


def _some_positive(values: list[float]) -> list[float]:
    """One at least is above 0."""
    if not any(values):
        raise KnowSAMValueError("all 0")
    return values


def _device(value: Any) -> torch.device:
    """A device of this machine, by name too."""
    try:
        device = torch.device(value)
        torch.zeros(1, device=device).item()  # of a device that holds no values it fails
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:  # torch without CUDA asserts
        raise ValueError from error
    return device


# Each type ends with the words that an error has for it.
Whole = Annotated[int, BeforeValidator(_whole)]
Switch = Annotated[bool, "True or False"]
Count = Annotated[Whole, Field(ge=1, le=10**9), "a whole number, 1 or more, at most 10^9"]
CountOrNone = Annotated[Count | None, "a whole number, 1 or more, or None"]
CountOrZero = Annotated[Whole, Field(ge=0, le=10**9), "a whole number, 0 or more, at most 10^9"]
Workers = Annotated[Whole, Field(ge=0, le=1024), "a number of processes, 0 to 1024"]
Classes = Annotated[Whole, Field(ge=2, le=1000), "a number of classes, 2 to 1000, with the background"]
Channels = Annotated[Whole, Field(ge=1, le=1000), "a number of channels, 1 to 1000"]
Seed = Annotated[Whole, Field(ge=0, le=LARGEST_SEED), f"a whole number, 0 to {LARGEST_SEED}"]
Rate = Annotated[float, Field(gt=0, le=100), "a number above 0, at most 100"]
Factor = Annotated[float, Field(ge=0, le=1e6), "a number, 0 or more, at most 1000000"]
Positive = Annotated[float, Field(gt=0, le=1e6), "a number above 0, at most 1000000"]
PositiveOrNone = Annotated[Positive | None, "a number above 0, or None"]
BelowOne = Annotated[float, Field(ge=0, lt=1), "a number, 0 or more and below 1"]
Between = Annotated[float, Field(gt=0, lt=1), "a number between 0 and 1"]
Probability = Annotated[float, Field(ge=0, le=1), "a number, 0 to 1"]
Text = Annotated[str, Field(min_length=1), "text"]
FileName = Annotated[str, Field(pattern=r"^[^/\\]*[^/\\.][^/\\]*$"), "text without a slash, and not dots alone"]
Path = Annotated[str, Field(min_length=1), "a path"]
PathOrNone = Annotated[Path | None, "a path, or None"]
Device = Annotated[Any, PlainValidator(_device), "a device of this machine, such as cpu"]
Names = Annotated[
    list[Annotated[str, Field(pattern=r"\S")]],
    Field(min_length=1),
    BeforeValidator(_listed),
    AfterValidator(_different),
    "a list of names, one or more, no two the same",
]
View = Annotated[Whole, Field(ge=0, le=1000), "the number of a view, 0 or more"]
Views = Annotated[
    list[Annotated[int, Field(ge=0, le=1000)]],
    Field(min_length=1),
    BeforeValidator(_listed),
    AfterValidator(_different),
    "a list of numbers of views, one or more, 0 or above, no two the same",
]
ViewWeights = Annotated[
    Annotated[
        list[Annotated[float, Field(ge=0, le=1e6)]],
        Field(min_length=1),
        BeforeValidator(_listed),
        AfterValidator(_some_positive),
    ]
    | None,
    "a list of numbers, 0 or more, one for each view and one of them above 0, or None",
]
Side = Annotated[
    int, BeforeValidator(_side), Field(ge=1, le=8192), "a whole number, 1 to 8192, the side of a square slice"
]
Sides = Annotated[
    list[Annotated[int, Field(ge=1, le=2048)]],
    Field(min_length=3, max_length=3),
    BeforeValidator(_listed),
    "a list of three whole numbers, 1 to 2048",
]
Spacing = Annotated[
    list[Annotated[float, Field(ge=0, le=1000)]],
    Field(min_length=3, max_length=3),
    BeforeValidator(_listed),
    "a list of three numbers, 0 to 1000",
]
Widths = Annotated[
    list[Annotated[int, Field(ge=1, le=65536)]],
    Field(min_length=1),
    BeforeValidator(_listed),
    "a list of whole numbers, 1 or more",
]
Overlap = Annotated[
    BelowOne
    | Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=3, max_length=3), BeforeValidator(_listed)],
    "a number, 0 or more and below 1, or a list of three",
]
Grid = Annotated[
    Annotated[Whole, Field(ge=2, le=8192)]
    | Annotated[
        list[Annotated[int, Field(ge=1, le=8192)]], Field(min_length=2, max_length=3), BeforeValidator(_listed)
    ],
    "a whole number, 2 or more, or a list of one for each axis",
]
Axis = Annotated[int, Field(ge=-3, le=2)]
Axes = Annotated[
    Annotated[Axis, BeforeValidator(_whole)]
    | Annotated[list[Axis], Field(min_length=1), BeforeValidator(_listed), AfterValidator(_different)],
    "an axis, -3 to 2, or a list of different ones",
]
RGB = Annotated[
    Annotated[Whole, Field(ge=0, le=1000)] | Literal["mean", "rgb"], "the number of a channel, 'mean' or 'rgb'"
]


def _about(meaning: str) -> Any:
    """A key that a config may have; none is demanded."""
    return Field(default=None, description=meaning)


class Everywhere(BaseModel):
    """Keys of training, evaluation and inference."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True, extra="ignore")

    bundle_root: Path = _about("the bundle's folder")
    dataset_dir: PathOrNone = _about("data-list JSON, or folder of data; None for the synthetic phantom")
    is_phantom: Switch = _about("whether it runs on the synthetic phantom; follows from dataset_dir")
    output_dir: Path = _about("folder of all that is written")
    device: Device = _about("where it runs")
    in_channels: Channels = _about("channels of an image")
    num_classes: Classes = _about("classes with the background; in training it follows from class_names")
    prompt_view: View = _about("the view of the student that prompts SAM")
    taught_views: Views = _about("the views of the student that SAM teaches")


class Training(Everywhere):
    """Keys of ``train.json`` of both bundles."""

    labeled_patients: CountOrNone = _about("patients with labels, of a folder of ACDC or of left atria")
    holdout_patients: CountOrZero = _about("training patients of such a folder to validate on instead")
    method: Text = _about("named in run_name")
    seed: Seed = _about("of weights, order and augmentation")
    use_sam: Switch = _about("whether SAM teaches; False builds nothing of it")
    run_name: FileName = _about("folder of the run below output")
    ckpt_dir: Path = _about("folder that the best student is copied to")
    amp: Switch = _about("mixed precision on a GPU")
    amp_dtype: Literal["bfloat16", "float16"] = _about("of mixed precision on a GPU")
    cpu_autocast: Switch = _about("bfloat16 on a CPU")
    fast_cpu_matmul: Switch = _about("oneDNN's matrix products on a CPU")
    preflight: Switch = _about("only say what the run would be")
    resume: Switch = _about("go on from the last checkpoint in output_dir; False removes them")
    process_timeout: PositiveOrNone = _about("seconds that processes wait for each other; None for one process")
    class_names: Names = _about("names of the classes without the background")
    labeled_batch_size: Count = _about("labeled rows of a batch")
    unlabeled_batch_size: CountOrZero = _about("unlabeled rows of a batch")
    max_iterations: Count = _about("iterations of the run")
    epoch_length: Count = _about("iterations of an epoch")
    val_interval: Count = _about("epochs between two validations")
    log_interval: Count = _about("iterations between two readings of the loss terms")
    num_workers: Workers = _about("processes that load batches")
    cache_workers: Workers = _about("processes that read and prepare the data before the first step")
    lr: Rate = _about("the student's first learning rate")
    momentum: BelowOne = _about("of the student's SGD")
    weight_decay: BelowOne = _about("of the student's SGD")
    lr_power: Factor = _about("exponent of both learning rates' decay; 0 keeps them")
    accumulation_steps: Count = _about("iterations whose gradients make one step")
    view_weights: ViewWeights = _about("weight of the supervised loss of each view; None: the same for each")
    mutual_weight: Factor = _about("of the views' consistency")
    mutual_ramp_up_iterations: Count = _about("until the consistency has its full weight")
    mutual_target: Literal["hard", "soft"] = _about("of the consistency: the other view's argmax or probabilities")
    entropy_weight: Factor = _about("of the entropy of the views' mean")
    augmentation_hole: Annotated[Count | Widths, "a whole number, 1 or more, or a list of one for each axis"] = _about(
        "side of the holes of coarse dropout, in pixels"
    )
    mixing_weight: Factor = _about("of the mixed images; 0 makes none")
    mixing_start: CountOrZero = _about("the iteration that images are mixed from")
    mixing_grid_size: Grid = _about("cells along each axis")
    mixing_num_cells: Count = _about("cells that are overwritten in an image")
    mixing_pseudo_label: Literal["teacher", "student"] = _about("whose argmax labels unlabeled cells")
    sam_variant: Literal["vit_t", "vit_b", "vit_l", "vit_h"] = _about("size of SAM; vit_t is a small stand-in")
    sam_checkpoint: PathOrNone = _about("file of SAM's weights; 'procedural' for the stand-in's; None for random ones")
    sam_trainable: Literal["adapters", "all"] = _about("what of SAM trains")
    sam_lr: Rate = _about("SAM's first learning rate")
    sam_input: RGB = _about("how an image becomes RGB; may be a component")
    distillation_weight: Factor = _about("of the teacher's lesson")
    distillation_temperature: Positive = _about("of both softmaxes")
    distillation_dice_weight: Factor = _about("of the lesson's Dice term")
    distillation_start: CountOrZero = _about("the iteration that SAM teaches from; it learns from the first")
    distillation_every: Count = _about("iterations between two lessons")
    distillation_gate: Literal["none", "validation", "agreement"] = _about("what decides how much the teacher counts")
    distillation_gate_tolerance: Positive = _about("Dice that the teacher may be behind before the gate is shut")
    taught_rows: Literal["all", "unlabeled"] = _about("the rows that SAM teaches")


class Slices(BaseModel):
    """Keys of all configs of the bundle of slices."""

    image_size: Side = _about("height and width of a slice, in pixels")


class Volumes(BaseModel):
    """Keys of all configs of the bundle of volumes."""

    image_size: Sides = _about("size of a patch, in voxels")
    spacing: Spacing = _about("distance of voxels along each axis, mm; 0 keeps an axis as it is")
    crop_size: PositiveOrNone = _about("edge of the cube that an image is cropped to, mm; None crops nothing")
    channels: Widths = _about("channels of each level of the student")
    aggregation_channels: Annotated[
        list[Annotated[int, Field(ge=1, le=65536)]],
        Field(min_length=3, max_length=3),
        BeforeValidator(_listed),
        "a list of three whole numbers, 1 or more",
    ] = _about("channels of the three branches that fuse the views")
    window_overlap: Overlap = _about("share of a window that overlaps with the next")


class SliceTraining(Slices, Training):
    """Keys of ``train.json`` of the bundle of slices."""

    augmentation_shift: Factor = _about("largest shift of an image, in pixels")
    sam_encoder: Literal["adapted", "cached"] = _about("SAM's image encoder: with adapters, or run once for each image")
    sam_cache_dir: PathOrNone = _about("folder of what a cached encoder gave; None keeps it in memory")


class VolumeTraining(Volumes, Training):
    """Keys of ``train.json`` of the bundle of volumes."""

    sam_image_size: Side = _about("height and width of what SAM sees, in pixels")
    sam_axes: Axes = _about("the axes that slices are taken along")
    sam_slices: CountOrNone = _about("slices of a volume that SAM sees in a step; None for all")
    sam_slice_sampling: Literal["uniform", "entropy"] = _about("how these are drawn")


class Inference(Everywhere):
    """Keys of ``inference.json`` of both bundles."""

    ckpt_path: Path = _about("file of the student's weights")
    image_pattern: Text = _about("glob pattern of the images below dataset_dir")
    largest_component: Switch = _about("keep only the largest part of each class")
    output_postfix: FileName = _about("end of a segmentation's file name")


class SliceInference(Slices, Inference):
    """Keys of ``inference.json`` of the bundle of slices."""

    slices_per_batch: Count = _about("slices that are segmented at a time")


class VolumeInference(Volumes, Inference):
    """Keys of ``inference.json`` of the bundle of volumes."""

    windows_per_batch: Count = _about("windows that are segmented at a time")


class Overlays(BaseModel):
    """Keys of the configs that go over ``train.json``: methods, evaluation, several processes."""

    model_config = Everywhere.model_config

    mutual_rows: Literal["all", "unlabeled"] = _about("rows of the consistency (cps)")
    ema_decay: BelowOne = _about("of the averaged student (mean_teacher, ua_mt, bcp)")
    consistency_weight: Factor = _about("of the consistency with the averaged student (mean_teacher, ua_mt)")
    consistency_start: CountOrZero = _about("the iteration that it counts from (mean_teacher, ua_mt)")
    num_passes: Count = _about("noisy passes of the averaged student (ua_mt)")
    passes_at_once: CountOrNone = _about("noisy passes in one batch; None: as many as fit (ua_mt)")
    pseudo_label_weight: Factor = _about("of the pseudo-labels (fixmatch)")
    pseudo_label_threshold: Probability = _about("a pixel with a lower probability has no label (fixmatch)")
    pseudo_label_start: CountOrZero = _about("the iteration that they count from (fixmatch)")
    pretraining_iterations: CountOrZero = _about("iterations on labeled pairs alone (bcp)")
    unlabeled_pixel_weight: Factor = _about("of unlabeled pixels in the loss (bcp)")
    box_fraction: Between = _about("side of the copied box, of the image's (bcp)")
    ckpt_path: Path = _about("file of the student's weights (evaluate)")
    split: Literal["labeled", "validation", "test"] = _about("section of the data that is evaluated (evaluate)")
    sync_batchnorm: Switch = _about("whether processes share batch normalization (multi_gpu_train)")


def check_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Check the settings in a config.

    Args:
        config: a merged config of a bundle.

    Returns:
        The settings that are right but not in the form that the config needs, in that form, by key: of
        ``image_size`` 32.0 or [32, 32] it is 32.

    Raises:
        ValueError: a line for each setting of a wrong type or out of its range, each that contradicts another or does
            nothing, and each unknown key.

    Example:
        >>> check_values({"train": {}, "lr": "$@max_iterations / 1e6", "max_iterations": 100.0})
        {'max_iterations': 100}
        >>> check_values({"train": {}, "use_sam": "false"})
        Traceback (most recent call last):
        ValueError: `use_sam` must be True or False but is 'false'; write True or False, without quotes.
    """
    models = _models(config)
    unknown = dict(_unknown_keys(config, models))
    fields = {name: field for model in models for name, field in model.model_fields.items() if name not in unknown}
    settled: dict[str, Any] = {}
    while True:  # what is derived from a value in another form is right once that has the config's own
        current = {**config, **settled}
        values = {key: value for key, value in plain_values(current).items() if key in fields}
        checked, wrong = _validated(models, values)
        changed = {key: value for key, value in checked.items() if _differs(value, values[key])}
        if not changed:
            break
        settled |= {key: value for key, value in changed.items() if not referred_keys(current[key]) & set(changed)}
    causes = [key for key in wrong if not referred_keys(current[key]) & wrong]
    mistakes = [_sentence(key, fields[key], values[key]) for key in causes] + list(unknown.values())
    mistakes = mistakes or list(_contradictions(checked, is_training="train" in config and "split" not in config))
    mistakes = mistakes or list(_broken_expressions(current, fields, values))
    if mistakes:
        raise KnowSAMValueError("\n".join(mistakes))
    return settled


def _validated(models: tuple[type[BaseModel], ...], values: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The right values by key, and the keys of the wrong ones."""
    checked, wrong = {}, set()
    for model in models:
        try:
            model.model_validate(values)
        except ValidationError as error:
            wrong |= {str(detail["loc"][0]) for detail in error.errors()}
        found = model.model_validate({key: value for key, value in values.items() if key not in wrong})
        checked |= {key: getattr(found, key) for key in found.model_fields_set}
    return checked, wrong


def _models(config: Mapping[str, Any]) -> tuple[type[BaseModel], ...]:
    """What lists the keys of a config: that of the bundle which more of its keys are of."""
    pairs = [(SliceInference, VolumeInference), (SliceTraining, VolumeTraining)]
    slices, volumes = pairs["train" in config]
    of_slices, of_volumes = (set(model.model_fields) & set(config) for model in (slices, volumes))
    bundle = volumes if len(of_volumes - of_slices) > len(of_slices - of_volumes) else slices
    return (bundle, Overlays) if "train" in config else (bundle,)


def _differs(value: Any, given: Any) -> bool:
    """An int in place of a float is as good."""
    if isinstance(value, list) and isinstance(given, list):
        return any(map(_differs, value, given))
    return value != given or type(value) is not type(given) and not isinstance(value, float)


def _sentence(key: str, field: Any, value: Any) -> str:
    """What is wrong with one value."""
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    words = [item for item in field.metadata if isinstance(item, str)]
    expected = words[-1] if words else f"one of {', '.join(map(repr, choices))}"
    remedy = "correct it, or leave it out for the bundle's own value"
    if field.annotation is bool:
        remedy = "write True or False, without quotes"
    elif close := difflib.get_close_matches(str(value), choices, n=1):
        remedy = f"did you mean {close[0]!r}?"
    elif isinstance(value, str) and expected.startswith(("a number", "a whole")):
        remedy = "give a number, without quotes"
    return f"`{key}` must be {expected} but is {_shown(value)}; {remedy}{'' if remedy.endswith('?') else '.'}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown_keys(config: Mapping[str, Any], models: tuple[type[BaseModel], ...]) -> Iterator[tuple[str, str]]:
    """Keys that no config of this bundle has and nothing in this one refers to, each with a sentence."""
    own = set(models[0].model_fields) | set(PARTS)
    known = own | {name for model in models for name in model.model_fields}
    used = set().union(*(referred_keys(part) for key, part in config.items()))
    for key in config:
        if key in SECTIONS or key in own or key in used:
            continue
        if key in known:
            yield key, f"`{key}` must be left out but is given: nothing here uses it; add the overlay that does."
            continue
        close = difflib.get_close_matches(key, [*known, *(set(config) - {key})], n=1, cutoff=0.75)
        meant = f"did you mean `{close[0]}`?" if close else "leave it out."
        yield key, f"`{key}` must be a key of this config but is none, and nothing in it refers to it; {meant}"


def _broken_expressions(
    config: Mapping[str, Any], fields: Mapping[str, Any], values: Mapping[str, Any]
) -> Iterator[str]:
    """Settings that cannot be evaluated although all that they refer to can."""
    for key in fields:
        if key not in config or key in values:
            continue
        names = referred_keys(config[key])
        missing = sorted(names - set(config))
        if missing:
            close = difflib.get_close_matches(missing[0], list(config), n=1)
            meant = f"did you mean `@{close[0]}`?" if close else "correct it."
            yield f"`{key}` must refer to keys of this config but refers to `@{missing[0]}`, which is none; {meant}"
        elif is_plain(key, config) and all(name in values or name not in fields for name in names):
            yield f"`{key}` must be an expression that can be evaluated but {_shown(config[key])} cannot; correct it."


def _contradictions(values: Mapping[str, Any], is_training: bool) -> Iterator[str]:
    """Settings that do not fit together, each of them right in itself."""
    yield from _of_the_data(values)
    if is_training and {"max_iterations", "epoch_length", "val_interval"} <= set(values):
        yield from _of_the_length(values)
        yield from _of_the_parts(values)


def _of_the_data(values: Mapping[str, Any]) -> Iterator[str]:
    data = values.get("dataset_dir")
    if data is not None and not data.endswith(".json"):
        if values.get("labeled_patients", 1) is None:
            yield "`labeled_patients` must be a number of patients of that folder but is None; give one, such as 8."
        return
    for key in ("labeled_patients", "holdout_patients"):
        if values.get(key):
            yield (
                f"`{key}` must be left out with {'the synthetic phantom' if data is None else f'the data list {data}'} "
                f"but is {values[key]}; it chooses patients in a folder of ACDC or of left atria."
            )


def _of_the_length(values: Mapping[str, Any]) -> Iterator[str]:
    last, epoch, steps = values["max_iterations"], values["epoch_length"], values.get("accumulation_steps", 1)
    if epoch > last:
        yield f"`epoch_length` must be at most {last}, the run's `max_iterations`, but is {epoch}; lower it."
        return
    epochs = math.ceil(last / epoch)
    if values["val_interval"] > epochs:
        yield (
            f"`val_interval` must be 1 to {epochs}, the epochs of this run, of {epoch} iterations each "
            f"(`epoch_length`), but is {values['val_interval']}; to validate every n iterations set `epoch_length` to "
            "n."
        )
    if steps > epoch:
        yield f"`accumulation_steps` must be at most {epoch}, the `epoch_length`, but is {steps}; lower it."
    elif last % epoch % steps:
        yield (
            f"`max_iterations` must end with a step of the optimizer, {steps} iterations each (`accumulation_steps`), "
            f"but is {last}; make it a multiple of `epoch_length`, {epoch}."
        )


def _of_the_parts(values: Mapping[str, Any]) -> Iterator[str]:
    last = values["max_iterations"]
    switches = {
        "mixing_start": "mixing_weight",
        "distillation_start": "use_sam",
        "consistency_start": "consistency_weight",
        "pseudo_label_start": "pseudo_label_weight",
        "pretraining_iterations": "unlabeled_pixel_weight",
    }
    for key, switch in switches.items():
        if values.get(switch) and values.get(key, 0) >= last:
            yield f"`{key}` must be below {last}, the run's `max_iterations`, but is {values[key]}; lower it."
    if values.get("mixing_weight") and values.get("unlabeled_batch_size") == 0:
        yield (
            f"`mixing_weight` must be 0 without unlabeled rows (`unlabeled_batch_size` 0) but is "
            f"{values['mixing_weight']:g}; add --mixing_weight 0."
        )
    if values.get("use_sam") and values.get("distillation_every", 1) > last:
        yield (
            f"`distillation_every` must be at most {last}, the run's `max_iterations`, but is "
            f"{values['distillation_every']}; to train without SAM write --use_sam False."
        )
    if values.get("sam_cache_dir") is not None and values.get("sam_encoder") != "cached":
        yield (
            "`sam_cache_dir` must be left out unless `sam_encoder` is 'cached' but is "
            f"{values['sam_cache_dir']!r}; add --sam_encoder cached."
        )
    frozen = values.get("sam_trainable") == "adapters" or values.get("sam_encoder") == "cached"
    if values.get("use_sam") and frozen and values.get("sam_checkpoint", "") is None:
        yield (
            "`sam_checkpoint` must be a file of SAM's weights where they are frozen but is None; name the file, or "
            "train random ones with --sam_trainable all --sam_encoder adapted."
        )
    if values.get("image_size"):
        yield from _of_the_axes(values)


def _of_the_axes(values: Mapping[str, Any]) -> Iterator[str]:
    """What is given along each axis of an image, by one number for all or by a list."""
    size = values["image_size"] if isinstance(values["image_size"], list) else [values["image_size"]] * 2
    lists = {}
    for key, switch in {"augmentation_hole": True, "mixing_grid_size": values.get("mixing_weight")}.items():
        if switch and values.get(key):
            lists[key] = values[key] if isinstance(values[key], list) else [values[key]] * len(size)
    for key, numbers in lists.items():
        if len(numbers) != len(size) or any(number > side for number, side in zip(numbers, size)):
            yield (
                f"`{key}` must be at most the image's size {size}, one number for each axis, but is {values[key]}; "
                "give one number."
            )
    cells = math.prod(lists.get("mixing_grid_size", [math.inf]))
    if values.get("mixing_num_cells", 1) >= cells:
        yield (
            f"`mixing_num_cells` must be below {cells}, the cells of the grid (`mixing_grid_size`), but is "
            f"{values['mixing_num_cells']}; lower it."
        )
