"""Forward passes of the averaged student on noisy images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from knowsam_monai import ranks
from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError
from knowsam_monai.networks.ema_student import EMAStudent
from knowsam_monai.seeds import derive_seed, kept_random_state, seed_torch


class NoisyPasses:
    """
    Logits of the averaged student for noisy images; each pass draws new clipped Gaussian noise.

    .. math:: z_k = f_{\\theta'}(x + \\text{clip}(\\sigma \\epsilon_k, -b, b)), \\qquad \\epsilon_k \\sim N(0, 1)

    The noise is a function of (seed, iteration, row of the whole batch over all ranks), and dropout of (seed,
    iteration, rank). The global random generators are restored, so the student's own draws do not change.

    Args:
        ema_student: the averaged student.
        mode: "dropout", "eval" or "train", see :meth:`knowsam_monai.networks.EMAStudent.logits`.
        noise_std: sigma, in the image's unit (images in 0..1); SSL4MIS uses 0.1.
        noise_clip: b; SSL4MIS uses 0.2.
        seed: 0 or more.
        passes_at_once: number of passes that go through the network as one batch; None: all. Fewer need less memory but
            change what dropout draws and, in "train" mode, the batch statistics.

    Raises:
        ValueError: if an argument is out of its range.

    Example::

        >>> network = nn.Conv2d(1, 4, 1)
        >>> passes = NoisyPasses(EMAStudent(network, torch.optim.SGD(network.parameters(), lr=0.1)), mode="eval")
        >>> passes(torch.rand(2, 1, 8, 8), iteration=1, num_passes=8).shape
        torch.Size([8, 2, 4, 8, 8])

    Reference: Yu et al., UA-MT, MICCAI 2019, arXiv:1907.07034; noise as in SSL4MIS.
    """

    @check_types
    def __init__(
        self,
        ema_student: EMAStudent,
        mode: str = "dropout",
        noise_std: float = 0.1,
        noise_clip: float = 0.2,
        seed: int = 0,
        passes_at_once: int | None = None,
    ) -> None:
        ema_student.check_mode(mode)
        if noise_std < 0 or noise_clip < 0:
            raise KnowSAMValueError(
                f"`noise_std` and `noise_clip` must be at least 0 but are {noise_std} and {noise_clip}."
            )
        if passes_at_once is not None and passes_at_once < 1:
            raise KnowSAMValueError(f"`passes_at_once` must be at least 1, or None for all, but is {passes_at_once}.")
        self.ema_student = ema_student
        self.mode = mode
        self.noise_std = noise_std
        self.noise_clip = noise_clip
        self.seed = seed
        self.passes_at_once = passes_at_once

    def __call__(
        self,
        image: Tensor,
        iteration: int,
        num_passes: int = 1,
        inferer: Callable[[Tensor, nn.Module], Tensor] | None = None,
    ) -> Tensor:
        """Logits (num_passes, B, C, *spatial) for an image (B, channels, *spatial), without a graph."""
        noisy = image + self.noise(image, iteration, num_passes)
        seed = derive_seed(self.seed, iteration, ranks.rank(), 1)  # 1: another stream than the noise
        with kept_random_state():
            seed_torch(image.device, seed)
            logits = [
                self.ema_student.logits(chunk.flatten(0, 1), self.mode, inferer)
                for chunk in noisy.split(self.passes_at_once or num_passes)
            ]
        return torch.cat(logits).unflatten(0, (num_passes, len(image)))

    def noise(self, image: Tensor, iteration: int, num_passes: int = 1) -> Tensor:
        """Noise (num_passes, B, channels, *spatial) for an image (B, channels, *spatial)."""
        first_row = ranks.rank() * len(image)
        rows = [
            torch.randn(
                (num_passes, *image.shape[1:]),
                generator=torch.Generator(image.device).manual_seed(derive_seed(self.seed, iteration, first_row + row)),
                dtype=image.dtype,
                device=image.device,
            )
            for row in range(len(image))
        ]
        return torch.stack(rows, dim=1).mul_(self.noise_std).clamp_(-self.noise_clip, self.noise_clip)
