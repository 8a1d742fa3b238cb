"""SKD on an Ignite engine without editing its step: hooks on the student, labels from the watched loader.

Only lines that end in `# SKD` belong to SKD; without them the engine runs as before.
"""

import torch
from discs import mean_dice, semi_supervised_loader, small_unet
from ignite.engine import Engine
from monai.losses import DiceCELoss

from knowsam_monai import SAMDistiller, SAMTeacher  # SKD


def main(max_epochs: int = 10) -> float:
    network, loader = small_unet(), semi_supervised_loader()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    supervised_loss = DiceCELoss(to_onehot_y=True, softmax=True)

    def step(engine, batch):
        network.train()
        optimizer.zero_grad()
        logits = network(batch["image"])
        loss = supervised_loss(logits[: len(batch["label"])], batch["label"])
        loss.backward()
        optimizer.step()
        return loss.item()

    # a stand-in, which is not SAM; for real use: variant="vit_b", checkpoint="sam_vit_b_01ec64.pth"  # SKD
    teacher = SAMTeacher(num_classes=2, image_size=64, variant="stand_in", checkpoint="procedural")  # SKD
    sam_optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-3)  # SKD
    skd = SAMDistiller(teacher, sam_optimizer, gate="agreement").attach(network, optimizer)  # SKD
    loader = skd.watch(loader)  # SKD

    Engine(step).run(loader, max_epochs=max_epochs)
    return mean_dice(network)


if __name__ == "__main__":
    print(f"Dice on unseen images: {main():.3f}")
