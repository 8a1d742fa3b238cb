"""The page of settings has every key of the configs, as the configs and their checks have them now."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tables_of_the_settings_are_up_to_date():
    script = runpy.run_path(str(ROOT / "docs" / "settings.py"))
    assert script["main"](["--check"]) == 0, "run `python docs/settings.py`"


def test_every_key_of_the_training_configs_has_a_row_with_its_published_and_phantom_value():
    page = (ROOT / "docs" / "source" / "settings.md").read_text(encoding="utf-8")
    assert "| `max_iterations` | `50000`, phantom `200`; la: `6000`, phantom `240` | " in page
    assert "| `distillation_temperature` | `2.0` | a number above 0, at most 1000000 | " in page
    assert "| `num_passes` | `8` | a whole number, 1 or more, at most 10^9 | " in page
