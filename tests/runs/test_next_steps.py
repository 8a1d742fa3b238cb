"""After a training, the screen and the page name commands that work as they are pasted."""

from __future__ import annotations

import html
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from knowsam_monai.runs.next_steps import next_steps
from tests.bundles.conftest import BUNDLES, TINY, TINY_3D, small_phantom, small_volumes  # noqa: F401

BRIEF = {"use_sam": False, "mixing_weight": 0, "network_def": None}
PHANTOM_WIDTHS = {"channels": [8, 16, 32, 64, 128], "aggregation_channels": [4, 4, 8]}


def shell(command, folder):
    """What a user's shell in the environment does with a line."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("name, data", [("knowsam_acdc", "list"), ("knowsam_la", "phantom")])
def test_commands_on_the_screen_and_on_the_page_work_as_they_are_pasted(
    small_phantom, small_volumes, tmp_path, name, data  # noqa: F811
):
    folder = tmp_path / "my study, 2"
    shutil.copytree(BUNDLES / name / "configs", folder / name / "configs")
    phantom = {"knowsam_acdc": small_phantom, "knowsam_la": small_volumes}[name].parent
    keys = {**TINY, **(TINY_3D if name == "knowsam_la" else {}), **BRIEF, "device": "cpu"}
    keys |= PHANTOM_WIDTHS if name == "knowsam_la" else {}
    if data == "list":
        shutil.copytree(phantom, folder / "data")
        keys["dataset_dir"] = "data/dataset.json"
    else:
        keys["datalist#phantom"] = {"num_labeled": 2, "num_unlabeled": 2, "num_validation": 1, "num_test": 0}
        keys["datalist#phantom"] |= {"max_size": 32, **({"anatomy": "left_atrium"} if name == "knowsam_la" else {})}
    words = [f"--{key}={value}" for key, value in keys.items() if value is not None]
    command = [sys.executable, "-m", "knowsam_monai", "train", f"./{name}", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = re.findall(r"To (?:segment|evaluate|zip|export) [\w ]+: (.*)", done.stdout + done.stderr)
    assert len(commands) == 4
    (report,) = folder.rglob("report.html")
    assert "pre.card { white-space: pre-wrap; overflow-wrap: anywhere; }" in report.read_text()  # in whole at any width
    page = html.unescape(re.search('Next steps</h2>\n<pre class="card">(.*?)</pre>', report.read_text(), re.S)[1])
    assert [line for line in page.splitlines() if line[0] != "#"] == [f"cd '{folder}'", *commands]
    done = shell(f"set -e; {page}", tmp_path)
    assert done.returncode == 0, done.stderr
    (segmentation,) = (folder / "segmentations").rglob("*_seg.nii.gz")
    assert list(folder.rglob("metrics_raw.csv")) and list(folder.rglob("model.ts"))
    with zipfile.ZipFile(folder / f"{name}.zip") as archive:  # on another machine
        archive.extractall(tmp_path / "there")
    scan = next(word for word in shlex.split(commands[0]) if word.endswith(".nii.gz"))
    done = shell(f"{sys.executable} -m knowsam_monai predict '{folder / scan}' --bundle ./{name}", tmp_path / "there")
    assert done.returncode == 0, done.stderr
    (there,) = (tmp_path / "there" / "segmentations").iterdir()
    assert there.read_bytes() == segmentation.read_bytes()


def test_scan_that_cannot_be_read_again_and_a_run_of_torchrun(tmp_path):
    start = {"folder": str(tmp_path), "bundle_root": str(tmp_path / "b"), "split": "test", "scan": "/data/a.h5"}
    steps = next_steps(tmp_path / "output", start, {"device": "$int(os.environ['LOCAL_RANK'])"})
    assert set(steps) == {"segment", "zip", "export"} and "predict path/to/scans --bundle ./b" in steps["segment"]
    assert next_steps(tmp_path / "output", {"seed": 1}, {}) == {}
    steps = next_steps(tmp_path / "output", {**start, "bundle_root": str(tmp_path)}, {})
    assert steps["zip"].endswith("zip . --run ./output")
