"""Check whether a data list is fit for training: a table of its content, errors, and warnings."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from knowsam_monai.data.case_facts import CaseFacts, CaseReader, read_cases
from knowsam_monai.data.datalist import load_datalist
from knowsam_monai.data.left_atrium import find_left_atrium
from knowsam_monai.data.overlap import image_paths, labels_as_images, patient_key, shared_contents, shared_names
from knowsam_monai.data.slice_axis import find_slice_axis
from knowsam_monai.data.transforms import check_slice_range
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.files import expand_path
from knowsam_monai.texts import some

logger = logging.getLogger(__name__)

COLUMNS = ("set", "items", "patients", "size", "spacing (mm)", "orientation", "intensities", "label values", "empty")


@dataclass
class DatalistReport:
    """The result of checking a data list; `str(report)` is the table.

    Args:
        rows: one for each set, the texts of `COLUMNS`.
        errors: faults that training must not start with, one sentence each.
        warnings: possibly intentional issues, one sentence each.
        header: number of items, and of those that were read.
        contents: for each set, the image file and a content hash (label included) of each item.

    Raises:
        ValueError: by `raise_if_wrong`, if there are errors.

    Example:
        >>> DatalistReport(errors=["`image` must be finite but a.nii has 3 NaN."]).raise_if_wrong()
        Traceback (most recent call last):
        knowsam_monai.errors.KnowSAMValueError: `image` must be finite but a.nii has 3 NaN.
    """

    rows: list[Sequence[str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    header: str = ""
    contents: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def __str__(self) -> str:
        table = [COLUMNS, *self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in table]
        for title, sentences in (("errors", self.errors), ("warnings", self.warnings)):
            lines += [f"{title}:" if sentences else f"{title}: none", *(f"  - {sentence}" for sentence in sentences)]
        return "\n".join([self.header, *lines])

    def raise_if_wrong(self) -> None:
        """Raise the first error.

        Raises:
            ValueError: with the file and the remedy.
        """
        if self.errors:
            rest = " There are more errors, in the table above." if len(self.errors) > 1 else ""
            raise KnowSAMValueError(self.errors[0] + rest)


def check_datalist(
    datalist: Mapping[str, Sequence[dict]],
    num_classes: int | None = None,
    num_channels: int | None = None,
    slice_axis: int = 0,
    num_axes: int | None = None,
    batch_sizes: Mapping[str, int] | None = None,
    cache_dir: str | os.PathLike | None = None,
    num_workers: int = 4,
    progress: bool = True,
) -> DatalistReport:
    """Read every image and label of a data list, and report errors and warnings.

    *Errors* are: an image (by name, or by the voxels of any slice) or a patient in two sets; a label of an unlabeled
    item, a missing label of a labeled one, or a label file that is also an image; an unreadable file; NaN; a different
    number of channels or axes; a label of another shape or with values that are not classes; only empty labels; an item
    with a slice number that is not scaled to 0..1. *Warnings* are: a label whose voxels are not where those of its
    image are; an empty label; a mask of 0 and 255; a class that no label has; a constant image; a duplicate image in a
    set; slices beside volumes; volumes whose spacing does not show their slices, or whose slices are in different
    planes, unless `num_axes` is 3; items without a patient.

    The table is logged. Errors are not raised: call `DatalistReport.raise_if_wrong`.

    Args:
        datalist: `labeled`, `unlabeled`, `validation` and `test` items, as `load_datalist` gives them.
        num_classes: C, background included; None accepts label values up to 255.
        num_channels: input channels of the network; None: channels of the first image.
        slice_axis: see `H5Reader`.
        num_axes: spatial axes of the network's input; None: 2 or 3.
        batch_sizes: how many rows of `labeled` and `unlabeled` a step takes; fewer give a warning. A row is an image,
            or a slice of a volume if `num_axes` is not 3.
        cache_dir: folder that caches the facts of each file, so that later runs only read changed files. None: the
            environment variable `KNOWSAM_CACHE_DIR`, or else `~/.cache/knowsam_monai`.
        num_workers: number of reading threads.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if `num_classes` is below 2.

    Example:
        >>> report = check_datalist({"labeled": [{"image": "a.nii"}], "validation": []}, progress=False)
        >>> report.errors[0]
        '`label` must be a path but a.nii of `labeled` has none; add one or list it as unlabeled.'
    """
    if num_classes is not None and num_classes < 2:
        raise KnowSAMValueError(
            f"`num_classes` must be at least 2, with the background, but is {num_classes}; leave it out to accept any "
            "label values."
        )
    start = time.monotonic()
    sets = {name: list(items) for name, items in datalist.items() if len(items) > 0}
    report = DatalistReport()
    report.errors += _first_three(f"{shared}; remove it from one of them." for shared in shared_names(sets))
    report.errors += _first_three(f"{shared}; correct one of them." for shared in labels_as_images(sets))
    report.errors += _misplaced_labels(sets)

    read = CaseReader(num_classes or 256, num_channels, slice_axis, num_axes)
    items = [item for set_items in sets.values() for item in set_items]
    cache_dir = _user_cache() if cache_dir is None else cache_dir
    facts_of_all, num_read = read_cases(items, read, cache_dir, num_workers, progress)
    remaining = iter(facts_of_all)
    facts = {name: [next(remaining) for _ in set_items] for name, set_items in sets.items()}
    report.contents = {
        name: [(image_paths(item)[0], case.digest) for item, case in zip(sets[name], facts[name])] for name in sets
    }

    for is_leak, shared in shared_contents(sets, {name: [case.content for case in facts[name]] for name in facts}):
        (report.errors if is_leak else report.warnings).append(f"{shared}; remove one of them.")
    report.errors += _faults(items, facts_of_all)
    report.errors += _unscaled_slices(items, facts_of_all)
    report.errors += _errors_across_sets(sets, facts)
    report.warnings += [sentence for name in sets for sentence in _warnings_of_set(name, sets[name], facts[name])]
    report.warnings += _slices_beside_volumes(sets, facts)
    if num_axes != 3:
        report.warnings += _unclear_slices(sets, facts)
        report.warnings += _different_planes(sets, facts)
    report.warnings += _warnings_across_sets(sets, facts, num_classes)
    report.warnings += _small_sets(facts, batch_sizes or {}, num_axes)
    report.rows = [_row(name, sets[name], facts[name]) for name in sets]
    report.header = (
        f"Data: {len(items)} items checked in {time.monotonic() - start:.1f} s, {num_read} of them read, "
        f"{len(items) - num_read} known from an earlier run."
    )
    logger.log(logging.WARNING if report.errors or report.warnings else logging.INFO, "%s", report)
    return report


def check_dataset(
    dataset_dir: str | os.PathLike,
    labeled_patients: int | None = None,
    holdout_patients: int = 0,
    **options,
) -> DatalistReport:
    """Check a data set, given as a folder or a data-list JSON, see `load_datalist` and `check_datalist`.

    Args:
        dataset_dir: a folder of ACDC or of left-atrium data, or a data-list *.json.
        labeled_patients: for folders only. None: 7 for ACDC, 8 for the left atrium.
        holdout_patients: see `load_datalist`.
        options: further arguments of `check_datalist`. For a left-atrium folder the default `slice_axis` is -1 and the
            default `num_axes` is 3.

    Raises:
        ValueError: if the folder or the JSON is not valid, or if `labeled_patients` is given for a JSON.
        FileNotFoundError: if a listed file does not exist.

    Example:
        >>> print(check_dataset("/data/ACDC", num_classes=4))     # doctest: +SKIP
    """
    path = Path(expand_path(dataset_dir, "dataset_dir"))
    if path.suffix == ".json" and labeled_patients is not None:
        raise KnowSAMValueError(
            f"`labeled_patients` must be left out with a data-list JSON but is {labeled_patients}; {path} lists the "
            "labeled items."
        )
    if path.suffix != ".json" and find_left_atrium(path) is not None:
        options = {"slice_axis": -1, "num_axes": 3, **options}
    datalist = load_datalist(path, phantom_dir="", labeled_patients=labeled_patients, holdout_patients=holdout_patients)
    return check_datalist(datalist, **options)


def _misplaced_labels(sets: Mapping[str, list[dict]]) -> list[str]:
    given = [item for item in sets.get("unlabeled", []) if "label" in item]
    missing = [
        (name, item) for name in ("labeled", "validation") for item in sets.get(name, []) if not item.get("label")
    ]
    return _first_three(
        f"`unlabeled` items must have no label but {image_paths(item)[0]} has {item['label']!r}; remove it."
        for item in given
    ) + _first_three(
        f"`label` must be a path but {image_paths(item)[0]} of `{name}` has none; add one or list it as unlabeled."
        for name, item in missing
    )


def _small_sets(
    facts: Mapping[str, Sequence[CaseFacts]], batch_sizes: Mapping[str, int], num_axes: int | None
) -> list[str]:
    """Sets with fewer rows than a step takes; a volume has at most as many slices as its longest axis is long."""
    sentences = []
    for name, batch_size in batch_sizes.items():
        cases = facts.get(name, ())
        if not all(case.size for case in cases) or (name == "labeled" and not cases):  # an error says more
            continue
        num_rows = sum(max(case.size) if num_axes != 3 and len(case.size) == 3 else 1 for case in cases)
        if num_rows < batch_size:
            also = " --mixing_weight 0 --distillation_gate none" if num_rows == 0 else ""
            sentences.append(
                f"`{name}` should have the {batch_size} rows of a step but has {num_rows}; add items, or train with "
                f"--{name}_batch_size {num_rows}{also}."
            )
    return sentences


def _first_three(sentences: Iterable[str]) -> list[str]:
    """The first three different sentences, and the number of the others."""
    different = list(dict.fromkeys(sentences))
    more = [f"{different[2]} … and {len(different) - 3} more."] if len(different) > 3 else different[2:3]
    return different[:2] + more


def _faults(items: Sequence[dict], facts: Sequence[CaseFacts]) -> list[str]:
    """The faults of single cases; at most three of each kind."""
    kinds: dict[str, list[str]] = {}
    for item, case in zip(items, facts):
        if case.fault:
            files = image_paths(item) + image_paths(item, "label")
            # faults of one kind have the same text before the file's name
            kind = min((case.fault.partition(file)[0] for file in files), key=len)
            kinds.setdefault(kind, []).append(case.fault)
    return [sentence for faults in kinds.values() for sentence in _first_three(faults)]


def _unscaled_slices(items: Sequence[dict], facts: Sequence[CaseFacts]) -> list[str]:
    """Items with a slice number that training would refuse, see `ScaleVolumed`."""
    sentences = []
    for item, case in zip(items, facts):
        if "slice" in item and case.size and not case.fault:
            try:
                check_slice_range(image_paths(item)[0], case.low, case.high)
            except ValueError as error:
                sentences.append(str(error))
    return _first_three(sentences)


def _errors_across_sets(sets: Mapping[str, list[dict]], facts: Mapping[str, list[CaseFacts]]) -> Iterator[str]:
    """Errors that single files do not show."""
    channels: dict[int, str] = {}
    for name, items in sets.items():
        for item, case in zip(items, facts[name]):
            if case.channels:
                channels.setdefault(case.channels, image_paths(item)[0])
    if len(channels) > 1:
        (first, first_file), (second, second_file) = list(channels.items())[:2]
        yield (
            f"`image` must have the same number of channels in every item but {second_file} has {second} and "
            f"{first_file} has {first}; correct or remove the different files."
        )
    for name in ("labeled", "validation"):
        labels = [case.label_values for case in facts.get(name, []) if case.label_values is not None]
        if labels and not any(max(values) > 0 for values in labels):
            yield f"`{name}` must have labels with a structure but all {len(labels)} are empty; label some."


def _warnings_of_set(name: str, items: list[dict], facts: list[CaseFacts]) -> Iterator[str]:
    """Possibly intentional issues of one set."""
    num_labeled = sum(case.label_values is not None for case in facts)
    for alignment in sorted({case.label_alignment for case in facts} - {""}):
        affected = [case.label_alignment == alignment for case in facts]
        yield from _warning(name, items, f"labels have {alignment}", affected, num_labeled, "label")
    yield from _warning(
        name, items, "labels are empty", [case.label_values == [0] for case in facts], num_labeled, "label"
    )
    are_constant = [case.channels > 0 and not case.content and not case.fault for case in facts]
    yield from _warning(name, items, "images are constant", are_constant, len(facts))


def _slices_beside_volumes(sets: Mapping[str, list[dict]], facts: Mapping[str, list[CaseFacts]]) -> Iterator[str]:
    """2D files in a set with volumes, or in another one if both have a geometry, by which volumes alone are turned."""
    is_turned = any(len(case.size) == 3 and case.spacing is not None for cases in facts.values() for case in cases)
    for name, items in sets.items():
        has_volumes = any(len(case.size) == 3 for case in facts[name])
        are_beside = [
            len(case.size) == 2 and (has_volumes or is_turned and case.spacing is not None) for case in facts[name]
        ]
        sentence = "images are slices beside volumes, which alone the 2D bundle turns to one orientation"
        yield from _warning(name, items, sentence, are_beside, len(items))


def _unclear_slices(sets: Mapping[str, list[dict]], facts: Mapping[str, list[CaseFacts]]) -> Iterator[str]:
    """Volumes whose slice axis a network of slices guesses, see `TurnSlicesd`."""
    for name, items in sets.items():
        unclear = [
            len(case.size) == 3 and case.spacing is not None and find_slice_axis(case.spacing, case.size) is None
            for case in facts[name]
        ]
        sentence = "images have a spacing that does not show their slices, which are taken axially by the 2D bundle"
        yield from _warning(name, items, sentence, unclear, len(items))


def _different_planes(sets: Mapping[str, list[dict]], facts: Mapping[str, list[CaseFacts]]) -> Iterator[str]:
    """Volumes whose slices, see `TurnSlicesd`, are more than 60 degrees from those of most others."""
    planes: list[list[tuple[str, Sequence[float]]]] = []  # of the volumes of each: file and normal
    for name, items in sets.items():
        for item, case in zip(items, facts[name]):
            if case.normal is not None:
                plane = next((plane for plane in planes if _is_along(plane[0][1], case.normal)), None)
                if plane is None:
                    planes.append(plane := [])
                plane.append((image_paths(item)[0], case.normal))
    if len(planes) < 2:
        return
    path, normal = max(planes, key=len)[0]
    for name, items in sets.items():
        across = [case.normal is not None and not _is_along(normal, case.normal) for case in facts[name]]
        sentence = f"images have slices in another plane than those of {path}; the 2D bundle trains on both alike"
        yield from _warning(name, items, sentence, across, len(items))


def _is_along(normal: Sequence[float], other: Sequence[float]) -> bool:
    return abs(np.dot(normal, other)) >= 0.5


def _warning(
    name: str, items: list[dict], sentence: str, affected: list[bool], num: int, key: str = "image"
) -> Iterator[str]:
    paths = [image_paths(item, key)[0] for item, is_affected in zip(items, affected) if is_affected]
    if paths:
        yield f"`{name}`: {len(paths)} of {num} {sentence}: {some(paths)}."


def _warnings_across_sets(
    sets: Mapping[str, list[dict]], facts: Mapping[str, list[CaseFacts]], num_classes: int | None
) -> Iterator[str]:
    found = {value for case in facts.get("labeled", []) for value in case.label_values or ()}
    absent = [str(c) for c in range(1, num_classes or 0) if c not in found]
    if found and absent:
        yield f"`labeled`: no label has class {', '.join(absent)}, so it cannot be learned."
    masks = [item for name in sets for item, case in zip(sets[name], facts[name]) if case.label_is_mask]
    if masks:
        first = image_paths(masks[0], "label")[0]
        yield f"{len(masks)} labels are masks of 0 and 255, such as {first}; they are read as 0 and 1."
    if num_classes is None and found <= {0, 255} and 255 in found:
        yield "`labeled`: labels are masks of 0 and 255; two classes read them as 0 and 1, more classes refuse them."
    unnamed = [name for name, items in sets.items() if not all(patient_key(item.get("patient")) for item in items)]
    if unnamed and len(sets) > 1:
        names = "`, `".join(unnamed)
        yield f"`{names}`: items have no `patient`, so scans of one patient in two sets would not be noticed."


def _row(name: str, items: list[dict], facts: list[CaseFacts]) -> tuple[str, ...]:
    read = [case for case in facts if case.size]
    labels = [case.label_values for case in facts if case.label_values is not None]
    values = sorted({value for label_values in labels for value in label_values})
    patients = {patient_key(item.get("patient")) for item in items} - {""}
    return (
        name,
        str(len(items)),
        str(len(patients)) if patients else "?",
        _span([case.size for case in read]),
        _span([[float(f"{step:.3g}") for step in case.spacing] for case in read if case.spacing is not None]),
        " ".join(sorted({case.orientation for case in read if case.orientation})) or "?",
        f"{min(case.low for case in read):.4g} to {max(case.high for case in read):.4g}" if read else "?",
        _shown(values) if labels else "none",
        f"{labels.count([0])} of {len(labels)}" if labels else "",
    )


def _span(tuples: Sequence[Sequence[float]]) -> str:
    """Minimum and maximum along each axis, such as "154-216 x 174-256 x 6-11"."""
    texts = []
    for num_axes in sorted(set(map(len, tuples))):
        axes = zip(*(lengths for lengths in tuples if len(lengths) == num_axes))
        spans = [(min(axis), max(axis)) for axis in axes]
        texts.append(" x ".join(f"{low:g}" if low == high else f"{low:g}-{high:g}" for low, high in spans))
    return " and ".join(texts) or "?"


def _shown(values: Sequence[int]) -> str:
    shown = " ".join(map(str, values[:8]))
    return f"{shown} ... {values[-1]}" if len(values) > 8 else shown


def _user_cache() -> Path:
    if "KNOWSAM_CACHE_DIR" in os.environ:
        return Path(os.environ["KNOWSAM_CACHE_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "knowsam_monai"
