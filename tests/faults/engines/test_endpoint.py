"""An endpoint that is away for a while, for good, or for one row only, through the command line."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.end_to_end.jobs import CommandLine, by_place, corpus, quarantine, write_shard

NUM_ROWS = 12


class Endpoint(ThreadingHTTPServer):
    """Answers in capitals unless it `is_down`; fails at prompts with `POISON`, always."""

    daemon_threads = True
    is_down = False
    num_asked = 0


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        self.server.num_asked += 1
        status = 503 if self.server.is_down else 500 if "POISON" in text else 200
        message = {"role": "assistant", "content": text.upper()}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        made = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        data = json.dumps(made if status == 200 else {"error": {"message": "no"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def arguments(tmp_path: Path, endpoint: Endpoint, *poison: int, retry_s: float) -> list[str]:
    texts = [f"POISON {row}" if row in poison else f"row {row}" for row in range(NUM_ROWS)]
    write_shard(tmp_path / "in" / "a.parquet", {"prompt": texts})
    return [
        f"input.path={tmp_path / 'in'}",
        f"output.root={tmp_path / 'out'}",
        "policy=openai",
        "policy.model=m",
        f"policy.base_url=http://127.0.0.1:{endpoint.server_address[1]}/v1",
        f"policy.retry_s={retry_s}",
        "aligner=identity",
        "run.unit_rows=4",
    ]


def check(root: Path, *poison: int) -> None:
    rows = by_place(corpus(root))
    assert [row["aligned"][0]["text"] for row in rows] == [f"ROW {row}" for row in range(NUM_ROWS) if row not in poison]
    assert [row["source"]["row"] for row in quarantine(root)] == [*poison]


def test_an_outage_of_the_endpoint_is_waited_out_and_quarantines_nothing(
    command_line: CommandLine, endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.is_down = True
    running = command_line.start(*arguments(tmp_path, endpoint, retry_s=60))
    running.until(lambda: endpoint.num_asked, "it was asked")
    time.sleep(4)
    endpoint.is_down = False
    running.wait().expect(0)
    check(tmp_path / "out")


@pytest.mark.long
def test_an_outage_that_lasts_ends_the_job_with_5_and_the_same_command_goes_on(
    command_line: CommandLine, endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.is_down = True
    command = arguments(tmp_path, endpoint, retry_s=1)
    (line,) = command_line.run(*command).expect(5).errors
    assert line.startswith(f"error: 127.0.0.1:{endpoint.server_address[1]} is out (")
    assert "status 503" in line and line.endswith("the same command goes on from there")
    endpoint.is_down = False
    command_line.run(*command).expect(0)
    check(tmp_path / "out")


def test_a_row_that_the_endpoint_always_fails_at_is_quarantined_alone(
    command_line: CommandLine, endpoint: Endpoint, tmp_path: Path
) -> None:
    command_line.run(*arguments(tmp_path, endpoint, 5, retry_s=2)).expect(0)
    check(tmp_path / "out", 5)
    (bad,) = quarantine(tmp_path / "out")
    assert (bad["stage"], bad["cause"]) == ("policy", "failed_by_endpoint")
    assert bad["attempts"] == endpoint.num_asked - (NUM_ROWS - 1) - 3  # which were asked in between, to tell
