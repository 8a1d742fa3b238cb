"""Is a data list fit to train on? A table of what is in it, what is odd, and a refusal of what is wrong."""

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
from knowsam_monai.data.transforms import check_slice_range
from knowsam_monai.errors import KnowSAMValueError

__all__ = ["DatalistReport", "check_datalist", "check_dataset"]

logger = logging.getLogger(__name__)

COLUMNS = ("set", "items", "patients", "size", "spacing (mm)", "orientation", "intensities", "label values", "empty")


@dataclass
class DatalistReport:
    """What was found in a data list; `str(report)` is the table.

    Args:
        rows: one for each set, the texts of `COLUMNS`.
        wrong: sentences, what no training should start with.
        odd: sentences, what may be meant so.
        header: what was read.
        contents: of each set, each item's image file and the hash of what it holds, label included.

    Raises:
        ValueError: by `raise_if_wrong`, where something is wrong.

    Example:
        >>> DatalistReport(wrong=["`image` must be finite but a.nii has 3 NaN."]).raise_if_wrong()
        Traceback (most recent call last):
        ValueError: `image` must be finite but a.nii has 3 NaN.
    """

    rows: list[Sequence[str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    header: str = ""
    contents: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def __str__(self) -> str:
        table = [COLUMNS, *self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in table]
        for title, sentences in (("wrong", self.wrong), ("odd", self.odd)):
            lines += [f"{title}: {'nothing' if not sentences else ''}".rstrip(), *(f"  - {one}" for one in sentences)]
        return "\n".join([self.header, *lines])

    def raise_if_wrong(self) -> None:
        """Raise one sentence about the first thing that is wrong.

        Raises:
            ValueError: naming the file and the remedy.
        """
        if self.wrong:
            more = len(self.wrong) - 1
            rest = f" {more} more fault{'s are' if more > 1 else ' is'} in the table above." if more else ""
            raise KnowSAMValueError(self.wrong[0] + rest)


def check_datalist(
    datalist: Mapping[str, Sequence[dict]],
    num_classes: int | None = None,
    num_channels: int | None = None,
    slice_axis: int = 0,
    num_axes: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    num_workers: int = 4,
    progress: bool = True,
) -> DatalistReport:
    """Read every image and label of a data list and report what is wrong or odd.

    *Wrong* is an image, by name or by its voxels (whole, or a slice of them), or a patient in two sets; a label on an
    unlabeled item, none on a labeled one, or one that is an image too; a file that cannot be read; NaN; another number
    of channels or axes; a label of another shape or with values that are no class; labels that are all empty; a slice
    with a number that is not scaled to 0..1. *Odd* is a label whose spacing or orientation differs from its image's; an
    empty label; a mask of 0 and 255; a class that no labeled item has; a constant image; one image twice in a set;
    slices among volumes; items without a patient.

    The table is logged. What is wrong is not raised: that is `DatalistReport.raise_if_wrong`.

    Args:
        datalist: `labeled`, `unlabeled`, `validation` and `test` items, as `load_datalist` gives them.
        num_classes: C, background included; None: label values up to 255 are taken as they are.
        num_channels: channels that the network takes; None: as many as the first image has.
        slice_axis: of volumes in h5 files, see `H5Reader`.
        num_axes: spatial axes that the network takes; None for 2 or 3.
        cache_dir: folder in which the facts of each file are kept, with its size and time of change, so that a second
            start reads changed files alone. None: that of the environment's `KNOWSAM_CACHE_DIR`, else
            `~/.cache/knowsam_monai`.
        num_workers: threads that read.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if `num_classes` is below 2.

    Example:
        >>> report = check_datalist({"labeled": [{"image": "a.nii"}], "validation": []}, progress=False)
        >>> report.wrong[0]
        '`label` must be a path but a.nii of `labeled` has none; leave it out or list it as unlabeled.'
    """
    if num_classes is not None and num_classes < 2:
        raise KnowSAMValueError(
            f"`num_classes` must be at least 2, with the background, but is {num_classes}; leave it out to take any "
            "label values."
        )
    start = time.monotonic()
    sets = {name: list(items) for name, items in datalist.items() if len(items) > 0}
    report = DatalistReport()
    report.wrong += _first_three(f"{shared}; leave it in one of them." for shared in shared_names(sets))
    report.wrong += _first_three(f"{shared}; correct one of them." for shared in labels_as_images(sets))
    report.wrong += _labels_out_of_place(sets)

    read = CaseReader(num_classes or 256, num_channels, slice_axis, num_axes)
    items = [item for one in sets.values() for item in one]
    cache_dir = _user_cache() if cache_dir is None else cache_dir
    facts_of_all, num_read = read_cases(items, read, cache_dir, num_workers, progress)
    remaining = iter(facts_of_all)
    facts = {name: [next(remaining) for _ in one] for name, one in sets.items()}
    report.contents = {
        name: [(image_paths(item)[0], one.digest) for item, one in zip(sets[name], facts[name])] for name in sets
    }

    for is_leak, shared in shared_contents(sets, {name: [f.content for f in facts[name]] for name in facts}):
        (report.wrong if is_leak else report.odd).append(f"{shared}; leave one out.")
    report.wrong += _faults(items, facts_of_all)
    report.wrong += _wrong_slices(items, facts_of_all)
    report.wrong += _wrong_together(sets, facts)
    report.odd += [sentence for name in sets for sentence in _odd(name, sets[name], facts[name])]
    report.odd += _odd_together(sets, facts, num_classes)
    report.rows = [_row(name, sets[name], facts[name]) for name in sets]
    report.header = (
        f"Data: {len(items)} items checked in {time.monotonic() - start:.1f} s, {num_read} of them read, "
        f"{len(items) - num_read} known from an earlier start."
    )
    logger.log(logging.WARNING if report.wrong or report.odd else logging.INFO, "%s", report)
    return report


def check_dataset(
    dataset_dir: str | os.PathLike,
    labeled_patients: int | None = None,
    holdout_patients: int = 0,
    **options,
) -> DatalistReport:
    """Check a data set by its folder or its data-list JSON, see `load_datalist` and `check_datalist`.

    Args:
        dataset_dir: a folder of ACDC or of left-atrium data, or a data-list *.json.
        labeled_patients: of a folder, None: 7 of ACDC, 8 of the left atrium.
        holdout_patients: see `load_datalist`.
        options: further arguments of `check_datalist`. For a folder of the left atrium `slice_axis` is -1 and
            `num_axes` 3 unless they are given.

    Raises:
        ValueError: if there is no data list to check: an unknown folder, no JSON, an item without an image; or
            `labeled_patients` is given for a JSON, which lists them.
        FileNotFoundError: if a file that is listed does not exist.

    Example:
        >>> print(check_dataset("/data/ACDC", num_classes=4))     # doctest: +SKIP
    """
    path = Path(os.path.expanduser(dataset_dir))
    if path.suffix == ".json" and labeled_patients is not None:
        raise KnowSAMValueError(
            f"`labeled_patients` must be left out with a data-list JSON but is {labeled_patients}; the `labeled` items "
            f"of {path} are the labeled ones."
        )
    is_left_atrium = path.suffix != ".json" and find_left_atrium(path) is not None
    if is_left_atrium:
        options = {"slice_axis": -1, "num_axes": 3, **options}
    if labeled_patients is None:
        labeled_patients = 8 if is_left_atrium else 7
    datalist = load_datalist(path, phantom_dir="", labeled_patients=labeled_patients, holdout_patients=holdout_patients)
    return check_datalist(datalist, **options)


def _labels_out_of_place(sets: Mapping[str, list[dict]]) -> list[str]:
    given = [item for item in sets.get("unlabeled", []) if "label" in item]
    missing = [
        (name, item) for name in ("labeled", "validation") for item in sets.get(name, []) if not item.get("label")
    ]
    return _first_three(
        f"`unlabeled` items must have no label but {image_paths(item)[0]} has {item['label']!r}; leave the label out."
        for item in given
    ) + _first_three(
        f"`label` must be a path but {image_paths(item)[0]} of `{name}` has none; leave it out or list it as unlabeled."
        for name, item in missing
    )


def _first_three(sentences: Iterable[str]) -> list[str]:
    """Of one complaint about more than three files the first three, each once, and how many there are."""
    different = list(dict.fromkeys(sentences))
    more = [f"{different[2]} … and {len(different) - 3} more."] if len(different) > 3 else different[2:3]
    return different[:2] + more


def _faults(items: Sequence[dict], facts: Sequence[CaseFacts]) -> list[str]:
    """What is wrong with each file, once; of one complaint about more than three files the first three."""
    complaints: dict[str, list[str]] = {}
    for item, one in zip(items, facts):
        if one.fault:
            files = image_paths(item) + image_paths(item, "label")
            # what stands before the file's name is the same for all
            complaint = min((one.fault.partition(file)[0] for file in files), key=len)
            complaints.setdefault(complaint, []).append(one.fault)
    return [sentence for faults in complaints.values() for sentence in _first_three(faults)]


def _wrong_slices(items: Sequence[dict], facts: Sequence[CaseFacts]) -> list[str]:
    """Slices with a number that training would refuse, see `ScaleVolumed`."""
    sentences = []
    for item, one in zip(items, facts):
        if "slice" in item and one.size and not one.fault:
            try:
                check_slice_range(image_paths(item)[0], one.low, one.high)
            except ValueError as error:
                sentences.append(str(error))
    return _first_three(sentences)


def _wrong_together(sets: Mapping[str, list[dict]], facts: Mapping[str, list[CaseFacts]]) -> Iterator[str]:
    """What each file alone does not show."""
    channels: dict[int, str] = {}
    for name, items in sets.items():
        for item, one in zip(items, facts[name]):
            if one.channels:
                channels.setdefault(one.channels, image_paths(item)[0])
    if len(channels) > 1:
        (first, its), (second, others) = list(channels.items())[:2]
        yield (
            f"`image` must have the same number of channels in every item but {others} has {second} and {its} "
            f"{first}; give all the same."
        )
    values = [one.label_values for one in facts.get("labeled", []) if one.label_values is not None]
    if values and not any(max(one) > 0 for one in values):
        yield f"`labeled` must have a structure in its labels but all {len(values)} are empty; label some."


def _odd(name: str, items: list[dict], facts: list[CaseFacts]) -> Iterator[str]:
    """What may be meant so, in one set."""

    def told(sentence: str, oddities: list[bool], num: int, key: str = "image") -> Iterator[str]:
        paths = [image_paths(item, key)[0] for item, is_odd in zip(items, oddities) if is_odd]
        if paths:
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            yield f"`{name}`: {len(paths)} of {num} {sentence}: {', '.join(paths[:3])}{more}."

    num_labeled = sum(one.label_values is not None for one in facts)
    as_aligned = (
        "than their image, which is followed where the grids are the same, else the voxels are taken as aligned"
    )
    oddities = [_differ(one.spacing, one.label_spacing) for one in facts]
    yield from told(f"labels are of another spacing {as_aligned}", oddities, num_labeled, "label")
    turned = [{one.orientation, one.label_orientation} - {None} for one in facts]
    oddities = [len(orientations) > 1 for orientations in turned]
    yield from told(f"labels are of another orientation {as_aligned}", oddities, num_labeled, "label")
    yield from told("labels are empty", [one.label_values == [0] for one in facts], num_labeled, "label")
    yield from told(
        "images are constant", [one.channels > 0 and not one.content and not one.fault for one in facts], len(facts)
    )
    are_slices = [len(one.size) == 2 for one in facts]
    if any(len(one.size) == 3 for one in facts):
        yield from told("images are slices, the others volumes", are_slices, len(facts))


def _differ(spacing: Sequence[float] | None, other: Sequence[float] | None) -> bool:
    """Whether two known spacings are of other millimetres."""
    known = None not in (spacing, other) and len(spacing) == len(other)  # a label of other axes is a fault by itself
    return known and not np.allclose(spacing, other, rtol=1e-3, atol=0)


def _odd_together(
    sets: Mapping[str, list[dict]], facts: Mapping[str, list[CaseFacts]], num_classes: int | None
) -> Iterator[str]:
    found = {value for one in facts.get("labeled", []) for value in one.label_values or ()}
    absent = [str(c) for c in range(1, num_classes or 0) if c not in found]
    if found and absent:
        yield f"`labeled`: no label has class {', '.join(absent)}: it cannot be learned."
    masks = [item for name in sets for item, one in zip(sets[name], facts[name]) if one.label_is_mask]
    if masks:
        first = image_paths(masks[0], "label")[0]
        yield f"{len(masks)} labels are masks of 0 and 255, read as 0 and 1, such as {first}."
    if num_classes is None and found <= {0, 255} and 255 in found:
        yield "`labeled`: labels are masks of 0 and 255, which are read as 0 and 1 of two classes and refused of more."
    unnamed = [name for name, items in sets.items() if any("patient" not in item for item in items)]
    if unnamed and len(sets) > 1:
        names = "`, `".join(unnamed)
        yield f"`{names}`: items without a `patient`, whose scans in two sets would not be seen."


def _row(name: str, items: list[dict], facts: list[CaseFacts]) -> tuple[str, ...]:
    read = [one for one in facts if one.size]
    labels = [one.label_values for one in facts if one.label_values is not None]
    values = sorted({value for one in labels for value in one})
    patients = {patient_key(item["patient"]) for item in items if "patient" in item}
    return (
        name,
        str(len(items)),
        str(len(patients)) if patients else "?",
        _span([one.size for one in read], "voxels"),
        _span([one.spacing for one in read if one.spacing is not None], ""),
        " ".join(sorted({one.orientation for one in read if one.orientation})) or "?",
        f"{min(one.low for one in read):.4g} to {max(one.high for one in read):.4g}" if read else "?",
        _shown(values) if labels else "none",
        f"{sum(one == [0] for one in labels)} of {len(labels)}" if labels else "",
    )


def _span(tuples: Sequence[Sequence[float]], unit: str) -> str:
    """Smallest and largest along each axis, such as "154-216 x 174-256 x 6-11"."""
    texts = []
    for num_axes in sorted({len(one) for one in tuples}):
        axes = zip(*(one for one in tuples if len(one) == num_axes))
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
