"""One case of a validation as the report handlers see it: label maps on the label's own grid, file and spacing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from monai.data import MetaTensor, decollate_batch
from monai.data.utils import affine_to_spacing
from monai.utils import CommonKeys as Keys
from monai.utils import ImageMetaKey
from torch import Tensor

NAMES_OF_ALL = ("lgemri", "mri_norm2")
# None: neither image nor label knows its spacing; "meta": take it from there
Spacing = Sequence[float] | str | None


class ValidationCase(NamedTuple):
    """
    Args:
        path: the image's file, or ``case_000`` and so on for images without a file.
        image: (channels, *spatial), maybe on another grid than the label; None where the engine kept none.
        label: (*spatial), class numbers.
        preds: label maps (*spatial) by their key in the engine's output.
        spacing: edge lengths of a voxel of `label` in mm, None where unknown.
        affine: from the label's voxels to space, None where unknown.
        grid: the same as far as the label's metadata has it, be its unit known or not: the image's is relative to it.
    """

    path: str
    image: Tensor | None
    label: Tensor
    preds: dict[str, Tensor]
    spacing: tuple[float, ...] | None
    affine: Tensor | None
    grid: Tensor | None = None


def validation_cases(
    engine: Engine, num_classes: int, pred_keys: Sequence[str] = (Keys.PRED,), spacing: Spacing = "meta"
) -> list[ValidationCase]:
    """
    The cases of the evaluator's last iteration, decollated or not.

    Args:
        engine: an evaluator after its postprocessing.
        num_classes: C, background included.
        pred_keys: which entries of ``engine.state.output`` are predictions; all but the first are optional.
        spacing: mm along each axis for every case, None for unknown, "meta" for each case's own. A reader that knows
            that its format has no spacing says so by ``meta["spacing_known"] = False``.

    Shape:
        label and predictions: (1, *spatial) label maps, or (C, *spatial) one-hot or scores.

    Raises:
        ValueError: when label or prediction is missing, is of another class count, or their grids differ.
    """
    items = engine.state.output
    if isinstance(items, dict):
        keys = [key for key in (Keys.IMAGE, Keys.LABEL, *pred_keys) if items.get(key) is not None]
        items = decollate_batch({key: items[key] for key in keys}, detach=True)

    cases = []
    for row, item in enumerate(items):
        for key in (pred_keys[0], Keys.LABEL):
            if item.get(key) is None:
                raise ValueError(
                    f"`engine.state.output` must have {key!r} for every case but has {', '.join(item)}; "
                    "every validation and test item needs a label file."
                )
        label = _label_map(item[Keys.LABEL], num_classes, Keys.LABEL)
        preds = {key: _label_map(item[key], num_classes, key) for key in pred_keys if item.get(key) is not None}
        for key, pred in preds.items():
            if pred.shape != label.shape:
                raise ValueError(
                    f"`{key}` must be on the label's grid {tuple(label.shape)} but has shape {tuple(pred.shape)}; "
                    f"put Invertd(keys={key!r}, orig_keys='image') into the postprocessing."
                )
        first = ((engine.state.iteration - 1) * len(items) + row) * idist.get_world_size() + idist.get_rank()
        affine = _affine(item[Keys.LABEL])
        cases.append(
            ValidationCase(
                path=_file(item, pred_keys[0]) or f"case_{first:03d}",
                image=item.get(Keys.IMAGE),
                label=label,
                preds=preds,
                spacing=_spacing(affine, label.ndim) if spacing == "meta" else _as_tuple(spacing),
                affine=affine,
                grid=item[Keys.LABEL].affine if isinstance(item[Keys.LABEL], MetaTensor) else None,
            )
        )
    return cases


def class_dice(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """
    Dice of each foreground class over the whole case, (C - 1,).

    2 |P n T| / (|P| + |T|): 0 where one of both is empty; nan where both are, because nothing was there to be found.
    """
    pairs = torch.bincount((label * num_classes + pred).flatten(), minlength=num_classes**2)
    pairs = pairs.reshape(num_classes, num_classes).double()  # [label, pred]: number of voxels
    return (2 * pairs.diagonal() / (pairs.sum(0) + pairs.sum(1)))[1:]  # 0 / 0 is nan


def case_names(paths: Sequence[str]) -> list[str]:
    """
    File names without folder and extension.

    The folder stays where two files would otherwise be one name, or all cases have the same, as the left atrium's do.
    """
    stems = [os.path.basename(path).split(".nii")[0] for path in paths]
    stems = [os.path.splitext(stem)[0] if stem == os.path.basename(path) else stem for stem, path in zip(stems, paths)]
    folders = [os.path.basename(os.path.dirname(path)) for path in paths]
    return [f"{f}/{s}" if f and (stems.count(s) > 1 or s in NAMES_OF_ALL) else s for f, s in zip(folders, stems)]


def _label_map(x: Tensor, num_classes: int, key: str) -> Tensor:
    x = torch.as_tensor(x.as_tensor() if isinstance(x, MetaTensor) else x).detach().cpu()
    if x.shape[0] not in (1, num_classes):
        raise ValueError(
            f"`{key}` must have 1 channel (class numbers) or {num_classes} (one-hot) but has {x.shape[0]}; "
            "`class_names` names every class but the background."
        )
    if x.shape[0] == 1 and (x - x.round()).abs().gt(0.01).any():
        raise ValueError(
            f"`{key}` must be class numbers or one-hot but has {x[x != x.round()][0]:g}; of a network of one sigmoid "
            "channel put Activationsd(sigmoid=True) and AsDiscreted(threshold=0.5) into the postprocessing."
        )
    x = x[0].round().long() if x.shape[0] == 1 else x.argmax(0)
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < num_classes:
        raise ValueError(
            f"`{key}` must have values from 0 to {num_classes - 1} but has {int(x.min())} to {int(x.max())}; "
            "`class_names` names every class but the background."
        )
    return x


def _file(item: dict[str, Any], pred_key: str) -> str | None:
    for key in (Keys.IMAGE, pred_key, Keys.LABEL):
        meta = getattr(item.get(key), "meta", {})
        if meta.get(ImageMetaKey.FILENAME_OR_OBJ):
            return str(meta[ImageMetaKey.FILENAME_OR_OBJ])
    return None


def _affine(label: Tensor) -> Tensor | None:
    known = isinstance(label, MetaTensor) and torch.as_tensor(label.meta.get("spacing_known", True)).all()
    return label.affine if known else None


def _spacing(affine: Tensor | None, spatial_dims: int) -> tuple[float, ...] | None:
    return None if affine is None else tuple(affine_to_spacing(affine, r=spatial_dims).tolist())


def _as_tuple(spacing: Any) -> tuple[float, ...] | None:
    return None if spacing is None else tuple(float(edge) for edge in spacing)
