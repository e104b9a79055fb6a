"""Whether pools fit onto nodes, and what a person is told when they do not."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

from actors.aligner import AlignerConfig
from actors.contract import ConfigError, TransientError
from actors.policy import PolicyConfig
from pipelines import placement
from pipelines.config import compose
from pipelines.placement import (
    PROCESS_BYTES,
    Need,
    Node,
    fit,
    gpu_refusal,
    left_over,
    memory_refusal,
    node_ids,
    refusal,
    told,
    wait_until_placeable,
)
from pipelines.settings import AlignCorpusConfig, pools
from pipelines.stream import needs

EIGHT = [Node("a", 32, 8), Node("b", 32, 8)]


@pytest.mark.parametrize(
    ("needs", "missing"),
    [
        ([Need("policy", 8, 1, 1), Need("aligner", 2, 1, 4)], 0),
        ([Need("policy", 8, 1, 1), Need("aligner", 3, 1, 4)], 4),
        ([Need("aligner", 1, 1, 16)], 1),  # a replica never crosses nodes, though there are 16 GPUs
        ([Need("aligner", 4, 1, 3)], 0),
        ([Need("aligner", 5, 1, 3)], 1),  # 1 GPU is left on either node: 2 in all, but no 3 together
        ([Need("policy", 33, 2, 0)], 1),  # CPUs are counted too
        ([Need("policy", 2, 0.25, 0), Need("aligner", 16, 3.9, 1)], 0),
    ],
)
def test_replicas_are_placed_whole_on_nodes(needs: list[Need], missing: int) -> None:
    assert sum(need.count for need in left_over(needs, EIGHT)) == missing


def test_a_pool_without_gpus_leaves_the_gpu_nodes_to_those_that_need_them() -> None:
    nodes = [Node("gpus", 4, 4), Node("cpus", 4, 0)]
    assert left_over([Need("policy", 4, 1, 0), Need("aligner", 4, 1, 1)], nodes) == []


def test_a_pool_goes_only_to_nodes_with_its_labels() -> None:
    nodes = [Node("a", 8, 4, {"pool": "policy"}), Node("b", 8, 4, {"pool": "aligner"})]
    assert left_over([Need("policy", 4, 1, 1, {"pool": "policy"})], nodes) == []
    (missing,) = left_over([Need("policy", 5, 1, 1, {"pool": "policy"})], nodes)
    assert str(missing) == "policy: 1 x 1 GPUs and 1 CPUs, on nodes with pool=policy"
    assert left_over([Need("policy", 5, 1, 1, {"pool": "!aligner"})], nodes) == []  # Ray's to decide


def test_a_pool_that_may_go_anywhere_leaves_the_labelled_nodes_to_those_that_need_them() -> None:
    nodes = [Node("p", 8, 4, {"burnish": "policy"}), Node("b", 8, 8)]
    needs = [Need("policy", 4, 1, 1, {"burnish": "policy"}), Need("aligner", 2, 1, 4)]
    places, missing = fit(needs, nodes)
    assert missing == []
    assert places == {"policy": [nodes[0]] * 4, "aligner": [nodes[1]] * 2}


@pytest.mark.parametrize(
    ("unused", "policies", "aligner"),
    [
        ([8, 8], "bb", "a"),  # the emptiest node first
        ([6, 5], "aa", "b"),  # spread, the aligner would take `a`, and one policy had no place
        ([3, 3], "ab", "a"),  # for the time being another job has too much: they wait on the nodes that can hold them
    ],
)
def test_replicas_are_spread_over_what_is_free_where_all_fit(
    unused: list[int], policies: str, aligner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def live_nodes(free: bool = False) -> list[Node]:
        return [Node(id, 32, gpus, id=id) for id, gpus in zip("ab", unused if free else [8, 8], strict=True)]

    monkeypatch.setattr(placement, "live_nodes", live_nodes)
    planned = node_ids([Need("policy", 2, 1, 3), Need("aligner", 1, 1, 5)])
    assert planned == {"policy": [*policies], "aligner": [*aligner]}


def test_a_person_is_told_what_would_run_on_each_node_and_what_would_be_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs = [Need("policy", 2, 1, 1), Need("aligner", 3, 1, 8)]
    monkeypatch.setattr(placement, "live_nodes", lambda free=False: [replace(node, id=node.name) for node in EIGHT])
    monkeypatch.setattr(placement, "is_autoscaler_v2", lambda: True)
    assert told(needs, 600) == [
        "node a: 8 GPUs, 32 CPUs: 1 of aligner",
        "node b: 8 GPUs, 32 CPUs: 1 of aligner",
        "waits up to 600 s for nodes: aligner: 1 x 8 GPUs and 1 CPUs",
        "waits up to 600 s for nodes: policy: 2 x 1 GPUs and 1 CPUs",
    ]
    assert told(needs[:1], 600) == ["node a: 8 GPUs, 32 CPUs: 1 of policy", "node b: 8 GPUs, 32 CPUs: 1 of policy"]

    monkeypatch.setattr(placement, "is_autoscaler_v2", lambda: False)
    with pytest.raises(ConfigError, match="no place for 1 of aligner"):
        told(needs, 600)


def feasible(needs: list[Need], nodes: list[Node]) -> bool:
    """Whether the GPUs have place for all, found by trying everything."""
    if not needs:
        return True
    need, *others = needs
    if not need.count:
        return feasible(others, nodes)
    tried = [node for node in nodes if node.gpus >= need.gpus and need.may_run_on(node)]
    return any(
        feasible(
            [replace(need, count=need.count - 1), *others],
            [replace(each, gpus=each.gpus - need.gpus) if each is node else each for each in nodes],
        )
        for node in tried
    )


def test_no_ask_that_is_feasible_is_refused() -> None:
    """Replicas and nodes of 1, 2, 4 or 8 GPUs, one label: whatever has a place at all is given one."""
    random, num_feasible = Random(0), 0
    while num_feasible < 200:
        labels = [{}, {"pool": "policy"}, {"pool": "aligner"}]
        nodes = [Node(str(at), 64, random.choice([1, 2, 4, 8]), random.choice(labels)) for at in range(3)]
        needs = [
            Need(name, random.randint(1, 3), 1, random.choice([1, 2, 4, 8]), random.choice([{}, *labels]))
            for name in ("policy", "aligner")
        ]
        asked, there = sum(need.count * need.gpus for need in needs), sum(node.gpus for node in nodes)
        if not there / 2 <= asked <= there or not feasible(needs, nodes):
            continue
        num_feasible += 1
        assert left_over(needs, nodes) == [], (needs, nodes)


def test_a_wait_says_now_and_then_what_is_missing_and_how_long_it_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(placement.time, "monotonic", lambda: now)
    monkeypatch.setattr(placement.time, "sleep", sleep)
    monkeypatch.setattr(placement, "is_autoscaler_v2", lambda: True)
    monkeypatch.setattr(placement, "_request", lambda needs: None)
    monkeypatch.setattr(placement, "_status", GetClusterStatusReply)
    monkeypatch.setattr(placement, "live_nodes", lambda: EIGHT if now < 1030 else [*EIGHT, Node("c", 8, 8)])
    said: list[str] = []
    needs = [Need("policy", 8, 1, 1), Need("aligner", 2, 1, 8)]
    wait_until_placeable(needs, 600, say_every_s=10, announce=said.append)
    assert said == [f"waiting up to {left} s for nodes: policy: 8 x 1 GPUs and 1 CPUs" for left in (600, 590, 580)]

    said.clear()
    with pytest.raises(TransientError, match="do not fit after 15 s"):
        wait_until_placeable([Need("aligner", 4, 1, 8)], 15, say_every_s=10, announce=said.append)
    assert [line.partition(" for ")[0] for line in said] == ["waiting up to 15 s", "waiting up to 5 s"]


def test_the_refusal_does_the_arithmetic() -> None:
    error = refusal([Need("policy", 2, 1, 1), Need("aligner", 3, 1, 8)], EIGHT, "on this cluster")
    assert str(error) == (
        "the pools do not fit on this cluster: no place for 1 of aligner (lower replicas, or add nodes), "
        "2 of policy (lower replicas, or add nodes). "
        "Asked for: policy: 2 x 1 GPUs and 1 CPUs; aligner: 3 x 8 GPUs and 1 CPUs. "
        "Nodes: a: 8 GPUs, 32 CPUs; b: 8 GPUs, 32 CPUs"
    )
    assert refusal([Need("policy", 2, 1, 1)], EIGHT, "on this cluster") is None


def test_what_reading_and_committing_take_is_counted() -> None:
    """Two pools of a CPU each on a node of two would leave none to feed them from: they would wait for ever."""
    job = ["input.path=in", "input.response_column=answer", "output.root=out", "policy=stored", "aligner=identity"]
    config, _ = compose(AlignCorpusConfig, job, prog="", description="", groups=("policy", "aligner"))
    told = str(refusal(needs(config), [Node("a", 2, 0)], "on this cluster"))
    change = "lower the pools' num_cpus or replicas, or add nodes"
    assert f"no place for 2 of reading ({change}), 1 of committing ({change}). " in told
    assert (
        "policy: 1 x 1 CPUs; aligner: 1 x 1 CPUs; reading: 2 x 0.25 CPUs; committing: 1 x 0.25 CPUs. "
        "Nodes: a: 0 GPUs, 2 CPUs"
    ) in told
    assert refusal(needs(config), [Node("a", 2.75, 0)], "on this cluster") is None


@pytest.mark.parametrize(
    ("need", "told"),
    [
        (Need("policy", 1, 1, 16), "the largest node has 8 GPUs: lower num_gpus, or add larger nodes"),
        (Need("policy", 1, 64, 0), "the largest node has 32 CPUs: lower num_cpus, or add larger nodes"),
        (
            Need("policy", 1, 1, 1, {"pool": "gold"}),
            "no node has pool=gold: change label_selector, or label nodes with `ray start --labels`",
        ),
    ],
)
def test_the_refusal_says_what_to_change(need: Need, told: str) -> None:
    assert f"no place for 1 of policy ({told}). " in str(refusal([need], EIGHT, "on this cluster"))


# --- this machine's memory, where the job starts Ray itself ---------------------------------------------------------


def test_engines_on_cpus_are_held_against_the_memory_that_their_weights_and_processes_take(tmp_path: Path) -> None:
    """Three policies hold 4 GiB in float32, as in the file: mapped, once. Two ranks of an aligner convert it to 2."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 4 << 30]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    job = [
        "input.path=in", "output.root=out", f"policy.model={tmp_path}", "policy.dtype=float32", "policy.replicas=3",
        f"aligner.model={tmp_path}", "aligner.tensor_parallel_size=2",
    ]  # fmt: skip

    def refused(gib: float, *more: str) -> str | None:
        config, _ = compose(AlignCorpusConfig, [*job, *more], prog="", description="", groups=("policy", "aligner"))
        error = memory_refusal(pools(config), round(gib * 2**30))
        return error and str(error)

    assert PROCESS_BYTES == 2**28
    assert refused(0.75 + 4 + 0.5 + 2) is None
    assert refused(7.24) == (
        "the pools do not fit into this machine's memory of 7.24 GiB: weights and processes alone take 7.25 GiB "
        "(policy: 3 x 0.25 GiB; aligner: 1 x 2.50 GiB; weights that replicas share: 4.00 GiB). Lower replicas, or name "
        "a cluster (site.ray_address or RAY_ADDRESS)"
    )
    assert refused(3 * 4.25 + 2.5, "policy.engine=vllm") is None
    assert refused(3 * 4.25 + 2.49, "policy.engine=vllm"), "which copies what it loads"
    assert refused(2.5, "policy.num_gpus=1") is None, "a GPU's memory is another"
    assert refused(2.5, "policy=openai", "policy.model=m") is None


def test_without_a_cluster_pools_are_held_against_this_machines_gpus() -> None:
    two, four = (
        PolicyConfig(model="m", replicas=2, num_gpus=1),
        AlignerConfig(model="m", num_gpus=4, tensor_parallel_size=4),
    )
    assert gpu_refusal({"policy": two, "aligner": four}, 6) is None
    assert gpu_refusal({"policy": PolicyConfig(model="m")}, 0) is None
    assert str(gpu_refusal({"policy": two, "aligner": four}, 5)).startswith(
        "the pools need 6 GPUs (policy: 2 x 1; aligner: 1 x 4), and this machine has 5. "
    )
