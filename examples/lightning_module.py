"""SKD on an unchanged Lightning module: a callback attaches it and removes it after training.

Only lines that end in `# SKD` and the marked block belong to SKD. Needs `pip install 'lightning>=2'`.
"""

import torch
from discs import mean_dice, semi_supervised_loader, small_unet
from lightning.pytorch import Callback, LightningModule, Trainer
from monai.losses import DiceCELoss

from knowsam_monai import SAMDistiller, SAMTeacher  # SKD


class Segmenter(LightningModule):
    def __init__(self):
        super().__init__()
        self.network, self.loss = small_unet(), DiceCELoss(to_onehot_y=True, softmax=True)

    def training_step(self, batch, batch_idx):
        return self.loss(self.network(batch["image"])[: len(batch["label"])], batch["label"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


# --- SKD
class Distillation(Callback):
    def __init__(self, distiller, accumulation_steps=None):
        self.distiller, self.accumulation_steps = distiller, accumulation_steps  # steps: of a manual optimization

    def on_train_start(self, trainer, module):
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        steps = self.accumulation_steps or trainer.accumulate_grad_batches
        self.skd = self.distiller.attach(module.network, trainer.optimizers[0], scaler=scaler, accumulation_steps=steps)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.skd.next_batch(batch)

    def on_train_end(self, *args):
        self.skd.remove()

    on_exception = on_train_end


# ---
def main(max_epochs: int = 10) -> float:
    module, callbacks = Segmenter(), []
    # a stand-in, which is not SAM; for real use: variant="vit_b", checkpoint="sam_vit_b_01ec64.pth"  # SKD
    teacher = SAMTeacher(num_classes=2, image_size=64, variant="stand_in", checkpoint="procedural")  # SKD
    sam_optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-3)  # SKD
    callbacks.append(Distillation(SAMDistiller(teacher, sam_optimizer, gate="agreement")))  # SKD
    trainer = Trainer(
        max_epochs=max_epochs, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, semi_supervised_loader())
    return mean_dice(module.network)


if __name__ == "__main__":
    print(f"Dice on unseen images: {main():.3f}")
