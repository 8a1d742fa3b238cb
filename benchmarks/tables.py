"""
Make the tables and pictures of the results from benchmarks/results/*.csv.

    python benchmarks/tables.py            # the tables in accuracy.md, results.md and README.md, and pictures
    python benchmarks/tables.py --check    # changes nothing; exit code 1 if a table is not what the CSV files give

A table stands in a Markdown file between `<!-- table NAME -->` and `<!-- end NAME -->`. NAME is a result file's, alone
or with "_classes" (the gain in each class) or "_summary". Without such a file nothing stands between the marks.

A gain is the mean over patients of the paired differences of Dice, each patient's mean over volumes, classes and the
seeds that both rows have. Its standard error is the root of the squared errors over patients and over seeds. With one
seed it is over patients only, and marked so. A gain of at most twice its error, both as printed, is "not
distinguishable" from none.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "source" / "images"
PAGES = (ROOT / "benchmarks" / "accuracy.md", ROOT / "docs" / "source" / "results.md", ROOT / "README.md")
SKD, WITHOUT = " + SKD", "without SKD"  # the rows of `hosts.py` are compared in pairs, those of `choices.py` with one
Line = dict[str, str]


def read(name: str) -> list[Line]:
    with open(RESULTS / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def classes_of(lines: Iterable[Line]) -> list[str]:
    return [name.removeprefix("dice ") for name in next(iter(lines)) if name.startswith("dice ") and "mean" not in name]


def mean_of(lines: Iterable[Line], metric: str, classes: Iterable[str]) -> float:
    """Mean over volumes of the mean over classes; undefined values are left out."""
    volumes = [[float(line[f"{metric} {name}"]) for name in classes if line[f"{metric} {name}"]] for line in lines]
    return statistics.mean(statistics.mean(values) for values in volumes if values)


def by(lines: Iterable[Line], key: Callable[[Line], str]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return groups


def patient(line: Line) -> str:
    return line["volume"].split("_")[0]


def seeds_of(lines: Iterable[Line]) -> set[str]:
    return {line["seed"] for line in lines}


def gain(lines: list[Line], others: list[Line], classes: Iterable[str]) -> tuple[float, float, int]:
    """Mean paired difference of Dice, its standard error, and the number of seeds that both rows have."""
    classes = list(classes)
    seeds = sorted(seeds_of(lines) & seeds_of(others))
    differences: dict[tuple[str, str], float] = {}
    for seed in seeds:
        ours, theirs = (by((x for x in rows if x["seed"] == seed), patient) for rows in (lines, others))
        for name in ours:
            differences[name, seed] = mean_of(ours[name], "dice", classes) - mean_of(theirs[name], "dice", classes)
    patients = sorted({name for name, _ in differences})
    over_patients = [statistics.mean(differences[name, seed] for seed in seeds) for name in patients]
    over_seeds = [statistics.mean(differences[name, seed] for name in patients) for seed in seeds]
    error = statistics.stdev(over_patients) / len(patients) ** 0.5
    if len(seeds) > 1:
        error = math.hypot(error, statistics.stdev(over_seeds) / len(seeds) ** 0.5)
    return statistics.mean(over_patients), error, len(seeds)


def gain_text(value: float, error: float, seeds: int = 1) -> str:
    value, error = round(value, 1), round(error, 1)
    text = f"{value:+.1f} ± {error:.1f}" + (" (patients only)" if seeds == 1 else "")
    return text + (", not distinguishable" if abs(value) <= 2 * error else "")


def base_of(rows: dict[str, list[Line]], row: str) -> list[Line] | None:
    """What a row is compared with: that without SKD; None if there is none with a seed of the row."""
    name = row.removesuffix(SKD) if row.endswith(SKD) else WITHOUT
    base = rows.get(name, []) if name != row else []
    return base if seeds_of(base) & seeds_of(rows[row]) else None


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def hosts_table(name: str) -> str:
    """Dice of each row, its gain, each class, distances, and the teacher's Dice."""
    lines, curves = by(read(name), lambda line: line["row"]), by(read(f"{name}_curves"), lambda line: line["row"])
    classes = classes_of(next(iter(lines.values())))
    head = ["row", "Dice", "gain", *classes, "HD95", "ASD", "undefined", "teacher", "seeds", "minutes a run"]
    table = []
    for row, own in sorted(lines.items(), key=lambda item: item[0] != WITHOUT):
        base = base_of(lines, row)
        cells = [row, f"{mean_of(own, 'dice', classes):.1f}", gain_text(*gain(own, base, classes)) if base else "-"]
        cells += [f"{mean_of(own, 'dice', [one]):.1f}" for one in classes]
        cells += [f"{mean_of(own, metric, classes):.1f}" for metric in ("hd95", "asd")]
        undefined = sum(not line[f"hd95 {one}"] for line in own for one in classes)
        cells.append(f"{undefined} of {len(own) * len(classes)}")
        runs = by(curves[row], lambda line: line["seed"])
        teacher = [float(run[-1]["teacher_dice"]) for run in runs.values() if run[-1].get("teacher_dice")]
        cells.append(f"{statistics.mean(teacher):.1f}" if teacher else "-")
        cells.append(", ".join(sorted(runs)))
        cells.append(f"{statistics.mean(float(run[-1]['minutes']) for run in runs.values()):.0f}")
        table.append(cells)
    return markdown(head, table)


def comparisons(name: str) -> Iterator[tuple[str, list[Line], list[Line], list[str], str]]:
    """Each row that has one without SKD: its name, its lines, those without SKD, the classes, and the seeds of both."""
    lines = by(read(name), lambda line: line["row"])
    for row, own in lines.items():
        base = base_of(lines, row)
        if base:
            yield row, own, base, classes_of(own), ", ".join(sorted(seeds_of(own) & seeds_of(base)))


def classes_table(name: str) -> str:
    """One line for each comparison: the gain in each class."""
    classes = classes_of(read(name))
    table = [
        [row, *(gain_text(*gain(own, base, [one])) for one in classes), seeds]
        for row, own, base, classes, seeds in comparisons(name)
    ]
    return markdown(["gain of", *classes, "seeds"], table)


def summary_table(name: str) -> str:
    """One line for each host: Dice without SKD and with it, and the gain."""
    table = []
    for row, own, base, classes, seeds in comparisons(name):
        dice = [f"{mean_of(one, 'dice', classes):.1f}" for one in (base, own)]
        table.append([row.removesuffix(SKD), *dice, gain_text(*gain(own, base, classes)), seeds])
    return markdown(["method", "without SKD", "with SKD", "gain", "seeds"], table)


class Point(NamedTuple):
    """A teacher with a gate; Dice in %."""

    teacher: str
    gate: str
    dice: float  # of the teacher
    lead: float  # of the teacher over the student without it
    gain: float
    error: float
    seeds: int


def dose_points(name: str = "dose") -> list[Point]:
    """All that a result file of `dose.py` has; none without the student that has no teacher."""
    lines = by(read(name), lambda line: line["row"])
    base = lines.get("Mean Teacher", [])
    points = []
    for row, own in lines.items():
        teacher, found, gate = row.partition(", gate ")
        if found and seeds_of(own) & seeds_of(base):
            classes, known = classes_of(own), lines.get(f"teacher: {teacher}")
            dice = mean_of(known, "dice", classes) if known else 0.0
            without = [line for line in base if line["seed"] in seeds_of(own)]
            lead = dice - mean_of(without, "dice", classes)
            points.append(Point(teacher, gate, dice, lead, *gain(own, base, classes)))
    return points


def dose_table(name: str) -> str:
    points = dose_points(name)
    gates = sorted({point.gate for point in points}, key=("none", "agreement", "validation").index)
    groups: dict[str, dict[str, Point]] = {}
    for point in sorted(points, key=lambda point: -point.dice):
        groups.setdefault(point.teacher, {})[point.gate] = point
    table = []
    for teacher, by_gate in groups.items():
        first = max(by_gate.values(), key=lambda point: point.seeds)
        gains = [gain_text(*by_gate[gate][4:]) if gate in by_gate else "-" for gate in gates]
        seeds = " / ".join(str(by_gate[gate].seeds) if gate in by_gate else "-" for gate in gates)
        table.append([teacher, f"{first.dice:.1f}", f"{first.lead:+.1f}", *gains, seeds])
    return markdown(["teacher", "its Dice", "its lead", *(f"gain, gate {gate}" for gate in gates), "seeds"], table)


ENDINGS: dict[str, Callable[[str], str]] = {"_classes": classes_table, "_summary": summary_table}


def table_of(name: str) -> str:
    """A table by the name in its marks; nothing if there is no result file for it."""
    ending = next((ending for ending in ENDINGS if name.endswith(ending)), "")
    file = name.removesuffix(ending)
    if not (RESULTS / f"{file}.csv").is_file():
        return ""
    return (ENDINGS[ending] if ending else dose_table if file == "dose" else hosts_table)(file)


def all_tables(name: str) -> str:
    """What a grid prints of its result file."""
    return "\n\n".join(table_of(one) for one in ((name,) if name == "dose" else (name, f"{name}_classes")))


def with_tables(text: str) -> str:
    """The page with every table between its marks made anew."""

    def table(match: re.Match[str]) -> str:
        return "\n".join(filter(None, (match[1], table_of(match[2]), match[3])))

    return re.sub(r"(<!-- table (\w+) -->).*?(<!-- end \2 -->)", table, text, flags=re.DOTALL)


def draw_curves(name: str, host: str) -> None:
    """Validation Dice of a host with SKD and without over the iterations, and its teacher's."""
    import matplotlib.pyplot as plt

    curves = by(read(f"{name}_curves"), lambda line: line["row"])
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    drawn = ((host, "mean_dice", "without SKD", "0.45"), (host + SKD, "mean_dice", "with SKD", "C0"))
    for row, column, label, color in (*drawn, (host + SKD, "teacher_dice", "its teacher", "C1")):
        points = by(curves[row], lambda line: line["iteration"])
        iterations = [int(iteration) for iteration in points]
        values = [[float(line[column]) for line in lines if line.get(column)] for lines in points.values()]
        means = [statistics.mean(one) for one in values]
        axes.plot(iterations, means, color=color, label=label, linestyle=":" if "teacher" in column else "-")
        axes.fill_between(
            iterations, [min(one) for one in values], [max(one) for one in values], color=color, alpha=0.2
        )
    seeds = len({line["seed"] for line in curves[host + SKD]})
    axes.set(xlabel="iterations", ylabel="Dice (%)", title=f"{host}, 3 labeled patients, {seeds} seed(s)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(PICTURES / f"curves_{re.sub('[^a-z]+', '_', host.lower())}.svg", metadata={"Date": None})
    plt.close(figure)


def draw_dose() -> None:
    """Gain of the student against the teacher's lead, for each gate."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for gate, points in by_gate().items():
        lead, value, error = zip(*((point.lead, point.gain, point.error) for point in points))
        axes.errorbar(lead, value, yerr=error, marker="o", capsize=2, linestyle="-", label=f"gate {gate}")
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set(xlabel="Dice of the teacher minus Dice of the student without SKD", ylabel="gain of the student (Dice)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(PICTURES / "dose.svg", metadata={"Date": None})
    plt.close(figure)


def by_gate() -> dict[str, list[Point]]:
    groups: dict[str, list[Point]] = {}
    for point in sorted(dose_points(), key=lambda point: point.lead):
        groups.setdefault(point.gate, []).append(point)
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    stale = [
        page for page in PAGES if with_tables(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")
    ]
    if options.check:
        sys.exit(f"made of other results: {', '.join(page.name for page in stale)}" if stale else 0)
    for page in stale:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    for row in by(read("acdc_3_cpu_curves"), lambda line: line["row"]):
        if row.endswith(SKD):
            draw_curves("acdc_3_cpu", row.removesuffix(SKD))
    if (RESULTS / "dose.csv").is_file():
        draw_dose()


if __name__ == "__main__":
    main()
