"""A trained, frozen network as a teacher, with its classes mapped to the student's."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from torch import Tensor, nn

from knowsam_monai.errors import KnowSAMFileNotFoundError, KnowSAMTypeError, KnowSAMValueError, check_counts, error_line
from knowsam_monai.files import expand_path
from knowsam_monai.teachers.bundle_network import (
    MODEL,
    TORCHSCRIPT,
    build_bundle_network,
    check_bundle,
    read_bundle_facts,
)
from knowsam_monai.tensors import are_probabilities, at_least_float32, class_logits, without_meta

logger = logging.getLogger(__name__)


class NetworkTeacher(nn.Module):
    """
    Teach with a trained segmentation network: a large model, another lab's model, or a Model Zoo bundle.

    .. math:: Y_c = \\log \\sum_{k \\in K_c} e^{z_k}

    z are the network's logits, and K_c are the channels that form class c of the student. The softmax of Y sums the
    network's probabilities over these channels. With `overlapping`, Y_c is the one channel of region c. The network is
    frozen in place and stays in eval mode. It ignores the prompt and needs no optimizer.

    For a 2D network and a 3D student use ``SliceTeacher(NetworkTeacher(...))``.

    Args:
        network: ``f(image) -> logits`` (B, K, *spatial) for a softmax, or one sigmoid channel, which counts as two
            channels, background and foreground. For several sigmoid channels see `overlapping`.
        channels: for each class of the student the network's channel, or several channels to merge. Every channel
            appears once; ``channels=4`` means 0 to 3 in order. A sigmoid student has one entry, the foreground; the
            other channels are background.
        overlapping: each channel of the network is a region with a sigmoid of its own, as in BraTS, for
            ``SAMDistiller(overlapping=True)``. `channels` then has one channel for each region of the student; others
            may be left out, but none can be merged.
        patch_size: patch size of the network's training. Images are then processed in Gaussian-weighted windows of this
            size; smaller images are padded with 0. None: the whole image at once.
        overlap: overlap of these windows, 0 or more and below 1.
        windows_per_call: number of windows in one call of the network.
        normalize: input normalization, if the network expects other values than the student: "z_score" (mean 0 and
            standard deviation 1 for each channel of each image, as nnU-Net does for MR), or a callable that preserves
            the shape.
        pretrained, pretrained_on, license: provenance of the weights, for preflight and report. Check whether the
            network was trained on patients of your test set.

    Shape:
        - image: (B, channels, *spatial), as the student sees it; prompt_logits: (B, C, *spatial), ignored.
        - output: (B, C, *spatial), float32 (float64 for a float64 network)

    Raises:
        TypeError: if `network` is not a module.
        ValueError: if an argument is invalid, the network does not take the image, or its channels or output size do
            not fit.

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
        overlapping: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise KnowSAMTypeError(
                f"`network` must be a torch module but is a {type(network).__name__}; for a file use "
                "`from_torchscript`, for a bundle's folder `from_bundle`."
            )
        if not (normalize is None or normalize == "z_score" or callable(normalize)):
            raise KnowSAMValueError(f"`normalize` must be 'z_score', a callable or None but is {normalize!r}.")
        if patch_size is not None and not _is_size(patch_size):
            raise KnowSAMValueError(
                f"`patch_size` must be two or three whole numbers above 0, or None, but is {patch_size!r}."
            )
        if not isinstance(overlap, (int, float)) or not 0 <= overlap < 1:
            raise KnowSAMValueError(f"`overlap` must be a number, 0 or more and below 1, but is {overlap!r}.")
        check_counts(windows_per_call=windows_per_call)
        self.channels = _groups(channels)
        self.num_classes = len(self.channels)
        self._is_number = type(channels) is int
        if overlapping and any(len(group) > 1 for group in self.channels):
            raise KnowSAMValueError(
                f"`channels` must have one channel for each overlapping region but are {channels!r}; probabilities of "
                "a sigmoid cannot be merged."
            )
        self.overlapping = overlapping
        self.network = network
        for parameter in network.parameters():  # `requires_grad_` of a TorchScript module raises
            parameter.requires_grad_(False)
        self.patch_size = None if patch_size is None else tuple(patch_size)
        self.normalize = normalize
        self.pretrained, self.pretrained_on, self.license = pretrained, pretrained_on, license
        self.variant = type(network).__name__
        self.checkpoint: str | None = None
        self._checked_values = False
        self.inferer: Inferer = SimpleInferer()
        if patch_size is not None:
            self.inferer = SlidingWindowInferer(self.patch_size, windows_per_call, overlap, mode="gaussian")
        self.eval()

    @classmethod
    def from_torchscript(
        cls, path: str | os.PathLike[str], channels: int | Sequence[int | Sequence[int]], **options: Any
    ) -> NetworkTeacher:
        """
        Build a teacher from a TorchScript file (.ts), as a bundle's `ckpt_export` writes it.

        A TorchScript file is a program of torch operators. It contains no Python, so loading it runs none, but it
        computes what its author wrote: use files only from sources that you trust.

        Args:
            path: the file.
            channels, options: as above.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if it is not TorchScript.

        Example::

            teacher = NetworkTeacher.from_torchscript("models/model.ts", channels=(0, 3, 2, 1))
        """
        path = expand_path(path, "path")
        if os.path.isdir(path):
            raise KnowSAMValueError(
                f"`path` must be a TorchScript file but {path} is a folder; for a bundle use `from_bundle`."
            )
        if not os.path.exists(path):
            raise KnowSAMFileNotFoundError(f"`path` must be a TorchScript file but {path} does not exist.")
        try:
            network = torch.jit.load(path, map_location="cpu")
        except RuntimeError as error:
            raise KnowSAMValueError(
                f"`path` must be a TorchScript file but {path} is damaged or something else; for a `state_dict` "
                "(.pt) use `NetworkTeacher(network, ...)` or `from_bundle`."
            ) from error
        teacher = cls(network, channels, **options)
        teacher.checkpoint = path
        return teacher

    @classmethod
    def from_bundle(
        cls, path: str | os.PathLike[str], channels: int | Sequence[int | str | Sequence[int | str]], **options: Any
    ) -> NetworkTeacher:
        """
        Build a teacher from a bundle's folder, as `monai.bundle download` or a training run writes it.

        A config is code, so only `network_def` is read, and only if it consists of plain values. The weights are read
        from ``models/model.pt`` without running code, or else from ``models/model.ts``. Patch size, data source and
        license are read from the bundle's ``metadata.json`` and LICENSE unless you pass them. The bundle's
        preprocessing is not read: set `normalize` if its network needs it. Nothing is downloaded.

        Args:
            path: the folder.
            channels, options: as above. Channels may also be names of the bundle's `channel_def`.

        Raises:
            FileNotFoundError: if the folder, its config or its weights are missing.
            ValueError: if the network cannot be built from plain values, if the weights do not fit, or if a name is
                unknown.

        Example::

            teacher = NetworkTeacher.from_bundle(
                "ventricular_short_axis_3label", channels=["background", "rv_pool", "myocardium", "lv_pool"]
            )
        """
        folder = check_bundle(path)
        facts = read_bundle_facts(folder)
        if type(channels) is not int:
            names = [_as_sequence(entry) for entry in _entries(channels)]
            channels = [[_index(name, facts.channel_names, folder) for name in group] for group in names]
        options = {"patch_size": facts.patch_size} | options
        for name, stated in (("pretrained_on", facts.data_source), ("license", facts.license)):
            options[name] = stated if options.get(name) is None else options[name]
        if (folder / MODEL).is_file():
            teacher = cls(build_bundle_network(folder), channels, **options)
        else:
            teacher = cls.from_torchscript(folder / TORCHSCRIPT, channels, **options)
        teacher.checkpoint = os.fspath(folder)
        return teacher

    def train(self, mode: bool = True) -> NetworkTeacher:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor, prompt_logits: Tensor | None = None) -> Tensor:
        image = without_meta(image)
        try:
            logits = self.inferer(self._normalized(image), self.network)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # every network refuses in its own way
            raise KnowSAMValueError(
                f"`network` must take images of shape {tuple(image.shape)} but {self.variant} does not "
                f"({error_line(error)}); {self._remedy(image.ndim - 2)}."
            ) from error
        if not isinstance(logits, Tensor):
            raise KnowSAMValueError(
                f"`network` must return one tensor but returns a {type(logits).__name__}; wrap it in a module that "
                "returns its finest logits."
            )
        logits = at_least_float32(logits)
        if not self._checked_values and not logits.is_meta:
            self._warn_about_probabilities(logits)
        if len(logits) != len(image) or logits.shape[2:] != image.shape[2:]:
            raise KnowSAMValueError(
                f"`network` must return logits of the image's batch and spatial size, {tuple(image.shape)}, but "
                f"returns {tuple(logits.shape)}; set `patch_size`, or wrap it in a module that resizes."
            )
        if self.overlapping:
            return self._student_regions(logits)
        if self.channels == ((0,),) and logits.shape[1] == 1:
            return logits
        if self._is_number and self.num_classes == 1:
            raise KnowSAMValueError(
                f"`channels` must name the foreground for a student of one class, as in [1], but is 1; {self.variant} "
                f"has {logits.shape[1]} channels, and 0 is usually the background."
            )
        return self._student_classes(class_logits(logits))

    def _remedy(self, spatial_dims: int) -> str:
        own = next((weight.ndim - 2 for weight in self.network.parameters() if weight.ndim in (4, 5)), spatial_dims)
        if own < spatial_dims:
            return "put this 2D network into SliceTeacher (in a config: `teacher`), so that it teaches volumes"
        if own > spatial_dims:
            return "use a 2D network, since this one takes volumes, or a 3D student"
        return "give its `patch_size`, and check its input channels"

    def _warn_about_probabilities(self, logits: Tensor) -> None:
        """A softmax of probabilities is almost uniform, so they would teach next to nothing."""
        self._checked_values = True
        if logits.shape[1] > 1 and are_probabilities(logits):
            logger.warning(
                "`network` must return logits but %s returns probabilities, which sum to 1; remove its last softmax, "
                "or take their logarithm.",
                self.variant,
            )

    def _student_regions(self, logits: Tensor) -> Tensor:
        if max(self.channels)[0] >= logits.shape[1]:
            raise KnowSAMValueError(
                f"`channels` must be below {logits.shape[1]}, the network's channels, but are {self.channels}."
            )
        return torch.cat([logits[:, channel : channel + 1] for (channel,) in self.channels], dim=1)

    def _student_classes(self, logits: Tensor) -> Tensor:
        used = [channel for group in self.channels for channel in group]
        all_channels = list(range(logits.shape[1]))
        if self.num_classes == 1 and set(used) < set(all_channels):
            rest = [channel for channel in all_channels if channel not in used]
            background = _merged(logits, rest).clamp(min=-1e30)  # -inf is a certain zero, but +inf would be a breakdown
            return _merged(logits, self.channels[0]) - background
        if sorted(used) != all_channels:
            raise KnowSAMValueError(
                f"`channels` must name each of the network's {len(all_channels)} channels once but are "
                f"{self.channels}; merge channels without a student class into the background."
            )
        return torch.cat([_merged(logits, group) for group in self.channels], dim=1)

    def _normalized(self, image: Tensor) -> Tensor:
        if self.normalize == "z_score":
            dims = tuple(range(2, image.ndim))
            deviation, mean = torch.std_mean(image, dim=dims, keepdim=True)
            return (image - mean) / deviation.clamp(min=1e-8)
        return self.normalize(image) if callable(self.normalize) else image


def _merged(logits: Tensor, group: Sequence[int]) -> Tensor:
    channels = [logits[:, channel : channel + 1] for channel in group]  # a GPU would have to wait for a list of indices
    return channels[0] if len(channels) == 1 else torch.logsumexp(torch.cat(channels, dim=1), dim=1, keepdim=True)


def _groups(channels: int | Sequence[int | Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    groups = tuple(tuple(_as_sequence(entry)) for entry in _entries(channels))
    used = [channel for group in groups for channel in group]
    valid = all(type(channel) is int and channel >= 0 for channel in used)
    if not groups or not all(groups) or not valid or len(set(used)) < len(used):
        raise _no_map(channels)
    return groups


def _no_map(channels: Any) -> KnowSAMValueError:
    return KnowSAMValueError(
        "`channels` must have one or more channels of the network for each class, 0 or above, each only once, but are "
        f"{channels!r}."
    )


def _entries(channels: Any) -> list[Any]:
    """One entry for each class."""
    channels = channels.tolist() if hasattr(channels, "tolist") else channels  # of numpy and torch
    if type(channels) is int:
        return list(range(channels))
    if not isinstance(channels, Sequence) or isinstance(channels, str):
        raise _no_map(channels)
    return list(channels)


def _is_size(size: Any) -> bool:
    return isinstance(size, Sequence) and len(size) in (2, 3) and all(type(side) is int and side > 0 for side in size)


def _as_sequence(entry: Any) -> Sequence[Any]:
    return entry if isinstance(entry, Sequence) and not isinstance(entry, str) else (entry,)


def _index(name: int | str, names: dict[str, int], folder: Path) -> int:
    if isinstance(name, str) and name not in names:
        raise KnowSAMValueError(
            f"`channels` must be among {', '.join(names) or 'numbers'}, the channels of {folder}, but one of them is "
            f"{name!r}."
        )
    return names[name] if isinstance(name, str) else name
