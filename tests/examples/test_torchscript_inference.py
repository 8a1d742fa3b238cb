"""examples/torchscript_inference.py gives, without this package, what the bundle's own inference gives."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow, ckpt_export

from knowsam_monai.data import write_phantom

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "knowsam_acdc"
TURNS = {"stored": [[0, 1], [1, 1], [2, 1]], "turned": [[2, -1], [0, 1], [1, -1]]}


def test_it_gives_the_bundle_s_segmentation_voxel_for_voxel(tmp_path):
    datalist = write_phantom(tmp_path / "phantom", num_labeled=1, num_unlabeled=0, num_validation=1, num_test=1)
    scan = nib.load(datalist.parent / json.loads(datalist.read_text())["test"][0]["image"])
    (tmp_path / "scans").mkdir()
    scans = {name: tmp_path / "scans" / f"{name}.nii.gz" for name in TURNS}
    for name, turn in TURNS.items():
        nib.save(scan.as_reoriented(turn), scans[name])
    files = {name: str(BUNDLE / "configs" / f"{name}.json") for name in ("metadata", "inference")}
    model, ckpt = str(tmp_path / "model.ts"), str(BUNDLE / "models" / "model.pt")
    ckpt_export(
        "network_def", filepath=model, ckpt_file=ckpt, meta_file=files["metadata"], config_file=files["inference"]
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == "knowsam_monai"]:
            patch.setitem(sys.modules, name, None)  # may not be imported
        main = runpy.run_path(str(ROOT / "examples" / "torchscript_inference.py"))["main"]
        for path in scans.values():
            main(model, str(path), "64", str(tmp_path))
    options = {
        "bundle_root": str(BUNDLE),
        "dataset_dir": str(tmp_path / "scans"),
        "image_size": 64,
        "output_dir": str(tmp_path / "bundle"),
    }
    workflow = ConfigWorkflow(files["inference"], workflow_type="infer", logging_file=False, **options)
    workflow.initialize()
    workflow.run()
    for name in TURNS:
        ours, expected = (nib.load(folder / f"{name}_seg.nii.gz") for folder in (tmp_path, tmp_path / "bundle"))
        assert len(np.unique(expected.dataobj)) == 4
        np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(expected.dataobj), err_msg=name)
        np.testing.assert_allclose(ours.affine, expected.affine, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "usage: python torchscript_inference.py MODEL.ts"),
        (["model.ts", "scan.nii", "large", "out"], "usage: "),
        (["no.ts", "scan.nii", "64", "out"], "error: no.ts does not exist; "),
    ],
)
def test_wrong_arguments_are_one_line(words, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["torchscript_inference.py", *words])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "examples" / "torchscript_inference.py"), run_name="__main__")
    assert str(error.value).startswith(said)
