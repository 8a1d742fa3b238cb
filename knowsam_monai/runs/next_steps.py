"""What to do with a trained student, as commands to paste."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knowsam_monai.texts import command_line

TITLES = {
    "segment": "segment a scan",
    "evaluate": "evaluate the student",
    "zip": "zip it with its bundle",
    "export": "export it as TorchScript",
}
READABLE = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")  # by `knowsam predict`


def next_steps(output_dir: str | os.PathLike, start: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """
    Commands that segment a scan with a run's student, evaluate, zip and export it, for the folder the run started in.

    Args:
        output_dir: the run's folder.
        start: the run's last entry in ``run.json``.
        config: the config as run.

    Returns:
        A command for each purpose; none if the run is not of a bundle.

    Example:
        >>> next_steps("output/run", {}, {})
        {}
    """
    if not start.get("bundle_root"):
        return {}
    bundle, run = (_in_folder(path, start["folder"]) for path in (start["bundle_root"], output_dir))
    scan = start["scan"] or ""
    scan = _in_folder(scan, start["folder"]) if scan.endswith(READABLE) else "path/to/scans"
    python, program = _programs()
    files = {name: os.path.join(run, name) for name in ("model.pt", "model.ts", "config.json")}
    steps = {"segment": [*program, "predict", scan, "--bundle", bundle, "--run", run, "--output", "segmentations"]}
    if "LOCAL_RANK" not in json.dumps(config):  # else the config is for torchrun
        steps["evaluate"] = [*program, "train", bundle, "--with", files["config.json"], "--with", "evaluate"]
        steps["evaluate"] += ["--ckpt_path", files["model.pt"], "--split", start["split"]]
        steps["evaluate"] += ["--output_dir", os.path.join(run, f"evaluation_{start['split']}")]
    steps["zip"] = [*program, "zip", bundle, "--run", run]
    steps["export"] = [python, "-m", "monai.bundle", "ckpt_export", "--net_id", "network_def"]
    steps["export"] += ["--filepath", files["model.ts"], "--ckpt_file", files["model.pt"]]
    steps["export"] += ["--meta_file", os.path.join(bundle, "configs", "metadata.json")]
    steps["export"] += ["--config_file", files["config.json"]]
    return {purpose: command_line(words) for purpose, words in steps.items()}


def _in_folder(path: str | os.PathLike, folder: str) -> str:
    """The path, relative to the folder if it is below it; a folder's own name alone would be taken for a bundle's."""
    path = os.path.abspath(path)
    if not Path(path).is_relative_to(folder):
        return path
    relative = os.path.relpath(path, folder)
    return relative if os.sep in relative or relative == os.curdir else os.path.join(os.curdir, relative)


def _programs() -> tuple[str, list[str]]:
    """This Python and this package's program, as short as they can be called in a shell."""
    here = Path(sys.executable).parent
    names = [name for name in ("python", "knowsam") if os.path.dirname(shutil.which(name) or "") == str(here)]
    python = "python" if "python" in names else sys.executable
    return python, ["knowsam"] if "knowsam" in names else [python, "-m", "knowsam_monai"]
