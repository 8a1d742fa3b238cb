"""
What SKD adds to semi-supervised methods on ACDC: each host without SKD and with it, in paired runs.

    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/hosts.py --time           # seconds an iteration of each row
    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/hosts.py                  # 3 labeled patients; hours on a CPU
    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/hosts.py --labeled_patients 3 7 --hosts "Mean Teacher" --seeds 0 1
    KNOWSAM_ACDC_DIR=/data/ACDC make table                                  # the published protocol, for GPUs

Every row uses the bundle's own defaults for SKD. The first three commands are for CPUs: 128 x 128, batch 4 + 4, narrow
students, AdamW, 2,000 iterations, and the stand-in as the teacher, which is **not SAM**. They are measured on 60
volumes of 30 patients: the 10 of the validation list, and 20 training patients that are held out of training, images
included.

`make table` runs `hosts.py --published`, all hosts with 3 and with 7 labeled patients: 256 x 256, batch 12 + 12, each
method's own optimizer and length, SAM ViT-B, all training patients, and at the end the test list, or the validation
list if the folder has no test patients. SAM's file is checked first. Each GPU takes one row at a time; started again,
it goes on where it was.

Rows of one host and seed share everything but SKD, so their differences are paired. Results go to benchmarks/results as
CSV as each row ends, of the last weights, without component filtering. At the end the tables of the rows that are done
are printed; `python benchmarks/tables.py` puts them into the pages, and makes the pictures.
"""

from __future__ import annotations

import argparse
import os

from grid import ADAMW, WITHOUT_SAM, Row, acdc_lists, data_folder, print_times, run_all

from knowsam_monai.data import load_datalist

# host -> overlays
HOSTS: dict[str, tuple[str, ...]] = {
    "supervised": ("network_plain", "supervised"),
    "Mean Teacher": ("network_plain", "mean_teacher"),
    "UA-MT": ("network_plain", "ua_mt"),
    "BCP": ("network_plain", "bcp"),
    "CPS": ("network_pair", "cps"),
    "FixMatch": ("network_plain", "fixmatch"),
    "KnowSAM": (),
}
CPU_PROTOCOL = ("iterations", "image_size", "batch_size", "channels", "lr", "set")  # options that no table mixes
LENGTHS = {"BCP": 40000, "KnowSAM": 50000}  # published iterations; 30,000 of the others


def cpu_keys(options: argparse.Namespace) -> dict[str, object]:
    """Keys of every row of the CPU protocol, for a student of one network."""
    return {
        "sam_variant": "stand_in",
        "image_size": options.image_size,
        "labeled_batch_size": options.batch_size,
        "unlabeled_batch_size": options.batch_size,
        "max_iterations": options.iterations,
        "epoch_length": max(1, options.iterations // 8),
        "num_workers": 0,
        "cpu_autocast": not options.fp32,
        "lr": options.lr,
        "optimizer": ADAMW,
        "network_def#channels": options.channels,
    }


def published_keys(options: argparse.Namespace, host: str, labeled_patients: int) -> dict[str, object]:
    """Keys of the published protocol; all others are the bundle's defaults."""
    keys: dict[str, object] = {"labeled_patients": labeled_patients, "epoch_length": 500}
    keys["max_iterations"] = LENGTHS.get(host, 30000)
    return keys | ({"sam_checkpoint": os.path.abspath(options.sam_checkpoint)} if options.sam_checkpoint else {})


def rows_of(options: argparse.Namespace, labeled_patients: int) -> list[tuple[Row, int]]:
    """The grid, seeds outermost, so that an interrupted grid has every host for the seeds it reached."""
    grid = []
    for seed in options.seeds:
        for host in options.hosts or list(HOSTS)[: None if options.published else 4]:
            own = published_keys(options, host, labeled_patients) if options.published else cpu_keys(options)
            if host == "CPS" and "network_def#channels" in own:  # it has two networks
                channels = own.pop("network_def#channels")
                own |= {f"network_def#networks#{number}#channels": channels for number in (0, 1)}
            own |= dict(word.split("=", 1) for word in options.set)
            without = {**own, **WITHOUT_SAM}
            if host == "supervised":  # without SKD nothing uses the unlabeled rows
                without["unlabeled_batch_size"] = 0
            grid += [(Row(host, HOSTS[host], without), seed), (Row(f"{host} + SKD", HOSTS[host], own), seed)]
    return grid


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labeled_patients", type=int, nargs="+", choices=(3, 7), help="a table for each; default: 3")
    parser.add_argument("--hosts", nargs="+", metavar="HOST", help=f"of {', '.join(HOSTS)}; default: the first four")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--published", action="store_true", help="the published protocol, for GPUs; all hosts, 3 and 7 patients"
    )
    parser.add_argument("--sam_checkpoint", help="SAM's file for --published; default: the bundle's models folder")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="other keys of the bundle, for all rows"
    )
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=4, help="labeled rows; as many unlabeled ones")
    parser.add_argument("--channels", type=int, nargs=5, default=[8, 16, 32, 64, 128], help="of the students")
    parser.add_argument("--lr", type=float, default=0.002, help="of AdamW")
    parser.add_argument("--fp32", action="store_true", help="no bf16, for a CPU without its instructions")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time on a CPU")
    parser.add_argument("--table", help="name of the result files; default: by the protocol")
    parser.add_argument("--time", action="store_true", help="only measure seconds an iteration of each row")
    return parser


def main() -> None:
    options = parser().parse_args()
    numbers = options.labeled_patients or ([3, 7] if options.published else [3])
    unknown = [host for host in options.hosts or () if host not in HOSTS]
    if unknown:
        parser().error(f"`--hosts` must be of {', '.join(HOSTS)} but has {unknown[0]!r}")
    changed = [name for name in CPU_PROTOCOL if getattr(options, name) != parser().get_default(name)]
    if changed and not (options.table or options.time or options.published):
        parser().error(
            f"with `--{changed[0]}` give a `--table`, the name of other result files than those of the pages"
        )
    if options.table and len(numbers) > 1:
        parser().error("`--table` names one table; give one number of `--labeled_patients`")
    for number in numbers:
        rows = rows_of(options, number)
        table = options.table or f"acdc_{number}_{'published' if options.published else 'cpu'}"
        data = data_folder("KNOWSAM_ACDC_DIR") if options.published else acdc_lists(number)
        if options.time:
            print_times(table, rows, data)
            continue
        has_test = options.published and load_datalist(data, "", labeled_patients=number)["test"]
        run_all(table, rows, data, jobs=options.jobs, split="test" if has_test else "validation")


if __name__ == "__main__":
    main()
