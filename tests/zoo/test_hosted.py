"""The unpacked zip in an environment with MONAI alone: inference and evaluation from a command line elsewhere."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow

from tests.bundles.conftest import TINY_3D, Training
from tests.zoo.conftest import BRIEF, BRIEF_OF
from zoo.weights import find_training

# put in the way of Python's start: what is not installed in an environment with MONAI alone
BLOCKER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("knowsam_monai", "segment_anything", "pydantic"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A working directory without a bundle, and an environment without the package, SAM and pydantic."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "blocker").mkdir()
    (folder / "blocker" / "sitecustomize.py").write_text(BLOCKER)
    environment = {**os.environ, "PYTHONPATH": str(folder / "blocker"), "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def scans(hosted, tmp_path_factory):
    """The phantom's volumes, oblique as they are, without their labels."""
    folder = tmp_path_factory.mktemp("scans")
    images = [path for path in sorted(hosted.datalist.parent.rglob("*.nii.gz")) if not path.name.endswith("_gt.nii.gz")]
    for index, path in enumerate(images[:2]):
        shutil.copyfile(path, folder / f"scan{index}.nii.gz")
    return folder


@pytest.mark.parametrize("module", ["knowsam_monai", "segment_anything", "pydantic"])
def test_blocked_environment_has_neither_the_package_nor_sam(elsewhere, module):
    done = elsewhere("-c", f"import {module}")
    assert done.returncode == 1 and f"No module named '{module}'" in done.stderr


def test_inference_of_the_zip_needs_monai_alone_and_labels_as_the_package_does(hosted, elsewhere, scans, tmp_path):
    config = hosted.root / "configs" / "inference.json"
    options = {"dataset_dir": str(scans), "output_dir": str(tmp_path / "zip")}
    arguments = [argument for key, value in options.items() for argument in (f"--{key}", value)]
    done = elsewhere("-m", "monai.bundle", "run", "--config_file", config, "--bundle_root", hosted.root, *arguments)
    assert done.returncode == 0, done.stderr
    workflow = ConfigWorkflow(
        config_file=str(hosted.bundle / "configs" / "inference.json"),
        meta_file=str(hosted.bundle / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="infer",
        **{**options, "output_dir": str(tmp_path / "package"), "bundle_root": str(hosted.bundle)},
        **{key: value for key, value in find_training(hosted.bundle).student.items() if key != "class_names"},
    )
    workflow.initialize()
    workflow.run()
    for path in scans.iterdir():
        scan, ours, package = (
            nibabel.load(file)
            for file in (
                path,
                *(tmp_path / kind / path.name.replace(".nii", "_seg.nii") for kind in ("zip", "package")),
            )
        )
        assert ours.shape == scan.shape and np.array_equal(ours.affine, scan.affine)
        np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(package.dataobj))
        assert len(np.unique(ours.dataobj)) > 1


def test_evaluation_of_the_zip_needs_monai_alone(hosted, elsewhere, tmp_path):
    configs = [str(hosted.root / "configs" / name) for name in ("train.json", "evaluate.json")]
    arguments = ["--dataset_dir", hosted.datalist, "--output_dir", tmp_path, "--bundle_root", hosted.root]
    done = elsewhere("-m", "monai.bundle", "run", "--config_file", str(configs), *arguments)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "metrics_raw.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    validation = json.loads(hosted.datalist.read_text())["validation"]
    assert len({row["case"] for row in rows}) == len(validation) and all(0 <= float(row["dice"]) <= 1 for row in rows)
    assert max(float(row["dice"]) for row in rows) > 0


@pytest.mark.parametrize("hosted", ["knowsam_acdc"], indirect=True)
def test_wrong_weights_end_the_zip_s_inference_with_the_cause_in_one_line(hosted, elsewhere, scans, tmp_path):
    config = hosted.root / "configs" / "inference.json"
    arguments = ["--dataset_dir", scans, "--output_dir", tmp_path, "--ckpt_path", "/nowhere/model.pt"]
    done = elsewhere("-m", "monai.bundle", "run", "--config_file", config, *arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ValueError: `ckpt_path` must be a student but /nowhere")


LOAD = """
import os, signal, sys
sys.path.append(sys.argv[1])
import monai.bundle
import torch
def state():
    return sys.excepthook, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sorted(os.listdir())
before = state()
folder, name = os.path.split(sys.argv[1])
weights = torch.load(sys.argv[1] + "/models/model.pt", weights_only=True)
for workflow_type in sys.argv[2:]:
    network = monai.bundle.load(name, bundle_dir=folder, workflow_type=workflow_type, device="cpu")
    wrong = [key for key, value in network.state_dict().items() if not torch.equal(value, weights[key])]
    assert not wrong, (workflow_type, wrong)
assert state() == before and "knowsam_monai" not in sys.modules
"""


def test_network_of_the_zip_is_loaded_with_monai_alone_and_without_side_effects(hosted, elsewhere):
    # a training of volumes without a data set has the phantom's widths, as these weights
    done = elsewhere("-c", LOAD, hosted.root, "train", "inference")
    assert done.returncode == 0, done.stderr


def test_training_of_the_zip_runs_where_the_package_is_installed(hosted, tmp_path):
    tiny = TINY_3D if hosted.name == "knowsam_la" else {}
    options = {**tiny, **BRIEF, **BRIEF_OF[hosted.name], "max_iterations": 1, "dataset_dir": str(hosted.datalist)}
    (step,) = Training(tmp_path, configs=hosted.root / "configs", **options).run().history
    assert step["loss"] > 0
