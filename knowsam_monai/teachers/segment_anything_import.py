"""Import `segment_anything` without a working torchvision.

`segment_anything/__init__.py` imports its predictor and its mask generator, the only parts that use torchvision.
Training needs neither, and torchvision often does not match torch (a CUDA wheel with a CPU build of torch).
"""

from __future__ import annotations

import importlib
import logging
import sys
from functools import partial
from types import ModuleType
from typing import Any, NoReturn

from knowsam_monai.errors import KnowSAMImportError

logger = logging.getLogger(__name__)

# functions that segment_anything imports from torchvision, by module
TORCHVISION_NAMES: dict[str, tuple[str, ...]] = {
    "torchvision.ops.boxes": ("batched_nms", "box_area"),
    "torchvision.transforms.functional": ("resize", "to_pil_image"),
}


def import_segment_anything() -> ModuleType:
    """Import the package `segment_anything`, with or without a working torchvision.

    With a working torchvision this is a plain import. Otherwise `sys.modules` contains placeholders for two modules of
    torchvision during the first import of `segment_anything`; afterwards `import torchvision` behaves as before.
    `SamPredictor` and `SamAutomaticMaskGenerator` then raise ImportError when they are used.

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
    except Exception as error:  # a mismatched torchvision raises RuntimeError, OSError, AttributeError ...
        if isinstance(error, ModuleNotFoundError) and error.name == "segment_anything":
            raise KnowSAMImportError(
                "SAM needs the package `segment_anything`, which is not installed; install it with "
                "`pip install segment-anything`, or train without SAM (`--use_sam False`)."
            ) from error
        reason = str(error)
    logger.debug("Importing segment_anything without torchvision, which failed with: %s", reason)
    for name in [name for name in sys.modules if name.startswith("segment_anything.")]:
        del sys.modules[name]  # the package would otherwise lack the submodules of the failed import
    real = {name: sys.modules[name] for name in TORCHVISION_NAMES if name in sys.modules}
    for name, functions in TORCHVISION_NAMES.items():  # a module in `sys.modules` is imported without its parents
        sys.modules[name] = placeholder = ModuleType(name)
        for function in functions:
            setattr(placeholder, function, partial(_unavailable, f"{name}.{function}", reason))
    try:
        return importlib.import_module("segment_anything")
    finally:
        for name in TORCHVISION_NAMES:
            del sys.modules[name]
        sys.modules.update(real)


def _unavailable(name: str, reason: str, /, *_: Any, **__: Any) -> NoReturn:
    raise KnowSAMImportError(
        f"`{name}` is not available because torchvision could not be imported ({reason}); install the torchvision "
        "release that belongs to your torch, see https://pytorch.org/get-started."
    )
