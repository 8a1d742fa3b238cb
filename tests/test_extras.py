"""A package of an extra that is missing: the error has the pip line, which installs what the extra would."""

from __future__ import annotations

import configparser
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import monai.bundle
import pytest

from knowsam_monai.errors import KnowSAMImportError, root_cause
from knowsam_monai.teachers.sam2_model import import_transformers
from knowsam_monai.teachers.tiny_vit import TinyViTEncoder
from knowsam_monai.teachers.weights import read_state_dict
from tests.bundles.conftest import BUNDLES
from zoo.__main__ import main

PACKAGING = configparser.ConfigParser()
PACKAGING.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")


def installed_by(sentence):
    """The requirements of the one pip line in a sentence, and the extra that it names."""
    line, extra = re.findall(r"`pip install (.+?)` \(the extra `(\w+)`\)", sentence)[0]
    return set(shlex.split(line)), extra


def required(extra):
    lines = PACKAGING["options.extras_require"][extra].splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def test_sam_2_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(KnowSAMImportError) as error:
        import_transformers()
    requirements, extra = installed_by(str(error.value))
    assert requirements == required(extra)


def test_sam_2_with_a_broken_torchvision_says_what_is_broken(monkeypatch):
    class Broken(ModuleType):
        def __getattr__(self, name):
            raise ModuleNotFoundError("Could not import module") from RuntimeError("operator nms does not exist")

    monkeypatch.setitem(sys.modules, "transformers", Broken("transformers"))
    with pytest.raises(KnowSAMImportError, match=r"cannot be imported \(operator nms does not exist\); get it"):
        import_transformers()


def test_mobile_sam_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.tiny_vit", None)
    with pytest.raises(KnowSAMImportError) as error:
        TinyViTEncoder()
    requirements, extra = installed_by(str(error.value))
    assert requirements == required(extra)


def test_nnunet_page_installs_what_the_extra_does():
    page = (Path(__file__).parents[1] / "docs" / "source" / "nnunet.md").read_text(encoding="utf-8")
    line = re.search(r"^pip install '\.\[nnunet\]'.*: pip install (.+)$", page, re.MULTILINE)
    assert set(shlex.split(line[1])) == required("nnunet")


def test_safetensors_file_without_safetensors(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(KnowSAMImportError) as error:
        read_state_dict(tmp_path / "model.safetensors", "`checkpoint`")
    requirements, extra = installed_by(str(error.value))
    assert requirements < required(extra)


@pytest.mark.parametrize("bundle", ["knowsam_acdc", "knowsam_la"])
def test_tracking_without_mlflow_ends_before_the_data_is_read(bundle, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, find=importlib.util.find_spec: name != "mlflow" and find(name)
    )
    monkeypatch.setattr("knowsam_monai.data.load_datalist", lambda *args, **kwargs: pytest.fail("data was read"))
    config, output = str(BUNDLES / bundle / "configs" / "train.json"), str(tmp_path)
    with pytest.raises(Exception) as error:
        monai.bundle.run(config_file=config, logging_file=False, tracking="mlflow", output_dir=output)
    root = root_cause(error.value)
    requirements, extra = installed_by(str(root))
    assert isinstance(root, KnowSAMImportError) and requirements == required(extra)


@pytest.mark.parametrize("missing", ["black", "isort"])
def test_zip_without_formatters(monkeypatch, caplog, missing):
    for name in ("zoo.build", "zoo.scripts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["bundles/knowsam_acdc"]) == 1
    requirements, extra = installed_by(caplog.text)
    assert requirements == required(extra) and caplog.text.count(f"`{missing}`") == 1
