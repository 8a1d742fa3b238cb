"""The bundles by name: those at hand in the working folder, and those that the package ships."""

from __future__ import annotations

import difflib
import logging
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from knowsam_monai.errors import KnowSAMFileNotFoundError, KnowSAMPermissionError, KnowSAMValueError
from knowsam_monai.files import expand_path, write_whole

logger = logging.getLogger(__name__)

# in a checkout a link to the repository's own folder, in a wheel copies of its configs and documents
SHIPPED = Path(__file__).parents[1] / "bundles"
METADATA = "configs/metadata.json"
WRITTEN = ("models", "output", "data", "eval")  # by runs, and no part of what is shipped
ZIPPED = ("LICENSE", "large_files.yml", "configs/*", "docs/*")
STUDENT = ("model.pt", "config.json", "model.json")  # of a run's folder, or of `models`


def shipped_names() -> list[str]:
    """
    The names of the bundles that the package ships, in their short form.

    Example:
        >>> shipped_names()
        ['acdc', 'la']
    """
    return sorted(path.parents[1].name.removeprefix("knowsam_") for path in SHIPPED.glob(f"*/{METADATA}"))


def find_bundle(bundle: str | os.PathLike) -> Path:
    """
    The folder of a bundle.

    A name means ``bundles/knowsam_NAME`` or ``knowsam_NAME`` in the working folder, or else the shipped bundle.

    Args:
        bundle: a folder, or a name such as "acdc" or "knowsam_acdc".

    Raises:
        FileNotFoundError: if there is no such bundle.
    """
    folder = Path(expand_path(bundle, "bundle"))
    if folder.name not in ("", "..") and len(folder.parts) == 1:
        name = f"knowsam_{folder.name.removeprefix('knowsam_')}"
        candidates = [folder, Path("bundles", name), Path(name), SHIPPED / name]
    else:
        candidates = [folder]
    found = next((folder for folder in candidates if (folder / METADATA).is_file()), None)
    if found is None:
        names = ", ".join(shipped_names())
        raise KnowSAMFileNotFoundError(
            f"`bundle` must be one of {names}, or the folder of a bundle, but {folder} has no {METADATA}."
        )
    return found


def working_bundle(bundle: str | os.PathLike) -> Path:
    """
    The folder of a bundle that may be written to: a shipped one is copied into the working folder first.

    Args:
        bundle: see :func:`find_bundle`.

    Raises:
        FileNotFoundError: if there is no such bundle.
        PermissionError: if the working folder cannot be written.
        ValueError: if a folder of that name exists but is not a bundle.
    """
    folder = find_bundle(bundle)
    if folder.parent != SHIPPED:
        return folder
    copy = Path(folder.name)
    try:
        with tempfile.TemporaryDirectory(dir=".", prefix=f".{copy}_") as parts:
            whole = shutil.copytree(folder, Path(parts) / copy, ignore=shutil.ignore_patterns(*WRITTEN))
            _move(whole, copy)
    except OSError as error:
        raise _not_writable(f"a copy of the bundle in ./{copy}", error) from error
    logger.info("The bundle is in ./%s now: configs, and what a run writes (models, output).", copy)
    return copy


def zip_bundle(bundle: str | os.PathLike, run: str | os.PathLike | None = None) -> Path:
    """
    Zip a bundle with a trained student, for another machine with this package. Data and other weights stay out.

    Args:
        bundle: see :func:`find_bundle`.
        run: `output_dir` of the student's training; None for the bundle's own ``models``.

    Returns:
        The zip, named after the bundle, in the working folder.

    Raises:
        FileNotFoundError: if there is no such bundle, or no student.
        PermissionError: if the working folder cannot be written.
    """
    folder = find_bundle(bundle)
    student = folder / "models" if run is None else Path(expand_path(run, "run"))
    for name in STUDENT[:2]:
        if not (student / name).is_file():
            raise KnowSAMFileNotFoundError(
                f"`run` must be the `output_dir` of a training but {student} has no {name}; train the bundle first."
            )
    files = {file: file.relative_to(folder) for pattern in ZIPPED for file in sorted(folder.glob(pattern))}
    files |= {student / name: Path("models", name) for name in STUDENT if (student / name).is_file()}
    name = folder.resolve().name

    def write(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, place in files.items():
                archive.write(path, Path(name, place))

    path = Path(f"{name}.zip")
    try:
        write_whole(path, write)
    except OSError as error:
        raise _not_writable(str(path), error) from error
    logger.info("%s, %.1f MB. Its config contains the paths of the training data.", path, path.stat().st_size / 2**20)
    return path


def _not_writable(what: str, error: OSError) -> KnowSAMPermissionError:
    reason = error.strerror or error.args[0][0][-1]  # shutil.Error lists files, each with its reason
    return KnowSAMPermissionError(
        f"The working folder must be writable, for {what}, but {Path.cwd()} is not ({reason}); work in another folder."
    )


def _move(whole: Path, copy: Path) -> None:
    try:
        whole.rename(copy)
    except OSError as error:
        if not (copy / METADATA).is_file():  # else another process of the same training was faster
            raise KnowSAMValueError(
                f"`{copy}` in the working folder must be a bundle but has no {METADATA}; name a bundle by its path, or "
                "work in another folder."
            ) from error


def config_file(bundle: Path, name: str) -> Path:
    """
    A config of a bundle.

    Args:
        bundle: its folder.
        name: name of the config, such as "mean_teacher", or the file of any config.

    Raises:
        FileNotFoundError: if there is no such config.
    """
    configs = {path.stem: path for path in sorted((bundle / "configs").iterdir()) if path.stem != "metadata"}
    configs = {stem: path for stem, path in configs.items() if path.suffix in (".json", ".yaml", ".yml")}
    if name in configs:
        return configs[name]
    file = Path(expand_path(name, "--with"))
    if file.is_file():
        return file
    near = difflib.get_close_matches(name, configs, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"it has {', '.join(configs)}."
    raise KnowSAMFileNotFoundError(f"`--with` must name configs of {bundle}, or files, but has {name}; {remedy}")
