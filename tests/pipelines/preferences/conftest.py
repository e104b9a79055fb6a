"""The job without Ray: what it would do at once is done in this process, one call after the other."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest

from pipelines.preferences import stream


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Any, calls: Sequence[Callable[[], Iterator[pa.Table]]]) -> Iterator[dict[str, Any]]:
        for call in calls:
            for report in call():
                yield from report.to_pylist()

    monkeypatch.setattr(stream, "run", run)
    monkeypatch.setattr("pipelines.corpus.storage._sync", lambda path: None)
