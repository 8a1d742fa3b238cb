"""Segment a scan with the exported 2D student. Needs only MONAI and torch, neither this package nor the bundle.

    python torchscript_inference.py model.ts scan.nii.gz 256 segmentations/

256 is the `image_size` of the student's training (64 for the phantom's student). Slices lie along the scan's last axis.
"""

import sys

import torch
from monai.inferers import SliceInferer
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureTyped,
    Invertd,
    LoadImaged,
    Resized,
    SaveImaged,
    ScaleIntensityd,
)


def main(model, scan, size, output_dir):
    size = int(size)
    student = torch.jit.load(model, map_location="cpu").eval()
    before = Compose(
        [
            LoadImaged("image", ensure_channel_first=True),
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
    main(*sys.argv[1:])
