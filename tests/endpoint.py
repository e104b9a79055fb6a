"""An endpoint that speaks OpenAI's chat protocol: its answers are given, and what it was asked is kept."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint(ThreadingHTTPServer):
    """Answers a chat's last message with `answer(text)`, or fails with the status that this is; 503 while it `is_down`.

    Attributes:
        asked: the last messages of all requests, failed ones among them, in the order of their arrival.
    """

    daemon_threads = True
    is_down = False

    def __init__(self, answer: Callable[[str], str | int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        self.server.asked.append(text)
        answer = 503 if self.server.is_down else self.server.answer(text)
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        made = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        failed = isinstance(answer, int)
        data = json.dumps({"error": {"message": "no"}} if failed else made).encode()
        self.send_response(answer if isinstance(answer, int) else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None: ...


@contextlib.contextmanager
def serving(answer: Callable[[str], str | int]) -> Iterator[Endpoint]:
    """An endpoint on the loopback while the body runs."""
    with Endpoint(answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
