"""A cluster of several nodes, here on one machine with logical GPUs: replicas stay whole, nodes come and go."""

import asyncio
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ray._private.node import Node
from ray.cluster_utils import Cluster

from actors.candidates import made
from actors.engines.base import Completion, Request
from actors.engines.torch_engine import TorchEngine
from actors.recipes import aligner_input
from pipelines.config import compose
from pipelines.settings import AlignCorpusConfig
from tests.end_to_end.conftest import tiny_pool
from tests.end_to_end.jobs import CommandLine, Job, corpus, followers, num_units, plain_environment, write_shard

NUM_ROWS = 120
TEXTS = [f"Text {number}." for number in range(NUM_ROWS)]
STORED = ["policy=stored", "input.response_column=response"]


@dataclass(frozen=True)
class Nodes:
    """A cluster to which nodes can be added; the command line joins it."""

    cluster: Cluster
    command_line: CommandLine

    def where(self, job: Job, pool: str) -> Counter[int]:
        """pid of a node's raylet -> replicas of the pool that run there."""
        return Counter(actor.ppid() for actor in job.actors(pool))


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, new_folder: Callable[[], Path]) -> Iterator[Nodes]:
    """One node with 8 logical GPUs, the head. Its processes are ended by pid."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster()
    try:
        add_node(cluster, num_gpus=8)
        environment = {**plain_environment(), "RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
        with CommandLine(environment, os.getpid(), new_folder) as command_line:
            yield Nodes(cluster, command_line)
    finally:
        cluster.shutdown()


def add_node(cluster: Cluster, num_gpus: int) -> Node:
    """Add a node; it is there when this returns."""
    node = cluster.add_node(
        num_cpus=16, num_gpus=num_gpus, labels={"zone": "a"}, object_store_memory=100 << 20, include_dashboard=False
    )
    cluster.wait_for_nodes()
    return node


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """A job of many small units."""
    write_shard(tmp_path / "prompts.parquet", {"prompt": TEXTS, "response": TEXTS})
    return [f"input.path={tmp_path / 'prompts.parquet'}", f"output.root={tmp_path / 'output'}", "run.unit_rows=2"]


def raylet(node: Node) -> int:
    """pid of a node's raylet, whose children its actors are."""
    return int(node.all_processes["raylet"][0].process.pid)


def test_replicas_stay_whole_on_their_nodes(nodes: Nodes, job: list[str]) -> None:
    """Three nodes of 8 GPUs: three aligners of 5, two policies of 3 in what is left; 24 GPUs hold no fourth of 5."""
    add_node(nodes.cluster, num_gpus=8)
    add_node(nodes.cluster, num_gpus=8)
    pools = [*STORED, "policy.num_gpus=3", "policy.replicas=2", "aligner=identity", "aligner.num_gpus=5"]
    refused = nodes.command_line.run(*job, *pools, "aligner.replicas=4").expect(2)
    assert "the pools do not fit on this cluster: no place for 1 of aligner" in refused.stderr.replace(
        "2 of policy, ", ""
    )

    dry = nodes.command_line.run(*job, *pools, "aligner.replicas=4", "--dry-run").expect(2)
    assert dry.errors == refused.errors
    assert len(re.findall(r"[:;] [0-9.]+: 8 GPUs, 16 CPUs, zone=a", refused.stderr)) == 3

    dry = nodes.command_line.run(*job, *pools, "aligner.replicas=3", "--dry-run").expect(0)
    held = [
        {name: int(count) for count, name in re.findall(r"([0-9]+) of (\w+)", here)}
        for here in re.findall(r"^node [0-9.]+: 8 GPUs, 16 CPUs, zone=a: (.+)$", dry.stdout, re.MULTILINE)
    ]
    assert [each["aligner"] for each in held] == [1, 1, 1]
    assert sorted(each.get("policy", 0) for each in held) == [0, 1, 1]
    assert [sum(each.get(name, 0) for each in held) for name in ("reading", "committing")] == [2, 1]

    running = nodes.command_line.start(*job, *pools, "aligner.replicas=3")
    placed = running.until(lambda: found if (found := nodes.where(running, "aligner")).total() == 3 else None, "3 run")
    assert sorted(placed.values()) == [1, 1, 1]
    running.wait().expect(0)


@pytest.mark.long
def test_tensor_parallel_groups_stay_on_their_nodes(
    nodes: Nodes, job: list[str], tiny_llama: Path, tmp_path: Path
) -> None:
    """Three nodes of 8 GPUs, of which the policy leaves 2 each: an aligner of two ranks on every node, real engines."""
    others = [add_node(nodes.cluster, num_gpus=8) for _ in range(2)]
    pools = [*STORED, "policy.num_gpus=6", "policy.replicas=3", *tiny_pool("aligner", tiny_llama, max_tokens=24)]
    pools += ["aligner.num_gpus=2", "aligner.tensor_parallel_size=2", "aligner.template={{ question }} {{ answer }}"]
    running = nodes.command_line.start(*job, *pools, "aligner.replicas=3")
    below = [psutil.Process(raylet(node)) for node in (nodes.cluster.head_node, *others)]
    running.until(lambda: all(map(followers, below)), "each node had a second rank")
    assert nodes.where(running, "aligner") == {node.pid: 1 for node in below}
    assert [len(followers(actor)) for actor in running.actors("aligner")] == [1, 1, 1]
    running.wait().expect(0)
    rows = corpus(tmp_path / "output")
    one_rank = ["aligner.num_gpus=0", "aligner.tensor_parallel_size=1"]
    assert [row["aligned"][0]["text"] for row in rows] == aligned_undisturbed([*job, *pools, *one_rank])


@pytest.mark.long
def test_a_job_that_would_have_no_cpu_to_read_and_commit_by_is_refused(nodes: Nodes, job: list[str]) -> None:
    """Reading and committing take 0.75 CPUs of the node's 16."""
    pools = [*STORED, "aligner=identity", "policy.num_cpus=8"]
    (line,) = nodes.command_line.run(*job, *pools, "aligner.num_cpus=8").expect(2).errors
    assert "no place for 2 of reading (lower the pools' num_cpus or replicas, or add nodes), 1 of committing (" in line
    assert "aligner: 1 x 8 CPUs; reading: 2 x 0.25 CPUs; committing: 1 x 0.25 CPUs. Nodes: " in line
    nodes.command_line.run(*job, *pools, "aligner.num_cpus=7.25").expect(0)


@pytest.mark.long
def test_what_fits_finds_its_place_whatever_starts_first(nodes: Nodes, job: list[str]) -> None:
    """Two policies of 4 GPUs, started first and spread as Ray spreads them, would leave no node whole for the 8."""
    add_node(nodes.cluster, num_gpus=8)
    pools = [*STORED, "policy.num_gpus=4", "policy.replicas=2", "aligner=identity", "aligner.num_gpus=8"]
    running = nodes.command_line.start(*job, *pools, "policy.label_selector.zone=a", "run.stall_minutes=1")
    placed = running.until(lambda: found if (found := nodes.where(running, "policy")).total() == 2 else None, "2 run")
    assert list(placed.values()) == [2]
    assert "Warning" not in running.wait().expect(0).stderr


@pytest.mark.long
def test_a_node_that_dies_costs_no_row(nodes: Nodes, job: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    doomed = add_node(nodes.cluster, num_gpus=1)
    pools = [*STORED, *tiny_pool("aligner", tiny_llama, max_tokens=24), "aligner.num_gpus=1", "aligner.replicas=2"]
    pools += ["policy.num_gpus=7", "aligner.template={{ question }} {{ answer }}"]
    running = nodes.command_line.start(*job, *pools)
    running.until(lambda: num_units(tmp_path / "output") >= 5, "five units were there")
    assert nodes.where(running, "aligner") == {raylet(nodes.cluster.head_node): 1, raylet(doomed): 1}
    nodes.cluster.remove_node(doomed, allow_graceful=False)
    assert num_units(tmp_path / "output") < NUM_ROWS / 2, "it was over before the node died"
    running.wait().expect(0)
    rows = corpus(tmp_path / "output")
    assert [row["source"]["row"] for row in rows] == list(range(NUM_ROWS))
    assert [row["responses"][0]["text"] for row in rows] == TEXTS
    assert [row["aligned"][0]["text"] for row in rows] == aligned_undisturbed([*job, *pools])


def aligned_undisturbed(arguments: list[str]) -> list[str]:
    """What the job's aligner says to TEXTS in this process, where nothing dies."""
    groups = ("policy", "aligner")
    config, _ = compose(AlignCorpusConfig, arguments, prog="", description="", groups=groups)
    engine = TorchEngine(config.aligner, 1)

    async def said() -> list[Completion]:
        inputs = [aligner_input(config.aligner, (("user", text),), text) for text in TEXTS]
        return await asyncio.gather(*(engine.generate(Request(each, seed=0)) for each in inputs))

    texts = [made(completion, config.aligner.reasoning_end)["text"] for completion in asyncio.run(said())]
    engine.close()
    assert len(set(texts)) > NUM_ROWS / 2, "they differ: one row's text is not another's"
    return texts


@pytest.mark.long
def test_a_node_that_is_added_is_used(nodes: Nodes, job: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    pools = [*STORED, *tiny_pool("aligner", tiny_llama, max_tokens=200), "aligner.num_gpus=1"]
    pools += ["policy.num_gpus=7", "aligner.max_replicas=2", "aligner.max_num_seqs=1"]
    pools += ["aligner.template={{ question }} {{ answer }}"]
    running = nodes.command_line.start(*job, *pools)
    running.until(lambda: num_units(tmp_path / "output"), "the first unit was there")
    assert nodes.where(running, "aligner").total() == 1
    added = add_node(nodes.cluster, num_gpus=1)
    running.until(lambda: nodes.where(running, "aligner")[raylet(added)], "the new node had an aligner")
    running.wait().expect(0)
    assert [row["source"]["row"] for row in corpus(tmp_path / "output")] == list(range(NUM_ROWS))
