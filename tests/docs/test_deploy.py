"""The commands of the deployment page work as they are pasted, one after the other, in the root of a clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_commands_up_to_onnx_end_as_a_segmentation(tmp_path):
    for folder in ("bundles/knowsam_acdc/configs", "bundles/knowsam_acdc/models", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    page = (ROOT / "docs" / "source" / "deploy.md").read_text(encoding="utf-8").partition("## ONNX")[0]
    commands = "".join(re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    segmentation = np.asarray(nibabel.load(tmp_path / "segmentations" / "scan01_seg.nii.gz").dataobj)
    assert len(np.unique(segmentation)) == 4
