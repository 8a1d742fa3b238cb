"""Every public class and function says what goes in and out, what can go wrong, how it is used and whose idea it is."""

import importlib
import inspect
import re

import pytest

SUBPACKAGES = ("data", "handlers", "losses", "networks")
# the public names of modules that have no __all__
PUBLIC = {
    "attachment": ("Attachment",),
    "distiller": ("Distillation", "SAMDistiller"),
    "ema_student": ("EMAStudent",),
    "following": ("FollowHandle", "follow"),
    "gate": ("TeacherGate",),
    "inferers": ("AutocastInferer",),
    "noisy_passes": ("NoisyPasses",),
    "preparation": ("check_student", "check_writable", "explain_errors", "fast_cpu_matmul", "keep_freed_memory"),
    "watched_loader": ("WatchedLoader",),
}
# what comes from a paper is in these; the rest is engineering and cites nobody
METHODS = ("losses", "networks", "handlers", "distiller", "ema_student")
OWN = {
    *("CaseMetrics", "LossTerms", "Preflight", "Resume", "TeacherValidation", "TrainingProgress", "ValidationHistory"),
    *(
        "ValidationReport",
        "WholeCheckpointSaver",
        "scalar_terms",
        "track_terms",
        "class_logits",
        "EmbeddingCache",
        "IntensityWindow",
    ),
    *("SliceSelection", "SliceTeacher", "unstack_views", "Distillation"),
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
