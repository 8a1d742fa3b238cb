"""A bundle with weights that were trained, briefly, on a tiny phantom; its zip, unpacked far from the repository."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

from knowsam_monai.data import write_phantom
from tests.bundles.conftest import BUNDLES, CONFIGS, CONFIGS_3D, Training
from zoo import scripts
from zoo.build import build

RUN = "knowsam_phantom_seed0"
# the networks are the configs' own: the zip holds its student, not a smaller one
BRIEF = {
    "network_def": None,
    "use_sam": False,
    "mixing_weight": 0,
    "lr": 0.05,
}
# a data list is a data set, for which the configs have the published student
PHANTOM_WIDTHS = {"channels": [8, 16, 32, 64, 128], "aggregation_channels": [4, 4, 8]}
BRIEF_OF = {
    "knowsam_acdc": {"max_iterations": 16, "epoch_length": 16},
    "knowsam_la": {"max_iterations": 8, "epoch_length": 8, **PHANTOM_WIDTHS},
}


class Hosted(NamedTuple):
    """The repository's `bundle` copied and with weights, the `zip` of it, its unpacked `root`, and a `datalist`."""

    name: str
    bundle: Path
    zip: Path
    root: Path
    datalist: Path


@pytest.fixture(scope="session", autouse=True)
def each_source_is_formatted_once():
    """Formatting is nearly all that a zip takes, and every zip of these tests has the same sources."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts, "_formatted", functools.cache(scripts._formatted))
        yield


@pytest.fixture(scope="session", params=["knowsam_acdc", "knowsam_la"])
def hosted(request, tmp_path_factory) -> Hosted:
    name = request.param
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / f"hosted_{name}"
    with FileLock(f"{shared}.lock"):  # built once for all processes and files
        if not (shared / "dist").is_dir():
            shutil.rmtree(shared, ignore_errors=True)
            build_zip(name, shared)
    (archive,) = (shared / "dist").iterdir()
    folder = tmp_path_factory.mktemp(name)
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return Hosted(name, shared / "repository" / name, archive, folder / name, shared / "phantom" / "dataset.json")


def build_zip(name: str, folder: Path) -> None:
    anatomy = {"anatomy": "left_atrium"} if name == "knowsam_la" else {}
    counts = {"num_labeled": 2, "num_unlabeled": 2, "num_validation": 2, "num_test": 1}
    datalist = write_phantom(folder / "phantom", max_size=32, **counts, **anatomy)
    bundle = folder / "repository" / name
    shutil.copytree(BUNDLES / name, bundle, ignore=shutil.ignore_patterns("data", "output", "models", "eval"))
    Training(
        bundle / "output" / RUN,
        whole=True,
        configs=CONFIGS_3D if name == "knowsam_la" else CONFIGS,
        **{**BRIEF, **BRIEF_OF[name], "dataset_dir": str(datalist), "ckpt_dir": str(bundle / "models")},
    ).run()
    build(bundle, folder / "dist")


@pytest.fixture
def importable(hosted, monkeypatch):
    """The zip's `scripts` on Python's path, as the Model Zoo's checks have it."""
    monkeypatch.syspath_prepend(str(hosted.root))
    for module in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        monkeypatch.delitem(sys.modules, module)
    yield hosted
    for module in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[module]
