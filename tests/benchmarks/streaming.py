"""Measures what the pipeline costs between its pools: engines only sleep, so that every second lost is Ray's or ours.

    python tests/benchmarks/streaming.py [overlap] [nodes]

overlap: 1,000 units through two pools that take equally long; wall time over that of one of them alone (the aligner is
the identity), and over what its engine sleeps.
nodes: 8 nodes of 4 logical GPUs, 16 policies and 16 aligners, at ever more units/s; what comes out over the ideal.
An endpoint on the loopback that answers after a fixed time stands for the engines. Figures are printed, not asserted.
"""

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import web

UNITS_IN_FLIGHT = 2
NUM_NODES, GPUS_PER_NODE = 8, 4


@dataclass
class Endpoint:
    """An OpenAI-compatible endpoint that answers `sleep_s` seconds after it is asked."""

    sleep_s: float
    url: str = ""
    asked_at: list[float] = field(default_factory=list)
    answered_at: list[float] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.Response:
        self.asked_at.append(time.monotonic())
        body = await request.json()
        await asyncio.sleep(self.sleep_s)
        self.answered_at.append(time.monotonic())
        message = {"role": "assistant", "content": "An answer."}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        head = {"id": "0", "object": "chat.completion", "created": 0, "model": body["model"]}
        return web.json_response({**head, "choices": [choice], "usage": usage})

    def steady_rate(self) -> float:
        """Answers per second between half and nine tenths of them: before, there may be replicas yet to start."""
        first, last = len(self.answered_at) // 2, len(self.answered_at) * 9 // 10
        return (last - first) / (self.answered_at[last] - self.answered_at[first])


@contextlib.contextmanager
def serving(sleep_s: float) -> Iterator[Endpoint]:
    """An endpoint on a free port of the loopback, in a thread of its own."""
    endpoint = Endpoint(sleep_s)
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", endpoint.answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def run_job(
    folder: Path, num_units: int, policy: Endpoint, aligner: Endpoint | None, *overrides: str, **environment: str
) -> float:
    """One row a unit through both endpoints, or the first alone. Returns seconds from the command to its exit."""
    prompts = [f"Prompt {number}." for number in range(num_units)]
    pq.write_table(pa.table({"prompt": prompts}), folder / "prompts.parquet")
    command = [sys.executable, str(ROOT / "pipelines" / "align_corpus.py"), "run.unit_rows=1"]
    command += [f"input.path={folder / 'prompts.parquet'}", f"output.root={folder / 'output'}"]
    for pool, endpoint in (("policy", policy), ("aligner", aligner)):
        if endpoint is None:
            command.append(f"{pool}=identity")
            continue
        command += [f"{pool}=openai" if pool == "policy" else "aligner.engine=openai", f"{pool}.model=sleeper"]
        command += [f"{pool}.base_url={endpoint.url}", f"{pool}.units_in_flight={UNITS_IN_FLIGHT}"]
    begin = time.monotonic()
    job = subprocess.run([*command, *overrides], env={**os.environ, **environment}, capture_output=True, text=True)
    if job.returncode:
        sys.exit(f"the job ended with {job.returncode}: {job.stderr[-2000:]}")
    return time.monotonic() - begin


def overlap(num_units: int, sleep_s: float) -> None:
    with tempfile.TemporaryDirectory() as name, serving(sleep_s) as policy:
        run_job(Path(name), num_units, policy, None, "site.ray_address=local")
        alone = policy.answered_at[-1] - policy.asked_at[0]
    with tempfile.TemporaryDirectory() as name, serving(sleep_s) as policy, serving(sleep_s) as aligner:
        seconds = run_job(Path(name), num_units, policy, aligner, "site.ray_address=local")
        both = aligner.answered_at[-1] - policy.asked_at[0]
    least = num_units * sleep_s / UNITS_IN_FLIGHT
    told = f"target 1.1: {'met' if both <= 1.1 * alone else 'missed'}"
    print(
        f"overlap: {num_units} units, {sleep_s:g} s in either pool, from the first prompt to the last answer: "
        f"{both:.1f} s by both, {alone:.1f} s by one pool alone, {least:.0f} s asleep: {both / alone:.3f}x of one, "
        f"{told}; {both / least:.3f}x of the sleep; {seconds:.0f} s with start-up",
        flush=True,
    )


def nodes(rates: list[float], seconds_each: float) -> None:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for _ in range(NUM_NODES):
            cluster.add_node(
                num_cpus=16, num_gpus=GPUS_PER_NODE, object_store_memory=100 << 20,
                include_dashboard=False,
            )  # fmt: skip
        cluster.wait_for_nodes()
        each = NUM_NODES * GPUS_PER_NODE // 2
        pools = [f"{pool}.{key}" for pool in ("policy", "aligner") for key in ("num_gpus=1", f"replicas={each}")]
        for ideal in rates:
            sleep_s = each * UNITS_IN_FLIGHT / ideal
            with tempfile.TemporaryDirectory() as name, serving(sleep_s) as policy, serving(sleep_s) as aligner:
                num_units = round(ideal * seconds_each)
                run_job(Path(name), num_units, policy, aligner, *pools, RAY_ADDRESS=cluster.address)
            print(
                f"nodes: {NUM_NODES} nodes x {GPUS_PER_NODE} GPUs, {each} + {each} replicas, {num_units} units, ideal "
                f"{ideal:g} units/s: {aligner.steady_rate():.1f} units/s, {aligner.steady_rate() / ideal:.2f} of it",
                flush=True,
            )
    finally:
        cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["overlap", "nodes"], help="overlap, nodes; both unless given")
    parser.add_argument("--units", type=int, default=1000, help="of the overlap run")
    parser.add_argument("--sleep", type=float, default=0.2, help="seconds that an engine of the overlap run takes")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[8, 16, 32, 64], help="ideal units/s of the nodes run"
    )
    parser.add_argument("--seconds-each", type=float, default=60, help="that a nodes run would take ideally")
    arguments = parser.parse_args()
    if "overlap" in arguments.parts:
        overlap(arguments.units, arguments.sleep)
    if "nodes" in arguments.parts:
        nodes(arguments.rates, arguments.seconds_each)


if __name__ == "__main__":
    main()
