"""Fitting the pools onto the nodes before anything starts: what can never run is refused, with the arithmetic."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import ray
from ray._private.accelerators import get_accelerator_manager_for_resource
from ray._private.state import available_resources_per_node
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.experimental.internal_kv import internal_kv_get_gcs_client

from actors.contract import ConfigError, TransientError
from actors.engines.footprint import weights_on_cpu
from actors.pool import PoolConfig

POLL_S = 2.0
STATUS_TIMEOUT_S = 30.0
PROCESS_BYTES = 256 << 20
"""Memory of its own that an engine's process takes before it holds a model, at least: 286 MiB seen with `torch`."""


@dataclass(frozen=True)
class Need:
    """`count` things that each take `cpus` and `gpus`, all on one node: a pool's replicas, or Ray Data's own tasks."""

    name: str
    count: int
    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.ask}"

    @property
    def ask(self) -> str:
        """What is asked for, without the name."""
        each = f"{self.gpus:g} GPUs and {self.cpus:g} CPUs" if self.gpus else f"{self.cpus:g} CPUs"
        where = "".join(f", on nodes with {label}={value}" for label, value in self.labels.items())
        return f"{self.count} x {each}{where}"

    def may_run_on(self, node: "Node") -> bool:
        """Whether the node has the labels. Ray's other conditions, `!value` and `in(…)`, are left for Ray to decide."""
        plain = {label: value for label, value in self.labels.items() if not value.startswith(("!", "in("))}
        return all(node.labels.get(label) == value for label, value in plain.items())


@dataclass(frozen=True)
class Node:
    """A node, or one that a cluster may still have, which has no id yet."""

    name: str
    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)
    id: str = ""

    def __str__(self) -> str:
        labels = "".join(f", {key}={value}" for key, value in self.labels.items() if not key.startswith("ray.io/"))
        return f"{self.name}: {self.gpus:g} GPUs, {self.cpus:g} CPUs{labels}"


def fit(needs: list[Need], nodes: list[Node], spread: bool = False) -> tuple[dict[str, list[Node]], list[Need]]:
    """The node of each thing that has a place, by the needs' names, and what has none.

    What its labels leave the fewest nodes goes first, then the largest, each on the fullest node that still has room,
    or with `spread` on the emptiest, for which less may fit. A pool without GPUs goes to nodes without GPUs where it
    can, as a replica with GPUs has no such choice.
    """
    towards = -1 if spread else 1
    cpus, gpus = [node.cpus for node in nodes], [node.gpus for node in nodes]
    places: dict[str, list[Node]] = {need.name: [] for need in needs}
    missing = []
    for need in sorted(needs, key=lambda need: (sum(map(need.may_run_on, nodes)), -need.gpus, -need.cpus)):
        for placed in range(need.count):
            room = [
                at
                for at, node in enumerate(nodes)
                if cpus[at] + 1e-6 >= need.cpus and gpus[at] + 1e-6 >= need.gpus and need.may_run_on(node)
            ]
            if not room:
                missing.append(replace(need, count=need.count - placed))
                break
            at = min(room, key=lambda at: (gpus[at] * (towards if need.gpus else 1), cpus[at] * towards))
            cpus[at] -= need.cpus
            gpus[at] -= need.gpus
            places[need.name].append(nodes[at])
    return places, missing


def left_over(needs: list[Need], nodes: list[Node]) -> list[Need]:
    """What does not fit; [] when all does."""
    return fit(needs, nodes)[1]


def node_ids(needs: list[Need]) -> dict[str, list[str]]:
    """By the needs' names, the id of the node of each thing: Ray, which spreads what it starts, is to do as planned.

    Where all fits into what other jobs leave free, the nodes are chosen by that, else by all that they have. Replicas
    are spread where they fit so: a lost node then costs few, and those on CPUs do not share one node's.
    """
    for nodes, spread in ((free := live_nodes(free=True), True), (free, False), (live_nodes(), False)):
        places, missing = fit(needs, nodes, spread)
        if not missing:
            break
    return {name: [node.id for node in nodes] for name, nodes in places.items()}


def told(needs: list[Need], wait_s: float) -> list[str]:
    """For a person: what would run on each of the cluster's nodes, and what a job would wait for.

    Raises ConfigError where it would be refused at once.
    """
    missing = _to_wait_for(needs)
    places = node_ids(needs)
    lines = []
    for node in live_nodes():
        here = [f"{count} of {name}" for name, ids in places.items() if (count := ids.count(node.id))]
        lines.append(f"node {node}: {', '.join(here) or 'nothing'}")
    return [*lines, *(f"waits up to {wait_s:g} s for nodes: {need}" for need in missing)]


def refusal(needs: list[Need], nodes: list[Node], why: str) -> ConfigError | None:
    """The error for needs that do not fit, which says what each asks for and what there is; None when they fit."""
    missing = left_over(needs, nodes)
    if not missing:
        return None
    short = ", ".join(f"{need.count} of {need.name} ({remedy(need, nodes)})" for need in missing)
    return ConfigError(f"the pools do not fit {why}: no place for {short}. {arithmetic(needs, nodes)}")


def remedy(need: Need, nodes: list[Node]) -> str:
    """Why there is no place for it, and what to change."""
    allowed = [node for node in nodes if need.may_run_on(node)]
    labels = " ".join(f"{label}={value}" for label, value in need.labels.items())
    if not allowed and labels:
        return f"no node has {labels}: change label_selector, or label nodes with `ray start --labels`"
    for what, key, each in (("GPUs", "num_gpus", need.gpus), ("CPUs", "num_cpus", need.cpus)):
        most = max((getattr(node, what.lower()) for node in allowed), default=0.0)
        if each > most + 1e-6:
            return f"the largest node has {most:g} {what}: lower {key}, or add larger nodes"
    return "lower replicas, or add nodes" if need.gpus else "lower the pools' num_cpus or replicas, or add nodes"


def arithmetic(needs: list[Need], nodes: list[Node]) -> str:
    """What is asked for, and what there is."""
    return f"Asked for: {'; '.join(map(str, needs))}. Nodes: {'; '.join(map(str, nodes)) or 'none'}"


def memory_refusal(pools: Mapping[str, PoolConfig], has: int) -> ConfigError | None:
    """The error for engines on CPUs that need more than a machine's `has` bytes of memory; None where they may fit.

    Only what is certain is counted, weights and processes: KV caches and activations come on top.
    """
    asked: list[str] = []
    shared: dict[str, int] = {}
    in_all = 0
    for name, pool in pools.items():
        if pool.engine in ("torch", "vllm") and not pool.num_gpus:
            own, mapped = weights_on_cpu(pool)
            shared[pool.model] = max(mapped, shared.get(pool.model, 0))
            each = pool.tensor_parallel_size * PROCESS_BYTES + own
            in_all += pool.replicas * each
            asked.append(f"{name}: {pool.replicas} x {_gib(each)}")
    in_all += (once := sum(shared.values()))
    if in_all <= has:
        return None
    return ConfigError(
        f"the pools do not fit into this machine's memory of {_gib(has)}: weights and processes alone take "
        f"{_gib(in_all)} ({'; '.join(asked)}; weights that replicas share: {_gib(once)}). Lower replicas, or name a "
        "cluster (site.ray_address or RAY_ADDRESS)"
    )


def gpu_refusal(pools: Mapping[str, PoolConfig], has: int) -> ConfigError | None:
    """The error for pools that need more GPUs than a machine `has`; None where they fit."""
    asked = [f"{name}: {pool.replicas} x {pool.num_gpus}" for name, pool in pools.items() if pool.num_gpus]
    in_all = sum(pool.replicas * pool.num_gpus for pool in pools.values())
    if in_all <= has:
        return None
    return ConfigError(
        f"the pools need {in_all} GPUs ({'; '.join(asked)}), and this machine has {has}. Lower replicas, set "
        "num_gpus=0 and tensor_parallel_size=1 to run on CPUs, or name a cluster (site.ray_address or RAY_ADDRESS)"
    )


def num_gpus_here() -> int:
    """GPUs of this machine that this process may use, and a Ray that it starts."""
    manager = get_accelerator_manager_for_resource("GPU")
    visible = manager.get_current_process_visible_accelerator_ids()
    found = int(manager.get_current_node_num_accelerators())
    return found if visible is None else min(found, len(visible))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def wait_until_placeable(
    needs: list[Need], wait_s: float, *, say_every_s: float, announce: Callable[[str], None]
) -> None:
    """Return when the needs fit onto the cluster's nodes.

    On a cluster that can grow, asks its autoscaler for what is needed and waits up to `wait_s` seconds, saying what for
    every `say_every_s` seconds.
    Raises ConfigError as soon as the autoscaler finds that all the nodes it may add would not do, and TransientError
    when the wait is over.
    """
    if not _to_wait_for(needs):
        return
    try:
        _request(needs)
        asked = _status().cluster_resource_state.cluster_resource_state_version
        say_at = time.monotonic()
        deadline = say_at + wait_s
        while error := refusal(needs, nodes := live_nodes(), f"after {wait_s:g} s (run.wait_for_resources_s)"):
            if (now := time.monotonic()) >= say_at:
                missing = "; ".join(map(str, left_over(needs, nodes)))
                announce(f"waiting up to {max(0.0, deadline - now):.0f} s for nodes: {missing}")
                say_at = now + say_every_s
            answer = _status().autoscaling_state
            answered = answer.last_seen_cluster_resource_state_version >= asked
            if answered and answer.infeasible_cluster_resource_constraints:
                raise ConfigError(
                    "the pools do not fit, not even with all the nodes that the autoscaler may add. "
                    + arithmetic(needs, nodes)
                )
            if time.monotonic() > deadline:
                raise TransientError(str(error))  # there were no spot nodes to be had, perhaps: later there may be
            time.sleep(POLL_S)
            _request(needs)  # again: Ray keeps one request, and what Ray Data of an earlier job left here sends its own
    finally:
        _request([])  # what is asked for would be kept for ever; from here on the pools themselves hold the nodes


def _to_wait_for(needs: list[Need]) -> list[Need]:
    """What has no place on the nodes that there are; [] when all has. Raises ConfigError where there may be no more."""
    nodes = live_nodes()
    error = refusal(needs, nodes, "on this cluster")
    if error is not None and not is_autoscaler_v2():  # the first one knows no labels, and none tells what it may add
        raise error
    return left_over(needs, nodes)


def _request(needs: list[Need]) -> None:
    """Tell the autoscaler that all of this must have a place at the same time; an empty list takes it back."""
    each = [need for need in needs for _ in range(need.count)]
    request_resources(
        bundles=[
            {name: amount for name, amount in (("CPU", need.cpus), ("GPU", need.gpus)) if amount} for need in each
        ],
        bundle_label_selectors=[dict(need.labels) for need in each],
    )


def _status() -> GetClusterStatusReply:
    """What is asked of the autoscaler, and its last answer. Each has the version of what was asked."""
    reply = GetClusterStatusReply()
    reply.ParseFromString(internal_kv_get_gcs_client().get_cluster_status(timeout_s=STATUS_TIMEOUT_S))
    return reply


def live_nodes(free: bool = False) -> list[Node]:
    """The cluster's nodes with all that they have, used or not; with `free` what nobody uses of it."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    has = available_resources_per_node() if free else {node["NodeID"]: node["Resources"] for node in alive}
    return [
        Node(
            node["NodeManagerAddress"],
            has.get(node["NodeID"], {}).get("CPU", 0.0),
            has.get(node["NodeID"], {}).get("GPU", 0.0),
            node["Labels"],
            node["NodeID"],
        )
        for node in alive
    ]
