"""
Train rows of a table with the bundles' command lines, evaluate their last weights, and keep the results as CSV.

`hosts.py`, `dose.py` and `left_atrium.py` define the rows; `tables.py` makes tables and pictures of the CSV files.

A row is one run in a process of its own. Its folder in benchmarks/output is kept, so an interrupted table resumes; a
finished row is not run again. Each GPU takes one row at a time, and so does the CPU (or `jobs` rows).
"""

from __future__ import annotations

import csv
import json
import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from knowsam_monai.data import load_datalist

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "output"
RESULTS = ROOT / "benchmarks" / "results"
ADAMW = json.dumps(
    {
        "_target_": "torch.optim.AdamW",
        "params": "$@network.parameters()",
        "lr": "@lr",
        "weight_decay": "@weight_decay",
    }
)
WITHOUT_SAM: dict[str, object] = {"use_sam": False}
METRICS = {"dice": 100.0, "hd95_voxel": 1.0, "asd_voxel": 1.0}  # column of metrics_raw.csv -> factor


TWIN = "patient074"  # of the training list: its images are those of patient076, who is held out


class Row(NamedTuple):
    """One line of a table: a bundle's overlays and keys."""

    name: str
    overlays: tuple[str, ...]
    keys: Mapping[str, object]
    bundle: str = "knowsam_acdc"


def data_folder(variable: str) -> str:
    """The folder that an environment variable names."""
    folder = os.environ.get(variable)
    if not folder:
        raise SystemExit(
            f"{variable} must be the folder of the data but is not set; set it as in {variable}=/data/ACDC."
        )
    return folder


def acdc_lists(labeled_patients: int, validation: str = "tables") -> Path:
    """
    Write a data list of ACDC; no table's 60 volumes of 30 patients are in its training parts.

    These are the 10 patients of the published validation list and the last 20 of the training list. One patient more
    is left out of training, because ACDC has the same images under two names.

    Args:
        labeled_patients: number of labeled patients, the first of the training list; the others have no label.
        validation: the list's validation part: "tables", those 30 patients, or "choices", the 20 training patients
            before the last 20, which are then in no training part either, to choose settings on.
    """
    folder = data_folder("KNOWSAM_ACDC_DIR")
    training = load_datalist(folder, "", labeled_patients=70)["labeled"]
    held_out = load_datalist(folder, "", labeled_patients=3, holdout_patients=40)["validation"]
    order = list(dict.fromkeys(item["patient"] for item in training))
    if validation == "choices":
        kept, volumes = order[:-40], [item for item in held_out if item["patient"] in order[-40:-20]]
    else:
        kept = [patient for patient in order[:-20] if patient != TWIN]
        volumes = load_datalist(folder, "", labeled_patients=3)["validation"]
        volumes += [item for item in held_out if item["patient"] in order[-20:]]
    labeled = [item for item in training if item["patient"] in kept[:labeled_patients]]
    unlabeled = [item for item in training if item["patient"] in kept[labeled_patients:]]
    parts = {
        "labeled": labeled,
        "unlabeled": [{key: value for key, value in item.items() if key != "label"} for item in unlabeled],
        "validation": volumes,
    }
    path = OUTPUT / f"acdc_{labeled_patients}_labeled_{validation}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    return path


def folder_of(table: str, row: Row, seed: int) -> Path:
    return OUTPUT / table / f"{re.sub('[^a-z0-9]+', '_', row.name.lower()).strip('_')}_seed{seed}"


def last_weights(folder: Path) -> Path:
    """The student of a run's last iteration."""
    return max(folder.glob("last_model_epoch=*.pt"), key=lambda path: path.stat().st_mtime)


def command_of(row: Row, overlays: Sequence[str], keys: Mapping[str, object]) -> list[str]:
    files = [f"bundles/{row.bundle}/configs/{name}.json" for name in ("train", *overlays)]
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files), *words]


def train_and_evaluate(
    table: str, row: Row, seed: int, data: str | Path, evaluated: str | Path, gpu: int | None, split: str = "validation"
) -> Path:
    """Train a row and evaluate its last weights, unless that is done; returns its folder."""
    folder = folder_of(table, row, seed)
    settings = {key: str(value) for key, value in row.keys.items()} | {"overlays": str(row.overlays)}
    finished = folder / "finished.json"
    if finished.is_file():
        if json.loads(finished.read_text())["settings"] != settings:
            raise SystemExit(f"{folder} was trained with other settings; to train it again, delete it.")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    keys = {**row.keys, "seed": seed, "dataset_dir": data, "output_dir": folder, "ckpt_dir": folder}
    start = time.perf_counter()
    _run(command_of(row, row.overlays, keys), folder / "log.txt", gpu)
    minutes = (time.perf_counter() - start) / 60

    network = [name for name in row.overlays if name.startswith("network_")]
    needed = ("network_def", "validate#preprocessing", "image_size", "channels", "aggregation_channels")
    same = {key: value for key, value in row.keys.items() if key.startswith(needed)}
    same |= {
        "dataset_dir": evaluated,
        "ckpt_path": last_weights(folder),
        "output_dir": folder / "evaluation",
        "split": split,
    }
    _run(command_of(row, (*network, "evaluate"), same), folder / "evaluation.txt", gpu)
    finished.write_text(json.dumps({"minutes": minutes, "settings": settings}, indent=1))
    return folder


def _run(command: Sequence[str], log: Path, gpu: int | None) -> None:
    environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if code != 0:
        raise SystemExit(f"a row ended with exit code {code}; see {log}.")


def run_all(
    table: str,
    rows: Iterable[tuple[Row, int]],
    data: str | Path,
    evaluated: str | Path | None = None,
    jobs: int = 1,
    split: str = "validation",
) -> None:
    """Train and evaluate each (row, seed), one on each GPU, or `jobs` on the CPU; writes the CSV files as rows end."""
    gpus: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for gpu in range(torch.cuda.device_count()) or [None] * jobs:
        gpus.put(gpu)

    def work(row: Row, seed: int) -> None:
        gpu = gpus.get()
        try:
            train_and_evaluate(table, row, seed, data, evaluated or data, gpu, split)
        finally:
            gpus.put(gpu)
        print(f"{row.name}, seed {seed}: done", flush=True)

    rows = list(rows)
    with ThreadPoolExecutor(gpus.qsize()) as pool:
        for future in [pool.submit(work, row, seed) for row, seed in rows]:
            future.result()
    write_results(table, rows)


def write_results(table: str, rows: Sequence[tuple[Row, int]]) -> None:
    """Add the finished rows to benchmarks/results/<table>.csv (each volume) and <table>_curves.csv."""
    cases: list[dict[str, object]] = []
    curves: list[dict[str, object]] = []
    for row, seed in rows:
        folder = folder_of(table, row, seed)
        facts = json.loads((folder / "finished.json").read_text())
        key = {"row": row.name, "seed": seed}
        volumes: dict[str, dict[str, object]] = {}
        for line in _read(folder / "evaluation" / "metrics_raw.csv"):
            if line["components"] == "all":
                volume = volumes.setdefault(line["case"], {**key, "volume": line["case"]})
                for metric, factor in METRICS.items():
                    value = line[metric]
                    volume[f"{metric.removesuffix('_voxel')} {line['class']}"] = (
                        f"{factor * float(value):.2f}" if value not in ("", "nan") else ""
                    )
        cases += volumes.values()
        length = int(str(row.keys["epoch_length"]))
        for line in _read(folder / "results.csv"):
            point: dict[str, object] = {**key, "iteration": int(line["epoch"]) * length}
            for name, value in line.items():
                if name.startswith("val_"):
                    point[name.removeprefix("val_")] = f"{100 * float(value):.2f}" if value else ""
            curves.append(point | {"minutes": f"{facts['minutes']:.1f}"})
    _merge(RESULTS / f"{table}.csv", cases, ("row", "seed"))
    _merge(RESULTS / f"{table}_curves.csv", curves, ("row", "seed"))


def _merge(path: Path, lines: Sequence[Mapping[str, object]], key: Sequence[str]) -> None:
    """Write lines to a CSV file; those of other rows and seeds stay."""
    new = {tuple(str(line[name]) for name in key) for line in lines}
    kept = [line for line in _read(path) if tuple(line[name] for name in key) not in new] if path.is_file() else []
    lines = [*kept, *lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def print_times(table: str, rows: Iterable[tuple[Row, int]], data: str | Path) -> None:
    """Seconds an iteration of each row, from its preflight, and the minutes of all rows."""
    total = 0.0
    for row, seed in rows:
        folder = folder_of(table, row, seed)
        keys = {**row.keys, "seed": seed, "dataset_dir": data, "output_dir": folder, "ckpt_dir": folder}
        command = command_of(row, row.overlays, {**keys, "preflight": True})
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found = re.search(r"iterations +(\d+) of ([\d.]+) s each", done.stdout + done.stderr)
        if found is None:
            raise SystemExit(f"`{row.name}` printed no preflight (exit code {done.returncode}):\n{done.stderr}")
        total += int(found[1]) * float(found[2])
        print(f"{row.name}, seed {seed}: {found[2]} s an iteration", flush=True)
    print(f"all rows, without validation and evaluation: {total / 60:.0f} minutes")
