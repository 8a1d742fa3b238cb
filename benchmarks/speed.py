"""
Seconds, floating-point operations and memory of training steps and of inference, on this machine.

    python benchmarks/speed.py                       # every 2D row, an hour on two CPU cores
    python benchmarks/speed.py mean_teacher mean_teacher_sam mean_teacher_cached   # a method, with SKD, and cached
    KNOWSAM_ACDC_DIR=/data/ACDC python benchmarks/speed.py   # on real slices; otherwise on the phantom

Each row runs in its own process, so its peak memory is its own. Steps are those of the bundle's trainer: SAM ViT-B,
or what a row names (random weights, which cost the same), 256 x 256, 2 labeled + 2 unlabeled rows, 4 classes. Between
steps a 2048 x 2048 float32 matrix product is timed. "GEMM-GFLOP" is the step's fastest time multiplied by the product's
fastest rate, which makes machines comparable. The table is written to benchmarks/speed.md.

Rows whose names begin with `la_` are of the left-atrium bundle and run only if named:

    python benchmarks/speed.py la_views la_knowsam la_ua_mt la_ua_mt_sam --patch 112 112 80 --steps 2

2 labeled + 2 unlabeled patches of the phantom, generated at the size of the published pack, fp32, SAM ViT-B at 112 with
8 slices of each volume. The published patch needs tens of GiB; --patch 64 64 48 fits small machines.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hosts import HOSTS, SCHEDULES
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles" / "knowsam_acdc"
VOLUME_BUNDLE = ROOT / "bundles" / "knowsam_la"
PATCH = (112, 112, 80)
DEVICE = "cpu"  # of the rows `la_`; benchmarks/memory.py sets it and the size of their phantom
PHANTOM_SIZE: int | None = None
GEMM_SIZE = 2048


def workflow_of(bundle: Path, overlays: tuple[str, ...], keys: dict[str, Any]) -> tuple[Any, dict]:
    """The trainer of a bundle's train.json with overlays, and one of its batches."""
    from monai.bundle import ConfigWorkflow

    files = [str(bundle / "configs" / name) for name in ("train.json", *overlays)]
    workflow = ConfigWorkflow(files, workflow_type="train", logging_file=False, **keys)
    trainer = workflow.parser.get_parsed_content("train#trainer")
    batch = next(iter(trainer.data_loader))
    trainer.state.epoch_length, trainer.state.max_epochs = 1000, 1
    return trainer, batch


def trainer_of(*overlays: str, **overrides: Any) -> Any:
    """The ACDC bundle's trainer at benchmark size, and one of its batches."""
    keys = {
        "bundle_root": str(BUNDLE),
        "dataset_dir": os.environ.get("KNOWSAM_ACDC_DIR") or "$None",
        "labeled_patients": 3,
        "output_dir": str(ROOT / "benchmarks" / "output"),
        "image_size": 256,
        "labeled_batch_size": 2,
        "unlabeled_batch_size": 2,
        "max_iterations": 1000,
        "num_workers": 0,
        "sam_variant": "vit_b",
        "sam_checkpoint": "$None",
        "sam_trainable": "adapters",
        "distillation_gate": "none",
        "log_interval": 1000,
        "train#dataset#data": "$@datalist['labeled'][:8]",
        "train#unlabeled_dataset#data": "$@datalist['unlabeled'][:8]",
        "validate#dataset#data": "$@datalist['validation'][:1]",
        **overrides,
    }
    return workflow_of(BUNDLE, overlays, keys)


def volume_trainer_of(*overlays: str, **overrides: Any) -> Any:
    """The same for the left-atrium bundle."""
    folder, size = ROOT / "benchmarks" / "output", PHANTOM_SIZE or 2 * max(PATCH)
    phantom = {"anatomy": "left_atrium", "max_size": size, "num_labeled": 2, "num_unlabeled": 2}
    keys = {
        "bundle_root": str(VOLUME_BUNDLE),
        "output_dir": str(folder),
        "device": f"$torch.device('{DEVICE}')",
        "datalist#phantom_dir": str(folder / f"volumes_{size}"),
        "datalist#phantom": {**phantom, "num_validation": 1, "num_test": 0},
        "spacing": [0.0, 0.0, 0.0],
        "image_size": list(PATCH),
        "channels": [16, 32, 64, 128, 256],
        "aggregation_channels": [16, 16, 32],
        "max_iterations": 1000,
        "sam_variant": "vit_b",
        "sam_checkpoint": "$None",
        "sam_trainable": "adapters",
        "sam_image_size": 112,
        "sam_slices": 8,
        "distillation_gate": "none",
        "log_interval": 1000,
        **overrides,
    }
    return workflow_of(VOLUME_BUNDLE, overlays, keys)


def views_step() -> Callable[[], None]:
    """One forward and backward pass of both views and HAM with their supervised loss, the reference for memory."""
    trainer, batch = volume_trainer_of(use_sam=False)
    image, label = (batch[key].as_tensor().to(DEVICE) for key in ("image", "label"))

    def step() -> None:
        trainer.network.train().zero_grad()
        trainer.loss_function(trainer.network(image), label).mean().backward()

    return step


def knowsam_step(mixing: bool, **overrides: Any) -> Callable[[], None]:
    return step_of(*trainer_of(**overrides), mixing)


def step_of(trainer: Any, batch: dict, late: bool) -> Callable[[], None]:
    """A step of a trainer, `late` in its run (with mixing) or at the start."""
    for handler_event, handlers in trainer._event_handlers.items():  # at STARTED teacher and EMA hook the optimizer
        if handler_event.name == "STARTED":
            for handler, args, kwargs in handlers:
                if getattr(handler, "__qualname__", "").startswith(("SAMDistillation", "EMAStudent")):
                    handler(*([trainer] if args else []))  # ignite passes the engine to handlers that take it

    def step() -> None:
        trainer.state.iteration = 999 if late else 1
        trainer.state.batch = batch
        trainer._process_function(trainer, batch)

    return step


def fast_matmul_step(mixing: bool) -> Callable[[], None]:
    from knowsam_monai.runs.cpu import fast_cpu_matmul

    if not fast_cpu_matmul():
        raise RuntimeError("`fast_cpu_matmul` must be accurate to 1e-5 on this processor but is not; skip this row.")
    return knowsam_step(mixing)


def host_step(host: str, *teacher: str, **overrides: Any) -> Callable[[], None]:
    """A late step of a semi-supervised method of the bundle's overlays, with every delayed term started."""
    begun = dict.fromkeys(SCHEDULES.get(host, {}), 0)
    overlays = (f"{overlay}.json" for overlay in (*HOSTS[host], *teacher))
    return step_of(*trainer_of(*overlays, **begun, **overrides), True)


def host_rows() -> dict[str, tuple[str, Callable[[], Callable[[], None]]]]:
    """Each method without SKD, with it, and with cached embeddings; the warm-up step fills the cache."""
    rows: dict[str, tuple[str, Callable[[], Callable[[], None]]]] = {}
    for host, overlays in HOSTS.items():
        if host == "KnowSAM":  # has its own rows
            continue
        row = overlays[-1]
        rows[row] = host, partial(host_step, host, use_sam=False)
        rows[f"{row}_sam"] = f"{host} + SKD", partial(host_step, host)
        rows[f"{row}_bf16"] = f"{host}, bf16 autocast", partial(host_step, host, use_sam=False, cpu_autocast=True)
        rows[f"{row}_sam_bf16"] = f"{host} + SKD, bf16 autocast", partial(host_step, host, cpu_autocast=True)
        if host != "BCP":  # it mixes images, and no mixed image recurs
            rows[f"{row}_cached"] = f"{host} + SKD, cached", partial(host_step, host, sam_encoder="cached")
    sam2 = partial(host_step, "Mean Teacher", "teacher_sam2")
    for variant in ("tiny", "base_plus"):
        label = f"Mean Teacher + SKD of SAM 2.1 {variant}"
        rows[f"mean_teacher_sam2_{variant}"] = label, partial(sam2, sam_variant=variant)
        cached = partial(sam2, sam_variant=variant, sam_encoder="cached")
        rows[f"mean_teacher_sam2_{variant}_cached"] = f"{label}, cached", cached
    return rows


def inference_of_volume(network_name: str) -> Callable[[], None]:
    """Inference of the deployed student on a volume of nine slices."""
    from knowsam_monai import networks

    network = getattr(networks, network_name)().to(memory_format=torch.channels_last).eval()
    volume = torch.rand(9, 1, 256, 256)

    def step() -> None:
        with torch.no_grad():
            network(volume)

    return step


ROWS: dict[str, tuple[str, Callable[[], Callable[[], None]]]] = {
    "knowsam": ("KnowSAM, before mixing", lambda: knowsam_step(False)),
    "knowsam_mixing": ("KnowSAM, with mixing", lambda: knowsam_step(True)),
    "knowsam_fast": ("KnowSAM, before mixing, fast_cpu_matmul", lambda: fast_matmul_step(False)),
    "knowsam_mixing_fast": ("KnowSAM, with mixing, fast_cpu_matmul", lambda: fast_matmul_step(True)),
    "knowsam_bf16": ("KnowSAM, before mixing, bf16 autocast", lambda: knowsam_step(False, cpu_autocast=True)),
    "knowsam_mixing_bf16": ("KnowSAM, with mixing, bf16 autocast", lambda: knowsam_step(True, cpu_autocast=True)),
    "without_sam": ("KnowSAM without SAM, before mixing", lambda: knowsam_step(False, use_sam=False)),
    **host_rows(),
    "inference": ("inference, 9 slices, whole student", lambda: inference_of_volume("MultiViewNet")),
    "inference_unet": ("inference, 9 slices, U-Net alone", lambda: inference_of_volume("UNet")),
}
VOLUME_ROWS: dict[str, tuple[str, Callable[[], Callable[[], None]]]] = {
    "la_views": ("3D, both views and HAM, one forward and backward", views_step),
    "la_knowsam": ("3D KnowSAM, with mixing", lambda: step_of(*volume_trainer_of(), True)),
    "la_without_sam": ("3D KnowSAM without SAM, with mixing", lambda: step_of(*volume_trainer_of(use_sam=False), True)),
    "la_mean_teacher": (
        "3D Mean Teacher of a V-Net",
        lambda: step_of(*volume_trainer_of("network_plain.json", "mean_teacher.json", use_sam=False), True),
    ),
    "la_mean_teacher_sam": (
        "3D Mean Teacher of a V-Net with SKD",
        lambda: step_of(*volume_trainer_of("network_plain.json", "mean_teacher.json"), True),
    ),
    "la_ua_mt": (
        "3D UA-MT of a V-Net",
        lambda: step_of(*volume_trainer_of("network_plain.json", "ua_mt.json", use_sam=False), True),
    ),
    "la_ua_mt_sam": (
        "3D UA-MT of a V-Net with SKD",
        lambda: step_of(*volume_trainer_of("network_plain.json", "ua_mt.json"), True),
    ),
}


def count_gflop(step: Callable[[], None]) -> float:
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


def measure(name: str, num_steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    matrix = torch.randn(GEMM_SIZE, GEMM_SIZE)
    step = {**ROWS, **VOLUME_ROWS}[name][1]()
    step()  # warms up
    seconds, gemm_seconds = [], []
    precision = torch.get_float32_matmul_precision()
    for _ in range(num_steps):
        torch.set_float32_matmul_precision("highest")  # the same unit for every row
        for _ in range(3):
            start = time.perf_counter()
            matrix @ matrix
            gemm_seconds.append(time.perf_counter() - start)
        torch.set_float32_matmul_precision(precision)
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rate = 2 * GEMM_SIZE**3 / min(gemm_seconds) / 1e9
    return {"seconds": min(seconds), "rate": rate, "memory": memory, "gflop": count_gflop(step)}


def processor() -> str:
    """The processor's name on Linux."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )


def main() -> None:
    global PATCH
    every_row = {**ROWS, **VOLUME_ROWS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"which of {', '.join(every_row)}; default: all but la_")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a row")
    parser.add_argument("--patch", type=int, nargs=3, default=PATCH, help="voxels of a patch, for the rows la_")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "speed.md"))
    args = parser.parse_args()
    unknown = [row for row in args.rows if row not in every_row]
    if unknown:
        parser.error(f"row must be one of {', '.join(every_row)} but is {unknown[0]}")
    PATCH = tuple(args.patch)
    torch.set_num_threads(args.threads)
    if args.measure:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        print(json.dumps(measure(args.measure, args.steps)))
        return

    lines = [
        "| row | seconds | GEMM-GFLOP | GFLOP | peak memory, GiB | GEMM, GFLOP/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    for row in args.rows or ROWS:
        command = [
            sys.executable,
            __file__,
            "--measure",
            row,
            "--threads",
            str(args.threads),
            "--steps",
            str(args.steps),
            "--patch",
            *map(str, args.patch),
        ]
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        )
        if result.returncode:
            sys.exit(f"{row} failed:\n{result.stderr}")
        r = json.loads(result.stdout.strip().splitlines()[-1])
        line = (
            f"| {every_row[row][0]} | {r['seconds']:.2f} | {r['seconds'] * r['rate']:.0f} | {r['gflop']:.0f} "
            f"| {r['memory']:.2f} | {r['rate']:.0f} |"
        )
        lines.append(line)
        print(line, flush=True)
    if not args.rows:
        source = "real ACDC slices" if os.environ.get("KNOWSAM_ACDC_DIR") else "the phantom's slices"
        head = (
            f"# Speed\n\nPrinted by `python benchmarks/speed.py --threads {args.threads} --steps {args.steps}` on "
            f"{source}; torch {torch.__version__}, {processor()}. The script defines each row.\n\n"
        )
        Path(args.output).write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
