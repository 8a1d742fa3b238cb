"""Every public class and function says what goes in and out, what can go wrong, how it is used and whose idea it is."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

SUBPACKAGES = ("data", "distillation", "handlers", "losses", "networks", "runs", "teachers")
# public names of modules that no folder offers
PUBLIC = {
    "data.evaluation": ("images_root", "inference_items", "split_items"),
    "data.nifti_writer": ("NiftiGeometryWriter",),
    "labeled_rows": ("labeled_slice",),
    "distillation.watched_loader": ("CurrentBatch",),
    "distillation.wiring": ("Wiring",),
    "errors": ("KnowSAMError", "root_cause"),
    "files": ("expand_path", "iter_csv", "remove_parts", "write_csv", "write_text", "write_whole"),
    "runs.checks": ("check_data", "check_student", "check_writable"),
    "runs.cpu": ("fast_cpu_matmul", "keep_freed_memory"),
    "runs.messages": ("explain_errors", "ignore_known_warnings"),
    "runs.prediction": ("predict_folder",),
    "runs.report": ("read_run", "write_report"),
    "runs.run_record": ("open_log",),
    "runs.comparison": ("configured", "digests", "other_data", "other_settings"),
    "runs.config_check": ("check_config",),
    "runs.finishing": ("finish_run",),
    "runs.lock": ("lock_folder", "unlock_folder"),
    "runs.run_handlers": ("training_handlers", "validation_handlers"),
    "runs.segmenting": ("SkippingLoader", "segment"),
    "runs.starting": ("end_run", "release", "seed_ranks", "start_run"),
    "runs.values": ("check_values",),
    "runs.stop_signals": ("StopSignals", "end_on_signals", "give_back"),
    "runs.trained_student": ("publish_student", "read_record", "student_options", "warn_of_phantom"),
    "seeds": ("derive_seed",),
    "tensors": ("class_logits", "unstack_views"),
    "wrappers": ("plain_network", "plain_optimizer"),
}
# what comes from a paper is in these; the rest is engineering and cites nobody
METHODS = ("losses", "networks", "handlers")
OWN = {
    *(
        "CaseMetrics",
        "LastIteration",
        "LossTerms",
        "Preflight",
        "Resume",
        "TeacherValidation",
        "TrainingProgress",
        "ValidationHistory",
    ),
    *(
        "ValidationReport",
        "RunRecord",
        "WholeCheckpointSaver",
        "scalar_terms",
        "track_terms",
        "class_logits",
        "EmbeddingCache",
        "IntensityWindow",
    ),
    *("SliceSelection", "SliceTeacher", "unstack_views", "Distillation", "labeled_slice"),
}
SECTION = r"^\s*(?:{}):(?::|\s|$)"


def public():
    for module_name in (*SUBPACKAGES, *PUBLIC):
        module = importlib.import_module(f"knowsam_monai.{module_name}")
        for name in PUBLIC.get(module_name) or module.__all__:
            item = getattr(module, name)
            if callable(item):  # published splits are plain tuples
                yield pytest.param(module_name, name, item, id=f"{module_name}.{name}")


ITEMS = list(public())


def named_in_configs():
    """Dotted paths of this package's classes and functions: a `_target_`, or a call on a module of `imports`."""
    configs = (Path(__file__).parents[2] / "bundles").glob("*/configs/*.json")
    text = "".join(path.read_text(encoding="utf-8") for path in configs)
    found = set(re.findall(r'"_target_": "(knowsam_monai\.[\w.]+)"', text))
    targets = {re.sub(r"(\.[A-Z]\w+)\.\w+$", r"\1", target) for target in found}  # of a class method, its class
    for module, name in set(re.findall(r"import (knowsam_monai[\w.]*) as (\w+)", text)):
        targets |= {f"{module}.{function}" for function in re.findall(rf"\b{name}\.(\w+)\(", text)}
    return targets | set(re.findall(r'"writer": "(knowsam_monai\.[\w.]+)"', text))


def test_all_that_configs_name_is_among_what_these_tests_look_at():
    named = named_in_configs()
    assert len(named) > 40
    assert named <= {f"knowsam_monai.{item.id}" for item in ITEMS}


def has(section, item):
    return re.search(SECTION.format(section), inspect.getdoc(item) or "", re.MULTILINE) is not None


def parameters(item):
    call = item.__init__ if inspect.isclass(item) and "__init__" in vars(item) else item
    if inspect.isclass(item) and call is item:
        return []
    named = [
        p.name for p in inspect.signature(call).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return [name for name in named if name != "self" and not name.startswith("_")]


@pytest.mark.parametrize("module,name,item", ITEMS)
def test_docstring_begins_with_a_sentence(module, name, item):
    first = (vars(item).get("__doc__", item.__doc__) or "").strip().split("\n\n")[0]
    assert first and first.rstrip().endswith((".", ":")), first


@pytest.mark.parametrize("module,name,item", ITEMS)
def test_every_argument_is_described(module, name, item):
    text = inspect.getdoc(item)
    missing = [p for p in parameters(item) if not re.search(rf"(^|, )\s*\*{{0,2}}{p}[:,]", text, re.MULTILINE)]
    assert not missing


@pytest.mark.parametrize("module,name,item", ITEMS)
def test_shape_of_tensors_is_given(module, name, item):
    is_network = inspect.isclass(item) and "forward" in vars(item)
    assert not is_network or has("Shape", item)


@pytest.mark.parametrize("module,name,item", ITEMS)
def test_errors_are_listed(module, name, item):
    raises = re.search(r"raise (Value|Type|Runtime|FileNotFound|Permission|Import)Error", inspect.getsource(item))
    assert raises is None or has("Raises", item)


@pytest.mark.parametrize("module,name,item", ITEMS)
def test_there_is_an_example(module, name, item):
    assert has("Example", item)


@pytest.mark.parametrize("module,name,item", ITEMS)
def test_source_is_named(module, name, item):
    is_method = module in METHODS and name not in OWN
    assert not is_method or has("Reference", item)
