"""A long campaign of random kills and faults against the real command line; what it publishes must be a clean run's.

    python tests/faults/campaign.py [--kills 220] [--seed 1]

A cluster of three nodes on the loopback, an S3 server behind a proxy that fails a few requests of a hundred in every
way it knows, and an endpoint that answers each prompt after a moment. Round after round a new job is run to its end,
however often it takes, while its driver, actors, tasks, nodes and the store are killed with kill -9: at random moments,
and at chosen ones of its commits and its publishing. It prints a table, and ends with 1 where any round lost a row,
published one twice, hung, or ended with an exit code that is none of an interruption.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import psutil
from aiohttp import web

from tests.end_to_end.jobs import CommandLine, Job, Row, plain_environment
from tests.faults.proxy import FaultProxy, Head, Rule
from tests.faults.store import published, upload, write_prompts
from tests.processes import killed
from tests.s3_server import BUCKET, ENVIRONMENT, S3Server, s3_server

ROUND_LIMIT_S = 600.0
ANSWER_S = 0.25
FAULT_SHARE = 0.01
MOMENTS = {
    "a unit's commit": ("PUT", r"/units/.*\.parquet"),
    "the plan": ("PUT", r"/corpus/.*/plan\.json"),
    "a corpus part": ("PUT", r"/corpus/.*/part-"),
    "a quarantine part": ("PUT", r"/quarantine/.*/part-"),
    "the manifest": ("PUT", r"/corpus/.*/manifest\.json"),
    "_SUCCESS": ("PUT", r"/corpus/.*/_SUCCESS"),
    "the units' deletion": ("POST", r"\?delete"),
}
"""Requests upon which the driver or the store is killed: the request is then on its way, or never was."""

TITLES = {"policy actor": "PolicyStage", "aligner actor": "AlignerStage", "committing actor": "Committing"}
VICTIMS = ["driver", *TITLES, "reading task", "raylet of a node", "node", "store"]
WEIGHTS = [3, 3, 3, 3, 2, 2, 2, 2]
DONE, OUTAGE, KILLED = 0, 5, -9


@dataclass
class Outcome:
    """What a campaign did and found."""

    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    exits: Counter[int] = field(default_factory=Counter)
    num_rounds: int = 0
    num_rows: int = 0
    failures: list[str] = field(default_factory=list)

    def table(self) -> str:
        lines = ["| what | how often |", "|---|---|"]
        lines += [f"| kill -9: {victim} | {count} |" for victim, count in sorted(self.kills.items())]
        lines += [f"| request: {kind} | {count} |" for kind, count in sorted(self.faults.items())]
        ends = ", ".join(f"{count} x exit {code}" for code, count in sorted(self.exits.items()))
        found = f"{self.num_rows} rows in {self.num_rounds} rounds, each compared with a clean run; {ends}"
        return "\n".join([*lines, "", found, f"{self.kills.total()} kills, {len(self.failures)} rounds failed"])


# --- where it happens -----------------------------------------------------------------------------------------------


class Cluster:
    """A head and two more nodes, which may be killed and are replaced."""

    def __init__(self) -> None:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        from ray.cluster_utils import Cluster as RayCluster

        self._cluster = RayCluster()
        self._add()
        self.others = [self._add(), self._add()]
        self._cluster.wait_for_nodes()
        self.address = str(self._cluster.address)

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=8, object_store_memory=80 << 20, include_dashboard=False)

    def kill(self, rng: random.Random, *, raylet_only: bool) -> bool:
        """Kill a node that is not the head, all of it or its raylet alone, and add another. Returns whether it lived
        until then and its raylet is gone."""
        node = self.others.pop(rng.randrange(len(self.others)))
        raylet = node.all_processes["raylet"][0].process
        was_alive = raylet.poll() is None
        if raylet_only:
            raylet.kill()
            raylet.wait()
        with contextlib.suppress(Exception):  # what is left of a node whose raylet is gone
            self._cluster.remove_node(node, allow_graceful=False)
        self.others.append(self._add())
        return was_alive and raylet.poll() is not None

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextlib.contextmanager
def echoing() -> Iterator[str]:
    """URL of an endpoint that answers what it was asked, ANSWER_S seconds later."""

    async def answer(request: web.Request) -> web.Response:
        body = await request.json()
        await asyncio.sleep(ANSWER_S)
        message = {"role": "assistant", "content": f"You asked: {body['messages'][-1]['content']}"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        head = {"id": "0", "object": "chat.completion", "created": 0, "model": body["model"]}
        return web.json_response({**head, "choices": [choice], "usage": usage})

    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


# --- a round --------------------------------------------------------------------------------------------------------


@dataclass
class Round:
    """One output root, run until its command says that it is done.

    `kills` is how many are still to come in it, `deadline` when it counts as hung (time.monotonic).
    """

    arguments: list[str]
    command_line: CommandLine
    cluster: Cluster
    server: S3Server
    proxy: FaultProxy
    rng: random.Random
    outcome: Outcome
    kills: int
    deadline: float = field(default_factory=lambda: time.monotonic() + ROUND_LIMIT_S)
    _store: threading.Lock = field(default_factory=threading.Lock)
    _revival: threading.Timer | None = None

    def run(self) -> str | None:
        """What went wrong; None where nothing did."""
        while time.monotonic() < self.deadline:
            job = self.command_line.start(*self.arguments)
            self._arm(job)
            num_random, early = self.rng.randint(0, 5), self.rng.random() < 0.2
            while job.process.poll() is None and time.monotonic() < self.deadline:
                time.sleep(self.rng.uniform(0.2, 1.0))
                early = early or bool(_workers(TITLES["policy actor"]))  # or all would be over before there are actors
                if early and num_random and self.kills > 0 and job.process.poll() is None:
                    num_random -= self._kill(job, self.rng.choices(VICTIMS, WEIGHTS)[0])
            self.proxy.on_request = lambda head: None
            if self._revival is not None:
                self._revival.join()
            if job.process.poll() is None:
                job.process.kill()
                break
            code = job.process.returncode
            self.outcome.exits[code] += 1
            if code == DONE:
                return None
            if code not in (OUTAGE, KILLED):
                return f"exit code {code}\n{job.wait()}"
        return f"not done after {ROUND_LIMIT_S:g} s\n{job.wait()}"

    def _arm(self, job: Job) -> None:
        """Have the driver or the store killed as soon as a chosen request arrives, if one does."""
        if self.kills <= 0 or self.rng.random() < 0.2:
            return
        victim, moment = self.rng.choice(("driver", "store")), self.rng.choice(list(MOMENTS))
        method, path = MOMENTS[moment]
        left = self.rng.randrange(12) if "unit's" in moment else 0
        away_s = self.rng.uniform(0, 2)

        def on_request(head: Head) -> None:
            nonlocal left
            if head.method != method or not re.search(path, head.path):
                return
            left -= 1
            if left != -1:
                return
            if victim == "driver":
                died = _driver_killed(job)
            else:
                with self._store:
                    died = self.server.kill()
                    self._revival = threading.Timer(away_s, self._revive)
                    self._revival.start()
            if died:
                self._count(f"{victim} at {moment}")

        self.proxy.on_request = on_request

    def _revive(self) -> None:
        with self._store:
            self.server.start()

    def _kill(self, job: Job, victim: str) -> bool:
        """Kill one such process now. Returns whether there was one, and it died of that; it is counted only then."""
        if victim == "driver":
            died = _driver_killed(job)
        elif victim == "store":
            if self._revival is not None and self._revival.is_alive():
                return False
            with self._store:
                died = self.server.kill()
                time.sleep(self.rng.uniform(0, 2))
                self.server.start()
        elif victim in ("node", "raylet of a node"):
            died = self.cluster.kill(self.rng, raylet_only=victim != "node")
        else:
            found = _workers(TITLES.get(victim, "ReadUnits"))
            died = bool(found) and killed(self.rng.choice(found))
        if died:
            self._count(victim)
        return died

    def _count(self, victim: str) -> None:
        self.kills -= 1
        self.outcome.kills[victim] += 1


def _driver_killed(job: Job) -> bool:
    """kill -9 the driver. Returns whether it ran until then and that is what ended it."""
    if job.process.poll() is not None:
        return False
    job.process.kill()
    return job.process.wait() == KILLED


def _workers(title: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if line and line[0].startswith("ray::") and title in line[0]:
                found.append(process)
    return found


# --- the campaign ---------------------------------------------------------------------------------------------------


def campaign(
    server: S3Server,
    folder: Path,
    *,
    num_kills: int,
    kills_a_round: int,
    num_shards: int,
    seed: int,
    minutes: float = 1e6,
    say: Callable[[str], None],
) -> Outcome:
    """Run rounds until so many kills were made, or a few more. The store's credentials must be in the environment."""
    outcome, rng = Outcome(), random.Random(seed)
    deadline = time.monotonic() + minutes * 60
    prompts = write_prompts(folder / "prompts", num_shards)
    numbers = iter(range(1_000_000))

    def new_folder() -> Path:
        path = folder / f"job-{next(numbers)}"
        path.mkdir()
        return path

    cluster = Cluster()
    try:
        environment = {**plain_environment(), "RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
        with (
            echoing() as endpoint,
            FaultProxy(server.port, seed) as proxy,
            CommandLine(environment, os.getpid(), new_folder) as command_line,
        ):
            options = {
                "endpoint_url": proxy.endpoint,
                "config_kwargs": {"connect_timeout": 5, "read_timeout": 10, "retries": {"max_attempts": 2}},
            }
            common = [
                "policy=openai", "policy.model=echo", f"policy.base_url={endpoint}", "policy.max_num_seqs=4",
                "policy.replicas=2", "policy.units_in_flight=1", "aligner=identity", "aligner.replicas=2",
                "input.id_column=id", "run.unit_rows=5", "run.lease_ttl_s=3", "run.stall_minutes=2",
                f"site.storage_options={json.dumps(options)}", "output.part_mib=0", "run.wait_for_resources_s=60",
            ]  # fmt: skip
            clean_root = folder / "clean"
            command_line.run(*common, f"input.path={prompts}", f"output.root={clean_root}").expect(0)
            clean = published(str(clean_root))
            upload(prompts, f"s3://{BUCKET}/campaign-{seed}/prompts", server.endpoint)
            proxy.rules = [
                Rule(kind, times=1_000_000, share=FAULT_SHARE, stall_s=rng.uniform(0.5, 15))
                for kind in ("slow_down", "internal", "reset", "truncated", "lost_answer")
            ] + [Rule("stall", times=1_000_000, share=FAULT_SHARE / 10, stall_s=15)]
            while outcome.kills.total() < num_kills and time.monotonic() < deadline:
                root = f"s3://{BUCKET}/campaign-{seed}/output-{outcome.num_rounds}"
                arguments = [*common, f"input.path=s3://{BUCKET}/campaign-{seed}/prompts", f"output.root={root}"]
                most = min(kills_a_round, num_kills - outcome.kills.total())
                begin = time.monotonic()
                wrong = Round(arguments, command_line, cluster, server, proxy, rng, outcome, most).run()
                wrong = wrong or _difference(root, server.endpoint, clean)
                outcome.num_rounds += 1
                outcome.num_rows += len(clean[0]) + len(clean[1])
                if wrong:
                    outcome.failures.append(wrong)
                say(
                    f"round {outcome.num_rounds}: {time.monotonic() - begin:.0f} s, {outcome.kills.total()} kills so "
                    f"far, {'as a clean run' if not wrong else 'WRONG: ' + wrong}"
                )
                if len(outcome.failures) >= 3:
                    break
            outcome.faults.update(proxy.counts)
    finally:
        cluster.shutdown()
    return outcome


def _difference(root: str, endpoint: str, clean: tuple[list[Row], list[Row]]) -> str | None:
    """What is published otherwise than in a clean run; None where nothing is."""
    try:
        found = published(root, endpoint)
    except AssertionError as error:
        return str(error)
    for kind, here, there in zip(("corpus", "quarantine"), found, clean, strict=True):
        if here != there:
            differing = [(one, other) for one, other in zip(here, there, strict=False) if one != other]
            return f"{kind}: {len(here)} rows instead of {len(there)}; the first that differ: {differing[:1]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=220, help="in all")
    parser.add_argument("--kills-a-round", type=int, default=12, help="at most, before a job may end in peace")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600, help="begin no further round after so long")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with s3_server() as (server, folder):
        outcome = campaign(
            server, folder, num_kills=arguments.kills, kills_a_round=arguments.kills_a_round, num_shards=4,
            seed=arguments.seed, minutes=arguments.minutes, say=lambda line: print(line, flush=True),
        )  # fmt: skip
    print(outcome.table())
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
