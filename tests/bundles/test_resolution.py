"""Every config and overlay: its references, its components and its expressions are there, and its workflow is whole."""

from __future__ import annotations

import ast
import builtins
from pydoc import locate

import ignite.distributed as idist
import pytest
from monai.bundle import ConfigParser, ConfigWorkflow, ReferenceResolver
from monai.bundle.config_item import ConfigComponent, ConfigExpression
from monai.utils import BundlePropertyConfig, set_determinism

from tests.bundles.conftest import BUNDLES, TINY, TINY_3D

METHODS = ("supervised", "mean_teacher", "ua_mt", "cps", "fixmatch", "bcp")
NETWORKS = (None, "network_plain", "network_pair")
# the files that are run together
TRAININGS = [["train"], ["train", "multi_gpu_train"], *(["train", "network_plain", method] for method in METHODS)]
TEACHERS = ("teacher_sam2", "teacher_network")
TRAININGS += [[*names, teacher] for teacher in TEACHERS for names in (["train"], ["train", "network_plain", "bcp"])]
TRAININGS += [["train", "network_pair", "cps"], ["train", "network_plain"], ["train", "network_pair"]]
EVALUATIONS = [["train", *([network] if network else []), "evaluate"] for network in NETWORKS]
INFERENCES = [["inference", *([network] if network else [])] for network in NETWORKS]
RUNS = [(bundle, names) for bundle in ("knowsam_acdc", "knowsam_la") for names in TRAININGS + EVALUATIONS + INFERENCES]
# what MONAI's expressions see without an import
ALWAYS_THERE = {"monai", "torch", "np", "numpy", *dir(builtins)}


def files(bundle, names):
    return [str(BUNDLES / bundle / "configs" / f"{name}.json") for name in names]


def parsed(bundle, names):
    parser = ConfigParser()
    parser.read_config(files(bundle, names))
    parser.parse()
    return parser.ref_resolver.items


def reached(items, ids):
    """The items below some ids, and below those that they refer to."""
    waiting, found = list(ids), {}
    while waiting:
        id = waiting.pop()
        for name in [one for one in items if one == id or one.startswith(f"{id}{ReferenceResolver.sep}")]:
            if name not in found:
                found[name] = items[name]
                waiting += ReferenceResolver.find_refs_in_config(items[name].get_config(), name)
    return found


def test_every_config_is_in_a_run_of_these_tests():
    assert {name for _, names in RUNS for name in names} == {
        path.stem for bundle in BUNDLES.iterdir() for path in (bundle / "configs").glob("*.json")
    } - {"metadata"}


@pytest.mark.parametrize("bundle, names", RUNS, ids=lambda value: "+".join(value) if isinstance(value, list) else value)
def test_every_reference_component_and_name_of_an_expression_is_there(bundle, names):
    items = parsed(bundle, names)
    # evaluation takes from training's config what it refers to; a training or an inference is responsible for all
    ids = ("initialize", "run", "finalize", "imports", "train::trainer") if "evaluate" in names else ("",)
    items_used = reached(items, [id for id in ids if id in items])
    assert len(items_used) > 50
    assert list(faults(items, items_used)) == []


def faults(items, items_used):
    """The ids of what is not there."""
    imported = {item.get_config().split()[-1] for item in items.values() if is_import(item)}
    for name, item in items_used.items():
        config = item.get_config()
        if any(reference not in items for reference in ReferenceResolver.find_refs_in_config(config, name)):
            yield name
        elif isinstance(item, ConfigComponent):
            if not callable(locate(item.resolve_module_name())):
                yield name
        elif is_import(item):
            if type(item.evaluate()).__name__ == "_LazyRaise":
                yield name
        elif isinstance(item, ConfigExpression) and free_names(config[1:]) - ALWAYS_THERE - imported:
            yield name


def test_what_is_not_there_is_found():
    config = {
        "imports": ["$import os", "$import nowhere.module as module"],
        "good": {"_target_": "Compose", "transforms": "$[os.path.join(p, 'a') for p in @names]"},
        "names": ["a"],
        "reference": "@missing",
        "component": {"_target_": "knowsam_monai.networks.Missing"},
        "bare": {"_target_": "Missing"},
        "expression": "$[preparation.check(x) for x in @names]",
    }
    parser = ConfigParser(config)
    parser.parse()
    items = parser.ref_resolver.items
    assert set(faults(items, items)) - {""} == {"imports::1", "reference", "component", "bare", "expression"}
    assert set(reached(items, ["good"])) == {"good", "good::_target_", "good::transforms", "names", "names::0"}


def is_import(item):
    return isinstance(item, ConfigExpression) and item.is_import_statement(item.get_config())


def free_names(expression):
    """The names that an expression takes from outside, references left aside."""
    tree = ast.parse(ReferenceResolver.id_matcher.sub("__reference", expression), mode="eval")
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return names - bound - {"__reference"}


@pytest.fixture
def process_group(tmp_path):
    """Of this process alone, which `initialize` of multi_gpu_train.json makes of torchrun's."""
    idist.initialize("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    idist.finalize()


@pytest.mark.parametrize("bundle, names", RUNS, ids=lambda value: "+".join(value) if isinstance(value, list) else value)
def test_workflow_has_the_properties_that_applications_look_for(
    bundle, names, small_phantom, small_volumes, small_teachers, tmp_path, request
):
    if "multi_gpu_train" in names:
        request.getfixturevalue("process_group")
    options, data = {**TINY, "image_pattern": "**/*.nii.gz"}, small_phantom
    if bundle == "knowsam_la":
        options, data = {**options, **TINY_3D}, small_volumes
    if len(names) > 1:  # their own networks
        options["network_def"] = None
    if "inference" in names:
        data = data.parent
    teacher = names[-1].partition("teacher_")[2]
    taught = small_teachers(BUNDLES / bundle / "configs", teacher) if teacher else {}
    keys = ConfigParser.load_config_files(files(bundle, names))
    workflow = ConfigWorkflow(
        config_file=files(bundle, names),
        meta_file=str(BUNDLES / bundle / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="inference" if "inference" in names else "train",
        **{key: value for key, value in (options | taught).items() if key.split("#")[0] in keys and value is not None},
        dataset_dir=str(data),
        output_dir=str(tmp_path),
        initialize=[],
    )
    workflow.initialize()
    try:
        assert workflow.check_properties() == []
        ids = {property[BundlePropertyConfig.ID] for property in workflow.properties.values()}
        # no metric is computed from what a training step gives: there is nothing to process it for
        absent = set() if "inference" in names else {"train::postprocessing"}
        assert {id for id in ids if id not in workflow.parser} == absent
    finally:
        set_determinism(seed=None)
