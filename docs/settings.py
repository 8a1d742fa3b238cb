"""
Write the tables of docs/source/settings.md: every key of the configs with its default, its values and its meaning.

    python docs/settings.py            # the tables between the marks `<!-- settings -->` and `<!-- end settings -->`
    python docs/settings.py --check    # changes nothing; exit code 1 if the page is not up to date
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from pydantic import BaseModel

from knowsam_monai.runs import values

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "source" / "settings.md"
BUNDLES = ("knowsam_acdc", "knowsam_la")
OVERLAYS = ("cps", "mean_teacher", "ua_mt", "fixmatch", "bcp", "teacher_network", "evaluate", "multi_gpu_train")
LONGEST = 110  # characters of a default
MARKED = re.compile(r"(<!-- settings -->\n).*(<!-- end settings -->)", re.DOTALL)
TABLES: dict[str, tuple[list[type[BaseModel]], tuple[str, ...], tuple[str, ...]]] = {
    "Training": ([values.Everywhere, values.Training], ("train",), BUNDLES),
    "Training, 2D": ([values.Slices, values.SliceTraining], ("train",), BUNDLES[:1]),
    "Training, 3D": ([values.Volumes, values.VolumeTraining], ("train",), BUNDLES[1:]),
    "Overlays": ([values.Overlays], OVERLAYS, BUNDLES),
    "Inference": ([values.Inference, values.SliceInference, values.VolumeInference], ("inference",), BUNDLES),
}


def shown(value: Any) -> str:
    return "`" + (value if isinstance(value, str) else json.dumps(value)).replace("|", "\\|") + "`"


def default(bundle: str, config: str, key: str) -> str | None:
    """The value in a config; where it depends on the data, that with a data set and that of the phantom."""
    path = ROOT / "bundles" / bundle / "configs" / f"{config}.json"
    content = ConfigParser.load_config_file(path)
    if key not in content:
        return None
    value = content[key]
    if isinstance(value, dict):
        return f"`{value['_target_'].split('.')[-1]}(...)`"
    if len(str(value)) > LONGEST:
        return "see the config"
    if "is_phantom" not in str(value):
        return shown(value)
    train = ConfigParser.load_config_file(path.with_name("train.json"))
    both = []
    for dataset_dir in ("list.json", None):
        parser = ConfigParser({**train, **content, "dataset_dir": dataset_dir})
        both.append(parser.get_parsed_content(key))
    return shown(both[0]) if both[0] == both[1] else f"{shown(both[0])}, phantom {shown(both[1])}"


def defaults(configs: tuple[str, ...], bundles: tuple[str, ...], key: str) -> str:
    """What the bundles have, said once if it is the same; of overlays, the first that has the key counts."""
    found = [next(filter(None, (default(bundle, config, key) for config in configs)), None) for bundle in bundles]
    return "; la: ".join(dict.fromkeys(filter(None, found))) or "-"


def accepted(field: Any) -> str:
    words = [item for item in field.metadata if isinstance(item, str)]
    return words[-1] if words else "one of " + ", ".join(f"`{choice}`" for choice in field.annotation.__args__)


def tables() -> Iterator[str]:
    for title, (models, configs, bundles) in TABLES.items():
        yield f"## {title}\n\n| key | default | accepts | meaning |\n| --- | --- | --- | --- |"
        for model in models:
            for key in model.__annotations__:
                if key != "model_config":
                    field = model.model_fields[key]
                    yield f"| `{key}` | {defaults(configs, bundles, key)} | {accepted(field)} | {field.description} |"
        yield ""


def main(arguments: list[str]) -> int:
    page = PAGE.read_text(encoding="utf-8")
    new = MARKED.sub(lambda marks: marks[1] + "\n" + "\n".join(tables()) + "\n" + marks[2], page)
    if "--check" in arguments:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
