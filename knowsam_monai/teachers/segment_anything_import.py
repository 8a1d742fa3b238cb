"""Import `segment_anything` without a working torchvision.

`segment_anything/__init__.py` imports its predictor and its mask generator, the only parts that use torchvision.
Training needs neither, and torchvision often does not match torch (a CUDA wheel with a CPU build of torch).
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

from knowsam_monai.errors import KnowSAMImportError

logger = logging.getLogger(__name__)

# names that segment_anything imports from torchvision, by module
TORCHVISION_NAMES: dict[str, tuple[str, ...]] = {
    "torchvision": (),
    "torchvision.ops": (),
    "torchvision.ops.boxes": ("batched_nms", "box_area"),
    "torchvision.transforms": (),
    "torchvision.transforms.functional": ("resize", "to_pil_image"),
}


def import_segment_anything() -> ModuleType:
    """Import the package `segment_anything`, with or without a working torchvision.

    With a working torchvision this is a plain import. Otherwise `sys.modules` contains placeholders for four
    torchvision functions during the first import of `segment_anything`; afterwards `import torchvision` behaves as
    before. `SamPredictor` and `SamAutomaticMaskGenerator` then raise ImportError when they are used.

    Returns:
        The package with its regular modules, so pickles from elsewhere can be loaded.

    Raises:
        ImportError: if `segment_anything` itself is not installed.

    Example::

        >>> sorted(import_segment_anything().sam_model_registry)
        ['default', 'vit_b', 'vit_h', 'vit_l']
    """
    try:
        return importlib.import_module("segment_anything")
    except ModuleNotFoundError as error:
        if error.name == "segment_anything":
            raise KnowSAMImportError(
                "SAM needs the package `segment_anything`, which is not installed; install it with "
                "`pip install segment-anything`, or train without SAM (`--use_sam False`)."
            ) from error
        failure: Exception = error
    except Exception as error:  # a mismatched torchvision raises RuntimeError, OSError, AttributeError ...
        failure = error
    logger.debug("Importing segment_anything without torchvision, which failed with: %s", failure)
    _forget("segment_anything")  # the package would otherwise lack the submodules of the failed import
    with _torchvision_placeholders(reason=str(failure)):
        return importlib.import_module("segment_anything")


@contextmanager
def _torchvision_placeholders(reason: str) -> Iterator[None]:
    """Temporarily replace torchvision in `sys.modules` with placeholders."""
    real = _forget("torchvision")
    for module_name, functions in TORCHVISION_NAMES.items():
        placeholder = ModuleType(module_name)
        placeholder.__path__ = []  # type: ignore[attr-defined]  # marks a package
        for function in functions:
            setattr(placeholder, function, _unavailable(f"{module_name}.{function}", reason))
        sys.modules[module_name] = placeholder
        parent, _, child = module_name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, placeholder)
    try:
        yield
    finally:
        _forget("torchvision")
        sys.modules.update(real)


def _forget(package: str) -> dict[str, ModuleType]:
    """Remove a package and its submodules from `sys.modules` and return them."""
    names = [name for name in sys.modules if name.split(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}


def _unavailable(name: str, reason: str) -> Callable[..., NoReturn]:
    def raise_import_error(*_: Any, **__: Any) -> NoReturn:
        raise KnowSAMImportError(
            f"`{name}` is not available because torchvision could not be imported ({reason}); install the torchvision "
            "release that belongs to your torch, see https://pytorch.org/get-started."
        )

    return raise_import_error
