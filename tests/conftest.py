"""What every test shares: no cache of an earlier run, and none left in the user's folder."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KNOWSAM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
