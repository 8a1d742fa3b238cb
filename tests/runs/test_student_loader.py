import pytest
import torch
from ignite.engine import Engine
from torch import nn

from knowsam_monai.networks import MultiViewNet
from knowsam_monai.runs.student_loader import StudentCheckpointLoader


def small(**kwargs):
    return MultiViewNet(**{"channels": [4] * 5, "num_convs": [1] * 5, **kwargs})


def run(path, network):
    engine = Engine(lambda engine, batch: None)
    StudentCheckpointLoader(path, network, num_classes=4).attach(engine)
    engine.run([0])


@pytest.mark.parametrize("wrapped", [lambda network: network, torch.compile, nn.DataParallel])
def test_a_plain_state_dict_is_loaded_into_a_student_wrapped_or_not(tmp_path, wrapped):
    source, network = small(), small()
    torch.save(source.state_dict(), tmp_path / "model.pt")
    run(tmp_path / "model.pt", wrapped(network))
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], tensor)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_under_the_key_model_and_of_a_wrapped_student_are_loaded(tmp_path, prefix):
    source, network = nn.Linear(2, 3), nn.Linear(2, 3)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "last.pt")
    run(tmp_path / "last.pt", network)
    torch.testing.assert_close(network.weight, source.weight)


def wrong_files(folder):
    """{name: (writes the file, network, what the error says)}"""
    return {
        "missing": (lambda p: None, small(), "must be a student but .*missing.pt cannot be read"),
        "text": (lambda p: p.write_text("<html>not found</html>"), small(), "MultiViewNet but .*text.pt is a web page"),
        "cut": (lambda p: _save_half(p), small(), "cut.pt .* is truncated .*; train again, or use another"),
        "code": (
            lambda p: torch.save(Engine, p),
            small(),
            "code.pt is a pickle of Python objects, which would run code",
        ),
        "list": (lambda p: torch.save([1], p), small(), "list.pt holds a list; save the model's plain"),
        "nan": (
            lambda p: torch.save({k: v * torch.nan for k, v in nn.Linear(2, 3).state_dict().items()}, p),
            nn.Linear(2, 3),
            "Linear but .*nan.pt holds NaN or infinite values in `weight`, `bias`; train again",
        ),
        "other": (
            lambda p: torch.save(nn.Conv2d(1, 4, 1).state_dict(), p),
            small(),
            "MultiViewNet but .*other.pt holds another model .*unexpected `weight`, `bias`.*add that after",
        ),
        "classes": (
            lambda p: torch.save(small(out_channels=3).state_dict(), p),
            small(),
            "classes.pt holds another model .*; it has 3 classes, not 4: set the class count",
        ),
        "wider": (
            lambda p: torch.save(small(channels=[8] * 5).state_dict(), p),
            small(),
            "other shapes in .*`network_def`",
        ),
        "channels": (
            lambda p: torch.save(small(in_channels=2).state_dict(), p),
            small(),
            "other shapes in .*`network_def`",
        ),
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
