"""SKD on nnU-Net v2: `nnUNetv2_train 501 2d 0 -tr nnUNetTrainerSKD`. Unlabeled cases have only the ignore label.

Copy this file into its own folder and set the environment variable `nnUNet_extTrainer` to that folder."""

import os

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from knowsam_monai import IntensityWindow, SAMDistiller, SAMTeacher, SliceTeacher, dice_ce_loss


def finest(outputs):  # of deep supervision
    return outputs[0] if isinstance(outputs, (list, tuple)) else outputs


class WithSKD:  # put it before any trainer: class nnUNetTrainerMineSKD(WithSKD, nnUNetTrainerMine): ...
    variant, image_size, num_slices, gate, to_rgb = "vit_b", 256, 8, "agreement", IntensityWindow(-2, 4)

    def on_train_start(self):
        super().on_train_start()
        labels, is_3d = self.label_manager, len(self.configuration_manager.patch_size) == 3
        if labels.has_regions or not labels.has_ignore_label:
            raise ValueError("dataset.json must have an 'ignore' label and no regions; fill unlabeled cases with it.")
        classes, checkpoint = labels.num_segmentation_heads, os.environ["SAM_CHECKPOINT"]
        sam = SAMTeacher(classes, self.image_size, self.variant, checkpoint, to_rgb=self.to_rgb).to(self.device)
        teacher = SliceTeacher(sam, axes=0, slices=self.num_slices) if is_3d else sam
        optimizer = torch.optim.Adam((p for p in sam.parameters() if p.requires_grad), lr=1e-4)
        sam_loss = dice_ce_loss(classes, ignore_index=labels.ignore_label)
        distiller = SAMDistiller(teacher, optimizer, sam_loss=sam_loss, gate=self.gate)
        options = dict(labeled_rows="all", logits_of=finest)  # unlabeled voxels have the ignore label
        self.skd = distiller.attach(self.network, self.optimizer, scaler=self.grad_scaler, **options)
        self.skd.iteration, self.sam = self.current_epoch * self.num_iterations_per_epoch, (distiller, optimizer)
        if hasattr(self, "resumed_from"):
            for part, state in zip(self.sam, torch.load(f"{self.resumed_from}.sam", self.device, weights_only=True)):
                part.load_state_dict(state)

    def train_step(self, batch):
        self.skd.next_batch((batch["data"], finest(batch["target"])))
        return super().train_step(batch) | {name: term.item() for name, term in self.skd.terms.items()}

    def on_train_epoch_end(self, outputs):
        super().on_train_epoch_end(outputs)
        self.print_to_log_file({term: sum(o[term] for o in outputs) / len(outputs) for term in self.skd.terms})

    def save_checkpoint(self, filename):  # with the host's name, and SAM in its own file: inference needs no SKD
        super().save_checkpoint(filename)
        if self.local_rank == 0 and not self.disable_checkpointing:
            host = type(self).__mro__[type(self).__mro__.index(WithSKD) + 1]
            torch.save(torch.load(filename, "cpu", weights_only=False) | {"trainer_name": host.__name__}, filename)
            torch.save([part.state_dict() for part in self.sam], f"{filename}.sam")

    def load_checkpoint(self, filename):
        super().load_checkpoint(filename)
        self.resumed_from = filename


class nnUNetTrainerSKD(WithSKD, nnUNetTrainer): ...
