"""The `openai` engine: an endpoint that speaks OpenAI's protocol, asked over HTTP; outages are waited out."""

import asyncio
import os
import random
import time
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import urlsplit

import openai
from openai import AsyncOpenAI

from actors.contract import ConfigError, RowError, TransientError
from actors.engines.base import OPENAI, Completion, EngineConfig, EngineStats, Messages, Request

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""Between two tries: twice as long each time, less up to half of it by chance, so that those who wait do not march."""
NUM_ACCUSATIONS = 3
"""Times in a row that an endpoint must fail a request and answer another right after, before that is to blame."""
PROBE, PROBE_TOKENS = "Hello", 16
"""What any endpoint that is there answers."""
SETTINGS = {"model", "temperature", "top_p", "top_k", "stop", "seed"}
"""What every request has in common: an endpoint that refuses one of these refuses them all."""


class OpenAIEngine:
    """Keeps `max_num_seqs` requests at the endpoint. For one event loop.

    The key comes from the environment variable `api_key_env` and is in no message, log or repr of this class's making.

    Raises ConfigError where OpenAI itself is to be asked and there is no key.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._key = os.environ.get(config.api_key_env, "").strip()
        if not self._key and config.base_url is None:
            raise ConfigError(f"the environment variable {config.api_key_env} is not set; it must hold the API key")
        self._host = urlsplit(config.base_url or OPENAI).netloc
        self._client = AsyncOpenAI(
            api_key=self._key or "none",  # the client wants one; an endpoint without keys ignores it
            base_url=config.base_url or OPENAI,
            timeout=config.request_timeout_s,
            max_retries=0,  # they are counted here
        )
        self._places = asyncio.Semaphore(config.max_num_seqs)
        self._answered_at = 0.0
        self._num_tokens = self._num_running = self._num_waiting = 0

    async def generate(self, request: Request) -> Completion:
        """Make one candidate. Token counts are the endpoint's own: most count the end of sequence.

        Raises:
            RowError: `rejected_by_endpoint` (its context is too short, for example), `content_filter`, or
                `failed_by_endpoint`: no answer for `retry_s` seconds from an endpoint that answers others meanwhile.
            ConfigError: the key, the model's name or a setting is refused.
            TransientError: no answer for `retry_s` seconds.
        """
        self._num_waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._num_waiting -= 1
        self._num_running += 1
        try:
            return await self._persist(request)
        finally:
            self._num_running -= 1
            self._places.release()

    def stats(self) -> EngineStats:
        return EngineStats(self._num_tokens, self._num_running, self._num_waiting)

    def close(self) -> None:
        """Connections end with the process or the client."""

    async def _persist(self, request: Request) -> Completion:
        """Ask until there is an answer.

        After `retry_s` seconds without, the request itself may be what the endpoint fails at, every night again. Then
        it is asked for something else after each failure. An endpoint that is out does not answer that; one that has
        just come back does, and then it answers the request too.
        """
        failed_at: float | None = None
        num_accusations = 0
        for num_tries in range(1, 1 << 30):
            is_crowded = False
            try:
                async with asyncio.timeout(self._config.request_timeout_s):
                    completion = await self._ask(request)
            except (TimeoutError, openai.APITimeoutError):
                reason, asked_wait = f"no answer within {self._config.request_timeout_s:g} s", 0.0
            except openai.APIConnectionError as error:
                reason, asked_wait = self._clean(f"no connection: {error.__cause__ or error}"), 0.0
            except openai.APIStatusError as error:
                self._raise_unless_transient(error)
                is_crowded = error.status_code == 429
                reason = f"status {error.status_code}: {self._said(error)}"
                asked_wait = _retry_after(error.response.headers.get("retry-after"))
                if is_crowded and failed_at is not None:  # crowded is not out: others are answered
                    failed_at = max(failed_at, self._answered_at)
            except _Unreadable as error:
                reason, asked_wait = f"an answer that cannot be read: {self._clean(str(error))}", 0.0
            else:
                self._answered_at = time.monotonic()
                self._num_tokens += completion.num_tokens or 0
                return completion
            failed_at = failed_at or time.monotonic()
            longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(num_tries - 1, 20))
            wait = max(asked_wait, longest * random.uniform(0.5, 1))
            if time.monotonic() + wait > failed_at + self._config.retry_s:
                if is_crowded or not await self._answers_others(request):
                    times = f"{num_tries} tries" if num_tries > 1 else "1 try"
                    raise TransientError(f"{self._host} is out ({times}, retry_s {self._config.retry_s:g}): {reason}")
                num_accusations += 1
                if num_accusations == NUM_ACCUSATIONS:
                    raise RowError("failed_by_endpoint", f"{reason} (others are answered)", attempts=num_tries)
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _answers_others(self, request: Request) -> bool:
        """Whether the endpoint answers anything else now, asked as this request is."""
        prompt: Messages | str = PROBE if isinstance(request.prompt, str) else (("user", PROBE),)
        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                await self._ask(Request(prompt, seed=0), PROBE_TOKENS)
        except openai.APIStatusError as error:
            return error.status_code not in (408, 409, 429) and error.status_code < 500
        except (TimeoutError, openai.APIConnectionError, _Unreadable):
            return False
        except RowError:  # its content filter: an answer all the same
            return True
        return True

    async def _ask(self, request: Request, max_tokens: int | None = None) -> Completion:
        config = self._config
        max_tokens = max_tokens or config.max_tokens
        settings: dict[str, Any] = {
            "model": config.model,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": request.seed,
            # OpenAI's newer models refuse the older name, most other servers know no other.
            "max_completion_tokens" if config.base_url is None else "max_tokens": max_tokens,
        }
        if config.stop:
            settings["stop"] = config.stop
        if config.top_k is not None:
            settings["extra_body"] = {"top_k": config.top_k}
        try:
            if isinstance(request.prompt, str):
                settings["max_tokens"] = settings.pop("max_completion_tokens", max_tokens)
                answer: Any = await self._client.completions.create(prompt=request.prompt, **settings)
            else:
                answer = await self._client.chat.completions.create(messages=_chat(request.prompt), **settings)
        except UnicodeEncodeError as error:
            raise RowError("rejected_by_endpoint", f"the prompt cannot be sent: {error.reason}") from None
        except (ValueError, openai.APIResponseValidationError) as error:
            raise _Unreadable(str(error)) from None
        return _completion(answer)

    def _raise_unless_transient(self, error: openai.APIStatusError) -> None:
        """Raises ConfigError for what is wrong with every request, RowError for what is wrong with this one."""
        status, message = error.status_code, self._said(error)
        if status in (408, 409, 429) or status >= 500:
            return
        name = self._config.api_key_env
        if status in (401, 403):  # not what the endpoint says: it may repeat the key
            what = f"refuses the key in {name}" if self._key else f"wants a key: put it into {name}"
            raise ConfigError(f"{self._host} {what} (status {status})") from None
        if status == 404:
            model = self._config.model
            path = urlsplit(str(self._client.base_url)).path
            raise ConfigError(
                f"{self._host} knows no model {model!r}, or serves no API below {path} (base_url ends in /v1, mostly): "
                f"{message}"
            ) from None
        unsupported = error.code in ("unsupported_parameter", "unsupported_value", "unknown_parameter")
        if unsupported or error.param in SETTINGS:
            raise ConfigError(f"{self._host} refuses the settings: {message}") from None
        raise RowError("rejected_by_endpoint", f"status {status}: {message}") from None

    def _said(self, error: openai.APIStatusError) -> str:
        return self._clean(error.message.removeprefix(f"Error code: {error.status_code} - "))

    def _clean(self, text: str) -> str:
        """One line of at most 500 characters, without the key."""
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:500]


class _Unreadable(Exception):
    """An answer with status 200 that is none."""


def _chat(messages: Messages) -> Any:
    return [{"role": role, "content": content} for role, content in messages]


def _completion(answer: Any) -> Completion:
    """Raises RowError `content_filter`, or _Unreadable."""
    choices = getattr(answer, "choices", None)  # a server that sends no JSON is read as text
    if not choices:
        raise _Unreadable(str(answer))
    reason = choices[0].finish_reason
    if reason == "content_filter":
        raise RowError("content_filter", "the endpoint's content filter stopped this answer")
    if reason in ("abort", "error"):
        raise _Unreadable(f"finish_reason {reason}")
    message = getattr(choices[0], "message", None)
    reasoning: str | None = None
    if message is None:
        text = choices[0].text or ""
    else:
        text = message.content or message.refusal or ""
        extra = message.model_extra or {}
        reasoning = extra.get("reasoning_content") or extra.get("reasoning") or None
    finish_reason: Literal["stop", "length"] = "length" if reason == "length" else "stop"
    usage = answer.usage
    if usage is None:
        return Completion(text, finish_reason, None, None, reasoning)
    return Completion(text, finish_reason, usage.prompt_tokens, usage.completion_tokens, reasoning)


def _retry_after(header: str | None) -> float:
    """Seconds, from a number of them or a date; 0 where neither is told."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(str(header)).timestamp() - time.time())
    except ValueError:
        return 0.0
