"""configs/train.json: a whole run and its files, every part switched off, and the published recipe."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser

from knowsam_monai.errors import root_cause
from knowsam_monai.files import iter_csv
from knowsam_monai.networks import MultiViewNet
from knowsam_monai.runs import finishing
from tests.bundles.conftest import CONFIGS, CONFIGS_3D, SMALL_STUDENT, Training

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "knowsam_acdc"
ACDC = os.environ.get("KNOWSAM_ACDC_DIR")
LOSSES = {"loss", "sam_loss", "distillation_loss", "mutual_loss", "entropy_loss", "mixing_loss"}


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def resolved(configs=CONFIGS, **override):
    parser = ConfigParser()
    parser.read_config(str(configs / "train.json"))
    parser.update(override)
    return parser.get_parsed_content


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[CONFIGS, CONFIGS_3D], ids=["knowsam_acdc", "knowsam_la"])
def whole_run(request, tmp_path_factory):
    """Two epochs with everything, from the repository's root."""
    data = request.getfixturevalue("small_phantom" if request.param == CONFIGS else "small_volumes")
    output_dir = tmp_path_factory.mktemp("whole") / "output"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        options = {"configs": request.param, "dataset_dir": str(data), "max_iterations": 4}
        return Training(output_dir, whole=True, charts=True, **options).run()


def test_run_leaves_the_student_the_report_and_the_logs(whole_run):
    found = files(whole_run.output_dir)
    logs = {name for name in found if name.startswith("tensorboard/")}
    assert found - logs == {
        ".lock",
        "config.json",
        "log.txt",
        "report.html",
        "run.json",
        "validation_cases.csv",
        *(f"validation_slices/{i + 1}.png" for i in range(len(whole_run["validate#dataset"]))),
        "model.pt",
        "last_model_epoch=2.pt",
        "models/config.json",
        "models/model.json",
        "models/model.pt",
        "results.csv",
        "resume_2.pt",
        "resume_4.pt",
        "validation.png",
    }
    assert {name.split("/")[1] for name in logs} == {"train", "validation"}
    assert (whole_run.output_dir / "validation.png").read_bytes().startswith(b"\x89PNG")


class Failing:
    """A handler that ends the run with an error, by default in its third step."""

    def __init__(self, at=3):
        self.at = at

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_STARTED(once=self.at), self)

    def __call__(self, engine):
        raise KeyError("of the step")


def break_data(options, phantom, folder):
    shutil.copytree(phantom.parent, folder / "data")
    next((folder / "data").rglob("*_gt.nii.gz")).write_bytes(b"")
    options["dataset_dir"] = str(folder / "data" / phantom.name)


FAILURES = {
    None: lambda parser: None,
    "data": lambda parser: None,
    "trainer": lambda parser: parser.update({"train#mixing": {"_target_": "builtins.int", "x": "none"}}),
    "step": lambda parser: parser["train#handlers"].insert(0, {"_target_": f"{__name__}.Failing"}),
    "publishing": lambda parser: None,
}


@pytest.mark.parametrize("failure", FAILURES)
def test_run_releases_signals_and_folder_if_the_process_continues(small_phantom, tmp_path, monkeypatch, failure):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    options = {"dataset_dir": str(small_phantom), "max_iterations": 4, "use_sam": False}
    if failure == "data":
        break_data(options, small_phantom, tmp_path)
    if failure == "publishing":
        monkeypatch.setattr(finishing, "publish_student", lambda *folders: 1 / 0)
    run = Training(tmp_path / "run", whole=True, **options)
    FAILURES[failure](run.workflow.parser)
    with pytest.raises(Exception) if failure else nullcontext():
        run.run()
    assert run.signals == before and (tmp_path / "run" / "log.txt").exists()
    assert not (tmp_path / "run" / ".lock.json").exists()


def test_run_that_starts_over_removes_the_curves_of_the_run_before_and_nothing_else(training, tmp_path):
    options = {"use_sam": False, "mixing_weight": 0, "max_iterations": 1, "whole": True}
    training(**options).run()
    folder = tmp_path / "output" / "tensorboard"
    (folder / "mine").mkdir()
    for name in ("mine/events.out.tfevents.1", "train/notes.txt"):
        (folder / name).touch()

    def events():
        return {path for path in folder.rglob("events.*") if path.parent.name in ("train", "validation")}

    first = events()
    training(**options, preflight=True).run()
    assert first and events() == first
    training(**options).run()  # resumed: the run is finished
    assert first < events()
    training(**options, resume=False).run()
    assert events() and not first & events()
    assert (folder / "mine/events.out.tfevents.1").exists() and (folder / "train/notes.txt").exists()


@pytest.mark.parametrize("bundle", ["training", "training_3d"])
def test_validation_inside_an_epoch_is_refused_since_each_epoch_has_one_row(request, bundle):
    inside = {"train#handlers#0#epoch_level": False, "train#handlers#0#interval": 1}
    with pytest.raises(RuntimeError) as error:
        request.getfixturevalue(bundle)(whole=True, use_sam=False, **inside).run()
    assert str(root_cause(error.value)) == (
        "`train#handlers#0#epoch_level` must be True, since results.csv has one validation an epoch, but is False; to "
        "validate every n iterations, set `epoch_length` to n."
    )


def test_run_that_starts_over_has_only_its_own_students_and_validations(training, small_phantom, tmp_path):
    options = {"use_sam": False, "mixing_weight": 0, "whole": True}
    folder, metric = tmp_path / "output", "val_mean_dice"
    training(**options, max_iterations=1).run()
    (folder / "results.csv").write_text(f"epoch,{metric}\n1,0.99\n")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "model.pt").touch()
    before = files(folder)
    shown = {"validation_cases.csv", "validation.png", "validation_slices/1.png", "report.html", "results.csv"}
    earlier = {"model.pt", "last_model_epoch=1.pt", "resume_1.pt", *shown}
    assert earlier <= before

    training(**options, max_iterations=1, resume=False, preflight=True).run()
    assert files(folder) == before
    broken = {}
    break_data(broken, small_phantom, tmp_path)
    with pytest.raises(RuntimeError, match="start_run"):  # the data is refused
        training(**options, **broken, max_iterations=1, resume=False).run()
    assert files(folder) == before

    interrupted = training(**options, max_iterations=1, resume=False)
    interrupted.workflow.parser["train#handlers"].insert(0, {"_target_": f"{__name__}.Failing", "at": 1})
    with pytest.raises(RuntimeError, match=r"trainer.*run"):
        interrupted.run()
    assert not files(folder) & earlier and (folder / "evaluation" / "model.pt").exists()

    training(**options, max_iterations=1).run()
    (folder / "results.csv").write_text(f"epoch,{metric}\n1,0.99\n")
    training(**options, max_iterations=2, epoch_length=1, val_interval=2, resume=False).run()
    published = json.loads((folder / "models" / "model.json").read_text())["metrics"][metric]
    assert published < 0.99 and [row["epoch"] for row in iter_csv(folder / "results.csv")] == ["2"]


@pytest.mark.parametrize("bundle", ["training", "training_3d"])
@pytest.mark.parametrize("amp", [False, True])
def test_mixed_precision_of_a_gpu_is_warned_of_on_a_cpu(request, caplog, bundle, amp):
    request.getfixturevalue(bundle)(whole=True, preflight=True, use_sam=False, amp=amp).run()
    warned = [record.getMessage() for record in caplog.records if "--cpu_autocast True" in record.getMessage()]
    assert warned == amp * ["`amp` has no effect on a CPU; for bfloat16 there, use --cpu_autocast True."]


class Slow:
    """A transform so slow that the trainer waits for each batch."""

    def __call__(self, item):
        time.sleep(0.3)
        return item


class EndedWithItsWorkers:
    """A handler that, while the trainer waits for its third batch, does what a scheduler's SIGTERM to a job does."""

    def attach(self, engine):
        engine.add_event_handler(Events.GET_BATCH_STARTED, self)

    def __call__(self, engine):
        if engine.state.iteration == 2:
            for worker in multiprocessing.active_children():
                worker.terminate()
                worker.join()
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "bundle, more",
    [
        ("training", []),
        ("training", [{"_target_": "StatsHandler", "output_transform": "$lambda output: None"}]),
        ("training_3d", []),
    ],
)
def test_run_whose_workers_were_ended_by_a_signal_saves_with_the_shipped_handlers(request, tmp_path, bundle, more):
    run = request.getfixturevalue(bundle)(whole=True, num_workers=1, max_iterations=4, epoch_length=4)
    run.workflow.parser["train#weak_augmentation#transforms"].append({"_target_": f"{__name__}.Slow"})
    run.workflow.parser["train#handlers"][0:0] = [*more, {"_target_": f"{__name__}.EndedWithItsWorkers"}]
    with pytest.raises(SystemExit) as stop:
        run.run()
    assert stop.value.code == 143 and (tmp_path / "output" / "resume_2.pt").exists()


def test_folder_records_what_ran_and_how_it_went(whole_run):
    config = json.loads((whole_run.output_dir / "config.json").read_text())
    assert config["max_iterations"] == 4 and config["labeled_batch_size"] == 2 and config["lr"].startswith("$")
    (start,) = json.loads((whole_run.output_dir / "run.json").read_text())["starts"]
    assert start["seed"] == 0 and "torch" in start["versions"]
    page = (whole_run.output_dir / "report.html").read_text()
    slices = ("best case", "worst slice") if len(whole_run["validate#dataset"]) > 1 else ("largest slice",)
    assert page.count("<svg") > 5
    for title in ("SAM loss", "Distillation loss", "Mutual loss", "Mixing loss", "Gate weight", *slices):
        assert title in page


@pytest.mark.parametrize("name", ["model.pt", "models/model.pt", "last_model_epoch=2.pt"])
def test_model_is_a_plain_state_dict_of_the_student_alone(whole_run, name):
    state = torch.load(whole_run.output_dir / name, weights_only=True)
    assert isinstance(whole_run["network"], MultiViewNet)
    copy.deepcopy(whole_run["network"]).load_state_dict(state, strict=True)
    assert type(state).__name__ in ("dict", "OrderedDict") and all(torch.is_tensor(v) for v in state.values())


def test_tensorboard_has_every_term_by_name_the_learning_rate_and_each_validation_once(whole_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = {}
    for path in (whole_run.output_dir / "tensorboard").rglob("events*"):
        events = EventAccumulator(str(path)).Reload()
        scalars.update({tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]})
    dice = {"gate_weight", "teacher_labeled_dice", "student_labeled_dice"}
    every_step = {name: 4 for name in LOSSES | dice | {"supervised_loss", "learning_rate"}}
    of_classes = [f"/{name}" for name in whole_run["class_names"]]
    validations = {f"{name}{part}": 2 for name in ("val_mean_dice", "val_teacher_dice") for part in ("", *of_classes)}
    assert scalars == every_step | validations


def test_default_gate_is_shut_until_it_measures_agreement(whole_run):
    assert whole_run["distiller"].gate.mode == "agreement"
    assert [step["gate_weight"] for step in whole_run.history] == [0] * 4


@pytest.mark.parametrize("bundle", ["training", "training_3d"])
def test_validation_gate_is_shut_until_agreement_and_validation_were_measured(request, bundle):
    """Agreement is first measured at iteration 10, validation at the end of each epoch, which 5 iterations are."""
    options = {"distillation_gate": "validation", "max_iterations": 10, "epoch_length": 5}
    run = request.getfixturevalue(bundle)(whole=True, **options).run()
    assert [step["gate_weight"] for step in run.history[:9]] == [0] * 9
    dice, gate = run["validate#evaluator"].state.metrics, run["distiller"].gate
    assert gate.validation_scores.tolist() == pytest.approx([dice["val_mean_dice"], dice["val_teacher_dice"]])
    labeled_student, labeled_teacher = gate.labeled_scores
    expected = 1.0
    for first, second in (gate.agreement_scores, gate.validation_scores):
        expected *= min(1, max(0, 1 + (second - first).item() / 0.1)) if second > 0 else 0
    if labeled_student > 0:
        expected *= min(1, max(0, 4 * (labeled_teacher / labeled_student).item() - 2))
    assert gate.weight.item() == pytest.approx(expected, abs=1e-5)  # 0 where neither found anything to agree on


def test_every_term_is_finite_and_both_networks_learn(whole_run):
    assert all(math.isfinite(step[name]) for step in whole_run.history for name in LOSSES)
    assert len(whole_run.history) == 4
    assert whole_run["optimizer"].state and whole_run["sam_optimizer"].state


def test_last_validation_is_reported_beside_the_best(whole_run):
    title, head = whole_run["validate#report"].table()[:2]
    assert "the best of 2 validations" in title and head.endswith("student, last")


def test_picture_shows_the_image_on_the_grid_of_truth_and_prediction(whole_run):
    views = whole_run["validate#report"]._kept["views"]
    assert all(view.image.shape == view.label.shape and view.image.std() > 0.1 for view in views)


def test_mlflow_tracks_every_term_and_the_validation_under_the_run_s_name(training):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (pip install 'knowsam-monai[mlflow]')")
    run = training(whole=True, tracking="mlflow", max_iterations=4, run_name="a run").run()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.output_dir}/mlruns.db")
    (tracked,) = client.search_runs(client.get_experiment_by_name("monai_experiment").experiment_id)
    assert tracked.info.run_name == "a run" and tracked.info.status == "FINISHED"
    assert LOSSES | {"gate_weight", "val_mean_dice", "val_teacher_dice"} <= set(tracked.data.metrics)


@pytest.mark.parametrize("folder", [ROOT, BUNDLE], ids=["repository", "bundle"])
def test_outputs_land_in_the_bundle_by_default(folder, monkeypatch):
    monkeypatch.chdir(folder)
    get = resolved()
    assert Path(get("output_dir")).resolve() == BUNDLE / "output" / "knowsam_phantom_seed0"
    assert Path(get("ckpt_dir")).resolve() == BUNDLE / "models"


def test_output_folder_names_method_patients_and_seed():
    get = resolved(dataset_dir="/data/ACDC", labeled_patients=3, seed=5, use_sam=False)
    assert os.path.basename(get("output_dir")) == "knowsam_without_sam_3_patients_seed5"


@pytest.mark.parametrize("build", ["training", "training_3d"])
def test_sam_teaches_on_labeled_rows_if_there_are_no_others(build, request):
    run = request.getfixturevalue(build)(unlabeled_batch_size=0, mixing_weight=0, distillation_gate="none").run()
    assert all(step["sam_loss"] > 0 and step["distillation_loss"] > 0 for step in run.history)


# --- parts that can be switched off -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key,absent",
    [("mutual_weight", "mutual_loss"), ("entropy_weight", "entropy_loss"), ("mixing_weight", "mixing_loss")],
)
def test_weight_of_zero_leaves_exactly_that_term_out(training, key, absent):
    (step,) = training(max_iterations=1, **{key: 0}).run().history
    assert {name for name in step if name.endswith("loss")} == LOSSES - {absent}


def test_distillation_weight_of_zero_teaches_nothing_while_the_teacher_learns(training):
    run = training(distillation_weight=0, distillation_gate="none").run()
    assert all(step["distillation_loss"] == 0 and step["sam_loss"] > 0 for step in run.history)
    assert run["sam_optimizer"].state


@pytest.mark.parametrize("gate,weight", [("none", 1), ("validation", 0)])
def test_gate_decides_whether_the_student_is_taught(training, gate, weight):
    (step,) = training(max_iterations=1, distillation_gate=gate).run().history
    assert step["gate_weight"] == weight and (step["distillation_loss"] > 0) == (weight > 0)


def test_agreement_gate_is_measured_in_the_first_step(training):
    run = training(max_iterations=1, distillation_gate="agreement").run()
    assert run["distiller"].gate.mode == "agreement" and 0 <= run.history[0]["gate_weight"] <= 1


def test_soft_target_is_another_loss_than_hard(training):
    first = {target: training(max_iterations=1, mutual_target=target).run().history[0] for target in ("hard", "soft")}
    assert first["hard"]["mutual_loss"] != first["soft"]["mutual_loss"]
    assert first["hard"]["entropy_loss"] == first["soft"]["entropy_loss"]


@pytest.mark.parametrize("build", ["training", "training_3d"])
def test_without_sam_nothing_of_it_is_built_and_no_checkpoint_is_opened(build, request):
    options = {"use_sam": False, "sam_variant": "vit_b", "sam_checkpoint": "/nowhere/sam.pth"}
    run = request.getfixturevalue(build)(max_iterations=1, **options).run()
    assert [run[name] for name in ("teacher", "sam_optimizer", "sam_lr_scheduler", "distiller")] == [None] * 4
    assert [set(step) for step in run.history] == [{"loss", "mutual_loss", "entropy_loss", "mixing_loss"}]


WITHOUT_SAM = """
import runpy, sys, importlib.abc, monai.bundle

class NoSAM(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "segment_anything":  # monai itself tried when it was imported; nobody may from here on
            print("tried to import", name)
            raise ImportError(name)

[sys.modules.pop(m) for m in list(sys.modules) if m.split(".")[0] == "segment_anything"]
sys.meta_path.insert(0, NoSAM())
for arguments in sys.argv[1:]:
    sys.argv = ["x", "run", *arguments.split()]
    runpy.run_module("monai.bundle", run_name="__main__")
print("loaded", [m for m in sys.modules if m.split(".")[0] in ("segment_anything", "torchvision")])
"""


def test_command_lines_from_the_bundle_train_and_segment_without_anything_of_sam(small_phantom, tmp_path):
    scan = small_phantom.parent / json.loads(small_phantom.read_text())["validation"][0]["image"]
    network = f"--network_def {json.dumps(SMALL_STUDENT, separators=(',', ':'))}"
    training = (
        "--config_file configs/train.json --use_sam False --mutual_weight 0 --entropy_weight 0 --mixing_weight 0 "
        "--image_size 32 --max_iterations 1 --labeled_batch_size 2 --unlabeled_batch_size 2 --num_workers 0 "
        f"--dataset_dir {small_phantom} --output_dir {tmp_path} --ckpt_dir {tmp_path} {network}"
    )
    inference = (
        f"--config_file configs/inference.json --image_size 16 --ckpt_path {tmp_path}/model.pt --dataset_dir {scan} "
        f"--output_dir {tmp_path}/segmentations {network}"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_SAM, training, inference]
    done = subprocess.run(command, cwd=BUNDLE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded []" and "tried" not in done.stdout
    assert "teacher          none (use_sam is False)" in done.stdout
    assert {"model.pt", "validation.png"} <= files(tmp_path)
    assert (tmp_path / "segmentations" / scan.name.replace(".nii", "_seg.nii")).is_file()


def test_cached_encoder_keeps_an_embedding_of_each_orientation_and_trains(training, tmp_path):
    run = training(sam_encoder="cached", sam_cache_dir=str(tmp_path / "cache"), max_iterations=2).run()
    names = {name for name, p in run["teacher"].named_parameters() if p.requires_grad}
    assert names and not [name for name in names if name.startswith("sam.image_encoder")]
    assert 4 <= len(run["teacher"].cache) <= 8 and run["sam_optimizer"].state
    pipelines = [run[f"train#{kind}_augmentation"].transforms for kind in ("weak", "strong")]
    common = ["RandOrientationd", "RandScaleIntensityd", "RandShiftIntensityd", "RandCoarseDropoutd"]
    assert [[type(t).__name__ for t in pipeline] for pipeline in pipelines] == [common, common]


def test_adapted_encoder_is_augmented_as_published(training):
    run = training()
    names = [[type(t).__name__ for t in run[f"train#{kind}_augmentation"].transforms] for kind in ("weak", "strong")]
    intensities, holes = ["RandScaleIntensityd", "RandShiftIntensityd"], "RandCoarseDropoutd"
    assert names[0] == ["RandFlipd", "RandFlipd", *intensities, "RandAffined", holes]
    assert names[1] == [*intensities, "RandAffined", "OneOf", holes]
    assert run["train#weak_augmentation"].transforms[-1].keys == ("image", "label")


def test_teacher_runs_every_second_iteration(training):
    run = training(distillation_every=2, mixing_weight=0).run()
    assert ["sam_loss" in step for step in run.history] == [False, True]


# --- how it trains ----------------------------------------------------------------------------------------------------


def test_both_optimizers_step_once_in_two_accumulated_iterations(training):
    run = training(accumulation_steps=2, max_iterations=4).run()
    assert len(run.history) == 4
    steps = {int(state["step"]) for state in run["sam_optimizer"].state.values()}
    assert steps == {2}


def test_both_learning_rates_fall_linearly_to_zero(training):
    run = training(max_iterations=4, lr=0.01, sam_lr=0.001).run()
    shares = (1, 0.75, 0.5, 0.25)
    assert run.rates == [pytest.approx([0.01 * share, 0.001 * share]) for share in shares]
    assert run.learning_rates() == [0, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_amp_on_a_cpu_only_warns(training):
    with pytest.warns(UserWarning, match="CUDA is not available"):
        run = training(amp=True, max_iterations=1).run()
    assert len(run.history) == 1


def test_bfloat16_on_the_cpu_trains_both_networks_with_finite_terms(training):
    run = training(cpu_autocast=True, distillation_gate="none").run()
    assert all(math.isfinite(step[name]) for step in run.history for name in LOSSES)
    assert {p.dtype for p in run["network"].parameters()} == {torch.float32}
    assert run["distiller"].autocast_dtype == run["train#inferer"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "key,value,term",
    [
        ("train#method#entropy_weight", "$lambda iteration: 1e39", "entropy_loss"),
        ("distiller#distillation_loss", "$lambda student, teacher: student.sum() * 1e39", "distillation_loss"),
    ],
)
def test_term_that_is_not_finite_stops_the_run_by_name_and_no_checkpoint_is_written(training, key, value, term):
    run = training(whole=True, distillation_gate="none", **{key: value})
    with pytest.raises(RuntimeError) as error:
        run.run()
    assert f"must be finite but loss, {term} is not" in str(root_cause(error.value))
    assert not [name for name in files(run.output_dir) if name.endswith(".pt")]


def test_weights_that_are_not_finite_reach_no_checkpoint_even_if_the_loss_is_finite(training):
    run = training(whole=True, max_iterations=1, **{"sgd#lr": float("inf")})
    with pytest.raises(RuntimeError) as error:
        run.run()
    assert "Weights must be finite in a checkpoint but `unet." in str(root_cause(error.value))
    assert math.isfinite(run.history[0]["loss"]) and not [name for name in files(run.output_dir) if ".pt" in name]


def test_preflight_stops_before_the_first_step_and_writes_no_file(training, caplog):
    caplog.set_level("INFO", logger="knowsam_monai")
    run = training(whole=True, preflight=True).run()
    assert run.history == [] and files(run.output_dir) == set()
    assert "Preflight" in caplog.messages and any("expected finish" in message for message in caplog.messages)
    assert not [record for record in caplog.records if record.levelname == "WARNING" and "validation" in record.message]


# --- the published recipe ---------------------------------------------------------------------------------------------


ACDC_RECIPE = {
    **{"image_size": 256, "labeled_batch_size": 12, "unlabeled_batch_size": 12, "num_classes": 4},
    **{"max_iterations": 50000, "mixing_start": 12000, "lr": 0.01, "labeled_patients": 7, "sam_variant": "vit_b"},
    **{"sam_checkpoint": "bundles/knowsam_acdc/models/sam_vit_b_01ec64.pth", "sam_trainable": "adapters"},
    "sam_lr": 1e-4,
}
LA_RECIPE = {
    **{"image_size": [112, 112, 80], "labeled_batch_size": 2, "unlabeled_batch_size": 2, "num_classes": 2},
    **{"max_iterations": 6000, "lr": 0.01, "labeled_patients": 8, "sam_variant": "vit_b", "sam_slices": 8},
    **{"momentum": 0.9, "weight_decay": 0.0001, "spacing": [0.625] * 3},
}


@pytest.mark.parametrize("configs, published", [(CONFIGS, ACDC_RECIPE), (CONFIGS_3D, LA_RECIPE)], ids=["acdc", "la"])
def test_data_set_brings_the_published_recipe(monkeypatch, configs, published):
    monkeypatch.chdir(ROOT)
    get = resolved(configs, dataset_dir="/data/set")
    assert {key: get(key) for key in published} == published


def test_missing_checkpoint_names_the_command_before_any_data_is_read(training, monkeypatch, tmp_path):
    def read(*args, **kwargs):
        pytest.fail("data was read first")

    monkeypatch.setattr("knowsam_monai.data.load_datalist", read)
    path = tmp_path / "sam_vit_b_01ec64.pth"
    with pytest.raises(RuntimeError) as error:
        training(sam_variant="vit_b", sam_checkpoint=str(path)).run()
    cause = root_cause(error.value)
    assert isinstance(cause, FileNotFoundError)
    assert f"{path} does not exist; get it with `curl" in str(cause) and "sam_vit_b_01ec64.pth` (md5 01ec64d2" in str(
        cause
    )


@pytest.mark.slow
@pytest.mark.skipif(not ACDC, reason="KNOWSAM_ACDC_DIR does not name a folder with ACDC")
def test_real_acdc_trains(training):
    options = {"sam_checkpoint": "$None", "labeled_patients": 7, "cache_workers": 2}
    run = training(whole=True, dataset_dir=ACDC, image_size=64, **options).run()
    assert run["train#trainer"].state.iteration == 2
    assert len(run["train#dataset"]) == 136 and len(run["train#unlabeled_dataset"]) == 1176
    assert len(run["validate#dataset"]) == 20
    assert {"model.pt", "validation.png"} <= files(run.output_dir)
