"""A proxy between a job and its object store that does to requests what networks and stores do to them."""

import asyncio
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["slow_down", "internal", "reset", "truncated", "stall", "lost_answer", "skewed", "expired"]

ANSWERS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal": (500, "InternalError", "We encountered an internal error. Please try again."),
    "skewed": (403, "RequestTimeTooSkewed", "The difference between the request time and the server's is too large."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}
"""Kinds that never reach the store: status, code and message, as S3 documents them."""


@dataclass
class Rule:
    """Which requests fail, and how.

    Attributes:
        kind: reset and truncated end the answer in the middle of its body, without and with an orderly end of the
            connection; stall holds the request `stall_s` seconds; lost_answer lets it happen and says nothing.
        method: of the requests.
        path: regular expression, found anywhere in the path and query.
        first: matching requests that pass before.
        times: matching requests that fail after them.
        share: of these, chosen at random.
    """

    kind: Kind
    method: str = "GET|PUT|POST|DELETE|HEAD"
    path: str = ""
    first: int = 0
    times: int = 1
    share: float = 1.0
    stall_s: float = 1.0

    def hits(self, head: "Head", rng: random.Random) -> bool:
        """Whether this request fails; counts it."""
        if not re.fullmatch(self.method, head.method) or not re.search(self.path, head.path):
            return False
        if self.first > 0:
            self.first -= 1
            return False
        if self.times <= 0 or rng.random() >= self.share:
            return False
        self.times -= 1
        return True


class Head(NamedTuple):
    """The first line of a request and its headers, names in lower case."""

    method: str
    path: str
    raw: bytes
    headers: dict[str, str]


class FaultProxy:
    """Listens on a free port of the loopback, in a thread of its own, and passes requests on to the store.

    As a context manager it stops at its end. `rules` may be changed at any time; the first one that hits decides.
    `counts` are faults by kind, `num_requests` all requests.
    """

    def __init__(self, port: int, seed: int = 0) -> None:
        self._upstream = port
        self._rng = random.Random(seed)
        self.rules: list[Rule] = []
        self.counts: Counter[str] = Counter()
        self.num_requests = 0
        self.on_request: Callable[[Head], None] = lambda head: None
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        async def stop() -> None:
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):  # either side has gone, or the proxy
            writer.transport.abort()
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Pass on one request. Returns whether the connection goes on."""
        head = _parsed(await reader.readuntil(b"\r\n\r\n"))
        self.num_requests += 1
        self.on_request(head)
        if "100-continue" in head.headers.get("expect", ""):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _body(reader, head.headers)
        rule = next((rule for rule in self.rules if rule.hits(head, self._rng)), None)
        if rule is not None:
            self.counts[rule.kind] += 1
            if rule.kind == "stall":
                await asyncio.sleep(rule.stall_s)
            elif rule.kind in ANSWERS:
                writer.write(_refusal(*ANSWERS[rule.kind], with_body=head.method != "HEAD"))
                await writer.drain()
                return True
        status, answer = await self._forwarded(head, body)
        if rule is not None and rule.kind == "lost_answer":
            _reset(writer)
            return False
        if rule is not None and rule.kind in ("reset", "truncated"):
            writer.write(status + answer[: len(answer) // 2])
            await writer.drain()
            if rule.kind == "reset":
                _reset(writer)
            return False
        writer.write(status + answer)
        await writer.drain()
        return True

    async def _forwarded(self, head: Head, body: bytes) -> tuple[bytes, bytes]:
        """The store's answer: status and headers, body. Raises OSError where there is no store."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        try:
            lines = [
                line for line in head.raw.split(b"\r\n") if not line.lower().startswith((b"expect:", b"connection:"))
            ]
            writer.write(b"\r\n".join([*lines[:-2], b"Connection: close", b"", b""]) + body)
            await writer.drain()
            raw = await reader.readuntil(b"\r\n\r\n")
            answer = b"" if head.method == "HEAD" else await reader.read()
        finally:
            writer.close()
        length = _parsed(b"A A A\r\n" + raw.partition(b"\r\n")[2]).headers.get("content-length")
        if length is not None and head.method != "HEAD" and len(answer) < int(length):
            raise ConnectionResetError("the store went away in the middle of its answer")
        lines = [line for line in raw.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        return b"\r\n".join(lines), answer


def _parsed(raw: bytes) -> Head:
    first, *lines = raw.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ", 2)
    headers = dict(line.split(":", 1) for line in lines if ":" in line)
    return Head(method, path, raw, {name.lower(): value.strip() for name, value in headers.items()})


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    """A request's body as it came, chunks included."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    found = b""
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        found += line + await reader.readexactly(size + 2)
        if size == 0:
            return found


def _refusal(status: int, code: str, message: str, with_body: bool) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + (body if with_body else b"")


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close the connection with a reset instead of an end."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
