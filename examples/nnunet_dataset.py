"""Write an nnU-Net raw data set of labeled and unlabeled scans; unlabeled scans have the ignore label in every voxel.

    python nnunet_dataset.py DATASET CHANNEL CLASSES SCANS LABELS [UNLABELED]
    python nnunet_dataset.py Dataset501_Heart MR rv,myo,lv scans/ labels/ unlabeled/

Scans and labels are NIfTI files of the same names. The split has five folds of the labeled cases. nnU-Net draws each
entry equally often, so labeled cases are repeated until half of the training cases have a label.
"""

import json
import os
import sys
from pathlib import Path

import SimpleITK as sitk


def name_of(path):
    return path.name.removesuffix(".gz").removesuffix(".nii")


def write_case(raw, scan, label, ignore):
    image = sitk.ReadImage(str(scan))
    if label is None:
        segmentation = sitk.Image(image.GetSize(), sitk.sitkUInt8) + ignore
        segmentation.CopyInformation(image)
    else:
        segmentation = sitk.Cast(sitk.ReadImage(str(label)), sitk.sitkUInt8)
    sitk.WriteImage(image, str(raw / "imagesTr" / f"{name_of(scan)}_0000.nii.gz"))
    sitk.WriteImage(segmentation, str(raw / "labelsTr" / f"{name_of(scan)}.nii.gz"))


def main(dataset, channel, classes, scans, labels, unlabeled=None, num_folds=5):
    raw = Path(os.environ["nnUNet_raw"], dataset)
    preprocessed = Path(os.environ["nnUNet_preprocessed"], dataset)
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True, exist_ok=True)
    names = ["background", *classes.split(","), "ignore"]
    labeled = sorted(Path(labels).glob("*.nii*"))
    others = [] if unlabeled is None else sorted(Path(unlabeled).glob("*.nii*"))
    for label in labeled:
        write_case(raw, Path(scans, label.name), label, ignore=len(names) - 1)
    for scan in others:
        write_case(raw, scan, None, ignore=len(names) - 1)
    facts = {"channel_names": {"0": channel}, "labels": {name: value for value, name in enumerate(names)}}
    facts |= {"numTraining": len(labeled) + len(others), "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(facts, indent=4))

    splits, cases = [], [name_of(label) for label in labeled]
    for fold in range(min(num_folds, len(cases))):
        train = [case for i, case in enumerate(cases) if i % num_folds != fold]
        repeats = max(1, round(len(others) / len(train)))
        splits.append({"train": train * repeats + [name_of(scan) for scan in others], "val": cases[fold::num_folds]})
    (preprocessed / "splits_final.json").write_text(json.dumps(splits, indent=4))


if __name__ == "__main__":
    main(*sys.argv[1:])
