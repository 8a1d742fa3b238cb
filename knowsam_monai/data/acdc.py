"""The published ACDC split by patient, for the official release and the SSL4MIS pack of h5 files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from knowsam_monai.data.split import existing_file, listed_names, split_training, unknown_folder, without_labels
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.files import expand_path


def _patients(numbers: str) -> tuple[str, ...]:
    return tuple(f"patient{number}" for number in numbers.split())


# The order matters: a protocol with n labeled patients uses the first n.
ACDC_TRAINING_PATIENTS = _patients(
    "099 038 050 100 058 021 049 020 072 040 060 089 004 056 098 096 031 018 094 047 048 055 097 074 043 "
    "041 063 037 095 054 026 088 032 069 006 071 012 073 061 017 025 010 057 029 051 005 036 046 062 034 "
    "076 092 070 077 067 003 091 016 014 044 042 090 053 027 035 086 023 009 079 015"
)
ACDC_VALIDATION_PATIENTS = _patients("028 085 082 087 019 030 078 045 002 039")
ACDC_TEST_PATIENTS = _patients("011 013 084 033 093 022 068 024 083 081 080 001 007 066 008 065 075 064 059 052")
# Number of labeled slices of the SSL4MIS pack for each protocol.
ACDC_LABELED_SLICES = {3: 68, 7: 136, 21: 396, 70: 1312}
# Supported folder layouts, for error messages.
ACDC_FORMS = (
    "the official ACDC release (with training/patient001/Info.cfg)",
    "the SSL4MIS pack of ACDC (with data/slices/*.h5)",
)


def acdc_datalist(
    dataset_dir: str | Path, labeled_patients: int = 7, holdout_patients: int = 0
) -> dict[str, list[dict]]:
    """List the published split of 70/10/20 ACDC patients, with labels for the first `labeled_patients` of the 70.

    Two formats are supported. The official release (`training/patient001/Info.cfg`, `patient001_frame01.nii.gz`,
    `patient001_frame01_gt.nii.gz`) has one ED and one ES volume per patient. The SSL4MIS pack
    (`data/slices/patient001_frame01_slice_0.h5`, `data/patient001_frame01.h5`) has slices for training and volumes for
    validation. The `testing` folder of the official release (patients 101 to 150) is not part of the published split
    and is not read.

    Args:
        dataset_dir: the release's folder, its `training` folder, or the pack's folder.
        labeled_patients: number of patients with labels: 3, 7 or 21 (published), or all 70.
        holdout_patients: number of patients, from the end of the published training order, to use for validation
            instead of training, so that you can tune without the validation set.

    Returns:
        `labeled`, `unlabeled`, `validation` and `test` lists of items `{"image", "label", "patient", "frame"}`, plus
        `"slice"` for slice files. Unlabeled items have no `"label"`. `test` is empty if the folder has none of its
        patients.

    Raises:
        ValueError: if `labeled_patients` is not a published protocol, or if the folder has neither format.
        FileNotFoundError: if a file of the split is missing; the message names the first one.

    Example:
        >>> from knowsam_monai.data import acdc_datalist
        >>> items = acdc_datalist("/data/ACDC", labeled_patients=7)      # doctest: +SKIP
        >>> len(items["labeled"]), len(items["unlabeled"])               # doctest: +SKIP
        (136, 1176)

    Reference:
        Bernard et al., IEEE TMI 2018 (ACDC); the split is from https://github.com/HiLab-git/SSL4MIS.
    """
    labeled, unlabeled, heldout = split_training(
        ACDC_TRAINING_PATIENTS, labeled_patients, holdout_patients, ACDC_LABELED_SLICES
    )
    found = find_acdc(dataset_dir)
    if found is None:
        raise unknown_folder(dataset_dir, ACDC_FORMS)
    form, root = found
    pack = form == "pack"
    patient_volumes = _pack_volumes if pack else _official_volumes
    patient_slices = _pack_slices(root) if pack else {}

    def train_items(patients: Sequence[str]) -> list[dict]:
        return [item for p in patients for item in (patient_slices[p] if pack else patient_volumes(root, p))]

    if not heldout:
        validation = [item for p in ACDC_VALIDATION_PATIENTS for item in patient_volumes(root, p)]
    elif pack:
        validation = [item for p in heldout for item in _stacked_slices(patient_slices[p])]
    else:
        validation = train_items(heldout)
    datalist = {
        "labeled": train_items(labeled),
        "unlabeled": without_labels(train_items(unlabeled)),
        "validation": validation,
        "test": _test_items(root, pack, patient_volumes),
    }
    if pack and len(datalist["labeled"]) != ACDC_LABELED_SLICES[labeled_patients]:
        raise KnowSAMValueError(
            f"`dataset_dir` must contain the {ACDC_LABELED_SLICES[labeled_patients]} slices of the first "
            f"{labeled_patients} training patients but {root} contains {len(datalist['labeled'])} of them; unpack the "
            "SSL4MIS data again."
        )
    return datalist


def find_acdc(dataset_dir: str | Path) -> tuple[str, Path] | None:
    """The format of an ACDC folder, "official" or "pack", and the folder of its patients or lists; None if unknown."""
    root = Path(expand_path(dataset_dir, "dataset_dir"))
    if not os.path.isdir(root):
        return None
    for folder in (root, root / "training", root / "database" / "training"):
        if any(folder.glob("patient*/Info.cfg")):
            return "official", folder
    return ("pack", root) if any((root / "data" / "slices").glob("*.h5")) else None


def _existing(path: Path) -> str:
    return existing_file(path, "the complete ACDC training data")


def _official_volumes(root: Path, patient: str) -> list[dict]:
    info = Path(_existing(root / patient / "Info.cfg")).read_text(encoding="utf-8", errors="replace")
    items = []
    for phase in ("ED", "ES"):
        match = re.search(rf"^\s*{phase}\s*:\s*(\d+)", info, flags=re.MULTILINE)
        if match is None:
            raise KnowSAMValueError(
                f"`Info.cfg` must give the frame of {phase} but {root / patient / 'Info.cfg'} does not; restore it."
            )
        stem = f"{patient}_frame{int(match.group(1)):02d}"
        # Some copies of the release are unpacked to .nii.
        suffix = ".nii" if (root / patient / f"{stem}.nii").is_file() else ".nii.gz"
        image, label = (_existing(root / patient / f"{stem}{end}{suffix}") for end in ("", "_gt"))
        items.append({"image": image, "label": label, "patient": patient, "frame": phase})
    return items


def _pack_volumes(root: Path, patient: str) -> list[dict]:
    items = []
    for frame in ("frame01", "frame02"):
        path = _existing(root / "data" / f"{patient}_{frame}.h5")
        items.append({"image": path, "label": path, "patient": patient, "frame": frame})
    return items


def _pack_slices(root: Path) -> dict[str, list[dict]]:
    """Slice items of each training patient, ordered by frame and position in the stack."""
    folder, listed = root / "data" / "slices", root / "train_slices.list"
    if listed.is_file():
        paths = [Path(_existing(folder / f"{name.removesuffix('.h5')}.h5")) for name in listed_names(listed)]
    else:
        paths = sorted(folder.glob("*.h5"))
    slices: dict[str, list[dict]] = {patient: [] for patient in ACDC_TRAINING_PATIENTS}
    for path in paths:
        match = re.fullmatch(r"(patient\d{3})_(frame\d{2})_slice_(\d+)", path.stem)
        if match and match.group(1) in slices:
            patient, frame, index = match.group(1), match.group(2), int(match.group(3))
            slices[patient].append(
                {"image": str(path), "label": str(path), "patient": patient, "frame": frame, "slice": index}
            )
    for patient, items in slices.items():
        items.sort(key=lambda item: (item["frame"], item["slice"]))
        if not items:
            _existing(folder / f"{patient}_frame01_slice_0.h5")
    return slices


def _stacked_slices(slices: list[dict]) -> list[dict]:
    """Volume items of a training patient; each lists its slice files, which are read as one stack."""
    items = []
    for frame in dict.fromkeys(item["frame"] for item in slices):
        files = [item["image"] for item in slices if item["frame"] == frame]
        items.append({"image": files, "label": files, "patient": slices[0]["patient"], "frame": frame})
    return items


def _test_items(root: Path, pack: bool, patient_volumes) -> list[dict]:
    """The test volumes; none if the folder has no test patient (the pack is often shared without them)."""
    if pack:
        present = any((root / "data" / f"{p}_frame01.h5").exists() for p in ACDC_TEST_PATIENTS)
    else:
        present = any((root / p).exists() for p in ACDC_TEST_PATIENTS)
    return [item for p in ACDC_TEST_PATIENTS for item in patient_volumes(root, p)] if present else []
