"""No test here loses power: waiting for the disk, thousands of times, is left to the tests of the storage itself."""

import pytest


@pytest.fixture(autouse=True)
def _without_fsync(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.name != "test_storage.py":
        monkeypatch.setattr("pipelines.corpus.storage._sync", lambda path: None)
