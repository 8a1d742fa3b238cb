"""The check of a running config: wherever a value is from, before anything is read or written; paths in full."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import monai.bundle
import pytest
import torch
import yaml
from monai.bundle import ComponentLocator, ConfigWorkflow

import knowsam_monai.data
from knowsam_monai.errors import root_cause
from knowsam_monai.files import expand_path
from knowsam_monai.runs.config_check import PATHS, _refuse_unknown_arguments, check_config
from tests.bundles.conftest import BUNDLES
from tests.bundles.test_resolution import files
from tests.processes import finish, run_module, start_ranks

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")
RUNS = (("train",), ("train", "network_plain", "ua_mt"), ("train", "evaluate"), ("inference",))


@pytest.fixture(autouse=True)
def hooks_as_they_were(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture(params=[path.name for path in sorted(BUNDLES.iterdir())])
def bundle(request):
    return request.param


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def started(bundle, names, **override):
    """The parser of a workflow after its check, the first line of its `initialize`."""
    override.setdefault("bundle_root", str(BUNDLES / bundle))
    workflow = ConfigWorkflow(
        files(bundle, names), logging_file=False, meta_file=None, workflow_type="train", **override
    )
    assert workflow.parser["initialize"][0] == {"_target_": "knowsam_monai.runs.check_config"}
    workflow.parser["initialize"] = workflow.parser["initialize"][:1]
    workflow.initialize()
    return workflow.parser


@pytest.mark.parametrize("source", ["override", "args_file.json", "args_file.yaml", "overlay.json", "overlay.yaml"])
@pytest.mark.parametrize("names", RUNS, ids="+".join)
def test_wrong_value_ends_before_anything_is_read_or_written(bundle, names, source, tmp_path, monkeypatch):
    for name in ("load_datalist", "inference_items"):  # looked up before, since a lazy import would keep the substitute
        assert callable(getattr(knowsam_monai.data, name))
    for name in ("load_datalist", "inference_items", "evaluation.inference_items"):
        monkeypatch.setattr(f"knowsam_monai.data.{name}", lambda *args, **kwargs: pytest.fail("data was read"))
    written = {"in_channels": "1", "output_dir": str(tmp_path / "output")}
    arguments, config_file = {}, files(bundle, names)
    if source == "override":
        arguments = written
    elif source.startswith("args"):
        dump = json.dumps if source.endswith("json") else yaml.safe_dump
        (tmp_path / source).write_text(dump({"config_file": config_file, **written}))
        config_file, arguments = None, {"args_file": str(tmp_path / source)}
    else:
        (tmp_path / source).write_text((json.dumps if source.endswith("json") else yaml.safe_dump)(written))
        config_file = [*config_file, str(tmp_path / source)]
    with pytest.raises(RuntimeError) as error:
        monai.bundle.run(config_file=config_file, logging_file=False, **arguments)
    cause = root_cause(error.value)
    assert isinstance(cause, ValueError) and str(cause).startswith("`in_channels` must be a number of channels")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "bundle, names", [("knowsam_acdc", ("train.json", "multi_gpu_train.json")), ("knowsam_la", ("inference.json",))]
)
def test_command_line_ends_with_the_sentence_and_exit_code_1(bundle, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = [str(BUNDLES / bundle / "configs" / name) for name in names]
    words = ["run", "--config_file", configs, "--dataset_dri", "/data"]
    code, said = run_module(tmp_path / "said.txt", "monai.bundle", *words)
    assert code == 1 and "Traceback" not in said and not (tmp_path / "output").exists()
    last = said.strip().splitlines()[-1]
    assert last.startswith("ValueError: `dataset_dri` must be a key") and last.endswith("did you mean `dataset_dir`?")


@pytest.mark.parametrize("word", [["--sam_checkpoint", "None"], ["--sam_checkpoint=None"]])
def test_none_on_the_command_line_which_monai_would_ignore_is_an_error(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, log = BUNDLES / "knowsam_acdc" / "configs" / "train.json", tmp_path / "said.txt"
    code, said = run_module(log, "monai.bundle", "run", "--config_file", config, *word)
    assert code == 1 and "Traceback" not in said and list(tmp_path.iterdir()) == [log]
    last = said.strip().splitlines()[-1]
    assert last.startswith("ValueError: `sam_checkpoint` must not be None on") and last.endswith("'$None'.")


@pytest.mark.parametrize(
    "key, remedy",
    [
        ("output_dir", "leave it out for the bundle's own value."),
        ("train#method", "write --train#method '$None'."),
        ("max_grad_norm", "write --max_grad_norm '$None'."),
    ],
)
def test_none_is_only_advised_where_it_is_accepted(key, remedy, home, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", f"--{key}", "None"])
    with pytest.raises(RuntimeError) as error:
        started("knowsam_acdc", ("train",))
    sentence = f"`{key}` must not be None on the command line, where MONAI ignores it; {remedy}"
    assert str(root_cause(error.value)) == sentence


def run_wrong(folder):
    monai.bundle.run(
        config_file=files("knowsam_acdc", ("train", "multi_gpu_train")),
        logging_file=False,
        val_interval=10,
        max_iterations=4,
        epoch_length=2,
        output_dir=f"{folder}/output",
        device="cpu",
    )


def test_both_of_two_ranks_end_where_one_process_would(tmp_path):
    ranks = start_ranks(tmp_path, 2, run_wrong, str(tmp_path))
    logs = [tmp_path / f"rank{rank}.log" for rank in (0, 1)]
    assert [finish(process, log, seconds=60) for process, log in zip(ranks, logs)] == [1, 1]
    assert all("`val_interval` must be 1 to 2, the epochs of this run" in log.read_text() for log in logs)
    assert not (tmp_path / "output").exists()


def test_all_training_configs_start_the_same_way(bundle):
    for path in (BUNDLES / bundle / "configs").glob("*.json"):
        if path.stem not in ("train", "evaluate", "inference"):
            assert "initialize" not in json.loads(path.read_text()), path


def test_values_reach_the_components_in_the_config_s_own_form():
    parser = started("knowsam_acdc", ("train",), image_size=[32.0, 32], device="cpu", max_iterations=10.0)
    assert parser.get_parsed_content("device") == torch.device("cpu") and parser["image_size"] == 32
    assert parser.get_parsed_content("validate#inferer").roi_size == [32, 32]
    assert parser.get_parsed_content("mutual_ramp_up_iterations") == 10
    assert parser["lr"].startswith("$")  # what was right stays as it was written


@pytest.mark.parametrize("names", RUNS, ids="+".join)
def test_every_path_is_expanded_wherever_it_is_from(bundle, names, home, tmp_path):
    known = [key for key in PATHS if key in started(bundle, names).config and key != "bundle_root"]  # must exist
    assert len(known) >= 3
    forms = [
        ("~/a b", home / "a b"),
        ("$SCRATCH/a", home.parent / "scratch" / "a"),
        ("/x/${SCRATCH}", f"/x/{home.parent}/scratch"),
    ]
    given = dict(zip(known, itertools.cycle(forms)))  # each key one form, each form of some key
    Path(given["dataset_dir"][1]).mkdir(parents=True)  # must exist too
    cached = {"sam_encoder": "cached"} if "sam_cache_dir" in known else {}
    overlay = tmp_path / "paths.json"
    overlay.write_text(json.dumps({**cached, **{key: form for key, (form, _) in given.items()}}))
    workflow = ConfigWorkflow(
        [*files(bundle, names), str(overlay)], logging_file=False, meta_file=None, workflow_type="train"
    )
    workflow.parser["initialize"] = workflow.parser["initialize"][:1]
    workflow.initialize()
    for key, (_, expanded) in given.items():
        assert workflow.parser.get_parsed_content(key) == str(expanded)
    assert not list(tmp_path.rglob("~*"))


def test_path_that_is_derived_follows(bundle, home):
    shutil.copytree(BUNDLES / bundle / "configs", home / "bundle" / "configs")
    parser = started(bundle, ("train",), bundle_root="~/bundle")
    assert parser.get_parsed_content("output_dir") == f"{home}/bundle/output/knowsam_phantom_seed0"
    assert parser.get_parsed_content("ckpt_dir") == f"{home}/bundle/models"
    assert parser.get_parsed_content("datalist#phantom_dir") == f"{home}/bundle/data/phantom"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("network_def", "unet", "`network_def` must be a component, as in .*, but is the text 'unet'"),
        (
            "network_def#spatial_dim",
            2,
            "`network_def#spatial_dim` must be an argument of .* did you mean `spatial_dims`",
        ),
        (
            "train#trainer#max_epoch",
            3,
            "`train#trainer#max_epoch` must be an argument of .*Trainer but is not; did you",
        ),
        ("validate#evaluator#x", 3, "`validate#evaluator#x` must be an argument of .*Evaluator but is not; it takes "),
        ("lr_scheduler#powerr", True, "`lr_scheduler#powerr` must be an argument of torch.optim.* `power`"),
    ],
)
def test_component_that_could_not_be_built_ends_before_anything_is_read(bundle, key, value, message, home):
    with pytest.raises(RuntimeError) as error:
        started(bundle, ("train",), **{key: value})
    assert re.match(message, str(root_cause(error.value)))


@pytest.mark.parametrize("names", RUNS, ids="+".join)
def test_folder_of_another_bundle_or_of_none_ends_before_anything_is_written(bundle, names, tmp_path, monkeypatch):
    (other,) = [path for path in BUNDLES.iterdir() if path.name != bundle]
    shutil.copytree(other / "configs", tmp_path / "other" / "configs")
    (tmp_path / "none").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for folder, problem in (("other", "is that of '.* distillation'; pass"), ("none", "has no configs/")):
        monkeypatch.chdir(tmp_path / folder)
        workflow = ConfigWorkflow(files(bundle, names), logging_file=False, workflow_type="train")
        workflow.initialize()
        with pytest.raises(RuntimeError) as error:
            workflow.run()
        assert re.match(f"`bundle_root` must be .* but {tmp_path / folder} {problem}", str(root_cause(error.value)))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("names", RUNS[:1] + RUNS[2:3], ids="+".join)
@pytest.mark.parametrize("data", ["/nowhere", "/nowhere/list.json"])
def test_data_that_does_not_exist_ends_before_anything_else_is_asked_for(bundle, names, data, home):
    with pytest.raises(RuntimeError) as error:
        started(bundle, names, dataset_dir=data)
    assert re.match(f"`dataset_dir` must be .* but {data} does not exist", str(root_cause(error.value)))


def test_copy_of_a_bundle_is_its_own_root_and_no_root_is_needed_where_nothing_uses_it(bundle, tmp_path, monkeypatch):
    shutil.copytree(BUNDLES / bundle / "configs", tmp_path / "copy" / "configs")
    monkeypatch.chdir(tmp_path / "copy")
    for config in (tmp_path / "copy" / "configs" / "train.json", BUNDLES / bundle / "configs" / "train.json"):
        check_writable_in(config)
    monkeypatch.chdir(tmp_path)
    inference = BUNDLES / bundle / "configs" / "inference.json"
    check_writable_in(inference, **{key: str(tmp_path) for key in ("dataset_dir", "output_dir", "ckpt_path")})


def check_writable_in(config, **override):
    step = {"_target_": "knowsam_monai.runs.check_writable", "output_dir": "out"}
    workflow = ConfigWorkflow(str(config), logging_file=False, workflow_type="train", run=[step], **override)
    workflow.initialize()
    workflow.run()
    assert Path("out").is_dir()


@pytest.mark.parametrize(
    "target, remedy",
    [
        ("BasicUNett", r"did you mean BasicUNet\?"),
        ("DiceCELos", r"did you mean DiceCELoss\?"),
        ("ValidationHandle", r"did you mean ValidationHandler\?"),
        ("knowsam_monai.networks.MultiViewNett", r"did you mean knowsam_monai.networks.MultiViewNet\?"),
        ("my_package.Net", r"write it as package.module.Class\."),
    ],
)
def test_class_of_the_command_line_that_does_not_exist_is_one_sentence(bundle, target, remedy, home, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--network_def", "{...}"])
    with pytest.raises(RuntimeError) as error:
        started(bundle, ("train",), network_def={"_target_": target, "spatial_dims": 2})
    sentence = f"`network_def` must be a component that exists but {target} does not; {remedy}"
    assert re.fullmatch(sentence, str(root_cause(error.value)))


def renames(function):
    """A decorator as libraries use it for arguments that got a new name."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **{"channels" if key == "channel" else key: value for key, value in kwargs.items()})

    return wrapper


@renames
def renamed(channels):
    return channels


def test_name_that_a_foreign_decorator_takes_is_an_argument():
    _refuse_unknown_arguments("part", {"_target_": f"{__name__}.renamed", "channel": 3}, ComponentLocator())
    assert renamed(channel=3) == 3


@pytest.mark.parametrize("names", RUNS[:1] + RUNS[-1:], ids="+".join)
@pytest.mark.parametrize("words", [["--output_dir", "/data/it's #3 @a"], ["--output_dir=/data/it's #3 @a"]], ids=len)
def test_hash_in_a_path_of_the_command_line_stays_one(bundle, names, words, monkeypatch):
    """MONAI replaces it by ::."""
    path = "/data/it's #3 @a"
    monkeypatch.setattr(sys, "argv", ["run", *words])
    parser = started(bundle, names, output_dir=path)
    assert parser.get_parsed_content("output_dir") == path


def test_data_and_student_are_found_below_a_folder_with_a_hash(bundle, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "scans #1"
    folder.mkdir()
    (folder / "list.json").write_text('{"labeled": [], "validation": []}')
    (folder / "last.pt").touch()
    start = {"student": {"settings": {"image_size": 32}}}
    (folder / "run.json").write_text(json.dumps({"starts": [start]}))
    data, student = str(folder / "list.json"), str(folder / "last.pt")
    monkeypatch.setattr(sys, "argv", ["run", "--dataset_dir", data])
    started(bundle, ("train",), dataset_dir=data)  # was refused: the file with :: does not exist
    monkeypatch.setattr(sys, "argv", ["run", "--ckpt_path", student])
    size = 64 if bundle == "knowsam_acdc" else [16, 16, 16]
    started(bundle, ("inference",), ckpt_path=student, image_size=size)
    assert any("was trained with" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "key, value, end",
    [
        ("class_names", ["a", "b#2", "c"], "MONAI reads # as ::, so use neither."),
        ("run_name", "run#3", "MONAI reads # as ::, so use neither."),
        ("output_dir", "/data/run#3", "so use neither in a config file; on the command line, a path may have a #."),
    ],
)
@pytest.mark.parametrize("is_typed", [True, False], ids=["command line", "config file"])
def test_hash_elsewhere_is_refused(bundle, key, value, end, is_typed, monkeypatch):
    """MONAI replaces it by ::, which would be the name in tables and folders."""
    words = [f"--{key}", str(value)] if is_typed else []
    monkeypatch.setattr(sys, "argv", ["run", *words])
    if is_typed and key == "output_dir":
        assert started(bundle, ("train",), **{key: value}).get_parsed_content(key) == value
        return
    with pytest.raises(RuntimeError) as error:
        started(bundle, ("train",), **{key: value})
    sentence = str(root_cause(error.value))
    assert sentence.startswith(f"`{key}` must be ") and ", and without # or ::, but is " in sentence
    assert sentence.endswith(end)


@pytest.mark.parametrize("names", [("train", "multi_gpu_train", "evaluate"), ("train", "evaluate", "multi_gpu_train")])
def test_evaluation_in_several_processes_is_refused(bundle, names, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(RuntimeError) as error:
        started(bundle, names)
    assert str(root_cause(error.value)) == (
        "`process_timeout` must be None in an evaluation, which runs in one process, but is 600; leave out "
        "multi_gpu_train.json, and start it without torchrun."
    )


def test_expression_may_give_a_name_with_a_hash(bundle):
    parser = started(bundle, ("train",), run_name=r"$'run \x233'")
    assert parser.get_parsed_content("run_name") == "run #3"


@pytest.mark.parametrize("value", ["$@paths#one", "@paths#one", "$'/data/' + @paths#one[1:]"])
def test_hash_of_an_expression_stays_an_expression(value, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--output_dir", value])
    parser = started("knowsam_acdc", ("train",), output_dir=value, paths={"one": "/run"})
    assert parser.get_parsed_content("output_dir") in ("/run", "/data/run")


def test_path_object_is_a_path(tmp_path):
    assert started("knowsam_acdc", ("train",), output_dir=tmp_path / "a")["output_dir"] == str(tmp_path / "a")


@pytest.mark.parametrize(
    "path, message",
    [
        ("~nosuch/x", "begins with '~nosuch', and there is no such user; .* ./~nosuch"),
        ("/data/$NO_SUCH/x", r"environment variables that are set but \$NO_SUCH in /data/\$NO_SUCH/x is not"),
        ("/data/${NO_SUCH}", r"environment variables that are set but \$\{NO_SUCH\}"),
    ],
)
def test_path_that_cannot_be_expanded_is_one_sentence(bundle, home, path, message):
    with pytest.raises(ValueError, match=f"^`output_dir` must .*{message}"):
        expand_path(path, "output_dir")
    with pytest.raises(RuntimeError) as error:
        started(bundle, ("train",), output_dir=path)
    assert str(root_cause(error.value)).startswith("`output_dir` must")


def test_folder_with_a_dollar_in_its_name_is_taken_as_it_is(tmp_path):
    (tmp_path / "US$HOME").mkdir()
    assert expand_path(tmp_path / "US$HOME", "dataset_dir") == str(tmp_path / "US$HOME")


def test_without_pydantic_paths_are_expanded_and_nothing_is_checked(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic", None)
    monkeypatch.delitem(sys.modules, "knowsam_monai.runs.values", raising=False)
    parser = started("knowsam_acdc", ("inference",), output_dir="~/out", in_channels="1")
    assert parser["output_dir"] == f"{home}/out"


def test_check_outside_of_a_config_is_an_error():
    with pytest.raises(RuntimeError, match="`check_config` must be called by a config"):
        check_config()


def test_signal_during_the_import_of_a_component_is_not_lost(home, tmp_path, monkeypatch):
    (tmp_path / "stopped.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises((KeyboardInterrupt, RuntimeError)) as error:
        started("knowsam_acdc", ("train",), loss={"_target_": "stopped.Loss"})
    assert error.type is KeyboardInterrupt


def test_disabled_component_may_have_any_argument(bundle):
    """MONAI never builds it."""
    started(bundle, ("train",), **{"lr_scheduler#powerr": 1, "lr_scheduler#_disabled_": True})
