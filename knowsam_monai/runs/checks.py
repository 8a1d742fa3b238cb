"""Checks before anything is computed: the student, the data, and the output folders."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from knowsam_monai import ranks
from knowsam_monai.data.check import check_datalist
from knowsam_monai.errors import KnowSAMPermissionError, KnowSAMValueError, error_line
from knowsam_monai.runs.config import check_bundle_root
from knowsam_monai.tensors import all_in_eval_mode


def check_writable(**folders: str | os.PathLike) -> None:
    """
    Create the output folders and write 1 MiB to each as a test, before hours of training. In a config, the bundle's own
    folder is checked before: its `metadata.json` must name the same bundle as the config does.

    Args:
        **folders: created if missing; each is given under the name of its argument.

    Raises:
        PermissionError: if a folder cannot be written or has less than 1 MiB of free space.
        FileNotFoundError: if the running config's `bundle_root` is not its bundle's.

    Example::

        check_writable(output_dir="output", ckpt_dir="models")
    """
    check_bundle_root()
    for argument, folder in folders.items():
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(2**20))  # an empty file would fit on a full disk
                file.flush()
        except OSError as error:
            raise KnowSAMPermissionError(
                f"`{argument}` must be a writable folder but {os.fspath(folder)!r} is not ({error.strerror}); choose "
                f"another, such as --{argument} /somewhere/else."
            ) from error


@torch.no_grad()
def check_student(
    network: nn.Module,
    in_channels: int,
    class_names: Sequence[str],
    num_classes: int,
    image_size: int | Sequence[int],
) -> None:
    """
    Run the student on one empty slice or patch before any data is read, to check sizes, channels and classes.

    Args:
        network: the student; its training mode is restored.
        in_channels: channels of an image.
        class_names: names of the classes without the background.
        num_classes: C, background included.
        image_size: height and width of a slice as one number, or the size of a patch along each axis.

    Raises:
        ValueError: naming the key that is wrong.

    Example::

        >>> check_student(nn.Conv2d(1, 3, 1), in_channels=1, class_names=["RV", "LV"], num_classes=3, image_size=64)
    """
    if num_classes != len(class_names) + 1:
        raise KnowSAMValueError(
            f"`class_names` must name {num_classes - 1} classes, `num_classes` without the background, but is "
            f"{list(class_names)}; set only the names, `num_classes` follows from them."
        )
    spatial = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    shape = (1, in_channels, *spatial)
    device = next((parameter.device for parameter in network.parameters()), None)
    try:
        with all_in_eval_mode(network):
            pred = network(torch.zeros(shape, device=device))
    except Exception as error:  # every network refuses in its own way
        raise KnowSAMValueError(
            f"`network_def` must accept images of `in_channels` and `image_size`, {shape}, but "
            f"{type(network).__name__} does not: {error_line(error)}"
        ) from None
    expected = (1, num_classes, *spatial)
    if not isinstance(pred, torch.Tensor) or tuple(pred.shape) != expected:
        given = tuple(pred.shape) if isinstance(pred, torch.Tensor) else f"a {type(pred).__name__}"
        raise KnowSAMValueError(
            f"`network_def` must return logits {expected} in eval mode, one channel for the background and for each of "
            f"`class_names`, but {type(network).__name__} returns {given}; set its output channels to `num_classes` (2 "
            "instead of one sigmoid channel)."
        )


@torch.no_grad()
def check_teacher_input(
    teacher: nn.Module, in_channels: int, num_classes: int, image_size: int | Sequence[int]
) -> None:
    """
    Let the teacher look at one empty slice or patch before any data is read, to check sizes, channels and classes.

    Args:
        teacher: the teacher; of one that sees slices, one slice along each of its axes.
        in_channels: channels of an image.
        num_classes: C, background included.
        image_size: height and width of a slice as one number, or the size of a patch along each axis.

    Raises:
        ValueError: if the teacher does not take such images, or returns other logits.

    Example::

        check_teacher_input(NetworkTeacher(network, channels=4), in_channels=1, num_classes=4, image_size=256)
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    device = next((parameter.device for parameter in teacher.parameters()), None)
    for axis in getattr(teacher, "axes", [None]):
        spatial = tuple(1 if index == axis else side for index, side in enumerate(size))
        image, prompt_logits = (torch.zeros(1, count, *spatial, device=device) for count in (in_channels, num_classes))
        options = {} if axis is None else {"axes": axis}
        try:
            logits = teacher(image, prompt_logits, **options)
            found = f"returns {tuple(logits.shape)}" if logits.shape != prompt_logits.shape else None
        except Exception as error:  # every network refuses in its own way
            found = f"fails: {' '.join(str(error).split()) or type(error).__name__}"
        if found is not None:
            raise KnowSAMValueError(
                f"`teacher` must take images of `in_channels` and `image_size`, {tuple(image.shape)}, and return "
                f"logits {tuple(prompt_logits.shape)}, but {type(teacher).__name__} {found}"
            )


def check_data(
    datalist: Mapping[str, Sequence[dict]],
    num_classes: int,
    num_channels: int | None = None,
    slice_axis: int = 0,
    num_axes: int | None = None,
    num_workers: int = 2,
) -> Mapping[str, Sequence[tuple[str, str]]] | None:
    """
    Check the data list of a run and refuse it if anything is wrong; only the first of several processes reads it.

    Args:
        datalist: `labeled`, `unlabeled`, `validation` and `test` items, as `load_datalist` gives them.
        num_classes: C, background included.
        num_channels: channels of an image; None: as many as the first image has.
        slice_axis: axis of the slices in h5 volumes.
        num_axes: number of spatial axes that the student expects; None for 2 or 3.
        num_workers: number of reading threads.

    Returns:
        For each set, the files and the hashes of their contents, which :class:`Resume` compares; None in the processes
        that did not check.

    Raises:
        ValueError: listing every fault; in each process, if there are fewer validation volumes than processes.

    Example::

        contents = check_data(datalist, num_classes=4)
    """
    num_volumes, num_processes = len(datalist.get("validation", ())), ranks.world_size()
    if num_volumes < num_processes and num_processes > 1:
        raise KnowSAMValueError(
            f"`validation` of the data list must have a volume for each of the {num_processes} processes but has "
            f"{num_volumes}; list more volumes, or start fewer processes."
        )
    if ranks.rank() > 0:
        return None
    report = check_datalist(datalist, num_classes, num_channels, slice_axis, num_axes, num_workers=num_workers)
    report.raise_if_wrong()
    return report.contents
