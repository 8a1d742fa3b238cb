from __future__ import annotations

import json

import pytest
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser

from knowsam_monai.runs import RunRecord
from knowsam_monai.runs.run_record import read_starts


def record(folder, **changes):
    """A bundle's config in small, whose handler is built and not yet called."""
    handler = {"_target_": "knowsam_monai.runs.RunRecord", "output_dir": str(folder), "seed": 5, "resume": True}
    config = {"lr": 0.1, "rate": "$@lr * 2", "handlers": [{**handler, **changes}]}
    parser = ConfigParser(config)
    parser["lr"] = 0.5  # the command line
    (built,) = parser.get_parsed_content("handlers")
    return built


def run(*handlers):
    engine = Engine(lambda engine, batch: None)
    for handler in handlers:
        handler.attach(engine)
    engine.run([0], max_epochs=1)


def test_config_as_run_has_the_overrides_and_can_be_parsed_again(tmp_path):
    run(record(tmp_path / "run"))
    again = ConfigParser()
    again.read_config(str(tmp_path / "run" / "config.json"))
    assert again.get_parsed_content("rate") == 1.0
    assert set(json.loads((tmp_path / "run" / "config.json").read_text())) == {"lr", "rate", "handlers"}
    assert [start["seed"] for start in read_starts(tmp_path / "run")] == [5]


def test_start_that_is_refused_leaves_the_record_as_it_was(tmp_path):
    run(record(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    class Refuses:
        def attach(self, engine):
            engine.add_event_handler(Events.STARTED, self)

        def __call__(self, engine):
            raise ValueError("another run's folder")

    with pytest.raises(ValueError, match="another run's folder"):
        run(Refuses(), record(tmp_path, seed=6))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_preflight_records_nothing(tmp_path):
    run(record(tmp_path / "run", enabled=False))
    assert not (tmp_path / "run").exists()


def test_outside_a_config_the_starts_are_recorded_alone(tmp_path):
    run(RunRecord(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
