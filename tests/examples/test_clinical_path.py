"""examples/clinical_path.sh as it stands, with small sizes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import pytest

ROOT = Path(__file__).parents[2]
SIZES = (
    "--image_size [16,16,16] --spacing [4.0,4.0,4.0] --sam_variant stand_in --sam_image_size 32 --max_iterations 4 "
    "--epoch_length 2 --channels [4,4,4,4,4] --aggregation_channels [2,2,4] --labeled_batch_size 2 "
    "--unlabeled_batch_size 2 --num_workers 0 --device $torch.device('cpu')"
)


@pytest.mark.slow
def test_twenty_scans_of_which_three_are_labeled_end_as_a_student_in_a_bundle(tmp_path):
    bundle, folder = tmp_path / "bundle", tmp_path / "path"
    shutil.copytree(ROOT / "bundles" / "knowsam_la" / "configs", bundle / "configs")
    environment = {**os.environ, "BUNDLE": str(bundle), "SIZES": SIZES, "PYTHON": sys.executable}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["sh", str(ROOT / "examples" / "clinical_path.sh"), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    scans = {path.relative_to(folder / "scans") for path in (folder / "scans").rglob("*_LGE.nii.gz")}
    labels = list((folder / "scans").rglob("*_gt.nii.gz"))
    assert len(scans) == 20 and len(labels) == 3
    assert (bundle / "models" / "model.pt").is_file() and (folder / "run" / "report.html").is_file()
    for scan in scans:
        name = scan.with_name(scan.name.replace(".nii.gz", "_seg.nii.gz"))
        assert nibabel.load(folder / "segmentations" / name).shape == nibabel.load(folder / "scans" / scan).shape
    lines = [line for line in done.stdout.splitlines() if re.search("errors: none|^20 segmentations", line)]
    assert len(lines) == 3  # the check is made before the training too


def test_four_commands_of_which_each_is_one_line_or_goes_on():
    text = (ROOT / "examples" / "clinical_path.sh").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("$PYTHON -m")]
    assert [line.split()[2] for line in commands] == ["knowsam_monai", "knowsam_monai", "monai.bundle", "knowsam_monai"]
