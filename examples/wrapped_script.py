"""SKD in an unchanged script, whose student, optimizer and loader are local to `train()`: wrap what builds them."""

from types import SimpleNamespace

import somebodys_train as script  # without its `__main__` block
import torch

from knowsam_monai import SAMDistiller, SAMTeacher, WatchedLoader

# a stand-in, which is not SAM; for real use: variant="vit_b", checkpoint="sam_vit_b_01ec64.pth"
teacher = SAMTeacher(num_classes=2, image_size=64, variant="stand_in", checkpoint="procedural")
distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.parameters(), lr=1e-3))
networks, loaders = [], []


def keep(built, build, wrap=lambda result: result):
    return lambda *args, **kwargs: built.append(wrap(build(*args, **kwargs))) or built[-1]


def sgd(parameters, **kwargs):  # the network that it steps is the student; the first loader is the training loader
    optimizer = torch.optim.SGD(parameters, **kwargs)
    student = next(n for n in networks if optimizer.param_groups[0]["params"][0] in set(n.parameters()))
    distiller.attach(student, optimizer, select=select, loader=loaders[0])
    return optimizer


def select(batch, image):  # labels (B, H, W) of all rows; SAM may learn from the first `labeled_bs`
    return image, batch["label"][:, None], script.args.labeled_bs


script.net_factory, script.optim = keep(networks, script.net_factory), SimpleNamespace(SGD=sgd)
script.DataLoader = keep(loaders, script.DataLoader, WatchedLoader)
if __name__ == "__main__":
    script.train(script.args)
