"""Every place that reads a file refuses one that would run code, and says so: nothing is run."""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from torch import nn

from knowsam_monai.data import LoadCased, check_datalist, load_datalist
from knowsam_monai.errors import root_cause
from knowsam_monai.files import InvalidCheckpointError, read_tensor_file
from knowsam_monai.runs.resume import Resume
from knowsam_monai.teachers.embedding_cache import EmbeddingCache
from knowsam_monai.teachers.sam_checkpoint import read_checkpoint
from pretraining.pretrain_stand_in import parse, pretrain
from tests.toys import ToyStudent, toy_batches, toy_trainer

ROOT = Path(__file__).parents[1]
WOULD_RUN = "pickle of Python objects, which would run code, so it was not loaded"


class Trap:
    """Whoever unpickles it makes a folder."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.fixture
def trap(tmp_path):
    """A trap, after a proof that it is one; the test fails where it has snapped."""
    trace = tmp_path / "it_ran"
    pickle.loads(pickle.dumps(Trap(trace)))
    trace.rmdir()
    yield Trap(trace)
    assert not trace.exists(), "code of the file was run"


def in_zip(path, trap):
    torch.save({"model": {"conv.weight": trap}, "settings": {}}, path)


def plain(protocol):
    return lambda path, trap: Path(path).write_bytes(pickle.dumps({"conv.weight": trap}, protocol))


CHECKPOINTS = {"torch's zip": in_zip, "protocol 0": plain(0), "protocol 2": plain(2), "protocol 4": plain(4)}


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request, tmp_path, trap):
    """A file that is a trap, of each form that torch.load takes."""
    CHECKPOINTS[request.param](tmp_path / "weights.pt", trap)
    return tmp_path / "weights.pt"


pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


def test_checkpoint_reader_names_what_the_file_is(checkpoint):
    with pytest.raises(InvalidCheckpointError, match=f"^is a {WOULD_RUN}$") as error:
        read_tensor_file(checkpoint)
    assert error.value.runs_code


def test_damaged_checkpoint_is_not_called_code(tmp_path):
    torch.save({"weight": torch.zeros(9)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[50:]):
        (tmp_path / "b.pt").write_bytes(content)
        with pytest.raises(
            InvalidCheckpointError, match=rf"^\({len(content)} bytes\) is truncated or not a checkpoint"
        ) as error:
            read_tensor_file(tmp_path / "b.pt")
        assert not error.value.runs_code
    assert read_tensor_file(tmp_path / "a.pt")["weight"].shape == (9,)


def test_sam_checkpoint(checkpoint):
    with pytest.raises(
        ValueError, match=rf"`checkpoint` must be a file .* but .*weights.pt is a {WOULD_RUN}; if you trust"
    ):
        read_checkpoint(checkpoint, "vit_b")


@pytest.mark.parametrize("bundle, conv", [("knowsam_acdc", "torch.nn.Conv2d"), ("knowsam_la", "torch.nn.Conv3d")])
def test_student_of_the_inference_config(bundle, conv, tmp_path, trap):
    in_zip(tmp_path / "model.pt", trap)
    nibabel.save(nibabel.Nifti1Image(np.eye(4, dtype=np.float32)[..., None], np.eye(4)), tmp_path / "image.nii.gz")
    workflow = ConfigWorkflow(
        config_file=str(ROOT / "bundles" / bundle / "configs" / "inference.json"),
        meta_file=str(ROOT / "bundles" / bundle / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="infer",
        dataset_dir=str(tmp_path / "image.nii.gz"),
        output_dir=str(tmp_path / "out"),
        ckpt_path=str(tmp_path / "model.pt"),
        device="$torch.device('cpu')",
        network_def={"_target_": conv, "in_channels": 1, "out_channels": 2, "kernel_size": 1},
    )
    hook = sys.excepthook
    try:
        workflow.initialize()
        with pytest.raises(Exception) as error:
            workflow.run()
    finally:
        sys.excepthook = hook
    assert WOULD_RUN in str(root_cause(error.value))


def test_resume_file_is_passed_over(checkpoint, caplog):
    checkpoint.rename(checkpoint.with_name("resume_4.pt"))
    student = ToyStudent().double()
    trainer = toy_trainer(student, toy_batches(1), lambda pred, label: pred.mean(), [], epoch_length=1)
    handler = Resume({"network": student}, checkpoint.parent, save=False)
    handler.attach(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert trainer.state.iteration == 1 and "resume_4.pt: it " in caplog.text
    assert WOULD_RUN in caplog.text


def test_resume_file_of_the_pretraining(checkpoint):
    checkpoint.rename(checkpoint.with_name("vit.pt.resume"))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        pretrain(parse(["--output", str(checkpoint.with_name("vit.pt")), "--steps", "1", "--resume"]))


def save_objects(path, trap):
    np.save(path, np.array([trap], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("write", [save_objects, plain(2), plain(4)])
def test_embedding_cache_computes_again(tmp_path, trap, caplog, write):
    encoder = nn.Conv2d(3, 2, 4, 4)
    cache = EmbeddingCache(encoder, facts={}, shape=(2, 2, 2), folder=tmp_path / "cache", dtype=torch.float32)
    x = torch.rand(1, 3, 8, 8)
    expected = cache(x, encoder)
    (entry,) = (tmp_path / "cache").glob("*.npy")
    write(entry, trap)
    assert torch.equal(cache(x, encoder), expected) and f"{entry} is damaged or belongs to another image" in caplog.text


def test_owner_of_an_embedding_cache(tmp_path, trap):
    (tmp_path / "cache").mkdir()
    plain(2)(tmp_path / "cache" / "cache.json", trap)
    with pytest.raises(ValueError, match="`cache_dir` must hold .* has no readable cache.json"):
        EmbeddingCache(nn.Conv2d(3, 2, 4, 4), facts={}, shape=(2, 2, 2), folder=tmp_path / "cache")


def save_npz(path, trap):
    np.savez(path, image=np.array([trap], dtype=object))


def save_record(path, trap):
    """A record of which one field is objects."""
    np.save(path, np.array([(1.0, trap)], dtype=[("value", float), ("trap", object)]), allow_pickle=True)


@pytest.mark.parametrize(
    "name, write",
    [
        ("array.npy", save_objects),
        ("record.npy", save_record),
        ("pickle.npy", plain(4)),
        ("arrays.npz", save_npz),
        ("pickle.npz", plain(4)),
    ],
)
def test_array_of_objects_is_no_image(tmp_path, trap, name, write):
    write(tmp_path / name, trap)
    message = f"`image` must be a readable image but .*{name} is not: .*pickled Python objects are not loaded"
    with pytest.raises(ValueError, match=message) as error:
        LoadCased("image")({"image": str(tmp_path / name)})
    assert "allow_pickle" not in str(error.value)


@pytest.mark.parametrize("suffix", ["h5", "hdf5", "nii", "nii.gz", "nrrd", "mha", "png", "jpg", "pkl", "pt", "dcm"])
def test_pickle_is_no_image(tmp_path, trap, suffix):
    plain(4)(tmp_path / f"case.{suffix}", trap)
    with pytest.raises(ValueError, match="`image` must be a readable image but .*case.* is not"):
        LoadCased("image")({"image": str(tmp_path / f"case.{suffix}")})


def test_postscript_under_another_name_is_not_interpreted(tmp_path):
    (tmp_path / "image.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="image.png is not: cannot identify image file"):
        LoadCased("image")({"image": str(tmp_path / "image.png")})


def test_cache_of_the_checker(tmp_path, trap):
    np.save(tmp_path / "a.npy", np.eye(4))
    datalist = {"unlabeled": [{"image": str(tmp_path / "a.npy"), "patient": "a"}]}
    for _ in range(2):
        report = check_datalist(datalist, cache_dir=tmp_path / "cache", progress=False)
        assert not report.errors and "1 of them read" in report.header
        (kept,) = (tmp_path / "cache").iterdir()
        plain(4)(kept, trap)


def test_paths_of_a_data_list_are_no_expressions(tmp_path, trap):
    """A `$` of a list's JSON is text: MONAI evaluates those of configs alone."""
    expression = f"$__import__('os').mkdir('{trap.trace}')"
    np.save(tmp_path / "a.npy", np.eye(4))
    item = {"image": "a.npy", "label": "a.npy", "patient": expression}
    (tmp_path / "list.json").write_text(json.dumps({"labeled": [item], "validation": [{**item, "image": "b.npy"}]}))
    np.save(tmp_path / "b.npy", np.eye(4))
    with pytest.raises(ValueError, match="share no patient"):
        load_datalist(tmp_path / "list.json", "")
    config = {
        "list": {"_target_": "json.loads", "_mode_": "default", "s": json.dumps([item])},
        "first": "$@list[0]['patient']",
    }
    assert ConfigParser(config).get_parsed_content("first") == expression


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node.lineno


# TorchScript holds torch's operators and no Python; the checkpoint of nnU-Net is the one that it has just written
KNOWN = [
    "examples/nnunet_trainer.py torch.load",
    "examples/torchscript_inference.py torch.jit.load",
    "knowsam_monai/teachers/network_teacher.py torch.jit.load",
]


def test_no_source_reads_a_file_in_a_way_that_could_run_code():
    sources = [
        p for part in ("knowsam_monai", "benchmarks", "pretraining", "examples") for p in (ROOT / part).rglob("*.py")
    ]
    assert len(sources) > 60
    found = []
    for path in sources:
        for name, keywords, _ in calls(path):
            is_safe = {
                "torch.load": keywords.get("weights_only") == "True",
                "np.load": keywords.get("allow_pickle") == "False",
            }.get(name, True)
            if name.split(".")[0] in ("pickle", "dill", "joblib", "shelve", "marshal", "yaml", "runpy"):
                is_safe = False
            if name in ("eval", "exec", "torch.jit.load", "pd.read_pickle") or not is_safe:
                found.append(f"{path.relative_to(ROOT)} {name}")
    assert sorted(found) == KNOWN
