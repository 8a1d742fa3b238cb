"""An argument of a wrong type is one clear sentence, whichever public class gets it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from knowsam_monai.arguments import check_types
from knowsam_monai.distillation import SAMDistiller
from knowsam_monai.networks import EMAStudent
from tests.toys import ToyTeacher

FOLDERS = ("distillation", "handlers", "losses", "networks", "teachers")
UNCHECKED = {"FollowHandle", "Adapter", "EmbeddingCache", "TeacherFacts", "NetworkTeacher"}  # the last checks more


def constructors():
    """The public classes whose constructors take arguments, by name."""
    found = {}
    for folder in FOLDERS:
        module = import_module(f"knowsam_monai.{folder}")
        kinds = {name: getattr(module, name) for name in module.__all__}
        found |= {name: kind for name, kind in kinds.items() if inspect.isclass(kind) and "__init__" in vars(kind)}
    return {name: kind for name, kind in found.items() if len(inspect.signature(kind).parameters) > 0}


def value_of(hint: Any) -> Any:
    """A value that a required argument accepts."""
    network = nn.Conv2d(1, 3, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    values = {
        **{
            "int": 4,
            "bool": True,
            "float": 0.5,
            "str": "x",
            "Module": network,
            "Optimizer": optimizer,
            "Callable": F.mse_loss,
        },
        **{"SAMDistiller": SAMDistiller(ToyTeacher()), "EMAStudent": EMAStudent(network, optimizer)},
        **{"Sequence": [network, network], "Any": []},
    }
    return values[getattr(hint, "__name__", str(hint))]


@pytest.mark.parametrize("name", sorted(constructors().keys() - UNCHECKED))
def test_argument_of_a_wrong_type_is_named(name):
    kind = constructors()[name]
    hints = get_type_hints(kind.__init__)
    parameters = [p for p in inspect.signature(kind.__init__).parameters.values() if p.name in hints]
    for parameter in parameters:
        if Any in (hints[parameter.name], *get_args(hints[parameter.name])):
            continue
        required = {p.name: value_of(hints[p.name]) for p in parameters if p.default is p.empty}
        with pytest.raises(TypeError, match=f"`{parameter.name}` must be .* but is an? object"):
            kind(**{**required, parameter.name: object()})


def test_numbers_of_other_libraries_are_numbers():
    @check_types
    def function(whole: int = 0, number: float = 0.0, flag: bool = False, several: Sequence[int] = ()):
        return True

    for whole in (np.int64(3), 3.0, torch.tensor(3)):
        assert function(whole=whole, number=whole)
    assert function(number=torch.tensor(0.5), flag=np.bool_(True), several=np.arange(3))
    for wrong in ({"whole": True}, {"number": torch.tensor(True)}, {"flag": 1}, {"several": np.array(1)}):
        with pytest.raises(TypeError):
            function(**wrong)
    for wrong in ({"whole": 2.5}, {"number": float("nan")}, {"whole": float("inf")}):
        with pytest.raises(ValueError):
            function(**wrong)
