"""Small stand-ins shared by the tests of the distiller and the handlers."""

from __future__ import annotations

import torch
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from knowsam_monai.distillation.distiller import SAMDistiller


class ToyTeacher(nn.Module):
    """A promptable teacher: one convolution of the image plus one of the prompt, row by row."""

    def __init__(self, num_classes: int = 3, spatial_dims: int = 2) -> None:
        super().__init__()
        conv = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        self.num_classes = num_classes
        self.image_conv = conv(1, num_classes, 3, padding=1)
        self.prompt_conv = conv(num_classes, num_classes, 1)

    def forward(self, image: Tensor, prompt_logits: Tensor) -> Tensor:
        return self.image_conv(image) + self.prompt_conv(prompt_logits)


class RegionTeacher(ToyTeacher):
    """One whose channels are independent of each other, as are those of a convolution of one channel."""

    def __init__(self, num_regions: int = 3, spatial_dims: int = 2) -> None:
        super().__init__(num_regions, spatial_dims)
        self.prompt_conv = type(self.prompt_conv)(num_regions, num_regions, 1, groups=num_regions)


def region_of(network: nn.Module, kind: type[nn.Module], region: int) -> nn.Module:
    """The network of one channel that this channel of a network is; `kind` builds it."""
    single = kind().to(next(network.parameters()).dtype)
    single.load_state_dict({name: value[region : region + 1] for name, value in network.state_dict().items()})
    return single


def region_batches(num: int = 3, num_regions: int = 3, size: tuple[int, ...] = (8, 8), **kwargs) -> list[dict]:
    """Batches with a label of 0 and 1 for each of several regions, independent of each other."""
    generator = torch.Generator().manual_seed(1)
    batches = toy_batches(num, size=size, **kwargs)
    for batch in batches:
        shape = (len(batch["label"]), num_regions, *size)
        batch["label"] = torch.randint(2, shape, generator=generator).double()
    return batches


class ToyStudent(nn.Module):
    """Two norm-free views and their mean: stacked (mean, first, second) in train mode, the mean alone in eval mode."""

    def __init__(self, num_classes: int = 3, spatial_dims: int = 2) -> None:
        super().__init__()
        conv = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        self.first = conv(1, num_classes, 3, padding=1)
        self.second = conv(1, num_classes, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        first, second = self.first(image), self.second(image)
        fused = (first + second) / 2
        return torch.stack([fused, first, second], dim=1) if self.training else fused


def distiller_of(teacher: nn.Module, **kwargs) -> SAMDistiller:
    """Teaches both views of a `ToyStudent`."""
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    return SAMDistiller(teacher, optimizer, taught_views=(1, 2), **{"gate": "none", **kwargs}).train()


def toy_batches(
    num: int = 3, num_labeled: int = 2, num_unlabeled: int = 2, num_classes: int = 3, size: tuple[int, ...] = (8, 8)
) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.rand((num_labeled + num_unlabeled, 1, *size), generator=generator, dtype=torch.float64),
            "label": torch.randint(num_classes, (num_labeled, 1, *size), generator=generator).double(),
        }
        for _ in range(num)
    ]


def toy_trainer(
    network: nn.Module, batches: list, loss, handlers: list, lr: float = 0.1, **kwargs
) -> SupervisedTrainer:
    """A real MONAI trainer over the given batches, one epoch, on the CPU."""
    return SupervisedTrainer(
        device=kwargs.pop("device", torch.device("cpu")),
        max_epochs=kwargs.pop("max_epochs", 1),
        train_data_loader=batches,
        network=network,
        optimizer=kwargs.pop("optimizer", None) or torch.optim.SGD(network.parameters(), lr=lr),
        loss_function=loss,
        train_handlers=handlers,
        decollate=False,
        **kwargs,
    )


def with_gradient(*modules: nn.Module) -> set[str]:
    """Names of the parameters with a nonzero gradient."""
    return {
        name
        for module in modules
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }
