"""The stored engine passes answers through."""

import asyncio

import pytest

from actors.contract import RowError
from actors.engines import build_engine
from actors.engines.base import Completion, EngineConfig, Request


def test_stored_answer_is_the_completion() -> None:
    engine = build_engine(EngineConfig(engine="stored", model="gpt-label"), None)
    made = asyncio.run(engine.generate(Request(prompt="", seed=0, draft=" as it was ")))
    assert made == Completion(" as it was ", None, None, None)
    engine.close()


@pytest.mark.parametrize("stored", [None, ""])
def test_missing_answer_fails_the_row(stored: str | None) -> None:
    engine = build_engine(EngineConfig(engine="stored", model="gpt-label"), None)
    with pytest.raises(RowError) as caught:
        asyncio.run(engine.generate(Request(prompt="", seed=0, draft=stored)))
    assert caught.value.cause == "missing_response"
