from __future__ import annotations

import copy

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from torch import nn
from torch.nn import functional as F

from knowsam_monai.handlers.fixmatch import FixMatch
from knowsam_monai.handlers.sam_distillation import SAMDistillation
from knowsam_monai.losses import PartiallyLabeledLoss, SigmoidRampUp, dice_ce_loss
from tests.hosts import CASES, TwoHeads, assert_same_weights, hand_written_run, no_loss, toy_host
from tests.toys import toy_batches, toy_trainer


@pytest.mark.parametrize("num_classes, size", CASES)
@pytest.mark.parametrize("with_sam", [False, True])
def test_three_trainer_steps_equal_hand_written_ones(num_classes, size, with_sam):
    student, batches, distiller = toy_host(num_classes, size)
    other, other_distiller = copy.deepcopy((student, distiller))
    threshold = 0.8 if num_classes == 2 else 0.6
    weight, loss = SigmoidRampUp(3, max=2.0), PartiallyLabeledLoss(dice_ce_loss(num_classes))
    handler = FixMatch(weight, threshold=threshold, start=2)
    handlers = [handler, SAMDistillation(distiller)] if with_sam else [handler]
    trainer = toy_trainer(student, batches, loss, handlers)
    trainer.run()
    terms, fractions = [], []

    def term(t, batch, pred, ema):
        if t == 1:
            return 0.0
        confidence, label = pred[2:, 0].detach().softmax(1).max(1)
        strong = other(batch["image_strong"][2:])[:, 0]
        loss_map = F.cross_entropy(strong, label, reduction="none")[confidence >= threshold]
        fractions.append((confidence >= threshold).float().mean().item())
        terms.append(weight(t) * loss_map.sum() / confidence.numel())
        return terms[-1]

    hand_written_run(other, batches, loss, term, other_distiller.train() if with_sam else None)
    assert_same_weights(student, other)
    assert_same_weights(distiller.teacher, other_distiller.teacher)
    output = trainer.state.output
    torch.testing.assert_close(output["pseudo_label_loss"], terms[-1].detach(), rtol=1e-10, atol=1e-12)
    assert output["sure_fraction"].item() == fractions[-1] and 0.05 < fractions[-1] < 0.95
    assert not output["pseudo_label_loss"].requires_grad and not output["sure_fraction"].requires_grad


def test_gradient_comes_through_the_strong_image_alone():
    student = TwoHeads().double()
    batch = toy_batches(1)[0]
    batch["image_strong"] = torch.zeros_like(batch["image"])  # then body.weight sees nothing
    toy_trainer(student, [batch], no_loss, [FixMatch(threshold=0.0)]).run()
    gradients = {name for name, p in student.named_parameters() if p.grad.abs().sum() > 0}
    assert gradients == {"body.bias", "head.weight", "head.bias"}


def test_one_more_forward_of_the_unlabeled_rows_alone_by_the_trainers_inferer():
    student, batches, _ = toy_host(2, (8, 8))
    seen = []

    class SeeingInferer(SimpleInferer):
        def __call__(self, inputs, network, *args, **kwargs):
            seen.append(len(inputs))
            return super().__call__(inputs, network, *args, **kwargs)

    student.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    loss = PartiallyLabeledLoss(dice_ce_loss(2))
    toy_trainer(student, batches, loss, [FixMatch(start=3)], inferer=SeeingInferer()).run()
    assert seen == [4, 4, 4, 4, 4, 4, 2, 2]


@pytest.mark.parametrize("form", ["unlabeled rows", "meta tensor"])
def test_strong_images_may_be_of_the_unlabeled_rows_alone_and_carry_metadata(form):
    student, batches, _ = toy_host(2, (8, 8))
    other = copy.deepcopy(student)
    for network, change in ((student, None), (other, form)):
        if change == "unlabeled rows":
            batches = [{**batch, "image_strong": batch["image_strong"][2:]} for batch in batches]
        elif change == "meta tensor":
            batches = [{**batch, "image_strong": MetaTensor(batch["image_strong"])} for batch in batches]
        toy_trainer(network, batches, no_loss, [FixMatch(threshold=0.6)]).run()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters()))


def test_distributed_student_steps_as_a_single_one_with_one_forward_of_the_wrapper():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()
    other, batches = copy.deepcopy(student), toy_host(3, (8, 8))[1]
    loss = PartiallyLabeledLoss(dice_ce_loss(3))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        network = nn.parallel.DistributedDataParallel(student, find_unused_parameters=True)
        seen = []
        network.register_forward_hook(lambda module, args, out: seen.append(len(out)))
        toy_trainer(network, batches, loss, [FixMatch(threshold=0.4)]).run()
    finally:
        torch.distributed.destroy_process_group()
    toy_trainer(other, batches, loss, [FixMatch(threshold=0.4)]).run()
    assert_same_weights(student, other)
    assert seen == [4, 4, 4]


@pytest.mark.parametrize("start", [0, 1000])
def test_batch_without_strong_images_is_one_clear_error_at_the_first_step(start):
    student = toy_host(2, (8, 8))[0]
    trainer = toy_trainer(student, toy_batches(1, num_classes=2), no_loss, [FixMatch(start=start)])
    with pytest.raises(ValueError, match="`image_strong` must be in the batch but is not; add a copy of `image`"):
        trainer.run()


@pytest.mark.parametrize(("part", "shape"), [((..., slice(4)), "2, 1, 8, 4"), (slice(3), "3, 1, 8, 8")])
def test_strong_images_of_another_geometry_or_of_other_rows_are_one_clear_error(part, shape):
    student, batches, _ = toy_host(2, (8, 8))
    batches[0]["image_strong"] = batches[0]["image_strong"][part]
    with pytest.raises(ValueError, match=rf"have the shape \(2, 1, 8, 8\) of the unlabeled images but has \({shape}\)"):
        toy_trainer(student, batches, no_loss, [FixMatch()]).run()


def test_bad_threshold_is_an_error():
    with pytest.raises(ValueError, match="`threshold` must be a probability"):
        FixMatch(threshold=95)
