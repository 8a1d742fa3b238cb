"""SKD in a plain PyTorch loop: `follow` before the loop, one line in each step, and one for the gate.

Only lines that end in `# SKD` belong to SKD; without them the loop runs as before.
"""

import torch
from discs import mean_dice, semi_supervised_loader, small_unet
from monai.losses import DiceCELoss

from knowsam_monai import SAMDistiller, SAMTeacher  # SKD


def main(max_epochs: int = 10) -> float:
    network, loader = small_unet(), semi_supervised_loader()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    supervised_loss = DiceCELoss(to_onehot_y=True, softmax=True)

    # a stand-in, which is not SAM; for real use: variant="vit_b", checkpoint="sam_vit_b_01ec64.pth"  # SKD
    teacher = SAMTeacher(num_classes=2, image_size=64, variant="stand_in", checkpoint="procedural")  # SKD
    distiller = SAMDistiller(teacher, torch.optim.Adam(teacher.parameters(), lr=1e-3))  # SKD
    distiller.follow(optimizer)  # SKD

    for epoch in range(max_epochs):
        for batch in loader:
            image, label = batch["image"], batch["label"]  # the first len(label) images have a label
            logits = network(image)
            loss = supervised_loss(logits[: len(label)], label)
            loss = loss + distiller(image, logits, label).loss  # SKD
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        distiller.measure_agreement(network, image, label, turn=epoch)  # is the teacher good enough to teach?  # SKD
    return mean_dice(network)


if __name__ == "__main__":
    print(f"Dice on unseen images: {main():.3f}")
