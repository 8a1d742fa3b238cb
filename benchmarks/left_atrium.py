"""
The left atrium in 3D: 8 labeled cases, UA-MT with SKD and without it, the supervised student, and the whole method.

    KNOWSAM_LA_DIR=/data/LA python benchmarks/left_atrium.py --time
    KNOWSAM_LA_DIR=/data/LA python benchmarks/left_atrium.py --seeds 0 1     # hours on two CPU cores
    KNOWSAM_LA_DIR=/data/LA python benchmarks/left_atrium.py --published     # as published; needs a GPU and SAM

On a CPU: a third of the resolution, patches of 32 x 32 x 32, narrow networks, 1,200 iterations, and the stand-in, which
is **not SAM**, at 64 x 64 with 4 slices of each volume a step. Measured on whole volumes of the validation cases.
"""

from __future__ import annotations

import argparse
import json

from grid import ADAMW, WITHOUT_SAM, Row, data_folder, print_times, run_all

UNET = {
    "_target_": "knowsam_monai.networks.UNet",
    "spatial_dims": 3,
    "in_channels": "@in_channels",
    "out_channels": "@num_classes",
    "channels": "@channels",
}
ROWS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "supervised": (("network_plain", "supervised"), WITHOUT_SAM),
    "UA-MT": (("network_plain", "ua_mt"), WITHOUT_SAM),
    "UA-MT + SKD": (("network_plain", "ua_mt"), {}),
    "KnowSAM": ((), WITHOUT_SAM),
    "KnowSAM + SKD": ((), {}),
}


def a_third_of_the_resolution(keys: list[str], mode: list[str]) -> dict[str, object]:
    """Resampling for the UA-MT pack, which has no spacing: a voxel counts as 1. Dice is still on the full grid."""
    pixdim = [3.0, 3.0, 2.75]  # the pack's 88 slices become 33
    return {"_target_": "Spacingd", "keys": keys, "pixdim": pixdim, "mode": mode, "allow_missing_keys": True}


CPU: dict[str, object] = {
    "sam_variant": "stand_in",
    "sam_image_size": 64,
    "sam_slices": 4,
    "image_size": [32, 32, 32],
    "train#preprocessing#transforms#4": a_third_of_the_resolution(["image", "label"], ["bilinear", "nearest"]),
    "validate#preprocessing#transforms#4": a_third_of_the_resolution(["image"], ["bilinear"]),
    "channels": [8, 16, 32, 64, 128],
    "aggregation_channels": [4, 4, 8],
    "window_overlap": 0.25,
    "lr": 0.002,
    "optimizer": ADAMW,
    "max_iterations": 1200,
    "epoch_length": 150,
    "num_workers": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--published", action="store_true", help="the bundle's own settings, for GPUs")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time on a CPU")
    parser.add_argument("--time", action="store_true", help="only measure seconds an iteration of each row")
    options = parser.parse_args()
    shared: dict[str, object] = {"labeled_patients": 8}
    if options.published:
        shared["epoch_length"] = 500
    else:
        shared |= CPU
    grid = []
    for seed in options.seeds:
        for name in options.only:
            overlays, own = ROWS[name]
            if overlays and not options.published:  # a network with the dropout that UA-MT needs, as narrow
                own = {**own, "network_def": json.dumps(UNET)}
            grid.append((Row(name, overlays, {**shared, **own}, "knowsam_la"), seed))
    table, data = f"la_8_{'published' if options.published else 'cpu'}", data_folder("KNOWSAM_LA_DIR")
    if options.time:
        return print_times(table, grid, data)
    run_all(table, grid, data, jobs=options.jobs)


if __name__ == "__main__":
    main()
