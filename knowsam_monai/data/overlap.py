"""What two sets of a data list must not share: a file, a patient, or the voxels of an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

__all__ = ["image_paths", "shared_contents", "shared_names"]


def image_paths(item: Mapping, key: str = "image") -> list[str]:
    """The files of an item's image, or of its label: one, or one for each channel or slice."""
    value = item.get(key, [])
    return [str(path) for path in (value if isinstance(value, (list, tuple)) else [value])]


def shared_names(datalist: Mapping[str, Sequence[dict]]) -> Iterator[str]:
    """Say each image file in two sets, and each named patient in training and in validation or test.

    Labelled and unlabelled items may be of one patient: slices of a scan of which some are labelled.

    Example:
        >>> next(shared_names({"labeled": [{"image": "a.nii"}], "test": [{"image": "a.nii"}]}))
        '`test` must share no image with `labeled` but both list a.nii'
    """
    seen: dict[tuple[str, str], str] = {}
    said = set()
    for name, items in datalist.items():
        role = "training" if name in ("labeled", "unlabeled") else name
        for item in items:
            named = [("image", str(Path(image).resolve()), name, f"list {image}") for image in image_paths(item)]
            if "patient" in item:
                named.append(("patient", str(item["patient"]), role, f"have {item['patient']!r}"))
            for kind, value, place, what in named:
                other = seen.setdefault((kind, value), place)
                if other != place and (kind, value, place) not in said:
                    said.add((kind, value, place))
                    yield f"`{place}` must share no {kind} with `{other}` but both {what}"


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
            firsts = [seen.setdefault(one, (name, paths)) for one in hashes]
            others = [first for first in firsts if first[1] != paths]
            for other, its in others[:1]:
                sentence = f"{paths[0]} has the voxels of {its[0]} in {len(others)} of its {len(hashes)} slices"
                found.setdefault((other, name), []).append(sentence)
    for (other, name), sentences in found.items():
        more = f", and so {len(sentences) - 1} more" if len(sentences) > 1 else ""
        if other == name:
            yield False, f"`{name}` has images twice: {sentences[0]}{more}"
        else:
            yield True, f"`{name}` must share no image with `{other}` but {sentences[0]}{more}"
