"""
When does SKD help? The gain of a Mean Teacher student against the quality of a frozen network that teaches it.

    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/dose.py        # about four hours on one CPU core

The teachers are U-Nets like the student, trained with the labels of 3, 7, 21 or 49 patients of ACDC. Those of 21 and 49
patients know labels that the student does not have: an oracle, which stands for what a foundation model may bring. One
more has memorized its 3 patients (no augmentation), two were trained for 500 and 200 iterations only, and one has
random weights. Results are of the last weights on the 60 volumes of 30 patients that `hosts.py` uses, in
benchmarks/results/dose.csv.

Students have labels of 3 patients and images of 26 more. 20 other training patients, those of `choices.py`, are left to
the gate "validation". All 20 are among the 49 of the larger oracle, so with this teacher the gate measures it on its
own training data.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from grid import ADAMW, OUTPUT, WITHOUT_SAM, Row, acdc_lists, folder_of, last_weights, run_all

from knowsam_monai.networks import UNet

CHANNELS = [8, 16, 32, 64, 128]
SHARED: dict[str, object] = {
    "sam_variant": "stand_in",
    "sam_checkpoint": "$None",
    "image_size": 128,
    "labeled_batch_size": 4,
    "unlabeled_batch_size": 4,
    "network_def#channels": CHANNELS,
    "num_workers": 0,
    "cpu_autocast": True,
    "lr": 0.002,
    "optimizer": ADAMW,
}
TEACHERS = {  # labeled patients and iterations of its training
    "49 patients": (49, 2000),
    "21 patients": (21, 2000),
    "7 patients": (7, 2000),
    "3 patients": (3, 2000),
    "memorized": (3, 2000),
    "half trained": (3, 500),
    "hardly trained": (3, 200),
    "random": (0, 0),
}
GATES = ("none", "agreement", "validation")


def teacher_row(name: str) -> Row:
    iterations = TEACHERS[name][1]
    own: dict[str, object] = {"max_iterations": iterations, "epoch_length": iterations, "unlabeled_batch_size": 0}
    if name == "memorized":
        own["train#dataset#augmentation"] = "$None"
    return Row(f"teacher: {name}", ("network_plain", "supervised"), {**SHARED, **WITHOUT_SAM, **own})


def torchscript_of(row: Row | None) -> Path:
    """The last weights of a row, or random ones, as TorchScript."""
    torch.manual_seed(0)
    network = UNet(spatial_dims=2, in_channels=1, out_channels=4, channels=CHANNELS).eval()
    path = OUTPUT / "dose" / "random.ts"
    if row is not None:
        folder = folder_of("dose", row, 0)
        state = torch.load(last_weights(folder), weights_only=True, map_location="cpu")
        network.load_state_dict(state["model"] if "model" in state else state)
        path = folder / "teacher.ts"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.trace(network, torch.zeros(2, 1, 128, 128)).save(str(path))
    return path


def student_rows(iterations: int, teachers: dict[str, Path], gates: Sequence[str]) -> list[Row]:
    shared = {**SHARED, "max_iterations": iterations, "epoch_length": iterations // 8}
    overlays = ("network_plain", "mean_teacher")
    rows = [Row("Mean Teacher", overlays, {**shared, **WITHOUT_SAM})]
    for name, path in teachers.items():
        target = "knowsam_monai.teachers.NetworkTeacher.from_torchscript"
        teacher = json.dumps({"_target_": target, "path": str(path), "channels": 4})
        for gate in gates:
            keys = {**shared, "teacher": teacher, "teacher_name": "network", "distillation_gate": gate}
            rows.append(Row(f"{name}, gate {gate}", overlays, keys))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=1000, help="of the students")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=TEACHERS, metavar="TEACHER")
    parser.add_argument("--gates", nargs="+", default=GATES, choices=GATES, metavar="GATE")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time on a CPU")
    options = parser.parse_args()
    scripts: dict[str, Path] = {}
    evaluated = acdc_lists(3)
    for name in options.teachers:
        patients, iterations = TEACHERS[name]
        row = teacher_row(name) if iterations else None
        if row is not None:
            run_all("dose", [(row, 0)], acdc_lists(patients), evaluated)
        scripts[name] = torchscript_of(row)
    rows = [(row, seed) for seed in options.seeds for row in student_rows(options.iterations, scripts, options.gates)]
    run_all("dose", rows, acdc_lists(3, "choices"), evaluated, jobs=options.jobs)


if __name__ == "__main__":
    main()
