"""examples/slurm.sh with stand-ins for SLURM's commands and torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"
COMMANDS = {
    "srun": 'shift; exec "$@"',
    "scontrol": '[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$@" > requeued',
    "torchrun": 'printf "%s\\n" "$@" > arguments; trap "echo saved > saved; exit 143" TERM; '
    "for i in $(seq ${SECONDS_OF_RUN:-0}0); do sleep 0.1; done; exit ${EXIT_CODE:-0}",
}


@pytest.fixture
def job(tmp_path):
    """`job(*arguments, **environment)`: the script as SLURM would start it, in a folder of its own."""
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    slurm.update(SLURM_GPUS_ON_NODE="4", SLURM_CPUS_PER_TASK="32", PATH=f"{tmp_path}:{os.environ['PATH']}")

    def start(*arguments, **environment):
        command = ["bash", str(SCRIPT), *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **slurm, **environment})

    return start


def test_every_machine_runs_the_bundle_with_all_its_gpus(job, tmp_path):
    assert job("--labeled_patients", "7", METHODS="network_plain.json mean_teacher.json").wait(30) == 0
    arguments = (tmp_path / "arguments").read_text().splitlines()
    names = ("train", "network_plain", "mean_teacher", "multi_gpu_train")
    configs = ",".join(f"'bundles/knowsam_acdc/configs/{name}.json'" for name in names)
    assert arguments == [
        *("--nnodes=2", "--nproc_per_node=4", "--rdzv_id=42", "--rdzv_backend=c10d", "--rdzv_endpoint=node7:29500"),
        *("-m", "monai.bundle", "run", "--config_file", f"[{configs}]", "--labeled_patients", "7"),
    ]
    assert not (tmp_path / "requeued").exists()


def test_error_ends_the_job_and_is_not_tried_again(job, tmp_path):
    assert job(EXIT_CODE="3").wait(30) == 3
    assert not (tmp_path / "requeued").exists()


def test_signal_before_the_time_limit_saves_and_queues_the_job_again(job, tmp_path):
    process = job(SECONDS_OF_RUN="60")
    until = time.monotonic() + 30
    while not (tmp_path / "arguments").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)  # until the script waits
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert (tmp_path / "saved").exists() and (tmp_path / "requeued").read_text() == "requeue 42\n"
