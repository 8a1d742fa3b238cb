"""Simulated prompts: points, boxes and masks like those of users or other networks, some of them wrong.

Points are (P, T, 2), x and y in pixels, with codes (P, T): 1 on the object, 0 off it, 2 and 3 for the corners of a box,
-1 for no point. All randomness comes from the passed generator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

NO_POINT, OFF, ON, TOP_LEFT, BOTTOM_RIGHT = -1, 0, 1, 2, 3


class Prompts(NamedTuple):
    """Prompts of P objects: points (P, 2, 2), codes (P, 2), mask logits (P, h, w), whether there is a mask (P,)."""

    points: torch.Tensor
    codes: torch.Tensor
    mask_logits: torch.Tensor
    has_mask: torch.Tensor


def first_prompts(
    masks: torch.Tensor,
    others: torch.Tensor,
    mask_size: tuple[int, int],
    generator: torch.Generator,
    wrong: float = 0.2,
) -> Prompts:
    """A point (10 %), a box (45 %), a mask (30 %), or a mask with a box (10 %) or a point (5 %).

    Args:
        masks: true masks (P, H, W) bool, not empty.
        others: masks of other objects in the same images, which wrong mask prompts include.
        mask_size: (h, w) of a mask prompt.
        generator: generator of all random choices.
        wrong: fraction of mask prompts that include another object; half as many boxes are far off.
    """
    kind = torch.rand(len(masks), generator=generator)
    is_point = (kind < 0.1) | (kind >= 0.95)
    is_box = ((kind >= 0.1) & (kind < 0.55)) | ((kind >= 0.85) & (kind < 0.95))
    far_off = torch.rand(len(masks), generator=generator) < wrong / 2
    point = sample_points(masks, generator)
    points = torch.stack((point, torch.zeros_like(point)), dim=1)
    corners = noised_boxes(boxes_of(masks), masks.shape[-2:], generator, far_off).unflatten(-1, (2, 2))
    points = torch.where(is_box[:, None, None], corners, points)
    codes = torch.full((len(masks), 2), NO_POINT)
    codes[is_point, 0] = ON
    codes[is_box] = torch.tensor([TOP_LEFT, BOTTOM_RIGHT])
    return Prompts(points, codes, corrupted_masks(masks, others, mask_size, generator, wrong), kind >= 0.55)


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """Tight boxes (P, 4) of masks (P, H, W), not empty: x and y of the first and the last pixel.

    Example::

        >>> mask = torch.zeros(1, 8, 8, dtype=torch.bool)
        >>> mask[0, 2:5, 1:7] = True
        >>> boxes_of(mask)
        tensor([[1., 2., 6., 4.]])
    """
    spans = []
    for axis in (1, 2):  # columns used, then rows used
        used = masks.any(dim=axis).float()
        spans.append((used.argmax(dim=1), used.shape[1] - 1 - used.flip(1).argmax(dim=1)))
    (left, right), (top, bottom) = spans
    return torch.stack((left, top, right, bottom), dim=1).float()


def noised_boxes(
    boxes: torch.Tensor, size: tuple[int, int], generator: torch.Generator, far_off: torch.Tensor
) -> torch.Tensor:
    """Move each side by Gaussian noise of 3 % of the box's length, at most 5 % of the image (SAM: 10 %, 20 of 1024).

    The boxes are first enlarged by 0.8 to 2.3 % of the image on all sides, as users draw them. More noise would make
    the boxes of a thin ring and of its inside the same. Boxes that are ``far_off`` get six times as much.
    """
    lengths = (boxes[:, 2:] - boxes[:, :2] + 1).repeat(1, 2)
    padding = max(size) * (0.008 + 0.015 * torch.rand((len(boxes), 1), generator=generator))
    boxes = boxes + padding * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    limit = 0.05 * torch.tensor([size[1], size[0]], dtype=boxes.dtype).repeat(2)
    factor = 1.0 + 5.0 * far_off[:, None]
    noise = torch.randn(boxes.shape, generator=generator) * 0.03 * lengths * factor
    boxes = boxes + torch.minimum(torch.maximum(noise, -limit * factor), limit * factor)
    edge = torch.tensor([size[1] - 1, size[0] - 1], dtype=boxes.dtype)
    corners = boxes.unflatten(1, (2, 2)).sort(dim=1).values
    return torch.minimum(corners.clamp(min=0), edge).flatten(1)


def sample_points(regions: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw one pixel (P, 2), x and y, uniformly from each region (P, H, W) bool; the first pixel of empty regions."""
    lottery = torch.rand(regions.shape, generator=generator).clamp(min=1e-6) * regions
    index = lottery.flatten(1).argmax(dim=1)
    return torch.stack((index % regions.shape[2], index // regions.shape[2]), dim=1).float()


def corrections(
    predicted: torch.Tensor, masks: torch.Tensor, generator: torch.Generator, wrong: float = 0.05
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the next click (P, 1, 2) and its code (P, 1): a pixel of the error, on the object if the pixel was missed.

    A fraction ``wrong`` of the clicks has the opposite code. Without errors the click is on the object.
    """
    error = predicted != masks
    region = torch.where(error.flatten(1).any(dim=1)[:, None, None], error, masks)
    points = sample_points(region, generator)
    rows, x, y = torch.arange(len(masks)), *points.long().unbind(1)
    missed = masks[rows, y, x]
    mistaken = torch.rand(len(masks), generator=generator) < wrong
    return points[:, None], (missed ^ mistaken).long()[:, None]


def corrupted_masks(
    masks: torch.Tensor, others: torch.Tensor, size: tuple[int, int], generator: torch.Generator, wrong: float
) -> torch.Tensor:
    """Logits (P, h, w) like those of a student that has hardly begun.

    The mask is shifted and more or less blurred, spills over a part of the other object, has holes and islands, is
    over- or underconfident, has an offset, and is nearly empty in a sixth of the prompts.
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand((len(masks), 1, 1), generator=generator)

    def blotches(cells: int) -> torch.Tensor:
        grid = torch.randn((len(masks), 1, cells, cells), generator=generator)
        return F.interpolate(grid, size=size, mode="bicubic")[:, 0]

    coarse, other = (F.interpolate(x[:, None].float(), size=size, mode="area")[:, 0] for x in (masks, others))
    spilled = torch.maximum(coarse, other * (uniform(0, 1) < wrong) * (blotches(4) > -0.5))
    blurred = F.avg_pool2d(spilled[:, None], kernel_size=7, stride=1, padding=3)[:, 0]
    spilled = spilled + uniform(0, 1) * (uniform(0, 1) < 0.5) * (blurred - spilled)
    reach = 0.08 * uniform(0, 1) ** 2
    shift = torch.randn((len(masks), 2), generator=generator) * reach[:, 0]
    turn = torch.eye(2).expand(len(masks), 2, 2)
    grid = F.affine_grid(torch.cat((turn, 2 * shift[..., None]), dim=2), [len(masks), 1, *size], align_corners=False)
    moved = F.grid_sample(spilled[:, None], grid, align_corners=False)[:, 0]
    noise = uniform(0, 0.5) * blotches(8) + uniform(0, 0.3) * blotches(16)
    emptied = (uniform(0, 1) < 1 / 6) * uniform(0.3, 0.8)
    return uniform(4, 24) * (moved - 0.5 + noise - emptied) + uniform(-2, 2)
