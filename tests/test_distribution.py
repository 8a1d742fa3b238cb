"""The package as pip gets it: wheel and sdist are whole, and the wheel works where nothing else of the project is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.bundles.conftest import SMALL_STUDENT

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Wheel and sdist, built in isolation."""
    pytest.importorskip("build", reason="build is not installed (pip install 'knowsam-monai[dev]')")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def fresh(distributions, tmp_path_factory):
    """Python of an environment with the wheel; the packages that it needs are those of this environment."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # a path in a .pth file gives its modules, but not its own .pth files: an editable install stays out
    (purelib / "needed.pth").write_text(sysconfig.get_path("purelib"))
    install = (python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", distributions[0])
    run(*install, env=os.environ | {"PYTHONPATH": ""})  # where pip would find the package of a checkout
    return python


def test_both_have_every_file_of_the_package(distributions):
    wheel, sdist = distributions
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "knowsam_monai").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name and not name.startswith("knowsam_monai/bundles")}
    assert {"knowsam_monai/teachers/weights/stand_in.pt", "knowsam_monai/__init__.py"} <= package
    bundles = (ROOT / "bundles").glob("knowsam_*")
    kept = [
        path for bundle in bundles for what in ("configs/*", "docs/*", "LICENSE", "*.yml") for path in bundle.glob(what)
    ]
    package |= {f"knowsam_monai/{path.relative_to(ROOT).as_posix()}" for path in kept}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == package
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert package | {"LICENSE", "README.md", "setup.cfg", "pyproject.toml"} <= names


def test_both_pass_the_check_of_pypi(distributions):
    pytest.importorskip("twine", reason="twine is not installed (pip install 'knowsam-monai[dev]')")
    run(sys.executable, "-m", "twine", "check", "--strict", *distributions)


def test_wheel_trains_a_bundle_by_its_name_with_the_teacher_s_weights_that_it_brings(fresh, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | {"PYTHONPATH": ""}
    where = run(fresh, "-c", "import knowsam_monai; print(knowsam_monai.__file__)", cwd=tmp_path, env=environment)
    assert where.startswith(str(fresh.parents[1]))
    options = {"max_iterations": 1, "epoch_length": 1, "image_size": 32, "labeled_batch_size": 1, "num_workers": 0}
    options |= {"unlabeled_batch_size": 1, "network_def": json.dumps(SMALL_STUDENT)}
    arguments = [argument for key, value in options.items() for argument in (f"--{key}", value)]
    said = run(fresh.parent / "knowsam", "train", "acdc", *arguments, cwd=tmp_path, env=environment)
    assert "pretrained on procedural images" in said
    assert (tmp_path / "knowsam_acdc" / "models" / "model.pt").is_file()
    scan = next((tmp_path / "knowsam_acdc" / "data" / "phantom").rglob("*.nii.gz"))
    run(fresh.parent / "knowsam", "predict", scan, "--bundle", "acdc", "--output", "out", cwd=tmp_path, env=environment)
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 1
