"""Synthetic data sets, short-axis cine MR or left atrium, for runs without real data."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from knowsam_monai.data.phantom_image import draw_patient
from knowsam_monai.data.phantom_left_atrium import draw_left_atrium
from knowsam_monai.errors import KnowSAMPermissionError, KnowSAMValueError, check_choice
from knowsam_monai.files import expand_path

logger = logging.getLogger(__name__)

# Increment if the drawn patients change; phantoms of other versions are replaced.
PHANTOM_VERSION = 1
# Default of the largest in-plane size, in voxels.
MAX_SIZES = {"short_axis": 128, "left_atrium": 64}
LIST_NAME = "dataset.json"


def write_phantom(
    folder: str | Path,
    num_labeled: int = 4,
    num_unlabeled: int = 12,
    num_validation: int = 4,
    num_test: int = 2,
    seed: int = 0,
    max_size: int | None = None,
    anatomy: str = "short_axis",
) -> Path:
    """Write synthetic patients as NIfTI with a MONAI data list `dataset.json`, and return the list's path.

    A short-axis patient has an ED and an ES volume with left ventricle (3), myocardium (2) and right ventricle (1),
    surrounded by lungs, liver, chest wall and vessels. A left-atrium patient has one late-enhancement volume with the
    blood of the left atrium and the beginning of its veins (1), other chambers of equal brightness, slabs of different
    gain, and scars in the wall. Position, size, rotation and contrast vary. The volumes have a bias field, noise,
    anisotropic spacing and an oblique orientation. Equal arguments give equal voxels. A complete phantom with equal
    arguments is kept. Otherwise the phantom is written to a temporary folder and then moved, so an interrupted run
    leaves no partial phantom. A phantom with other arguments is replaced, with a warning, unless the folder has other
    files.

    Args:
        folder: new, empty, or with an earlier phantom.
        num_labeled: number of labeled patients for training.
        num_unlabeled: number of patients without label files.
        num_validation: number of patients for validation.
        num_test: number of patients for testing.
        seed: seed of all patients.
        max_size: largest in-plane size in voxels; patients have 3/4 to 4/4 of it. Default: 128 for the short axis; 64
            for the left atrium, with a depth of 1/2 to 5/8 of it.
        anatomy: "short_axis" or "left_atrium".

    Raises:
        ValueError: if a count is negative, if no patient is labeled, if `anatomy` is unknown, or if `folder` is a file
            or has other files.
        PermissionError: if `folder` is not writable.

    Example:
        >>> from knowsam_monai.data import phantom_datalist, write_phantom
        >>> items = phantom_datalist(write_phantom("phantom"))     # doctest: +SKIP
    """
    counts = {"labeled": num_labeled, "unlabeled": num_unlabeled, "validation": num_validation, "test": num_test}
    if num_labeled < 1 or min(counts.values()) < 0:
        raise KnowSAMValueError(f"`num_labeled` must be at least 1 and all counts at least 0 but they are {counts}.")
    check_choice("anatomy", anatomy, tuple(MAX_SIZES))
    max_size = MAX_SIZES[anatomy] if max_size is None else max_size
    if max_size < 32:
        raise KnowSAMValueError(f"`max_size` must be at least 32 voxels but is {max_size}.")
    arguments = {
        "version": PHANTOM_VERSION,
        "anatomy": anatomy,
        "seed": seed,
        "max_size": max_size,
        "patients": counts,
    }
    folder = Path(expand_path(folder, "folder"))
    if _is_complete(folder, arguments):
        return folder / LIST_NAME
    _check_no_foreign_files(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            temporary.chmod(0o755)  # mkdtemp creates a private folder
            _write(temporary, counts, arguments)
            _move_into_place(temporary, folder, arguments)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise KnowSAMPermissionError(
            f"`folder` must be writable but {folder} is not ({error.strerror}); choose another folder."
        ) from error
    return folder / LIST_NAME


def phantom_datalist(list_path: str | Path) -> dict[str, list[dict]]:
    """Read the data list that `write_phantom` wrote, with absolute paths.

    Args:
        list_path: the `dataset.json` that `write_phantom` returned.

    Returns:
        `labeled`, `unlabeled`, `validation` and `test` lists of items; unlabeled items have no `"label"`.

    Example:
        >>> items = phantom_datalist("phantom/dataset.json")     # doctest: +SKIP
        >>> sorted(items["unlabeled"][0])                             # doctest: +SKIP
        ['frame', 'image', 'patient']
    """
    list_path = Path(list_path).resolve()
    datalist = json.loads(list_path.read_text(encoding="utf-8"))
    for name in datalist["phantom"]["patients"]:
        for item in datalist[name]:
            item.update({key: str(list_path.parent / item[key]) for key in ("image", "label") if key in item})
    return {name: datalist[name] for name in datalist["phantom"]["patients"]}


def is_phantom(list_path: str | Path) -> bool:
    """Whether `write_phantom` wrote a data list.

    Example:
        >>> is_phantom("/data/ACDC")
        False
    """
    return bool(_written(Path(list_path)))


def _written(list_path: Path) -> dict:
    """The data list that `write_phantom` wrote; empty if there is none, or another file."""
    try:
        datalist = json.loads(list_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return datalist if isinstance(datalist, dict) and "phantom" in datalist else {}


def _write(folder: Path, counts: dict[str, int], arguments: dict) -> None:
    draw = {"short_axis": draw_patient, "left_atrium": draw_left_atrium}[arguments["anatomy"]]
    datalist: dict = {"name": f"synthetic {arguments['anatomy'].replace('_', ' ')} MR phantom", "phantom": arguments}
    number = 0
    for name, count in counts.items():
        datalist[name] = []
        for _ in range(count):
            number += 1
            patient = f"phantom{number:03d}"
            (folder / patient).mkdir()
            frames = draw(seed=arguments["seed"], number=number, max_size=arguments["max_size"])
            for frame, (image, label, affine) in frames.items():
                item = {"image": f"{patient}/{patient}_{frame}.nii.gz", "patient": patient, "frame": frame}
                _save_nifti(folder / item["image"], image, affine)
                if name != "unlabeled":
                    item["label"] = f"{patient}/{patient}_{frame}_gt.nii.gz"
                    _save_nifti(folder / item["label"], label, affine)
                datalist[name].append(item)
    (folder / LIST_NAME).write_text(json.dumps(datalist, indent=1), encoding="utf-8")


def _move_into_place(temporary: Path, folder: Path, arguments: dict) -> None:
    """Rename the folder, unless another process has written the phantom, which may be in use."""
    if _is_complete(folder, arguments):
        return
    if is_phantom(folder / LIST_NAME):
        _check_no_foreign_files(folder)
        logger.warning("%s has a phantom with other arguments or of another version, which is replaced.", folder)
        shutil.rmtree(folder)
    try:
        os.replace(temporary, folder)
    except OSError:
        if not _is_complete(folder, arguments):
            raise


def _check_no_foreign_files(folder: Path) -> None:
    """A folder may only be replaced if it is new or empty, or if `write_phantom` wrote all its files."""
    if folder.is_file():
        raise KnowSAMValueError(f"`folder` must be a folder but {folder} is a file; choose another name.")
    parts = _written(folder / LIST_NAME).values()
    items = [item for part in parts if isinstance(part, list) for item in part]
    own = {item[key] for item in items for key in ("image", "label") if key in item} | ({LIST_NAME} if parts else set())
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    foreign = next((path for path in files if path.relative_to(folder).as_posix() not in own), None)
    if foreign is not None:
        raise KnowSAMValueError(
            f"`folder` must be empty or contain only an earlier phantom but {folder} contains {foreign.name}; "
            "choose another folder."
        )


def _save_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    import nibabel

    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    nibabel.save(image, path)


def _is_complete(folder: Path, arguments: dict) -> bool:
    if _written(folder / LIST_NAME).get("phantom") != arguments:
        return False
    datalist = phantom_datalist(folder / LIST_NAME)
    items = [item for name in arguments["patients"] for item in datalist[name]]
    return all(Path(item[key]).is_file() for item in items for key in ("image", "label") if key in item)
