"""What a bundle's run does besides training: checking, preparing, recording, resuming, reporting."""

from __future__ import annotations

import lazy_loader

# the names and their modules stand in __init__.pyi; each module is loaded when a name of it is first used
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
