"""What the Model Zoo's CI does with a bundle, step by step, offline: on the unpacked zip."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, onnx_export
from monai.bundle import scripts as bundle_scripts
from monai.bundle import verify_metadata, verify_net_in_out
from monai.data import Dataset

from tests.bundles.test_documents import SCHEMA

NET_ID = "network_def"
# two sizes beside the phantom's own, which is one of them
SIZES = {"knowsam_acdc": ([64, 64], [48, 80], [96, 96]), "knowsam_la": ([32, 32, 32], [32, 48, 32], [48, 48, 48])}


@pytest.fixture
def checked(importable, monkeypatch):
    """Arguments of MONAI's verifications, as the Zoo's CI gives them: from another folder, with the bundle's root."""
    monkeypatch.chdir(importable.root.parent)
    configs = importable.root / "configs"
    return {
        "meta_file": str(configs / "metadata.json"),
        "config_file": str(configs / "inference.json"),
        "bundle_root": str(importable.root),
    }


def test_metadata_is_valid_and_its_version_in_the_changelog(hosted, tmp_path, monkeypatch):
    pytest.importorskip("jsonschema")
    monkeypatch.setattr(
        bundle_scripts, "download_url", lambda url, filepath, **_: Path(filepath).write_bytes(SCHEMA.read_bytes())
    )
    meta_file = hosted.root / "configs" / "metadata.json"
    verify_metadata(meta_file=str(meta_file), filepath=str(tmp_path / "schema.json"))
    metadata = json.loads(meta_file.read_text())
    assert metadata["version"] in metadata["changelog"]
    assert re.fullmatch(r"(.+)_v(\d.*)", hosted.zip.stem).groups() == (hosted.name, metadata["version"])


@pytest.mark.parametrize("n", [1, 2])
def test_network_takes_and_gives_what_the_metadata_says(checked, n):
    verify_net_in_out(NET_ID, device="cpu", n=n, **checked)


@pytest.mark.parametrize("configs", [["inference.json"], ["train.json"], ["train.json", "evaluate.json"]], ids=str)
def test_workflow_has_the_properties_that_applications_look_for(importable, configs):
    workflow = ConfigWorkflow(
        config_file=[str(importable.root / "configs" / name) for name in configs],
        meta_file=str(importable.root / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="inference" if configs == ["inference.json"] else "train",
        dataset_dir=str(importable.datalist),
        bundle_root=str(importable.root),
        use_sam=False,
        initialize=[],
        cache_workers=0,
        num_workers=0,
    )
    workflow.initialize()
    assert not workflow.check_properties()


def test_exported_students_give_pytorch_s_labels_on_the_phantom_s_validation_set(importable, checked, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    files = {"ckpt_file": str(importable.root / "models" / "model.pt"), **checked}
    axes = {index: f"size{index}" for index in range(2, 2 + len(SIZES[importable.name][0]))}
    dynamic = {"input_names": ["image"], "output_names": ["pred"], "dynamic_axes": {"image": axes, "pred": axes}}
    ckpt_export(NET_ID, filepath=str(tmp_path / "model.ts"), **files)
    onnx_export(
        NET_ID,
        filepath=str(tmp_path / "model.onnx"),
        use_trace=True,
        input_shape=[1, 1, *SIZES[importable.name][0]],
        converter_kwargs={**dynamic, "dynamo": False},
        **files,
    )
    torchscript = torch.jit.load(tmp_path / "model.ts")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for size in SIZES[importable.name]:
        network, images = student_and_validation_images(importable, checked, size)
        with torch.no_grad():
            pred, scripted = network(images), torchscript(images)
        onnx = torch.cat([torch.from_numpy(session.run(None, {"image": one.numpy()})[0]) for one in images.split(1)])
        best, second = pred.topk(2, dim=1).values.unbind(1)
        sure = best - second > 1e-3  # a tie has no label
        assert sure.float().mean() > 0.99 and len(pred.argmax(1).unique()) > 1
        for exported in (scripted, onnx):
            torch.testing.assert_close(exported, pred, rtol=1e-3, atol=1e-3)
            assert torch.equal(exported.argmax(1)[sure], pred.argmax(1)[sure])


def student_and_validation_images(hosted, checked, size):
    """The student with its weights, and slices or patches (B, 1, *size) of the phantom's validation images."""
    parser = ConfigParser(ConfigParser.load_config_file(checked["config_file"]))
    parser["dataset_dir"], parser["image_size"] = str(hosted.datalist), size[0] if len(size) == 2 else size
    network = parser.get_parsed_content(NET_ID).eval()
    network.load_state_dict(torch.load(hosted.root / "models" / "model.pt", weights_only=True))
    sections = json.loads(hosted.datalist.read_text())
    items = [{"image": str(hosted.datalist.parent / item["image"])} for item in sections["validation"]]
    volumes = [item["image"].as_tensor()[0] for item in Dataset(items, parser.get_parsed_content("preprocessing"))]
    if len(size) == 3:
        return network, torch.stack([volume[tuple(slice(0, n) for n in size)] for volume in volumes])[:, None]
    slices = torch.cat([volume.permute(2, 0, 1) for volume in volumes])[:, None]
    return network, torch.nn.functional.interpolate(slices, size=size, mode="bilinear")


@pytest.mark.parametrize(
    "tool",
    [
        ["black", "--check", "--line-length", "120", "--skip-magic-trailing-comma"],
        ["isort", "--check", "--profile", "black", "--line-length", "120"],
        ["flake8", "--isolated", "--max-line-length", "120", "--extend-ignore", "E203,E701,E704"],
    ],
    ids=lambda tool: tool[0],
)
def test_code_of_the_zip_passes_the_zoo_s_format_check(hosted, tool):
    pytest.importorskip(tool[0])
    done = subprocess.run([sys.executable, "-m", *tool, "scripts"], cwd=hosted.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_text_of_the_zip_names_a_personal_path(hosted):
    for path in hosted.root.rglob("*"):
        if path.suffix in (".json", ".md", ".py", ".txt", ".yml", ".conf"):
            assert not re.search(r"/home/|/Users/|/root/|/work/", path.read_text(encoding="utf-8")), path
