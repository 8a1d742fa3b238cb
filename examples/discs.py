"""Stand-in for your data: bright discs in noise, 4 images with a label and 12 without."""

import torch
from monai.networks.nets import BasicUNet

from knowsam_monai import SemiSupervisedLoader

SIZE = 64


def draw(num_images, seed):
    """Items with an image (1, 64, 64) of a disc and its label (1, 64, 64)."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    items = []
    for _ in range(num_images):
        row, column, radius = (torch.rand(3, generator=generator) * torch.tensor([24, 24, 8])).tolist()
        label = ((y - row - 20) ** 2 + (x - column - 20) ** 2 < (radius + 8) ** 2).float()[None]
        image = (0.3 + 0.4 * label + 0.1 * torch.randn(label.shape, generator=generator)).clamp(0, 1)
        items.append({"image": image, "label": label})
    return items


def semi_supervised_loader():
    """Batches of 2 labeled images, which come first, and 4 unlabeled: image (6, 1, 64, 64), label (2, 1, 64, 64)."""
    unlabeled = [{"image": item["image"]} for item in draw(12, seed=1)]
    return SemiSupervisedLoader(draw(4, seed=0), unlabeled, labeled_batch_size=2, unlabeled_batch_size=4)


def small_unet():
    """A student for two classes."""
    torch.manual_seed(0)
    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(8, 8, 16, 16, 32, 8))


@torch.no_grad()
def mean_dice(network):
    """Dice of the disc on eight unseen images."""
    network.eval()
    scores = []
    for item in draw(8, seed=2):
        prediction, label = network(item["image"][None]).argmax(1) == 1, item["label"] == 1
        scores.append(2 * (prediction & label).sum() / (prediction.sum() + label.sum()))
    return torch.stack(scores).mean().item()
