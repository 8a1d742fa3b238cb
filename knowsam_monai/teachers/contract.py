"""
What every teacher keeps to, and the check of it.

A teacher is a module ``teacher(image, prompt_logits) -> logits``, all (B, channels, *spatial):

- **Rows.** No row sees another, so labeled rows with a graph and unlabeled rows without one can run apart.
- **Sizes and classes.** Any size that the student sees goes in, and the same size comes out, with one channel for each
  class of the student. `num_classes` says how many there are.
- **Values.** The image is in 0..1, and the teacher leaves it as it is. The logits are float32 (float64 for a float64
  teacher) and finite.
- **Eval mode.** It makes targets, so neither dropout nor batch statistics belong in them. ``teacher.train()`` leaves
  every module in eval mode, the same call gives the same logits, and a call changes no weight and no buffer.
- **Prompts.** The student's logits are a prompt at most: no gradient flows back into them.
- **What trains.** Every parameter with `requires_grad` has a part in the logits. A teacher without one makes no graph
  and needs no optimizer.
- **Where it comes from.** `pretrained` says whether its weights were trained before, `pretrained_on` on what, and
  `license` under which terms the weights can be used; None where that is not known.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from knowsam_monai.errors import KnowSAMTypeError, KnowSAMValueError
from knowsam_monai.teachers.provenance import origin

TOLERANCE = 1e-3  # of the largest logit: a batch is computed in another order than its rows


@dataclass(frozen=True)
class TeacherFacts:
    """
    What :func:`check_teacher` found.

    Args:
        name: of the teacher's class.
        num_classes: C of its logits.
        num_parameters: all of them.
        trainable: names of those that train; empty for a frozen teacher.
        pretrained, pretrained_on, license: as the teacher says, or the name of its checkpoint
            (:func:`knowsam_monai.teachers.origin`); None where neither does.

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
        """Whether nothing trains, so that the teacher needs no optimizer."""
        return not self.trainable


def check_teacher(teacher: nn.Module, image: Tensor, num_classes: int | None = None) -> TeacherFacts:
    """
    Call a teacher a few times and compare it with the contract above.

    The weights, gradients and modes of the teacher and the global random states are afterwards as they were. A cached
    encoder keeps the embeddings of these images.

    Args:
        teacher: ``f(image, prompt_logits) -> logits``.
        image: (B, channels, *spatial) with values in 0..1, two rows or more, as the student sees them and on the
            teacher's device.
        num_classes: C of the student (1 for a sigmoid). None: what the teacher says.

    Returns:
        What the teacher is.

    Raises:
        TypeError: when `teacher` is not a module.
        ValueError: when the image does not serve, or the teacher breaks the contract: one sentence says where.

    Example::

        >>> from monai.networks.nets import BasicUNet
        >>> network = BasicUNet(spatial_dims=2, out_channels=4, features=(8, 8, 8, 8, 8, 8))
        >>> from knowsam_monai.teachers import NetworkTeacher
        >>> check_teacher(NetworkTeacher(network, channels=(0, 3, 2, 1)), torch.rand(2, 1, 32, 32)).frozen
        True
    """
    if not isinstance(teacher, nn.Module):
        raise KnowSAMTypeError(f"`teacher` must be a torch module but is a {type(teacher).__name__}.")
    if image.ndim not in (4, 5) or len(image) < 2 or not image.is_floating_point():
        raise KnowSAMValueError(
            f"`image` must be two or more images (B, channels, *spatial) of floats but is {image.dtype} of shape "
            f"{tuple(image.shape)}."
        )
    if not (0 <= image.min() and image.max() <= 1):
        raise KnowSAMValueError(f"`image` must be in 0..1 but is in {image.min():.4g}..{image.max():.4g}; scale it.")
    said = getattr(teacher, "num_classes", None)
    if said is not None and num_classes is not None and said != num_classes:
        raise _broken(f"have the student's {num_classes} classes", f"has {said}")
    num_classes = said if num_classes is None else num_classes
    if num_classes is None:
        raise _broken("say its `num_classes`", "does not", "set that attribute, or give `num_classes` here")
    for name, kind in (("pretrained", bool), ("pretrained_on", str), ("license", str)):
        value = getattr(teacher, name, None)
        if value is not None and not isinstance(value, kind):
            raise _broken(f"have a {kind.__name__} as `{name}`, or None", f"has {value!r}")
    facts = TeacherFacts(
        name=type(teacher).__name__,
        num_classes=num_classes,
        num_parameters=sum(parameter.numel() for parameter in teacher.parameters()),
        trainable=tuple(name for name, parameter in teacher.named_parameters() if parameter.requires_grad),
        pretrained=getattr(teacher, "pretrained", None),
        pretrained_on=origin(teacher).pretrained_on,
        license=origin(teacher).license,
    )
    with _left_as_it_was(teacher, image):
        _check_modes(teacher)
        _check_calls(teacher, image, num_classes)
        _check_graph(teacher, image, num_classes)
    return facts


def _check_modes(teacher: nn.Module) -> None:
    teacher.train()
    training = [name or "itself" for name, module in teacher.named_modules() if module.training]
    if training:
        raise _broken(
            "stay in eval mode after `train()`",
            f"puts {len(training)} modules into training mode, {training[0]} first",
            "let its `train` do `return super().train(False)`",
        )


def _check_calls(teacher: nn.Module, image: Tensor, num_classes: int) -> None:
    prompt_logits = _prompt(image, num_classes)
    image, before, values = image.clone(), image.clone(), _versions(teacher)
    try:
        logits = _call(teacher, image, prompt_logits)
    except Exception as error:  # whatever its code raises
        reason = " ".join(str(error).split())
        raise _broken(
            f"take images of shape {tuple(image.shape)} and prompts of shape {tuple(prompt_logits.shape)}",
            f"raises {type(error).__name__}: {reason}",
        ) from error
    expected = prompt_logits.shape
    if not isinstance(logits, Tensor) or logits.shape != expected:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise _broken(
            f"give logits of shape {tuple(expected)} for images of shape {tuple(image.shape)}",
            f"gives {found}",
            "map its output to the student's classes and size",
        )
    if logits.dtype not in (torch.float32, torch.float64):
        raise _broken("give logits in float32", f"gives {logits.dtype}")
    if not logits.isfinite().all():
        raise _broken("give finite logits", "gives NaN or infinite ones", "look at its weights, and clamp logarithms")
    if not torch.equal(image, before):
        raise _broken("leave the image as it is", "changes it in place", "let it work on a copy")
    tolerance = TOLERANCE * logits.abs().max().clamp(min=1)
    if (_call(teacher, image, prompt_logits) - logits).abs().max() > tolerance:
        raise _broken("give the same logits for the same image", "does not", "take dropout and random draws out")
    rows = [_call(teacher, image[i : i + 1], prompt_logits[i : i + 1]) for i in range(len(image))]
    if (torch.cat(rows) - logits).abs().max() > tolerance:
        raise _broken(
            "give each row the logits that it has alone",
            "gives others in a batch",
            "keep batch statistics and what else mixes rows out",
        )
    if _versions(teacher) != values:
        raise _broken("change none of its weights and buffers in a call", "does", "put all of it into eval mode")


def _check_graph(teacher: nn.Module, image: Tensor, num_classes: int) -> None:
    prompt_logits = _prompt(image, num_classes).requires_grad_()
    with torch.enable_grad():
        logits = teacher(image, prompt_logits)
    trainable = {name: parameter for name, parameter in teacher.named_parameters() if parameter.requires_grad}
    if not logits.requires_grad:
        if trainable:
            raise _broken(
                "have a graph to the parameters that train",
                f"has none to {len(trainable)} of them",
                "take `no_grad` out, or freeze them with `requires_grad_(False)`",
            )
        return
    # unlike a sum, which the softmax of logits would not move
    target = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=logits.device).view_as(logits)
    inputs = (prompt_logits, *trainable.values())
    to_prompt, *gradients = torch.autograd.grad((logits * target).sum(), inputs, allow_unused=True)
    if to_prompt is not None:
        raise _broken("pass no gradient to the prompt", "does", "detach `prompt_logits` in it")
    if not trainable:
        raise _broken("make no graph when nothing in it trains", "does", "let it work under `torch.no_grad()`")
    idle = [name for name, gradient in zip(trainable, gradients) if gradient is None]
    if idle:
        raise _broken(
            "use every parameter that trains",
            f"leaves {len(idle)} of them out, {idle[0]} first",
            "freeze them with `requires_grad_(False)`",
        )


@torch.no_grad()
def _call(teacher: nn.Module, image: Tensor, prompt_logits: Tensor) -> Tensor:
    return teacher(image, prompt_logits)


def _prompt(image: Tensor, num_classes: int) -> Tensor:
    """Logits that differ from pixel to pixel, row to row and class to class, without a random draw."""
    shape = (len(image), num_classes, *image.shape[2:])
    ramp = torch.arange(shape[0] * num_classes * image[0, 0].numel(), dtype=image.dtype, device=image.device)
    return (ramp * 0.37).sin().view(shape) * 3


def _versions(teacher: nn.Module) -> list[tuple[int, int]]:
    """A change in place counts a tensor's version up."""
    return [(x.data_ptr(), x._version) for x in (*teacher.parameters(), *teacher.buffers())]


@contextmanager
def _left_as_it_was(teacher: nn.Module, image: Tensor) -> Iterator[None]:
    modes = {module: module.training for module in teacher.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in teacher.buffers()]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[image.device] if image.is_cuda else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _broken(expected: str, actual: str, remedy: str = "") -> KnowSAMValueError:
    return KnowSAMValueError(f"`teacher` must {expected} but {actual}{'; ' + remedy if remedy else ''}.")
