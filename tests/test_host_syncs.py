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
    *("teachers/segment_anything_import.py", "handlers/loss_terms.py", "handlers/teacher_validation.py"),
}
HOT = [
    path
    for folder in ("distillation", "handlers", "losses", "networks", "teachers")
    for path in sorted((PACKAGE / folder).glob("*.py"))
    if str(path.relative_to(PACKAGE)) not in BESIDE_THE_STEP
]
METHODS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "cuda", "equal", "allclose"}
FUNCTIONS = {"tensor", "as_tensor", "from_numpy", "unique", "bincount", "nonzero", "masked_select", "equal", "allclose"}
READ_BY_IF = {"any", "all"}
TENSORS = ("Tensor", "torch.Tensor", "Tensor | None", "torch.Tensor | None")


def is_mask(index: ast.AST) -> bool:
    """Whether an index looks like a bool mask, whose number of true elements the host needs."""
    if isinstance(index, ast.Tuple):
        return any(is_mask(part) for part in index.elts)
    if isinstance(index, ast.BinOp):
        return is_mask(index.left) or is_mask(index.right)
    text = ast.unparse(index)
    is_named = isinstance(index, (ast.Name, ast.Attribute)) and (text.endswith("mask") or text.startswith("is_"))
    return is_named or isinstance(index, ast.Compare) or isinstance(getattr(index, "op", None), ast.Invert)


def is_list(index: ast.AST) -> bool:
    """Whether an index is a list, which torch turns into a tensor that it copies to the device."""
    is_call = isinstance(index, ast.Call) and getattr(index.func, "id", "") in ("list", "sorted")
    return is_call or isinstance(index, (ast.List, ast.ListComp))


def may_be_a_device(argument: ast.AST) -> bool:
    """Whether `to(argument)` may move a tensor: to a device, or to where another tensor is."""
    text = ast.unparse(argument)
    is_dtype = text.endswith("dtype") or text.startswith("torch.")
    return "device" in text or (isinstance(argument, (ast.Name, ast.Attribute)) and not is_dtype)


def culprits(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """
    The qualified name of the function and the call, for each call that may wait for the device.

    Conditions on a tensor are found if it is an argument with a type, masks if they are compared or named like one.
    """

    def visit(node: ast.AST, name: str, is_condition: bool, tensors: frozenset[str]) -> Iterator[tuple[str, str]]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = f"{name}.{node.name}".lstrip(".")
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            typed = {a.arg for a in arguments if a.annotation is not None and ast.unparse(a.annotation) in TENSORS}
            tensors = tensors - {a.arg for a in arguments} | typed
        if isinstance(node, ast.Subscript) and is_mask(node.slice):
            yield name, "[mask]"
        is_type = isinstance(node, ast.Subscript) and ast.unparse(node.value)[0].isupper()  # Callable[[Tensor], Tensor]
        if (
            isinstance(node, ast.Subscript)
            and not is_type
            and any(map(is_list, getattr(node.slice, "elts", [node.slice])))
        ):
            yield name, "[list]"
        if is_condition and isinstance(node, (ast.Name, ast.Compare)):
            operands = [node] if isinstance(node, ast.Name) else [node.left, *node.comparators]
            reads = not any(isinstance(op, (ast.Is, ast.IsNot, ast.In, ast.NotIn)) for op in getattr(node, "ops", ()))
            if reads and any(isinstance(operand, ast.Name) and operand.id in tensors for operand in operands):
                yield name, "if tensor"
        if isinstance(node, ast.Call):
            call = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            of_torch = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "torch"
            arguments = [ast.unparse(argument) for argument in (*node.args, *(k.value for k in node.keywords))]
            is_cast = isinstance(node.func, ast.Name) and call in ("bool", "float", "int") and arguments
            moves = call == "to" and any(map(may_be_a_device, node.args)) and "non_blocking" not in ast.unparse(node)
            if (of_torch and call in FUNCTIONS) or (not of_torch and call in METHODS) or is_cast or moves:
                yield name, call
            elif is_condition and call in READ_BY_IF and isinstance(node.func, ast.Attribute):
                yield name, f"if {call}"
        for field, child in ast.iter_fields(node):
            decides = isinstance(node, (ast.If, ast.IfExp, ast.While)) and field == "test"
            decides |= isinstance(node, ast.BoolOp) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))
            is_within = is_condition and not isinstance(node, (ast.Call, ast.Compare, ast.Attribute, ast.Subscript))
            for part in child if isinstance(child, list) else [child]:
                if isinstance(part, ast.AST):
                    yield from visit(part, name, decides or is_within, tensors)

    yield from visit(tree, "", False, frozenset())


BUILDS = "runs once, when it is built, loaded or started"
INTERVAL = "once in an interval of tens of steps"
ON_HOST = "of plain numbers or a tensor on the host"
KEY = "the key of an embedding is the content of the image, read on the host"
ALLOWED = {  # (module, function): reason
    ("distillation/watched_loader.py", "WatchedLoader.__bool__"): ON_HOST,
    ("distillation/attachment.py", "Attachment._selection"): "wraps a label of NumPy; a tensor stays as it is",
    ("distillation/attachment.py", "Attachment._student_was_cleared"): "only if SAM has gradients of a step not taken",
    ("distillation/distiller.py", "SAMDistiller.move"): BUILDS,
    ("distillation/measurement.py", "_judged_rows"): INTERVAL,
    ("distillation/gate.py", "TeacherGate.get_extra_state"): BUILDS,
    ("distillation/gate.py", "TeacherGate.set_extra_state"): BUILDS,
    ("distillation/gate.py", "TeacherGate.__init__"): BUILDS,
    ("distillation/gate.py", "TeacherGate.is_open"): "once after each measurement",
    ("handlers/guided_mixing.py", "UncertaintyGuidedMixing.__init__"): BUILDS,
    ("handlers/supervision.py", "check_exclusive_classes"): "at the first step, for one-hot labels",
    ("teachers/slice_teacher.py", "_spatial_axes"): ON_HOST,
    ("distillation/gate.py", "TeacherGate.is_measured"): "at one call, to warn if nobody measures",
    ("distillation/gate.py", "TeacherGate.update"): INTERVAL,
    ("distillation/gate.py", "_class_counts"): INTERVAL,
    (
        "distillation/optimizer_hooks.py",
        "follow.step_teacher",
    ): "of a fused optimizer; GradScaler reads the same of every other one",
    ("distillation/optimizer_hooks.py", "ScalerCheck._check"): "ends after the first step with gradients",
    (
        "distillation/optimizer_hooks.py",
        "_average_over_ranks",
    ): "an optimizer skips a parameter only if its gradient is "
    "None on the host, and only together the ranks know whether one has a labeled row",
    ("distillation/watched_loader.py", "_begins_with"): "only if a batch was taken without a call of the student",
    (
        "distillation/watched_loader.py",
        "check_same_image",
    ): "a host that cannot be edited: a label of another image must "
    "never be used; read while the teacher's work waits for the device, and not at all if nothing was copied",
    ("distillation/watched_loader.py", "image_and_label"): "wraps an image of NumPy; a tensor stays as it is",
    ("teachers/intensity_window.py", "is_sam_range"): "once, on the first images",
    ("distillation/wiring.py", "has_each_row_twice"): "at calls 1 and 50",
    ("distillation/wiring.py", "Wiring._check_scale"): "at the first backward pass",
    ("distillation/wiring.py", "Wiring._is_broken_again"): INTERVAL,
    ("distillation/wiring.py", "Wiring.is_broken"): "only with a GradScaler, whose step waits too",
    ("handlers/bidirectional_copy_paste.py", "BidirectionalCopyPaste.pseudo_label"): "connected components",
    ("handlers/bidirectional_copy_paste.py", "BidirectionalCopyPaste.box_mask"): ON_HOST,
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
        ("y = x[x > 0]", "[mask]"),
        ("y = x[:, ~mask & other]", "[mask]"),
        ("y = x[is_valid]", "[mask]"),
        ("y = x[:, list(group)]", "[list]"),
        ("y = x[[i for i in group]]", "[list]"),
        ("if x > 0: pass", "if tensor"),
        ("y = 1 if x is not None and x else 0", "if tensor"),
        ("x.equal(other)", "equal"),
        ("torch.arange(4).to(other)", "to"),
    ],
)
def test_known_culprits_are_found(code, call):
    tree = ast.parse(f"def step(x: Tensor, y):\n    {code}")
    assert ("step", call) in set(culprits(tree))


@pytest.mark.parametrize(
    "code",
    ["if x is None: pass", "if len(x) > 0: pass", "if x.shape == y: pass", "y = x[rows]", "y = x.to(y.dtype)"],
)
def test_what_the_host_knows_is_no_culprit(code):
    assert set(culprits(ast.parse(f"def step(x: Tensor, y):\n    {code}"))) == set()


def parts_on(device):
    """A student of two views, the distiller of a teacher that learns, with an open gate, and a batch."""
    torch.manual_seed(0)
    teacher = SAMTeacher(num_classes=3, image_size=32, variant="stand_in", trainable="all")
    student = MultiViewNet(spatial_dims=2, in_channels=1, out_channels=3, channels=(4, 8, 8, 8, 8))
    parameters = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    distiller = SAMDistiller(teacher, torch.optim.SGD(parameters, lr=1e-3), taught_views=(1, 2))
    distiller.gate.weight.fill_(0.5)
    batch = {"image": torch.rand(4, 1, 32, 32), "label": torch.randint(3, (2, 1, 32, 32)).float()}
    return student.to(device), distiller.to(device), {key: value.to(device) for key, value in batch.items()}


def trained_on(device):
    """A KnowSAM trainer in mid-run, with mixing, and one of its batches."""
    student, distiller, batch = parts_on(device)
    loss = PartiallyLabeledLoss()
    handlers = [MultiViewCoTraining(), SAMDistillation(distiller), UncertaintyGuidedMixing(loss)]
    trainer = toy_trainer(student, [batch], loss, handlers, device=torch.device(device))
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
        name = function._schema.name.removeprefix("aten::")
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal")
        indices = args[1] if name.startswith(("index", "_index_put")) and isinstance(args[1], (list, tuple)) else ()
        is_mask = any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if name in waiting or is_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x[x > 0.5], "index"),
        (lambda x: x.clone().index_put_((x > 0.5,), x[0]), "index_put_"),
        (lambda x: torch.equal(x, x + 1), "equal"),
        (lambda x: bool(x[0] > 0), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
    ],
)
def test_reads_are_recorded(read, name):
    with ReadsOfTheHost() as reads:
        read(torch.rand(8))
    assert name in reads.found


def test_indices_on_the_host_are_no_reads():
    with ReadsOfTheHost() as reads:
        torch.rand(8)[torch.tensor([0, 2])]
    assert reads.found == []


@pytest.fixture
def no_label_checks(monkeypatch):
    for module in ("knowsam_monai.losses.supervised", "knowsam_monai.distillation.distiller"):
        monkeypatch.setattr(f"{module}.check_label", lambda *args, **kwargs: None)  # reads labels on a CPU only


def test_a_step_of_knowsam_reads_nothing_on_the_host(no_label_checks):
    trainer, batch = trained_on("cpu")
    with ReadsOfTheHost() as reads:
        trainer._process_function(trainer, batch)
    assert reads.found == []


def attached_on(device, every):
    """The steps of a loop that SKD is attached to; each is a forward pass, then the rest of the step."""
    student, distiller, batch = parts_on(device)
    optimizer, loss = torch.optim.SGD(student.parameters(), lr=1e-3), PartiallyLabeledLoss()
    loader = distiller.attach(student, optimizer, every=every).watch([batch] * 4)

    def forward(copies):
        batch = next(loader)
        image = batch["image"].clone() if copies else batch["image"]
        return loss(student(image), batch["label"])

    def rest(value):
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return forward, rest


def reads_of(function, *args):
    with ReadsOfTheHost() as reads:
        result = function(*args)
    return result, reads.found


@pytest.mark.parametrize(
    ("every", "copies", "expected"),
    [(1, False, []), (1, True, ["_local_scalar_dense"]), (4, True, [])],  # SAM does not run at the third step
    ids=["same image", "copied image", "skipped"],
)
def test_an_attached_step_reads_at_most_once_whether_the_image_is_the_batch_s(no_label_checks, every, copies, expected):
    """And not before the teacher has run, so that the device has work while the host waits."""
    forward, rest = attached_on("cpu", every)
    for _ in range(2):
        rest(forward(copies))
    value, before = reads_of(forward, copies)
    assert before == []
    assert reads_of(rest, value)[1] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_attached_step_does_not_wait_for_the_gpu():
    forward, rest = attached_on("cuda", every=1)
    rest(forward(False))
    torch.cuda.set_sync_debug_mode("error")
    try:
        rest(forward(False))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_of_knowsam_does_not_wait_for_the_gpu():
    trainer, batch = trained_on("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._process_function(trainer, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
