"""Checks before anything is computed: the student, the data, and the folders that a run writes to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from knowsam_monai import ranks
from knowsam_monai.data.check import check_datalist
from knowsam_monai.errors import KnowSAMPermissionError, KnowSAMValueError


def check_writable(**folders: str | os.PathLike) -> None:
    """
    Make the folders that a run writes to and try to write there: before the hours of training and not after.

    Args:
        **folders: made if missing, each under the name of the argument that gave it.

    Raises:
        PermissionError: naming the folder that cannot be written or has no room for 1 MiB, and the remedy.

    Example::

        check_writable(output_dir="output", ckpt_dir="models")
    """
    for argument, folder in folders.items():
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(2**20))  # an empty file fits on a full disk too
                file.flush()
        except OSError as error:
            raise KnowSAMPermissionError(
                f"`{argument}` must be a folder that can be written but {os.fspath(folder)!r} cannot "
                f"({error.strerror}); name another, as in --{argument} /somewhere/else."
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
    Give the student one empty slice or patch before any data is read, to see that sizes, channels and classes fit.

    Args:
        network: the student; left in the mode it was in.
        in_channels: channels of an image.
        class_names: names of the classes without the background.
        num_classes: C, background included.
        image_size: height and width of a slice, one number for both; or the size of a patch along each axis.

    Raises:
        ValueError: naming the key that does not fit.

    Example::

        >>> check_student(nn.Conv2d(1, 3, 1), in_channels=1, class_names=["RV", "LV"], num_classes=3, image_size=64)
    """
    if num_classes != len(class_names) + 1:
        raise KnowSAMValueError(
            f"`class_names` must name {num_classes - 1} classes, `num_classes` without the background, but is "
            f"{list(class_names)}; give the names alone, `num_classes` follows from them."
        )
    spatial = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    shape = (1, in_channels, *spatial)
    was_training = network.training
    device = next((parameter.device for parameter in network.parameters()), None)
    try:
        pred = network.eval()(torch.zeros(shape, device=device))
    except Exception as error:  # every network refuses in its own way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise KnowSAMValueError(
            f"`network_def` must take images of `in_channels` and `image_size`, {shape}, but {type(network).__name__} "
            f"does not: {reason}"
        ) from None
    finally:
        network.train(was_training)
    expected = (1, num_classes, *spatial)
    if not isinstance(pred, torch.Tensor) or tuple(pred.shape) != expected:
        given = tuple(pred.shape) if isinstance(pred, torch.Tensor) else f"a {type(pred).__name__}"
        raise KnowSAMValueError(
            f"`network_def` must give logits {expected} in eval mode, background and each of `class_names`, but "
            f"{type(network).__name__} gives {given}; set its output channels to `num_classes` (a network of one "
            "sigmoid channel to 2)."
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
    Check the data list of a run and refuse it if anything is wrong; of several processes, the first does.

    Args:
        datalist: `labeled`, `unlabeled`, `validation` and `test` items, as `load_datalist` gives them.
        num_classes: C, background included.
        num_channels: channels of an image; None: as many as the first has.
        slice_axis: of volumes in h5 files.
        num_axes: spatial axes that the student takes; None for 2 or 3.
        num_workers: threads that read.

    Returns:
        For each set, the files and the hashes of their contents, which :class:`Resume` compares; None in the processes
        that did not check.

    Raises:
        ValueError: listing what is wrong.

    Example::

        contents = check_data(datalist, num_classes=4)
    """
    if ranks.rank() > 0:
        return None
    report = check_datalist(datalist, num_classes, num_channels, slice_axis, num_axes, num_workers=num_workers)
    report.raise_if_wrong()
    return report.contents
