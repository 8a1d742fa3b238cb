from __future__ import annotations

import base64
import json
import logging
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from knowsam_monai import ranks
from knowsam_monai.errors import KnowSAMPermissionError, KnowSAMValueError
from knowsam_monai.files import expand_path, write_whole
from knowsam_monai.runs.config import parts
from knowsam_monai.runs.next_steps import TITLES, next_steps
from knowsam_monai.runs.report.figures import NUM_SERIES, Line, case_chart, line_chart
from knowsam_monai.runs.report.run_folder import RunFolder, read_run
from knowsam_monai.runs.validation_picture import COLORS

logger = logging.getLogger(__name__)

STUDENT, TEACHER = "val_mean_dice", "val_teacher_dice"
LABELED_DICE = ("student_labeled_dice", "teacher_labeled_dice")


def write_report(*folders: str | os.PathLike, output: str | os.PathLike | None = None) -> Path | None:
    """
    Write one HTML page about a run, or about several runs side by side.

    The page is self-contained: it opens offline, in light and dark mode, and on a phone. It contains slices of the
    validation images, so share it only as you would share these images.

    Args:
        folders: `output_dir` of each run, finished or not.
        output: the file; by default ``report.html`` in the run's folder, or for several runs ``comparison.html`` in the
            working directory.

    Returns:
        The file's path; None in all but the first of several processes, which alone writes.

    Raises:
        FileNotFoundError: if a folder is not a run's folder.
        PermissionError: if the file cannot be written.
        ValueError: if no folder is given, or more than there are colors, or a file in one is damaged.

    Example:
        >>> write_report("output/knowsam_phantom_seed0")     # doctest: +SKIP
    """
    if ranks.rank() > 0:
        return None
    if not 1 <= len(folders) <= NUM_SERIES:
        raise KnowSAMValueError(f"`folders` must be 1 to {NUM_SERIES} folders of runs but has {len(folders)}.")
    runs = [read_run(folder) for folder in folders]
    default = runs[0].path / "report.html" if len(runs) == 1 else Path("comparison.html")
    path = Path(expand_path(output, "output")) if output else default
    page = render(runs).encode("utf-8", "replace")
    try:
        write_whole(path, lambda file: file.write(page))
    except OSError as error:
        raise KnowSAMPermissionError(
            f"`output` must be writable but {path} is not ({error.strerror}); choose another file."
        ) from error
    logger.info("Report: %s", path)
    return path


def render(runs: Sequence[RunFolder]) -> str:
    """The page."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side",
        names=[run.name for run in runs],
        has_teacher=any(run.validation_curve(TEACHER)[0] for run in runs),
        results=list(_results(runs)),
        facts=list(_facts(runs)),
        next_steps=_next_steps(runs[0]) if len(runs) == 1 else "",
        differences=_differences(runs),
        dice_charts=list(_dice_charts(runs)),
        term_charts=list(_term_charts(runs)),
        cases=[_cases(run, _series(index, len(runs))) for index, run in enumerate(runs)],
        slices=[[(base64.b64encode(image.png).decode(), image) for image in run.slices] for run in runs],
        structure_colors=COLORS,
        configs=[json.dumps(run.config, indent=2) if run.config else "" for run in runs],
    )


def _results(runs: Sequence[RunFolder]) -> Iterator[tuple[str, list[str]]]:
    """Rows of the upper table: a name, and for each run the value in the kept validation."""
    best = [_best(run) for run in runs]
    structures = _structures(runs)
    columns = [("Student, mean Dice", STUDENT), *((name, f"{STUDENT}/{name}") for name in structures)]
    for name, column in [*columns, ("Teacher, mean Dice", TEACHER)]:
        if any(math.isfinite(row.get(column, math.nan)) for row in best):
            yield name, [_dice(row.get(column)) for row in best]
    yield "validation", [
        f"{b['epoch']:.0f}, the best of {len(r.validations)}" if b else "–" for r, b in zip(runs, best)
    ]
    yield "last iteration logged", [
        str(max((steps[-1] for steps, _ in run.terms.values()), default="–")) for run in runs
    ]


def _facts(runs: Sequence[RunFolder]) -> Iterator[tuple[str, list[str]]]:
    """Rows of the lower table: how each run was made."""
    last = [run.starts[-1] if run.starts else {} for run in runs]
    yield "started", [", ".join(start["time"].replace("T", " ") for start in run.starts) or "–" for run in runs]
    yield "teacher", [start.get("teacher") or "–" for start in last]
    yield "seed", [str(start.get("seed", "–")) for start in last]
    yield "git revision", [start.get("git_revision") or "none" for start in last]
    for name in dict.fromkeys(name for start in last for name in start.get("versions", {})):
        yield name, [start.get("versions", {}).get(name, "–") for start in last]
    yield "command", [start.get("command", "–") for start in last]


def _next_steps(run: RunFolder) -> str:
    """Commands to paste, from the folder in which the run was started."""
    start = run.starts[-1] if run.starts else {}
    steps = next_steps(run.path, start, run.config)
    lines = [f"# {TITLES[purpose]}\n{command}" for purpose, command in steps.items()]
    return "\n".join([f"cd {shlex.quote(start['folder'])}", *lines]) if steps else ""


def _best(run: RunFolder) -> dict[str, float]:
    """The validation whose weights were kept."""
    rows = [row for row in run.validations if math.isfinite(row.get(STUDENT, math.nan))]
    return max(rows, key=lambda row: row[STUDENT], default={})


def _structures(runs: Sequence[RunFolder]) -> list[str]:
    """The structures of all runs; empty if there is only one, which equals the mean."""
    structures = list(dict.fromkeys(name for run in runs for name in run.structures))
    return structures if len(structures) > 1 else []


def _dice_charts(runs: Sequence[RunFolder]) -> Iterator[tuple[str, str]]:
    structures = _structures(runs)
    for title, suffix in [("Mean over the structures", ""), *((name, f"/{name}") for name in structures)]:
        lines = _pairs(
            runs, [(run.validation_curve(STUDENT + suffix), run.validation_curve(TEACHER + suffix)) for run in runs]
        )
        if lines:
            yield title, line_chart(lines, "validation", unit_interval=True)


def _term_charts(runs: Sequence[RunFolder]) -> Iterator[tuple[str, str]]:
    """The loss first, then its terms, then everything else that was logged."""
    names = sorted(
        {name for run in runs for name in run.terms if name not in LABELED_DICE},
        key=lambda name: (name != "loss", not name.endswith("loss"), name),
    )
    for name in names:
        lines = [Line(*run.terms[name], series) for series, run in enumerate(runs) if name in run.terms]
        yield _title(name), line_chart(lines, "iteration", unit_interval=name == "gate_weight")
    empty: tuple[list, list] = ([], [])
    lines = _pairs(runs, [tuple(run.terms.get(name, empty) for name in LABELED_DICE) for run in runs])
    if lines:
        yield "Dice on the labeled rows of a step", line_chart(lines, "iteration", unit_interval=True)


def _pairs(runs: Sequence[RunFolder], curves: Sequence[Sequence[Any]]) -> list[Line]:
    """A solid line for the student and a dashed one for the teacher of each run."""
    lines = []
    for run, pair in enumerate(curves):
        for (x, y), series, is_teacher in zip(pair, _series(run, len(runs)), (False, True)):
            if x:
                lines.append(Line(x, y, series, dashed=is_teacher))
    return lines


def _series(run: int, num_runs: int) -> tuple[int, int]:
    """Colors of student and teacher: two for a single run, one per run for several."""
    return (run, run) if num_runs > 1 else (0, 1)


def _cases(run: RunFolder, series: tuple[int, int]) -> dict[str, Any]:
    """Chart and table of the cases, from the best student's Dice to the worst."""
    models = list(dict.fromkeys(row["model"] for row in run.cases))
    if not models:
        return {}
    by_case: dict[str, dict[str, dict[str, str]]] = {}
    for row in run.cases:
        by_case.setdefault(row["case"], {})[row["model"]] = row

    def mean(case: str, model: str) -> float:
        return float(by_case[case].get(model, {}).get("mean") or math.nan)

    names = sorted(by_case, key=lambda case: -mean(case, models[0]) if math.isfinite(mean(case, models[0])) else 2)
    columns = [column for column in run.cases[0] if column not in ("case", "model")]
    return {
        "chart": case_chart(names, [[mean(case, model) for case in names] for model in models[:2]], series),
        "columns": columns,
        "rows": [row for case in names for row in by_case[case].values()],
    }


def _differences(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """The keys and values that differ between the configs."""
    flat = [
        {name: json.dumps(part) for name, part in parts(run.config) if not part or not isinstance(part, (dict, list))}
        for run in runs
    ]
    keys = dict.fromkeys(key for config in flat for key in config)
    values = {key: [config.get(key, "–") for config in flat] for key in keys}
    return [(key, row) for key, row in values.items() if len(set(row)) > 1]


def _title(name: str) -> str:
    return {"loss": "Loss", "sam_loss": "SAM loss"}.get(name, name.replace("_", " ").capitalize())


def _dice(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"
