"""The zip: what is in it, whence its code and its figures are, and that the same bundle makes the same bytes."""

from __future__ import annotations

import ast
import json
import re
import shutil
import zipfile

import pytest
import torch

from knowsam_monai.runs.trained_student import read_record, warn_of_phantom
from tests.bundles.conftest import BUNDLES
from tests.bundles.test_documents import ROOT
from tests.zoo.conftest import RUN
from zoo.__main__ import main
from zoo.build import build, write


def names(hosted):
    with zipfile.ZipFile(hosted.zip) as archive:
        return {name.removeprefix(f"{hosted.name}/") for name in archive.namelist()}


def without_imports(source):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, field, None), list):
                kept = [n for n in getattr(node, field) if not isinstance(n, (ast.Import, ast.ImportFrom))]
                setattr(node, field, kept)
    return ast.dump(tree)


def test_zip_is_named_by_its_version_and_has_one_folder(hosted):
    version = json.loads((hosted.root / "configs" / "metadata.json").read_text())["version"]
    assert hosted.zip.name == f"{hosted.name}_v{version}.zip"
    with zipfile.ZipFile(hosted.zip) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {hosted.name}


def test_every_file_that_the_zoo_looks_for_is_there_and_none_is_too_large(hosted):
    expected = {"LICENSE", "configs/metadata.json", "models/model.pt", "configs/inference.json", "large_files.yml"}
    expected |= {"docs/README.md", "docs/data_license.txt", "configs/logging.conf", "scripts/__init__.py"}
    expected |= {f"configs/{path.name}" for path in (hosted.bundle / "configs").iterdir()}
    assert expected <= names(hosted)
    assert {name.split("/")[0] for name in names(hosted)} == {name.split("/")[0] for name in expected}
    assert all(path.stat().st_size <= 25e6 for path in hosted.root.rglob("*"))


def test_copied_code_is_the_package_s_but_for_its_imports(hosted):
    copied = [path for path in (hosted.root / "scripts").rglob("*.py") if path.name != "__init__.py"]
    assert len(copied) > 20
    for path in copied:
        source = (ROOT / "knowsam_monai" / path.relative_to(hosted.root / "scripts")).read_text()
        assert without_imports(path.read_text()) == without_imports(source), path


def test_copied_code_imports_neither_the_package_nor_sam(hosted):
    for path in (hosted.root / "scripts").rglob("*.py"):
        imports = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        modules = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in imports if isinstance(node, ast.ImportFrom) and not node.level}
        assert not {m for m in modules if m.split(".")[0] in ("knowsam_monai", "segment_anything", "scripts")}, path


def test_training_s_configs_are_the_repository_s(hosted):
    of_copied_code = {"evaluate.json", "inference.json", "metadata.json", "train.json"}
    for path in (hosted.bundle / "configs").iterdir():
        if path.name not in of_copied_code:
            assert (hosted.root / "configs" / path.name).read_bytes() == path.read_bytes(), path.name


def test_nothing_names_the_repository_or_a_folder_of_its_authors(hosted):
    for path in [*hosted.root.rglob("*.py"), *hosted.root.rglob("*.md"), *hosted.root.rglob("*.json")]:
        text = path.read_text()
        assert not re.search("<!--|/tmp/", text), path
        assert path.suffix != ".md" or "repository" not in text, path


def test_weights_are_a_plain_state_dict_named_for_what_they_were_trained_on(hosted):
    state = torch.load(hosted.root / "models" / "model.pt", weights_only=True)
    assert state and all(isinstance(value, torch.Tensor) for value in state.values())
    metadata = json.loads((hosted.root / "configs" / "metadata.json").read_text())
    said = re.compile(
        rf"weights in models/model.pt are from the run {RUN}, trained on the synthetic phantom.*Dice 0\.\d+"
    )
    assert said.search(metadata["description"]) and said.search((hosted.root / "docs" / "README.md").read_text())


def test_zip_knows_that_its_student_is_of_the_phantom(hosted, caplog):
    record = json.loads((hosted.root / "models" / "model.json").read_text())
    assert record["run"] == RUN and set(record["sha256"]) == {"model.pt"}  # a run's config would name its paths
    warn_of_phantom(hosted.root / "models" / "model.pt", "/data/scans")
    assert f"comes from the run {RUN}, which was trained on the synthetic phantom" in caplog.text
    assert "warn_of_phantom" in (hosted.root / "configs" / "inference.json").read_text()
    with pytest.raises(ValueError, match="is from a zip; build the zip where the student was trained"):
        build(hosted.root, hosted.root.parent)


def test_figures_are_those_of_the_validation_that_kept_the_weights(hosted):
    metrics = json.loads((hosted.root / "configs" / "metadata.json").read_text())["eval_metrics"]
    rows = (hosted.bundle / "output" / RUN / "results.csv").read_text().splitlines()
    measured = dict(zip(rows[0].split(","), rows[1].split(",")))
    assert metrics["val_mean_dice"] == pytest.approx(float(measured["val_mean_dice"]), abs=1e-4)
    assert len(metrics) == 1 + (3 if hosted.name == "knowsam_acdc" else 1)


def test_command_says_in_one_line_what_it_made_and_makes_the_same_bytes_again(hosted, tmp_path, caplog):
    caplog.set_level("INFO", logger="zoo")
    assert main([str(hosted.bundle), "--output_dir", str(tmp_path)]) == 0
    made = tmp_path / hosted.zip.name
    assert caplog.messages[-1].startswith(str(made)) and made.read_bytes() == hosted.zip.read_bytes()


def test_command_says_in_one_sentence_what_is_wrong(tmp_path, caplog):
    assert main([str(tmp_path)]) == 1
    assert caplog.messages == [f"`bundle` must be a bundle's folder but {tmp_path} has no configs/metadata.json."]


def test_file_over_the_zoo_s_limit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no file over 25 MB but models/model.pt has 26 MB; host .* large_files.yml"):
        write(tmp_path / "bundle_v1.zip", "bundle", {"models/model.pt": bytes(26 * 2**20)})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def listed(tmp_path):
    """`listed(hash_val)`: the bundle of the repository and its weights, which its large_files.yml lists."""
    bundle = tmp_path / "knowsam_acdc"
    shutil.copytree(BUNDLES / "knowsam_acdc", bundle, ignore=shutil.ignore_patterns("data", "output", "eval"))

    def build_with(hash_val):
        with open(bundle / "large_files.yml", "a", encoding="utf-8") as file:
            file.write(
                f'- path: "models/model.pt"\n  url: "https://example.org/model.pt"\n  hash_val: "{hash_val}"\n'
                '  hash_type: "sha256"\n'
            )
        return build(bundle, tmp_path / "dist")

    return build_with


def test_weights_that_are_hosted_elsewhere_are_left_out(listed):
    hash_val = read_record(BUNDLES / "knowsam_acdc" / "models")["sha256"]["model.pt"]
    with zipfile.ZipFile(listed(hash_val)) as archive:
        names = archive.namelist()
    assert "knowsam_acdc/large_files.yml" in names
    assert [name for name in names if "/models/" in name] == ["knowsam_acdc/models/model.json"]


def test_weights_other_than_those_hosted_elsewhere_are_refused(listed):
    with pytest.raises(
        ValueError, match="`hash_val` of models/model.pt in large_files.yml must be the file's sha256, "
    ):
        listed("0" * 64)
