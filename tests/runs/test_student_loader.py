import pytest
import torch
from ignite.engine import Engine
from torch import nn

from knowsam_monai.networks import MultiViewNet
from knowsam_monai.runs.student_loader import StudentLoader


def small(**kwargs):
    return MultiViewNet(**{"channels": [4] * 5, "num_convs": [1] * 5, **kwargs})


def run(path, network):
    engine = Engine(lambda engine, batch: None)
    StudentLoader(path, network, num_classes=4).attach(engine)
    engine.run([0])


def test_a_plain_state_dict_is_loaded(tmp_path):
    source, network = small(), small()
    torch.save(source.state_dict(), tmp_path / "model.pt")
    run(tmp_path / "model.pt", network)
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], tensor)


def test_weights_under_the_key_model_are_loaded(tmp_path):
    source, network = nn.Linear(2, 3), nn.Linear(2, 3)
    torch.save({"model": source.state_dict(), "epoch": 3}, tmp_path / "last.pt")
    run(tmp_path / "last.pt", network)
    torch.testing.assert_close(network.weight, source.weight)


def wrong_files(folder):
    """{name: (writes the file, network, what the error says)}"""
    return {
        "missing": (lambda p: None, small(), "must be a trained student but .*missing.pt does not exist"),
        "text": (
            lambda p: p.write_text("<html>not found</html>"),
            small(),
            "must be a PyTorch state dict but .*text.pt",
        ),
        "cut": (lambda p: _save_half(p), small(), "must be a PyTorch state dict but .*cut.pt .* is truncated"),
        "code": (
            lambda p: torch.save(Engine, p),
            small(),
            "must be a PyTorch state dict but .*code.pt is a pickle of Python objects, which would run code",
        ),
        "list": (
            lambda p: torch.save([1], p),
            small(),
            "must be a PyTorch state dict but .*list.pt holds something else",
        ),
        "nan": (
            lambda p: torch.save({k: v * torch.nan for k, v in nn.Linear(2, 3).state_dict().items()}, p),
            nn.Linear(2, 3),
            "must hold finite weights but in .*nan.pt 2 weights have NaN or infinite values .weight .*; train again",
        ),
        "other": (
            lambda p: torch.save(nn.Conv2d(1, 4, 1).state_dict(), p),
            small(),
            "MultiViewNet but .*other.pt belongs to another network: .*2 weights unknown.*add that after",
        ),
        "classes": (
            lambda p: torch.save(small(out_channels=3).state_dict(), p),
            small(),
            "weights of a network with 4 classes but .*classes.pt has 3",
        ),
        "wider": (lambda p: torch.save(small(channels=[8] * 5).state_dict(), p), small(), "has shape .*`network_def`"),
        "channels": (lambda p: torch.save(small(in_channels=2).state_dict(), p), small(), "has shape .*`network_def`"),
    }


def _save_half(path):
    torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", wrong_files(None))
def test_a_file_of_something_else_is_one_clear_error(tmp_path, name):
    write, network, message = wrong_files(tmp_path)[name]
    write(tmp_path / f"{name}.pt")
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path / f"{name}.pt", network)
    assert "\n" not in str(error.value)
