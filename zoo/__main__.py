"""``python -m zoo bundles/knowsam_acdc`` builds ``dist/knowsam_acdc_v0.1.0.zip``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

logger = logging.getLogger("zoo")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m zoo", description="Build the zip of a bundle for the Model Zoo.")
    parser.add_argument("bundle", type=Path, help="the bundle's folder, with the weights models/model.pt")
    parser.add_argument("--output_dir", type=Path, default=Path("dist"), help="folder of the zip (default: dist)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        from knowsam_monai.files import expand_path
        from zoo.build import build
    except ModuleNotFoundError as error:
        if error.name not in ("black", "isort"):
            raise
        install = "pip install 'black>=26' 'isort>=6'"
        logger.error(
            "`%s` formats the scripts but is not installed; get it with `%s` (the extra `zoo`).", error.name, install
        )
        return 1
    try:
        path = build(*(Path(expand_path(getattr(options, name), name)) for name in ("bundle", "output_dir")))
    except ValueError as error:
        logger.error("%s", error)
        return 1
    logger.info("%s, %.1f MB", path, path.stat().st_size / 2**20)
    return 0


if __name__ == "__main__":
    sys.exit(main())
