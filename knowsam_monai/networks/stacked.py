"""Several networks as one student, for methods that train them jointly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn

from knowsam_monai.arguments import check_types
from knowsam_monai.errors import KnowSAMValueError


class StackedNetworks(nn.Module):
    """Several networks on the same image, each of them a view.

    In train mode the output is the logits of all networks, stacked; in eval mode it is one tensor, as from a plain
    network. :func:`knowsam_monai.tensors.unstack_views` splits the stack. Two networks of the same architecture with
    ``MultiViewCoTraining(views=(0, 1), entropy_weight=0)`` are Cross Pseudo Supervision (CPS).

    Args:
        networks: each returns logits (B, C, *spatial). Initialize them differently.

    Shape:
        - image: (B, in_channels, *spatial)
        - output in train mode: (B, V, C, *spatial), the views in the order of ``networks``
        - output in eval mode: logits (B, C, *spatial) of the first network

    Raises:
        ValueError: if there is no network, or two of them share a parameter.

    Example::

        >>> networks = StackedNetworks([nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1)])
        >>> networks.train()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 2, 4, 8, 8])
        >>> networks.eval()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 4, 8, 8])

    Reference:
        Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021, arXiv:2106.01226.
    """

    @check_types
    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(networks) == 0:
            raise KnowSAMValueError("`networks` must have one network or more but is empty; pass two for CPS.")
        parameters = [id(parameter) for network in networks for parameter in network.parameters()]
        if len(set(parameters)) < len(parameters):
            raise KnowSAMValueError(
                "`networks` must not share parameters but do, so they would teach themselves; build each separately."
            )
        self.networks = nn.ModuleList(networks)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self.networks[0](image)
        return torch.stack([network(image) for network in self.networks], dim=1)
