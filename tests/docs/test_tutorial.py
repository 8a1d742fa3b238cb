"""The tutorial notebook runs from its first cell to its last, as it is stored."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIAL = Path(__file__).parents[2] / "docs" / "source" / "tutorial.ipynb"

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
def stored():
    return nbformat.read(TUTORIAL, as_version=4)


def printed(notebook):
    """What the cells wrote to the screen, by the number of the cell."""
    return {
        number: "".join(output["text"] for output in cell["outputs"] if output["output_type"] == "stream")
        for number, cell in enumerate(notebook["cells"])
        if cell["cell_type"] == "code"
    }


def test_stored_outputs_are_small_and_without_errors(stored):
    nbformat.validate(stored)
    outputs = [output for cell in stored["cells"] for output in cell.get("outputs", [])]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    assert TUTORIAL.stat().st_size < 400_000
    assert not [
        word for word in ("/home/", "/root/", "/tmp/", "/work/") if word in TUTORIAL.read_text(encoding="utf-8")
    ]


def test_tutorial_runs_and_ends_with_a_segmentation_on_the_scan_s_grid(stored, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TUTORIAL.parents[2]))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm's, of a notebook without widgets
    notebook = nbformat.from_dict(stored)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    notebook["cells"].append(nbformat.v4.new_code_cell(TURNED))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "tutorial_output" / "model.pt").is_file()
    assert (tmp_path / "tutorial_output" / "mean_teacher_skd" / "validation.png").is_file()
    notebook["cells"].pop()
    text = printed(notebook)
    assert "same grid as the scan: True" in "".join(text.values())
    assert {number: len(lines.splitlines()) for number, lines in text.items()} == {
        number: len(lines.splitlines()) for number, lines in printed(stored).items()
    }
