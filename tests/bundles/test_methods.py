"""Every shipped method on every shipped network, built from the bundles' own configs, does what its paper says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from knowsam_monai.handlers import scalar_terms
from tests.bundles.conftest import CONFIGS, CONFIGS_3D
from tests.hosts import no_loss
from tests.toys import toy_trainer, with_gradient

SIZES = {CONFIGS: (32, 32), CONFIGS_3D: (16, 16, 16)}
# network -> its overlay, or this package's network in its place
OVERLAYS: dict[str, str | None] = {
    "views": None,  # MultiViewNet
    "plain": "network_plain.json",  # 2D: UNet, 3D: MONAI's VNet
    "pair": "network_pair.json",  # StackedNetworks
    "UNet": None,
    "VNet": None,
}
NETWORKS = {CONFIGS: ("views", "plain", "pair"), CONFIGS_3D: tuple(OVERLAYS)}
WITHOUT_DROPOUT = "VNet"
BUILT = [(bundle, network) for bundle in SIZES for network in NETWORKS[bundle]]
EVERY_NETWORK = pytest.mark.parametrize("bundle, network", BUILT)
# method -> its handler in the configs, and the terms that it adds
METHODS: dict[str, tuple[str, set[str]]] = {
    "mean_teacher": ("train#method", {"consistency_loss"}),
    "ua_mt": ("train#method", {"consistency_loss", "certain_fraction"}),
    "fixmatch": ("train#method", {"pseudo_label_loss", "sure_fraction"}),
    "bcp": ("train#method", {"pseudo_label_loss"}),
    "cps": ("train#method", {"mutual_loss"}),
    "co-training": ("train#method", {"mutual_loss", "entropy_loss"}),  # KnowSAM's, in train.json itself
    "mixing": ("train#mixing", {"mixing_loss"}),
}
TWO_VIEWS = {"cps": "pair", "co-training": "views"}  # methods that are made for one network
CASES = [
    (bundle, network, method)
    for bundle, network in BUILT
    for method in METHODS
    if method not in TWO_VIEWS or network == TWO_VIEWS[method]
]


class Built:
    """Network, handler and averaged student of a bundle's configs at their defaults."""

    def __init__(self, bundle: Path, network: str, method: str) -> None:
        overlay = f"{method}.json" if (bundle / f"{method}.json").is_file() else None
        config = ConfigParser()
        config.read_config([str(bundle / name) for name in ("train.json", OVERLAYS[network], overlay) if name])
        if network in ("UNet", "VNet"):
            config["network_def"] = {
                "_target_": f"knowsam_monai.networks.{network}",
                "spatial_dims": len(SIZES[bundle]),
                "out_channels": "@num_classes",
                **({"channels": "@channels"} if bundle == CONFIGS_3D else {}),
            }
        config["lr"] = 0.03  # with SGD, so that two steps change the student visibly
        config["optimizer"] = "@sgd" if "sgd" in config else config["optimizer"]
        if method not in TWO_VIEWS:
            config["view_weights"] = None  # the overlays have that of a plain network
        torch.manual_seed(0)
        self.size = SIZES[bundle]
        self.num_classes = config.get_parsed_content("num_classes")
        self.max_iterations = config.get_parsed_content("max_iterations")
        self.network: nn.Module = config.get_parsed_content("network")
        resemble_a_trained_student(self.network, self.image(4))
        self.optimizer = config.get_parsed_content("optimizer")
        self.handler = config.get_parsed_content(METHODS[method][0])
        self.ema_student = config.get_parsed_content("ema_student")
        self.inferer = config.get_parsed_content("train#inferer")

    def image(self, num_rows: int = 2) -> torch.Tensor:
        return torch.rand(num_rows, 1, *self.size, generator=torch.Generator().manual_seed(1))

    def last_steps(self, handlers: Sequence[Any]) -> tuple[list[dict], list[dict[str, float]]]:
        """The student's state before and after each of the run's last two steps, and their terms; no other loss."""
        label = (self.image() * self.num_classes).floor()
        batch = {"image": self.image(4), "label": label, "image_strong": self.image(4).square()}
        trainer = toy_trainer(
            self.network, [batch] * 2, no_loss, list(handlers), optimizer=self.optimizer, inferer=self.inferer
        )
        states, terms = [copied(self.network)], []

        @trainer.on(Events.EPOCH_STARTED)
        def late(engine):
            engine.state.iteration = self.max_iterations - 2

        @trainer.on(Events.ITERATION_COMPLETED)
        def keep(engine):
            states.append(copied(self.network))
            terms.append({name: term.item() for name, term in scalar_terms(engine.state.output).items()})

        trainer.run()
        return states, terms


@torch.no_grad()
def resemble_a_trained_student(network: nn.Module, image: torch.Tensor) -> None:
    """Statistics are those of the image, and logits are so far apart that the student is sure of some pixels alone."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    heads = [module for name, module in network.named_modules() if name.endswith(("head", "out_tr.conv2"))]

    def spread_out(module: nn.Module, args: tuple, logits: torch.Tensor) -> None:
        module.weight.mul_(4 / logits.std())

    for norm in norms:
        norm.momentum = 1.0
    for head in heads:
        handle = head.register_forward_hook(spread_out)
        network.train()(image)
        handle.remove()
    network(image)
    for norm in norms:
        norm.momentum = 0.1


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def learners(built: Built, network: str, method: str) -> set[str]:
    """Parameters that the method's term has a gradient for."""
    names = {name for name, _ in built.network.named_parameters()}
    if method == "co-training":  # of the two views, not of their fusion
        return {name for name in names if not name.startswith("aggregation.")}
    if network == "pair" and method in ("mean_teacher", "ua_mt", "fixmatch"):  # view 0 alone is compared
        return {name for name in names if name.startswith("networks.0.")}
    return names


@pytest.mark.parametrize("bundle, network, method", CASES)
def test_the_terms_and_who_learns_from_them(bundle, network, method):
    built = Built(bundle, network, method)
    states, terms = built.last_steps([built.handler])
    names = METHODS[method][1]
    assert all(set(step) == {"loss"} | names for step in terms)
    assert all(step[name] > 0 for step in terms for name in names)
    assert all(step[name] < 1 for step in terms for name in names if name == "sure_fraction")
    assert with_gradient(built.network) == learners(built, network, method)
    assert not built.optimizer._optimizer_step_post_hooks
    if built.ema_student is None:
        return
    averaged = built.ema_student.network
    assert all(p.grad is None and not p.requires_grad for p in averaged.parameters())
    assert not any(module.training for module in averaged.modules())
    # Mean Teacher's warm-up: the first step copies, the second averages two; BCP's is 0.99 from the first, buffers too
    weights = (0.0, 0.5, 0.5) if method != "bcp" else (0.99**2, 0.99 * 0.01, 0.01)
    parameters = {name for name, _ in averaged.named_parameters()}
    for name, value in averaged.state_dict().items():
        is_averaged = name in parameters or (method == "bcp" and value.is_floating_point())
        mean = sum(weight * state[name] for weight, state in zip(weights, states)) if is_averaged else states[-1][name]
        torch.testing.assert_close(value, mean, rtol=1e-5, atol=1e-6)


@EVERY_NETWORK
@pytest.mark.parametrize("method", ["mean_teacher", "ua_mt"])
def test_passes_of_the_averaged_student_draw_dropout_and_nothing_else(bundle, network, method, caplog):
    with caplog.at_level(logging.WARNING):
        built = Built(bundle, network, method)
        built.handler.passes.noise_std = 0.0
        logits = built.handler.passes(built.image(), 1, 4, built.inferer)
    assert logits.shape == (4, 2, built.num_classes, *built.size) and not logits.requires_grad
    spread = logits.std(dim=0).flatten(1).amax(1)
    without = built.ema_student.logits(built.image(), "eval")
    if network != WITHOUT_DROPOUT:
        assert (spread > 0).all() and not torch.equal(logits[0], without)
        assert not caplog.messages
    else:
        torch.testing.assert_close(logits[1:], logits[:-1])
        torch.testing.assert_close(logits[0], without)
        assert [message.split(",")[0] for message in caplog.messages] == ["VNet has no dropout layers"]
        assert "ema_mode='eval'" in caplog.text


@EVERY_NETWORK
def test_no_mode_changes_the_averaged_student_and_eval_draws_nothing(bundle, network):
    built = Built(bundle, network, "mean_teacher")
    ema_student, before = built.ema_student, copied(built.ema_student.network)
    for mode in ("eval", "dropout", "train"):
        first, second = (ema_student.logits(built.image(), mode, built.inferer) for _ in range(2))
        assert first.shape == (2, built.num_classes, *built.size)
        assert torch.equal(first, second) == (mode == "eval" or network == WITHOUT_DROPOUT)
        assert all(torch.equal(value, before[name]) for name, value in ema_student.network.state_dict().items())
        assert not any(module.training for module in ema_student.network.modules())


@pytest.mark.parametrize("bundle, network", [pair for pair in BUILT if pair[1] != WITHOUT_DROPOUT])
def test_more_passes_of_dropout_change_what_uamt_is_certain_of(bundle, network):
    handler = (built := Built(bundle, network, "ua_mt")).handler
    handler.passes.noise_std = 0.0
    logits = handler.passes(built.image(), 1, handler.num_passes)
    one, all_passes = handler.certain_mask(logits[:1], 1), handler.certain_mask(logits, 1)
    assert 0 < all_passes.float().mean() < 1 and one.float().mean() != all_passes.float().mean()
