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


# one process: the network is loaded, everything of that forgotten, and command lines run until one fails
PROGRAM = """
import importlib, json, os, runpy, signal, sys
for name in ("knowsam_monai", "segment_anything", "pydantic"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert str(error) == f"No module named {name!r}"
    else:
        raise AssertionError(name)

root, commands = sys.argv[1], json.loads(sys.argv[2])
sys.path.append(root)
import monai.bundle
import torch

def state():
    return sys.excepthook, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sorted(os.listdir())

before = state()
folder, name = os.path.split(root)
weights = torch.load(root + "/models/model.pt", weights_only=True)
for workflow_type in ("train", "inference"):
    network = monai.bundle.load(name, bundle_dir=folder, workflow_type=workflow_type, device="cpu")
    wrong = [key for key, value in network.state_dict().items() if not torch.equal(value, weights[key])]
    assert not wrong, (workflow_type, wrong)
assert state() == before and "knowsam_monai" not in sys.modules
print("LOADED")

sys.path.remove(root)
for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
    del sys.modules[name]
for words in commands:
    sys.argv = ["monai.bundle", "run", *words]
    runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def ran(hosted, tmp_path_factory):
    """The process, which loads, infers, evaluates and infers wrongly, far from a bundle; the folder of its results."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("blocker", "scans", "empty"):
        (folder / name).mkdir()
    (folder / "blocker" / "sitecustomize.py").write_text(BLOCKER)
    images = [path for path in sorted(hosted.datalist.parent.rglob("*.nii.gz")) if not path.name.endswith("_gt.nii.gz")]
    for index, path in enumerate(images[:2]):  # oblique as they are
        shutil.copyfile(path, folder / "scans" / f"scan{index}.nii.gz")
    configs = hosted.root / "configs"
    inference, evaluation = configs / "inference.json", [str(configs / n) for n in ("train.json", "evaluate.json")]
    commands = [
        ["--config_file", inference, "--dataset_dir", folder / "scans", "--output_dir", folder / "zip"],
        ["--config_file", evaluation, "--dataset_dir", hosted.datalist, "--output_dir", folder / "evaluation"],
        ["--config_file", inference, "--dataset_dir", folder / "scans", "--ckpt_path", "/nowhere/model.pt"],
    ]
    commands = [[str(word) for word in (*words, "--bundle_root", hosted.root)] for words in commands]
    environment = {**os.environ, "PYTHONPATH": str(folder / "blocker"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(hosted.root), json.dumps(commands)]
    return subprocess.run(command, cwd=folder / "empty", env=environment, capture_output=True, text=True), folder


def test_network_of_the_zip_is_loaded_with_monai_alone_and_without_side_effects(ran):
    done, _ = ran
    # a training of volumes without a data set has the phantom's widths, as these weights
    assert "LOADED" in done.stdout.splitlines(), done.stderr


def test_inference_of_the_zip_needs_monai_alone_and_labels_as_the_package_does(hosted, ran, tmp_path):
    done, folder = ran
    workflow = ConfigWorkflow(
        config_file=str(hosted.bundle / "configs" / "inference.json"),
        meta_file=str(hosted.bundle / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="infer",
        dataset_dir=str(folder / "scans"),
        output_dir=str(tmp_path),
        bundle_root=str(hosted.bundle),
        **{key: value for key, value in find_training(hosted.bundle).student.items() if key != "class_names"},
    )
    workflow.initialize()
    workflow.run()
    for path in (folder / "scans").iterdir():
        name = path.name.replace(".nii", "_seg.nii")
        assert (folder / "zip" / name).is_file(), done.stderr
        scan, ours, package = map(nibabel.load, (path, folder / "zip" / name, tmp_path / name))
        assert ours.shape == scan.shape and np.array_equal(ours.affine, scan.affine)
        np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(package.dataobj))
        assert len(np.unique(ours.dataobj)) > 1


def test_evaluation_of_the_zip_needs_monai_alone(hosted, ran):
    done, folder = ran
    path = folder / "evaluation" / "metrics_raw.csv"
    assert path.is_file(), done.stderr
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    validation = json.loads(hosted.datalist.read_text())["validation"]
    assert len({row["case"] for row in rows}) == len(validation) and all(0 <= float(row["dice"]) <= 1 for row in rows)
    assert max(float(row["dice"]) for row in rows) > 0


def test_wrong_weights_end_the_zip_s_inference_with_the_cause_in_one_line(ran):
    done, _ = ran
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ValueError: `ckpt_path` must be a student but /nowhere")


def test_training_of_the_zip_runs_where_the_package_is_installed(hosted, tmp_path):
    tiny = TINY_3D if hosted.name == "knowsam_la" else {}
    options = {**tiny, **BRIEF, **BRIEF_OF[hosted.name], "max_iterations": 1, "dataset_dir": str(hosted.datalist)}
    (step,) = Training(tmp_path, configs=hosted.root / "configs", **options).run().history
    assert step["loss"] > 0
