"""examples/nnunet_dataset.py and nnunet_trainer.py on nnU-Net v2 itself, from scans to the inference of nnU-Net."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_STEPS = 3  # of an epoch
TERMS = ("distillation_loss", "sam_loss", "gate_weight")

# the command of nnU-Net that is the first argument, as its console script calls it
COMMAND = """
import sys
from importlib.metadata import entry_points
sys.argv = sys.argv[1:]
(command,) = entry_points(group="console_scripts", name=sys.argv[0])
command.load()()
"""
WITHOUT_THIS_PACKAGE = "import sys; sys.modules['knowsam_monai'] = None\n"

TRAINERS = f"""
import os, random
import numpy as np
import torch
from nnunet_trainer import WithSKD, nnUNetTrainerSKD
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision as Flat,
)

class Tiny:
    variant, image_size, num_slices, gate = "stand_in", 64, 4, "none"

    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch = int(os.environ["EPOCHS"]), {NUM_STEPS}
        self.num_val_iterations_per_epoch = 1
        torch.manual_seed(0)
        super().initialize()

    def on_epoch_start(self):  # after SAM was built, which draws
        super().on_epoch_start()
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(self.current_epoch)

class TinySKD(Tiny, nnUNetTrainerSKD): ...
class TinyHost(Tiny, nnUNetTrainer): ...
class FlatSKD(Tiny, WithSKD, Flat): ...
class FlatHost(Tiny, Flat): ...

class SilentSKD(TinySKD):
    def on_train_start(self):
        super().on_train_start()
        self.skd.weight = 0.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of all of nnU-Net's folders, with a preprocessed data set of 4 labeled and 6 unlabeled volumes."""
    probe = subprocess.run([sys.executable, "-c", "import nnunetv2, timm, torchvision"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"needs a working nnunetv2: {probe.stderr.strip().splitlines()[-1]}")
    folder = tmp_path_factory.mktemp("nnunet")
    (folder / "trainers").mkdir()
    shutil.copy(EXAMPLES / "nnunet_trainer.py", folder / "trainers")
    (folder / "trainers" / "tiny.py").write_text(TRAINERS)
    for name in ("scans", "labels", "unlabeled"):
        (folder / name).mkdir()
    for number in range(10):
        write_volume(folder, f"case{number}.nii.gz", number, is_labeled=number < 4)

    make_dataset = [sys.executable, EXAMPLES / "nnunet_dataset.py", "Dataset501_Discs", "MR", "disc", "scans", "labels"]
    in_folder = dict(check=True, cwd=folder, env=environment(folder))
    subprocess.run(make_dataset, **in_folder)
    nnunet(folder, "nnUNetv2_extract_fingerprint", "-d", "501", "-np", "1")
    nnunet(folder, "nnUNetv2_plan_experiment", "-d", "501")
    subprocess.run([*make_dataset, "unlabeled"], **in_folder)
    nnunet(folder, "nnUNetv2_preprocess", "-d", "501", "-c", "2d", "3d_fullres", "-np", "1", "1")
    return folder


def write_volume(folder, name, seed, is_labeled):
    """A tube through 12 slices, brighter than its surroundings, in noise."""
    rng = np.random.default_rng(seed)
    _, y, x = np.mgrid[:12, :40, :40]
    row, column, radius = rng.uniform((14, 14, 7), (26, 26, 10))
    label = ((y - row) ** 2 + (x - column) ** 2 < radius**2).astype(np.uint8)
    scan = (300 + 400 * label.astype(float) + 100 * rng.standard_normal(label.shape)).astype(np.float32)
    for kind, array in [("scans", scan), ("labels", label)] if is_labeled else [("unlabeled", scan)]:
        volume = sitk.GetImageFromArray(array)
        volume.SetSpacing((1.5, 1.5, 4.0))
        sitk.WriteImage(volume, str(folder / kind / name))


def environment(folder, **more):
    paths = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    paths["nnUNet_extTrainer"] = str(folder / "trainers")
    workers = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
    return {**os.environ, **paths, **workers, "EPOCHS": "1", "SAM_CHECKPOINT": "procedural", **more}


def nnunet(folder, *command, before="", **env):
    """Run a command of nnU-Net; returns what it said."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", before + COMMAND, *command],
        **dict(cwd=folder, env=environment(folder, **env), capture_output=True, text=True),
    )
    if run.returncode:
        raise RuntimeError(f"{command} ended with {run.returncode}: {run.stdout[-2000:]} {run.stderr[-3000:]}")
    return run.stdout


def train(folder, trainer, configuration="2d", *options, **env):
    """Train fold 0, without workers, so that one seed gives one run; returns what nnU-Net said."""
    run = ("nnUNetv2_train", "501", configuration, "0", "-tr", trainer, "-device", "cpu", *options)
    return nnunet(folder, *run, **{"nnUNet_n_proc_DA": "0", **env})


@pytest.fixture(scope="module")
def trained(folder):
    """What nnU-Net said while it trained, and the folder of the model; each trainer is run once."""

    @cache
    def trained(trainer, configuration="2d"):
        model = f"nnUNet_results/Dataset501_Discs/{trainer}__nnUNetPlans__{configuration}"
        return train(folder, trainer, configuration), folder / model

    return trained


def checkpoint_of(model):
    return torch.load(model / "fold_0" / "checkpoint_final.pth", map_location="cpu", weights_only=False)


def same_weights(a, b):
    return all(torch.equal(a["network_weights"][name], b["network_weights"][name]) for name in a["network_weights"])


def test_the_example_is_short():
    assert len((EXAMPLES / "nnunet_trainer.py").read_text(encoding="utf-8").splitlines()) <= 60


def test_half_of_the_training_cases_have_a_label(folder):
    preprocessed = folder / "nnUNet_preprocessed" / "Dataset501_Discs"
    for split in json.loads((preprocessed / "splits_final.json").read_text()):
        is_labeled = [(folder / "labels" / f"{case}.nii.gz").exists() for case in split["train"]]
        assert sum(is_labeled) == len(is_labeled) / 2 and not set(split["train"]) & set(split["val"])
    unlabeled = sitk.ReadImage(str(folder / "nnUNet_raw" / "Dataset501_Discs" / "labelsTr" / "case9.nii.gz"))
    assert np.unique(sitk.GetArrayFromImage(unlabeled)).tolist() == [2]
    assert unlabeled.GetSpacing() == (1.5, 1.5, 4.0)


@pytest.mark.parametrize(
    "configuration, name, host",
    [
        ("2d", "Tiny", "nnUNetTrainer"),
        ("3d_fullres", "Flat", "nnUNetTrainerNoDeepSupervision"),
    ],
)
def test_skd_reaches_the_student_and_the_inference_of_nnunet_knows_nothing_of_it(
    configuration, name, host, folder, trained
):
    said, model = trained(f"{name}SKD", configuration)
    said_by_host, model_of_host = trained(f"{name}Host", configuration)
    assert all(term in said and term not in said_by_host for term in TERMS)
    checkpoint = checkpoint_of(model)
    assert checkpoint["trainer_name"] == host
    assert not same_weights(checkpoint, checkpoint_of(model_of_host))
    assert json.loads((model / "fold_0" / "validation" / "summary.json").read_text())["foreground_mean"]

    output = model / "predicted"
    command = ["nnUNetv2_predict", "-i", "nnUNet_raw/Dataset501_Discs/imagesTr", "-o", str(output), "-d", "501"]
    command += ["-c", configuration, "-tr", f"{name}SKD", "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1"]
    nnunet(folder, *command, before=WITHOUT_THIS_PACKAGE, nnUNet_extTrainer="")
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(output / "case9.nii.gz")))
    assert predicted.shape == (12, 40, 40) and set(np.unique(predicted)) <= {0, 1}


def test_with_a_weight_of_0_it_is_the_host_bit_for_bit(trained):
    (_, silent), (_, host) = trained("SilentSKD"), trained("TinyHost")
    assert same_weights(checkpoint_of(silent), checkpoint_of(host))


def test_a_run_goes_on_where_it_was_and_so_does_its_teacher(folder, trained, tmp_path):
    _, model = trained("TinySKD")
    results = shutil.copytree(folder / "nnUNet_results", tmp_path / "results")
    train(folder, "TinySKD", "2d", "--c", EPOCHS="2", nnUNet_results=str(results))
    model = results / model.relative_to(folder / "nnUNet_results")
    _, optimizer = torch.load(model / "fold_0" / "checkpoint_final.pth.sam", map_location="cpu")
    assert checkpoint_of(model)["current_epoch"] == 2
    assert {int(state["step"]) for state in optimizer["state"].values()} == {2 * NUM_STEPS}


TEACH = """
import sys
folder = sys.argv[1]
exec(sys.argv[2])
from knowsam_monai import check_teacher
image = torch.rand(2, 1, *patch_size)
facts = check_teacher(teacher, image)
assert facts.frozen and facts.num_classes == 2
predictor.use_mirroring = False
for row, logits in zip(image, teacher(image, image)):
    deviation, mean = torch.std_mean(row)
    row = (row - mean) / deviation  # (1, *spatial); a slice is a volume of one
    whole = row if len(patch_size) == 3 else row[:, None]
    expected = predictor.predict_logits_from_preprocessed_data(whole).view_as(logits)
    assert (logits - expected).abs().max() < 0.01 * expected.abs().max()  # nnU-Net returns half precision
"""


@pytest.mark.parametrize("configuration, name", [("2d", "Tiny"), ("3d_fullres", "Flat")])
def test_a_folder_of_results_teaches_as_the_documentation_shows(configuration, name, folder, trained):
    _, model = trained(f"{name}SKD", configuration)
    page = (EXAMPLES.parent / "docs" / "source" / "teachers.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall("```python\n(.*?)```", page, re.DOTALL) if "nnUNetPredictor" in block)
    command = [sys.executable, "-W", "ignore", "-c", TEACH, str(model), textwrap.dedent(f"  {block.strip()}")]
    run = subprocess.run(command, env=environment(folder), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def test_a_data_set_without_ignore_label_is_refused(folder, tmp_path):
    preprocessed = shutil.copytree(folder / "nnUNet_preprocessed", tmp_path / "preprocessed")
    facts = preprocessed / "Dataset501_Discs" / "dataset.json"
    facts.write_text(facts.read_text().replace("ignore", "tumor"))
    with pytest.raises(RuntimeError, match="must have an 'ignore' label"):
        train(folder, "TinySKD", nnUNet_preprocessed=str(preprocessed), nnUNet_results=str(tmp_path / "results"))
