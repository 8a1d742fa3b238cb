"""The bundles' documents: metadata against its schema, and what the Model Zoo looks for."""

import configparser
import importlib.util
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle import scripts as bundle_scripts
from monai.bundle import verify_metadata
from monai.bundle.workflows import _reject_executable_logging_config
from monai.fl.client.monai_algo import disable_ckpt_loaders

ROOT = Path(__file__).parents[2]
BUNDLES = [ROOT / "bundles" / name for name in ("knowsam_acdc", "knowsam_la")]
SCHEMA = Path(__file__).parent / "schemas" / "meta_schema_20240725.json"
# the network's type of number
BESIDE_IMAGES = ("EnsureTyped",)
CONFIGS = sorted(path for bundle in BUNDLES for path in (bundle / "configs").glob("*.json"))


@pytest.fixture(params=BUNDLES, ids=lambda path: path.name)
def bundle(request):
    return request.param


def config_name(path):
    return f"{path.parents[1].name}-{path.name}"


def metadata(bundle):
    return json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))


def read(bundle, name):
    return (bundle / name).read_text(encoding="utf-8")


def no_duplicates(pairs):
    keys = [key for key, _ in pairs]
    assert len(keys) == len(set(keys)), [key for key in keys if keys.count(key) > 1]
    return dict(pairs)


def test_metadata_is_valid_against_the_schema_that_it_names(bundle, tmp_path, monkeypatch):
    pytest.importorskip("jsonschema")
    assert metadata(bundle)["schema"].endswith(SCHEMA.name)

    def copy_instead_of_download(url, filepath, **kwargs):
        Path(filepath).write_bytes(SCHEMA.read_bytes())

    monkeypatch.setattr(bundle_scripts, "download_url", copy_instead_of_download)
    meta_file = str(bundle / "configs" / "metadata.json")
    verify_metadata(meta_file=meta_file, filepath=str(tmp_path / "schema.json"))
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({k: v for k, v in metadata(bundle).items() if k != "required_packages_version"}))
    with pytest.raises(ValueError, match="required_packages_version|Failed validating"):
        verify_metadata(meta_file=str(broken), filepath=str(tmp_path / "schema.json"))


def test_metadata_has_its_version_in_the_changelog(bundle):
    from knowsam_monai import __version__

    assert metadata(bundle)["version"] in metadata(bundle)["changelog"]
    assert metadata(bundle)["version"] == __version__


def test_required_packages_do_not_name_what_pypi_does_not_have(bundle):
    packages = metadata(bundle)["required_packages_version"]
    assert not [name for name in packages if name.replace("-", "_").lower() == "knowsam_monai"]
    assert all(re.fullmatch(r"\d+(\.\d+)+", version) for version in packages.values())


def test_required_packages_are_those_that_setup_cfg_installs(bundle):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [line for line in setup["options"]["install_requires"].splitlines() if line and not line.startswith("#")]
    installed = {re.split(r"[<>=!~\[ ]", line)[0].lower() for line in lines}
    required = {name.lower() for name in metadata(bundle)["required_packages_version"]}
    assert required | {"monai", "torch", "numpy"} == installed


@pytest.mark.slow
def test_required_packages_are_on_pypi_for_the_zoo_s_python(tmp_path):
    packages = {item for bundle in BUNDLES for item in metadata(bundle)["required_packages_version"].items()}
    options = f"--dry-run --no-deps --only-binary :all: --python-version 3.10 --target {tmp_path}".split()
    names = [f"{name}=={version}" for name, version in sorted(packages)]
    command = [sys.executable, "-m", "pip", "install", *options, *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_versions_are_those_of_the_constraints_for_the_zoo_s_python(bundle):
    lines = [line.split(";") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    pins = [(line[0].strip().lower(), line[1:]) for line in lines if "==" in line[0]]
    pins = dict(pin.split("==") for pin, marker in pins if not marker or "<" in marker[0])  # Python 3.10
    versions = {**metadata(bundle)["required_packages_version"], "numpy": metadata(bundle)["numpy_version"]}
    versions |= {"monai": metadata(bundle)["monai_version"], "torch": metadata(bundle)["pytorch_version"]}
    assert {name: pins[name.lower()] for name in versions if name.lower() in pins} == versions


def test_channels_of_the_metadata_are_the_classes_of_the_configs(bundle):
    output = metadata(bundle)["network_data_format"]["outputs"]["pred"]
    train = ConfigParser.load_config_file(bundle / "configs" / "train.json")
    inference = ConfigParser.load_config_file(bundle / "configs" / "inference.json")
    assert list(output["channel_def"].values()) == ["background", *train["class_names"]]
    assert output["num_channels"] == inference["num_classes"] == len(train["class_names"]) + 1


@pytest.mark.parametrize("path", CONFIGS, ids=config_name)
def test_config_is_json_without_a_key_twice(path):
    assert json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)


@pytest.mark.parametrize("path", CONFIGS, ids=config_name)
def test_config_names_no_personal_path(path):
    assert not re.search(r"/home/|/Users/|/root/|/work/", path.read_text(encoding="utf-8"))


def test_inference_prepares_images_as_validation_does(bundle):
    train = ConfigParser.load_config_file(bundle / "configs" / "train.json")
    inference = ConfigParser.load_config_file(bundle / "configs" / "inference.json")

    def of_images(section):
        steps = [section["check"] if t == "@validate#check" else t for t in section["preprocessing"]["transforms"]]
        keep = [t for t in steps if t["_target_"].split(".")[-1] not in BESIDE_IMAGES]
        return [{k: v for k, v in t.items() if k not in ("keys", "allow_missing_keys", "warn")} for t in keep]

    expected = of_images(train["validate"])
    assert of_images(inference) == expected and len(expected) >= 4
    numbers = {"image_size", "spacing", "crop_size", "channels", "aggregation_channels"} & set(train)
    for key in ("network_def", "bundle_root", "in_channels", *numbers):
        assert inference[key] == train[key]


def test_inference_inverts_as_validation_does(bundle):
    """Probabilities go back to the native grid smoothly: MONAI's nearest costs a perfect student 4 % Dice on ACDC."""

    def steps(name, key):
        section = ConfigParser.load_config_file(bundle / "configs" / name)
        transforms = (section.get("validate") or section)["postprocessing"]["transforms"]
        names = [transform["_target_"] for transform in transforms]
        return [n for n in names if n not in ("SaveImaged", "KeepLargestConnectedComponentd")], [
            t.get(key) for t in transforms if t["_target_"] == "Invertd"
        ]

    expected = (["Activationsd", "Invertd", "AsDiscreted"], [False])
    assert steps("inference.json", "nearest_interp") == steps("train.json", "nearest_interp") == expected


def test_logging_is_one_line_with_the_time_and_says_nothing_of_ignite_s_own(bundle, tmp_path):
    path = str(bundle / "configs" / "logging.conf")
    _reject_executable_logging_config(path)  # what MONAI would refuse to apply
    config = configparser.RawConfigParser()
    config.read(path)
    record = logging.LogRecord("any", logging.INFO, "", 0, "a message", (), None)
    style = logging.Formatter(config["formatter_line"]["format"], config["formatter_line"]["datefmt"])
    assert re.fullmatch(r"\d\d:\d\d:\d\d  a message", style.format(record))
    assert config["logger_ignite"]["level"] == "WARNING"


@pytest.mark.parametrize("place", ["bundle", "repository"])
def test_bundle_root_is_found_from(bundle, place, monkeypatch):
    monkeypatch.chdir(bundle if place == "bundle" else ROOT)
    for name in ("train.json", "inference.json"):
        parser = ConfigParser()
        parser.read_config(str(bundle / "configs" / name))
        assert Path(parser.get_parsed_content("bundle_root")).resolve() == bundle


def test_evaluation_is_of_the_train_config_without_sam(bundle):
    workflow = ConfigWorkflow(
        config_file=[str(bundle / "configs" / name) for name in ("train.json", "evaluate.json")],
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="train",
    )
    assert workflow.parser["use_sam"] is False
    loader, metrics, report = workflow.parser["validate#handlers"]
    assert report == "@validate#report"
    assert [part["_target_"].split(".")[-1] for part in (loader, metrics)] == ["StudentCheckpointLoader", "CaseMetrics"]
    assert "train#" not in json.dumps(workflow.parser["run"])


def test_federated_evaluation_keeps_the_weights_of_the_server(bundle):
    parser = ConfigParser()
    parser.read_config([str(bundle / "configs" / name) for name in ("train.json", "evaluate.json")])
    disable_ckpt_loaders(parser)
    loaders = [part for part in parser["validate#handlers"] if "ckpt_path" in part]
    assert len(loaders) == 1 and loaders[0]["_disabled_"]


def test_large_files_name_sam_s_official_checkpoint(bundle):
    text = read(bundle, "large_files.yml")
    assert re.search(r"^large_files:\n- path: \"models/sam_vit_b_01ec64.pth\"$", text, re.MULTILINE)
    assert 'url: "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth"' in text
    assert 'hash_val: "01ec64d29a2fca3f0661936605ae66f8"' in text and 'hash_type: "md5"' in text
    if importlib.util.find_spec("yaml"):
        files = ConfigParser.load_config_file(bundle / "large_files.yml")["large_files"]
        assert [sorted(file) for file in files] == [["hash_type", "hash_val", "path", "url"]]


@pytest.mark.parametrize("path", [ROOT / "LICENSE", *(bundle / "LICENSE" for bundle in BUNDLES)], ids=str)
def test_license_is_apache_2(path):
    text = path.read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and len(text.splitlines()) > 190


@pytest.mark.parametrize(
    "bundle,words",
    [
        (BUNDLES[0], ("CC BY-NC-SA 4.0", "non-commercial", "10.1109/TMI.2018.2837502")),
        (BUNDLES[1], ("registered users", "10.1016/j.media.2020.101832", "UA-MT")),
    ],
    indirect=["bundle"],
)
def test_data_license_states_the_terms_of_the_data(bundle, words):
    text = read(bundle, "docs/data_license.txt")
    for word in (*words, "sam_vit_b", "phantom"):
        assert word in text


@pytest.mark.parametrize("name", ["docs/README.md", "configs/metadata.json"])
def test_crop_of_the_left_atrium_pack_is_documented(name):
    text = read(BUNDLES[1], name).replace("**", "")
    assert re.search("UA-MT pack is cropped around the ground truth, test cases included", text)
    assert "official release is cropped here without labels, to 200 mm around the image's center of brightness" in text


def test_bundles_differ_only_where_the_data_differs():
    """Everything but data, student, sizes and numbers is the same, and of every overlay the handler is."""
    one, other = (ConfigParser.load_config_file(bundle / "configs" / "train.json") for bundle in BUNDLES)
    same = ("run_name", "lr_scheduler", "loss", "sam_optimizer", "sam_lr_scheduler", "distiller")
    assert one["sgd"] == other["optimizer"]  # with patients; the phantom of slices has AdamW
    assert one["lr"].startswith("$(0.01, ") and other["lr"].startswith("$(0.01, ")
    for key in (
        *same,
        "initialize",
        "run",
        "finalize",
        "momentum",
        "weight_decay",
        "mutual_weight",
        "entropy_weight",
    ):
        assert one[key] == other[key], key
    for key in ("dataset", "unlabeled_dataset", "dataloader", "inferer", "handlers", "all_handlers", "trainer"):
        assert one["train"][key] == other["train"][key], key
    for key in (
        "dataset",
        "dataloader",
        "postprocessing",
        "key_metric",
        "additional_metrics",
        "report",
        "best",
        "all_handlers",
        "evaluator",
    ):
        assert one["validate"][key] == other["validate"][key], key
    names = [{path.name for path in CONFIGS if path.parents[1] == bundle} for bundle in BUNDLES]
    assert names[0] == names[1]
    for name in ("supervised", "mean_teacher", "ua_mt", "cps", "fixmatch", "bcp", "evaluate", "multi_gpu_train"):
        overlays = [ConfigParser.load_config_file(bundle / "configs" / f"{name}.json") for bundle in BUNDLES]
        for key in ("train#method", "ema_student", "validate#handlers", "initialize", "run", "validate#dataset"):
            assert overlays[0].get(key) == overlays[1].get(key), (name, key)


def test_readme_has_the_sections_of_the_zoo_s_template_and_commands_of_files_that_are_there(bundle):
    text = read(bundle, "docs/README.md")
    headings = re.findall(r"^#+ \**([^*\n]+?)\**$", text, re.MULTILINE)
    for title in ("Authors", "Tags", "Model Description", "Data", "Preprocessing", "Training Configuration", "Input"):
        assert title in headings
    for title in (
        "Output",
        "Performance",
        "System Configuration",
        "MONAI Bundle Commands",
        "Limitations",
        "Citation Info",
    ):
        assert title in headings
    assert {"References", "License"} <= set(headings)
    named = set(re.findall(r"configs/[a-z_]+\.(?:json|conf)", text))
    assert named >= {"configs/metadata.json"} | {
        f"configs/{name}.json" for name in ("train", "evaluate", "inference", "multi_gpu_train")
    }
    assert all((bundle / name).is_file() for name in named)


def test_metrics_are_those_of_the_weights_in_the_repository(bundle):
    changed = ["git", "-C", str(bundle), "status", "--porcelain", "models"]
    if not (ROOT / ".git").exists() or subprocess.run(changed, capture_output=True, check=True).stdout:
        pytest.skip("the weights are of another training")
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    record = json.loads((bundle / "models" / "model.json").read_text())
    assert metadata["eval_metrics"] == record["metrics"] and record["trained_on"] == "synthetic phantom"
    assert "validation volumes of the synthetic phantom" in metadata["description"]
