"""What two sets of a data list must not share: a file, a patient, or the voxels of an image."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

__all__ = ["image_paths", "labels_as_images", "patient_key", "shared_contents", "shared_names"]


def image_paths(item: Mapping, key: str = "image") -> list[str]:
    """The files of an item's image, or of its label: one, or one for each channel or slice."""
    value = item.get(key, [])
    return [str(path) for path in (value if isinstance(value, (list, tuple)) else [value])]


def shared_names(datalist: Mapping[str, Sequence[dict]]) -> Iterator[str]:
    """Say each image file in two sets, and each named patient in training and in validation or test.

    Patients whose names differ in case or spaces alone are the same. Labeled and unlabeled items may be of one patient:
    slices of a scan of which some are labeled.

    Example:
        >>> next(shared_names({"labeled": [{"image": "a.nii"}], "test": [{"image": "a.nii"}]}))
        '`test` must share no image with `labeled` but both list a.nii'
    """
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    said = set()
    real = _real_paths()
    for name, items in datalist.items():
        role = "training" if name in ("labeled", "unlabeled") else name
        for item in items:
            named = [("image", real(image), name, image) for image in image_paths(item)]
            if "patient" in item:
                named.append(("patient", patient_key(item["patient"]), role, repr(item["patient"])))
            for kind, value, place, written in named:
                other, its = seen.setdefault((kind, value), (place, written))
                if other != place and (kind, value, place) not in said:
                    said.add((kind, value, place))
                    verb = "list" if kind == "image" else "have"
                    also = f", written {its} in `{other}`" if kind == "patient" and its != written else ""
                    yield f"`{place}` must share no {kind} with `{other}` but both {verb} {written}{also}"


def labels_as_images(datalist: Mapping[str, Sequence[dict]]) -> Iterator[str]:
    """Say each file that is a label and an image too. An h5 file may be both: it has a dataset for each.

    Example:
        >>> next(labels_as_images({"labeled": [{"image": "a.nii", "label": "a.nii"}]}))
        '`label` must be another file than an image but `labeled` has a.nii, an image of `labeled`'
    """
    real = _real_paths()
    images = {real(path): name for name, items in datalist.items() for item in items for path in image_paths(item)}
    said = set()
    for name, items in datalist.items():
        for path in (path for item in items for path in image_paths(item, "label")):
            of = None if path.lower().endswith((".h5", ".hdf5")) else images.get(real(path))
            if of is not None and path not in said:
                said.add(path)
                yield f"`label` must be another file than an image but `{name}` has {path}, an image of `{of}`"


def patient_key(patient: object) -> str:
    """The same for names that differ in case, spaces or the form of Unicode alone.

    Example:
        >>> patient_key("Patient 01 ") == patient_key("patient01")
        True
    """
    return "".join(unicodedata.normalize("NFKC", str(patient)).casefold().split())


def _real_paths() -> Callable[[str], str]:
    """`os.path.realpath` that resolves each folder once."""
    real_folder = cache(os.path.realpath)

    def real(path: str) -> str:
        folder, name = os.path.split(path)
        return os.path.realpath(path) if os.path.islink(path) else os.path.join(real_folder(folder), name)

    return real


def shared_contents(
    datalist: Mapping[str, Sequence[dict]], contents: Mapping[str, Sequence[Sequence[str]]]
) -> Iterator[tuple[bool, str]]:
    """Say of each pair of sets, and of each set, how many images have voxels of another image.

    Args:
        datalist: the sets.
        contents: for each item of each set the hashes of its slices, as in `CaseFacts.content`.

    Yields:
        Whether it is about two sets, and the sentence, with the first such pair of files.

    Example:
        >>> sets = {"labeled": [{"image": "a.nii"}], "test": [{"image": "b.nii"}]}
        >>> next(shared_contents(sets, {"labeled": [["07", "a1"]], "test": [["a1"]]}))
        (True, '`test` must share no image with `labeled` but b.nii has the voxels of a.nii in 1 of its 1 slices')
    """
    seen: dict[str, tuple[str, list[str]]] = {}
    found: dict[tuple[str, str], list[str]] = {}
    for name, items in datalist.items():
        for item, hashes in zip(items, contents[name]):
            paths = image_paths(item)
            own = (name, paths)
            firsts = [seen.setdefault(one, own) for one in hashes]
            others = [first for first in firsts if first is not own and first[1] != paths]
            for other, its in others[:1]:
                sentence = f"{paths[0]} has the voxels of {its[0]} in {len(others)} of its {len(hashes)} slices"
                found.setdefault((other, name), []).append(sentence)
    for (other, name), sentences in found.items():
        more = f", and so {len(sentences) - 1} more" if len(sentences) > 1 else ""
        if other == name:
            yield False, f"`{name}` has images twice: {sentences[0]}{more}"
        else:
            yield True, f"`{name}` must share no image with `{other}` but {sentences[0]}{more}"
