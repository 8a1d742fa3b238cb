"""
Seconds to average the teacher's gradients over two processes, in one buffer and one tensor after the other.

    python benchmarks/all_reduce.py

Two gloo processes of one thread each average the gradients of all trained parameters of SAM ViT-B with adapters, in
turns. The first process prints the fastest and the median round.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import distributed, multiprocessing

from knowsam_monai import SAMTeacher
from knowsam_monai.distillation.optimizer_hooks import _average_over_ranks

ROUNDS = 15


def one_by_one(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        distributed.all_reduce(parameter.grad)
        parameter.grad /= distributed.get_world_size()


def measure(rank: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:29517", rank=rank, world_size=2)
    teacher = SAMTeacher(num_classes=4)
    parameters = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    if rank == 0:
        print(f"{len(parameters)} tensors, {sum(p.numel() for p in parameters) / 1e6:.1f} million values")
    seconds: dict[str, list[float]] = {"one buffer": [], "one by one": []}
    for _ in range(ROUNDS):
        for name, average in (("one buffer", _average_over_ranks), ("one by one", one_by_one)):
            distributed.barrier()
            start = time.perf_counter()
            average(parameters)
            seconds[name].append(time.perf_counter() - start)
    if rank == 0:
        for name, values in seconds.items():
            print(f"{name}: {min(values):.3f} / {statistics.median(values):.3f} s")
    distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(measure, nprocs=2)
