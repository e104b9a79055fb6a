"""The job without Ray: what it would do at once is done in this process, one call after the other."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest

from pipelines.preferences import stream
from pipelines.preferences.job import PreferencesJob


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def reports(config: Any, calls: Sequence[Callable[[], Iterator[pa.Table]]]) -> Iterator[dict[str, Any]]:
        for call in calls:
            for made in call():
                yield from made.to_pylist()

    monkeypatch.setattr(stream, "reports", reports)
    monkeypatch.setattr(PreferencesJob, "connect", lambda self: None)
    monkeypatch.setattr("pipelines.corpus.storage._sync", lambda path: None)
