"""SKD in a supervised bundle: a trainer for MONAI's SupervisedTrainer in its config."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.utils import CommonKeys as Keys
from monai.utils import ensure_tuple
from torch import Tensor, nn
from torch.utils.data import DataLoader

from knowsam_monai import ranks
from knowsam_monai.data.loader import SemiSupervisedLoader
from knowsam_monai.data.stream_comparison import compare_streams
from knowsam_monai.data.transforms import rows_of
from knowsam_monai.data.unlabeled_stream import smooths_labels, transform_steps, unlabeled_dataset
from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.errors import KnowSAMTypeError, KnowSAMValueError, check_choice, named_as_set
from knowsam_monai.handlers.sam_distillation import SAMDistillation
from knowsam_monai.losses.distillation import DistillationLoss
from knowsam_monai.losses.supervised import PartiallyLabeledLoss, check_label, has_sigmoid
from knowsam_monai.runs.run_handlers import track_terms
from knowsam_monai.seeds import kept_random_state
from knowsam_monai.teachers.intensity_window import IntensityWindow, is_sam_range
from knowsam_monai.teachers.sam_teacher import SAMTeacher
from knowsam_monai.teachers.slice_teacher import SliceTeacher
from knowsam_monai.tensors import without_meta
from knowsam_monai.texts import some
from knowsam_monai.wrappers import plain_network

logger = logging.getLogger(__name__)

INSPECTED_ITEMS = 4  # of each stream, before training
LARGEST_SAM_IMAGE = 256  # by default
# the overlay's key of an argument, for errors
KEYS = {
    **{name: f"skd_{name}" for name in ("gate", "slices", "temperature", "to_rgb", "unlabeled")},
    **{name: f"skd_sam_{name}" for name in ("checkpoint", "image_size", "variant")},
}


@dataclass(frozen=True)
class SKDSettings:
    """
    What SKD needs beyond a supervised bundle's own config.

    Args:
        unlabeled: images without labels, see :func:`knowsam_monai.data.unlabeled_items`.
        unlabeled_batch_size: unlabeled items in a batch of each process, in addition to the bundle's labeled ones.
        cache_rate: fraction of the unlabeled images that is kept in memory.
        use_sam: False trains on the same batches without SKD, for comparison.
        sam_variant, sam_checkpoint, sam_image_size: see :class:`~knowsam_monai.teachers.SAMTeacher`. If
            `sam_image_size` is None, it is the larger side of the first image, rounded up to a multiple of 16, and at
            most 256.
        sam_lr: learning rate of SAM's optimizer, Adam.
        to_rgb: see :class:`~knowsam_monai.teachers.SAMTeacher`. None: RGB images go to SAM as they are; of
            other images SAM sees the first channel, windowed to 0..1 if the first images are in another range.
        slices: slices of each volume that SAM sees in a step; a volume with fewer shows all of them.
        axes: axes along which they are taken.
        weight: factor of the distillation loss, a number or a function of the iteration.
        temperature: temperature of the distillation loss.
        gate: "agreement" or "none", see :class:`~knowsam_monai.distillation.TeacherGate`. "validation" is refused: the
            bundle's evaluator does not measure the teacher.
        overlapping: whether the network's channels are regions that may overlap, with a sigmoid each, instead of
            classes of a softmax. None: as in the bundle's loss, or else in its postprocessing.
        seed: seed of order and augmentation.

    Example::

        SKDSettings(unlabeled="data/unlabeled/*.nii.gz", sam_checkpoint="sam_vit_b_01ec64.pth")
    """

    unlabeled: str | Sequence[Any]
    unlabeled_batch_size: int = 2
    cache_rate: float = 1.0
    use_sam: bool = True
    sam_variant: str = "vit_b"
    sam_checkpoint: str | None = None
    sam_image_size: int | None = None
    sam_lr: float = 1e-4
    to_rgb: int | str | Callable[[Tensor], Tensor] | None = None
    slices: int = 8
    axes: int | Sequence[int] = -1
    weight: float | Callable[[int], float] = 1.0
    temperature: float = 2.0
    gate: str = "agreement"
    overlapping: bool | None = None
    seed: int = 0


def skd_trainer(
    skd: SKDSettings,
    train_data_loader: DataLoader,
    network: nn.Module,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    train_handlers: Any = None,
    iteration_update: Callable | None = None,
    decollate: bool = False,
    postprocessing: Any = None,
    key_train_metric: Any = None,
    additional_metrics: Any = None,
    **arguments: Any,
) -> SupervisedTrainer:
    """
    A ``SupervisedTrainer`` with SKD on labeled and unlabeled images, for the `_target_` of a bundle's trainer.

    Unlabeled images get the transforms of the labeled ones, see :func:`knowsam_monai.data.unlabeled_dataset`. The
    number of classes, channels and dimensions comes from the first images and the network. A few images of both streams
    are compared before training. An epoch has as many steps as without SKD: those of the bundle's own loader, or
    `epoch_length`.

    Args:
        skd: the settings of SKD.
        train_data_loader: the bundle's own; its dataset, batch size and workers are used.
        network: the bundle's own, also in DistributedDataParallel. It must return logits.
        loss_function: the bundle's own; it is called on the labeled rows.
        train_handlers: the bundle's own.
        iteration_update: must be None; an interactive bundle has one.
        postprocessing: the bundle's own; only read, for `overlapping`, since validation has its own.
        decollate, key_train_metric, additional_metrics: not used, since unlabeled rows have no label.
        **arguments: all others of ``SupervisedTrainer``.

    Raises:
        TypeError: if the loader is not a DataLoader with a batch size, or the network does not return a tensor.
        ValueError: if the bundle is interactive or has deep supervision, if its labels do not fit a sigmoid or softmax,
            or if the images of both streams differ in shape.

    Example::

        {"_target_": "knowsam_monai.runs.skd_trainer", "skd": "@skd", "network": "@network", ...}
    """
    if iteration_update is not None:
        raise KnowSAMValueError(
            "`iteration_update` must be None but is given: in an interactive bundle the network also gets clicks, "
            "which unlabeled images do not have. SKD cannot be added to it."
        )
    if not isinstance(train_data_loader, DataLoader) or train_data_loader.batch_size is None:
        raise KnowSAMTypeError(
            "`train_data_loader` must be a DataLoader with a batch size but is a "
            f"{type(train_data_loader).__name__} without; set `dataset` and `batch_size` of the bundle's loader."
        )
    labeled = train_data_loader.dataset
    num_workers = train_data_loader.num_workers
    with named_as_set(KEYS):
        unlabeled = unlabeled_dataset(labeled, skd.unlabeled, skd.cache_rate, num_workers)
    images, label = _first_images(labeled, unlabeled)
    images, label = images[:2], label[:2]  # a pass of more could need more memory than the training
    logits = _first_logits(network, images)
    overlapping = logits.shape[1] > 1 and _overlapping(skd.overlapping, label, loss_function, postprocessing)
    check_label(logits, label, getattr(loss_function, "ignore_index", None), overlapping)
    loader = SemiSupervisedLoader(
        labeled,
        unlabeled,
        labeled_batch_size=train_data_loader.batch_size * ranks.world_size(),
        unlabeled_batch_size=skd.unlabeled_batch_size * ranks.world_size(),
        seed=skd.seed,
        num_workers=num_workers,
        pin_memory=train_data_loader.pin_memory,
    )
    if arguments.get("epoch_length") is None:
        arguments["epoch_length"] = len(train_data_loader)
    handlers = [] if train_handlers is None else list(ensure_tuple(train_handlers))
    if skd.use_sam:
        handlers.insert(0, SAMDistillation(_distiller(skd, images, logits.shape[1], overlapping), weight=skd.weight))
    return SupervisedTrainer(
        train_data_loader=loader,
        network=network,
        loss_function=PartiallyLabeledLoss(loss_function, overlapping=overlapping),
        train_handlers=track_terms(handlers),
        decollate=False,
        **arguments,
    )


@kept_random_state()
def _first_images(labeled: Any, unlabeled: Any) -> tuple[Tensor, Tensor]:
    """A few labeled images (B, channels, *spatial) and their labels, compared with as many unlabeled ones."""
    streams = [
        [row for index in range(min(len(dataset), INSPECTED_ITEMS)) for row in rows_of(dataset[index])]
        for dataset in (labeled, unlabeled)
    ]
    shapes = [sorted({str(tuple(row[Keys.IMAGE].shape)) for row in rows}) for rows in streams]
    if len({*shapes[0], *shapes[1]}) > 1:
        raise KnowSAMValueError(
            f"`{Keys.IMAGE}` must have one shape in all rows of a batch but has {some(shapes[0])} in labeled rows "
            f"and {some(shapes[1])} in unlabeled ones; end the bundle's training transforms with a crop "
            "(RandSpatialCropd) or a resize of fixed size."
        )
    compare_streams(*([row[Keys.IMAGE] for row in rows] for rows in streams))
    image, label = (
        torch.stack([without_meta(torch.as_tensor(row[key])) for row in streams[0]]) for key in (Keys.IMAGE, Keys.LABEL)
    )
    smooth = [type(step).__name__ for step in transform_steps(labeled.transform) if smooths_labels(step)]
    if smooth:
        logger.warning(
            "%s of the training transforms interpolates labels, which invents classes and broken numbers; set its "
            '`mode` to "nearest" for the label.',
            ", ".join(smooth),
        )
    return image, label


def _first_logits(network: nn.Module, image: Tensor) -> Tensor:
    """The logits of the first images, after a look at what the network returns in training."""
    network = copy.deepcopy(plain_network(network)).train()
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    with kept_random_state(), torch.no_grad():
        logits = network(image.to(device))
    if not isinstance(logits, Tensor):
        raise KnowSAMTypeError(
            f"`network` must return logits in training but {type(network).__name__} returns a "
            f"{type(logits).__name__}; SKD cannot be added to it. Switch off its deep supervision, if that is why."
        )
    if logits.shape != (len(image), logits.shape[1], *image.shape[2:]):
        raise KnowSAMValueError(
            f"`network` must return logits (rows, classes, {', '.join(map(str, image.shape[2:]))}) in training but "
            f"{type(network).__name__} returns {tuple(logits.shape)}; switch off its deep supervision."
        )
    return without_meta(logits)


def _overlapping(given: bool | None, label: Tensor, loss_function: Any, postprocessing: Any) -> bool:
    """Whether several channels are regions that may overlap."""
    told = has_sigmoid(loss_function) if given is None else given
    if told is None:
        applied = {
            name
            for step in transform_steps(postprocessing)
            for name in ("sigmoid", "softmax")
            if any(ensure_tuple(getattr(step, name, False)))
        }
        told = None if len(applied) != 1 else applied == {"sigmoid"}
    if told is None and label.shape[1] > 1:
        raise KnowSAMValueError(
            f"`skd_overlapping` must be true or false for a label of {label.shape[1]} channels if neither the loss nor "
            "the postprocessing has a sigmoid or softmax; set it to true if the channels are regions that may overlap."
        )
    if told and label.shape[1] == 1:
        raise KnowSAMValueError(
            "`label` must have a channel for each sigmoid of the network but has one of class numbers; add "
            "AsDiscreted(keys='label', to_onehot=...) to the training transforms and set the loss's `to_onehot_y` to "
            "false, or set `skd_overlapping` to false to distill a softmax."
        )
    return bool(told)


@named_as_set(KEYS)
def _distiller(skd: SKDSettings, images: Tensor, num_classes: int, overlapping: bool) -> SAMDistiller:
    check_choice("gate", skd.gate, ("none", "agreement"))
    side = max(images.shape[2:4])  # of a slice along the last axis
    teacher: nn.Module = SAMTeacher(
        num_classes=num_classes,
        image_size=skd.sam_image_size or min(-(-side // 16) * 16, LARGEST_SAM_IMAGE),
        variant=skd.sam_variant,
        checkpoint=skd.sam_checkpoint,
        trainable="adapters" if skd.sam_checkpoint else "all",
        to_rgb=_to_rgb(images) if skd.to_rgb is None else skd.to_rgb,
    )
    if images.ndim == 5:
        teacher = SliceTeacher(teacher, skd.axes, slices=skd.slices, seed=skd.seed)
        teacher.slices = min(skd.slices, *(images.shape[axis + 2] for axis in teacher.axes))
    optimizer = torch.optim.Adam((p for p in teacher.parameters() if p.requires_grad), lr=skd.sam_lr)
    loss = DistillationLoss(temperature=skd.temperature)
    return SAMDistiller(teacher, optimizer, loss, gate=skd.gate, overlapping=overlapping)


def _to_rgb(images: Tensor) -> int | str | IntensityWindow:
    if images.shape[1] == 3 and images.ndim == 4:
        return "rgb"
    channel = images[:, 0].float()
    low, high = channel.min().item(), channel.max().item()
    if is_sam_range(channel) or low == high:
        return 0
    logger.info("SAM gets the intensities %.4g to %.4g, those of the first images, as 0..1; see `to_rgb`.", low, high)
    return IntensityWindow(low, high)
