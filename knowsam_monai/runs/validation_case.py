"""One case of a validation: label maps on the label's own grid, file and spacing."""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from monai.data import MetaTensor, decollate_batch
from monai.utils import CommonKeys as Keys
from monai.utils import ImageMetaKey
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from knowsam_monai import ranks
from knowsam_monai.data.transforms import known_spacing
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.tensors import without_meta
from knowsam_monai.texts import printable

NAMES_OF_ALL = ("lgemri", "mri_norm2")  # file names that every left atrium has
# None: unknown; "meta": from the label's metadata
Spacing = Sequence[float] | str | None


class ValidationCase(NamedTuple):
    """
    Args:
        path: the image's file, or ``case_000`` and so on for images without a file; ``//2`` and so on is appended if
            another case has the same file.
        image: (channels, *spatial), possibly on another grid than the label; None if the engine kept no image.
        label: (*spatial), class numbers.
        preds: label maps (*spatial) by their key in the engine's output.
        spacing: edge lengths of a voxel of `label` in mm, None if unknown.
        affine: from the label's voxels to mm, None if unknown.
        grid: the affine in the label's metadata, whatever its unit; the image's affine has the same unit.
    """

    path: str
    image: Tensor | None
    label: Tensor
    preds: dict[str, Tensor]
    spacing: tuple[float, ...] | None
    affine: Tensor | None
    grid: Tensor | None = None

    @property
    def content(self) -> int:
        """A checksum of label and image, to distinguish a repeated case from another case with the same file."""
        image = torch.zeros(0) if self.image is None else torch.as_tensor(self.image).detach().float().cpu()
        return zlib.crc32(image.numpy().tobytes(), zlib.crc32(self.label.numpy().tobytes()))


def check_class_names(class_names: Sequence[str], reserved: Sequence[str] = ()) -> list[str]:
    """
    The names of the foreground classes as a list.

    Args:
        class_names: names of classes 1, 2, ... (no background).
        reserved: names of other columns in the tables.

    Raises:
        ValueError: if it is a single string, is empty, or contains a name twice or a reserved one.
    """
    if isinstance(class_names, str) or not class_names:
        raise KnowSAMValueError(
            f"`class_names` must be a list of the foreground classes' names but is {class_names!r}."
        )
    names = list(class_names)
    for i, name in enumerate(names):
        if name in (*names[:i], *reserved):
            others = f" and none of {', '.join(reserved)}" if reserved else ""
            raise KnowSAMValueError(f"`class_names` must be unique{others} but repeats {name!r}; rename that class.")
    return names


def validation_cases(
    engine: Engine,
    num_classes: int,
    pred_keys: Sequence[str] = (Keys.PRED,),
    spacing: Spacing = "meta",
    seen: Mapping[str, int] | None = None,
) -> list[ValidationCase]:
    """
    The cases of the evaluator's last iteration, decollated or not.

    Args:
        engine: an evaluator after its postprocessing.
        num_classes: C, background included.
        pred_keys: keys of the predictions in ``engine.state.output``; all but the first are optional.
        spacing: mm along each axis for every case, None if unknown, "meta" for each case's own. Readers of formats
            without a spacing set ``meta["spacing_known"] = False``.
        seen: `content` by `path` of the cases in earlier iterations. A repeated case gets the same path again, all
            others get a path of their own.

    Shape:
        label and predictions: (1, *spatial) label maps, or (C, *spatial) one-hot or scores.

    Raises:
        ValueError: if a label or prediction is missing or has another class count, or if their grids differ.
    """
    items = engine.state.output
    if isinstance(items, dict):
        keys = [key for key in (Keys.IMAGE, Keys.LABEL, *pred_keys) if items.get(key) is not None]
        items = decollate_batch({key: items[key] for key in keys}, detach=True)

    cases: list[ValidationCase] = []
    contents = dict(seen or {})
    for item in items:
        for key in (pred_keys[0], Keys.LABEL):
            if item.get(key) is None:
                raise KnowSAMValueError(
                    f"`engine.state.output` must have {key!r} for every case but has {', '.join(item)}; "
                    "every validation and test item needs a label file."
                )
        label = label_map(item[Keys.LABEL], num_classes, Keys.LABEL)
        preds = {key: label_map(item[key], num_classes, key) for key in pred_keys if item.get(key) is not None}
        for key, pred in preds.items():
            if pred.shape != label.shape:
                raise KnowSAMValueError(
                    f"`{key}` must be on the label's grid {tuple(label.shape)} but has shape {tuple(pred.shape)}; "
                    f"put Invertd(keys={key!r}, orig_keys='image') into the postprocessing."
                )
        known = known_spacing(item[Keys.LABEL])
        edges = known if spacing == "meta" else spacing
        case = ValidationCase(
            path=_file(item, pred_keys[0]) or f"case_{_index(engine, len(contents)):03d}",
            image=item.get(Keys.IMAGE),
            label=label,
            preds=preds,
            spacing=None if edges is None else tuple(float(edge) for edge in edges),
            affine=None if known is None else item[Keys.LABEL].affine,
            grid=item[Keys.LABEL].affine if isinstance(item[Keys.LABEL], MetaTensor) else None,
        )
        cases.append(case._replace(path=_add(contents, case.path, case.content)))
    return cases


def class_dice(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """
    Dice of each foreground class over the whole case, (C - 1,).

    2 |P n T| / (|P| + |T|): 0 if one of them is empty; nan if both are, because there was nothing to find.
    """
    pairs = torch.bincount((label * num_classes + pred).flatten(), minlength=num_classes**2)
    pairs = pairs.reshape(num_classes, num_classes).double()  # [label, pred]: number of voxels
    return (2 * pairs.diagonal() / (pairs.sum(0) + pairs.sum(1)))[1:]  # 0 / 0 is nan


def of_all_processes(cases: Mapping[str, Any], contents: Mapping[str, int]) -> dict[str, Any]:
    """
    What all processes know about their cases, by paths that are unique among them; every case once.

    Args:
        cases: by `path`, what this process knows about each of its cases.
        contents: the `content` of these cases.
    """
    if ranks.world_size() == 1:
        return dict(cases)
    known: dict[str, int] = {}
    return {
        _add(known, _split(path)[0], contents_of_rank[path]): case
        for cases_of_rank, contents_of_rank in idist.all_gather((cases, contents))
        for path, case in cases_of_rank.items()
    }


def _add(contents: dict[str, int], path: str, content: int) -> str:
    """Add a case and return its path, with a number if another case has that path."""
    path = _numbered(path, {known for known, other in contents.items() if other != content}, "{}//{}")
    contents[path] = content
    return path


def case_names(paths: Sequence[str]) -> list[str]:
    """
    File names without folder and extension, printable and unique.

    Cases with the same file name keep as many folders as distinguish them, and a number if no folder does. The files of
    the left atrium, which all have the same name, keep one folder.

    Args:
        paths: paths of different cases.
    """
    stems, folders = [], []
    for path in paths:
        file, number = _split(path)
        parent, name = PurePath(os.path.dirname(file)), os.path.basename(file)
        stem = name.split(".nii")[0]
        stem = os.path.splitext(stem)[0] if stem == name else stem
        stems.append(printable(f"{stem} ({number})" if number else stem))
        folders.append([printable(part) for part in parent.parts if part != parent.anchor])
    depths = [int(stem in NAMES_OF_ALL) for stem in stems]
    while True:
        names = ["/".join((*f[len(f) - d :], s)) if d <= len(f) else s for s, f, d in zip(stems, folders, depths)]
        counts = Counter(names)
        longer = [i for i, name in enumerate(names) if counts[name] > 1 and depths[i] < len(folders[i])]
        if not longer:
            break
        for i in longer:
            depths[i] += 1
    taken: set[str] = set()
    for i, name in enumerate(names):
        names[i] = _numbered(name, taken)
        taken.add(names[i])
    return names


def _split(path: str) -> tuple[str, str]:
    """A case's file, and its number among the cases with that file; "" for the first."""
    file, number = re.fullmatch(r"(.*?)(?://(\d+))?", path, re.DOTALL).groups(default="")  # type: ignore[union-attr]
    return file, number


def _numbered(name: str, taken: Collection[str], form: str = "{} ({})") -> str:
    """The name, with a number if it is taken."""
    free, number = name, 2
    while free in taken:
        free, number = form.format(name, number), number + 1
    return free


def _index(engine: Engine, num_before: int) -> int:
    """The index in the data set of this process's next case, if processes take turns."""
    index = num_before * ranks.world_size() + ranks.rank()
    sampler = getattr(engine.state.dataloader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        index %= len(sampler.dataset)  # it repeats the first cases so that all processes have equally many
    return index


def label_map(x: Tensor, num_classes: int, key: str) -> Tensor:
    """
    The class numbers (*spatial) of a case's label or prediction, on the CPU.

    Args:
        x: (1, *spatial) class numbers, or (C, *spatial) one-hot or scores.
        num_classes: C, background included.
        key: its key in the engine's output, for the error.

    Raises:
        ValueError: if it has another number of channels, or values that are not class numbers.
    """
    x = torch.as_tensor(without_meta(x)).detach().cpu()
    if x.shape[0] not in (1, num_classes):
        raise KnowSAMValueError(
            f"`{key}` must have 1 channel (class numbers) or {num_classes} (one-hot) but has {x.shape[0]}; "
            "`class_names` names every class but the background."
        )
    if x.shape[0] == 1 and x.is_floating_point() and (x - x.round()).abs().gt(0.01).any():
        raise KnowSAMValueError(
            f"`{key}` must be class numbers or one-hot but has {x[x != x.round()][0]:g}; for a network with one "
            "sigmoid channel, put Activationsd(sigmoid=True) and AsDiscreted(threshold=0.5) into the postprocessing."
        )
    x = x[0].round().long() if x.shape[0] == 1 else x.argmax(0)
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < num_classes:
        raise KnowSAMValueError(
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
