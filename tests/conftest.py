"""What every test shares: no cache of an earlier run, none left in the user's folder; settings put back."""

from __future__ import annotations

import gc
import logging

import pytest
import torch

from tests.toys import ToyStudent, ToyTeacher


def pytest_collection_modifyitems(items):
    """Begin with the folders whose files take longest, so that no worker ends with one of them."""
    items.sort(key=lambda item: item.path.parent.name not in ("bundles", "zoo", "docs", "examples"))


def pytest_collection_finish():
    """What was imported stays: tests that wait for the garbage collector need not wait for it to look there."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KNOWSAM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def usual_matrix_products():
    """A bundle's run on a CPU sets how torch multiplies matrices."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def root_logging_as_it_was():
    """For what sets up logging, as a program's entry point does."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def student():
    torch.manual_seed(0)
    return ToyStudent().double()


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return ToyTeacher().double()
