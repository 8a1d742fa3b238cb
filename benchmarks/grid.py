"""
Train rows of a table with the bundles' command lines, evaluate their last weights, and keep the results as CSV.

`hosts.py`, `dose.py` and `left_atrium.py` define the rows; `tables.py` makes tables and pictures of the CSV files.

A row is one run in a process of its own. Its folder in benchmarks/output is kept, so an interrupted table resumes; a
finished row is not run again. Each GPU that CUDA_VISIBLE_DEVICES leaves takes one row at a time, and so does the CPU
(or `jobs` rows).
"""

from __future__ import annotations

import csv
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import tables
import torch

from knowsam_monai.data import load_datalist
from knowsam_monai.errors import KnowSAMError, named_as_set
from knowsam_monai.teachers import build_sam

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "output"
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


class RowFailed(Exception):
    """A row that ended with an error; the message has the last error of its log."""


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

    These are the 10 patients of the published validation list and the last 20 of the training list. ACDC has the images
    of one of them, patient076, also as patient074, who is left out too; 49 patients are left for training.

    Args:
        labeled_patients: number of labeled patients, the first of the training list; the others have no label.
        validation: the list's validation part: "tables", those 30 patients, or "choices", the 20 training patients
            before the last 20, which are then in no training part either, to choose settings on. 29 patients are left.

    Raises:
        ValueError: if fewer patients are left for training than are to have labels.
    """
    folder = data_folder("KNOWSAM_ACDC_DIR")
    training = load_datalist(folder, "", labeled_patients=70)["labeled"]
    held_out = load_datalist(folder, "", labeled_patients=3, holdout_patients=40)["validation"]
    order = [patient for patient in dict.fromkeys(item["patient"] for item in training) if patient != TWIN]
    if validation == "choices":
        kept, volumes = order[:-40], [item for item in held_out if item["patient"] in order[-40:-20]]
    else:
        kept = order[:-20]
        volumes = load_datalist(folder, "", labeled_patients=3)["validation"]
        volumes += [item for item in held_out if item["patient"] in order[-20:]]
    if labeled_patients > len(kept):
        raise ValueError(
            f"`labeled_patients` must be at most {len(kept)}, the patients left for training, but is "
            f"{labeled_patients}; lower it."
        )
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
    table: str, row: Row, seed: int, data: str | Path, evaluated: str | Path, gpu: str | None, split: str = "validation"
) -> Path:
    """
    Train a row and evaluate its last weights, unless that is done; returns its folder.

    Raises:
        RowFailed: if training or evaluation ends with an error, or if the folder is of other settings.
    """
    folder = folder_of(table, row, seed)
    settings = {key: str(value) for key, value in row.keys.items()} | {"overlays": str(row.overlays)}
    finished = folder / "finished.json"
    if finished.is_file():
        if json.loads(finished.read_text())["settings"] != settings:
            raise RowFailed(f"{folder} was trained with other settings; to train it again, delete it.")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    keys = {**row.keys, "seed": seed, "dataset_dir": data, "output_dir": folder, "ckpt_dir": folder}
    log, clock, now = folder / "log.txt", folder / "clock.json", time.time()
    earlier = earlier_minutes(clock, log)
    clock.write_text(json.dumps({"minutes": earlier, "started": now}))
    _run(command_of(row, row.overlays, keys), log, gpu)
    minutes = earlier + (time.time() - now) / 60

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


def earlier_minutes(clock: Path, log: Path) -> float:
    """Minutes of a row's starts before this one, however they ended: the last counts up to its last line in the log."""
    if not clock.is_file():
        return 0.0
    facts = json.loads(clock.read_text())
    last = log.stat().st_mtime - facts["started"] if log.is_file() else 0.0
    return facts["minutes"] + max(0.0, last) / 60


def _run(command: Sequence[str], log: Path, gpu: str | None) -> None:
    environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if code != 0:
        said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        errors = [line for line in said if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
        raise RowFailed(f"exit code {code}: {(errors or said or ['no message'])[-1]} (log: {log})")


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, in the words of CUDA_VISIBLE_DEVICES."""
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return (inherited.split(",") if inherited else [str(number) for number in range(count)])[:count]


def check_sam(rows: Iterable[tuple[Row, int]]) -> None:
    """
    Load the weights that rows with SAM will need; rows without SAM, of the stand-in or of a network need none.

    Raises:
        SystemExit: if a file is missing, damaged or of another model.
    """
    needed = set()
    for row, _ in rows:
        default = ROOT / "bundles" / row.bundle / "models" / "sam_vit_b_01ec64.pth"
        keys = {"use_sam": True, "sam_variant": "vit_b", "sam_checkpoint": default, **row.keys}
        if str(keys["use_sam"]) != "False" and keys["sam_variant"] != "stand_in" and "teacher" not in keys:
            needed.add((str(keys["sam_variant"]), str(keys["sam_checkpoint"])))
    for variant, checkpoint in sorted(needed):
        try:
            with named_as_set({"checkpoint": "sam_checkpoint", "variant": "sam_variant"}):
                build_sam(variant, image_size=256, checkpoint=None if checkpoint == "$None" else checkpoint)
        except KnowSAMError as error:
            raise SystemExit(str(error)) from error


def run_all(
    table: str,
    rows: Iterable[tuple[Row, int]],
    data: str | Path,
    evaluated: str | Path | None = None,
    jobs: int = 1,
    split: str = "validation",
) -> None:
    """
    Train and evaluate each (row, seed), one on each GPU, or `jobs` on the CPU, and print the table of those done.

    The CSV files are written whenever a row ends. When a row fails, those that run go on, and no more are started.

    Raises:
        SystemExit: if SAM's weights are missing, or at the end if a row failed.
    """
    rows = list(rows)
    check_sam(rows)
    gpus: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for gpu in visible_gpus() or [None] * jobs:
        gpus.put(gpu)
    lock, stop = threading.Lock(), threading.Event()
    done: set[int] = set()
    failed: list[str] = []

    def work(number: int) -> None:
        if stop.is_set():
            return
        row, seed = rows[number]
        gpu = gpus.get()
        try:
            train_and_evaluate(table, row, seed, data, evaluated or data, gpu, split)
            with lock:
                done.add(number)
                write_results(table, [rows[one] for one in sorted(done)])
            print(f"{row.name}, seed {seed}: done", flush=True)
        except RowFailed as error:
            stop.set()
            failed.append(f"{row.name}, seed {seed}")
            print(f"{row.name}, seed {seed}: {error}", flush=True)
        except BaseException:
            stop.set()
            raise
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(gpus.qsize()) as pool:
        try:
            list(pool.map(work, range(len(rows))))
        finally:  # after Ctrl-C too
            stop.set()
    if done:
        print(f"\n{tables.all_tables(table)}\n", flush=True)
    if failed:
        raise SystemExit(
            f"A row failed ({'; '.join(failed)}), so no more were started; {len(done)} of {len(rows)} rows are done, "
            f"their results are in {tables.RESULTS}, and the same command goes on with the others."
        )


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
    _merge(tables.RESULTS / f"{table}.csv", cases, ("row", "seed"))
    _merge(tables.RESULTS / f"{table}_curves.csv", curves, ("row", "seed"))


def _merge(path: Path, lines: Sequence[Mapping[str, object]], key: Sequence[str]) -> None:
    """Write lines to a CSV file; those of other rows and seeds stay."""
    new = {tuple(str(line[name]) for name in key) for line in lines}
    kept = [line for line in _read(path) if tuple(line[name] for name in key) not in new] if path.is_file() else []
    lines = [*kept, *lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    part.replace(path)


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
