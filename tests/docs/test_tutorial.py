"""The tutorial notebook runs from its first cell to its last, as it is stored but for the number of steps."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
from monai.utils import set_determinism

TUTORIAL = Path(__file__).parents[2] / "docs" / "source" / "tutorial.ipynb"
STEPS = "SIZE, STEPS = 48, 60", "SIZE, STEPS = 48, 20"  # enough for the gate to be measured once

# a scan whose axes are stored in another order gives the same slices
TURNED = """
import nibabel

path, turned = items["test"][0]["image"], OUTPUT / "turned.nii.gz"
scan = nibabel.load(path)
orientations = nibabel.io_orientation(scan.affine), nibabel.orientations.axcodes2ornt("PSR")
nibabel.save(scan.as_reoriented(nibabel.orientations.ornt_transform(*orientations)), turned)
for transform in (to_slices, Compose(prepare)):
    one, other = (transform({"image": str(file)}) for file in (path, turned))
    slices = zip([one], [other]) if isinstance(one, dict) else zip(one, other, strict=True)
    assert all(torch.allclose(a["image"], b["image"], atol=1e-5) for a, b in slices)
"""


@pytest.fixture(scope="module")
def cells():
    return [cell for cell in nbformat.read(TUTORIAL, as_version=4)["cells"] if cell["cell_type"] == "code"]


def printed(cell, stream):
    return "".join(output["text"] for output in cell["outputs"] if output.get("name") == stream)


def test_stored_outputs_are_small_and_without_errors(cells):
    nbformat.validate(nbformat.read(TUTORIAL, as_version=4))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    text = TUTORIAL.read_text(encoding="utf-8")
    assert len(text) < 400_000 and not [word for word in ("/home/", "/root/", "/tmp/", "/work/") if word in text]


@pytest.fixture
def as_a_notebook(tmp_path, monkeypatch):
    """In a folder of its own, with figures that need no screen."""
    monkeypatch.chdir(tmp_path)
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    yield
    plt.close("all")
    matplotlib.use(backend)
    set_determinism(seed=None)


@pytest.mark.usefixtures("as_a_notebook")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # matplotlib's, of a contour
def test_tutorial_runs_and_ends_with_a_segmentation_on_the_scan_s_grid(cells, caplog):
    names, text = {"__name__": "__main__"}, ""
    assert cells[0]["source"].count(STEPS[0]) == 1
    for number, cell in enumerate(cells):
        caplog.clear()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(cell["source"].replace(*STEPS), f"cell {number}", "exec"), names)
        assert len(said.getvalue().splitlines()) == len(printed(cell, "stdout").splitlines()), cell["source"]
        warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert warned == printed(cell, "stderr").splitlines(), cell["source"]
        text += said.getvalue()
    assert Path("tutorial_output", "model.pt").is_file()
    assert Path("tutorial_output", "mean_teacher_skd", "validation.png").is_file()
    assert "same grid as the scan: True" in text
    exec(TURNED, names)
