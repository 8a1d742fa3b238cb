"""SKD on MONAI's own trainer: one entry in `train_handlers`.

Only lines that end in `# SKD` belong to SKD; without them the trainer runs as before.
"""

import torch
from discs import mean_dice, semi_supervised_loader, small_unet
from monai.engines import SupervisedTrainer
from monai.handlers import StatsHandler
from monai.losses import DiceCELoss

from knowsam_monai import SAMDistillation, SAMDistiller, SAMTeacher  # SKD
from knowsam_monai.losses import PartiallyLabeledLoss  # of the host, so on a line of its own


def main(max_epochs: int = 10) -> float:
    network = small_unet()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    handlers = [StatsHandler(output_transform=lambda output: output["loss"])]

    # a stand-in, which is not SAM; for real use: variant="vit_b", checkpoint="sam_vit_b_01ec64.pth"  # SKD
    teacher = SAMTeacher(num_classes=2, image_size=64, variant="stand_in", checkpoint="procedural")  # SKD
    sam_optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-3)  # SKD
    handlers.append(SAMDistillation(SAMDistiller(teacher, sam_optimizer, gate="agreement")))  # SKD

    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=max_epochs,
        train_data_loader=semi_supervised_loader(),
        network=network,
        optimizer=optimizer,
        loss_function=PartiallyLabeledLoss(DiceCELoss(to_onehot_y=True, softmax=True)),
        train_handlers=handlers,
        decollate=False,
    ).run()
    return mean_dice(network)


if __name__ == "__main__":
    print(f"Dice on unseen images: {main():.3f}")
