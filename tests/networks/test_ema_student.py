from __future__ import annotations

import copy

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.engines import SupervisedEvaluator
from monai.handlers import CheckpointLoader, CheckpointSaver
from monai.networks.layers import DropPath
from torch import nn

from knowsam_monai.losses import PartiallyLabeledLoss, dice_ce_loss
from knowsam_monai.networks.ema_student import EMAStudent
from tests.toys import ToyStudent, toy_batches, toy_trainer


class Normed(nn.Module):
    """Batch normalization and dropout."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, image):
        return self.last(self.dropout(self.norm(self.first(image))))


def build(network=None, **kwargs):
    torch.manual_seed(0)
    network = (Normed() if network is None else network).double()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return network, optimizer, EMAStudent(network, optimizer, **kwargs)


def step(network, optimizer, batch):
    optimizer.zero_grad()
    network(batch["image"]).square().mean().backward()
    optimizer.step()


def loss():
    return PartiallyLabeledLoss(dice_ce_loss(3))


@pytest.mark.parametrize("warm_up, decays", [(True, (0, 1 / 2, 2 / 3, 0.7, 0.7)), (False, (0.7,) * 5)])
def test_average_is_the_equation(warm_up, decays):
    network, optimizer, ema_student = build(decay=0.7, warm_up=warm_up)
    expected = [p.detach().clone() for p in network.parameters()]
    ema_student.follow()
    for batch, decay in zip(toy_batches(5), decays):
        step(network, optimizer, batch)
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, network.parameters())]
        for averaged, value in zip(ema_student.network.parameters(), expected):
            torch.testing.assert_close(averaged, value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_statistics_of_batch_norm_are_copied_or_averaged_and_counts_copied(buffers):
    network, optimizer, ema_student = build(decay=0.7, warm_up=False, buffers=buffers)
    expected = network.norm.running_var.clone()
    ema_student.follow()
    for batch in toy_batches(3):
        step(network, optimizer, batch)
        expected = 0.7 * expected + 0.3 * network.norm.running_var if buffers == "average" else network.norm.running_var
        torch.testing.assert_close(ema_student.network.norm.running_var, expected, rtol=1e-12, atol=1e-14)
    assert ema_student.network.norm.num_batches_tracked == 3


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_no_parameter_and_no_buffer_is_the_students(buffers):
    network, optimizer, ema_student = build(buffers=buffers)
    ema_student.follow()
    for batch in toy_batches(2):
        step(network, optimizer, batch)

    def storages(module):
        return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}

    assert storages(network).isdisjoint(storages(ema_student.network)) and len(storages(network)) == 9
    before = copy.deepcopy(ema_student.network.state_dict())
    network(toy_batches(1)[0]["image"])  # the student's statistics move, the average does not
    assert all(torch.equal(before[name], value) for name, value in ema_student.network.state_dict().items())


@pytest.mark.parametrize("accumulation, steps", [(1, 3), (2, 2), (3, 1)])
def test_average_moves_once_a_step_and_not_once_an_iteration(accumulation, steps):
    network, optimizer, ema_student = build()
    trainer = toy_trainer(
        network, toy_batches(3), loss(), [ema_student], optimizer=optimizer, accumulation_steps=accumulation
    )
    trainer.run()
    assert ema_student.average.n_averaged == 1 + steps  # the copy at the start counts


@pytest.mark.parametrize("fused", [False, True])
def test_overflow_that_grad_scaler_skips_leaves_the_average_alone(fused):
    torch.manual_seed(0)
    network = Normed()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, fused=fused)
    ema_student, counts = EMAStudent(network, optimizer, decay=0.5), []

    def overflowing(pred, label):
        counts.append(int(ema_student.average.n_averaged))
        return pred.square().mean() * (float("inf") if len(counts) == 2 else 1.0)

    batches = [{name: tensor.float() for name, tensor in batch.items()} for batch in toy_batches(4)]
    trainer = toy_trainer(network, batches, overflowing, [ema_student], optimizer=optimizer, amp=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    trainer.add_event_handler(Events.STARTED, lambda: setattr(trainer, "scaler", scaler))  # `run` makes one for CUDA
    trainer.run()
    assert counts == [1, 2, 2, 3] and all(torch.isfinite(p).all() for p in ema_student.network.parameters())


def test_two_handlers_that_share_it_average_once_and_leave_the_optimizer_as_it_was():
    network, optimizer, ema_student = build()
    toy_trainer(network, toy_batches(3), loss(), [ema_student, ema_student], optimizer=optimizer).run()
    assert ema_student.average.n_averaged == 4 and not optimizer._optimizer_step_post_hooks


def test_average_begins_with_the_student_as_it_is_at_the_start():
    network, optimizer, ema_student = build()
    with torch.no_grad():
        network.first.weight.fill_(3.0)  # weights loaded after the configuration was built
    ema_student.follow()
    assert (ema_student.network.first.weight == 3).all() and network.training
    assert not any(module.training for module in ema_student.network.modules())


def test_checkpoint_goes_on_as_if_there_had_been_no_break(tmp_path):
    batches = toy_batches(4)
    network, optimizer, ema_student = build()
    saver = CheckpointSaver(
        str(tmp_path), {"model": network, "ema_student": ema_student}, save_final=True, final_filename="c.pt"
    )
    toy_trainer(network, batches[:2], loss(), [ema_student, saver], optimizer=optimizer).run()
    resumed, resumed_optimizer, resumed_ema = build(Normed(dropout=0.5))
    loader = CheckpointLoader(str(tmp_path / "c.pt"), {"model": resumed, "ema_student": resumed_ema})
    for student, opt, ema, handlers in (
        (network, optimizer, ema_student, [ema_student]),
        (resumed, resumed_optimizer, resumed_ema, [loader, resumed_ema]),
    ):
        torch.manual_seed(1)  # dropout
        toy_trainer(student, batches[2:], loss(), handlers, optimizer=opt).run()
        assert ema.average.n_averaged == 5
    assert all(torch.equal(v, resumed_ema.state_dict()[k]) for k, v in ema_student.state_dict().items())


def test_dropout_alone_draws_in_mode_dropout():
    _, _, ema_student = build()
    image = toy_batches(1)[0]["image"]
    torch.manual_seed(0)
    drawn = ema_student.logits(image, "dropout")
    reference = copy.deepcopy(ema_student.network)
    reference.dropout.train()
    torch.manual_seed(0)
    assert torch.equal(drawn, reference(image)) and not torch.equal(drawn, ema_student.logits(image))


def test_drop_path_draws_in_mode_dropout_too(caplog):
    _, _, ema_student = build(nn.Sequential(nn.Conv2d(1, 3, 1), DropPath(0.5)))
    image = torch.rand(8, 1, 4, 4, dtype=torch.float64)
    is_kept = ema_student.logits(image, "dropout").flatten(1).any(1)
    assert is_kept.any() and not is_kept.all() and not caplog.messages


def test_network_whose_dropout_is_off_is_warned_of_once(caplog):
    _, _, ema_student = build(Normed(dropout=0.0))
    for mode in ("eval", "dropout", "dropout"):
        ema_student.logits(toy_batches(1)[0]["image"], mode)
    assert ["has no dropout layers, so ema_mode='dropout' is" in message for message in caplog.messages] == [True]


def test_mode_train_takes_the_statistics_of_the_batch():
    _, _, ema_student = build(Normed(dropout=0.0))
    image = toy_batches(1)[0]["image"]
    expected = copy.deepcopy(ema_student.network).train()(image)
    assert torch.equal(ema_student.logits(image, "train"), expected)
    assert torch.equal(ema_student.logits(image, "dropout"), ema_student.logits(image))


@pytest.mark.parametrize("mode", ["eval", "dropout", "train"])
def test_no_mode_leaves_a_trace_in_the_average(mode):
    _, _, ema_student = build()
    before = copy.deepcopy(ema_student.network.state_dict())
    ema_student.logits(toy_batches(1)[0]["image"], mode)
    assert all(torch.equal(before[name], value) for name, value in ema_student.network.state_dict().items())
    assert not any(module.training for module in ema_student.network.modules())


def test_inferer_calls_the_averaged_network():
    _, _, ema_student = build()
    image = toy_batches(1)[0]["image"]
    logits = ema_student.logits(image, inferer=lambda image, network: network(image) + 1)
    assert torch.equal(logits, ema_student.network(image) + 1)


@pytest.mark.parametrize("other", ["network", "optimizer"])
def test_trainer_of_another_network_or_optimizer_is_an_error_before_the_first_step(other):
    network, optimizer, ema_student = build()
    others = {"network": copy.deepcopy(network), "optimizer": torch.optim.SGD(network.parameters(), lr=0.1)}
    ours = {"network": network, "optimizer": optimizer, other: others[other]}
    trainer = toy_trainer(ours["network"], toy_batches(1), loss(), [ema_student], optimizer=ours["optimizer"])
    with pytest.raises(ValueError, match=f"`{other}` of EMAStudent must be the trainer's but is not"):
        trainer.run()
    assert trainer.state.iteration == 0


def test_wrapper_of_the_optimizer_is_taken_off():
    """As Accelerate's, after `prepare`."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)

    network, optimizer, _ = build()
    assert EMAStudent(network, Wrapper(optimizer)).optimizer is optimizer


@pytest.mark.parametrize("mode", ["eval", "dropout", "train"])
def test_multi_view_student_gives_view_0(mode):
    network, _, ema_student = build(ToyStudent())
    image = toy_batches(1)[0]["image"]
    torch.testing.assert_close(ema_student.logits(image, mode), network(image)[:, 0])


def test_wrappers_are_taken_off():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        student = Normed()
        network = nn.parallel.DistributedDataParallel(student)
        ema_student = EMAStudent(network, torch.optim.SGD(network.parameters(), lr=0.1))
    finally:
        torch.distributed.destroy_process_group()
    assert ema_student.network.state_dict().keys() == student.state_dict().keys()
    compiled = EMAStudent(torch.compile(student), torch.optim.SGD(student.parameters(), lr=0.1))
    assert compiled.network.state_dict().keys() == student.state_dict().keys()
    both = nn.DataParallel(torch.compile(student))
    nested = EMAStudent(both, torch.optim.SGD(student.parameters(), lr=0.1))
    assert nested.network.state_dict().keys() == student.state_dict().keys()


def test_evaluator_may_judge_the_average_and_configs_name_it():
    parser = ConfigParser(
        {
            "network": {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 3, "kernel_size": 1},
            "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.1},
            "ema_student": {
                "_target_": "knowsam_monai.networks.ema_student.EMAStudent",
                "network": "@network",
                "optimizer": "@optimizer",
            },
            "handler": {
                "_target_": "knowsam_monai.handlers.MeanTeacher",
                "ema_student": "@ema_student",
                "weight": {"_target_": "knowsam_monai.losses.SigmoidRampUp", "num_iterations": 3, "max": 0.1},
                "start": 1,
            },
            "averaged": "$@ema_student.network",
        }
    )
    network, ema_student = (parser.get_parsed_content(name) for name in ("network", "ema_student"))
    assert parser.get_parsed_content("handler").ema_student is ema_student
    batches = [{name: tensor.float() for name, tensor in batch.items()} for batch in toy_batches(3)]
    toy_trainer(network, batches, loss(), [parser.get_parsed_content("handler")], optimizer=ema_student.optimizer).run()
    averaged = parser.get_parsed_content("averaged")
    evaluator = SupervisedEvaluator(torch.device("cpu"), batches[:1], averaged, decollate=False)
    evaluator.run()
    assert torch.equal(evaluator.state.output["pred"], ema_student.logits(batches[0]["image"]))
    assert not torch.equal(averaged.weight, network.weight) and not averaged.weight.requires_grad


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match="`decay` must be between 0 and 1 but is 2"):
        build(decay=2)
    with pytest.raises(ValueError, match="`buffers` must be 'copy' or 'average' but is 'share'"):
        build(buffers="share")
    with pytest.raises(ValueError, match="`optimizer` must step parameters of `network`"):
        EMAStudent(Normed(), torch.optim.SGD(Normed().parameters(), lr=0.1))
    with pytest.raises(ValueError, match="`ema_mode` must be 'eval', 'dropout' or 'train' but is 'test'"):
        build()[2].logits(torch.zeros(1, 1, 4, 4), "test")


class Holder(torch.optim.Optimizer):
    def __init__(self, held):
        self.held = held

    inner = property(lambda self: self.held[0] if isinstance(self.held, list) else self.held)

    def step(self, closure=None):
        self.inner.step()

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)


@pytest.mark.parametrize("wrap", [lambda inner: Holder([inner]), lambda inner: Holder(Holder(inner))])
def test_optimizer_that_holds_the_students_is_the_trainers(wrap):
    network, optimizer, ema_student = build()
    toy_trainer(network, toy_batches(3), loss(), [ema_student], optimizer=wrap(optimizer)).run()
    assert ema_student.average.n_averaged == 4
