"""configs/multi_gpu_train.json over train.json: two processes on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from knowsam_monai.data import write_phantom
from knowsam_monai.networks import MultiViewNet
from tests.bundles.conftest import CONFIGS, CONFIGS_3D, SMALL_STUDENT, SMALL_UNET, TINY, TINY_3D, run_bundle
from tests.processes import finish, start, start_ranks, wait_for
from tests.same_bits import assert_same_bits

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("configs", [CONFIGS, CONFIGS_3D], ids=["slices", "volumes"])
@pytest.mark.parametrize("synchronized", [False, True])
def test_batch_normalization_is_synchronized_by_a_key(configs, synchronized):
    parser = ConfigParser()
    parser.read_config([str(configs / "train.json"), str(configs / "multi_gpu_train.json")])
    parser.update({"sync_batchnorm": synchronized})
    network = parser.get_parsed_content("network#module")
    norms = {type(module) for module in network.modules() if isinstance(module, _BatchNorm)}
    assert norms == {SyncBatchNorm} if synchronized else SyncBatchNorm not in norms and norms
    assert network.state_dict().keys() == parser.get_parsed_content("network_def").state_dict().keys()


def torchrun(folder: Path, dataset: Path, **override) -> subprocess.Popen:
    """Start the README's command with a tiny training, on this machine's CPU."""
    options = {name: value for name, value in TINY.items() if name not in ("network_def", "device")}
    options.update(dataset_dir=dataset, output_dir=folder, ckpt_dir=folder / "models", **override)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "monai.bundle", "run", "--config_file", "['configs/train.json','configs/multi_gpu_train.json']"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command += ["--network_def", json.dumps(SMALL_STUDENT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT / "bundles" / "knowsam_acdc", env=environment, **pipes)


@pytest.mark.slow
def test_process_that_dies_ends_the_run_with_an_error(small_phantom, tmp_path):
    run = torchrun(tmp_path, small_phantom, max_iterations=2000)
    until = time.monotonic() + 300
    while not (tmp_path / "resume_4.pt").exists() and run.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, errors = run.communicate(timeout=90)
    assert run.returncode != 0 and "SIGKILL" in errors


class Ranks:
    """Two processes of a tiny training with configs over train.json, the last of them multi_gpu_train.json."""

    def __init__(
        self,
        folder: Path,
        dataset: Path,
        overlays: tuple[str, ...] = (),
        configs: Path = CONFIGS,
        max_iterations: int = 6,
    ) -> None:
        self.folder = folder
        self.last = folder / f"resume_{max_iterations}.pt"
        folder.mkdir()
        options = {**TINY, **(TINY_3D if configs == CONFIGS_3D else {}), "labeled_batch_size": 4}
        options.update(max_iterations=max_iterations, num_workers=None, cache_workers=None)  # the defaults
        if "mean_teacher.json" in overlays:
            options["consistency_start"] = 1
        if "network_plain.json" in overlays and configs == CONFIGS:
            options["network_def"] = SMALL_UNET
        options.update(dataset_dir=str(dataset), output_dir=str(folder), ckpt_dir=str(folder / "models"), device=None)
        options = {name: value for name, value in options.items() if value is not None}
        self.arguments = (configs, (*overlays, "multi_gpu_train.json"), options)

    def run(self, stop=None, in_group: bool = True) -> list[int]:
        """The exit codes; `stop` is when to send SIGTERM to both."""
        ranks = start_ranks(self.folder, 2, run_bundle, *self.arguments, in_group=in_group)
        if stop is not None:
            assert wait_for(stop, ranks[0])
            for process in ranks:
                os.kill(process.pid, signal.SIGTERM)
        return [finish(process, self.folder / f"rank{rank}.log") for rank, process in enumerate(ranks)]

    def log(self) -> str:
        return "".join((self.folder / f"rank{rank}.log").read_text()[-3000:] for rank in (0, 1))

    def result(self) -> dict:
        return torch.load(self.last, weights_only=True)


@pytest.mark.parametrize("configs", [CONFIGS, CONFIGS_3D], ids=["slices", "volumes"])
def test_ranks_without_the_overlay_end_before_anything_is_written(configs, small_phantom, tmp_path):
    ranks = Ranks(tmp_path / "run", small_phantom, configs=configs)
    ranks.arguments = (configs, (), {**ranks.arguments[2], "output_dir": str(tmp_path / "output")})
    assert ranks.run(in_group=False) == [1, 1]
    for rank in (0, 1):
        assert "is None; add the config multi_gpu_train.json" in (ranks.folder / f"rank{rank}.log").read_text()
    assert not (tmp_path / "output").exists()


def test_two_ranks_train_and_the_first_writes_the_plain_student(small_phantom, tmp_path):
    """With torchrun's environment alone: the group is the config's."""
    ranks = Ranks(tmp_path / "run", small_phantom, max_iterations=12)  # the gate is first measured at iteration 10
    assert ranks.run(in_group=False) == [0, 0], ranks.log()
    assert (ranks.result()["distiller"]["gate.labeled_scores"] >= 0).all()  # was measured
    output = "".join((ranks.folder / f"rank{rank}.log").read_text() for rank in (0, 1))
    assert output.count("Preflight") == 1 and output.count("structure") == 1
    assert "2, batch normalization: per process" in output
    assert "MultiViewNet, " in output  # and not the name of its wrapper
    assert output.count("Validation 1  ") == 1 and output.count("Report: ") == 1
    assert len(json.loads((ranks.folder / "run.json").read_text())["starts"]) == 1
    for path in (ranks.folder / "model.pt", ranks.folder / "models" / "model.pt"):
        MultiViewNet(out_channels=4, channels=(4, 8, 8, 8, 8)).load_state_dict(torch.load(path), strict=True)
    assert (ranks.folder / "report.html").is_file() and (ranks.folder / "validation.png").is_file()
    assert len(list((ranks.folder / "tensorboard").rglob("events*"))) == 2


@pytest.mark.slow
def test_ranks_stop_at_the_same_step_and_go_on_to_the_same_bits(small_phantom, tmp_path):
    overlays = ("network_plain.json", "mean_teacher.json")
    whole = Ranks(tmp_path / "whole", small_phantom, overlays, max_iterations=40)
    assert whole.run() == [0, 0], whole.log()
    broken = Ranks(tmp_path / "broken", small_phantom, overlays, max_iterations=40)
    assert broken.run(stop=(broken.folder / "resume_2.pt").exists) == [143, 143], broken.log()
    assert not broken.last.exists() and broken.run() == [0, 0], broken.log()
    assert len(broken.result()["random"]) == 2
    assert_same_bits(broken.result(), whole.result())


@pytest.mark.slow
@pytest.mark.parametrize("configs", [CONFIGS, CONFIGS_3D], ids=["slices", "volumes"])
def test_same_command_always_goes_on_and_one_process_may_go_on_from_two(tmp_path, configs):
    counts = {"num_labeled": 4, "num_unlabeled": 2, "num_validation": 2, "num_test": 0}
    anatomy = {"anatomy": "left_atrium"} if configs == CONFIGS_3D else {}
    ranks = Ranks(tmp_path / "run", write_phantom(tmp_path / "data", max_size=32, **counts, **anatomy), configs=configs)
    for _ in range(6):
        assert ranks.run() == [0, 0], ranks.log()
    assert "This run has finished its 6 iterations." in ranks.log()
    options = {**ranks.arguments[2], "device": "$torch.device('cpu')"}
    alone = start(ranks.folder / "alone.log", run_bundle, configs, (), options)
    assert finish(alone, ranks.folder / "alone.log") == 0, (ranks.folder / "alone.log").read_text()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overlays", [("network_plain.json", m) for m in ("ua_mt.json", "fixmatch.json", "bcp.json", "supervised.json")]
)
def test_overlay_trains_on_two_ranks(small_phantom, tmp_path, overlays):
    ranks = Ranks(tmp_path / "run", small_phantom, overlays)
    assert ranks.run() == [0, 0], ranks.log()
    assert ranks.result()["trainer"]["iteration"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("overlays", [(), ("network_plain.json", "mean_teacher.json")])
def test_bundle_of_volumes_trains_on_two_ranks(tmp_path, overlays):
    counts = {"num_labeled": 4, "num_unlabeled": 2, "num_validation": 2, "num_test": 0}
    volumes = write_phantom(tmp_path / "volumes", anatomy="left_atrium", max_size=32, **counts)
    ranks = Ranks(tmp_path / "run", volumes, overlays, configs=CONFIGS_3D)
    assert ranks.run() == [0, 0], ranks.log()
    assert ranks.result()["trainer"]["iteration"] == 6
