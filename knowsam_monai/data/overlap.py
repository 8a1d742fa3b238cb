"""Overlaps between the sets of a data list: files, patients, or voxels."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache


def image_paths(item: Mapping, key: str = "image") -> list[str]:
    """The files of an item's image or label: a single file, or one for each channel or slice."""
    value = item.get(key, [])
    return [str(path) for path in (value if isinstance(value, (list, tuple)) else [value])]


def shared_names(datalist: Mapping[str, Sequence[dict]]) -> Iterator[str]:
    """Find image files in two sets, and patients in training and in validation or test.

    Names of patients are compared without case and spaces. Labeled and unlabeled items may share a patient, since only
    some slices of a scan may be labeled.

    Example:
        >>> next(shared_names({"labeled": [{"image": "a.nii"}], "test": [{"image": "a.nii"}]}))
        '`test` must share no image with `labeled` but both list a.nii'
    """
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    reported = set()
    real = _real_paths()
    for name, items in datalist.items():
        role = "labeled` or `unlabeled" if name in ("labeled", "unlabeled") else name
        for item in items:
            entries = [("image", real(image), name, image) for image in image_paths(item)]
            patient = patient_key(item.get("patient"))
            if patient:
                entries.append(("patient", patient, role, repr(item["patient"])))
            for kind, key, set_name, text in entries:
                other, other_text = seen.setdefault((kind, key), (set_name, text))
                if other != set_name and (kind, key, set_name) not in reported:
                    reported.add((kind, key, set_name))
                    verb = "list" if kind == "image" else "have"
                    spelling = (
                        f", spelled {other_text} in `{other}`" if kind == "patient" and other_text != text else ""
                    )
                    yield f"`{set_name}` must share no {kind} with `{other}` but both {verb} {text}{spelling}"


def labels_as_images(datalist: Mapping[str, Sequence[dict]]) -> Iterator[str]:
    """Find files that are both label and image. An h5 file may be both, since it has a dataset for each.

    Example:
        >>> next(labels_as_images({"labeled": [{"image": "a.nii", "label": "a.nii"}]}))
        '`label` must not be an image file but `labeled` has a.nii, an image of `labeled`'
    """
    real = _real_paths()
    images = {real(path): name for name, items in datalist.items() for item in items for path in image_paths(item)}
    reported = set()
    for name, items in datalist.items():
        for path in (path for item in items for path in image_paths(item, "label")):
            image_set = None if path.lower().endswith((".h5", ".hdf5")) else images.get(real(path))
            if image_set is not None and path not in reported:
                reported.add(path)
                yield f"`label` must not be an image file but `{name}` has {path}, an image of `{image_set}`"


def patient_key(patient: object) -> str:
    """Normalize a patient's name: case, spaces and Unicode form are ignored. None and nan, as of empty cells, give "".

    Example:
        >>> patient_key("Patient 01 ") == patient_key("patient01")
        True
    """
    if patient is None or patient != patient:
        return ""
    return "".join(unicodedata.normalize("NFKC", str(patient)).casefold().split())


def _real_paths() -> Callable[[str], str]:
    """A version of `os.path.realpath` that resolves each folder only once."""
    real_folder = cache(os.path.realpath)

    def real(path: str) -> str:
        folder, name = os.path.split(path)
        return os.path.realpath(path) if os.path.islink(path) else os.path.join(real_folder(folder), name)

    return real


def shared_contents(
    datalist: Mapping[str, Sequence[dict]], contents: Mapping[str, Sequence[Sequence[str]]]
) -> Iterator[tuple[bool, str]]:
    """Find images that share voxels with another image, for each pair of sets and within each set.

    Args:
        datalist: the sets.
        contents: for each item of each set, the hashes of its slices, as in `CaseFacts.content`.

    Yields:
        Whether two sets are involved, and a sentence with the first pair of files.

    Example:
        >>> sets = {"labeled": [{"image": "a.nii"}], "test": [{"image": "b.nii"}]}
        >>> next(shared_contents(sets, {"labeled": [["07", "a1"]], "test": [["a1"]]}))
        (True, '`test` must share no image with `labeled` but b.nii has the voxels of a.nii in 1 of its 1 slices')
    """
    seen: dict[str, tuple[str, list[str], int]] = {}
    found: dict[tuple[str, str], list[str]] = {}
    for name, items in datalist.items():
        for item, hashes in zip(items, contents[name]):
            paths = image_paths(item)
            own = (name, paths, len(hashes))
            first_uses = [seen.setdefault(slice_hash, own) for slice_hash in hashes]
            others = [first for first in first_uses if first is not own and first[1] != paths]
            for other, other_paths, num_slices in others[:1]:
                if len(hashes) == num_slices == 1:
                    sentence = f"{paths[0]} is a duplicate of {other_paths[0]}"
                else:
                    shared = f"in {len(others)} of its {len(hashes)} slices"
                    sentence = f"{paths[0]} has the voxels of {other_paths[0]} {shared}"
                found.setdefault((other, name), []).append(sentence)
    for (other, name), sentences in found.items():
        more = f", and the same holds for {len(sentences) - 1} more" if len(sentences) > 1 else ""
        if other == name:
            yield False, f"`{name}` has duplicate images: {sentences[0]}{more}"
        else:
            yield True, f"`{name}` must share no image with `{other}` but {sentences[0]}{more}"
