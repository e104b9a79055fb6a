"""Whether pools fit onto nodes, and what a person is told when they do not."""

import pytest

from pipelines.placement import Need, Node, left_over, refusal

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


def test_the_refusal_does_the_arithmetic() -> None:
    error = refusal([Need("policy", 2, 1, 1), Need("aligner", 3, 1, 8)], EIGHT, "on this cluster")
    assert str(error) == (
        "the pools do not fit on this cluster: 1 of aligner, 2 of policy have no place. "
        "Asked for: policy: 2 x 1 GPUs and 1 CPUs; aligner: 3 x 8 GPUs and 1 CPUs. "
        "Nodes: a: 8 GPUs, 32 CPUs; b: 8 GPUs, 32 CPUs"
    )
    assert refusal([Need("policy", 2, 1, 1)], EIGHT, "on this cluster") is None
