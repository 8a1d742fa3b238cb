"""The usual left-atrium split by case, for the official 2018 challenge release and the UA-MT pack of h5 files."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from knowsam_monai.data.split import existing_file, listed_names, split_training, unknown_folder
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.files import expand_path

logger = logging.getLogger(__name__)

# The order matters: a protocol with n labeled cases uses the first n.
LEFT_ATRIUM_TRAINING_CASES = tuple(
    (
        "06SR5RBREL16DQ6M8LWS 0RZDK210BSMWAA6467LU 1D7CUD1955YZPGK8XHJX 1GU15S0GJ6PFNARO469W 1MHBF3G6DCPWHSKG7XCP "
        "23X6SY44VT9KFHR7S7OC 2XL5HSFSE93RMOJDRGR4 38CWS74285MFGZZXR09Z 3C2QTUNI0852XV7ZH4Q1 3DA0T2V6JJ2NLUAV6FWM "
        "4498CA6DZWELOXCBRYRF 45C45I6IXAFGNRO067W9 4CHFJGF6ZUM7CMZTNFQF 4EPVTT1HPA8U60CDUKXE 57SGAJMLCTCH92QUA0EE "
        "5BHTH9RHH3PQT913I59W 5FKQL4K14KCB72Y8YMC2 5HH0WPWIY06DLAFOBQ4M 5QFK2PMHNX7UALK52NNA 5UB5KFD2PK38Z4LS6W80 "
        "6799D6LEBH3NSRV1KH27 78NJ5YFQF72BGC8RO51C 7FUCNXB39F78WTOP5K71 8GYK8A9MBRC9TV0FVSRA 8M99G0JLAXG9GLPV0O8G "
        "8RE90C8H5DKF4V6HO8UU 8ZG2TRZ81MAWHZPN9KKG 9DCM2IB45SK6YKQNYUQY 9DHWWP5Y66VDMPXISZ13 9DQYTIU00I4JC0OEOKQQ "
        "A11O45O3NAXWM7T2H8CH A4R1S23KR0KU2WSYHK2X A5RNNK0A891WUSC2V624 AT5CRO5JUDBWD4RUPXSQ BNK95S2SJXEGSW7VAKYU "
        "BXJWOUYP2J3EN4U92517 BYSRSI3H4YTWKMM3MADP BZUFJX66T0W6ZPVTL9DU CB5P5W7X310NIIVU7UZV CBIJFVZ5L9BS0LKWE8YL "
        "CCGAKN4EDT72KC8TTJ76 CLXFYOBQDCVXQ9P7YC07 CMPXO4J23G58J53Q98SZ CZPMV6KWZ4I7IJJP9FOK DLKXBV73A55ZTSZ0QQI2 "
        "DQ5UYBGR5QP6L692QSG6 DYXSCIWHLSUOZIDDSZ40 E2ZMO66WGS74UKXTZPPQ EJ5V7SPR4961JWD6SS8V FGM5NIWN3URY4HF4WNUW "
        "GSC9KNY0VEZXFSGWNF25 HVE7DR3CUA2IM3RC6OMA HZZ4O0BRKF8S0YX3NNF7 I2VZ7N8H9QYNYT7ZZF1Y IDWWHGWJ5STOQXSDT6GU "
        "IIY6TYJMTJIZRIZLB9YW IJJY51YW3W4YJJ7DTVTK IQYKPTWXVV9H0IHB8YXC JEC6HJ7SQJXBKVREX03F JGFOLWJF7YCYD8DPHQNH "
        "K32FD6LRSUSSXGS1YUOX KM5RYAMP4P4ZP6XWP3Q2 KSNYHUBHHUJTYJ14UQZR LH4FVU3TQDEC87YGN6FL LJSDNMND9SHKM7Q4IRHJ "
        "MFTDVMBWFNQ3F5KHBRDR MJHV7F65TB2A76CQLOC3 MVKIPGBKTNSENNP1S4HB O5TSIKRD4AIB8K84WIR9 OIRDLE32TXZX942FVZMM "
        "P1OTI3IWJUIB5NRLULLH PVNXUK681N9BY14K4Z86 Q0MEX9ZIKAGJORSPLQ3Y Q7J0WYM695R9MA285ZW0 QZC1W0FNR19KJFLOCFLH "
        "R8ER97O9UUN77C02VE2J RSZY41MT2FGDKHWWL5L2 SN4LF8SGBSRQUPTDSX78 TDDI6L3Y0L9VVFP9MNFS UZUZZT2W9IUSHL6ASOX3"
    ).split()
)
LEFT_ATRIUM_TEST_CASES = tuple(
    (
        "UPT6DX9IQY9JAZ7HJKA7 UTBUJIWZMKP64E3N73YC ULHWPWKKLTE921LQLH1P V0MZOWJ6MU3RMRCV9EXR VDOF02M8ZHEAADFMS6NP "
        "VG4C826RAAKVMV9BQLVD VIXBEFTNVHZWKAKURJBN VQ2L3WM8KEVF6L44E6G9 WBG9WYZ1B25WDT5WAT8T WMDG2EFA6L2SNDZXIRU0 "
        "WNPKE0W404QE9AELX1LR WSJB9P4JCXUVHBOYFVWL WW8F5CO4S4K5IM5Z7EXX X18LU5AOBNNDMLTA0JZL XYDLYJ5CS19FDBVLJIPI "
        "Y7ZU0B2APPF54WG6PDMF YDKD1HVHSME6NVMA8I39 Z9GMG63CJLL0VW893BB1 ZIJLJAVQV3FJ6JSQOH1E ZQPMJ4XEC5A4BISD45P1"
    ).split()
)
LEFT_ATRIUM_LABELED = (4, 8, 16)
# Number of cases at the end of the training list to validate on, if there is no list of validation cases.
LEFT_ATRIUM_VALIDATION = 4
# Supported folder layouts, for error messages.
LEFT_ATRIUM_FORMS = (
    "the official left-atrium release (with <case>/lgemri.nrrd, also in `Training Set`)",
    "the UA-MT pack of left-atrium data (with <case>/mri_norm2.h5, also in `2018LA_Seg_Training Set`)",
)
CASE_FOLDERS = ("", "Training Set", "2018LA_Seg_Training Set")
# Image and label; an h5 file contains both.
FILES = {"official": ("lgemri.nrrd", "laendo.nrrd"), "pack": ("mri_norm2.h5", "mri_norm2.h5")}


def left_atrium_datalist(
    dataset_dir: str | Path, labeled_patients: int = 8, holdout_patients: int = 0
) -> dict[str, list[dict]]:
    """List the left-atrium cases, with labels for the first `labeled_patients` of the training list.

    Two formats are supported: the official release of the 2018 Atrial Segmentation Challenge (`<case>/lgemri.nrrd` and
    `laendo.nrrd`), which is preferred, and the UA-MT pack (`<case>/mri_norm2.h5`). `train.list`, `test.list` and
    `val.list` may be next to the cases or next to their folder; by default the published lists of 80 and 20 cases are
    used. The challenge's own 54 test cases are not part of this split.

    The literature has no validation set and often selects checkpoints on the test cases. Here the validation cases are
    those of `val.list`, or else the last 4 of the training list, which are then not used for training. They never
    include test cases.

    Args:
        dataset_dir: the folder of the cases, or its parent.
        labeled_patients: number of cases with labels: 4, 8 or 16 (of the usual 80).
        holdout_patients: number of cases, from the end of the training list, to validate on instead of training.

    Returns:
        `labeled`, `unlabeled`, `validation` and `test` lists of items `{"image", "label", "patient"}`. Unlabeled
        items have no `"label"`. `test` is empty if the folder has none of its cases.

    Raises:
        ValueError: if `labeled_patients` is not a usual protocol, if a list is too short or shares a case with another
            one, or if the folder has neither format.
        FileNotFoundError: if a file of the split is missing, such as a label; the message names the first one.

    Example:
        >>> from knowsam_monai.data import left_atrium_datalist
        >>> items = left_atrium_datalist("/data/LA", labeled_patients=8)     # doctest: +SKIP
        >>> len(items["labeled"]), len(items["unlabeled"])                   # doctest: +SKIP
        (8, 68)

    Reference:
        Xiong et al., Medical Image Analysis 2021 (the challenge); the split and the pack are from Yu et al.,
        MICCAI 2019, https://github.com/yulequan/UA-MT.
    """
    found = find_left_atrium(dataset_dir)
    if found is None:
        raise unknown_folder(dataset_dir, LEFT_ATRIUM_FORMS)
    form, folder = found
    validation = _listed(folder, "val.list")
    training = _listed(folder, "train.list") or [c for c in LEFT_ATRIUM_TRAINING_CASES if c not in validation]
    test = _listed(folder, "test.list") or LEFT_ATRIUM_TEST_CASES
    _check_disjoint({"train.list": training, "val.list": validation, "test.list": test})
    num_default = 0 if validation or holdout_patients else LEFT_ATRIUM_VALIDATION
    if labeled_patients in LEFT_ATRIUM_LABELED and num_default > len(training) - labeled_patients >= 0:
        raise KnowSAMValueError(
            f"`train.list` must have {num_default} validation cases in addition to {labeled_patients} labeled ones but "
            f"has {len(training)} cases; lower `labeled_patients` (for evaluation: to its training value), add cases, "
            "list the validation cases in val.list, or set `holdout_patients`."
        )
    labeled, unlabeled, heldout = split_training(
        training, labeled_patients, holdout_patients or num_default, LEFT_ATRIUM_LABELED
    )
    if form == "pack":
        logger.warning(
            "The UA-MT pack in %s is cropped around the true left atrium, including test cases: results of every "
            "method are better than on uncropped images.",
            folder,
        )
    return {
        "labeled": _items(folder, form, labeled),
        "unlabeled": _items(folder, form, unlabeled, labels=False),
        "validation": _items(folder, form, heldout or validation),
        "test": _items(folder, form, test if any((folder / case).exists() for case in test) else ()),
    }


def find_left_atrium(dataset_dir: str | Path) -> tuple[str, Path] | None:
    """The format of a left-atrium folder, "official" or "pack", and the folder of its cases; None if unknown."""
    root = Path(expand_path(dataset_dir, "dataset_dir"))
    if not os.path.isdir(root):
        return None
    for form, (image, _) in FILES.items():
        for name in CASE_FOLDERS:
            if any((root / name).glob(f"*/{image}")):
                return form, root / name
    return None


def _listed(folder: Path, name: str) -> list[str]:
    """Cases of a list file next to the cases or next to their folder; none without the file."""
    for path in (folder / name, folder.parent / name):
        if path.is_file():
            # Some lists have paths of files in the cases' folders.
            return [line.split("/")[0] for line in listed_names(path)]
    return []


def _check_disjoint(lists: dict[str, Sequence[str]]) -> None:
    seen: dict[str, str] = {}
    for name, cases in lists.items():
        for case in cases:
            if seen.get(case) == name:
                raise KnowSAMValueError(f"`{name}` must name each case once but names {case} twice; correct the list.")
            if case in seen:
                raise KnowSAMValueError(
                    f"`{name}` must share no case with `{seen[case]}` but both name {case}; correct the lists."
                )
            seen[case] = name


def _items(folder: Path, form: str, cases: Sequence[str], labels: bool = True) -> list[dict]:
    image, label = FILES[form]
    items = []
    for case in cases:
        item = {"image": existing_file(folder / case / image, "the image of every listed left-atrium case")}
        if labels:
            item["label"] = existing_file(
                folder / case / label, "the label of every labeled, validation and test case of the left atrium"
            )
        items.append({**item, "patient": case})
    return items
