"""
Zero-shot Dice of `stand_in` with a box prompt, pretrained on procedural images.

    python -m benchmarks.zero_shot                                        # the phantom
    KNOWSAM_ACDC_DIR=/data/ACDC python -m benchmarks.zero_shot            # and ACDC
    KNOWSAM_LA_DIR=/data/LA python -m benchmarks.zero_shot                # and left atria
    python -m benchmarks.zero_shot --checkpoint some/stand_in.pt other.pt --image_size 64

No network has seen a medical image, and none is SAM. The prompt for each class of each slice is its true box, enlarged
by `--padding` pixels on each side. The single mask at logit 0 is compared with the class, and Dice is averaged over
slices, then classes. A mask that fills the box already has a high Dice; "box filled" is that baseline. Choose between
weights on the training patients.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.transforms import Resized

from knowsam_monai.data import LoadCased, ScaleVolumed, SplitSlicesd, cached_dataset, load_datalist
from knowsam_monai.teachers import build_sam
from pretraining.promptable_sam import decode, encode
from pretraining.prompts import BOTTOM_RIGHT, TOP_LEFT, boxes_of

HEART = ("right ventricle", "myocardium", "left ventricle")
ATRIUM = ("left atrium",)
DATA = {  # variable with the folder, labeled patients, list of patients, classes
    "phantom": (None, 7, "validation", HEART),
    "ACDC, training patients": ("KNOWSAM_ACDC_DIR", 70, "labeled", HEART),
    "ACDC, validation patients": ("KNOWSAM_ACDC_DIR", 70, "validation", HEART),
    "LA, training cases": ("KNOWSAM_LA_DIR", 8, "labeled", ATRIUM),
    "LA, validation cases": ("KNOWSAM_LA_DIR", 8, "validation", ATRIUM),
}


def slices_of(items: list[dict], size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(image (1, size, size), label (1, size, size)) of each slice, preprocessed as in the 2D bundle."""
    keys = ["image", "label"]
    preprocessing = [
        LoadCased(keys, ensure_channel_first=True),
        ScaleVolumed("image"),
        SplitSlicesd(keys),
        Resized(keys, spatial_size=(size, size), mode=("bilinear", "nearest-exact")),
    ]
    return [
        (torch.as_tensor(x["image"]).float(), torch.as_tensor(x["label"]))
        for x in cached_dataset(items, preprocessing, progress=False)
    ]


@torch.no_grad()
def box_prompted_dice(
    sam: nn.Module | None, slices: list[tuple[torch.Tensor, torch.Tensor]], classes: Sequence[str], padding: int
) -> dict[str, float]:
    """Mean Dice of each class with its padded true box as prompt; without a network, Dice of the filled box."""
    dice = defaultdict(list)
    for image, label in slices:
        present = [c for c in range(1, len(classes) + 1) if (label == c).any()]
        if not present:
            continue
        masks = torch.cat([label == c for c in present])
        size = image.shape[-1]
        boxes = boxes_of(masks) + padding * torch.tensor([-1.0, -1.0, 1.0, 1.0])
        boxes = boxes.clamp(0, size - 1)
        if sam is None:
            y, x = torch.arange(size)[:, None], torch.arange(size)
            left, top, right, bottom = boxes[:, :, None, None].unbind(1)
            predicted = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
        else:
            logits, _ = decode(
                sam,
                embedding=encode(sam, image[None]),
                points=boxes.unflatten(1, (2, 2)),
                codes=torch.tensor([TOP_LEFT, BOTTOM_RIGHT]).expand(len(boxes), -1),
                mask_logits=torch.zeros(len(boxes), *sam.prompt_encoder.mask_input_size),
                has_mask=torch.zeros(len(boxes), dtype=torch.bool),
            )
            predicted = F.interpolate(logits[:, :1], size=(size, size), mode="bilinear")[:, 0] > 0
        overlap = 2 * (predicted & masks).sum(dim=(1, 2)) / (predicted.sum(dim=(1, 2)) + masks.sum(dim=(1, 2)))
        for number, value in zip(present, overlap.tolist()):
            dice[classes[number - 1]].append(value)
    means = {name: sum(values) / len(values) for name, values in dice.items()}
    return {**means, "mean": sum(means.values()) / len(means)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", nargs="+", default=["procedural"], help="'procedural', or files with weights of stand_in"
    )
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--padding", type=int, default=2, help="pixels added to each side of the true box")
    options = parser.parse_args()
    networks: dict[str, nn.Module | None] = {
        f"`stand_in`, {path}": build_sam("stand_in", options.image_size, path) for path in options.checkpoint
    }
    networks["box filled"] = None
    print(f"`{' '.join(['python -m benchmarks.zero_shot', *sys.argv[1:]])}`\n")
    print("| data | teacher, not SAM | mean | classes |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (variable, labeled_patients, section, classes) in DATA.items():
            dataset_dir = os.environ.get(variable) if variable else None
            if variable and not dataset_dir:
                continue
            items = load_datalist(dataset_dir, os.path.join(folder, "phantom"), labeled_patients)[section]
            slices = slices_of(items, options.image_size)
            for network, sam in networks.items():
                dice = box_prompted_dice(sam, slices, classes, options.padding)
                each = ", ".join(f"{key} {100 * dice[key]:.1f}" for key in classes)
                print(f"| {name}, {len(slices)} slices | {network} | {100 * dice['mean']:.1f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
