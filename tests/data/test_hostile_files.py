"""Files and lists that cannot be meant: one sentence with their name, from the check and from all that loads."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from monai.bundle import ConfigParser

from knowsam_monai.__main__ import main
from knowsam_monai.errors import KnowSAMError, root_cause

BUNDLES = Path(__file__).parents[2] / "bundles"
AFFINE = np.diag([1.5, 1.5, 8.0, 1.0])
PIPELINES = {
    "2D training": ("knowsam_acdc", "train.json", "train#preprocessing"),
    "2D validation": ("knowsam_acdc", "train.json", "validate#preprocessing"),
    "2D inference": ("knowsam_acdc", "inference.json", "preprocessing"),
    "3D training": ("knowsam_la", "train.json", "train#preprocessing"),
    "3D validation": ("knowsam_la", "train.json", "validate#preprocessing"),
    "3D inference": ("knowsam_la", "inference.json", "preprocessing"),
}
TRAINING = [name for name in PIPELINES if "training" in name]
INFERENCE = [name for name in PIPELINES if "inference" in name]

pytestmark = pytest.mark.usefixtures("root_logging_as_it_was")


def pipeline(name, **keys):
    bundle, config, key = PIPELINES[name]
    parser = ConfigParser(ConfigParser.load_config_file(str(BUNDLES / bundle / "configs" / config)))
    parser.update({"image_size": 16 if "2D" in name else [16, 16, 16], **keys})
    if "3D" in name:
        parser.update({"spacing": [4.0, 4.0, 4.0], "crop_size": None})
    return parser.get_parsed_content(key)


def volume(name, shape=(8, 7, 5)):
    return np.random.default_rng(sum(map(ord, name))).random(shape).astype(np.float32)


def nifti(path, array=None, affine=AFFINE):
    nibabel.save(nibabel.Nifti1Image(volume(path.name) if array is None else array, affine), path)
    return path


def with_header(path, **fields):
    """A small NIfTI file whose header says something else."""
    nifti(path)
    raw = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    header = nibabel.Nifti1Header(bytes(raw[:348]), check=False)
    for field, value in fields.items():
        header[field] = value
    raw[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw))
    return path


def dim(*sizes):
    return [len(sizes), *sizes, *[1] * (7 - len(sizes))]


def h5(path, write):
    with h5py.File(path, "w") as file:
        write(file)
    return path


def linked_h5(path):
    h5(path.with_name("another.h5"), lambda file: file.create_dataset("image", data=volume("a")))
    return h5(path, lambda file: file.__setitem__("image", h5py.ExternalLink("another.h5", "image")))


def stored_elsewhere(path):
    return h5(path, lambda f: f.create_dataset("image", (4, 4, 4), "u1", external=[("/etc/passwd", 0, 64)]))


def virtual_h5(path):
    layout = h5py.VirtualLayout(shape=(4, 4, 4), dtype="f4")
    layout[:] = h5py.VirtualSource(str(path.with_name("another.h5")), "image", shape=(4, 4, 4))
    return h5(path, lambda file: file.create_virtual_dataset("image", layout))


def of_4_axes(path):
    def write(file):
        for key in ("image", "label"):
            file.create_dataset(key, data=np.ones((2, 3, 4, 5)))

    return h5(path, write)


def detached(path, target, sizes="4 4 4"):
    if path.suffix in (".nhdr", ".nrrd"):
        text = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: {sizes}\nencoding: raw\ndata file: {target}\n"
    else:
        text = f"NDims = 3\nDimSize = {sizes}\nElementType = MET_UCHAR\nElementDataFile = {target}\n"
    path.write_text(text)
    return path


def link_out(path):
    path.with_suffix(".raw").symlink_to("/etc/passwd")
    return detached(path, path.with_suffix(".raw").name)


def pipe(path):
    os.mkfifo(path)
    return path


def link(path, target):
    path.symlink_to(target)
    return path


def cut(path):
    nifti(path)
    path.write_bytes(path.read_bytes()[:-200])
    return path


NO_NUMBERS = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
OUTSIDE = "points to '/etc/passwd', which is out"
FILES = {
    "no voxels": ("a.nii.gz", lambda p: with_header(p, dim=dim(8, 0, 5)), "8 x 0 x 5 voxels; it is empty"),
    "negative size": ("a.nii.gz", lambda p: with_header(p, dim=dim(8, -7, 5)), "is not: "),
    "3 GB in a small gz": ("a.nii.gz", lambda p: with_header(p, dim=dim(930, 930, 930)), "3.0 GiB .* limit is 2 GiB"),
    "3 GB": ("a.nii", lambda p: with_header(p, dim=dim(930, 930, 930)), "3.0 GiB in memory, but the limit is 2 GiB"),
    "more than gz can hold": ("a.nii.gz", lambda p: with_header(p, dim=dim(400, 400, 400)), "bytes can contain"),
    "more than the file holds": ("a.nii", lambda p: with_header(p, dim=dim(8, 7, 6)), "more than its 1120 bytes can"),
    "NaN in the affine": ("a.nii.gz", lambda p: with_header(p, srow_x=[1, 0, 0, np.nan]), "finite and invertible"),
    "infinity in the affine": ("a.nii", lambda p: with_header(p, srow_y=[0, np.inf, 0, 0]), "finite and invertible"),
    "no spacing": ("a.nii", lambda p: with_header(p, srow_z=[0, 0, 0, 0]), "must be finite and invertible"),
    "NaN voxels": ("a.nii.gz", lambda p: nifti(p, volume("a") * np.nan), "280 NaN or infinite values"),
    "values of no voxel": ("a.nii.gz", lambda p: nifti(p, np.full((3, 4, 2), -3.4e38, "f4")), "goes from -3.4e.38 to"),
    "colors": ("a.nii.gz", lambda p: nifti(p, NO_NUMBERS), "convert them to real numbers"),
    "complex": ("a.nii.gz", lambda p: nifti(p, volume("a") * 1j), "complex64; convert them"),
    "cut gz": ("a.nii.gz", cut, "is not: "),
    "empty file": ("a.nii", lambda p: p.touch() or p, "is not: "),
    "axes": ("a.nii.gz", lambda p: nifti(p, volume("a", (6, 5, 4, 2, 3))), r"a\.nii\.gz has 4"),
    "dangling link": ("a.nii.gz", lambda p: link(p, "nowhere"), "No such file|does not"),
    "link to itself": ("a.nii.gz", lambda p: link(p, p), "symbolic links|does not"),
    "pipe": ("a.nii.gz", pipe, "it is a pipe"),
    "folder of DICOM": (
        "series",
        lambda p: p.mkdir() or p,
        "it is a folder, .*; convert DICOM first, such as with dcm",
    ),
    "folder": ("a.nii.gz", lambda p: p.mkdir() or p, "is not: "),
    "h5 group": ("a.h5", lambda p: h5(p, lambda f: f.create_group("image")), "an array of numbers but is a group"),
    "h5 text": ("a.h5", lambda p: h5(p, lambda f: f.create_dataset("image", data="text")), "of numbers but is obj"),
    "h5 link": ("a.h5", linked_h5, "`image` is a link to 'image'"),
    "h5 soft link": ("a.h5", lambda p: h5(p, lambda f: f.__setitem__("image", h5py.SoftLink("/x"))), "link to '/x'"),
    "h5 stored elsewhere": ("a.h5", stored_elsewhere, "stores its voxels in another file"),
    "h5 virtual": ("a.h5", virtual_h5, "stores its voxels in another file"),
    "h5 of 1 TB": ("a.h5", lambda p: h5(p, lambda f: f.create_dataset("image", (9**4,) * 3, "f4", chunks=True)), "GiB"),
    "h5 scalar": ("a.h5", lambda p: h5(p, lambda f: f.create_dataset("image", data=3.0)), "a.h5"),
    "h5 empty": ("a.h5", lambda p: h5(p, lambda f: f.create_dataset("image", data=h5py.Empty("f4"))), "a.h5"),
    "h5 of 4 axes": ("a.h5", of_4_axes, r"a\.h5 has 4"),
    "nhdr of /etc/passwd": ("a.nhdr", lambda p: detached(p, "/etc/passwd"), OUTSIDE),
    "nrrd of /etc/passwd": ("a.nrrd", lambda p: detached(p, "/etc/passwd"), OUTSIDE),
    "mhd of /etc/passwd": ("a.mhd", lambda p: detached(p, "/etc/passwd"), OUTSIDE),
    "mha of /etc/passwd": ("a.mha", lambda p: detached(p, "/etc/passwd"), OUTSIDE),
    "mhd of a list": ("a.mhd", lambda p: detached(p, "LIST\n/etc/passwd\n/etc/passwd"), OUTSIDE),
    "nhdr above": ("a.nhdr", lambda p: detached(p, "../../../etc/passwd"), "which is outside its folder"),
    "nhdr by a link": ("a.nhdr", link_out, "which is outside its folder"),
    "mhd of a pattern": ("a.mhd", lambda p: detached(p, "%03d.raw 1 4 1"), "pattern"),
    "mhd of nothing": ("a.mhd", lambda p: p.write_text("NDims = 3\n") and p, "no `ElementDataFile`"),
    "mhd of a missing file": ("a.mhd", lambda p: detached(p, "a.raw"), "No such file"),
    "nhdr of 4 GB": ("a.nhdr", lambda p: detached(p, "a.nhdr", "4096 1024 1024"), "16.0 GiB in memory"),
    "nhdr of less": ("a.nhdr", lambda p: detached(p, "a.nhdr", "512 512 512"), "bytes can contain"),
    "npy of nothing": ("a.npy", lambda p: np.save(p, np.zeros((3, 0, 2))) or p, "it has no voxels"),
}


@pytest.fixture
def datalist(tmp_path):
    """A good list, to be spoiled."""
    sections = {"labeled": [], "unlabeled": [], "validation": []}
    for name, items in sections.items():
        items.append({"image": nifti(tmp_path / f"{name}.nii.gz").name, "patient": name})
        if name != "unlabeled":
            label = (volume(name + "_gt") * 4).astype(np.uint8)
            items[0]["label"] = nifti(tmp_path / f"{name}_gt.nii.gz", label).name
    return sections


def check(capsys, folder, sections, *options):
    """Exit code and output of the command, which must not end in a traceback."""
    text = sections if isinstance(sections, bytes) else json.dumps(sections).encode()
    (folder / "list.json").write_bytes(text)
    code = main(["check", str(folder / "list.json"), *options])
    output = capsys.readouterr()
    assert "Traceback" not in output.out + output.err and output.err.count("\n") <= 1
    return code, output.out + output.err


@pytest.mark.parametrize("way", ["check", *TRAINING, *INFERENCE])
@pytest.mark.parametrize("name", FILES)
def test_file_that_cannot_be_meant_is_one_sentence_with_its_name(tmp_path, datalist, capsys, name, way):
    file, write, message = FILES[name]
    path = write(tmp_path / file)
    if way == "check":
        datalist["unlabeled"] = [{"image": file}]
        code, output = check(capsys, tmp_path, datalist)
        assert code == 1 and re.search(message, output)
        sentences = [line for line in output.splitlines() if str(path) in line and re.search(message, line)]
        assert len(sentences) == 1, output
    else:
        with pytest.raises(Exception) as error:
            pipeline(way)(dict.fromkeys(["image"] if "inference" in way else ["image", "label"], str(path)))
        cause = root_cause(error.value)
        assert isinstance(cause, KnowSAMError) and isinstance(cause, ValueError), repr(cause)
        assert str(path) in str(cause) and re.search(message, str(cause)) and "\n" not in str(cause), str(cause)


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
def test_header_may_point_at_the_file_beside_it(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(volume("a")), str(path))
    assert len(list(tmp_path.iterdir())) == 2
    assert pipeline("2D inference")({"image": str(path)})["image"].shape == (1, 16, 16, 8)


def as_itk(path, shape):
    return nifti(path, volume(path.name, shape))


@pytest.mark.parametrize("way", PIPELINES)
@pytest.mark.parametrize("shape", [(8, 7, 5, 1), (8, 7, 5, 1, 1), (8, 7, 5, 1, 1, 1)])
def test_axes_of_length_1_go(tmp_path, datalist, capsys, way, shape):
    path = as_itk(tmp_path / "a.nii.gz", shape)
    case = {"image": str(path)}
    if "validation" in way:
        case["label"] = str(nifti(tmp_path / "a_gt.nii.gz", np.zeros(shape, np.uint8)))
    prepared = pipeline(way)(case)
    image = (prepared[0] if isinstance(prepared, list) else prepared)["image"]
    assert image.shape[0] == 1 and image.ndim == (3 if way == "2D training" else 4)
    datalist["unlabeled"] = [{"image": path.name, "patient": "a"}]
    code, output = check(capsys, tmp_path, datalist, "--num_classes", "4")
    assert code == 0 and "8 x 7 x 5 " in output


@pytest.mark.parametrize("way", PIPELINES)
def test_values_of_a_voxel_as_itk_writes_them_are_channels(tmp_path, way):
    path = as_itk(tmp_path / "a.nii.gz", (8, 7, 5, 1, 2))
    case = {"image": str(path)}
    if "validation" in way:
        case["label"] = str(nifti(tmp_path / "a_gt.nii.gz", np.zeros((8, 7, 5), np.uint8)))
    prepared = pipeline(way, in_channels=2)(case)
    assert (prepared[0] if isinstance(prepared, list) else prepared)["image"].shape[0] == 2


def float_below(value):
    return np.nextafter(np.float32(value), np.float32(0))


@pytest.mark.parametrize("way", TRAINING)
@pytest.mark.parametrize(
    "values, num_classes, found",
    [
        ((0, float_below(1)), 2, [0, 1]),
        ((-4e-4, 1.0009), 2, [0, 1]),
        ((0, float_below(3), float_below(2), float_below(1)), 4, [0, 1, 2, 3]),
        ((0, 255), 2, [0, 1]),
        ((0, float_below(255)), 2, [0, 1]),
        ((0, 255), 4, "has 255"),
        ((0, 128, 255), 2, "has 128, 255"),
        ((0, 1.002), 2, "has 1.002"),
        ((0, np.nan), 2, "has nan"),
        ((0, -0.002), 2, "has -0.002"),
        ((0, 1, 2), 2, "has 2"),
    ],
)
def test_labels_are_for_training_what_they_are_for_the_check(
    tmp_path, datalist, capsys, caplog, way, values, num_classes, found
):
    label = np.resize(np.float32(values), (8, 7, 5))
    nifti(tmp_path / "labeled_gt.nii.gz", label)
    item = {key: str(tmp_path / datalist["labeled"][0][key]) for key in ("image", "label")}
    nifti(tmp_path / "validation_gt.nii.gz", np.eye(8, 7, dtype=np.uint8)[..., None].repeat(5, -1))
    code, output = check(capsys, tmp_path, datalist, "--num_classes", str(num_classes))
    transform = pipeline(way, num_classes=num_classes).transforms[1]
    load = pipeline(way).transforms[0]
    if isinstance(found, str):
        assert code == 1 and len(re.findall(rf"labeled_gt\.nii\.gz {re.escape(found)}; ", output)) == 1
        with pytest.raises(ValueError, match=rf"labeled_gt\.nii\.gz {re.escape(found)}; "):
            transform(load(item))
        return
    logging.getLogger().addHandler(caplog.handler)  # which the command took away
    for _ in range(2):
        given = transform(load(item))["label"]
        assert given.unique().tolist() == found
    np.testing.assert_array_equal(
        given[0], np.resize(np.round(values) // (255 if max(values) > 200 else 1), label.shape)
    )
    assert code == 0 and f" {' '.join(map(str, found))} " in output
    assert output.count("they are read as 0 and 1") == (max(values) > 200)
    assert "which are read as 0 and 1" not in caplog.text  # the check of a training has said it


def spoiled(**changes):
    def spoil(sections):
        for name, items in changes.items():
            sections[name] = items
        return sections

    return spoil


def spoiled_item(section, **keys):
    return lambda sections: {**sections, section: [{**sections[section][0], **keys}]}


LONG = "x" * 5000
LISTS = {
    "long path": (spoiled(unlabeled=[LONG]), "`image` must exist but .*xxx does not"),
    "home of nobody": (spoiled(unlabeled=["~nosuch/x.nii"]), "`image` must be .* no such user; .*list.json"),
    "variable that is not set": (spoiled(unlabeled=["$NO_SUCH/x.nii"]), "`image` must use .* \\$NO_SUCH .*list.json"),
    "NUL": (spoiled(unlabeled=["a\0b.nii"]), "`image` must exist but .* does not"),
    "half a surrogate": (spoiled(unlabeled=["\ud800.nii"]), "`image` must exist but .* does not"),
    "a number": (spoiled(unlabeled=[{"image": 3}]), "`image` must be a path .* item 0 of `unlabeled` in .*list.json"),
    "deep": (lambda _: b'{"labeled": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "list.json is not: it is nested too"),
    "unlabelled": (
        spoiled(unlabelled=[]),
        "`unlabelled` must be one of the lists .*list.json; did you mean `unlabeled`",
    ),
    "Labeled": (spoiled(Labeled=[]), "`Labeled` must be one .*did you mean `labeled`"),
    "validaiton": (spoiled(validaiton=[]), "`validaiton` must be one .*did you mean `validation`"),
    "train": (spoiled(train=[{"image": "labeled.nii.gz"}]), "`train` must be one of the lists .*; rename or remove it"),
    "lable": (spoiled_item("unlabeled", lable="a.nii"), "`lable` must be a known key .* item 0 .*did you mean `label`"),
    "patients": (
        lambda sections: {**sections, "unlabeled": [{"image": "unlabeled.nii.gz", "patients": "a"}]},
        "`patients` must be a known key of an item .*did you mean `patient`",
    ),
    "key twice": (
        lambda sections: json.dumps(sections)[:-1].encode() + b', "labeled": []}',
        "list.json is not: the key 'labeled' appears twice",
    ),
    "key of an item twice": (
        lambda sections: json.dumps(sections).replace('{"image"', '{"image": "a.nii", "image"', 1).encode(),
        "list.json is not: the key 'image' appears twice",
    ),
    "case of a patient": (
        spoiled_item("validation", patient="LABELED"),
        "`validation` must share no patient with `labeled` or `unlabeled` but both have 'LABELED', spelled 'labeled' ",
    ),
    "spaces of a patient": (
        spoiled_item("validation", patient=" labe led\t"),
        "must share no patient with `labeled` or `unlabeled`",
    ),
    "own image as label": (
        spoiled_item("labeled", label="./labeled.nii.gz"),
        "`label` must not be an image file but `labeled` has .*labeled.nii.gz, an image of `labeled`",
    ),
    "image of another as label": (spoiled_item("labeled", label="validation.nii.gz"), "an image of `validation`"),
    "binary": (lambda _: b"\xff\xfe\x00\xd8", "list.json is not"),
    "infinitely large": (lambda _: b'{"labeled": ' + b"9" * 10_000 + b"}", "list.json is not"),
}


@pytest.mark.parametrize("name", LISTS)
def test_list_that_cannot_be_meant_is_one_sentence(tmp_path, datalist, capsys, name):
    spoil, message = LISTS[name]
    code, output = check(capsys, tmp_path, spoil(datalist))
    assert code == 1 and len(re.findall(message, output)) == 1, output
    assert str(tmp_path) in output


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_list_with_a_byte_order_mark_is_read(tmp_path, datalist, capsys, encoding):
    datalist["unlabeled"][0]["patient"] = "Jürgen"
    code, output = check(capsys, tmp_path, json.dumps(datalist, ensure_ascii=False).encode(encoding))
    assert code == 0 and "errors: none" in output


@pytest.mark.parametrize(
    "path", ["~nosuch/list.json", "~nosuch", LONG, f"{LONG}.json", "a\0b", "a\0b.json", "/etc/passwd/list.json"]
)
def test_path_that_cannot_be_is_one_sentence(capsys, path):
    assert main(["check", path]) == 1
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and path in output and "Traceback" not in output


@pytest.mark.parametrize("name", ["train.list", "val.list", "test.list"])
@pytest.mark.parametrize("case", ["../out", "/etc", "."])
def test_listed_cases_stay_in_their_folder(tmp_path, capsys, name, case):
    (tmp_path / "data" / "a").mkdir(parents=True)
    h5(tmp_path / "data" / "a" / "mri_norm2.h5", lambda file: file.create_dataset("image", data=volume("a")))
    (tmp_path / "data" / name).write_text(f"a\n{case}\n")
    assert main(["check", str(tmp_path / "data")]) == 1
    assert f"`{name}` must only have names in its own folder but" in capsys.readouterr().err
