"""Segment a scan with the exported 2D student. Needs only MONAI and torch, neither this package nor the bundle.

    python torchscript_inference.py model.ts scan.nii.gz 256 segmentations/

256 is the `image_size` of the student's training (64 for the phantom's student). Slices are taken along the axis of the
largest spacing and turned as the bundle does; for a scan with three equal spacings, they are axial.
"""

import os
import sys

import nibabel
import torch
from monai.inferers import SliceInferer
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureTyped,
    Invertd,
    LoadImaged,
    Orientationd,
    Resized,
    SaveImaged,
    ScaleIntensityd,
)


def orientation(scan):
    """The axes in which slices come last: from left, back and down, and the slices as the file has them."""
    affine = nibabel.load(scan).affine
    spacing = nibabel.affines.voxel_sizes(affine).round(3).tolist()
    codes = nibabel.aff2axcodes(affine)
    axial = next(axis for axis, code in enumerate(codes) if code in "IS")
    thick = axial if spacing.count(max(spacing)) == 3 else spacing.index(max(spacing))
    pair = next(pair for pair in ("LR", "PA", "IS") if codes[thick] in pair)
    return "".join(code for code in "LPI" if code not in pair) + codes[thick]


def main(model, scan, size, output_dir):
    size = int(size)
    student = torch.jit.load(model, map_location="cpu").eval()
    before = Compose(
        [
            LoadImaged("image", ensure_channel_first=True),
            Orientationd("image", axcodes=orientation(scan), labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            ScaleIntensityd("image"),
            Resized("image", spatial_size=(size, size, -1), mode="trilinear"),
            EnsureTyped("image", dtype=torch.float32),
        ]
    )
    after = Compose(
        [
            Invertd("pred", transform=before, orig_keys="image", nearest_interp=False),
            AsDiscreted("pred", argmax=True),
            SaveImaged("pred", output_dir=output_dir, output_postfix="seg", separate_folder=False),
        ]
    )
    item = before({"image": scan})
    with torch.no_grad():
        logits = SliceInferer(roi_size=(size, size), spatial_dim=2, sw_batch_size=8)(item["image"][None], student)
    return after({**item, "pred": logits[0].softmax(0)})


if __name__ == "__main__":
    if len(sys.argv) != 5 or not sys.argv[3].isdecimal():
        sys.exit("usage: python torchscript_inference.py MODEL.ts SCAN.nii.gz IMAGE_SIZE OUTPUT_FOLDER")
    for path in sys.argv[1:3]:
        if not os.path.isfile(path):
            sys.exit(f"error: {path} does not exist; give an exported student (TorchScript) and a NIfTI scan.")
    main(*sys.argv[1:])
