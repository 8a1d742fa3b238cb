"""Data: data lists, readers, checks, transforms, phantoms, and the two-stream loader."""

from __future__ import annotations

import lazy_loader

# __init__.pyi lists the names and their modules; a module is loaded when one of its names is first used
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
