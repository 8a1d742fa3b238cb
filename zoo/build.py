"""The zip of a bundle for the Model Zoo."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path

import yaml

from knowsam_monai.runs.trained_student import RECORD
from zoo.configs import standalone_configs, training_config
from zoo.scripts import DOTTED_NAME, copies, rename
from zoo.weights import Training, find_training

LARGE_FILES = "large_files.yml"
# files that are copied from the bundle; the others are generated
COPIED = ("LICENSE", LARGE_FILES, "configs/*.json", "configs/logging.conf", "docs/*")
# the Zoo's size limit; larger files are hosted elsewhere and listed in large_files.yml
MAX_BYTES = 25 * 2**20
TIME_STAMP = (1980, 1, 1, 0, 0, 0)


def build(bundle: Path, output_dir: Path) -> Path:
    """
    Write ``<bundle>_v<version>.zip``: the bundle, its weights, and ``scripts/`` with the code of inference and
    evaluation.

    Weights that ``large_files.yml`` lists are hosted elsewhere and left out.

    Inference and evaluation of the zip need MONAI and the packages in its metadata, but not this package; training
    needs it. Equal bundles give equal bytes.

    Args:
        bundle: the bundle's folder.
        output_dir: folder of the zip, created if it is missing.

    Returns:
        the path of the zip.

    Raises:
        ValueError: if the bundle has no metadata or no weights of a known run, or if a file is too large for the Zoo or
            differs from the one in ``large_files.yml``.

    Example:
        >>> build(Path("bundles/knowsam_acdc"), Path("dist"))     # doctest: +SKIP
        PosixPath('dist/knowsam_acdc_v0.1.0.zip')
    """
    if not (bundle / "configs" / "metadata.json").is_file():
        raise ValueError(f"`bundle` must be a bundle's folder but {bundle} has no configs/metadata.json.")
    training = find_training(bundle)
    texts = {f"configs/{n}": _json(c) for n, c in standalone_configs(bundle / "configs", training.student).items()}
    scripts = copies(name for text in texts.values() for name in DOTTED_NAME.findall(text))
    texts = {path: rename(text) for path, text in texts.items()}
    texts |= {f"scripts/{path}": text for path, text in scripts.items()}
    texts["configs/train.json"] = _json(training_config(bundle / "configs", training.student))
    texts |= {"configs/metadata.json": _metadata(bundle, training), "docs/README.md": _readme(bundle, training)}
    texts[f"models/{RECORD}"] = _json(training.record)
    files = {path.relative_to(bundle).as_posix(): path.read_bytes() for name in COPIED for path in bundle.glob(name)}
    files["models/model.pt"] = (bundle / "models" / "model.pt").read_bytes()
    files |= {path: text.encode() for path, text in texts.items()}
    _leave_out_hosted(files)
    version = json.loads(files["configs/metadata.json"])["version"]
    return write(output_dir / f"{bundle.name}_v{version}.zip", bundle.name, files)


def _leave_out_hosted(files: dict[str, bytes]) -> None:
    """Remove the files that are hosted elsewhere by ``large_files.yml``, after comparing their hashes."""
    if LARGE_FILES not in files:
        return
    for hosted in yaml.safe_load(files[LARGE_FILES])["large_files"]:
        content = files.pop(hosted["path"], None)
        if content is None:
            continue
        kind = hosted.get("hash_type", "sha256")
        actual = hashlib.new(kind, content).hexdigest()
        if actual != hosted.get("hash_val"):
            raise ValueError(
                f"`hash_val` of {hosted['path']} in {LARGE_FILES} must be the file's {kind}, {actual}, but is "
                f"{hosted.get('hash_val')}; host this file and update the hash."
            )


def _metadata(bundle: Path, training: Training) -> str:
    """The metadata with the training data and the metrics of the weights."""
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    description = metadata["description"].partition(" `eval_metrics` is ")[0]  # of the repository's weights
    metadata["description"] = f"{description} {training.sentence}"
    metadata["eval_metrics"] = training.metrics
    return _json(metadata)


def _readme(bundle: Path, training: Training) -> str:
    """The readme with a sentence about the weights, without what is about the repository, and without marks."""
    text = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    text, number = re.subn("<!-- weights -->.*<!-- /weights -->", lambda _: training.sentence, text)
    if number != 1:
        raise ValueError(
            f"`bundle` must have <!-- weights --> and <!-- /weights --> once in its readme but {bundle} has {number}."
        )
    text = re.sub("<!-- repository -->.*?<!-- /repository -->", "", text, flags=re.DOTALL)
    return re.sub("<!-- /?results -->\n", "", text)


def _json(content: dict) -> str:
    return json.dumps(content, indent=4, ensure_ascii=False) + "\n"


def write(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    """Zip files, given as contents by path, into one folder; files above the Zoo's limit are refused."""
    for name, content in files.items():
        if len(content) > MAX_BYTES:
            raise ValueError(
                f"`bundle` must have no file over {MAX_BYTES >> 20} MB but {name} has {len(content) >> 20} MB; host it "
                f"elsewhere and list it in {LARGE_FILES}."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(f"{folder}/{name}", TIME_STAMP)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return path
