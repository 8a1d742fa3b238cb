"""knowsam: what each verb does, says and returns."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import zipfile

import nibabel
import numpy as np
import pytest

import knowsam_monai
from knowsam_monai.__main__ import CHECK, PHANTOM, PREDICT, REPORT, TRAIN, ZIP, main, parser
from tests.full_disk import full_disk

VERBS = {"phantom": PHANTOM, "check": CHECK, "train": TRAIN, "report": REPORT, "predict": PREDICT, "zip": ZIP}

pytestmark = pytest.mark.usefixtures("root_logging_as_it_was")


def test_phantom_is_written_and_its_list_named(tmp_path, capsys):
    arguments = ["--labeled", "1", "--unlabeled", "0", "--validation", "0", "--test", "0", "--size", "32"]
    assert main(["phantom", str(tmp_path / "atria"), "--anatomy", "left_atrium", *arguments]) == 0
    output = capsys.readouterr()
    assert output.out == f"Data list: {tmp_path / 'atria' / 'dataset.json'}\n" and output.err == ""
    assert len(list(tmp_path.rglob("*.nii.gz"))) == 2


def test_report_is_written_where_it_is_told_to(tmp_path, capsys):
    (tmp_path / "results.csv").write_text("epoch,val_mean_dice\n1,0.5\n")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"Report: {tmp_path / 'page.html'}\n"
    assert "0.500" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (["phantom", "{}", "--labeled", "0"], "`--labeled` must be at least 1"),
        (["phantom", "{}", "--size", "4"], "`--size` must be at least 32 voxels but is 4."),
        (["report", "{}/nowhere"], "`folder` must be a run's folder but "),
        (["predict", "{}", "--bundle", "{}", "--output", "{}/out"], "`bundle` must be one of acdc, la, or the"),
        (["zip", "la", "--run", "{}"], "`run` must be the `output_dir` of a training but "),
        (["check", "{}/nowhere"], "`DATA` must be the official ACDC release"),
        (["predict", "{}/nowhere", "--bundle", "acdc", "--output", "{}/out"], "`SCANS` must be"),
        (["predict", "{}", "--bundle", "acdc", "--output", "{}"], "`--output` must not be the folder of the images"),
        (["check", "{}/list.json", "--labeled_patients", "7"], "`labeled_patients` must be left out with a data-list"),
    ],
)
def test_mistake_is_one_sentence_on_stderr_and_exit_code_1(tmp_path, capsys, arguments, sentence):
    assert main([argument.format(tmp_path) for argument in arguments]) == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {sentence}") and output.err.count("\n") == 1 and "Traceback" not in output.err


def test_data_is_checked_by_the_rules_of_a_bundle(tmp_path, monkeypatch):
    monkeypatch.setenv("KNOWSAM_CACHE_DIR", str(tmp_path / "cache"))
    images = np.random.default_rng(0).random((2, 8, 8, 4, 2), dtype=np.float32)
    for number, image in enumerate(images):
        for name, array in (("volume", image[..., 0]), ("slice", image[..., 0, 0]), ("rgb", image)):
            nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 1, 8, 1])), tmp_path / f"{name}{number}.nii")
            label = np.uint8(255 * (array > 0.5)) if name != "rgb" else np.uint8(array[..., 0] > 0.5)
            nibabel.save(nibabel.Nifti1Image(label, np.diag([1, 1, 8, 1])), tmp_path / f"{name}{number}_gt.nii")
    codes = {}
    for name in ("volume", "slice", "rgb"):
        pairs = [[{"image": f"{name}{number}.nii", "label": f"{name}{number}_gt.nii"}] for number in range(2)]
        (tmp_path / "list.json").write_text(json.dumps({"labeled": pairs[0], "validation": pairs[1]}))
        for bundle in ([], ["--bundle", "acdc"], ["--bundle", "acdc", "--num_classes", "2"], ["--bundle", "la"]):
            codes.setdefault(name, []).append(main(["check", str(tmp_path / "list.json"), *bundle]))
    assert codes == {"volume": [0, 1, 0, 0], "slice": [0, 1, 0, 1], "rgb": [0, 1, 1, 1]}


@pytest.mark.parametrize("home", ["~", "$STUDIES", "${STUDIES}"])
def test_home_folder_and_variables_are_expanded_in_every_path(tmp_path, monkeypatch, home):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home" / "run").mkdir(parents=True)
    for variable in ("HOME", "STUDIES", "KNOWSAM_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    (tmp_path / "home" / "run" / "results.csv").write_text("epoch,val_mean_dice\n1,0.5\n")
    counts = ["--labeled", "1", "--unlabeled", "0", "--validation", "1", "--test", "0", "--size", "32"]
    assert main(["phantom", f"{home}/phantom", *counts]) == 0
    assert main(["check", f"{home}/phantom/dataset.json"]) == 0
    assert main(["report", f"{home}/run", f"--output={home}/page.html"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"] and (tmp_path / "home" / "page.html").is_file()


def test_fault_of_the_program_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr("knowsam_monai.runs.report.page.render", lambda runs: {}["a fault"])
    (tmp_path / "results.csv").write_text("epoch\n")
    with pytest.raises(KeyError, match="a fault"):
        main(["report", str(tmp_path)])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["train", "acdc", "data"],
        ["check", "x", "--max_iterations", "3"],
        ["report"],
        ["predict", "x"],
        ["zip"],
        ["predict", "x", "--bundle", "b", "--output", "o", "--set", "a"],
        ["phantom", "x", "--seed", "-1"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and "usage: knowsam" in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch):
    """The command lines that take this program's place."""
    commands = []
    monkeypatch.setattr("os.execv", lambda program, words: commands.append((program, words)))
    return commands


def bundle_at(folder, *configs):
    for config in ("metadata", "train", *configs):
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        (folder / "configs" / f"{config}.json").write_text("{}")


def test_train_is_the_bundle_command_with_the_same_keys(tmp_path, monkeypatch, started, capsys):
    monkeypatch.chdir(tmp_path)
    bundle_at(tmp_path / "bundles" / "knowsam_acdc")
    keys = ["--dataset_dir", "my data/list.json", "--lr=-1", "--class_names", "['liver', 'tumor']", "--seed", "-1"]
    main(["train", "acdc", *keys])
    (program, words), said = started[0], capsys.readouterr().out
    config = "bundles/knowsam_acdc/configs/train.json"
    line = ["-m", "monai.bundle", "run", "--config_file", config, "--bundle_root", "bundles/knowsam_acdc", *keys]
    assert program == sys.executable and words == [sys.executable, "-W", "ignore:parsing config_file", *line]
    assert shlex.split(said) == ["python", *line] and """"['liver', 'tumor']\"""" in said


def test_train_puts_overlays_after_train_json_and_keeps_a_bundle_root_that_is_given(tmp_path, monkeypatch, started):
    monkeypatch.chdir(tmp_path)
    bundle_at(tmp_path / "mine", "network_plain")
    (tmp_path / "own.yaml").write_text("lr: 1")
    main(["train", "./mine", "--with", "network_plain,own.yaml", "--bundle_root", "elsewhere"])
    configs = "['mine/configs/train.json', 'mine/configs/network_plain.json', 'own.yaml']"
    assert started[0][1][4:] == ["monai.bundle", "run", "--config_file", configs, "--bundle_root", "elsewhere"]


def test_overlay_may_be_repeated_and_be_a_file_with_commas(tmp_path, monkeypatch, started):
    monkeypatch.chdir(tmp_path)
    bundle_at(tmp_path / "mine", "evaluate", "network_plain")
    (tmp_path / "a,b.json").write_text("{}")
    main(["train", "./mine", "--with", "a,b.json", "--with", "network_plain,evaluate"])
    files = ["mine/configs/train.json", "a,b.json", "mine/configs/network_plain.json", "mine/configs/evaluate.json"]
    assert started[0][1][7] == str(files)


def test_zip_has_the_bundle_and_the_student_of_a_run_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle_at(tmp_path / "knowsam_mine")
    for folder in ("run", "knowsam_mine/models", "knowsam_mine/data"):
        (tmp_path / folder).mkdir()
    for file in ("run/model.pt", "run/config.json", "run/checkpoint.pt", "knowsam_mine/models/sam_vit_b_01ec64.pth"):
        (tmp_path / file).touch()
    (tmp_path / "knowsam_mine" / "data" / "scan.nii").touch()
    assert main(["zip", "./knowsam_mine", "--run", "run"]) == 0
    with zipfile.ZipFile("knowsam_mine.zip") as archive:
        files = ("configs/metadata.json", "configs/train.json", "models/config.json", "models/model.pt")
        assert sorted(archive.namelist()) == [f"knowsam_mine/{file}" for file in files]


def test_train_copies_the_shipped_bundle_once_and_predict_reads_it_where_it_is(tmp_path, monkeypatch, started, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "nowhere", "--bundle", "la", "--output", "out"]) == 1
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "knowsam_la").exists()
    main(["train", "la"])
    copied = {path.relative_to(tmp_path / "knowsam_la").parts[0] for path in (tmp_path / "knowsam_la").rglob("*.*")}
    assert copied == {"configs", "docs", "large_files.yml"}
    config = tmp_path / "knowsam_la" / "configs" / "train.json"
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 5'))
    main(["train", "knowsam_la", "--with", "evaluate"])
    assert '"seed": 5' in config.read_text()
    assert [words[7] for _, words in started] == [
        "knowsam_la/configs/train.json",
        "['knowsam_la/configs/train.json', 'knowsam_la/configs/evaluate.json']",
    ]


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (
            ["acdd"],
            "`bundle` must be one of acdc, la, or the folder of a bundle, but acdd has no configs/metadata.json.",
        ),
        (["."], "`bundle` must be one of acdc, la, or the folder of a bundle, but . has no configs/metadata.json."),
        (
            ["b", "--with", "mean_teecher"],
            "`--with` must name configs of b, or files, but has mean_teecher; did you mean",
        ),
        (
            ["b", "--with", "o.json"],
            "`--with` must lead to a config with keys and values but o.json is not one (line ",
        ),
        (
            ["b", "--with", "o.yaml"],
            "`--with` must lead to a config with keys and values but o.yaml is not one (line ",
        ),
        (
            ["b", "--args_file=o.json"],
            "`--args_file` must lead to a config with keys and values but o.json is not one (line ",
        ),
        (
            ["b", "--args_file", "x.json"],
            "`--args_file` must lead to a config with keys and values but x.json is not one",
        ),
        (
            ["b", "--args_file", "empty.yaml"],
            "`--args_file` must lead to a config with keys and values but empty",
        ),
        (
            ["b", "--with", "c.json", "--train#metod#_disabled_", "True"],
            "`train#metod#_disabled_` must lead to a part of this config but `train` has no 'metod'; did you mean "
            "`train#method#_disabled_`?",
        ),
        (
            ["b", "--tran#x", "1"],
            "`tran#x` must lead to a part of this config but the config has no 'tran'; correct it.",
        ),
        (["b", "--with", "c.json", "--train#handlers#3#x", "1"], "`train#handlers#3#x` must lead to a part of this"),
        (
            ["b", "--with", "nested"],
            "`trian#nope` must lead to a part of this config but the config has no 'trian'; corr",
        ),
    ],
)
def test_train_says_what_it_does_not_find(tmp_path, monkeypatch, started, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    bundle_at(tmp_path / "b", "mean_teacher")
    (tmp_path / "b" / "configs" / "nested.json").write_text('{"trian#nope": 1}')
    (tmp_path / "o.json").write_text('{\n"lr": 1,\n}')
    (tmp_path / "o.yaml").write_text("lr: 1\nseed: [\n")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "c.json").write_text('{"train": {"method": {}, "handlers": [{}]}}')
    assert main(["train", *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"error: {sentence}") and not started


def test_train_says_in_one_sentence_that_nothing_can_be_written(monkeypatch, started, capsys):
    monkeypatch.chdir("/proc")  # not writable even for root
    assert main(["train", "la"]) == 1
    said = "error: The working folder must be writable, for a copy of the bundle in ./knowsam_la, but /proc is not ("
    output = capsys.readouterr().err
    assert output.startswith(said) and output.count("\n") == 1 and not started


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["train", "la"], "The working folder must be writable, for a copy of the bundle in ./knowsam_la, but "),
        (["zip", "./b"], "The working folder must be writable, for b.zip, but "),
        (["phantom", "p", "--size", "32"], "`FOLDER` must be writable but p is not (File too large)"),
    ],
    ids=("train", "zip", "phantom"),
)
def test_full_disk_is_one_sentence_and_leaves_nothing(arguments, sentence, tmp_path, monkeypatch, started, capsys):
    monkeypatch.chdir(tmp_path)
    bundle_at(tmp_path / "b")
    (tmp_path / "b" / "models").mkdir()
    for name in ("model.pt", "config.json"):
        (tmp_path / "b" / "models" / name).write_bytes(np.random.default_rng(0).bytes(2000))
    with full_disk(1000):
        assert main(arguments) == 1
    output = capsys.readouterr().err
    assert output.startswith(f"error: {sentence}") and "File too large" in output and output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["b"] and not started


def test_zip_in_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, capsys):
    bundle_at(tmp_path / "b")
    for name in ("model.pt", "config.json"):
        (tmp_path / name).touch()
    monkeypatch.chdir("/proc")  # not writable even for root
    assert main(["zip", str(tmp_path / "b"), "--run", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(
        "error: The working folder must be writable, for b.zip, but /proc is not ("
    )


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_the_help_are_commands_that_are_understood(verb, capsys):
    examples = [line.strip() for line in VERBS[verb].splitlines() if line.startswith("  knowsam")]
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example)
        assert words[:2] == ["knowsam", verb]
        options, keys = parser().parse_known_args(words[1:])
        assert options.call.__name__.rstrip("_") == verb and (verb == "train" or not keys)
    with pytest.raises(SystemExit) as error:
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert error.value.code == 0 and examples[0] in shown and "Exit codes: 0 done, 1" in shown


def test_help_and_import_do_not_wait_for_torch():
    program = "import sys, knowsam_monai.__main__ as m; m.parser(); print({'torch', 'monai'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()" and knowsam_monai.__version__
