"""
Validation Dice of a bundle with some of its parts on and off: trains each row and prints a table.

    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/accuracy.py knowsam          # one table, hours on two CPU cores
    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/accuracy.py tuning --seeds 0 1
    python benchmarks/accuracy.py phantom --seeds 0 1 2
    KNOWSAM_LA_DIR=/data/LA python benchmarks/accuracy.py left_atrium          # hours on two CPU cores
    KNOWSAM_LA_DIR=/data/LA python benchmarks/accuracy.py left_atrium_published   # as published; needs a GPU and SAM
    python benchmarks/accuracy.py knowsam --only "without SAM" --print        # the command line of a row, nothing runs

A row is one run of the bundle's command line, in its own process. Finished rows are kept in benchmarks/output and not
run again, so an interrupted table resumes. "last" is the Dice of the last weights, the number to compare. "best" is the
best validation, chosen on the same volumes it is reported on.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "output"
UNET = {"_target_": "knowsam_monai.networks.UNet", "in_channels": "@in_channels", "out_channels": "@num_classes"}
PLAIN_UNET: dict[str, object] = {
    "network_def": json.dumps(UNET),
    "train#method#_disabled_": True,  # no co-training of two views
    "mixing_weight": 0,
}
WITHOUT_SAM = {"use_sam": False}
ADAMW = json.dumps(
    {
        "_target_": "torch.optim.AdamW",
        "params": "$@network.parameters()",
        "lr": "@lr",
        "weight_decay": "@weight_decay",
    }
)
SUPERVISED = {**PLAIN_UNET, **WITHOUT_SAM, "unlabeled_batch_size": 0}


def distillation(temperature: float, gate: str, tolerance: float = 0.1) -> dict[str, object]:
    """A plain U-Net taught only by SAM and by its labeled rows."""
    return {
        **PLAIN_UNET,
        "distillation_temperature": temperature,
        "distillation_gate": gate,
        "distillation_gate_tolerance": tolerance,
    }


# bundle -> environment variable of its data, and the path that --print shows without it
DATA = {"knowsam_acdc": ("KNOWSAM_ACDC_DIR", "/data/ACDC"), "knowsam_la": ("KNOWSAM_LA_DIR", "/data/LA")}
# the student of rows with overlays is MONAI's V-Net, as published
LEFT_ATRIUM: dict[str, dict[str, object]] = {
    "supervised": {"overlays": ("network_plain", "supervised"), **WITHOUT_SAM},
    "UA-MT": {"overlays": ("network_plain", "ua_mt"), **WITHOUT_SAM},
    "UA-MT + SKD": {"overlays": ("network_plain", "ua_mt")},
    "KnowSAM, without SAM": WITHOUT_SAM,
    "KnowSAM": {},
}
# on a CPU it is one of KnowSAM's own views, which has the dropout that UA-MT needs
UNET_3D = {"network_def": {**UNET, "spatial_dims": 3, "channels": "@channels"}}
LEFT_ATRIUM_ON_A_CPU = {row: {**(UNET_3D if "overlays" in keys else {}), **keys} for row, keys in LEFT_ATRIUM.items()}


def a_third_of_the_resolution(keys: list[str], mode: list[str]) -> dict[str, object]:
    """Resampling for the UA-MT pack, which has no spacing: a voxel counts as 1. Dice is still on the full grid."""
    pixdim = [3.0, 3.0, 2.75]  # the pack's 88 slices become 33
    return {"_target_": "Spacingd", "keys": keys, "pixdim": pixdim, "mode": mode, "allow_missing_keys": True}


# table -> (keys of all rows, row -> its own keys)
TABLES: dict[str, tuple[dict[str, object], dict[str, dict[str, object]]]] = {
    "knowsam": (
        {
            "labeled_patients": 7,
            "sam_variant": "stand_in",
            "sam_checkpoint": "$None",
            "image_size": 128,
            "labeled_batch_size": 4,
            "unlabeled_batch_size": 4,
            "max_iterations": 2000,
            "epoch_length": 500,
            "num_workers": 0,
            "distillation_gate": "validation",
        },
        {
            "KnowSAM": {},
            "KnowSAM, without SAM": WITHOUT_SAM,
            "supervised U-Net": SUPERVISED,
            "KnowSAM, bf16": {"cpu_autocast": True},
            "KnowSAM, stand-in": {"sam_checkpoint": "procedural"},
            "KnowSAM, stand-in, bf16": {"sam_checkpoint": "procedural", "cpu_autocast": True},
            "KnowSAM, without SAM, bf16": {**WITHOUT_SAM, "cpu_autocast": True},
            "supervised U-Net, bf16": {**SUPERVISED, "cpu_autocast": True},
        },
    ),
    # on held-out training patients, so that the validation patients choose nothing
    "tuning": (
        {
            "labeled_patients": 3,
            "holdout_patients": 10,
            "sam_variant": "stand_in",
            "sam_checkpoint": "$None",
            "image_size": 64,
            "labeled_batch_size": 4,
            "unlabeled_batch_size": 4,
            "max_iterations": 600,
            "epoch_length": 150,
            "num_workers": 0,
            "cpu_autocast": True,
        },
        {
            "without SKD": {**PLAIN_UNET, **WITHOUT_SAM},
            "T = 1, no gate": distillation(1, "none"),
            "T = 2, no gate": distillation(2, "none"),
            "T = 10, no gate": distillation(10, "none"),
            "T = 2, gate of tolerance 0.05": distillation(2, "validation", 0.05),
            "T = 2, gate of tolerance 0.1": distillation(2, "validation", 0.1),
            "T = 2, gate of tolerance 0.2": distillation(2, "validation", 0.2),
            "T = 10, gate of tolerance 0.1": distillation(10, "validation", 0.1),
        },
    ),
    # the same with the stand-in, for slow CPUs
    "tuning_stand_in": (
        {
            "labeled_patients": 3,
            "holdout_patients": 10,
            "sam_variant": "stand_in",
            "image_size": 128,
            "labeled_batch_size": 4,
            "unlabeled_batch_size": 4,
            "overlays": ("network_plain", "supervised"),
            "network_def#channels": [8, 16, 32, 64, 128],
            "lr": 0.002,
            "optimizer": ADAMW,
            "max_iterations": 400,
            "epoch_length": 100,
            "num_workers": 0,
            "distillation_gate": "agreement",
            "distillation_start": 100,
        },
        {
            "without SKD": {**WITHOUT_SAM, "unlabeled_batch_size": 0},
            "KL on all rows, as published": {},
            "KL on unlabeled rows": {"taught_rows": "unlabeled"},
            "KL and Dice on all rows": {"distillation_dice_weight": 1.0},
            "KL and Dice on unlabeled rows": {"distillation_dice_weight": 1.0, "taught_rows": "unlabeled"},
        },
    ),
    # 8 labeled cases; a third of the resolution, a smaller patch, narrower networks, fewer iterations than published
    "left_atrium": (
        {
            "bundle": "knowsam_la",
            "labeled_patients": 8,
            "sam_variant": "stand_in",
            "sam_checkpoint": "procedural",
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
            "distillation_gate": "agreement",
            "distillation_dice_weight": 1.0,
            "distillation_start": 300,
            "mixing_start": 900,  # of 1,200; from a quarter on, as published, it held a young student back
            "taught_rows": "unlabeled",
            "max_iterations": 1200,
            "epoch_length": 300,
            "num_workers": 0,
        },
        LEFT_ATRIUM_ON_A_CPU,
    ),
    "left_atrium_published": ({"bundle": "knowsam_la", "labeled_patients": 8}, LEFT_ATRIUM),
    "phantom": (
        {"distillation_gate": "validation"},
        {"KnowSAM": {}, "KnowSAM, bf16": {"cpu_autocast": True}, "KnowSAM, without SAM": WITHOUT_SAM},
    ),
}


def command_of(table: str, row: str, seed: int) -> tuple[list[str], Path]:
    """The bundle's command line of a row, and the folder it writes to."""
    shared, rows = TABLES[table]
    folder = (
        OUTPUT / table / f"{row.replace(' = ', '').replace(' + ', '_').replace(', ', '_').replace(' ', '_')}_seed{seed}"
    )
    keys: dict[str, object] = {**shared, **rows[row], "seed": seed, "output_dir": folder, "ckpt_dir": folder}
    bundle, overlays = keys.pop("bundle", "knowsam_acdc"), keys.pop("overlays", ())
    if table != "phantom":
        variable, example = DATA[bundle]
        keys["dataset_dir"] = os.environ.get(variable, example)
    files = [f"bundles/{bundle}/configs/{name}.json" for name in ("train", *overlays)]
    command = ["-m", "monai.bundle", "run", "--config_file", str(files) if overlays else files[0]]
    return [*command, *(word for key, value in keys.items() for word in (f"--{key}", str(value)))], folder


def train(table: str, row: str, seed: int) -> dict[str, float]:
    """Dice and minutes of a row; trains it unless it is finished."""
    command, folder = command_of(table, row, seed)
    settings = {key: str(value) for key, value in {**TABLES[table][0], **TABLES[table][1][row]}.items()}
    finished = folder / "finished.json"
    if not finished.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with open(folder / "log.txt", "w") as log:
            status = subprocess.run(
                [sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        if status != 0:
            raise SystemExit(f"`{row}` of seed {seed} ended with exit code {status}; see {folder / 'log.txt'}.")
        facts = {"minutes": (time.perf_counter() - start) / 60, "settings": settings}
        finished.write_text(json.dumps(facts))
    facts = json.loads(finished.read_text())
    if facts["settings"] != settings:
        raise SystemExit(f"`{row}` of seed {seed} was trained with other settings; to train it again, delete {folder}.")
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    dice = [float(one["val_mean_dice"]) for one in rows]
    teacher = rows[-1].get("val_teacher_dice")
    result = {"last": dice[-1], "best": max(dice), "minutes": facts["minutes"]}
    return {**result, "teacher": float(teacher)} if teacher else result


def line_of(row: str, results: list[dict[str, float]]) -> str:
    """A row of the table: the mean over the seeds, and every seed's last Dice."""
    means = {key: statistics.mean(r[key] for r in results) for key in results[0]}
    teacher = f"{means['teacher']:.3f}" if "teacher" in means else "-"
    seeds = ", ".join(f"{r['last']:.3f}" for r in results)
    return f"| {row} | {means['last']:.3f} | {seeds} | {means['best']:.3f} | {teacher} | {means['minutes']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows to run; default: all of the table")
    parser.add_argument("--print", action="store_true", help="print the rows' command lines and run nothing")
    args = parser.parse_args()
    rows = args.only or list(TABLES[args.table][1])
    unknown = [row for row in rows if row not in TABLES[args.table][1]]
    if unknown:
        parser.error(f"row must be one of {', '.join(TABLES[args.table][1])} but is {unknown[0]}")
    if args.print:
        for row in rows:
            print("python", shlex.join(command_of(args.table, row, args.seeds[0])[0]))
        return
    print("| row | last | last, each seed | best | teacher, last | minutes |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for row in rows:
        print(line_of(row, [train(args.table, row, seed) for seed in args.seeds]), flush=True)


if __name__ == "__main__":
    main()
