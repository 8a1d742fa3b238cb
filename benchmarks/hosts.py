"""
What SKD adds to semi-supervised methods on ACDC: each host without SKD, with gated SKD, and two hosts without a gate.

    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/hosts.py                          # the table, many hours on a CPU
    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/hosts.py --time                   # seconds an iteration of each row
    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/hosts.py --labeled_patients 7 --hosts "Mean Teacher" --seeds 0 1
    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/hosts.py --image_size 256 --iterations 30000 --batch_size 12
    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/hosts.py --iterations 400 --channels 8 16 32 64 128 --adamw 0.002

The last command is for slow CPUs: narrower students, and an optimizer that makes progress in so few steps.

The teacher is `stand_in` pretrained on procedural images, frozen with adapters. It is NOT SAM. The gate is "agreement",
which sees no label; the "validation" gate would use the patients that the table reports. SKD teaches only the unlabeled
rows, with the Dice term, from the first quarter of the run on, as chosen on held-out training patients
(`accuracy.py tuning_stand_in`). Rows of one host and seed share everything but SKD, so their differences are paired.
Finished rows are kept in benchmarks/output and not run again. "last", HD95 and ASD (pixels) are of the last weights
without component filtering. "best" is the best validation, chosen on the same volumes it is reported on.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import subprocess
import sys

from accuracy import ADAMW, ROOT, TABLES, WITHOUT_SAM, command_of, train

# host -> (network overlay, method overlay)
HOSTS: dict[str, tuple[str, ...]] = {
    "supervised": ("network_plain", "supervised"),
    "Mean Teacher": ("network_plain", "mean_teacher"),
    "UA-MT": ("network_plain", "ua_mt"),
    "CPS": ("network_pair", "cps"),
    "FixMatch": ("network_plain", "fixmatch"),
    "BCP": ("network_plain", "bcp"),
    "KnowSAM": (),
}
# schedules that the overlays set in iterations, as fractions of the run
SCHEDULES = {"Mean Teacher": {"consistency_start": 1 / 30}, "BCP": {"pretraining_iterations": 1 / 4}}
UNGATED = ("supervised", "Mean Teacher")
COLUMNS: dict[str, dict[str, object]] = {
    "": WITHOUT_SAM,
    " + SKD": {},
    " + SKD, no gate": {"distillation_gate": "none"},
}


def columns_of(host: str, gated_only: bool = False) -> list[str]:
    return [column for column in COLUMNS if "no gate" not in column or (host in UNGATED and not gated_only)]


def register(options: argparse.Namespace) -> str:
    """Add the grid to the tables of `accuracy.py`; returns its name."""
    name = f"hosts_{options.labeled_patients}_patients_{options.image_size}_{options.iterations}_iterations"
    name += f"_{options.channels[0]}_channels" + "_adamw" * bool(options.adamw) + "_bf16" * options.bf16
    shared = {
        "labeled_patients": options.labeled_patients,
        "sam_variant": "stand_in",
        "sam_lr": options.sam_lr,
        "image_size": options.image_size,
        "labeled_batch_size": options.batch_size,
        "unlabeled_batch_size": options.batch_size,
        "max_iterations": options.iterations,
        "epoch_length": max(1, options.iterations // 4),
        "distillation_gate": "agreement",
        "distillation_dice_weight": 1.0,
        "distillation_start": options.iterations // 4,
        "taught_rows": "unlabeled",
        "num_workers": 0,
        "cpu_autocast": options.bf16,
    }
    if options.adamw:
        shared |= {"lr": options.adamw, "optimizer": ADAMW}
    rows: dict[str, dict[str, object]] = {}
    for host, overlays in HOSTS.items():
        own: dict[str, object] = {key: int(part * options.iterations) for key, part in SCHEDULES.get(host, {}).items()}
        networks = ("network_def#networks#0", "network_def#networks#1") if host == "CPS" else ("network_def",)
        own |= {f"{network}#channels": options.channels for network in networks}
        for column in columns_of(host):
            rows[host + column] = {"overlays": overlays, **own, **COLUMNS[column]}
        if host == "supervised":  # without SKD nothing uses the unlabeled rows
            rows[host]["unlabeled_batch_size"] = 0
    TABLES[name] = (shared, rows)
    return name


def distances(table: str, row: str, seed: int) -> dict[str, float]:
    """Mean HD95 and ASD of the last weights in pixels; evaluates them unless that is done."""
    command, folder = command_of(table, row, seed)
    summary = folder / "evaluation" / "metrics_summary.csv"
    if not summary.is_file():
        last = max(folder.glob("last_model_epoch=*.pt"), key=lambda path: path.stat().st_mtime)
        network = [name for name in TABLES[table][1][row]["overlays"] if name.startswith("network_")]
        files = [f"bundles/knowsam_acdc/configs/{name}.json" for name in ("train", *network, "evaluate")]
        keys = {name: command[command.index(f"--{name}") + 1] for name in ("dataset_dir", "image_size")}
        keys |= {key: str(value) for key, value in TABLES[table][1][row].items() if key.endswith("#channels")}
        keys |= {"ckpt_path": str(last), "output_dir": str(folder / "evaluation")}
        words = [word for key, value in keys.items() for word in (f"--{key}", value)]
        with open(folder / "evaluation.txt", "w") as log:
            subprocess.run(
                [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files), *words],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
    with open(summary, newline="") as file:
        means = {
            row["metric"]: float(row["mean"])
            for row in csv.DictReader(file)
            if row["class"] == "mean" and row["components"] == "all" and row["mean"]
        }
    return {"hd95": means["hd95_voxel"], "asd": means["asd_voxel"]}


def line_of(row: str, results: list[dict[str, float]], baseline: list[dict[str, float]] | None) -> str:
    """A row of the table; the gain is the mean of the paired differences of `last` and its standard error."""
    mean = {key: statistics.mean(one[key] for one in results) for key in results[0]}
    gain = "-"
    if baseline is not None:
        differences = [100 * (one["last"] - other["last"]) for one, other in zip(results, baseline)]
        gain = f"{statistics.mean(differences):+.1f}"
        if len(differences) > 1:
            gain += f" ± {statistics.stdev(differences) / len(differences) ** 0.5:.1f}"
    teacher = f"{100 * mean['teacher']:.1f}" if "teacher" in mean else "-"
    seeds = ", ".join(f"{100 * one['last']:.1f}" for one in results)
    return (
        f"| {row} | {100 * mean['last']:.1f} | {gain} | {seeds} | {100 * mean['best']:.1f} | {mean['hd95']:.1f} | "
        f"{mean['asd']:.1f} | {teacher} | {mean['minutes']:.0f} |"
    )


def print_times(table: str, rows: list[str], seed: int) -> None:
    """Seconds an iteration of each row, from its preflight."""
    for row in rows:
        command = [sys.executable, *command_of(table, row, seed)[0], "--preflight", "True"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found = re.search(r"of ([\d.]+) s each", done.stdout + done.stderr)
        if found is None:
            raise SystemExit(
                f"`{row}` ended with exit code {done.returncode} before it printed its preflight:\n{done.stderr}"
            )
        print(f"{row}: {found[1]} s an iteration", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labeled_patients", type=int, default=3, choices=(3, 7, 21))
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), choices=HOSTS, metavar="HOST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=4, help="labeled rows; as many unlabeled ones")
    parser.add_argument("--channels", type=int, nargs=5, default=[16, 32, 64, 128, 256], help="of the students")
    parser.add_argument("--adamw", type=float, metavar="LR", help="AdamW of this learning rate instead of SGD")
    parser.add_argument("--sam_lr", type=float, default=1e-3, help="of the teacher's adapters and prompts")
    parser.add_argument("--bf16", action="store_true", help="CPU autocast; slow on a CPU without bf16 instructions")
    parser.add_argument("--gated_only", action="store_true", help="leave out the columns without a gate")
    parser.add_argument("--time", action="store_true", help="only measure seconds an iteration of each row")
    options = parser.parse_args()
    table = register(options)
    columns = {host: columns_of(host, options.gated_only) for host in options.hosts}
    if options.time:
        return print_times(table, [host + c for host in columns for c in columns[host]], options.seeds[0])

    # seeds outermost, so that an interrupted grid has every host for the seeds it reached
    for seed in options.seeds:
        for host in columns:
            for column in columns[host]:
                train(table, host + column, seed)
                distances(table, host + column, seed)
    print("| row | last | gain | last, each seed | best | HD95 | ASD | teacher, last | minutes |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for host in columns:
        without: list[dict[str, float]] | None = None
        for column in columns[host]:
            row = host + column
            results = [{**train(table, row, seed), **distances(table, row, seed)} for seed in options.seeds]
            print(line_of(row, results, without), flush=True)
            without = without or results


if __name__ == "__main__":
    main()
