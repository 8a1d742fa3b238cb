"""
Choose settings of SKD on 20 training patients that no table is measured on.

    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/choices.py --time
    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/choices.py --only "KL, as published" --seeds 0

Mean Teacher with 3 labeled patients of ACDC in the CPU protocol of `hosts.py`, validated on the 40 volumes of the 20
training patients before the last 20. Neither these nor the patients of the tables are in training.
"""

from __future__ import annotations

import argparse

import hosts
from grid import WITHOUT_SAM, Row, acdc_lists, print_times, run_all

# row -> its keys; all others are the bundle's defaults
ROWS: dict[str, dict[str, object]] = {
    "without SKD": WITHOUT_SAM,
    "KL, as published": {
        "distillation_dice_weight": 0.0,
        "taught_rows": "all",
        "distillation_start": 0,
    },
    "KL and Dice on unlabeled rows from an eighth of the run on": {
        "distillation_dice_weight": 1.0,
        "taught_rows": "unlabeled",
        "distillation_start": 250,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time on a CPU")
    parser.add_argument("--time", action="store_true", help="only measure seconds an iteration of each row")
    options = parser.parse_args()
    shared = hosts.cpu_keys(hosts.parser().parse_args([]))
    grid = [
        (Row(row, hosts.HOSTS["Mean Teacher"], {**shared, **ROWS[row]}), seed)
        for seed in options.seeds
        for row in options.only
    ]
    data = acdc_lists(3, "choices")
    if options.time:
        return print_times("choices", grid, data)
    run_all("choices", grid, data, jobs=options.jobs)


if __name__ == "__main__":
    main()
