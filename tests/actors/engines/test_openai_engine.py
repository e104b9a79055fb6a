"""The openai engine waits outages out, fails rows alone, stops for a user's mistake, and never shows its key."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from actors.contract import ConfigError, RowError, TransientError
from actors.engines import openai_engine
from actors.engines.base import Completion, EngineConfig, Request
from actors.engines.identity import identity, pinned
from actors.engines.openai_engine import OpenAIEngine

KEY = "sk-not-to-be-seen"
CHAT = Request((("user", "hi"),), seed=2**62 + 1)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(openai_engine, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(openai_engine, "LONGEST_WAIT_S", 0.05)


def answer(text: str | None = "hello", finish_reason: str = "stop", **message: Any) -> web.Response:
    return web.json_response(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text, **message},
                    "finish_reason": finish_reason,
                }
            ],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        }
    )


def refusal(status: int, message: str = "no", headers: dict[str, str] | None = None, **error: Any) -> web.Response:
    return web.json_response({"error": {"message": message, **error}}, status=status, headers=headers)


class Endpoint:
    """Plays a script, one entry per request, whose last entry is for all that follow; keeps what it was asked."""

    def __init__(self, *script: Callable[[web.Request], Any]) -> None:
        self.script, self.asked = list(script), list[tuple[str, dict[str, Any]]]()
        self.times: list[float] = []

    async def play(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.path, await request.json()))
        self.times.append(time.monotonic())
        play = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        played = play(request)
        response: web.StreamResponse = await played if asyncio.iscoroutine(played) else played
        return response


def ask(endpoint: Endpoint, *requests: Request, **settings: Any) -> list[Any]:
    """Answers and errors of requests made at the same time."""

    async def asking() -> list[Any]:
        application = web.Application()
        application.router.add_post("/v1/{path:.*}", endpoint.play)
        server = TestServer(application)
        await server.start_server()
        try:
            defaults = {"base_url": str(server.make_url("/v1")), "model": "m", "retry_s": 5.0}
            engine = OpenAIEngine(EngineConfig(engine="openai", **(defaults | settings)))
            asked = [engine.generate(request) for request in requests or (CHAT,)]
            made = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 30)
            assert engine.stats().num_running == engine.stats().num_waiting == 0
            assert engine.stats().num_tokens == sum(one.num_tokens or 0 for one in made if isinstance(one, Completion))
            await engine._client.close()
        finally:
            await server.close()
        for one in made:
            if isinstance(one, BaseException):
                assert KEY not in "".join(traceback.format_exception(one)) + repr(one)
        return made

    return asyncio.run(asking())


def test_a_chat_and_its_settings_arrive_as_they_are() -> None:
    endpoint = Endpoint(lambda _: answer(finish_reason="length"))
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_tokens": 7, "stop": ["."]}
    assert ask(endpoint, **settings) == [Completion("hello", "length", 3, 2)]
    path, body = endpoint.asked[0]
    assert path == "/v1/chat/completions"
    assert body == {"model": "m", "messages": [{"role": "user", "content": "hi"}], "seed": CHAT.seed, **settings}


def test_raw_text_goes_to_the_completions_endpoint() -> None:
    made = {"id": "1", "object": "text_completion", "created": 0, "model": "m"}
    choice = {"index": 0, "text": " there", "finish_reason": "stop", "logprobs": None}
    endpoint = Endpoint(lambda _: web.json_response({**made, "choices": [choice]}))
    assert ask(endpoint, Request("hi", 0), retry_s=0.0)[0].text == " there"
    assert endpoint.asked[0][0] == "/v1/completions"
    assert endpoint.asked[0][1]["prompt"] == "hi"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thinking_that_is_kept_apart_is_found_again(field: str) -> None:
    [made] = ask(Endpoint(lambda _: answer("yes", **{field: "hm, well"})))
    assert (made.reasoning, made.text) == ("hm, well", "yes")


def test_retry_after_is_honoured() -> None:
    endpoint = Endpoint(lambda _: refusal(429, headers={"Retry-After": "1"}), lambda _: answer())
    assert ask(endpoint)[0].text == "hello"
    assert endpoint.times[1] - endpoint.times[0] >= 1


def _reset(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def _hang(request: web.Request) -> web.Response:
    await asyncio.sleep(3)
    return answer()


@pytest.mark.parametrize(
    "failure",
    [
        lambda _: refusal(500),
        lambda _: refusal(503),
        _reset,
        _hang,
        lambda _: web.Response(text='{"choices": [', content_type="application/json"),
        lambda _: web.Response(text="<html>be right back</html>", content_type="text/html"),
        lambda _: answer(finish_reason="abort"),
    ],
    ids=["500", "503", "reset", "hang", "half of JSON", "HTML", "abort"],
)
def test_an_outage_is_waited_out(failure: Callable[[web.Request], Any]) -> None:
    endpoint = Endpoint(failure, failure, failure, lambda _: answer())
    assert ask(endpoint, request_timeout_s=0.3)[0].text == "hello"
    assert len(endpoint.asked) == 4


def test_an_outage_that_lasts_is_a_transient_error_not_a_row_error() -> None:
    [error] = ask(Endpoint(lambda _: refusal(503, f"overloaded\nby {KEY}")), retry_s=0.2)
    assert isinstance(error, TransientError)
    assert "status 503: overloaded by ***" in str(error)
    [error] = ask(Endpoint(lambda _: refusal(429, headers={"Retry-After": "3600"})), retry_s=60)
    assert isinstance(error, TransientError)


async def _fails_poison(request: web.Request) -> web.Response:
    return refusal(500, "it broke") if "poison" in await request.text() else answer()


def test_a_request_that_the_endpoint_always_fails_at_is_a_row_error_where_others_are_answered() -> None:
    endpoint = Endpoint(_fails_poison)
    poison, well = ask(endpoint, Request((("user", "poison"),), 0), CHAT, retry_s=0.2)
    assert well.text == "hello"
    assert isinstance(poison, RowError)
    assert (poison.cause, poison.message) == ("failed_by_endpoint", "status 500: it broke (others are answered)")
    bodies = [str(body) for _, body in endpoint.asked]
    assert poison.attempts == sum("poison" in body for body in bodies) > openai_engine.NUM_ACCUSATIONS
    assert bodies.index(next(body for body in bodies if "Hello" in body)) > 3, "only after `retry_s` is it accused"
    assert sum("Hello" in body for body in bodies) == openai_engine.NUM_ACCUSATIONS


def test_an_endpoint_that_comes_back_while_a_request_is_accused_answers_it() -> None:
    failures = [refusal] * 40

    async def back(request: web.Request) -> web.Response:
        if "Hello" in await request.text():
            failures.clear()  # it is up again the moment that it is asked for something else
        return failures.pop()(503) if failures else answer()

    [made] = ask(Endpoint(back), retry_s=0.2)
    assert made.text == "hello"


def test_nobody_listening_is_a_transient_error() -> None:
    [error] = ask(Endpoint(lambda _: answer()), base_url=f"http://127.0.0.1:{free_port()}/v1", retry_s=0.1)
    assert isinstance(error, TransientError)


def test_the_crowd_at_the_endpoint_is_limited() -> None:
    now, most = 0, 0

    async def count(request: web.Request) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return answer()

    assert len(ask(Endpoint(count), *[CHAT] * 12, max_num_seqs=3)) == 12
    assert most == 3


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_refused_fails_alone(status: int) -> None:
    endpoint = Endpoint(lambda _: refusal(status, "too long", code="context_length_exceeded"), lambda _: answer())
    made = ask(endpoint, CHAT, CHAT)
    [error] = [one for one in made if isinstance(one, RowError)]
    assert (error.cause, error.message) == ("rejected_by_endpoint", f"status {status}: too long")
    assert sum(isinstance(one, Completion) for one in made) == 1
    assert len(endpoint.asked) == 2


def test_what_a_content_filter_stops_fails_alone() -> None:
    [error] = ask(Endpoint(lambda _: answer("", finish_reason="content_filter")))
    assert isinstance(error, RowError)
    assert error.cause == "content_filter"


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        (refusal(401, f"wrong key {KEY}"), "refuses the key in OPENAI_API_KEY (status 401)"),
        (refusal(403), "refuses the key in OPENAI_API_KEY (status 403)"),
        (refusal(404, "no such model", code="model_not_found"), "knows no model 'm'"),
        (refusal(400, "not with this model", param="temperature"), "refuses the settings"),
    ],
    ids=["401", "403", "404", "temperature"],
)
def test_what_no_request_can_pass_is_the_users_mistake(refused: web.Response, told: str) -> None:
    endpoint = Endpoint(lambda _: web.Response(body=refused.body, status=refused.status, headers=refused.headers))
    [error] = ask(endpoint)
    assert isinstance(error, ConfigError)
    assert told in str(error)
    assert "\n" not in str(error)
    assert len(endpoint.asked) == 1


def test_the_key_is_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        ask(Endpoint(lambda _: refusal(500), lambda _: answer()))
    assert KEY not in caplog.text


def test_openai_itself_wants_a_key_and_another_endpoint_need_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        OpenAIEngine(EngineConfig(engine="openai", model="m"))
    assert ask(Endpoint(lambda _: answer()))[0].text == "hello"


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "https://me:secret@host/v1", "https://host/v1?key=secret"])
def test_a_base_url_that_is_none_or_holds_a_secret_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(engine="openai", model="m", base_url=url)
    assert "secret" not in str(caught.value)


def test_an_endpoints_identity_is_its_host() -> None:
    config = EngineConfig(engine="openai", model="m", base_url="http://here:8000/v1")
    assert pinned(config, "policy") == config
    assert identity(config) == "at here"


# --- a real server --------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


@pytest.fixture
def vllm_server(llama_folder: Path, tmp_path: Path) -> Iterator[str]:
    """URL of vLLM's own server with the tiny Llama; takes half a minute to start."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(llama_folder)]
    command += ["--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--kv-cache-memory-bytes", str(1 << 26)]
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "2",
    }
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False, timeout=5).status_code == 200:
                    break
            except httpx2.TransportError:
                pass
            log_text = (tmp_path / "log").read_text(errors="replace")
            assert server.poll() is None and time.monotonic() < deadline, log_text[-4000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.long
def test_a_real_server_says_what_the_torch_engine_says(vllm_server: str, llama_folder: Path) -> None:
    from actors.engines.torch_engine import TorchEngine

    settings: dict[str, Any] = {"max_tokens": 24, "max_num_seqs": 16}
    requests = [Request((("user", f"Give me {i} reasons."),), i) for i in range(16)]
    too_long = Request((("user", "word " * 500),), 0)

    async def asking(engine: Any, asked: list[Request]) -> list[Any]:
        return await asyncio.gather(*map(engine.generate, asked), return_exceptions=True)

    torch_engine = TorchEngine(EngineConfig(model=str(llama_folder), dtype="float32", device="cpu", **settings), 2)
    expected = asyncio.run(asking(torch_engine, requests))
    torch_engine.close()
    here: dict[str, Any] = {"engine": "openai", "base_url": vllm_server, "retry_s": 10.0}
    *made, error = asyncio.run(
        asking(OpenAIEngine(EngineConfig(model="tiny", **here, **settings)), [*requests, too_long])
    )
    assert [one.num_prompt_tokens for one in made] == [one.num_prompt_tokens for one in expected]
    assert [one.finish_reason for one in made] == [one.finish_reason for one in expected]
    # The server leaves out a character that was cut at the end.
    assert [one.text.rstrip("\ufffd") for one in made] == [one.text.rstrip("\ufffd") for one in expected]
    assert isinstance(error, RowError) and error.cause == "rejected_by_endpoint"
    [unknown] = asyncio.run(asking(OpenAIEngine(EngineConfig(model="another", **here, **settings)), requests[:1]))
    assert isinstance(unknown, ConfigError) and "knows no model 'another'" in str(unknown)
