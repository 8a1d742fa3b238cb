from __future__ import annotations

from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from knowsam_monai.runs.comparison import configured, digests, other_data, other_settings

BUNDLES = Path(__file__).parents[2] / "bundles"


@pytest.fixture(params=["knowsam_acdc", "knowsam_la"])
def settings(request, monkeypatch):
    """`settings(*overlays, **overrides)`: what is configured in a shipped train.json with these."""
    monkeypatch.setenv("LOCAL_RANK", "0")

    def read(*overlays, added=None, **overrides):
        parser = ConfigParser()
        folder = BUNDLES / request.param / "configs"
        parser.read_config([str(folder / name) for name in ("train.json", *overlays)])
        for section in ("train", "validate") if added else ():
            parser[section]["handlers"].insert(1, added)
        parser.update(overrides)
        return configured(parser.config)

    return read


def test_where_and_how_a_run_is_computed_is_no_setting(settings):
    places = {"dataset_dir": "/a", "output_dir": "/a/out", "ckpt_dir": "/a/models", "run_name": "a", "num_workers": 0}
    others = {"dataset_dir": "b", "output_dir": "b/out", "bundle_root": "/b", "device": "cuda:1", "cache_workers": 9}
    without_file = {"sam_variant": "stand_in"}
    logging = {"log_interval": 7, "preflight": True, "resume": False, "sam_cache_dir": "/c"}
    expected = settings(**places, **without_file)
    assert settings(**others, **logging, **without_file) == expected
    assert settings("multi_gpu_train.json", **places, **without_file) == expected
    assert settings(**places, **without_file, fast_cpu_matmul=False) != expected


def test_handlers_that_only_watch_are_no_setting(settings):
    watching = {"_target_": "monai.handlers.StatsHandler", "iteration_log": False}
    assert settings(added=watching) == settings()
    assert settings(added={**watching, "_target_": "mine.Handler"}) != settings()


def test_default_that_is_given_is_the_same_and_a_change_is_named_with_both_values(settings):
    before = settings(dataset_dir="/a")
    assert other_settings(before, settings(dataset_dir="/b", lr=0.01, class_names=before["class_names"])) == []
    assert other_settings(before, settings(dataset_dir="/a", lr=0.1)) == ["`lr` must be 0.01 but is 0.1"]
    found = other_settings(before, settings(**{"train#weak_augmentation#transforms#1#prob": 0.1, "seed": 1}))
    assert "`seed` must be 0 but is 1" in found
    assert any(text.startswith("`train#weak_augmentation#transforms#1#prob` must be") for text in found)
    assert other_settings({"a": 1}, {"b": [1]}) == ["`a` must be 1 but is left out", "`b` must be left out but is [1]"]


@pytest.mark.parametrize("overlay", ["mean_teacher.json", "ua_mt.json", "bcp.json", "cps.json", "fixmatch.json"])
def test_every_number_of_an_overlay_is_a_setting(settings, overlay):
    overlays = ("network_pair.json" if overlay == "cps.json" else "network_plain.json", overlay)
    before = settings(*overlays)
    own = ConfigParser.load_config_file(BUNDLES / "knowsam_acdc" / "configs" / overlay)
    numbers = [key for key in own if "#" not in key and isinstance(before.get(key), (int, float))]
    assert len(numbers) >= 3
    for key in numbers:
        assert any(f"`{key}`" in text for text in other_settings(before, settings(*overlays, **{key: 0.123})))


def test_weights_of_sam_are_compared_by_content_wherever_they_lie(settings, tmp_path):
    files = [tmp_path / name for name in ("a.pth", "b.pth", "c.pth")]
    for file, content in zip(files, ("same", "same", "other")):
        file.write_text(content)
    same, moved, other = (settings(sam_checkpoint=str(file)) for file in files)
    assert same == moved
    (found,) = other_settings(same, other)
    assert found.startswith("`sam_checkpoint` must be 'a file of sha256 ")
    assert settings(use_sam=False, sam_checkpoint=str(files[0])) == settings(use_sam=False, sam_checkpoint="nowhere")


def test_weights_in_a_folder_are_compared_by_content_wherever_it_lies(settings, tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, content in zip(folders, ("same", "same", "other")):
        for file, text in (
            ("models/model.pt", content),
            ("configs/inference.json", "{}"),
            ("docs/README.md", folder.name),
        ):
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_text(text)
    same, moved, other = (settings("teacher_network.json", teacher_bundle=str(folder)) for folder in folders)
    assert same == moved
    (found,) = other_settings(same, other)
    assert found.startswith("`teacher_bundle` must be {'configs/inference.json': 'sha256 ")
    hub = [tmp_path / name for name in ("d", "e")]
    for folder in hub:
        folder.mkdir()
        (folder / "model.safetensors").write_text(folder.name)
    before, after = (settings("teacher_sam2.json", sam_checkpoint=str(folder)) for folder in hub)
    assert other_settings(before, after)[0].startswith("`sam_checkpoint` must be {'model.safetensors': 'sha256 ")


def test_objects_and_expressions_that_fail_are_compared_as_they_are_written():
    config = {"a": "$object()", "b": "$1 / 0", "c": (1, {"d": None})}
    assert configured(config) == {"a": "$object()", "b": "$1 / 0", "c": [1, {"d": None}]}


def test_data_and_places_inside_a_component_are_no_setting_but_an_empty_part_is():
    config = {"datalist": "$load('/a')", "handler": {"_target_": "Handler", "log_dir": "/a", "options": {}}}
    assert configured(config) == {"handler#_target_": "Handler", "handler#options": {}}


def test_file_of_other_content_is_named_and_one_that_was_moved_is_not():
    before = {"labeled": [("/a/1.nii", "07"), ("/a/2.nii", "1e")], "test": [("/a/3.nii", "ff")]}
    moved = {"labeled": [("b/1.nii", "07"), ("b/2.nii", "1e")], "test": [("b/3.nii", "00")]}
    changed = {"labeled": [("b/1.nii", "07"), ("b/2.nii", "00")]}
    kept = digests(before)
    assert kept == {"labeled": ["07", "1e"]} and other_data(kept, moved) == []
    assert other_data(kept, changed) == ["b/2.nii or its label must be unchanged but is new or has different content"]
    assert other_data(kept, {"labeled": [("b/1.nii", "07")]}) == ["`labeled` must have 2 items but has 1"]
    assert other_data(None, moved) == other_data(kept, None) == [] and digests(None) is None


@pytest.mark.parametrize("name", ["labeled", "unlabeled", "validation"])
def test_change_in_any_set_that_a_training_reads_is_found(name):
    before, now = {name: [("a.nii", "07")]}, {name: [("a.nii", "1e")]}
    assert other_data(digests(before), now) == [
        "a.nii or its label must be unchanged but is new or has different content"
    ]


def test_long_values_are_shortened():
    (text,) = other_settings({"a": "x" * 78}, {"a": "x" * 79})
    assert text == f"`a` must be '{78 * 'x'}' but is '{38 * 'x'}…{39 * 'x'}'"


def test_item_that_is_in_another_list_or_place_is_not_called_changed():
    a, b, c, d = items = [(f"{name}.nii", name) for name in "abcd"]
    kept = digests({"labeled": items[:2], "validation": items[2:]})
    swapped = {"labeled": [c, b], "validation": [a, d]}
    assert other_data(kept, swapped) == [
        "c.nii must be in `validation` of the data list but is in `labeled`",
        "a.nii must be in `labeled` of the data list but is in `validation`",
    ]
    assert other_data(kept, {"labeled": [b, a], "validation": [c, d]}) == [
        "`labeled` must have its items in the same order but has them in another"
    ]
    assert other_data(kept, {"labeled": [("new.nii", "e"), a, b], "validation": [c, d]}) == [
        "`labeled` must have 2 items but has 3",
        "new.nii or its label must be unchanged but is new or has different content",
    ]
