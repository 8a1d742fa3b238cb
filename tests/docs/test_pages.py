"""Pages lead to files that are there, and every public module has its place among them."""

import re
from pathlib import Path

import pytest

from tests.docs.test_docstrings import PUBLIC, SUBPACKAGES

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "docs" / "source"
PAGES = sorted([*ROOT.glob("*.md"), *SOURCE.rglob("*.md")])


def page_name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_links_and_includes_lead_to_files(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", text)
    included = re.findall(r"^```\{(?:include|literalinclude)\} (\S+)", text, re.MULTILINE)
    included += re.findall(r"^:file: (\S+)", text, re.MULTILINE)
    assert not [target for target in links + included if not (path.parent / target).is_file()]


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_commands_name_files_that_are_there(path):
    named = re.findall(
        r"\b(?:bundles|examples|benchmarks|tests)/[\w/]+\.(?:json|py|md)", path.read_text(encoding="utf-8")
    )
    inventions = ("bundles/knowsam_acdc/configs/my_method.json", "tests/handlers/test_my_method.py")
    others = ("tests/teachers/test_my_teacher.py", "tests/data/test_my_data.py")
    assert not [name for name in named if name not in (*inventions, *others) and not (ROOT / name).is_file()]


def test_every_page_is_reached_from_a_table_of_contents():
    listed = set()
    for page in SOURCE.rglob("*.md"):
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / line).relative_to(SOURCE) for line in lines}
    pages = {page.relative_to(SOURCE).with_suffix("") for page in SOURCE.rglob("*") if page.suffix in (".md", ".ipynb")}
    assert pages - listed == {Path("index")}


def test_every_public_module_is_documented():
    text = "".join(page.read_text(encoding="utf-8") for page in (SOURCE / "api").glob("*.md"))
    documented = set(re.findall(r"automodule:: knowsam_monai\.([\w.]+)", text))
    assert documented >= {*SUBPACKAGES, *PUBLIC}
