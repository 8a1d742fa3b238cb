import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from knowsam_monai.data.evaluation import images_root, inference_items, split_items
from knowsam_monai.data.phantom import write_phantom


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_a_folder_gives_its_images_sorted(tmp_path):
    touch(tmp_path, "b.nii.gz", "a.nii", "notes.txt", "deeper/c.nii")
    assert inference_items(tmp_path) == [{"image": str(tmp_path / n)} for n in ("a.nii", "b.nii.gz")]


def test_a_folder_named_as_an_image_is_left_to_the_reader(tmp_path):
    (touch(tmp_path, "a.nii") / "b.nii").mkdir()
    (tmp_path / "c.nii_old").mkdir()
    assert [Path(item["image"]).name for item in inference_items(tmp_path)] == ["a.nii", "b.nii"]


@pytest.mark.parametrize("output", ["", "../scans"])
def test_segmentations_may_not_go_where_the_images_are(tmp_path, output):
    folder = touch(tmp_path / "scans", "a.nii")
    with pytest.raises(ValueError, match="`output_dir` must not be the folder of the images but is"):
        inference_items(folder, output_dir=folder / output)


def test_a_pattern_reaches_into_folders(tmp_path):
    touch(tmp_path, "p1/p1_frame01.nii.gz", "p1/p1_frame01_gt.nii.gz", "p1/p1_4d.nii.gz")
    found = inference_items(tmp_path, "*/*frame[0-9][0-9].nii.gz")
    assert found == [{"image": str(tmp_path / "p1" / "p1_frame01.nii.gz")}]
    assert len(inference_items(tmp_path, "**/*.nii.gz")) == 2


@pytest.mark.parametrize("pattern", ["../*.nii", "a/../../*.nii", "/data/*.nii"])
def test_a_pattern_does_not_leave_the_folder(tmp_path, pattern):
    with pytest.raises(ValueError, match="`image_pattern` must be relative to the folder of the images but is"):
        inference_items(touch(tmp_path, "a.nii"), pattern)


def test_common_folder_of_the_images(tmp_path, monkeypatch):
    touch(tmp_path, "a.nii")
    monkeypatch.chdir(tmp_path)
    assert images_root("list.json", [{"image": "a.nii"}]) == str(tmp_path)
    assert images_root(tmp_path, []) == str(tmp_path)
    assert images_root(tmp_path / "a.nii", []) == images_root(None, []) == ""


def test_brackets_in_the_folder_s_name_are_no_pattern(tmp_path):
    assert len(inference_items(touch(tmp_path / "[1]", "a.nii"))) == 1


def test_one_file_is_one_item(tmp_path):
    touch(tmp_path, "a.nii")
    assert inference_items(tmp_path / "a.nii") == [{"image": str(tmp_path / "a.nii")}]


def test_a_data_list_gives_its_test_images_without_labels(tmp_path):
    touch(tmp_path, *(f"{n}.nii" for n in "abcdef"))
    pair = {"image": "a.nii", "label": "b.nii"}
    sections = {"labeled": [pair], "validation": [{"image": "c.nii", "label": "d.nii"}]}
    for others in (sections, {}):
        (tmp_path / "list.json").write_text(json.dumps({**others, "test": ["e.nii"]}), encoding="utf-8-sig")
        assert inference_items(tmp_path / "list.json") == [{"image": str(tmp_path / "e.nii")}]
    (tmp_path / "list.json").write_text(json.dumps(sections))
    with pytest.raises(ValueError, match="`test` must list at least one item but is empty or missing in "):
        inference_items(tmp_path / "list.json")


def left_out(items):
    return {Path(str(item["image"])).name: item["left_out"] for item in items if "left_out" in item}


def test_two_images_of_one_name_would_be_one_segmentation(tmp_path):
    touch(tmp_path, "a.nii.gz", "a.nrrd", "b.nii")
    items = inference_items(tmp_path, "*.n*")
    assert len(items) == 3 and set(left_out(items)) == {"a.nii.gz", "a.nrrd"}
    pair = f"{tmp_path}/a.nii.gz and {tmp_path}/a.nrrd"
    assert f"but {pair} would write the same output file; rename one" in left_out(items)["a.nrrd"]
    (tmp_path / "c").mkdir()
    touch(tmp_path / "c", "b.nii")
    assert len(inference_items(tmp_path, "**/*.nii")) == 2  # its segmentation is in the folder c
    touch(tmp_path, "d.nii")
    one, other = ({"image": name, "label": "d.nii"} for name in ("a.nii.gz", "a.nrrd"))
    touch(tmp_path / "c", "b.h5", "d.nii")
    lists = {"labeled": [one], "validation": [other], "test": ["b.nii", "c/b.nii"]}
    (tmp_path / "list.json").write_text(json.dumps(lists))
    items = inference_items(tmp_path / "list.json")
    assert len(items) == 2 and images_root(tmp_path / "list.json", items) == str(tmp_path)
    lists["test"] = [{"image": ["c/b.nii", "b.nii"]}, {"image": ["c/b.h5", "c/d.nii"]}]  # images of two channels
    (tmp_path / "list.json").write_text(json.dumps(lists))
    assert ["left_out" in item for item in inference_items(tmp_path / "list.json")] == [True, True]


def test_images_of_a_list_that_do_not_exist_are_left_to_their_reader(tmp_path):
    touch(tmp_path, "b.nii")
    lists = {"labeled": [{"image": "gone.nii", "label": "gone_too.nii"}], "test": ["a.nii", "b.nii"]}
    (tmp_path / "list.json").write_text(json.dumps(lists))
    items = inference_items(tmp_path / "list.json")
    assert items == [{"image": f"{tmp_path}/{name}.nii"} for name in "ab"]


@pytest.mark.parametrize("names", [("a.bmp", "a.png"), ("a.npy", "a.npz"), ("a.b.nii", "a.b.nii.gz")])
def test_one_segmentation_is_of_one_image_in_every_format(tmp_path, names):
    touch(tmp_path, *names, "b.nii")
    assert set(left_out(inference_items(tmp_path, "*"))) == set(names)


def test_label_maps_are_no_images_and_images_in_the_output_folder_are_left_out(tmp_path):
    touch(tmp_path, "a.nii.gz", "out/b.nii.gz", "out/d.txt")
    segmentation = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))
    segmentation.header.set_intent("label")
    for name in ("a_seg.nii.gz", "earlier/a_seg.nii.gz", "out/a_seg.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        nibabel.save(segmentation, tmp_path / name)
    items = inference_items(tmp_path, "**/*.nii*", output_dir=tmp_path / "out")
    assert [item["image"] for item in items if "left_out" not in item] == [str(tmp_path / "a.nii.gz")]
    reasons = {item["image"].removeprefix(f"{tmp_path}/"): item["left_out"] for item in items if "left_out" in item}
    assert set(reasons) == {"a_seg.nii.gz", "earlier/a_seg.nii.gz", "out/b.nii.gz"}
    assert (
        reasons.pop("out/b.nii.gz")
        == f"`image` must not lie in `output_dir` but {tmp_path}/out/b.nii.gz does; move it."
    )
    assert all("is a label map by its header, such as" in reason for reason in reasons.values())
    with pytest.raises(ValueError, match="but .*earlier only has 1 that are segmentations; set"):
        inference_items(tmp_path / "earlier")


def test_image_beside_a_label_map_of_its_name_has_its_output_to_itself(tmp_path):
    segmentation = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))
    segmentation.header.set_intent("label")
    nibabel.save(segmentation, touch(tmp_path, "a.nii") / "a.nii.gz")
    assert set(left_out(inference_items(tmp_path))) == {"a.nii.gz"}


def test_images_in_a_link_to_the_output_folder_are_left_out(tmp_path):
    touch(tmp_path, "a.nii", "out/b.nii")
    (tmp_path / "linked").symlink_to(tmp_path / "out")
    items = inference_items(tmp_path, "**/*.nii", output_dir=tmp_path / "out")
    assert [item["image"] for item in items if "left_out" not in item] == [str(tmp_path / "a.nii")]
    assert len(items) == 3


def test_files_named_as_the_label_of_a_scan_are_left_out(tmp_path, caplog):
    scans = [
        "a.nii",
        "b_image.nii",
        "brain_1.nii",
        "brain_mask.nii",
        "d1.nii",
        "d_gt.nii",
        "e_frame01.nii.gz",
        "f_CT.nii",
        "gt.nii",
    ]
    labels = ["a_seg.nii", "b_label.nii", "d1_GT.nii", "e_frame01_gt.nii.gz", "f_seg.nii"]
    items = inference_items(touch(tmp_path, *scans, *labels), "*.nii*")
    assert items == [{"image": str(tmp_path / name)} for name in scans]
    assert "Files that are named as labels of others are not segmented (5, such as" in caplog.text
    assert len(inference_items(tmp_path, "*_gt.nii*")) == 2  # selected by the user


def test_a_missing_folder_and_an_empty_one_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        inference_items(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must contain files that match '\*\.nii\*' but .* has none; set"):
        inference_items(tmp_path)


def test_a_folder_with_a_data_list_and_images_in_subfolders_leads_to_the_list(tmp_path):
    file = write_phantom(tmp_path, num_labeled=1, num_unlabeled=0, num_validation=0, num_test=1, max_size=32)
    with pytest.raises(ValueError, match=f"has none; pass the data list {file} to segment its test images, or set"):
        inference_items(tmp_path)


def test_without_a_folder_the_phantom_s_test_images_are_those_of_its_anatomy(tmp_path):
    counts = {"num_labeled": 1, "num_unlabeled": 0, "num_validation": 0, "num_test": 2, "max_size": 32}
    items = inference_items(None, phantom_dir=tmp_path / "phantom", phantom={**counts, "anatomy": "left_atrium"})
    assert [item["image"].rpartition("_")[2] for item in items] == ["LGE.nii.gz"] * 2


def test_a_split_must_be_filled_and_labeled():
    datalist = {"validation": [{"image": "a", "label": "b"}], "test": [], "unlabeled": [{"image": "c"}]}
    assert split_items(datalist) == datalist["validation"]
    for split in ("test", "training"):
        with pytest.raises(ValueError, match=f"splits with labels, validation, but is '{split}'"):
            split_items(datalist, split)
    with pytest.raises(ValueError, match="must have a label for every image but c has none"):
        split_items(datalist, "unlabeled")
