"""configs/multi_gpu_train.json over train.json: two processes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from knowsam_monai.networks import MultiViewNet

from .conftest import SMALL_STUDENT, TINY

ROOT = Path(__file__).parents[2]


def test_two_ranks_train_and_the_first_writes_the_plain_student(small_phantom, tmp_path):
    options = {name: value for name, value in TINY.items() if name not in ("network_def", "device")}
    options.update(dataset_dir=small_phantom, output_dir=tmp_path, ckpt_dir=tmp_path / "models", max_iterations=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "monai.bundle", "run", "--config_file", "['configs/train.json','configs/multi_gpu_train.json']"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command += ["--network_def", json.dumps(SMALL_STUDENT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    folder = ROOT / "bundles" / "knowsam_acdc"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Preflight") == 1 and done.stdout.count("structure") == 1
    assert "MultiViewNet, " in done.stdout  # and not the name of its wrapper
    assert done.stdout.count("Validation 1  ") == 1 and done.stdout.count("Report: ") == 1
    assert (tmp_path / "report.html").is_file() and len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1
    for path in (tmp_path / "model.pt", tmp_path / "models" / "model.pt"):
        MultiViewNet(out_channels=4, channels=(4, 8, 8, 8, 8)).load_state_dict(torch.load(path), strict=True)
    assert (tmp_path / "validation.png").is_file() and len(list((tmp_path / "tensorboard").rglob("events*"))) == 3
