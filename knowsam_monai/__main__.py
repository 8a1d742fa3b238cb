"""``knowsam``, also ``python -m knowsam_monai``: check data, write a phantom, train, segment scans, report, zip."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knowsam_monai import __version__
from knowsam_monai.errors import KnowSAMError, named_as_set, root_cause
from knowsam_monai.texts import command_line

DESCRIPTION = """\
SAM-induced knowledge distillation for semi-supervised segmentation, as parts for MONAI trainers.

  knowsam train acdc                                           try it: the whole method on a phantom, minutes on a CPU

  knowsam check list.json --num_classes 3                      your data: is it fit to train on?
  knowsam train acdc --dataset_dir list.json ...               train
  knowsam predict scans --bundle acdc --output segmentations   segment
"""
EXIT_CODES = "Exit codes: 0 done, 1 wrong input (reported in one sentence), 2 wrong usage."
EXIT_CODES_OF_PREDICT = """\
Exit codes: 0 done, 1 wrong input (reported in one sentence) or images that could not be segmented (the others are;
these are listed at the end, a line for each), 2 wrong usage.
"""

PHANTOM = """\
Write synthetic patients as NIfTI, with a MONAI data list `dataset.json` beside them. The same arguments give the
same voxels, and a phantom that is there is not written again.

  knowsam phantom scans --labeled 2 --validation 1 --unlabeled 17 --test 0
  knowsam phantom atria --anatomy left_atrium --size 48
"""
CHECK = """\
Read every image and label of a data list, and list errors, such as an image in two sets, labels that do not fit, or
unreadable files. Possibly intentional issues are listed as warnings. The exit code is 1 if there are errors.

  knowsam check scans/dataset.json --num_classes 4
  knowsam check scans/dataset.json --bundle la
  knowsam check /data/ACDC --labeled_patients 7
"""
TRAIN = """\
Train a bundle: `acdc` (slices), `la` (volumes), or a folder. This is MONAI's bundle command with the same keys, and it
is printed first. docs/source/settings.md lists the keys. Without --dataset_dir a phantom is the data. If a run is
interrupted, the same command resumes it.

A name means bundles/knowsam_NAME or knowsam_NAME in the working folder. If neither exists, the bundle that comes with
the package is copied to knowsam_NAME.

  knowsam train acdc
  knowsam train acdc --dataset_dir /data/list.json --class_names "['liver', 'tumor']" --preflight True
  knowsam train la --with network_plain,mean_teacher --dataset_dir /data/list.json
  knowsam train acdc --with evaluate --dataset_dir /data/ACDC --split test
"""
REPORT = """\
Write one HTML page from a run's folder (the `output_dir` of a training, finished or not): curves of every loss term,
student against teacher, the gate, the Dice of each case, the best and the worst slices, the config as run. Several
folders stand side by side. The page opens offline. It shows slices of the validation's images: share it as you would
share these.

  knowsam report bundles/knowsam_acdc/output/knowsam_phantom_seed0
  knowsam report output/knowsam_seed0 output/mean_teacher_seed0 --output compare.html
"""
PREDICT = """\
Segment scans, NIfTI, NRRD or MetaImage files, with a trained bundle. Each segmentation is a NIfTI file in its scan's
own geometry. The student is the bundle's models/model.pt, or with --run that of a training's folder, at the size and
with the classes that it was trained with. Configs are code: use a bundle, and a run, that you trust. All is written
below --output; segmentations that are there already are not mistaken for scans. If a scan is segmented again, its file
is replaced.

  knowsam predict /data/scans --bundle acdc --output segmentations
  knowsam predict /data/scans --bundle acdc --run output/my_run --output segmentations
  knowsam predict /data --image_pattern '*/*.nii' --bundle acdc --set image_size=192
"""
ZIP = """\
Zip a bundle with its trained student, for another machine that has this package. Data and SAM stay out; the config in
it has the paths of the training data. There, `unzip` it and give the folder to `knowsam predict --bundle`. In a clone,
`make zip` writes the zip that the Model Zoo hosts.

  knowsam zip acdc
  knowsam zip acdc --run output/my_run
"""


def phantom(options: argparse.Namespace) -> int:
    from knowsam_monai.data import write_phantom

    with named_as_set({"num_labeled": "--labeled", "max_size": "--size", "folder": "FOLDER"}):
        path = write_phantom(
            options.folder,
            num_labeled=options.labeled,
            num_unlabeled=options.unlabeled,
            num_validation=options.validation,
            num_test=options.test,
            seed=options.seed,
            max_size=options.size,
            anatomy=options.anatomy,
        )
    logging.info("Data list: %s", path)
    return 0


def check(options: argparse.Namespace) -> int:
    from knowsam_monai.data.check import check_dataset

    rules = {} if options.bundle is None else rules_of_bundle(options.bundle, options.dataset_dir)
    given = {name: getattr(options, name) for name in ("num_classes", "num_channels", "labeled_patients")}
    rules |= {name: value for name, value in given.items() if value is not None}
    with named_as_set({"dataset_dir": "DATA"}):
        found = check_dataset(options.dataset_dir, **rules)
    return 1 if found.errors else 0


def rules_of_bundle(bundle: str, dataset_dir: str) -> dict[str, Any]:
    """What a bundle's training demands of data by its defaults: labeled patients, classes, channels, axes, items."""
    from monai.bundle import ConfigParser

    from knowsam_monai.runs.bundle_folder import config_file, find_bundle

    parser = ConfigParser(ConfigParser.load_config_file(str(config_file(find_bundle(bundle), "train"))))
    parser["dataset_dir"] = dataset_dir
    names = ("num_classes", "num_channels", "slice_axis", "num_axes")
    rules = {name: parser.get_parsed_content(f"data_check#{name}") for name in names if f"data_check#{name}" in parser}
    rules["batch_sizes"] = {kind: parser.get_parsed_content(f"{kind}_batch_size") for kind in ("labeled", "unlabeled")}
    return {**rules, "labeled_patients": parser.get_parsed_content("labeled_patients")}


def train(options: argparse.Namespace) -> int:
    from knowsam_monai.runs.bundle_folder import config_file, working_bundle

    bundle = working_bundle(options.bundle)
    configs = [str(config_file(bundle, name)) for name in ("train", *options.overlays)]
    if not is_simple(configs, options.keys):
        from knowsam_monai.runs.config_check import check_command  # imports MONAI, which takes seconds

        check_command(configs, options.keys)
    command = ["-m", "monai.bundle", "run", "--config_file", str(configs) if len(configs) > 1 else configs[0]]
    if not any(key.partition("=")[0] == "--bundle_root" for key in options.keys):
        command += ["--bundle_root", str(bundle)]
    command += options.keys
    logging.info("python %s", command_line(command))
    # in this process's place: signals and the exit code are the training's own
    trusted = ["-W", "ignore:parsing config_file"]  # MONAI warns that a config is code
    os.execv(sys.executable, [sys.executable, *trusted, *command])


def is_simple(configs: Sequence[str], keys: Sequence[str]) -> bool:
    """Whether MONAI surely merges the command line: only train.json, and no key that leads into a part or to a file."""
    if len(configs) > 1 or any(key.startswith("--") and re.search("#|::|args", key) for key in keys):
        return False
    try:
        return isinstance(json.loads(Path(configs[0]).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        return False


def report(options: argparse.Namespace) -> int:
    from knowsam_monai.runs.report import write_report

    write_report(*options.folders, output=options.output)
    return 0


def predict(options: argparse.Namespace) -> int:
    from knowsam_monai.runs.bundle_folder import find_bundle
    from knowsam_monai.runs.prediction import predict_folder

    with named_as_set({"dataset_dir": "SCANS", "scans": "SCANS", "output": "--output"}):
        predict_folder(
            options.scans,
            find_bundle(options.bundle),
            options.output,
            run=options.run,
            ckpt_path=options.ckpt_path,
            image_pattern=options.image_pattern,
            device=options.device,
            overrides=dict(pair.split("=", 1) for pair in options.set),
        )
    return 0


def zip_(options: argparse.Namespace) -> int:
    from knowsam_monai.runs.bundle_folder import zip_bundle

    zip_bundle(options.bundle, options.run)
    return 0


def key_value(text: str) -> str:
    """A pair KEY=VALUE of the command line, as it is."""
    if not text.partition("=")[0] or "=" not in text:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE but is {text!r}")
    return text


def names(text: str) -> list[str]:
    """Names with commas in between, or one file, whose path may have commas."""
    return [text] if os.path.isfile(text) else [name.strip() for name in text.split(",") if name.strip()]


def seed(text: str) -> int:
    """A number that can seed a random generator."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, but is {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXIT_CODES}
    program = argparse.ArgumentParser(prog="knowsam", description=DESCRIPTION, **form)
    program.add_argument("--version", action="version", version=f"knowsam_monai {__version__}")
    verbs = program.add_subparsers(title="verbs", metavar="VERB", required=True, help="VERB --help has examples")

    verb = verbs.add_parser("phantom", help="write a synthetic data set", description=PHANTOM, **form)
    verb.add_argument("folder", help="new, empty, or an earlier phantom")
    verb.add_argument(
        "--anatomy", choices=("short_axis", "left_atrium"), default="short_axis", help="default: %(default)s"
    )
    for name, count, what in (
        ("labeled", 4, "to train on"),
        ("unlabeled", 12, "without labels"),
        ("validation", 4, "with labels, to choose the model by"),
        ("test", 2, "with labels, for the end"),
    ):
        verb.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"patients {what}; default: {count}")
    verb.add_argument("--size", type=int, metavar="VOXELS", help="largest in plane; default: 128, left atrium 64")
    verb.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    verb.set_defaults(call=phantom)

    verb = verbs.add_parser("check", help="is a data list fit to train on?", description=CHECK, **form)
    verb.add_argument("dataset_dir", metavar="DATA", help="a data-list JSON, or a folder of ACDC or left-atrium data")
    verb.add_argument("--bundle", metavar="BUNDLE", help="acdc, la, or a folder: check by the defaults of its training")
    verb.add_argument("--num_classes", type=int, metavar="C", help="with the background; default: any label values")
    verb.add_argument("--num_channels", type=int, metavar="N", help="of an image; default: those of the first")
    verb.add_argument("--labeled_patients", type=int, metavar="N", help="of a folder's published split; not for a JSON")
    verb.set_defaults(call=check)

    verb = verbs.add_parser("train", help="train a bundle", description=TRAIN, allow_abbrev=False, **form)
    verb.usage = "knowsam train BUNDLE [--with NAME[,NAME...]] [--KEY VALUE ...]"
    verb.add_argument("bundle", metavar="BUNDLE", help="acdc, la, or the folder of a bundle")
    verb.add_argument(
        "--with",
        dest="overlays",
        type=names,
        action="extend",
        default=[],
        metavar="NAME[,NAME...]",
        help="further configs of the bundle, or files, each of which overrides those before it; may be repeated",
    )
    verb.set_defaults(call=train)

    verb = verbs.add_parser("report", help="one HTML page about runs", description=REPORT, **form)
    verb.add_argument("folders", nargs="+", metavar="FOLDER", help="`output_dir` of a training")
    verb.add_argument(
        "--output", metavar="FILE", help="default: report.html in the folder; of several comparison.html here"
    )
    verb.set_defaults(call=report)

    verb = verbs.add_parser("zip", help="zip a bundle with its student", description=ZIP, **form)
    verb.add_argument("bundle", metavar="BUNDLE", help="acdc, la, or the folder of a bundle")
    verb.add_argument("--run", metavar="FOLDER", help="`output_dir` of a training; default: the bundle's own student")
    verb.set_defaults(call=zip_)

    form["epilog"] = EXIT_CODES_OF_PREDICT
    verb = verbs.add_parser("predict", help="segment a folder of scans", description=PREDICT, **form)
    verb.add_argument("scans", metavar="SCANS", help="a folder of images, one image, or a data list with `test` items")
    verb.add_argument("--bundle", required=True, metavar="FOLDER", help="acdc, la, or the folder of a bundle")
    verb.add_argument("--output", default="segmentations", metavar="FOLDER", help="default: %(default)s")
    verb.add_argument("--run", metavar="FOLDER", help="`output_dir` of a training; default: the bundle's own student")
    verb.add_argument("--ckpt_path", metavar="FILE", help="another student's weights")
    verb.add_argument("--image_pattern", metavar="GLOB", help="below SCANS; default: that of inference.json")
    verb.add_argument("--device", help="such as cpu or cuda:1; default: the first GPU, else the CPU")
    verb.add_argument(
        "--set",
        nargs="+",
        default=[],
        type=key_value,
        metavar="KEY=VALUE",
        help="keys of inference.json, their values as JSON, as in Python, or text; nothing in them is evaluated",
    )
    verb.set_defaults(call=predict)
    return program


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a verb.

    Returns:
        The exit code: 0, 1 after an error that is reported in one sentence, 130 after Ctrl-C. Wrong usage exits with 2.
    """
    program = parser()
    options, keys = program.parse_known_args(arguments)
    if keys and (options.call is not train or not keys[0].startswith("--")):
        program.error(f"unrecognized arguments: {shlex.join(keys)}")
    options.keys = keys  # of the bundle's config
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)

    try:
        return options.call(options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        root = root_cause(error)
        if not isinstance(root, KnowSAMError):
            raise  # a fault of the program and not of what it was given
        sys.stderr.write(f"error: {root}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
