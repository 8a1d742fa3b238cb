"""A training step does not wait for the device: no code of the hot path reads a tensor's values on the host."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from knowsam_monai.distillation.distiller import SAMDistiller
from knowsam_monai.handlers import MultiViewCoTraining, SAMDistillation, UncertaintyGuidedMixing
from knowsam_monai.losses import PartiallyLabeledLoss
from knowsam_monai.networks import MultiViewNet
from knowsam_monai.teachers import SAMTeacher
from tests.toys import toy_trainer

PACKAGE = Path(__file__).parents[1] / "knowsam_monai"
BESIDE_THE_STEP = {  # modules of these folders that only build, load, check or measure
    *("teachers/bundle_network.py", "teachers/contract.py", "teachers/provenance.py", "teachers/sam.py"),
    *("teachers/sam2_model.py", "teachers/sam_checkpoint.py", "teachers/sam_variants.py", "teachers/weights.py"),
    *("teachers/stand_in.py", "teachers/segment_anything_import.py"),
    *("handlers/loss_terms.py", "handlers/teacher_validation.py"),
}
HOT = [
    path
    for folder in ("distillation", "handlers", "losses", "networks", "teachers")
    for path in sorted((PACKAGE / folder).glob("*.py"))
    if str(path.relative_to(PACKAGE)) not in BESIDE_THE_STEP
]
METHODS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "cuda"}
FUNCTIONS = {"tensor", "as_tensor", "from_numpy", "unique", "bincount", "nonzero", "masked_select", "equal", "allclose"}
READ_BY_IF = {"any", "all"}


def culprits(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The qualified name of the function and the call, for each call that may wait for the device."""

    def visit(node: ast.AST, name: str, is_condition: bool) -> Iterator[tuple[str, str]]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = f"{name}.{node.name}".lstrip(".")
        if isinstance(node, ast.Call):
            call = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            of_torch = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "torch"
            arguments = [ast.unparse(argument) for argument in (*node.args, *(k.value for k in node.keywords))]
            is_cast = isinstance(node.func, ast.Name) and call in ("bool", "float", "int") and arguments
            moves = call == "to" and any("device" in a for a in arguments) and "non_blocking" not in ast.unparse(node)
            if (of_torch and call in FUNCTIONS) or (not of_torch and call in METHODS) or is_cast or moves:
                yield name, call
            elif is_condition and call in READ_BY_IF and isinstance(node.func, ast.Attribute):
                yield name, f"if {call}"
        for field, child in ast.iter_fields(node):
            decides = isinstance(node, (ast.If, ast.IfExp, ast.While)) and field == "test"
            decides |= isinstance(node, ast.BoolOp) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))
            for part in child if isinstance(child, list) else [child]:
                if isinstance(part, ast.AST):
                    yield from visit(part, name, decides or (is_condition and not isinstance(node, ast.Call)))

    yield from visit(tree, "", False)


BUILDS = "runs once, when it is built, loaded or started"
INTERVAL = "once in an interval of tens of steps"
ON_HOST = "of plain numbers or a tensor on the host"
KEY = "the key of an embedding is the content of the image, read on the host"
ALLOWED = {  # (module, function): reason
    ("distillation/watched_loader.py", "WatchedLoader.__bool__"): ON_HOST,
    ("distillation/watched_loader.py", "on_device"): "for `select`, whose batch the host may have on any device",
    ("distillation/attachment.py", "Attachment._selection"): "wraps a label of NumPy; a tensor stays as it is",
    ("distillation/attachment.py", "Attachment._gradients"): BUILDS,
    ("distillation/gate.py", "TeacherGate.__init__"): BUILDS,
    ("distillation/gate.py", "TeacherGate.is_open"): "once after each measurement",
    ("distillation/gate.py", "TeacherGate.update"): INTERVAL,
    ("distillation/gate.py", "_class_counts"): INTERVAL,
    ("distillation/optimizer_hooks.py", "ScalerCheck._check"): "ends after the first step with gradients",
    (
        "distillation/optimizer_hooks.py",
        "_average_over_ranks",
    ): "an optimizer skips a parameter only if its gradient is "
    "None on the host, and only together the ranks know whether one has a labeled row",
    ("distillation/watched_loader.py", "_begins_with"): "only if a batch was taken without a call of the student",
    (
        "distillation/watched_loader.py",
        "image_and_label",
    ): "a host that cannot be edited: a label of another image must "
    "never be used; `select` avoids the comparison",
    ("teachers/intensity_window.py", "is_sam_range"): "once, on the first images",
    ("distillation/wiring.py", "are_probabilities"): "at calls 1 and 50",
    ("distillation/wiring.py", "has_each_row_twice"): "at calls 1 and 50",
    ("handlers/bidirectional_copy_paste.py", "BidirectionalCopyPaste.pseudo_label"): "connected components",
    ("handlers/bidirectional_copy_paste.py", "BidirectionalCopyPaste.box_mask"): ON_HOST,
    ("handlers/fixmatch.py", "FixMatch.__call__"): ON_HOST,
    ("handlers/sam_distillation.py", "SAMDistillation.started"): BUILDS,
    ("losses/supervised.py", "check_label"): ON_HOST,
    ("networks/ema_student.py", "EMAStudent.follow"): BUILDS,
    ("networks/ema_student.py", "EMAStudent._average"): ON_HOST,
    ("teachers/adapter.py", "Adapter.__init__"): BUILDS,
    ("teachers/embedding_cache.py", "EmbeddingCache.__call__"): KEY,
    ("teachers/embedding_cache.py", "EmbeddingCache._embedding"): KEY,
    ("teachers/embedding_cache.py", "EmbeddingCache._update_encoder_hash"): BUILDS,
    ("teachers/embedding_cache.py", "EmbeddingCache._read"): KEY,
    ("teachers/embedding_cache.py", "EmbeddingCache._write"): KEY,
    ("teachers/embedding_cache.py", "_bytes"): KEY,
    ("teachers/network_teacher.py", "_entries"): BUILDS,
    ("teachers/sam2_teacher.py", "Sam2Teacher.__init__"): BUILDS,
    ("teachers/sam_encoder.py", "_token_order"): "once for each size and device",
    ("teachers/sam_teacher.py", "SAMTeacher.__init__"): BUILDS,
    ("teachers/slice_selection.py", "draw_uniform"): ON_HOST,
    ("teachers/slice_selection.py", "draw_by_entropy"): ON_HOST,
    ("teachers/slice_teacher.py", "SliceTeacher.get_extra_state"): BUILDS,
    ("teachers/slice_teacher.py", "SliceTeacher.set_extra_state"): BUILDS,
    ("teachers/tiny_vit.py", "from_mobile_sam"): BUILDS,
}


def test_no_code_of_the_hot_path_waits_for_the_device_except_in_listed_places():
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in HOT
        for name, _ in culprits(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == ALLOWED.keys()


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("x.item()", "item"),
        ("x[1:].tolist()", "tolist"),
        ("x.detach().cpu()", "cpu"),
        ("bool(x > 0)", "bool"),
        ("torch.tensor([1], device=x.device)", "tensor"),
        ("return torch.equal(x, x)", "equal"),
        ("rows.to(x.device)", "to"),
        ("if not x.isfinite().all(): pass", "if all"),
        ("if n and (x > 0).any(): pass", "if any"),
        ("x[mask.nonzero()]", "nonzero"),
    ],
)
def test_known_culprits_are_found(code, call):
    tree = ast.parse(f"def step(x):\n    {code}")
    assert ("step", call) in set(culprits(tree))


def trained_on(device):
    """A KnowSAM trainer in mid-run, with an open gate and mixing, and one of its batches."""
    torch.manual_seed(0)
    teacher = SAMTeacher(num_classes=3, image_size=32, variant="stand_in", trainable="all")
    student = MultiViewNet(spatial_dims=2, in_channels=1, out_channels=3, channels=(4, 8, 8, 8, 8))
    loss = PartiallyLabeledLoss()
    parameters = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    distiller = SAMDistiller(teacher, torch.optim.SGD(parameters, lr=1e-3), taught_views=(1, 2))
    distiller.gate.weight.fill_(0.5)
    batch = {"image": torch.rand(4, 1, 32, 32), "label": torch.randint(3, (2, 1, 32, 32)).float()}
    batch = {key: value.to(device) for key, value in batch.items()}
    handlers = [MultiViewCoTraining(), SAMDistillation(distiller), UncertaintyGuidedMixing(loss)]
    trainer = toy_trainer(student.to(device), [batch], loss, handlers, device=torch.device(device))
    trainer.run()
    trainer.state.batch, trainer.state.iteration = batch, 2  # neither agreement nor Dice is due
    trainer._process_function(trainer, batch)
    return trainer, batch


class ReadsOfTheHost(TorchDispatchMode):
    """Records the operations whose result the host needs."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount")
        if function._schema.name.removeprefix("aten::") in waiting:
            self.found.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_a_step_of_knowsam_reads_nothing_on_the_host(monkeypatch):
    for module in ("knowsam_monai.losses.supervised", "knowsam_monai.distillation.distiller"):
        monkeypatch.setattr(f"{module}.check_label", lambda *args, **kwargs: None)  # reads labels on a CPU only
    trainer, batch = trained_on("cpu")
    with ReadsOfTheHost() as reads:
        trainer._process_function(trainer, batch)
    assert reads.found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_of_knowsam_does_not_wait_for_the_gpu():
    trainer, batch = trained_on("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._process_function(trainer, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
