"""The house: imports point downwards only, between folders as well as between modules.

`python -m tests.test_import_graph` draws the graph as CONTRIBUTING.md shows it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "knowsam_monai"
# from the top: a folder imports what stands below it; leaves are the loose modules
FOLDERS = ("__main__", "runs", "handlers", "distillation", "teachers", "data", "networks", "losses", "leaves")


def modules() -> dict[str, Path]:
    """Every module by its dotted name, without the packages' own `__init__`, which only names what they hold."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
        if path.name != "__init__.py"
    }


def graph() -> dict[str, set[str]]:
    """What each module imports; of a name that a folder offers, the module that defines it."""
    known, offered = set(modules()), offers()
    arrows = {}
    for module, path in modules().items():
        arrows[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                arrows[module] |= {alias.name for alias in node.names if alias.name in known}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    arrows[module] |= {n for n in (name, node.module, offered.get(name)) if n in known}
    return arrows


def offers() -> dict[str, str]:
    """The names that a folder offers, and the modules that define them."""
    found = {}
    for path in (ROOT / PACKAGE).rglob("__init__.py*"):
        folder = ".".join(path.parent.relative_to(ROOT).parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                origin = f"{folder}.{node.module}" if node.level else node.module
                found |= {f"{folder}.{alias.asname or alias.name}": origin for alias in node.names}
    return found


def folder_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or parts[1] == "__main__" else "leaves"


def drawing() -> str:
    """One line for each folder: what it imports."""
    arrows = {folder: set() for folder in FOLDERS}
    for module, targets in graph().items():
        arrows[folder_of(module)] |= {folder_of(target) for target in targets} - {folder_of(module)}
    width = max(map(len, FOLDERS))
    return "\n".join(
        f"{folder:<{width}}  ->  {', '.join(f for f in FOLDERS if f in arrows[folder]) or 'nothing'}"
        for folder in FOLDERS
    )


def test_no_two_modules_import_each_other():
    try:
        tuple(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_folders_import_downwards_only():
    upwards = [
        f"{module} -> {target}"
        for module, targets in graph().items()
        for target in targets
        if FOLDERS.index(folder_of(target)) < FOLDERS.index(folder_of(module))
    ]
    assert not upwards


def test_students_and_losses_know_nothing_of_data():
    assert not [
        f"{module} -> {target}"
        for module, targets in graph().items()
        if folder_of(module) in ("losses", "networks", "teachers")
        for target in targets
        if folder_of(target) == "data"
    ]


def test_graph_is_the_one_that_contributing_shows():
    assert drawing() in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_only_one_module_asks_for_the_rank():
    asks = re.compile(r"get_rank|get_world_size|dist(?:ributed)?\.is_initialized|[\"']RANK[\"']")
    sources = [*(ROOT / PACKAGE).rglob("*.py"), *ROOT.glob("bundles/*/configs/*.json")]
    found = {path.name for path in sources if asks.search(path.read_text(encoding="utf-8"))}
    assert found == {"ranks.py"}


def test_package_losses_and_methods_load_what_they_need_and_every_name_can_be_imported():
    """One after the other, in a process of its own."""
    code = f"""
import sys
def loaded(): print(*(name for name in sys.modules if name.startswith({PACKAGE!r})))
import {PACKAGE}; loaded()
import {PACKAGE}.losses; loaded()
from {PACKAGE} import MeanTeacher, PartiallyLabeledLoss, SAMDistillation, SAMTeacher; loaded()
for name in {PACKAGE}.__all__: getattr({PACKAGE}, name)
assert len({PACKAGE}.__all__) > 20
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, losses, methods = (line.split() for line in done.stdout.splitlines())
    assert package == [PACKAGE]
    assert {folder_of(f"{name}.") for name in losses if name.count(".") > 1} == {"losses"}
    assert [name for name in methods if name.startswith(f"{PACKAGE}.data.")] == [f"{PACKAGE}.data.orientation"]
    assert not [name for name in methods if folder_of(f"{name}.") == "runs"]


if __name__ == "__main__":
    print(drawing())


def test_no_name_that_a_folder_offers_is_that_of_a_module_in_it():
    """A config's `_target_` would find the module, since Python 3.13."""
    stubs = {path.parent: path.read_text(encoding="utf-8") for path in (ROOT / PACKAGE).rglob("__init__.pyi")}
    for folder, stub in stubs.items():
        assert not set(re.findall(r" as (\w+)$", stub, re.MULTILINE)) & {path.stem for path in folder.iterdir()}
