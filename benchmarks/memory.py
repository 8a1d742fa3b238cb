"""
Memory and floating-point operations of training steps of the left-atrium bundle, counted without computing them.

    python benchmarks/memory.py                                    # every row at the published patch
    python benchmarks/memory.py la_views la_knowsam --patch 80 80 64

A step runs on torch's "meta" device, where tensors have a shape but no values. So any machine counts 2 labeled + 2
unlabeled rows of the published patch, which need 15.6 GiB, in a minute. benchmarks/speed.py defines the rows. Memory is
the largest sum of all tensors alive at once, including weights, gradients and optimizer states. The process itself and
the scratch space of convolutions need more on top, on any device.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import warnings
import weakref
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import speed
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from knowsam_monai.networks.noisy_passes import NoisyPasses

PATCH = (112, 112, 80)


class PeakMemory(TorchDispatchMode):
    """Tracks every storage from the operation that creates it until it is freed; `peak` in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def bytes_alive() -> int:
    """Storage of all tensors: weights, gradients, optimizer states, the batch."""
    tensors = [item for item in gc.get_objects() if isinstance(item, Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def views_step(options: speed.Options) -> speed.Step:
    """One forward and backward pass of both views and HAM with their supervised loss, the reference for memory."""
    parser = speed.left_atrium(options, use_sam=False)
    trainer = parser.get_parsed_content("train#trainer")
    batch = next(iter(trainer.data_loader))
    image, label = (batch[key].to(options.device) for key in ("image", "label"))

    def step() -> None:
        trainer.network.train().zero_grad()
        trainer.loss_function(trainer.network(image), label).mean().backward()

    return step


ROWS = {
    "la_views": ("3D, both views and HAM, one forward and backward", views_step),
    **{
        row: speed.ROWS[row]
        for row in (
            "la_knowsam",
            "la_without_sam",
            "la_mean_teacher",
            "la_mean_teacher_sam",
            "la_ua_mt",
            "la_ua_mt_sam",
        )
    },
}


def measure(row: str, options: speed.Options) -> tuple[float, float]:
    """GiB at the peak of a step, and its GFLOP."""
    autocast = torch.autocast
    with (
        # the meta device has neither autocast nor random numbers nor values
        patch(
            "torch.autocast", lambda device, *a, **k: nullcontext() if device == "meta" else autocast(device, *a, **k)
        ),
        patch("knowsam_monai.distillation.wiring.Wiring._inspect"),
        patch("knowsam_monai.distillation.gate.TeacherGate.is_open", True),
        patch.object(NoisyPasses, "noise", lambda _, image, iteration, passes=1: image.expand(passes, *image.shape)),
    ):
        step = ROWS[row][1](options)
        step()  # creates gradients and optimizer states
        gc.collect()
        before, memory = bytes_alive(), PeakMemory()
        with memory:
            step()
        with FlopCounterMode(display=False) as counter:
            step()
    return (before + memory.peak) / 2**30, counter.get_total_flops() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"which of {', '.join(ROWS)}; default: all")
    parser.add_argument("--patch", type=int, nargs=3, default=PATCH, help="voxels of a patch")
    args = parser.parse_args()
    unknown = [row for row in args.rows if row not in ROWS]
    if unknown:
        parser.error(f"row must be one of {', '.join(ROWS)} but is {unknown[0]}")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    options = speed.Options(device="meta", patch=tuple(args.patch), phantom_size=48)
    print(f"| row, patch {' x '.join(map(str, args.patch))} | memory, GiB | GFLOP |\n| --- | --- | --- |", flush=True)
    for row in args.rows or ROWS:
        process = os.fork()  # each row starts with empty memory
        if process == 0:
            memory, gflop = measure(row, options)
            print(f"| {ROWS[row][0]} | {memory:.2f} | {gflop:.0f} |", flush=True)
            os._exit(0)
        if os.waitpid(process, 0)[1]:
            raise SystemExit(f"{row} failed; its output is above.")


if __name__ == "__main__":
    main()
