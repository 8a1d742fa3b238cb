"""A trained network as the teacher: frozen, its classes mapped onto the student's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from torch import Tensor, nn

from knowsam_monai.errors import KnowSAMFileNotFoundError, KnowSAMValueError
from knowsam_monai.teachers.bundle_network import (
    MODEL,
    TORCHSCRIPT,
    build_bundle_network,
    check_bundle,
    read_bundle_facts,
)
from knowsam_monai.tensors import at_least_float32, class_logits, without_meta


class NetworkTeacher(nn.Module):
    """
    Any segmentation network that was trained before: a big model, another lab's, a bundle of the Model Zoo.

    .. math:: Y_c = \\log \\sum_{k \\in K_c} e^{z_k}

    z are the network's logits and K_c the channels that make class c of the student. The softmax of Y is the sum of the
    network's probabilities over those channels. The network is frozen, in place, and stays in eval mode. The prompt is
    ignored: no weight and no student changes what it says of an image, so it needs no optimizer.

    For a 2D network and a 3D student take ``SliceTeacher(NetworkTeacher(...))``.

    Args:
        network: ``f(image) -> logits`` (B, K, *spatial) of a softmax, or one channel of a sigmoid, which counts as the
            two channels background and foreground. Several sigmoid channels that overlap do not fit.
        channels: for each class of the student the network's channel, or those to merge, every channel once;
            ``channels=4`` means 0 to 3 in order. For a sigmoid student one entry, the foreground; the rest is
            background.
        patch_size: what the network was trained on. An image is then cut into such windows, which are blended by a
            Gaussian, and a smaller one is padded with 0. None: the whole image.
        overlap: of these windows, 0..1.
        windows_per_call: how many windows go through the network at once.
        normalize: what the network wants instead of 0..1: "z_score" (each channel of each image to mean 0 and standard
            deviation 1, as nnU-Net does for MR), or a callable (B, channels, *spatial) -> the same.
        pretrained, pretrained_on, license: what is known of the weights, for preflight and report. Check whether the
            network was trained on patients of your test set.

    Shape:
        - image: (B, channels, *spatial), 0..1; prompt_logits: (B, C, *spatial), ignored.
        - output: (B, C, *spatial), float32 (float64 for a float64 network)

    Raises:
        ValueError: when an argument is none of the above, or the network's channels or its output's size do not fit.

    Example::

        >>> from monai.networks.nets import BasicUNet
        >>> network = BasicUNet(spatial_dims=2, out_channels=4, features=(8, 8, 8, 8, 8, 8))
        >>> teacher = NetworkTeacher(network, channels=[0, (1, 2), 3])     # its classes 1 and 2 are the student's 1
        >>> teacher(torch.rand(2, 1, 32, 32), torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        network: nn.Module,
        channels: int | Sequence[int | Sequence[int]],
        patch_size: Sequence[int] | None = None,
        overlap: float = 0.5,
        windows_per_call: int = 4,
        normalize: str | Callable[[Tensor], Tensor] | None = None,
        pretrained: bool = True,
        pretrained_on: str | None = None,
        license: str | None = None,
    ) -> None:
        super().__init__()
        if not (normalize is None or normalize == "z_score" or callable(normalize)):
            raise KnowSAMValueError(f"`normalize` must be 'z_score', a callable or None but is {normalize!r}.")
        self.channels = _groups(channels)
        self.num_classes = len(self.channels)
        self.network = network
        for parameter in network.parameters():  # `requires_grad_` of a TorchScript module raises
            parameter.requires_grad_(False)
        self.patch_size = None if patch_size is None else tuple(patch_size)
        self.normalize = normalize
        self.pretrained, self.pretrained_on, self.license = pretrained, pretrained_on, license
        self.inferer: Inferer = SimpleInferer()
        if patch_size is not None:
            self.inferer = SlidingWindowInferer(self.patch_size, windows_per_call, overlap, mode="gaussian")
        self.eval()

    @classmethod
    def from_torchscript(
        cls, path: str | os.PathLike[str], channels: int | Sequence[int | Sequence[int]], **options: Any
    ) -> NetworkTeacher:
        """
        The teacher of a TorchScript file (.ts), such as `ckpt_export` of a bundle makes.

        Such a file is a program of torch's operators. It holds no Python, so loading it runs none; but it computes what
        its author wrote, so take it from whom you trust.

        Args:
            path: of the file.
            channels, options: as above.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is no TorchScript.

        Example::

            teacher = NetworkTeacher.from_torchscript("models/model.ts", channels=(0, 3, 2, 1))
        """
        if not Path(path).is_file():
            raise KnowSAMFileNotFoundError(f"`path` must be a TorchScript file but {path} does not exist.")
        try:
            network = torch.jit.load(path, map_location="cpu")
        except RuntimeError as error:
            raise KnowSAMValueError(
                f"`path` must be a TorchScript file but {path} is none or damaged; a `state_dict` (.pt) needs its "
                "network: `NetworkTeacher(network, ...)` or `from_bundle`."
            ) from error
        return cls(network, channels, **options)

    @classmethod
    def from_bundle(
        cls, path: str | os.PathLike[str], channels: int | Sequence[int | str | Sequence[int | str]], **options: Any
    ) -> NetworkTeacher:
        """
        The teacher of a bundle's folder, as `monai.bundle download` or a training leaves it; nothing is downloaded.

        Its config is code, so only `network_def` is read, and refused if it is more than plain values; the weights are
        ``models/model.pt``, read without running what it may hold, or else ``models/model.ts``. Patch size, data source
        and license come from the bundle's ``metadata.json`` and LICENSE unless you give them. Its preprocessing is not
        read: say with `normalize` if it wants other values than 0..1.

        Args:
            path: of the folder.
            channels, options: as above. Instead of numbers, channels may have the names of the bundle's `channel_def`.

        Raises:
            FileNotFoundError: when the folder, its config or its weights are missing.
            ValueError: when its network can't be built from plain values, the weights do not fit it, or a name is
                unknown.

        Example::

            teacher = NetworkTeacher.from_bundle(
                "ventricular_short_axis_3label", channels=["background", "rv_pool", "myocardium", "lv_pool"]
            )
        """
        folder = check_bundle(path)
        facts = read_bundle_facts(folder)
        if not isinstance(channels, int):
            channels = [[_number(name, facts.channel_names, folder) for name in _several(entry)] for entry in channels]
        options = {
            "patch_size": facts.patch_size,
            "pretrained_on": facts.data_source,
            "license": facts.license,
        } | options
        if (folder / MODEL).is_file():
            return cls(build_bundle_network(folder), channels, **options)
        return cls.from_torchscript(folder / TORCHSCRIPT, channels, **options)

    def train(self, mode: bool = True) -> NetworkTeacher:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor, prompt_logits: Tensor | None = None) -> Tensor:
        image = without_meta(image)
        logits = self.inferer(self._normalized(image), self.network)
        if not isinstance(logits, Tensor):
            raise KnowSAMValueError(
                f"`network` must give one tensor but gives a {type(logits).__name__}; wrap it in a module that returns "
                "its finest logits."
            )
        logits = at_least_float32(logits)
        if len(logits) != len(image) or logits.shape[2:] != image.shape[2:]:
            raise KnowSAMValueError(
                f"`network` must give logits of the image's rows and size, {tuple(image.shape)}, but gives "
                f"{tuple(logits.shape)}; give its `patch_size`, or wrap it in a module that resizes."
            )
        return self._classes(class_logits(logits))

    def _classes(self, logits: Tensor) -> Tensor:
        used = [channel for group in self.channels for channel in group]
        everything = list(range(logits.shape[1]))
        if self.num_classes == 1 and set(used) < set(everything):
            rest = [channel for channel in everything if channel not in used]
            return _merged(logits, self.channels[0]) - _merged(logits, rest)
        if sorted(used) != everything:
            raise KnowSAMValueError(
                f"`channels` must name each of the network's {len(everything)} channels once but are {self.channels}; "
                "merge what the student has no class for into its background."
            )
        return torch.cat([_merged(logits, group) for group in self.channels], dim=1)

    def _normalized(self, image: Tensor) -> Tensor:
        if self.normalize == "z_score":
            dims = tuple(range(2, image.ndim))
            deviation, mean = torch.std_mean(image, dim=dims, keepdim=True)
            return (image - mean) / deviation.clamp(min=1e-8)
        return self.normalize(image) if callable(self.normalize) else image


def _merged(logits: Tensor, group: Sequence[int]) -> Tensor:
    return torch.logsumexp(logits[:, list(group)], dim=1, keepdim=True)


def _groups(channels: int | Sequence[int | Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    groups = [(channel,) for channel in range(channels)] if isinstance(channels, int) else map(_several, channels)
    groups = tuple(tuple(group) for group in groups)
    used = [channel for group in groups for channel in group]
    valid = all(type(channel) is int and channel >= 0 for channel in used)
    if not groups or not all(groups) or not valid or len(set(used)) < len(used):
        raise KnowSAMValueError(
            "`channels` must have for each class one or more channels of the network, 0 or above and none twice, but "
            f"are {channels!r}."
        )
    return groups


def _several(entry: Any) -> Sequence[Any]:
    return entry if isinstance(entry, Sequence) and not isinstance(entry, str) else (entry,)


def _number(name: int | str, names: dict[str, int], folder: Path) -> int:
    if isinstance(name, str) and name not in names:
        raise KnowSAMValueError(
            f"`channels` must be among {', '.join(names) or 'numbers'}, the channels of {folder}, but one is {name!r}."
        )
    return names[name] if isinstance(name, str) else name
