"""Every Python block of the documentation runs as printed, after what its page asks the reader to have."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from monai.engines import SupervisedTrainer
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet, UNet

from knowsam_monai import NetworkTeacher, PartiallyLabeledLoss, SAMDistiller, SAMTeacher, check_teacher
from knowsam_monai.teachers import build_sam
from tests.teachers.test_network_teacher import VENTRICULAR, VENTRICULAR_METADATA

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs" / "source").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
SAM_FILE = "sam_vit_b_01ec64.pth"


def blocks():
    """Name ("attach-2" is the second of attach.md) and source of each block."""
    for page in PAGES:
        found = re.findall(r"^( *)```python\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for number, (_, source) in enumerate(found, 1):
            yield f"{page.stem.lower()}-{number}", textwrap.dedent(source)


BLOCKS = dict(blocks())


@pytest.fixture(scope="module")
def sam_file(tmp_path_factory):
    """A file as Meta's, with random weights."""
    path = tmp_path_factory.mktemp("sam") / SAM_FILE
    torch.save(build_sam("vit_b", image_size=1024).state_dict(), path)
    yield path
    path.unlink()


class Reader:
    """What a reader has before a block, and what they do after it; one method each for the blocks that need it."""

    def __init__(self, folder, monkeypatch, sam_file):
        self.folder, self.monkeypatch, self.sam_file = folder, monkeypatch, sam_file

    def before(self, block):
        return getattr(self, f"before_{block.replace('-', '_')}", dict)()

    def after(self, block, names):
        getattr(self, f"after_{block.replace('-', '_')}", lambda names: None)(SimpleNamespace(**names))

    # attach SKD to a trainer

    def before_attach_1(self):
        (self.folder / SAM_FILE).symlink_to(self.sam_file())
        return {}

    def after_attach_1(self, names):
        assert names.distiller.optimizer is names.sam_optimizer

    def before_attach_2(self):
        names = self.training(num_classes=2)
        return {**names, "student_optimizer": names["optimizer"]}

    def after_attach_2(self, names):
        self.step(names, next(iter(names.loader))["image"])

    before_recipes_1 = before_attach_1

    def after_recipes_1(self, names):
        assert names.teacher.slices == 8 and names.distiller.teacher is names.teacher

    def before_recipes_2(self):
        return {**self.training(num_classes=2), "labeled_bs": 4}

    def after_recipes_2(self, names):
        image, label = torch.rand(8, 1, 32, 32), torch.randint(2, (8, 32, 32))
        mixed = torch.where(torch.arange(32) < 20, image[:2], image[4:6])
        names.skd.next_batch({"image": image, "label": label})
        _, sam_label, num_labeled = names.select({"image": image, "label": label}, mixed)
        assert num_labeled == 2 and torch.equal((sam_label == names.IGNORED).any((0, 1, 2)), torch.arange(32) >= 20)
        self.step(names, mixed)

    def before_recipes_3(self):
        labeled = torch.utils.data.DataLoader([{"image": torch.rand(1, 32, 32), "label": torch.ones(1, 32, 32)}] * 4, 2)
        return {**self.training(num_classes=2), "labeled_loader": labeled}

    def after_recipes_3(self, names):
        batch = next(iter(names.labeled_loader))
        self.step(names, torch.cat([batch["image"], torch.rand(3, 1, 32, 32)]))

    def before_recipes_4(self):
        return {**self.training(num_classes=2), "torch": torch}

    def after_recipes_4(self, names):
        image = torch.rand(2, 1, 32, 32)
        names.skd = names.distiller.attach(names.student, names.optimizer, select=names.select)
        names.skd.next_batch({"image": image, "label": torch.ones(2, 1, 32, 32)})
        self.step(names, image)
        assert names.select({"image": image}, torch.rand(3, 1, 32, 32))[1:] == (None, None)

    def before_recipes_5(self):
        names = self.training(num_classes=2)
        names["distiller"] = SAMDistiller(names["teacher"], names["sam_optimizer"])
        labeled, unlabeled, label = (torch.rand(rows, 1, 32, 32) for rows in (2, 3, 2))
        logits = {"labeled_logits": names["student"](labeled), "unlabeled_logits": names["student"](unlabeled)}
        data = {"labeled": labeled, "unlabeled": unlabeled, "label": label.round(), "step": 10}
        return {**names, **data, **logits, "loss": torch.zeros(()), "torch": torch}

    def after_recipes_5(self, names):
        assert names.loss > 0 and names.distiller.gate.num_measured == 1

    before_recipes_6 = before_attach_1

    def after_recipes_6(self, names):
        pred, label = torch.zeros(2, 3, 8, 8, 4), torch.ones(1, 3, 8, 8, 4)
        assert names.distiller.overlapping and 0 < names.supervised_loss(pred, label) < 1

    def training(self, num_classes):
        self.monkeypatch.syspath_prepend(str(ROOT / "examples"))
        from discs import semi_supervised_loader, small_unet

        student = small_unet()
        teacher = SAMTeacher(num_classes, 32, variant="stand_in", checkpoint="procedural")
        sam_optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-3)
        return {
            "student": student,
            "optimizer": torch.optim.Adam(student.parameters(), lr=1e-2),
            "loader": semi_supervised_loader(),
            "teacher": teacher,
            "sam_optimizer": sam_optimizer,
            "distiller": SAMDistiller(teacher, sam_optimizer, gate="none"),
        }

    def step(self, names, image):
        optimizer = names.optimizer
        optimizer.zero_grad()
        names.student.train()(image).square().mean().backward()
        optimizer.step()
        assert names.skd.terms["sam_loss"] > 0 and names.sam_optimizer.state

    # your own data

    def before_own_data_1(self):
        (self.folder / "scans").mkdir()
        for name in ("a_image", "a_label", "b_image", "b_label", "c_image"):
            (self.folder / "scans" / f"{name}.nii.gz").touch()
        return {}

    def after_own_data_1(self, names):
        datalist = json.loads((self.folder / "scans" / "list.json").read_text())
        assert datalist["labeled"] == [{"image": "a_image.nii.gz", "label": "a_label.nii.gz"}]
        assert datalist["validation"] == [{"image": "b_image.nii.gz", "label": "b_label.nii.gz"}]
        assert datalist["unlabeled"] == [{"image": "c_image.nii.gz"}]

    # teachers

    def before_teachers_1(self):
        (self.folder / "models").mkdir()
        (self.folder / "models" / SAM_FILE).symlink_to(self.sam_file())
        return {}

    def before_teachers_2(self):
        pytest.importorskip("transformers", reason="SAM 2 needs the extra `sam2`")
        from knowsam_monai.teachers.sam2_model import build_sam2

        build_sam2("tiny").save_pretrained(self.folder / "models" / "sam2.1-hiera-tiny")
        return {}

    def before_teachers_3(self):
        bundle = self.folder / "ventricular_short_axis_3label"
        for name, content in (("inference", VENTRICULAR), ("metadata", VENTRICULAR_METADATA)):
            (bundle / "configs").mkdir(parents=True, exist_ok=True)
            (bundle / "configs" / f"{name}.json").write_text(json.dumps(content))
        (bundle / "models").mkdir()
        options = {name: VENTRICULAR["network_def"][name] for name in ("channels", "strides", "num_res_units")}
        torch.save(UNet(2, 1, 4, **options).state_dict(), bundle / "models" / "model.pt")
        return {}

    def after_teachers_3(self, names):
        assert names.teacher.channels == ((0,), (3,), (2,), (1,))

    def before_teachers_4(self):
        return {"network": BasicUNet(spatial_dims=2, out_channels=4, features=(8, 8, 8, 8, 8, 8))}

    def before_teachers_5(self):
        class Predictor:  # tests/examples/test_nnunet.py runs this block with the real one
            def __init__(self, device):
                self.label_manager = SimpleNamespace(num_segmentation_heads=4)

            def initialize_from_trained_model_folder(self, folder, use_folds, checkpoint_name):
                self.network = BasicUNet(spatial_dims=2, out_channels=4, features=(8, 8, 8, 8, 8, 8))
                self.configuration_manager = SimpleNamespace(patch_size=[32, 32])

        self.nnunet("inference.predict_from_raw_data", nnUNetPredictor=Predictor)
        return {"folder": "nnUNet_results"}

    def after_teachers_5(self, names):
        check_teacher(names.teacher, torch.rand(2, 1, 48, 48), num_classes=4)

    def before_teachers_6(self):
        network = BasicUNet(spatial_dims=2, out_channels=4, features=(8, 8, 8, 8, 8, 8))
        return {"teacher": NetworkTeacher(network, channels=4), "image": torch.rand(2, 1, 32, 32)}

    # nnU-Net: tests/examples/test_nnunet.py trains both trainers where nnU-Net is installed

    def before_nnunet_1(self):
        trainer = type("nnUNetTrainer", (), {})
        self.nnunet("training.nnUNetTrainer.nnUNetTrainer", nnUNetTrainer=trainer)
        name = "nnUNetTrainerNoDeepSupervision"
        module = f"training.nnUNetTrainer.variants.network_architecture.{name}"
        self.nnunet(module, **{name: type(name, (trainer,), {})})
        self.monkeypatch.syspath_prepend(str(ROOT / "examples"))
        self.monkeypatch.delitem(sys.modules, "nnunet_trainer", raising=False)
        return {"__name__": "example"}

    before_nnunet_2 = before_nnunet_1

    def after_nnunet_2(self, names):
        self.monkeypatch.setattr(sys.modules["nnunet_trainer"].WithSKD, "on_train_start", lambda self: None)
        trainer = names.nnUNetTrainerCTSKD()
        statistics = {"mean": 100.0, "std": 50.0, "percentile_00_5": 0.0, "percentile_99_5": 300.0}
        trainer.plans_manager = SimpleNamespace(foreground_intensity_properties_per_channel={"0": statistics})
        trainer.on_train_start()
        assert (trainer.to_rgb.low, trainer.to_rgb.high) == (-2, 4)

    def nnunet(self, module, **content):
        """A module of nnU-Net with what a block needs of it."""
        parts = f"nnunetv2.{module}".split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[:length])
            self.monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or ModuleType(name))
        vars(sys.modules[f"nnunetv2.{module}"]).update(content)

    # contributing

    def after_contributing_1(self, names):
        self.monkeypatch.syspath_prepend(str(ROOT / "examples"))
        from discs import semi_supervised_loader, small_unet

        network = small_unet()
        trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=1,
            train_data_loader=semi_supervised_loader(),
            network=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
            loss_function=PartiallyLabeledLoss(DiceCELoss(to_onehot_y=True, softmax=True)),
            train_handlers=[names.MyMethod(weight=lambda iteration: 0.1)],
            decollate=False,
        )
        trainer.run()
        assert trainer.state.output["my_loss"] > 0

    def after_contributing_2(self, names):
        check_teacher(names.MyTeacher(), torch.rand(2, 1, 32, 32), num_classes=4)


def test_every_setup_belongs_to_a_block():
    names = {re.sub("^(before|after)_", "", name) for name in vars(Reader) if name.startswith(("before_", "after_"))}
    assert names <= {block.replace("-", "_") for block in BLOCKS} and len(BLOCKS) >= 17


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs_as_printed(block, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    reader = Reader(tmp_path, monkeypatch, lambda: request.getfixturevalue("sam_file"))
    names = {"__name__": "example", **reader.before(block)}
    exec(compile(BLOCKS[block], f"<{block}>", "exec"), names)
    names.pop("__builtins__")
    reader.after(block, names)
