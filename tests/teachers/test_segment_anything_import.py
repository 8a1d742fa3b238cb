from __future__ import annotations

import importlib
import pickle
import runpy
import sys
from pathlib import Path

import pytest

from knowsam_monai import teachers
from knowsam_monai.teachers.segment_anything_import import TORCHVISION_NAMES, import_segment_anything


def is_part_of(name: str, *packages: str) -> bool:
    return name.split(".")[0] in packages


@pytest.fixture
def fresh_modules(monkeypatch):
    """No segment_anything and no torchvision in `sys.modules`; what was there comes back afterwards."""
    kept = dict(sys.modules)
    for name in kept:
        if is_part_of(name, "segment_anything", "torchvision"):
            del sys.modules[name]
    yield monkeypatch
    for name in list(sys.modules):
        if is_part_of(name, "segment_anything", "torchvision"):
            del sys.modules[name]
    sys.modules.update({name: m for name, m in kept.items() if is_part_of(name, "segment_anything", "torchvision")})


def write_torchvision(folder, text: str, with_functions: bool = False) -> None:
    for module, functions in TORCHVISION_NAMES.items():
        package = folder.joinpath(*module.split("."))
        package.mkdir(parents=True)
        (package.parent / "__init__.py").touch()
        lines = [f"def {function}(*_): return 'real'\n" for function in functions if with_functions]
        (package / "__init__.py").write_text("".join(lines))
    (folder / "torchvision" / "__init__.py").write_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "raise RuntimeError('operator torchvision::nms does not exist')",
        "raise OSError('libcudart.so.12: cannot open shared object file')",
        "raise ModuleNotFoundError(\"No module named 'torchvision'\", name='torchvision')",
        "raise AttributeError('partially initialized module')",
    ],
)
def test_a_broken_torchvision_does_not_matter(fresh_modules, tmp_path, text):
    write_torchvision(tmp_path, text)
    fresh_modules.syspath_prepend(tmp_path)
    package = import_segment_anything()
    assert {"vit_b", "vit_l", "vit_h"} <= set(package.sam_model_registry)
    assert package.modeling.Sam is importlib.import_module("segment_anything.modeling.sam").Sam
    assert import_segment_anything() is package


def test_with_a_broken_torchvision_only_the_predictor_fails_and_torchvision_stays_as_it_was(fresh_modules, tmp_path):
    write_torchvision(tmp_path, "raise RuntimeError('operator torchvision::nms does not exist')")
    fresh_modules.syspath_prepend(tmp_path)
    sam = import_segment_anything().modeling.sam.Sam
    assert pickle.loads(pickle.dumps(sam)) is sam
    with pytest.raises(ImportError, match="resize.*torchvision could not be imported.*nms does not exist"):
        importlib.import_module("segment_anything.utils.transforms").resize("image", (3, 3))
    assert not [name for name in sys.modules if is_part_of(name, "torchvision")]
    with pytest.raises(RuntimeError, match="nms does not exist"):
        importlib.import_module("torchvision")


def test_half_imported_torchvision_modules_are_put_back(fresh_modules, tmp_path):
    write_torchvision(tmp_path, "import torchvision.transforms\nraise RuntimeError('broken later')")
    fresh_modules.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="broken later"):
        importlib.import_module("torchvision")
    before = {name: module for name, module in sys.modules.items() if is_part_of(name, "torchvision")}
    import_segment_anything()
    after = {name: module for name, module in sys.modules.items() if is_part_of(name, "torchvision")}
    assert before and before.items() <= after.items()
    assert all(str(module.__file__).startswith(str(tmp_path)) for module in after.values())  # and no placeholder


def test_with_a_working_torchvision_its_own_functions_are_used(fresh_modules, tmp_path):
    write_torchvision(tmp_path, "", with_functions=True)
    fresh_modules.syspath_prepend(tmp_path)
    import_segment_anything()
    transforms = importlib.import_module("segment_anything.utils.transforms")
    assert transforms.resize() == "real"
    assert sys.modules["torchvision"].__file__ == str(tmp_path / "torchvision" / "__init__.py")


def test_a_missing_segment_anything_is_one_sentence_with_the_remedy(fresh_modules):
    sys.modules["segment_anything"] = None  # the fixture takes it away; monkeypatch would after the fixture has ended
    with pytest.raises(ImportError, match=r"`segment_anything`, which is not installed.*pip install segment-anything"):
        import_segment_anything()


@pytest.mark.parametrize("source", sorted(Path(teachers.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_importing_the_networks_imports_no_segment_anything(fresh_modules, source):
    runpy.run_path(str(source))
    assert not [name for name in sys.modules if is_part_of(name, "segment_anything")]
