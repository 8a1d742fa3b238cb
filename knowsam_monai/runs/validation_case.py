"""One case of a validation as the report handlers see it: label maps on the label's own grid, file and spacing."""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from ignite.engine import Engine
from monai.data import MetaTensor, decollate_batch
from monai.data.utils import affine_to_spacing
from monai.utils import CommonKeys as Keys
from monai.utils import ImageMetaKey
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.texts import printable

NAMES_OF_ALL = ("lgemri", "mri_norm2")
# None: neither image nor label knows its spacing; "meta": take it from there
Spacing = Sequence[float] | str | None


class ValidationCase(NamedTuple):
    """
    Args:
        path: the image's file, or ``case_000`` and so on for images without one; ``//2`` and so on after it where
            another case is of that file.
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

    @property
    def content(self) -> int:
        """A checksum of label and image, by which a case that a sampler repeats is told from another of that file."""
        image = torch.zeros(0) if self.image is None else torch.as_tensor(self.image).detach().float().cpu()
        return zlib.crc32(image.numpy().tobytes(), zlib.crc32(self.label.numpy().tobytes()))


def check_class_names(class_names: Sequence[str], reserved: Sequence[str] = ()) -> list[str]:
    """
    The names of the foreground classes as a list.

    Args:
        class_names: of classes 1, 2, ... (no background).
        reserved: columns that the tables have beside them.

    Raises:
        ValueError: when it is one text, is empty, or names a class twice or like another column.
    """
    if isinstance(class_names, str) or not class_names:
        raise KnowSAMValueError(
            f"`class_names` must be a list of the foreground classes' names but is {class_names!r}."
        )
    names = list(class_names)
    twice = next((name for name in (*names, *reserved) if (*names, *reserved).count(name) > 1), None)
    if twice is not None:
        raise KnowSAMValueError(
            f"`class_names` must be different from each other and from {', '.join(reserved) or 'no other'} but has "
            f"{twice!r} too; rename that class."
        )
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
        pred_keys: which entries of ``engine.state.output`` are predictions; all but the first are optional.
        spacing: mm along each axis for every case, None for unknown, "meta" for each case's own. A reader that knows
            that its format has no spacing says so by ``meta["spacing_known"] = False``.
        seen: `content` by `path` of the cases of the validation's earlier iterations. A case that is one of these has
            its path, and no other case has.

    Shape:
        label and predictions: (1, *spatial) label maps, or (C, *spatial) one-hot or scores.

    Raises:
        ValueError: when label or prediction is missing, is of another class count, or their grids differ.
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
        label = _label_map(item[Keys.LABEL], num_classes, Keys.LABEL)
        preds = {key: _label_map(item[key], num_classes, key) for key in pred_keys if item.get(key) is not None}
        for key, pred in preds.items():
            if pred.shape != label.shape:
                raise KnowSAMValueError(
                    f"`{key}` must be on the label's grid {tuple(label.shape)} but has shape {tuple(pred.shape)}; "
                    f"put Invertd(keys={key!r}, orig_keys='image') into the postprocessing."
                )
        affine = _affine(item[Keys.LABEL])
        case = ValidationCase(
            path=_file(item, pred_keys[0]) or f"case_{_index(engine, len(contents)):03d}",
            image=item.get(Keys.IMAGE),
            label=label,
            preds=preds,
            spacing=_spacing(affine, label.ndim) if spacing == "meta" else _as_tuple(spacing),
            affine=affine,
            grid=item[Keys.LABEL].affine if isinstance(item[Keys.LABEL], MetaTensor) else None,
        )
        cases.append(case._replace(path=_add(contents, case.path, case.content)))
    return cases


def class_dice(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """
    Dice of each foreground class over the whole case, (C - 1,).

    2 |P n T| / (|P| + |T|): 0 where one of both is empty; nan where both are, because nothing was there to be found.
    """
    pairs = torch.bincount((label * num_classes + pred).flatten(), minlength=num_classes**2)
    pairs = pairs.reshape(num_classes, num_classes).double()  # [label, pred]: number of voxels
    return (2 * pairs.diagonal() / (pairs.sum(0) + pairs.sum(1)))[1:]  # 0 / 0 is nan


def names_of_ranks(ranks: Sequence[Mapping[str, int]]) -> list[dict[str, str]]:
    """
    What each process's cases are called among those of all: one name for each case, though two processes had it.

    Args:
        ranks: `content` of each case by `path`, for each process.
    """
    contents: dict[str, int] = {}
    return [{path: _add(contents, _split(path)[0], content) for path, content in rank.items()} for rank in ranks]


def _add(contents: dict[str, int], path: str, content: int) -> str:
    """Add a case, and return its path, with a number where another case has it."""
    path = _numbered(path, {known for known, other in contents.items() if other != content}, "{}//{}")
    contents[path] = content
    return path


def case_names(paths: Sequence[str]) -> list[str]:
    """
    File names without folder and extension, printable and all different.

    As many folders stay as tell apart what would otherwise be one name, and one where all cases have the same, as the
    left atrium's do. What they cannot tell apart is numbered.

    Args:
        paths: of different cases.
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
    """A case's file, and its number among the cases of that file, "" of the first."""
    file, number = re.fullmatch(r"(.*?)(?://(\d+))?", path, re.DOTALL).groups(default="")  # type: ignore[union-attr]
    return file, number


def _numbered(name: str, taken: Collection[str], form: str = "{} ({})") -> str:
    """The name, with a number where it is taken."""
    free, number = name, 2
    while free in taken:
        free, number = form.format(name, number), number + 1
    return free


def _index(engine: Engine, num_before: int) -> int:
    """Which case of the data set this process's next one is, where each takes its turn."""
    index = num_before * ranks.world_size() + ranks.rank()
    sampler = getattr(engine.state.dataloader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        index %= len(sampler.dataset)  # it repeats the first cases to serve all processes alike
    return index


def _label_map(x: Tensor, num_classes: int, key: str) -> Tensor:
    x = torch.as_tensor(x.as_tensor() if isinstance(x, MetaTensor) else x).detach().cpu()
    if x.shape[0] not in (1, num_classes):
        raise KnowSAMValueError(
            f"`{key}` must have 1 channel (class numbers) or {num_classes} (one-hot) but has {x.shape[0]}; "
            "`class_names` names every class but the background."
        )
    if x.shape[0] == 1 and x.is_floating_point() and (x - x.round()).abs().gt(0.01).any():
        raise KnowSAMValueError(
            f"`{key}` must be class numbers or one-hot but has {x[x != x.round()][0]:g}; of a network of one sigmoid "
            "channel put Activationsd(sigmoid=True) and AsDiscreted(threshold=0.5) into the postprocessing."
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


def _affine(label: Tensor) -> Tensor | None:
    known = isinstance(label, MetaTensor) and torch.as_tensor(label.meta.get("spacing_known", True)).all()
    return label.affine if known else None


def _spacing(affine: Tensor | None, spatial_dims: int) -> tuple[float, ...] | None:
    return None if affine is None else tuple(affine_to_spacing(affine, r=spatial_dims).tolist())


def _as_tuple(spacing: Any) -> tuple[float, ...] | None:
    return None if spacing is None else tuple(float(edge) for edge in spacing)
