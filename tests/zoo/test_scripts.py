"""Copies of modules: where a name lies, and imports that stay inside the copy."""

from __future__ import annotations

import pytest

from zoo.scripts import copied_name, copies, rename


@pytest.mark.parametrize(
    "name, copied",
    [
        ("knowsam_monai.networks.UNet", "scripts.networks.unet.UNet"),
        ("knowsam_monai.networks.unet.UNet", "scripts.networks.unet.UNet"),
        ("knowsam_monai.runs.CaseMetrics", "scripts.runs.case_metrics.CaseMetrics"),
        ("knowsam_monai.runs.checks", "scripts.runs.checks"),
    ],
)
def test_name_is_the_copy_s_in_the_module_that_defines_it(name, copied):
    assert copied_name(name) == copied


def test_only_names_of_the_package_are_renamed():
    text = '{"_target_": "knowsam_monai.data.LoadCased", "x": "$import knowsam_monai.seeds as s", "run": "knowsam"}'
    expected = '{"_target_": "scripts.data.readers.LoadCased", "x": "$import scripts.seeds as s", "run": "knowsam"}'
    assert rename(text) == expected


@pytest.mark.parametrize("name", ["knowsam_monai.networks.Missing", "knowsam_monai.missing.UNet"])
def test_name_that_the_package_does_not_have_is_said(name):
    with pytest.raises(ValueError, match="`name` must be .*but|is .*[Mm]issing"):
        copied_name(name)


def test_modules_that_are_imported_come_along_and_no_other():
    files = copies(["knowsam_monai.networks.MultiViewNet"])
    modules = {path for path in files if not path.endswith("__init__.py")}
    assert {"networks/multi_view.py", "networks/unet.py", "networks/vnet.py", "losses/entropy.py"} <= modules
    assert not [path for path in modules if "sam" in path or path.startswith("data/")]
    assert files["__init__.py"] == files["networks/__init__.py"] == ""
    assert "from ..losses.entropy import entropy_map" in files["networks/aggregation.py"]
