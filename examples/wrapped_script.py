"""SKD in an unchanged script whose student, optimizer and loader are local variables of its `train()`.

The functions that build the three are wrapped. The student is the network whose parameters the optimizer steps; the
loader that is built first is the training loader. Importing the script skips its `__main__` block. If that block does
more than call `train`, such as setting seeds, do the same at the end of this file.
"""

from types import SimpleNamespace

import somebodys_train as script
import torch

from knowsam_monai import SAMDistiller, SAMTeacher, WatchedLoader

# a stand-in, which is not SAM; for real use: variant="vit_b", checkpoint="sam_vit_b_01ec64.pth"
teacher = SAMTeacher(num_classes=2, image_size=64, variant="stand_in", checkpoint="procedural")
distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.parameters(), lr=1e-3), gate="agreement")
networks, loaders, build_network, build_loader = [], [], script.net_factory, script.DataLoader


def net_factory(*args, **kwargs):
    networks.append(build_network(*args, **kwargs))
    return networks[-1]


def data_loader(*args, **kwargs):
    loaders.append(WatchedLoader(build_loader(*args, **kwargs)))
    return loaders[-1]


class SGD(torch.optim.SGD):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        student = next(n for n in networks if self.param_groups[0]["params"][0] in set(n.parameters()))
        self.skd = distiller.attach(student, self, select=select, loader=loaders[0])


def select(batch, image):  # labels (B, H, W) of all rows; SAM may learn from the first `labeled_bs`
    return image, batch["label"][:, None], script.args.labeled_bs


script.net_factory, script.optim, script.DataLoader = net_factory, SimpleNamespace(SGD=SGD), data_loader
if __name__ == "__main__":
    script.train(script.args)
