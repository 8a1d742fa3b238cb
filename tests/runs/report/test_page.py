from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from knowsam_monai.runs.report import read_run, write_report
from knowsam_monai.runs.report.page import render
from tests.bundles.conftest import without_charts
from tests.runs.report.conftest import write_run


class Page(HTMLParser):
    """What a page links to, and its words."""

    def __init__(self, text):
        super().__init__()
        self.links, self.words, self.tags = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.words += data


def test_page_is_written_into_the_folder_and_holds_all_that_it_shows(run_folder):
    path = write_report(run_folder)
    page = Page(path.read_text(encoding="utf-8"))
    assert path == run_folder / "report.html" and [p.name for p in run_folder.glob(".*")] == []
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "script" not in page.tags and "link" not in page.tags
    assert "prefers-color-scheme: dark" in page.words and "width=device-width" in path.read_text(encoding="utf-8")


def test_page_shows_dice_terms_gate_cases_slices_and_how_it_was_made(run_folder):
    words = Page(render([read_run(run_folder)])).words
    for shown in ("0.875", "2, the best of 3", "Teacher, mean Dice", "Loss", "SAM loss", "Gate weight"):
        assert shown in words
    for shown in ("best case", "worst slice", "a, slice 3 of 3", "right ventricle 1.00", "As a table"):
        assert shown in words
    for shown in ("Sam2Teacher tiny", "0123abc", "2.13.0", "python -m x", "2026-01-02 03:04:05", '"seed": 7'):
        assert shown in words


def copies(run_folder, *names):
    return [shutil.copytree(run_folder, run_folder.with_name(name)) for name in names]


@without_charts()
def test_several_runs_stand_side_by_side_with_what_differs(run_folder, tmp_path, monkeypatch):
    first, second = copies(run_folder, "first", "second")
    configs = {"lr": 0.1, "train": {"method": {"weight": 1}}}, {"lr": 0.2, "train": {"method": {}}}
    for folder, config in zip((first, second), configs):
        (folder / "config.json").write_text(json.dumps({"seed": 7, **config}))
    monkeypatch.chdir(first)
    text = write_report(first, second).read_text(encoding="utf-8")
    assert (first / "comparison.html").is_file() and not (first / "report.html").exists()
    rows = re.findall(r"<tr><th>(lr|seed|train#method#weight)</th><td>(.*?)</td><td>(.*?)</td></tr>", text)
    assert rows == [("lr", "0.1", "0.2"), ("train#method#weight", "1", "–"), ("seed", "7", "7")]


def charts_of_cases(page):
    return re.findall(r'<div role="img" aria-label="(.*?): Dice by case">(.*?)</div>', page, re.DOTALL)


def marks(chart):
    """Color and fill of dots and rings, as often as they are drawn."""
    return Counter(re.findall(r'<use [^>]*style="fill: (\S+?); stroke: (\S+?); stroke-width: 1.2"', chart))


def test_cases_of_one_run_have_a_color_for_the_student_and_one_for_the_teacher(run_folder):
    ((name, chart),) = charts_of_cases(render([read_run(run_folder)]))
    assert name == "my run"
    assert marks(chart) == {("var(--series-0)", "var(--series-0)"): 3, ("none", "var(--series-1)"): 3}


def test_cases_of_each_of_several_runs_have_its_color_and_the_teacher_is_a_ring(run_folder):
    runs = [read_run(folder) for folder in copies(run_folder, "first", "second", "third")]
    charts = charts_of_cases(render(runs))
    assert [name for name, _ in charts] == ["first", "second", "third"]
    for series, (_, chart) in enumerate(charts):
        color = f"var(--series-{series})"
        assert marks(chart) == {(color, color): 3, ("none", color): 3}


def test_every_chart_is_named_for_who_cannot_see_it_and_no_table_is_hidden_in_one(run_folder):
    page = render([read_run(run_folder)])
    named = re.findall(r'<(figure|div)[^>]*role="img" aria-label="[^"]+">(.*?)</\1>', page, re.DOTALL)
    assert len(named) == page.count("<svg ") > 1 and all(text.count("<svg ") == 1 for _, text in named)
    assert not any("<table" in text for _, text in named)


def test_run_that_is_not_finished_has_curves_and_says_what_is_missing(run_folder):
    shutil.rmtree(run_folder / "validation_slices")
    (run_folder / "validation_cases.csv").unlink()
    words = Page(render([read_run(run_folder)])).words
    assert "appear when the training ends" in words and "Gate weight" in words and "best case" not in words


def test_names_from_files_cannot_be_markup(tmp_path):
    folder = write_run(tmp_path / "<script>alert(1)<", names=["<script>alert(2)<", "b"])
    assert "script" not in Page(render([read_run(folder)])).tags


def test_wrong_arguments_are_one_sentence(run_folder, tmp_path):
    with pytest.raises(ValueError, match="`folders` must be 1 to 6 folders of runs but has 0"):
        write_report()
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="`output` must be writable but"):
        write_report(run_folder, output=tmp_path / "file" / "report.html")


def test_only_the_first_process_writes(run_folder, monkeypatch):
    monkeypatch.setattr("knowsam_monai.ranks.rank", lambda: 1)
    assert write_report(run_folder) is None and not (run_folder / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("width,dark", [(1280, False), (390, False), (390, True)], ids=["desktop", "phone", "dark"])
def test_browser_shows_the_page_without_network_and_nothing_sticks_out(run_folder, tmp_path, width, dark):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium in PATH (Debian: apt-get install chromium)")
    page, picture = write_report(run_folder), tmp_path / "page.png"
    # the page's own script reports what a reader would notice: pictures that do not load, a page wider than the screen
    probe = """<script>addEventListener("load", () => { document.title = JSON.stringify([
        document.documentElement.scrollWidth <= innerWidth,
        [...document.images].every(i => i.naturalWidth > 0),
        document.querySelectorAll("svg").length]) })</script>"""
    page.write_text(page.read_text(encoding="utf-8").replace("</head>", probe + "</head>"), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    options += ["--hide-scrollbars", f"--window-size={width},1600", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    shot = subprocess.run(
        [browser, *options, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=180
    )
    dom = subprocess.run([browser, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=180)
    assert picture.is_file(), shot.stderr.decode()[-500:]
    assert re.search(r"<title>(.*?)</title>", dom.stdout)[1] == "[true,true,7]"
    from PIL import Image

    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[1] == width
    assert (np.median(pixels) < 60) == dark and pixels.std() > 5
