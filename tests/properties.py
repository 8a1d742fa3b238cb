"""What the property tests share: tensors in every layout and precision, and softmax in plain float64 loops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from monai.data import MetaTensor

# the same few examples each time
few = settings(max_examples=20, derandomize=True, deadline=None, database=None, phases=[Phase.generate])

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("contiguous", "channels last", "transposed", "every second", "part of another", "MetaTensor")


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, lying otherwise in memory."""
    if layout == "channels last" and tensor.ndim in (4, 5):
        return tensor.to(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every second":
        return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]
    if layout == "part of another":
        return torch.cat([torch.ones_like(tensor), tensor], dim=1)[:, tensor.shape[1] :]
    return MetaTensor(tensor) if layout == "MetaTensor" else tensor


@dataclass
class Case:
    """Sizes of one example, and a seed for its values."""

    rows: int
    labeled: int
    classes: int
    spatial: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    scale: float
    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def logits(self, rows: int | None = None, classes: int | None = None) -> torch.Tensor:
        shape = (rows or self.rows, classes or self.classes, *self.spatial)
        values = self.scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return laid_out(values.to(self.dtype), self.layout)

    def label(self, dtype: torch.dtype = torch.float32, present: int | None = None) -> torch.Tensor:
        """Class numbers below `present`: the other classes are absent."""
        shape = (self.labeled, 1, *self.spatial)
        top = max(self.classes, 2) if present is None else min(present, max(self.classes, 2))
        return laid_out(torch.randint(top, shape, generator=self.generator).to(dtype), self.layout)


@st.composite
def cases(draw, min_rows: int = 1) -> Case:
    rows = draw(st.integers(min_rows, 4))
    num_axes = draw(st.sampled_from((2, 3)))
    return Case(
        rows=rows,
        labeled=draw(st.integers(1, max(rows + 1 - min_rows, 1))),
        classes=draw(st.integers(1, 5)),
        spatial=tuple(draw(st.integers(1, 4)) for _ in range(num_axes)),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        scale=draw(st.sampled_from((0.0, 1.0, 30.0, 1000.0))),
        seed=draw(st.integers(0, 2**16)),
    )


def pixels(tensor: torch.Tensor):
    """The values of each pixel, (C,) in float64, with its row and position; a sigmoid's one logit z as (0, z)."""
    array = np.asarray(tensor.detach().to(torch.float64))
    for row, *position in product(*(range(n) for n in (len(array), *array.shape[2:]))):
        values = [float(array[(row, channel, *position)]) for channel in range(array.shape[1])]
        yield values if len(values) > 1 else [0.0, values[0]]


def log_softmax(values) -> list[float]:
    largest = max(values)
    total = math.log(sum(math.exp(value - largest) for value in values))
    return [value - largest - total for value in values]


def softmax(values) -> list[float]:
    return [math.exp(value) for value in log_softmax(values)]


def first_largest(values) -> int:
    return max(range(len(values)), key=lambda index: (values[index], -index))


def assert_right(actual: torch.Tensor, expected: float, scale: float = 1.0) -> None:
    """A finite scalar that float32 could not have better: `scale` is the size of the numbers that were subtracted."""
    assert type(actual) is torch.Tensor and actual.ndim == 0 and actual.dtype in (torch.float32, torch.float64)
    assert math.isfinite(actual.item()), f"{actual.item()} instead of {expected}"
    assert abs(actual.item() - expected) <= 2e-5 * (1 + abs(expected) + scale), f"{actual.item()}, not {expected}"


def dice_ce(logits: torch.Tensor, label: torch.Tensor, ignore_index: int | None = None) -> float:
    """Cross-entropy + Dice with squared denominator over the batch, background included (a sigmoid: two classes)."""
    channels = range(max(logits.shape[1], 2))
    ce, count, common, squares = 0.0, 0, dict.fromkeys(channels, 0.0), dict.fromkeys(channels, 0.0)
    for values, (_, wanted) in zip(pixels(logits), pixels(label)):
        if wanted == ignore_index:
            continue
        log_probs = log_softmax(values)
        ce, count = ce - log_probs[int(wanted)], count + 1
        for c in channels:
            common[c] += math.exp(log_probs[c]) * (c == wanted)
            squares[c] += math.exp(2 * log_probs[c]) + (c == wanted)
    dice = [1 - (2 * common[c] + 1e-5) / (squares[c] + 1e-5) for c in channels]
    return ce / max(count, 1) + sum(dice) / len(dice)
