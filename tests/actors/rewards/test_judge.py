"""The judge is asked in both orders, and its taste for a place is told apart from its taste for an answer."""

import asyncio
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from actors.contract import RowError
from actors.engines.base import Messages, Request
from actors.engines.openai_engine import OpenAIEngine
from actors.reward import RewardConfig
from actors.rewards.judge import judged

PROMPT: Messages = (("system", "Be brief."), ("user", "Why is the sky {blue}?"))
Verdict = Callable[[str, str], str]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge(verdict: Verdict, *pairs: tuple[str, str], **keys: Any) -> tuple[list[Any], dict[tuple[str, str], str]]:
    """What comes of (reference, text) pairs where an endpoint answers `verdict(answer A, answer B)`; and the questions
    that it was asked, by their answers."""
    asked: dict[tuple[str, str], str] = {}

    async def answer(request: web.Request) -> web.Response:
        body = await request.json()
        (question,) = body["messages"]
        first, second = (
            re.search(rf"<answer_{letter}>\n(.*)\n</answer_{letter}>", question["content"], re.DOTALL)
            for letter in "ab"
        )
        assert first and second
        asked[first[1], second[1]] = question["content"]
        message = {"role": "assistant", "content": verdict(first[1], second[1])}
        choice = {"index": 0, "message": message, "finish_reason": "length" if "cut" in message["content"] else "stop"}
        return web.json_response(
            {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        )

    async def judging() -> list[Any]:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", answer)
        server = TestServer(application)
        await server.start_server()
        try:
            config = RewardConfig(engine="openai", model="m", base_url=str(server.make_url("/v1")), retry_s=0.0, **keys)
            engine = OpenAIEngine(config)
            made = [judged(lambda chat: engine.generate(Request(chat, 0)), config, PROMPT, *pair) for pair in pairs]
            found = await asyncio.gather(*made, return_exceptions=True)
            await engine._client.close()
        finally:
            await server.close()
        return list(found)

    return asyncio.run(judging()), asked


def longer(first: str, second: str) -> str:
    letter = "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
    return f"<think>[[B]] or [[A]]?</think>The lengths decide: [[{letter}]]"


def test_a_judge_that_sees_the_answers_decides_alike_in_both_orders() -> None:
    found, asked = judge(longer, ("short", "a long one"), ("a long one", "short"), ("abc", "xyz"))
    assert [score for score, _ in found] == [1.0, 0.0, 0.5]
    assert [Counter(notes) for _, notes in found] == [
        {"judged_first": 1, "judged_second": 1},
        {"judged_first": 1, "judged_second": 1},
        {"judged_tie": 2},
    ]
    assert len(asked) == 4 + 2 - 2  # the second pair asks what the first one did


def test_a_judge_that_sees_the_place_alone_makes_no_difference_and_is_found_out() -> None:
    ((score, notes),), asked = judge(lambda first, second: "[[A]]", ("one", "two"))
    assert score == 0.5
    assert Counter(notes) == {"judged_first": 2, "judged_by_position": 1}
    assert set(asked) == {("one", "two"), ("two", "one")}


def test_the_reference_itself_is_not_asked_about() -> None:
    assert judge(longer, ("same", "same")) == ([(0.5, [])], {})


def test_the_question_has_the_conversation_and_the_criterion_as_they_are() -> None:
    _, asked = judge(longer, ("{first}", "two {criterion}"), criterion="The ruder one is better.")
    question = asked["two {criterion}", "{first}"]
    assert "system: Be brief.\n\nuser: Why is the sky {blue}?" in question
    assert "The ruder one is better." in question


@pytest.mark.parametrize("answer", ["Both are fine.", "I am to end with [[A]], [[B]] or [[C]]. Answer A is cut"])
def test_an_answer_without_a_verdict_is_that_texts_fault(answer: str) -> None:
    (error,), _ = judge(lambda first, second: answer, ("one", "two"))
    assert isinstance(error, RowError) and error.cause == "unreadable_verdict"
