"""
The contract of every teacher, and a check of it.

A teacher is a module ``teacher(image, prompt_logits) -> logits``; all three are (B, channels, *spatial):

- **Rows.** Rows are independent, so labeled rows with a graph and unlabeled rows without one can run separately.
- **Sizes and classes.** It accepts the sizes of the student's training and validation and returns logits of the image's
  size, with one channel for each class of the student, or for each region if regions overlap. `num_classes` is their
  number. The check covers one size: call it with each size that you use.
- **Values.** The image is in 0..1, and the teacher changes neither the image nor the prompt. The logits are float32
  (float64 for a float64 teacher) and finite.
- **Eval mode.** Its logits are targets and must not depend on dropout or batch statistics. ``teacher.train()`` leaves
  every module in eval mode, equal calls return equal logits, and a call changes no weight and no buffer.
- **Prompts.** The student's logits are only a prompt: no gradient flows back into them.
- **Training.** The logits depend on every parameter with `requires_grad`. A teacher without such parameters builds no
  graph and needs no optimizer.
- **Sigmoid or softmax.** A teacher that learns suits both. A teacher whose logits are fixed has an attribute
  `overlapping`: True for regions with a sigmoid each, False for classes of a softmax.
- **Provenance.** `pretrained` tells whether its weights are pretrained, `pretrained_on` on which data, and `license` is
  the license of the weights; each is None if unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from knowsam_monai.errors import KnowSAMTypeError, KnowSAMValueError
from knowsam_monai.seeds import kept_random_state
from knowsam_monai.teachers.provenance import origin
from knowsam_monai.tensors import in_precision_of, without_meta

TOLERANCE = 1e-3  # relative to the largest logit: a batch and its single rows are computed in different orders


@dataclass(frozen=True)
class TeacherFacts:
    """
    The result of :func:`check_teacher`.

    Args:
        name: name of the teacher's class.
        num_classes: number of channels C of its logits.
        num_parameters: number of all parameters.
        trainable: names of the trainable parameters; empty for a frozen teacher.
        pretrained, pretrained_on, license: provenance of the weights, from the teacher or from the path of its
            checkpoint (:func:`knowsam_monai.teachers.origin`); None if unknown.

    Example::

        >>> TeacherFacts("MyTeacher", 4, 100, (), True, "our scans of 2019", None).frozen
        True
    """

    name: str
    num_classes: int
    num_parameters: int
    trainable: tuple[str, ...]
    pretrained: bool | None
    pretrained_on: str | None
    license: str | None

    @property
    def frozen(self) -> bool:
        """Whether the teacher has no trainable parameters and needs no optimizer."""
        return not self.trainable


def check_teacher(teacher: nn.Module, image: Tensor, num_classes: int | None = None) -> TeacherFacts:
    """
    Call a teacher a few times and check that it fulfills the contract above, for images of this size.

    Every other image is inverted and darkened, so that rows differ. The check leaves the teacher's weights, gradients
    and modes and the global random states as they were. A cached encoder keeps the embeddings of these images.

    Args:
        teacher: ``f(image, prompt_logits) -> logits``.
        image: (B, channels, *spatial) in 0..1 with two or more rows, as the student sees them, on the teacher's device.
        num_classes: C of the student (1 for a sigmoid). None: the teacher's `num_classes`.

    Returns:
        Facts about the teacher.

    Raises:
        TypeError: if `teacher` is not a module or `image` is not a tensor.
        ValueError: if the image is unsuitable, or if the teacher breaks the contract.

    Example::

        >>> from monai.networks.nets import BasicUNet
        >>> network = BasicUNet(spatial_dims=2, out_channels=4, features=(8, 8, 8, 8, 8, 8))
        >>> from knowsam_monai.teachers import NetworkTeacher
        >>> check_teacher(NetworkTeacher(network, channels=(0, 3, 2, 1)), torch.rand(2, 1, 32, 32)).frozen
        True
    """
    if not isinstance(teacher, nn.Module):
        raise KnowSAMTypeError(f"`teacher` must be a torch module but is a {type(teacher).__name__}.")
    if not isinstance(image, Tensor):
        raise KnowSAMTypeError(f"`image` must be a tensor but is a {type(image).__name__}; use `torch.as_tensor`.")
    if image.ndim not in (4, 5) or len(image) < 2 or not image.numel() or not image.is_floating_point():
        raise KnowSAMValueError(
            "`image` must be two or more images (B, channels, *spatial) of floats, none of them empty, but is "
            f"{image.dtype} of shape {tuple(image.shape)}."
        )
    if not (0 <= image.min() and image.max() <= 1):
        raise KnowSAMValueError(f"`image` must be in 0..1 but is in {image.min():.4g}..{image.max():.4g}; scale it.")
    own_num_classes = getattr(teacher, "num_classes", None)
    num_classes = own_num_classes if num_classes is None else num_classes
    if num_classes is None:
        raise _broken("have `num_classes`", "does not", "set that attribute, or pass `num_classes` here")
    if type(num_classes) is not int or num_classes < 1:
        raise _broken("have a whole number, 1 or more, as `num_classes`", f"has {num_classes!r}")
    if own_num_classes not in (None, num_classes):
        raise _broken(f"have the student's {num_classes} classes", f"has {own_num_classes}")
    for name, kind in (("overlapping", bool), ("pretrained", bool), ("pretrained_on", str), ("license", str)):
        value = getattr(teacher, name, None)
        if value is not None and not isinstance(value, kind):
            raise _broken(f"have a {kind.__name__} or None as `{name}`", f"has {value!r}")
    facts = TeacherFacts(
        name=type(teacher).__name__,
        num_classes=num_classes,
        num_parameters=sum(parameter.numel() for parameter in teacher.parameters()),
        trainable=tuple(name for name, parameter in teacher.named_parameters() if parameter.requires_grad),
        pretrained=getattr(teacher, "pretrained", None),
        pretrained_on=origin(teacher).pretrained_on,
        license=origin(teacher).license,
    )
    with kept_random_state(), _restored(teacher):
        _check_modes(teacher)
        (image,) = in_precision_of(teacher, _different_rows(without_meta(image)))
        _check_calls(teacher, image, num_classes)
        _check_graph(teacher, image, num_classes)
    return facts


def _check_modes(teacher: nn.Module) -> None:
    try:
        teacher.train()
    except Exception as error:  # its code may raise anything
        raise _broken("accept `train()`", f"raises {_reason(error)}") from error
    training = [name or "itself" for name, module in teacher.named_modules() if module.training]
    if training:
        raise _broken(
            "stay in eval mode after `train()`",
            f"puts {len(training)} modules into training mode, such as {training[0]}",
            "override `train` with `return super().train(False)`",
        )


def _check_calls(teacher: nn.Module, image: Tensor, num_classes: int) -> None:
    prompt_logits = _prompt(image, num_classes)
    with torch.no_grad():
        logits, again = (_call(teacher, image, prompt_logits) for _ in range(2))
        rows = [_call(teacher, image[i : i + 1], prompt_logits[i : i + 1]) for i in range(len(image))]
    tolerance = TOLERANCE * logits.abs().max().clamp(min=1)
    if (again - logits).abs().max() > tolerance:
        raise _broken("return the same logits for the same image", "does not", "remove dropout and random draws")
    if (torch.cat(rows) - logits).abs().max() > tolerance:
        raise _broken(
            "return the same logits for a row alone and in a batch",
            "does not",
            "remove batch statistics and other operations across rows",
        )


def _check_graph(teacher: nn.Module, image: Tensor, num_classes: int) -> None:
    prompt_logits = _prompt(image, num_classes).requires_grad_()
    with torch.enable_grad():
        logits = _call(teacher, image, prompt_logits)
    trainable = {name: parameter for name, parameter in teacher.named_parameters() if parameter.requires_grad}
    if not logits.requires_grad:
        if trainable:
            raise _broken(
                "build a graph to its trainable parameters",
                f"builds none to {len(trainable)} of them",
                "remove `no_grad`, or freeze them with `requires_grad_(False)`",
            )
        return
    # a plain sum would have no gradient through a softmax
    target = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=logits.device).view_as(logits)
    inputs = (prompt_logits, *trainable.values())
    to_prompt, *gradients = torch.autograd.grad((logits * target).sum(), inputs, allow_unused=True)
    if to_prompt is not None:
        raise _broken("pass no gradient to the prompt", "does", "detach `prompt_logits` in its forward")
    if not trainable:
        raise _broken("build no graph without trainable parameters", "does", "run it under `torch.no_grad()`")
    idle = [name for name, gradient in zip(trainable, gradients) if gradient is None]
    if idle:
        raise _broken(
            "use every trainable parameter",
            f"does not use {len(idle)} of them, such as {idle[0]}",
            "freeze them with `requires_grad_(False)`",
        )


def _call(teacher: nn.Module, image: Tensor, prompt_logits: Tensor) -> Tensor:
    """Call the teacher on copies, and check what holds for every call."""
    given = {"image": (image.clone(), image), "prompt": (prompt_logits.clone(), prompt_logits)}
    values = _values(teacher)
    try:
        logits = teacher(*(copy for copy, _ in given.values()))
    except Exception as error:  # its code may raise anything
        raise _broken(
            f"accept images of shape {tuple(image.shape)} and prompts of shape {tuple(prompt_logits.shape)}",
            f"raises {_reason(error)}",
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != prompt_logits.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise _broken(
            f"return logits of shape {tuple(prompt_logits.shape)} for images of shape {tuple(image.shape)}",
            f"returns {found}",
            "map its output to the student's classes and size",
        )
    if logits.dtype not in (torch.float32, torch.float64):
        raise _broken("return logits in float32", f"returns {logits.dtype}")
    if not logits.isfinite().all():
        raise _broken("return finite logits", "returns NaN or infinity", "check its weights, and clamp logarithms")
    for name, (copy, original) in given.items():
        if not torch.equal(copy, original):
            raise _broken(f"not change the {name}", "changes it in place", "work on a copy")
    changed = [name for name, value in _values(teacher).items() if not _equal(value, values.get(name))]
    if changed:
        raise _broken(
            "not change its weights and buffers in a call",
            f"changes {changed[0]}",
            "keep all its modules in eval mode",
        )
    return logits


def _different_rows(image: Tensor) -> Tensor:
    """Every other image inverted and darkened, so that rows differ in mean, contrast and pattern whatever the image."""
    image = image.clone()
    image[1::2] = (1 - image[1::2]) / 4
    return image


def _prompt(image: Tensor, num_classes: int) -> Tensor:
    """Logits that differ between pixels, rows and classes, without a random draw."""
    shape = (len(image), num_classes, *image.shape[2:])
    ramp = torch.arange(shape[0] * num_classes * image[0, 0].numel(), dtype=image.dtype, device=image.device)
    return (ramp * 0.37).sin().view(shape) * 12  # beyond the range that a teacher may clamp to


def _tensors(teacher: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in (*teacher.named_parameters(), *teacher.named_buffers())}


def _values(teacher: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in _tensors(teacher).items()}


def _equal(a: Tensor, b: Tensor | None) -> bool:
    if b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return bool(((a == b) | (a != a) & (b != b)).all())  # NaN equals NaN


@contextmanager
def _restored(teacher: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in teacher.modules()}
    values = _values(teacher)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, x in _tensors(teacher).items():
            if name in values and x.shape == values[name].shape and not _equal(x, values[name]):
                x.copy_(values[name])


def _broken(expected: str, actual: str, remedy: str = "") -> KnowSAMValueError:
    return KnowSAMValueError(f"`teacher` must {expected} but {actual}{'; ' + remedy if remedy else ''}.")


def _reason(error: Exception) -> str:
    """An error as the end of a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(" .:")
