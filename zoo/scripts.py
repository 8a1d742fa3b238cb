"""The code of a bundle's ``scripts/``: copied modules of the package with relative imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import black
import isort

PACKAGE = "knowsam_monai"
ROOT = Path(__file__).parents[1]
DOTTED_NAME = re.compile(rf"\b{PACKAGE}(?:\.\w+)+")
# as in the Model Zoo's format check
LINE_LENGTH = 120
# the check requires `strict` for every zip, which TorchScript does not support
HEADER = """# A copy of {origin} with relative imports; edit the original.
# flake8: noqa: B905

"""


def copied_name(name: str) -> str:
    """Return the name of a definition of the package in the copy.

    Args:
        name: dotted name of a module, class or function in a config or import.

    Returns:
        its name under ``scripts`` in the defining module.

    Raises:
        ValueError: if the package does not have it.

    Example::

        >>> copied_name("knowsam_monai.networks.UNet")
        'scripts.networks.unet.UNet'
    """
    module, attribute = _definition(name)
    return ".".join(["scripts", *module.split(".")[1:], *([attribute] if attribute else [])])


def rename(text: str) -> str:
    """Replace every name of the package in a text, such as a config's ``_target_``, with the copy's."""
    return DOTTED_NAME.sub(lambda match: copied_name(match.group()), text)


def copies(names: Iterable[str]) -> dict[str, str]:
    """Copy the modules that define some names, and the modules that these import.

    Args:
        names: dotted names in the package.

    Returns:
        the texts of ``scripts/`` by path, formatted for the Model Zoo's CI.
    """
    waiting, files = [_definition(name)[0] for name in names], {}
    while waiting:
        module = waiting.pop()
        path = _path(module).relative_to(ROOT / PACKAGE)
        if path.as_posix() in files:
            continue
        source = _path(module).read_text(encoding="utf-8")
        waiting += [_definition(name)[0] for names in _imports(source, module).values() for name in names]
        header = HEADER.format(origin=f"{PACKAGE}/{path.as_posix()}")
        files[path.as_posix()] = header + _formatted(_with_relative_imports(source, module))
    for folder in {parent for path in files for parent in Path(path).parents}:
        files[(folder / "__init__.py").as_posix()] = ""
    return dict(sorted(files.items()))


def _imports(source: str, module: str) -> Mapping[ast.ImportFrom, list[str]]:
    """A module's imports from the package, with the dotted names that each imports."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
            raise ValueError(f"Imports of {PACKAGE} must be of the form `from a import b` but {module} has another.")
        if not isinstance(node, ast.ImportFrom):
            continue
        origin = ".".join([*module.split(".")[: -node.level], *([node.module] if node.module else [])])
        origin = origin if node.level else node.module
        if origin.split(".")[0] == PACKAGE:
            found[node] = [f"{origin}.{alias.name}" for alias in node.names]
    return found


def _with_relative_imports(source: str, module: str) -> str:
    """The source with relative imports from the defining modules and no other changes."""
    lines = source.splitlines(keepends=True)
    imports = _imports(source, module)
    for node in sorted(imports, key=lambda node: node.lineno, reverse=True):
        statements = []
        for name, alias in zip(imports[node], node.names):
            origin, attribute = _definition(name)
            if attribute is None:
                origin, attribute = origin.rsplit(".", 1)
            level, relative = _relative(origin, module)
            statements.append(ast.unparse(ast.ImportFrom(relative, [ast.alias(attribute, alias.asname)], level)))
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [f"{indent}{statement}\n" for statement in statements]
    return "".join(lines)


def _relative(origin: str, module: str) -> tuple[int, str | None]:
    """Level and module name of the relative import of `origin` in `module`."""
    theirs, ours = origin.split("."), module.split(".")[:-1]
    common = 0
    while common < min(len(theirs), len(ours)) and theirs[common] == ours[common]:
        common += 1
    return len(ours) - common + 1, ".".join(theirs[common:]) or None


def _definition(name: str) -> tuple[str, str | None]:
    """The module that defines a dotted name, and the name within it; None for modules."""
    path = _path(name)
    if path is not None and path.stem != "__init__":
        return name, None
    package, _, attribute = name.rpartition(".")
    path = _path(package)
    if path is None or not attribute:
        raise ValueError(f"`name` must be in {PACKAGE} but is {name}.")
    source = path.read_text(encoding="utf-8")
    if path.stem != "__init__":
        return package, attribute
    for node, names in _imports(source, f"{package}.__init__").items():
        for imported, alias in zip(names, node.names):
            if attribute == (alias.asname or alias.name):
                return _definition(imported)
    raise ValueError(f"`name` must be imported by {package} but is {name}.")


def _path(module: str) -> Path | None:
    """The file of a module, or the file of a package that lists its names."""
    path = ROOT.joinpath(*module.split("."))
    files = (path.with_suffix(".py"), path / "__init__.pyi", path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _formatted(source: str) -> str:
    source = isort.code(source, profile="black", line_length=LINE_LENGTH)
    return black.format_str(source, mode=black.Mode(line_length=LINE_LENGTH, magic_trailing_comma=False))
