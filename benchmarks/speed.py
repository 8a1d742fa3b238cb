"""
Seconds, memory and floating-point operations of training steps and of inference, each beside a reference.

    python benchmarks/speed.py                                        # the default comparisons, on CPU or GPU
    python benchmarks/speed.py supervised ua_mt cps --rounds 3        # methods, with SKD, and with cached embeddings
    python benchmarks/speed.py sam2_tiny sam2_tiny_alone              # with another teacher, and that teacher alone
    python benchmarks/speed.py knowsam --threads 1 --cpu_time         # CPU seconds: a fair ratio on a busy machine
    python benchmarks/speed.py knowsam knowsam_mixing --batch 12 --precisions default bf16 fp16 [--compile]   # a GPU
    python benchmarks/speed.py --recipe 300 --batch 12 --precisions default   # iterations per second with the loader
    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/speed.py            # on real slices; otherwise on the phantom

The reference of KnowSAM and of inference is `benchmarks/plain_step.py`: the same mathematics, written in the obvious
way. The reference of a method with SKD is the method. Each row of a comparison is a process of its own: rows of the
bundle have the settings of its runs, plain rows have torch's and the C library's defaults, and peak memory is the
row's. The processes take their steps in turns. Ratios are those of the fastest and of the median steps.

Steps are those of the bundle's trainer: SAM ViT-B, or what a row names, with random weights, which cost the same; 256 x
256, 2 labeled + 2 unlabeled rows, 4 classes. Rows whose names begin with `la_` are of the left-atrium bundle: patches
of the phantom, SAM ViT-B at 112 with 8 slices of each volume. On a GPU, the precision "default" leaves torch's settings
as they are, as a run does; "fp32" and "tf32" turn TensorFloat-32 off and on, for convolutions and matrix products. A
GPU's rows also give the share of a step in which it is busy.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import plain_step
import torch
from hosts import HOSTS
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from knowsam_monai.runs import keep_freed_memory, start_run

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "output"
PRECISIONS = ("default", "fp32", "tf32", "bf16", "fp16")
WINDOW = (-2, 4)  # intensities of the left atrium that SAM sees, as in the bundle


class Options(NamedTuple):
    """What all rows of a comparison share."""

    device: str = "cuda:0" if torch.cuda.is_available() else "cpu"
    precision: str = "fp32"
    compile: bool = False
    batch: int = 2
    patch: tuple[int, ...] = (48, 48, 32)
    phantom_size: int | None = None
    recipe: int = 0
    threads: int = 2
    cpu_time: bool = False


Step = Callable[[], None]
Build = Callable[[Options], Step]

# --- rows of the bundles ----------------------------------------------------------------------------------------------


def parser_of(bundle: str, file: str, overlays: tuple[str, ...], keys: dict[str, Any], options: Options) -> Any:
    """The parser of a bundle's configs."""
    folder = ROOT / "bundles" / bundle
    files = [str(folder / "configs" / name) for name in (file, *overlays)]
    keys = {"bundle_root": str(folder), "device": f"$torch.device('{options.device}')", **keys}
    return ConfigWorkflow(files, workflow_type=file.removesuffix(".json"), logging_file=False, **keys).parser


def training(options: Options, bundle: str, *overlays: str, **keys: Any) -> Any:
    """The parser of a bundle's train.json with overlays, in a process with the settings of the bundle's runs."""
    output = tempfile.mkdtemp()
    if options.device != "meta":
        start_run(output, output, torch.device(options.device), fast_matmul=True)
        set_determinism(0)
    is_half = options.precision in ("bf16", "fp16")
    shared = {
        "output_dir": output,
        "labeled_batch_size": options.batch,
        "unlabeled_batch_size": options.batch,
        "max_iterations": options.recipe or 1000,
        "epoch_length": options.recipe or 1000,
        "sam_variant": "vit_b",
        "sam_checkpoint": "$None",
        "sam_trainable": "adapters",
        "distillation_gate": "none",
        "log_interval": 1000,
        "cpu_autocast": is_half and options.device == "cpu",
        "amp": is_half and options.device != "cpu",
        "amp_dtype": "float16" if options.precision == "fp16" else "bfloat16",
    }
    parser = parser_of(bundle, "train.json", overlays, {**shared, **keys}, options)
    if options.compile:
        parser.get_parsed_content("network").compile()
    return parser


def acdc(options: Options, *overlays: str, **keys: Any) -> Any:
    rows = 4 * options.batch
    shared = {
        "dataset_dir": os.environ.get("KNOWSAM_ACDC_DIR") or "$None",
        "labeled_patients": 3,
        "image_size": 256,
        "validate#dataset#data": "$@datalist['validation'][:1]",
    }
    if not overlays:  # KnowSAM as published, not as on the phantom
        shared |= {"distillation_dice_weight": 0.0, "taught_rows": "all"}
    if not options.recipe:
        shared |= {
            "num_workers": 0,
            "train#dataset#data": f"$@datalist['labeled'][:{rows}]",
            "train#unlabeled_dataset#data": f"$@datalist['unlabeled'][:{rows}]",
        }
    return training(options, "knowsam_acdc", *overlays, **{**shared, **keys})


def left_atrium(options: Options, *overlays: str, **keys: Any) -> Any:
    """With the published settings of SKD, not those of the phantom."""
    size = options.phantom_size or 2 * max(options.patch)
    phantom = {"anatomy": "left_atrium", "max_size": size, "num_labeled": 2, "num_unlabeled": 2}
    shared = {
        "datalist#phantom_dir": str(OUTPUT / f"volumes_{size}"),
        "datalist#phantom": {**phantom, "num_validation": 1, "num_test": 0},
        "spacing": [0.0, 0.0, 0.0],
        "image_size": list(options.patch),
        "channels": [16, 32, 64, 128, 256],
        "aggregation_channels": [16, 16, 32],
        "sam_image_size": 112,
        "sam_slices": 8,
        "distillation_start": 0,
        "distillation_dice_weight": 0.0,
        "taught_rows": "all",
    }
    return training(options, "knowsam_la", *overlays, **{**shared, **keys})


def step_of(parser: Any, late: bool = True, batch: dict | None = None) -> Step:
    """A step of a bundle's trainer, always of the same batch, `late` in its run (with mixing) or at the start."""
    trainer = parser.get_parsed_content("train#trainer")
    batch = next(iter(trainer.data_loader)) if batch is None else batch
    trainer.state.epoch_length, trainer.state.max_epochs = 1000, 1
    for handler_event, handlers in trainer._event_handlers.items():  # at STARTED teacher and EMA hook the optimizer
        if handler_event.name == "STARTED":
            for handler, args, _ in handlers:
                if getattr(handler, "__qualname__", "").startswith(("SAMDistillation", "EMAStudent")):
                    handler(*([trainer] if args else []))  # ignite passes the engine to handlers that take it

    def step() -> None:
        trainer.state.iteration = 999 if late else 1
        trainer.state.batch = batch
        trainer._process_function(trainer, batch)

    return step


def knowsam(options: Options, mixing: bool, **keys: Any) -> Step:
    return step_of(acdc(options, **keys), late=mixing)


def volume_knowsam(options: Options, **keys: Any) -> Step:
    return step_of(left_atrium(options, **keys))


def host(options: Options, name: str, teacher: tuple[str, ...] = (), **keys: Any) -> Step:
    """A late step of a semi-supervised method of the bundle's overlays, with every delayed term started."""
    overlays = (f"{overlay}.json" for overlay in (*HOSTS[name], *teacher))
    return step_of(acdc(options, *overlays, **keys))


def teacher_alone(options: Options, backward: bool, teacher: tuple[str, ...] = (), **keys: Any) -> Step:
    """A pass of the teacher of Mean Teacher, for one image."""
    overlays = (f"{overlay}.json" for overlay in (*HOSTS["Mean Teacher"], *teacher))
    sam = acdc(options, *overlays, **keys).get_parsed_content("teacher")
    image, prompt_logits = torch.rand(1, 1, 256, 256), torch.zeros(1, 4, 256, 256)
    image, prompt_logits = image.to(options.device), prompt_logits.to(options.device)

    def step() -> None:
        with torch.set_grad_enabled(backward):
            logits = sam(image, prompt_logits)
        if backward:
            logits.sum().backward()

    return step


def volume_host(options: Options, overlay: str, **keys: Any) -> Step:
    return step_of(left_atrium(options, "network_plain.json", overlay, **keys))


def inference(options: Options) -> Step:
    """Inference of the deployed student on a volume of nine slices."""
    keep_freed_memory()  # as the bundle's inference does first
    parser = parser_of("knowsam_acdc", "inference.json", (), {}, options)
    return inference_step(parser.get_parsed_content("network"), options)


# --- plain rows -------------------------------------------------------------------------------------------------------


def plain_knowsam(options: Options, mixing: bool, dims: int = 2) -> Step:
    device, num_classes = torch.device(options.device), 4 if dims == 2 else 2
    size, window = (options.patch, WINDOW) if dims == 3 else ((256, 256), (0, 1))
    student = plain_step.Student(dims, num_classes).to(device)
    teacher = plain_step.SAM(num_classes, 256 if dims == 2 else 112, window=window).to(device).eval()
    if options.compile:
        student.compile()
    image = torch.rand(2 * options.batch, 1, *size, device=device)
    label = torch.randint(num_classes, (options.batch, 1, *size), device=device)

    def loss() -> torch.Tensor:
        slices = None
        if dims == 3:  # one slice of each of eight parts
            part = size[-1] // 8
            slices = torch.arange(8, device=device) * part + torch.randint(part, (len(image), 8), device=device)
        return plain_step.knowsam_loss(student, teacher, image, label, 999 if mixing else 1, mixing, slices)

    return plain_step.train_step(loss, student, teacher, options.precision, device)


def plain_inference(options: Options) -> Step:
    return inference_step(plain_step.Student().to(options.device), options)


def inference_step(network: nn.Module, options: Options) -> Step:
    volume = torch.rand(9, 1, 256, 256, device=options.device)
    network.eval()
    device, dtype = volume.device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.precision)

    def step() -> None:
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            network(volume)

    return step


# --- the table --------------------------------------------------------------------------------------------------------

ROWS: dict[str, tuple[str, Build]] = {
    "plain_knowsam": ("plain", partial(plain_knowsam, mixing=False)),
    "knowsam": ("KnowSAM, before mixing", partial(knowsam, mixing=False)),
    "plain_knowsam_mixing": ("plain", partial(plain_knowsam, mixing=True)),
    "knowsam_mixing": ("KnowSAM, with mixing", partial(knowsam, mixing=True)),
    "without_sam": ("KnowSAM without SAM, before mixing", partial(knowsam, mixing=False, use_sam=False)),
    "plain_inference": ("plain", plain_inference),
    "inference": ("inference, 9 slices", inference),
    "plain_la_knowsam": ("plain", partial(plain_knowsam, mixing=True, dims=3)),
    "la_knowsam": ("3D KnowSAM, with mixing", volume_knowsam),
    "la_without_sam": ("3D KnowSAM without SAM, with mixing", partial(volume_knowsam, use_sam=False)),
}
# the first row is the reference of the others
COMPARISONS: dict[str, tuple[str, ...]] = {
    "knowsam": ("plain_knowsam", "knowsam"),
    "knowsam_mixing": ("plain_knowsam_mixing", "knowsam_mixing"),
    "inference": ("plain_inference", "inference"),
    "la_knowsam": ("plain_la_knowsam", "la_knowsam"),
    "without_sam": ("without_sam", "knowsam"),
}
for method, method_overlays in HOSTS.items():
    if method == "KnowSAM":
        continue
    key = method_overlays[-1]
    ROWS[key] = method, partial(host, name=method, use_sam=False)
    ROWS[f"{key}_sam"] = f"{method} + SKD", partial(host, name=method)
    COMPARISONS[key] = (key, f"{key}_sam")
    if method != "BCP":  # it mixes images, and no mixed image recurs
        ROWS[f"{key}_cached"] = f"{method} + SKD, cached", partial(host, name=method, sam_encoder="cached")
        COMPARISONS[key] += (f"{key}_cached",)
for family, variant in (
    *(("sam", variant) for variant in ("vit_b", "vit_l", "mobile_sam")),
    *(("sam2", variant) for variant in ("tiny", "small", "base_plus", "large")),
):
    sam_keys = {"teacher": ("teacher_sam2",) if family == "sam2" else (), "sam_variant": variant}
    label = f"SAM 2.1 {variant}" if family == "sam2" else variant
    key, taught = f"{family}_{variant}", partial(host, name="Mean Teacher", **sam_keys)
    ROWS[key] = f"Mean Teacher + SKD of {label}", taught
    ROWS[f"{key}_cached"] = f"Mean Teacher + SKD of {label}, cached", partial(taught, sam_encoder="cached")
    ROWS[f"{key}_forward"] = f"{label}, forward", partial(teacher_alone, backward=False, **sam_keys)
    ROWS[f"{key}_backward"] = f"{label}, forward and backward", partial(teacher_alone, backward=True, **sam_keys)
    COMPARISONS[key] = ("mean_teacher", key, f"{key}_cached")
    COMPARISONS[f"{key}_alone"] = (f"{key}_forward", f"{key}_backward")
for overlay, method in (("mean_teacher", "3D Mean Teacher of a V-Net"), ("ua_mt", "3D UA-MT of a V-Net")):
    key = f"la_{overlay}"
    ROWS[key] = method, partial(volume_host, overlay=f"{overlay}.json", use_sam=False)
    ROWS[f"{key}_sam"] = f"{method} + SKD", partial(volume_host, overlay=f"{overlay}.json")
    COMPARISONS[key] = (key, f"{key}_sam")
DEFAULT = ("knowsam", "knowsam_mixing", "inference", "mean_teacher", "la_knowsam")
IN_HALF = ("knowsam", "knowsam_mixing")  # by default the others run in the first precision only
HEAD = """
| row | reference | seconds, min / median | of the reference | ratio | peak memory, GiB | of the reference | ratio | GFLOP | of the reference |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""  # noqa: E501


def line_of(rows: tuple[str, str], reference: dict[str, Any], row: dict[str, Any], precision: str) -> str:
    """A row of the table. The ratio to a plain row says how many times as fast; to a method, how many of its steps."""
    is_plain = rows[0].startswith("plain")
    times = [(min(facts["seconds"]), statistics.median(facts["seconds"])) for facts in (row, reference)]
    ratios = [theirs / ours if is_plain else ours / theirs for ours, theirs in zip(*times)]
    seconds = [" / ".join(f"{value:.3g}" for value in pair) for pair in times]
    cells = [
        f"{ROWS[rows[1]][0]}, {precision}" + ("" if row["busy"] is None else f", GPU busy {row['busy']:.0%}"),
        ROWS[rows[0]][0],
        *seconds,
        f"{' / '.join(f'{ratio:.2f}' for ratio in ratios)} {'times as fast' if is_plain else 'steps'}",
        *(f"{facts['memory']:.2f}" for facts in (row, reference)),
        f"{row['memory'] / reference['memory']:.2f}",
        *("-" if facts["gflop"] is None else f"{facts['gflop']:.0f}" for facts in (row, reference)),
    ]
    return f"| {' | '.join(cells)} |"


def machine(options: Options) -> str:
    """The processor or card, and what else the numbers depend on."""
    if options.device.startswith("cuda"):
        name = torch.cuda.get_device_name(options.device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = f"{next(names, 'unknown processor')}, {options.threads} threads"
    data = "real ACDC slices" if os.environ.get("KNOWSAM_ACDC_DIR") else "the phantom's slices"
    clock = "CPU seconds" if options.cpu_time else "seconds"
    return (
        f"{name}; torch {torch.__version__}; {clock}; batch {options.batch} + {options.batch}; {data}; patches "
        f"{' x '.join(map(str, options.patch))}{'; students compiled' if options.compile else ''}"
    )


# --- a process for each row -------------------------------------------------------------------------------------------


def count_gflop(step: Step) -> float:
    """GFLOP of one step. torch's counter knows attention only on GPUs, so the CPU kernel is registered here."""
    ops = torch.ops.aten

    def forward(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    mapping = {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        step()
    return counter.get_total_flops() / 1e9


def busy_share(step: Step, options: Options) -> float:
    """The part of a step's time in which the GPU runs kernels or copies."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        start = now(options)
        step()
        seconds = now(options) - start
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6 / seconds


def prepare(options: Options) -> None:
    """The settings of a process that every row shares."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.device != "cpu" and options.precision in ("fp32", "tf32"):
        torch.set_float32_matmul_precision("high" if options.precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = options.precision == "tf32"


def now(options: Options) -> float:
    """Seconds, once the device has done what was asked of it."""
    if options.device != "cpu":
        torch.cuda.synchronize(options.device)
    return time.process_time() if options.cpu_time else time.perf_counter()


def serve(pipe: Connection, row: str, options: Options) -> None:
    """Answer "step" with the seconds of a step, and "facts" with peak memory, operations and the GPU's share."""
    prepare(options)
    step = ROWS[row][1](options)
    while True:
        if pipe.recv() == "step":
            start = now(options)
            step()
            pipe.send(now(options) - start)
            continue
        if options.device == "cpu":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        else:
            peak = torch.cuda.max_memory_allocated(options.device)
        busy = None if options.device == "cpu" else busy_share(step, options)
        gflop = None if options.compile else count_gflop(step)  # no graph breaks
        pipe.send({"memory": peak / 2**30, "gflop": gflop, "busy": busy})
        return


def compare(rows: tuple[str, ...], options: Options, rounds: int) -> list[dict[str, Any]]:
    """Let the rows take steps in turns, each in a fresh process; seconds, memory and GFLOP of each."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for row in rows:
        pipe, other_end = context.Pipe()
        processes.append(context.Process(target=serve, args=(other_end, row, options), daemon=True))
        processes[-1].start()
        other_end.close()
        pipes.append(pipe)

    def ask(index: int, question: str) -> Any:
        try:
            pipes[index].send(question)
            return pipes[index].recv()
        except (EOFError, BrokenPipeError):
            sys.exit(f"{rows[index]} failed; its output is above.")

    turns = range(len(rows))
    for index in turns:
        for _ in range(1 if options.device == "cpu" else 3):  # warm up
            ask(index, "step")
    seconds = [[ask(index, "step") for index in turns] for _ in range(rounds)]
    facts = [{"seconds": list(column), **ask(index, "facts")} for index, column in zip(turns, zip(*seconds))]
    for process in processes:
        process.join()
    return facts


def run_recipe(options: Options) -> None:
    """Iterations per second of a run of the bundle, with its loader and handlers, from the tenth iteration on."""
    prepare(options)
    trainer, times = acdc(options, mixing_start=1).get_parsed_content("train#trainer"), []
    ends = {10, options.recipe}
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(event_filter=lambda _, iteration: iteration in ends),
        lambda: times.append(now(options)),
    )
    trainer.run()
    print(f"whole recipe, {options.precision}: {(options.recipe - 10) / (times[1] - times[0]):.2f} iterations/s")


def measure(comparisons: list[str], precisions: tuple[str, ...], options: Options, rounds: int) -> None:
    """Print the rate of the recipe, or a line for each row of the comparisons; the default ones if none is named."""
    if options.recipe:
        for precision in precisions:
            arguments = (options._replace(precision=precision),)
            process = multiprocessing.get_context("spawn").Process(target=run_recipe, args=arguments)
            process.start()
            process.join()
        return
    print(HEAD, flush=True)
    for name in comparisons or DEFAULT:
        rows = COMPARISONS[name]
        for precision in precisions if comparisons or name in IN_HALF else precisions[:1]:
            reference, *others = compare(rows, options._replace(precision=precision), rounds)
            for row, facts in zip(rows[1:], others):
                print(line_of((rows[0], row), reference, facts, precision), flush=True)


def main() -> None:
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(COMPARISONS)
    parser.add_argument("comparisons", nargs="*", metavar="COMPARISON", help=f"{names}; default: {' '.join(DEFAULT)}")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each row")
    parser.add_argument("--threads", type=int, default=default.threads)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="default: what the machine is good at")
    parser.add_argument("--compile", action="store_true", help="compile the students, plain ones too")
    parser.add_argument("--batch", type=int, default=default.batch, help="labeled rows; as many unlabeled ones")
    parser.add_argument("--patch", type=int, nargs=3, default=default.patch, help="voxels of a patch, of the rows la_")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds of all threads instead of wall-clock time")
    parser.add_argument("--recipe", type=int, default=0, metavar="ITERATIONS", help="run these and print their rate")
    args = parser.parse_args()
    unknown = [name for name in args.comparisons if name not in COMPARISONS]
    if unknown:
        parser.error(f"`comparison` must be one of {names} but is {unknown[0]}")
    half = ("bf16",) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
    precisions = args.precisions or (("fp32", *half) if args.device == "cpu" else ("default", "bf16", "fp16"))
    shared = {name: getattr(args, name) for name in Options._fields if name not in ("precision", "phantom_size")}
    options = Options(**{**shared, "patch": tuple(args.patch)})
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes below

    print(machine(options), flush=True)
    with tempfile.TemporaryDirectory(prefix="knowsam_speed_") as folder:
        os.environ["TMPDIR"] = folder  # for the folders of the rows' runs
        measure(args.comparisons, precisions, options, args.rounds)


if __name__ == "__main__":
    main()
