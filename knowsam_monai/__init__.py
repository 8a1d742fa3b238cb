"""SAM-induced knowledge distillation for semi-supervised segmentation, as parts for MONAI trainers."""

from __future__ import annotations

import lazy_loader

# the names and their modules stand in __init__.pyi; each module is loaded when a name of it is first used
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
