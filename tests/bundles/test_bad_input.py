"""Bad input to train.json: one clear sentence as the root cause, and before the first step."""

from __future__ import annotations

import json
import re

import nibabel
import numpy as np
import pytest
import torch

from knowsam_monai.errors import root_cause


def write_volume(path, value=0.0, shape=(16, 16, 2), dtype=np.float32, corner=0.0):
    array = np.zeros(shape, dtype)
    array[0, 0] = corner
    array[4:8, 4:8] = value
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


@pytest.fixture
def data(tmp_path):
    """A good data list of tiny volumes, to be spoilt: the folder, its files named after their section."""
    folder = tmp_path / "data"
    folder.mkdir()
    sections = {}
    for number, name in enumerate(("labeled", "unlabeled", "validation")):
        write_volume(folder / f"{name}.nii.gz", value=1.0, corner=number / 4)
        sections[name] = [{"image": f"{name}.nii.gz"}]
        if name != "unlabeled":
            write_volume(folder / f"{name}_gt.nii.gz", value=3, dtype=np.uint8)
            sections[name][0]["label"] = f"{name}_gt.nii.gz"
    (folder / "list.json").write_text(json.dumps(sections))
    return folder


@pytest.fixture
def refused(training, data):
    """`refused(message, key=value)`: the run ends with that message before a step is made."""

    def run_into(message, **options):
        run = training(**{"dataset_dir": str(data / "list.json"), "use_sam": False, "mixing_weight": 0, **options})
        with pytest.raises((RuntimeError, PermissionError)) as error:
            run.run()
        assert re.search(message, str(root_cause(error.value))), str(root_cause(error.value))
        assert run.history == [] and not list(run.output_dir.rglob("*.pt"))

    return run_into


def test_the_good_data_of_these_tests_train(training, data):
    assert len(training(dataset_dir=str(data / "list.json"), use_sam=False).run().history) == 2


@pytest.mark.parametrize("bundle, data_list", [("training", "small_phantom"), ("training_3d", "small_volumes")])
def test_list_without_unlabeled_images_trains_with_the_keys_that_the_errors_name(request, bundle, data_list):
    build, path = (request.getfixturevalue(name) for name in (bundle, data_list))
    content = json.loads(path.read_text())
    del content["unlabeled"]
    path = path.with_name("no_unlabeled.json")
    path.write_text(json.dumps(content))
    options = {"dataset_dir": str(path), "labeled_batch_size": 2, "use_sam": False}
    keys = "--unlabeled_batch_size 0 --mixing_weight 0 --distillation_gate none"
    for num_rows, remedy in ((2, f"in a bundle: {keys}, with the method knowsam"), (0, "add --mixing_weight 0.")):
        with pytest.raises(RuntimeError) as error:
            build(**options, unlabeled_batch_size=num_rows).run()
        assert remedy in str(root_cause(error.value))
    assert len(build(**options, unlabeled_batch_size=0, mixing_weight=0).run().history) == 2


@pytest.mark.parametrize("found", ["does not exist", "is empty", "contains none of them"])
def test_data_set_of_no_known_form_says_what_was_looked_for(refused, tmp_path, found):
    folder = tmp_path / "ACDC"
    if found != "does not exist":
        folder.mkdir()
    if found == "contains none of them":
        (folder / "readme.txt").write_text("ACDC")
    forms = r"with training/patient001/Info\.cfg.*with data/slices/\*\.h5"
    refused(rf"`dataset_dir` must be .*{forms}.* but {folder} {found}", dataset_dir=str(folder))


def test_damaged_image_is_named(refused, data):
    path = data / "unlabeled.nii.gz"
    path.write_bytes(path.read_bytes()[:100])
    refused(f"`image` must be a readable image but {path} is not")


def test_fewer_classes_than_the_labels_have_is_an_error(refused, data):
    refused(f"integers 0 to 1 as values but {data}/labeled_gt.nii.gz has 3", class_names=["left ventricle"])


def test_image_with_channels_that_the_network_does_not_take_is_named(refused, data):
    write_volume(data / "validation.nii.gz", value=1.0, shape=(16, 16, 2, 3))
    refused(f"`image` must have 1 channel but {data}/validation.nii.gz has 3; set `in_channels`")


@pytest.mark.parametrize("name", ["labeled", "unlabeled"])
def test_batch_larger_than_its_set_is_an_error(refused, name):
    message = f"`{name}_batch_size` must be at most the number of {name} items, 2, but is 5"
    refused(message, **{f"{name}_batch_size": 5})


@pytest.mark.parametrize("image_size", [40, 24])
@pytest.mark.parametrize(
    "use_sam, message",
    [(True, "`image_size` must be a multiple of 16 for this teacher but is"), (False, "multiples of 16 but has .")],
)
def test_image_size_that_is_no_multiple_of_16_is_an_error_before_data_are_read(
    refused, monkeypatch, image_size, use_sam, message
):
    monkeypatch.setattr("knowsam_monai.data.load_datalist", lambda *args, **kwargs: pytest.fail("data was read"))
    refused(f"{message} ?{image_size}", image_size=image_size, use_sam=use_sam)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"out_channels": 5}, r"must return logits \(1, 4, 32, 32\) .* but MultiViewNet returns \(1, 5, 32, 32\)"),
        ({"in_channels": 2}, r"must accept images of `in_channels` and `image_size`, \(1, 1, 32, 32\)"),
    ],
)
def test_student_with_other_classes_or_channels_is_an_error(refused, options, message):
    refused(message, network_def={"_target_": "knowsam_monai.networks.MultiViewNet", "channels": [4] * 5, **options})


def test_names_that_do_not_match_the_class_count_are_an_error(refused):
    refused("`class_names` must name 2 classes", num_classes=3)


def test_checkpoint_of_another_model_is_an_error(refused, tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    options = {"use_sam": True, "sam_variant": "vit_b", "sam_checkpoint": str(tmp_path / "other.pth")}
    refused("must be a file with the weights of SAM's vit_b but .*other.pth holds another model", **options)


@pytest.mark.parametrize("key", ["output_dir", "ckpt_dir"])
def test_folder_that_cannot_be_written_is_an_error_before_data_are_read(refused, monkeypatch, tmp_path, key):
    monkeypatch.setattr("knowsam_monai.data.load_datalist", lambda *args, **kwargs: pytest.fail("data was read"))
    (tmp_path / "file").write_text("root may write everywhere, but no folder below a file")
    folder = tmp_path / "file" / "output"
    refused(f"must be a writable folder but '{folder}' is not", **{key: str(folder)})


@pytest.mark.parametrize("loss", ["DiceCELoss", "DiceLoss", "torch.nn.CrossEntropyLoss"])
def test_bare_loss_with_unlabeled_rows_is_an_error(refused, loss):
    name = loss.split(".")[-1]
    refused(f"must be a PartiallyLabeledLoss if only 2 of 4 rows have a label but is {name}", loss={"_target_": loss})
