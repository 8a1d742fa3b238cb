"""examples/torchscript_inference.py gives, without this package, what the bundle's own inference gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow, ckpt_export

from knowsam_monai.data import write_phantom

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "knowsam_acdc"
WITHOUT_THIS_PACKAGE = "import sys, runpy; sys.modules['knowsam_monai'] = None; sys.argv = sys.argv[1:]; "


@pytest.mark.parametrize("turn", [[[0, 1], [1, 1], [2, 1]], [[2, -1], [0, 1], [1, -1]]], ids=["stored", "turned"])
def test_it_gives_the_bundle_s_segmentation_voxel_for_voxel(tmp_path, turn):
    datalist = write_phantom(tmp_path / "phantom", num_labeled=1, num_unlabeled=0, num_validation=1, num_test=1)
    scan = shutil.copy(datalist.parent / json.loads(datalist.read_text())["test"][0]["image"], tmp_path / "scan.nii.gz")
    nib.save(nib.load(scan).as_reoriented(turn), scan)
    files = {name: str(BUNDLE / "configs" / f"{name}.json") for name in ("metadata", "inference")}
    model, ckpt = str(tmp_path / "model.ts"), str(BUNDLE / "models" / "model.pt")
    ckpt_export(
        "network_def", filepath=model, ckpt_file=ckpt, meta_file=files["metadata"], config_file=files["inference"]
    )
    subprocess.run(
        [sys.executable, "-c", WITHOUT_THIS_PACKAGE + "runpy.run_path(sys.argv[0], run_name='__main__')"]
        + [ROOT / "examples" / "torchscript_inference.py", model, scan, "64", str(tmp_path)],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    options = {
        "bundle_root": str(BUNDLE),
        "dataset_dir": scan,
        "image_size": 64,
        "output_dir": str(tmp_path / "bundle"),
    }
    workflow = ConfigWorkflow(files["inference"], workflow_type="infer", logging_file=False, **options)
    workflow.initialize()
    workflow.run()
    ours, expected = (nib.load(path) for path in (tmp_path / "scan_seg.nii.gz", tmp_path / "bundle/scan_seg.nii.gz"))
    assert len(np.unique(expected.dataobj)) == 4
    np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_allclose(ours.affine, expected.affine, atol=1e-5)
