"""CITATION.cff is what GitHub and Zenodo read, and says the same as the package."""

from pathlib import Path

import yaml

import knowsam_monai

ROOT = Path(__file__).parents[2]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def is_author(author):
    return set(author) == {"name"} or {"family-names", "given-names"} <= set(author)


def test_it_has_what_the_format_requires():
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["title"] and CITATION["message"]
    assert CITATION["type"] in ("software", "dataset")
    assert CITATION["authors"] and all(is_author(author) for author in CITATION["authors"])
    for reference in CITATION["references"]:
        assert reference["title"] and reference["type"] == "article"
        assert all(is_author(author) for author in reference["authors"])


def test_version_and_license_are_the_package_s():
    assert CITATION["version"] == knowsam_monai.__version__
    assert f"license = {CITATION['license']}\n" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


def test_the_paper_is_the_one_that_the_bundle_cites():
    text = (ROOT / "bundles" / "knowsam_acdc" / "docs" / "README.md").read_text(encoding="utf-8")
    paper = CITATION["references"][0]
    assert f"doi={{{paper['doi']}}}" in text and f"title={{{paper['title']}}}" in text
    assert [author["family-names"] for author in paper["authors"]] == [
        name.split(",")[0] for name in text.split("author={")[1].split("}")[0].split(" and ")
    ]
