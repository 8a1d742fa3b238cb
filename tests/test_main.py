"""python -m knowsam_monai: what each verb does, says and returns."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

import knowsam_monai
from knowsam_monai.__main__ import CHECK, PHANTOM, PREDICT, REPORT, main, parser

VERBS = {"phantom": PHANTOM, "check": CHECK, "report": REPORT, "predict": PREDICT}


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
        (["phantom", "{}", "--labeled", "0"], "`num_labeled` must be at least 1"),
        (["report", "{}/nowhere"], "`folder` must be a run's folder but "),
        (["predict", "{}", "--bundle", "{}", "--output", "{}/out"], "`bundle` must be a bundle's folder but "),
        (["check", "{}/list.json", "--labeled_patients", "7"], "`labeled_patients` must be left out with a data-list"),
    ],
)
def test_mistake_is_one_sentence_on_stderr_and_exit_code_1(tmp_path, capsys, arguments, sentence):
    assert main([argument.format(tmp_path) for argument in arguments]) == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {sentence}") and output.err.count("\n") == 1 and "Traceback" not in output.err


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
        ["report"],
        ["predict", "x"],
        ["predict", "x", "--bundle", "b", "--output", "o", "--set", "a"],
        ["phantom", "x", "--seed", "-1"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and "usage: python -m knowsam_monai" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_the_help_are_commands_that_are_understood(verb, capsys):
    examples = [line.strip() for line in VERBS[verb].splitlines() if line.startswith("  python")]
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example)
        assert words[:4] == ["python", "-m", "knowsam_monai", verb]
        assert parser().parse_args(words[3:]).call.__name__ == verb
    with pytest.raises(SystemExit) as error:
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert error.value.code == 0 and examples[0] in shown and "Exit codes: 0 done, 1" in shown


def test_help_and_import_do_not_wait_for_torch():
    program = "import sys, knowsam_monai.__main__ as m; m.parser(); print({'torch', 'monai'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()" and knowsam_monai.__version__
