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
from knowsam_monai.teachers.sam import SIZE_DIVISOR
from knowsam_monai.teachers.sam2_model import SAM2_VARIANTS
from knowsam_monai.teachers.sam2_model import SIZE_DIVISOR as SAM2_SIZE_DIVISOR
from knowsam_monai.teachers.sam2_model import sam2_variant_hint
from knowsam_monai.teachers.sam_variants import SAM_VARIANTS, VIT_T
from knowsam_monai.texts import shortened

# keys that hold components instead of settings
COMPONENTS = (
    *("adamw", "data_check", "datalist", "dataloader", "dataset", "distiller", "ema_student", "evaluator"),
    *("handlers", "inferer", "key_metric", "loss", "lr_scheduler", "network", "network_def", "optimizer"),
    *("postprocessing", "preprocessing", "sam_lr_scheduler", "sam_optimizer", "sgd", "student_check"),
    *("teacher", "teacher_check", "train", "validate"),
)
MLFLOW = ("experiment_name", "is_not_rank0", "save_execute_config", "tracking_uri")  # of MONAI's --tracking mlflow
CACHE = ("sam_encoder", "sam_cache_dir")  # of embeddings
LARGEST_SEED = 2**32 - 1


def _whole(value: Any) -> Any:
    """32.0 becomes 32."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _side(value: Any) -> Any:
    """[64, 64] becomes 64, because slices are square."""
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return _whole(value)


def _listed(value: Any) -> Any:
    """A tuple becomes a list, as in JSON."""
    return [_whole(item) for item in value] if isinstance(value, (list, tuple)) else value


def _with_its_hashes(text: str) -> str:
    """MONAI replaces each # in a config's texts by ::, before anything can see it."""
    if "::" in text:
        raise KnowSAMValueError("::")
    return text


def _different(values: list) -> list:
    """No two values may be equal, whatever their case and spaces."""
    if len({" ".join(str(value).split()).casefold() for value in values}) < len(values):
        raise KnowSAMValueError("twice")
    return values


def _increasing(values: list[float]) -> list[float]:
    """Each value must be above the one before."""
    if any(low >= high for low, high in zip(values, values[1:])):
        raise KnowSAMValueError("not increasing")
    return values


def _some_positive(values: list[float]) -> list[float]:
    """At least one value must be above 0."""
    if not any(values):
        raise KnowSAMValueError("all 0")
    return values


def _device(value: Any) -> torch.device:
    """A device of this machine, given as an object or by name."""
    try:
        device = torch.device(value)
        torch.zeros(1, device=device).item()  # fails on a device that holds no values
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:  # torch without CUDA asserts
        raise ValueError from error
    return device


def _number(kind: type, *words: str, **limits: float) -> Any:
    """A number within limits; a whole number may be given as a float."""
    return Annotated[(kind, *([BeforeValidator(_whole)] if kind is int else []), Field(**limits), *words)]


def _list(item: Any, *words: Any, length: int | None = None, at_least: int = 1) -> Any:
    """A list of items, of the given length or a least one; `words` are validators and the words of an error."""
    return Annotated[
        (list[item], Field(min_length=length or at_least, max_length=length), BeforeValidator(_listed), *words)
    ]


# Each type ends with the words that describe it in an error.
Switch = Annotated[bool, "True or False"]
Count = _number(int, "a whole number, 1 or more, at most 10^9", ge=1, le=10**9)
CountOrNone = Annotated[Count | None, "a whole number, 1 or more, or None"]
CountOrZero = _number(int, "a whole number, 0 or more, at most 10^9", ge=0, le=10**9)
Workers = _number(int, "a number of processes, 0 to 1024", ge=0, le=1024)
Classes = _number(int, "a number of classes, 2 to 1000, with the background", ge=2, le=1000)
Channels = _number(int, "a number of channels, 1 to 1000", ge=1, le=1000)
Seed = _number(int, f"a whole number, 0 to {LARGEST_SEED}", ge=0, le=LARGEST_SEED)
Rate = _number(float, "a number above 0, at most 100", gt=0, le=100)
Factor = _number(float, "a number, 0 or more, at most 1000000", ge=0, le=1e6)
Positive = _number(float, "a number above 0, at most 1000000", gt=0, le=1e6)
PositiveOrNone = Annotated[Positive | None, "a number above 0, or None"]
BelowOne = _number(float, "a number, 0 or more and below 1", ge=0, lt=1)
Between = _number(float, "a number between 0 and 1", gt=0, lt=1)
Probability = _number(float, "a number, 0 to 1", ge=0, le=1)
Text = Annotated[str, Field(min_length=1), AfterValidator(_with_its_hashes), "text"]
TextOrNone = Annotated[Text | None, "text, or None"]
FileName = Annotated[
    str,
    Field(pattern=r"^[^/\\]*[^/\\.][^/\\]*$"),
    AfterValidator(_with_its_hashes),
    "text without a slash, and not only dots",
]
Path = Annotated[str, Field(min_length=1), AfterValidator(_with_its_hashes), "a path"]
PathOrNone = Annotated[Path | None, "a path, or None"]
Device = Annotated[Any, PlainValidator(_device), "a device of this machine, such as cpu"]
Names = _list(
    Annotated[str, Field(pattern=r"\S"), AfterValidator(_with_its_hashes)],
    AfterValidator(_different),
    "a list of names, one or more, all different",
)
View = _number(int, "the number of a view, 0 or more", ge=0, le=1000)
Views = _list(
    _number(int, ge=0, le=1000),
    AfterValidator(_different),
    "a list of view numbers, one or more, 0 or above, all different",
)
ViewWeights = Annotated[
    _list(Factor, AfterValidator(_some_positive)) | None,
    "a list of numbers, 0 or more, one for each view and at least one above 0, or None",
]
Side = Annotated[
    int, BeforeValidator(_side), Field(ge=1, le=8192), "a whole number, 1 to 8192, the side of a square slice"
]
Sides = _list(_number(int, ge=1, le=2048), "a list of three whole numbers, 1 to 2048", length=3)
Spacing = _list(_number(float, ge=0, le=1000), "a list of three numbers, 0 to 1000", length=3)
Width = _number(int, ge=1, le=65536)
Widths = _list(Width, "a list of whole numbers, 1 or more")
ThreeWidths = _list(Width, "a list of three whole numbers, 1 or more", length=3)
Window = Annotated[
    _list(_number(float, ge=-1e6, le=1e6), AfterValidator(_increasing), length=2) | None,
    "two numbers, the lower first, or None",
]
Overlap = Annotated[BelowOne | _list(BelowOne, length=3), "a number, 0 or more and below 1, or a list of three"]
Grid = Annotated[
    _number(int, ge=2, le=8192) | _list(_number(int, ge=1, le=8192), Field(max_length=3), at_least=2),
    "a whole number, 2 or more, or a list with one for each axis",
]
Axis = _number(int, ge=-3, le=2)
Axes = Annotated[Axis | _list(Axis, AfterValidator(_different)), "an axis, -3 to 2, or a list of different ones"]
TaughtChannel = _number(int, ge=0, le=1000) | Text
TaughtChannels = Annotated[
    Count | _list(TaughtChannel | _list(TaughtChannel)),
    "a number of channels, or a list with a number, a name or a list of these for each class",
]
RGB = Annotated[_number(int, ge=0, le=1000) | Literal["mean", "rgb"], "the number of a channel, 'mean' or 'rgb'"]
HoleSize = Annotated[Count | Widths, "a whole number, 1 or more, or a list with one for each axis"]


def _about(meaning: str) -> Any:
    """An optional key of a config."""
    return Field(default=None, description=meaning)


class Everywhere(BaseModel):
    """Keys of training, evaluation and inference."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True, extra="ignore")

    bundle_root: Path = _about("the bundle's folder")
    dataset_dir: PathOrNone = _about("data-list JSON, or folder of data; None for the synthetic phantom")
    is_phantom: Switch = _about("whether the data is the synthetic phantom; follows from dataset_dir")
    output_dir: Path = _about("folder of all output")
    device: Device = _about("device to run on")
    in_channels: Channels = _about("channels of an image")
    intensity_window: Window = _about(
        "intensities, such as HU, that images are clipped to before they are scaled; None: no clipping"
    )
    num_classes: Classes = _about("classes with the background; in training it follows from class_names")
    prompt_view: View = _about("the view of the student that prompts SAM")
    taught_views: Views = _about("the views of the student that SAM teaches")


class Training(Everywhere):
    """Keys of ``train.json`` in both bundles."""

    labeled_patients: CountOrNone = _about("number of labeled patients in a folder of ACDC or of left atria")
    holdout_patients: CountOrZero = _about("number of training patients in such a folder to validate on instead")
    method: Text = _about("name of the method in run_name")
    seed: Seed = _about("seed of weights, order and augmentation")
    use_sam: Switch = _about("whether a teacher teaches; if False, no part of it is built")
    teacher_name: FileName = _about(
        "name of the teacher in run_name, unless it is 'sam'; the overlays teacher_* set it"
    )
    teacher_pretrained_on: TextOrNone = _about(
        "what the teacher's weights were trained on, for preflight and report; None: recognized by their path"
    )
    run_name: FileName = _about("folder of the run below output")
    ckpt_dir: Path = _about("folder that the best student is copied to")
    amp: Switch = _about("mixed precision on a GPU")
    amp_dtype: Literal["bfloat16", "float16"] = _about("data type of mixed precision on a GPU")
    cpu_autocast: Switch = _about("bfloat16 on a CPU")
    fast_cpu_matmul: Switch = _about("matrix products by oneDNN on a CPU where it is faster and as exact")
    preflight: Switch = _about("only report what the run would do")
    resume: Switch = _about("continue from the last checkpoint in output_dir; False removes the earlier run there")
    process_timeout: PositiveOrNone = _about("seconds that processes wait for each other; None for a single process")
    class_names: Names = _about("names of the classes without the background")
    labeled_batch_size: Count = _about("labeled rows in a batch")
    unlabeled_batch_size: CountOrZero = _about("unlabeled rows in a batch")
    max_iterations: Count = _about("iterations in the run")
    epoch_length: Count = _about("iterations in an epoch")
    val_interval: Count = _about("epochs between two validations; the last epoch has one in any case")
    log_interval: Count = _about("iterations between two readings of the loss terms")
    num_workers: Workers = _about("processes that load batches: 4, at most one for each core; phantom 0")
    cache_workers: Workers = _about("processes that read and prepare the data before the first step")
    lr: Rate = _about("initial learning rate of the student")
    momentum: BelowOne = _about("momentum of the student's SGD")
    weight_decay: BelowOne = _about("weight decay of the student's optimizer")
    lr_power: Factor = _about("exponent of the polynomial decay of both learning rates; 0 keeps them constant")
    max_grad_norm: PositiveOrNone = _about("largest norm of the student's gradients in a step; None: no limit")
    accumulation_steps: Count = _about("iterations whose gradients are accumulated for one optimizer step")
    view_weights: ViewWeights = _about("weight of each view's supervised loss; None: equal weights")
    mutual_weight: Factor = _about("weight of the consistency between views")
    mutual_ramp_up_iterations: Count = _about("iterations until the consistency has its full weight")
    mutual_target: Literal["hard", "soft"] = _about(
        "target of the consistency: the other view's argmax or its probabilities"
    )
    entropy_weight: Factor = _about("weight of the entropies of both views")
    augmentation_hole: HoleSize = _about("side of the holes of coarse dropout, in pixels")
    mixing_weight: Factor = _about("weight of the loss of mixed images; 0 mixes none")
    mixing_start: CountOrZero = _about("first iteration with mixed images")
    mixing_grid_size: Grid = _about("cells of the mixing grid along each axis")
    mixing_num_cells: Count = _about("cells to be overwritten in an image")
    mixing_pseudo_label: Literal["teacher", "student"] = _about("the network whose argmax labels unlabeled cells")
    sam_variant: Literal["vit_b", "vit_l", "vit_h", "mobile_sam", "stand_in", "tiny", "small", "base_plus", "large"] = (
        _about("size of SAM; stand_in is a small network that is not SAM; of SAM 2, tiny to large (teacher_sam2)")
    )
    sam_checkpoint: PathOrNone = _about(
        "file of SAM's weights, or a folder of SAM 2's; 'procedural' for the stand-in's; None for random weights"
    )
    sam_trainable: Literal["adapters", "all"] = _about("the part of SAM that is trained")
    sam_lr: Rate = _about("initial learning rate of SAM")
    sam_input: RGB = _about("how an image is converted to RGB; may be a component")
    distillation_weight: Factor = _about("weight of the distillation loss")
    distillation_temperature: Positive = _about("temperature of both softmaxes")
    distillation_dice_weight: Factor = _about("weight of the Dice term in the distillation loss")
    distillation_start: CountOrZero = _about("first iteration in which SAM teaches; SAM itself learns from the start")
    distillation_every: Count = _about("iterations between two distillation steps")
    distillation_gate: Literal["none", "agreement", "validation"] = _about(
        "how the weight of the teacher is determined"
    )
    distillation_gate_tolerance: Positive = _about(
        "Dice by which a teacher that learns may trail the student before the gate is closed"
    )
    taught_rows: Literal["all", "unlabeled"] = _about("the rows that SAM teaches")


class Slices(BaseModel):
    """Keys of all configs in the 2D bundle."""

    image_size: Side = _about("height and width of a slice, in pixels")


class Volumes(BaseModel):
    """Keys of all configs in the 3D bundle."""

    image_size: Sides = _about("size of a patch, in voxels")
    spacing: Spacing = _about("voxel spacing along each axis, in mm; 0 leaves an axis unchanged")
    crop_size: PositiveOrNone = _about("edge of the cube that images are cropped to, in mm; None: no cropping")
    channels: Widths = _about("channels at each level of the student")
    aggregation_channels: ThreeWidths = _about("channels of the three branches that fuse the views")
    window_overlap: Overlap = _about("fraction of a window that overlaps with the next")


class SliceTraining(Slices, Training):
    """Keys of ``train.json`` in the 2D bundle."""

    augmentation_shift: Factor = _about("maximum shift of an image, in pixels")
    sam_encoder: Literal["adapted", "cached"] = _about(
        "SAM's image encoder: with adapters, or run only once for each image"
    )
    sam_cache_dir: PathOrNone = _about("folder of cached embeddings; None keeps them in memory")


class VolumeTraining(Volumes, Training):
    """Keys of ``train.json`` in the 3D bundle."""

    sam_image_size: Side = _about("height and width of SAM's input, in pixels")
    sam_axes: Axes = _about("the axes that slices are taken along")
    sam_slices: CountOrNone = _about("slices of each volume that SAM sees in a step; None for all")
    sam_slice_sampling: Literal["uniform", "entropy"] = _about("how these slices are drawn")


class Inference(Everywhere):
    """Keys of ``inference.json`` in both bundles."""

    ckpt_path: Path = _about("file of the student's weights")
    image_pattern: Text = _about("glob pattern of the images below dataset_dir")
    largest_component: Switch = _about("keep only the largest connected component of each class")
    output_postfix: FileName = _about("suffix of a segmentation's file name")


class SliceInference(Slices, Inference):
    """Keys of ``inference.json`` in the 2D bundle."""

    slices_per_batch: Count = _about("slices segmented at a time")


class VolumeInference(Volumes, Inference):
    """Keys of ``inference.json`` in the 3D bundle."""

    windows_per_batch: Count = _about("windows segmented at a time")


class Overlays(BaseModel):
    """Keys of the overlays of ``train.json``: methods, evaluation, several processes."""

    model_config = Everywhere.model_config

    mutual_rows: Literal["all", "unlabeled"] = _about("rows with consistency (cps)")
    ema_decay: BelowOne = _about("decay of the averaged student (mean_teacher, ua_mt, bcp)")
    consistency_weight: Factor = _about("weight of the consistency with the averaged student (mean_teacher, ua_mt)")
    consistency_start: CountOrZero = _about("first iteration with consistency (mean_teacher; ua_mt, with default 0)")
    num_passes: Count = _about("noisy passes of the averaged student (ua_mt)")
    passes_at_once: CountOrNone = _about("noisy passes per batch; None: as many as fit (ua_mt)")
    pseudo_label_weight: Factor = _about("weight of the pseudo-labels (fixmatch)")
    pseudo_label_threshold: Probability = _about("probability below which a pixel has no pseudo-label (fixmatch)")
    pseudo_label_start: CountOrZero = _about("first iteration with pseudo-labels (fixmatch)")
    pretraining_iterations: CountOrZero = _about("iterations on labeled pairs only (bcp)")
    unlabeled_pixel_weight: Factor = _about("weight of unlabeled pixels in the loss (bcp)")
    box_fraction: Between = _about("side of the copied box relative to the image (bcp)")
    teacher_bundle: PathOrNone = _about("folder of the bundle whose network teaches (teacher_network)")
    teacher_channels: TaughtChannels = _about(
        "for each class, the network's channel, by number or by its name in the bundle, or several (teacher_network)"
    )
    teacher_normalize: Annotated[Literal["z_score"] | None, "z_score or None"] = _about(
        "how the images are normalized for the network; None: as the student sees them (teacher_network)"
    )
    ckpt_path: Path = _about("file of the student's weights (evaluate)")
    split: Literal["labeled", "validation", "test"] = _about("section of the data to evaluate (evaluate)")
    sync_batchnorm: Switch = _about("whether processes share batch normalization (multi_gpu_train)")


def check_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Check the settings in a config.

    Args:
        config: a merged config of a bundle.

    Returns:
        By key, the valid settings that are not in the config's own form, converted to it: 32 for an ``image_size`` of
        32.0 or [32, 32].

    Raises:
        ValueError: with a line for each setting that has a wrong type, is out of range, contradicts another one or has
            no effect, and for each unknown key.

    Example:
        >>> check_values({"train": {}, "lr": "$@max_iterations / 1e6", "max_iterations": 100.0})
        {'max_iterations': 100}
        >>> check_values({"train": {}, "use_sam": "false"})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        knowsam_monai.errors.KnowSAMValueError: `use_sam` must be True or False but is 'false'; write True or False...
    """
    models = _models(config)
    unknown = dict(_unknown_keys(config, models))
    fields = {name: field for model in models for name, field in model.model_fields.items() if name not in unknown}
    converted: dict[str, Any] = {}
    while True:  # values derived from a converted value become valid after its conversion
        current = {**config, **converted}
        values = {key: value for key, value in plain_values(current).items() if key in fields}
        checked, wrong = _validated(models, values)
        changed = {key: value for key, value in checked.items() if _differs(value, values[key])}
        if not changed:
            break
        converted |= {key: value for key, value in changed.items() if not referred_keys(current[key]) & set(changed)}
    causes = [key for key in wrong if not referred_keys(current[key]) & wrong]
    mistakes = [_sentence(key, fields[key], values[key]) for key in causes] + list(unknown.values())
    mistakes += [
        f"`{key}` must be a component, as in {{'_target_': 'package.Class'}}, but is the text {config[key]!r}."
        for key in COMPONENTS
        if isinstance(config.get(key), str) and not config[key].startswith(("$", "@", "%"))
    ]
    mistakes = mistakes or list(_contradictions(checked, is_training="train" in config and "split" not in config))
    mistakes = mistakes or list(_broken_expressions(current, fields, values))
    if mistakes:
        raise KnowSAMValueError("\n".join(mistakes))
    return converted


def accepts_none(key: str) -> bool:
    """Whether a setting may be None; a key of no model may be anything."""
    models = (SliceTraining, VolumeTraining, SliceInference, VolumeInference, Overlays)
    fields = [model.model_fields[key] for model in models if key in model.model_fields]
    return not fields or type(None) in get_args(fields[0].annotation)


def _validated(models: tuple[type[BaseModel], ...], values: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The valid values by key, and the keys of the invalid ones."""
    checked, wrong = {}, set()
    for model in models:
        try:
            model.model_validate(values)
        except ValidationError as error:
            wrong |= {str(detail["loc"][0]) for detail in error.errors()}
        valid = model.model_validate({key: value for key, value in values.items() if key not in wrong})
        checked |= {key: getattr(valid, key) for key in valid.model_fields_set}
    return checked, wrong


def _models(config: Mapping[str, Any]) -> tuple[type[BaseModel], ...]:
    """The models of a config, for the bundle that shares more keys with it."""
    pairs = [(SliceInference, VolumeInference), (SliceTraining, VolumeTraining)]
    slices, volumes = pairs["train" in config]
    bundle = max((slices, volumes), key=lambda model: len(model.model_fields.keys() & config.keys()))
    return (bundle, Overlays) if "train" in config else (bundle,)


def _differs(value: Any, given: Any) -> bool:
    """Whether a value was converted; an int for a float needs no conversion."""
    if isinstance(value, list) and isinstance(given, list):
        return any(map(_differs, value, given))
    return value != given or type(value) is not type(given) and not isinstance(value, float)


def _sentence(key: str, field: Any, value: Any) -> str:
    """The error for one value."""
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    words = [item for item in field.metadata if isinstance(item, str)]
    expected = words[-1] if words else f"one of {', '.join(map(repr, choices))}"
    remedy = "correct it, or leave it out for the bundle's own value"
    if key == "sam_variant" and value == "vit_t":
        remedy = VIT_T
    elif key == "sam_variant" and sam2_variant_hint(value):
        remedy = sam2_variant_hint(value).removeprefix("; ")
    elif "::" in str(value):
        remedy = "MONAI reads # as ::, so use neither"
        if expected.startswith("a path"):
            remedy += " in a config file; on the command line, a path may have a #"
        expected += ", and without # or ::,"
    elif field.annotation is bool:
        remedy = "write True or False, without quotes"
    elif close := difflib.get_close_matches(str(value), choices, n=1):
        remedy = f"did you mean {close[0]!r}?"
    elif isinstance(value, str) and expected.startswith(("a number", "a whole")):
        remedy = "give a number, without quotes"
    return (
        f"`{key}` must be {expected} but is {shortened(repr(value), 80)}; {remedy}{'' if remedy.endswith('?') else '.'}"
    )


def _unknown_keys(config: Mapping[str, Any], models: tuple[type[BaseModel], ...]) -> Iterator[tuple[str, str]]:
    """The unknown keys that nothing in the config refers to, each with its error."""
    own = set(models[0].model_fields) | set(COMPONENTS) | set(MLFLOW)
    known = own | {name for model in models for name in model.model_fields}
    used = set().union(*(referred_keys(part) for key, part in config.items()))
    for key in config:
        if key in SECTIONS or key in own or key in used:
            continue
        if key in known:
            yield key, f"`{key}` must be left out but is set: nothing here uses it; add the overlay that does."
            continue
        if key in CACHE and "train" in config:
            reason = "slices of random patches do not repeat, so no embeddings are kept"
            yield key, f"`{key}` must be left out in the 3D bundle but is set: {reason}."
            continue
        close = difflib.get_close_matches(key, [*known, *(set(config) - {key})], n=1, cutoff=0.75)
        remedy = f"did you mean `{close[0]}`?" if close else "leave it out."
        yield key, f"`{key}` must be a key of this config but is not, and nothing in it refers to it; {remedy}"


def _broken_expressions(
    config: Mapping[str, Any], fields: Mapping[str, Any], values: Mapping[str, Any]
) -> Iterator[str]:
    """Errors for the settings that cannot be evaluated although everything they refer to can."""
    for key in fields:
        if key not in config or key in values:
            continue
        names = referred_keys(config[key])
        missing = sorted(names - set(config))
        if missing:
            close = difflib.get_close_matches(missing[0], list(config), n=1)
            remedy = f"did you mean `@{close[0]}`?" if close else "correct it."
            yield f"`{key}` must refer to keys of this config but refers to `@{missing[0]}`, which is not; {remedy}"
        elif "is_phantom" in names and values.get("is_phantom") is False and values.get("dataset_dir", "") is None:
            yield "`is_phantom` must be left out but is False; it follows from `dataset_dir`, so set that."
        elif is_plain(key, config) and all(name in values or name not in fields for name in names):
            yield f"`{key}` must be a valid expression but is {shortened(repr(config[key]), 80)}; correct it."


def _contradictions(values: Mapping[str, Any], is_training: bool) -> Iterator[str]:
    """Errors for settings that are valid on their own but contradict each other."""
    yield from _data_contradictions(values)
    if is_training and {"max_iterations", "epoch_length", "val_interval"} <= set(values):
        yield from _length_contradictions(values)
        yield from _method_contradictions(values)


def _data_contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    data = values.get("dataset_dir")
    if data is not None and not data.endswith(".json"):
        if values.get("labeled_patients", 1) is None:
            yield "`labeled_patients` must be a number of patients in that folder but is None; set it, such as to 8."
        return
    for key in ("labeled_patients", "holdout_patients"):
        if values.get(key):
            yield (
                f"`{key}` must be left out with {'the synthetic phantom' if data is None else f'the data list {data}'} "
                f"but is {values[key]}; it chooses patients in a folder of ACDC or of left atria."
            )


def _length_contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    last, epoch, steps = values["max_iterations"], values["epoch_length"], values.get("accumulation_steps", 1)
    if epoch > last:
        yield f"`epoch_length` must be at most {last}, the run's `max_iterations`, but is {epoch}; lower it."
        return
    epochs = math.ceil(last / epoch)
    if values["val_interval"] > epochs:
        yield (
            f"`val_interval` must be 1 to {epochs}, the epochs of this run, of {epoch} iterations each "
            f"(`epoch_length`), but is {values['val_interval']}; to validate every n iterations, set `epoch_length` to "
            "n."
        )
    if steps > epoch:
        yield f"`accumulation_steps` must be at most {epoch}, the `epoch_length`, but is {steps}; lower it."
    elif last % epoch % steps:
        yield (
            f"`max_iterations` must end with an optimizer step, one every {steps} iterations (`accumulation_steps`), "
            f"but is {last}; make it a multiple of `epoch_length`, {epoch}."
        )


def _method_contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    last = values["max_iterations"]
    yield from _teacher_contradictions(values)
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
            f"{values['distillation_every']}; to train without SAM, add --use_sam False."
        )
    if values.get("sam_cache_dir") is not None and values.get("sam_encoder") != "cached":
        yield (
            "`sam_cache_dir` must be left out unless `sam_encoder` is 'cached' but is "
            f"{values['sam_cache_dir']!r}; add --sam_encoder cached."
        )
    is_measured = values.get("distillation_gate", "none") != "none" and "teacher_bundle" not in values
    if values.get("use_sam") and values.get("unlabeled_batch_size") == 0 and is_measured:
        yield (
            "`distillation_gate` must be 'none' without unlabeled rows (`unlabeled_batch_size` 0), on which it is "
            f"measured, but is {values['distillation_gate']!r}; add --distillation_gate none, or --use_sam False."
        )
    views, num_views = values.get("taught_views") or [0], len(values.get("view_weights") or range(1001))
    if values.get("use_sam") and max(views) >= num_views:
        yield (
            f"`taught_views` must be below {num_views}, the number of `view_weights`, but are {views}; a method for a "
            "student of one view needs network_plain before it, as in --with network_plain,mean_teacher."
        )
    if values.get("image_size"):
        yield from _axis_contradictions(values)


def _teacher_contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    variant, is_cached = values.get("sam_variant"), values.get("sam_encoder") == "cached"
    if not values.get("use_sam"):
        return
    if "teacher_bundle" in values:
        if values["teacher_bundle"] is None:
            yield (
                "`teacher_bundle` must be the folder of a trained network's bundle but is None; name it, as in "
                "--teacher_bundle models/ventricular_short_axis_3label."
            )
        channels, num_classes = values.get("teacher_channels"), values.get("num_classes")
        num_channels = channels if isinstance(channels, int) else len(channels or ())
        if num_classes is not None and num_channels not in (0, num_classes):
            yield (
                f"`teacher_channels` must have an entry for each of the {num_classes} classes, background included, "
                f"but has {num_channels}; name the network's channel of each class, or several to merge them."
            )
        if is_cached:
            yield (
                "`sam_encoder` must be 'adapted' if a network teaches, since it has no embeddings, but is 'cached'; "
                "leave it out."
            )
        if values.get("sam_checkpoint") is not None:
            yield (
                "`sam_checkpoint` must be left out if a network teaches but is "
                f"{values['sam_checkpoint']!r}; its weights are in `teacher_bundle`."
            )
        return
    size_key = "sam_image_size" if "sam_image_size" in values else "image_size"
    size = values.get(size_key)
    for name, variants, others, remedy, divisor in (
        ("sam", SAM_VARIANTS, SAM2_VARIANTS, "a SAM 2; add the overlay teacher_sam2.json", SIZE_DIVISOR),
        ("sam2", SAM2_VARIANTS, SAM_VARIANTS, "a SAM 1; leave out the overlay teacher_sam2.json", SAM2_SIZE_DIVISOR),
    ):
        if values.get("teacher_name") != name:
            continue
        if variant in others:
            yield f"`sam_variant` must be one of {', '.join(map(repr, variants))} but is {variant!r}, {remedy}."
        if isinstance(size, int) and size % divisor:
            nearest = max(1, round(size / divisor)) * divisor
            yield f"`{size_key}` must be a multiple of {divisor} for this teacher but is {size}; try {nearest}."
    if values.get("sam_checkpoint", "") is None and (values.get("sam_trainable") == "adapters" or is_cached):
        yield (
            "`sam_checkpoint` must be a file of SAM's weights if they are frozen but is None; set it, or train random "
            "weights with --sam_trainable all --sam_encoder adapted."
        )


def _axis_contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    """Errors for settings that have one number for all axes of an image, or a list with one for each axis."""
    size = values["image_size"] if isinstance(values["image_size"], list) else [values["image_size"]] * 2
    lists = {}
    for key, switch in {"augmentation_hole": True, "mixing_grid_size": values.get("mixing_weight")}.items():
        if switch and values.get(key):
            lists[key] = values[key] if isinstance(values[key], list) else [values[key]] * len(size)
    for key, numbers in lists.items():
        if len(numbers) != len(size) or any(number > side for number, side in zip(numbers, size)):
            yield (
                f"`{key}` must be at most the image's size {size}, one number for each axis, but is {values[key]}; "
                "use one number."
            )
    cells = math.prod(lists.get("mixing_grid_size", [math.inf]))
    if values.get("mixing_num_cells", 1) >= cells:
        yield (
            f"`mixing_num_cells` must be below {cells}, the cells of the grid (`mixing_grid_size`), but is "
            f"{values['mixing_num_cells']}; lower it."
        )
