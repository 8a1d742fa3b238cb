"""A made-up training script in the style of SSL4MIS (Mean Teacher); student, optimizer and loader are local variables.

It contains nothing about SKD. `wrapped_script.py` adds SKD to it.
"""

import argparse
import random

import numpy as np
import torch
import torch.nn.functional as F
import torch.optim as optim
from discs import draw, small_unet
from torch.utils.data import DataLoader, Dataset

parser = argparse.ArgumentParser()
parser.add_argument("--max_iterations", type=int, default=30)
parser.add_argument("--labeled_bs", type=int, default=2)
parser.add_argument("--seed", type=int, default=1337)
args = parser.parse_args()


class BaseDataSets(Dataset):
    """16 images, each with a label (H, W); the script uses only the labels of the first 4."""

    def __init__(self):
        self.items = draw(16, seed=0)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return {"image": self.items[index]["image"], "label": self.items[index]["label"][0].long()}


class TwoStreamBatchSampler:
    def __init__(self, labeled, unlabeled, labeled_bs, unlabeled_bs):
        self.streams = [(labeled, labeled_bs), (unlabeled, unlabeled_bs)]

    def __iter__(self):
        streams = [np.random.permutation(indices).reshape(-1, size) for indices, size in self.streams]
        return iter([first + second for first, second in zip(*map(np.ndarray.tolist, streams))])

    def __len__(self):
        return min(len(indices) // size for indices, size in self.streams)


def net_factory():
    return small_unet()


def train(args):
    model, ema_model = net_factory(), net_factory()
    for param in ema_model.parameters():
        param.detach_()
    batch_sampler = TwoStreamBatchSampler(range(4), range(4, 16), args.labeled_bs, 6)
    trainloader = DataLoader(BaseDataSets(), batch_sampler=batch_sampler)
    valloader = DataLoader(BaseDataSets(), batch_size=1)
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0001)
    iter_num = 0
    while iter_num < args.max_iterations:
        for sampled_batch in trainloader:
            model.train()
            volume_batch, label_batch = sampled_batch["image"], sampled_batch["label"]
            outputs = model(volume_batch)
            outputs_soft = torch.softmax(outputs, dim=1)
            with torch.no_grad():
                ema_soft = torch.softmax(ema_model(volume_batch[args.labeled_bs :]), dim=1)
            loss_ce = F.cross_entropy(outputs[: args.labeled_bs], label_batch[: args.labeled_bs])
            loss = loss_ce + 0.1 * torch.mean((outputs_soft[args.labeled_bs :] - ema_soft) ** 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for ema_param, param in zip(ema_model.parameters(), model.parameters()):
                ema_param.data.mul_(0.99).add_(param.data, alpha=0.01)
            iter_num += 1
    model.eval()
    with torch.no_grad():
        errors = [(model(batch["image"]).argmax(1) != batch["label"]).float().mean() for batch in valloader]
    print(f"wrong pixels: {torch.stack(errors).mean():.3f}")
    return model


if __name__ == "__main__":
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    train(args)
