"""`make` takes the first interpreter that can make its environment, and says in one sentence why there is none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")

# an interpreter of some version that makes no environment, but writes down who was to make it
STUB = """#!{python}
import pathlib, sys
words, version = sys.argv[1:], {version}
if words == ["--version"]:
    print("Python %d.%d.0" % version)
elif words[0] == "-c":
    sys.version_info = (*version, 0)
    if not {has_pip}:
        sys.modules["ensurepip"] = None
    exec(words[1])
elif words[:3] == ["-m", "venv", "--clear"]:
    pathlib.Path(words[3]).mkdir()
    pathlib.Path(words[3], "made_by").write_text({name!r})
"""


@pytest.fixture
def make_environment(tmp_path):
    """Run make where only these interpreters are; returns its result and the name of the one that it took."""

    def run(interpreters, *arguments):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "touch").symlink_to(shutil.which("touch"))
        for name, version in interpreters.items():
            has_pip = version[2:] != ("no ensurepip",)
            stub = STUB.format(python=sys.executable, version=version[:2], has_pip=has_pip, name=name)
            (folder / name).write_text(stub)
            (folder / name).chmod(0o755)
        venv = tmp_path / "venv"
        command = [MAKE, "--no-print-directory", f"VENV={venv}", *arguments, f"{venv}/.created"]
        done = subprocess.run(command, cwd=ROOT, env={"PATH": str(folder)}, capture_output=True, text=True)
        made_by = venv / "made_by"
        return done, made_by.read_text() if made_by.exists() else None

    return run


@pytest.mark.parametrize("minor", range(10, 15))
def test_python3_of_today_is_taken(make_environment, minor):
    done, made_by = make_environment({"python3": (3, minor), "python3.11": (3, 11)})
    assert done.returncode == 0 and made_by == "python3"


@pytest.mark.parametrize("unfit", [(3, 9), (3, 15), (3, 13, "no ensurepip")])
def test_another_interpreter_is_taken_where_python3_is_not_fit(make_environment, unfit):
    done, made_by = make_environment({"python3": unfit, "python3.10": (3, 10), "python3.12": (3, 12)})
    assert done.returncode == 0 and done.stderr == "" and made_by == "python3.12"


def test_named_interpreter_is_taken_or_refused_and_no_other(make_environment):
    done, made_by = make_environment({"python3": (3, 12), "python3.9": (3, 9)}, "PYTHON=python3.9")
    assert done.returncode != 0 and made_by is None
    assert done.stderr.startswith(
        "Python must be 3.10 to 3.14 but these were tried: python3.9 (Python 3.9.0); install one, or "
    )


def test_no_interpreter_is_one_sentence_that_says_what_is_there(make_environment):
    done, _ = make_environment({"python3": (3, 9)})
    said = done.stderr.splitlines()[0]
    assert said.startswith(
        "Python must be 3.10 to 3.14 but these were tried: python3 (Python 3.9.0), python3.14 (not found), "
    )
    assert "`make PYTHON=/opt/python3.12/bin/python" in said


def test_python_without_ensurepip_names_the_package_of_debian(make_environment):
    done, made_by = make_environment({"python3": (3, 13, "no ensurepip")})
    said = done.stderr.splitlines()[0]
    assert said == "`python3` has no ensurepip; get it with `sudo apt install python3.13-venv`." and made_by is None
