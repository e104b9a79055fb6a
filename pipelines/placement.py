"""Fitting the pools onto the nodes before anything starts: what can never run is refused, with the arithmetic."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import ray
from ray.autoscaler.sdk import request_resources

from actors.contract import ConfigError

POLL_S = 2.0


@dataclass(frozen=True)
class Need:
    """`count` things that each take `cpus` and `gpus`, all on one node: a pool's replicas, or Ray Data's own tasks."""

    name: str
    count: int
    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        each = f"{self.gpus:g} GPUs and {self.cpus:g} CPUs" if self.gpus else f"{self.cpus:g} CPUs"
        where = "".join(f", on nodes with {label}={value}" for label, value in self.labels.items())
        return f"{self.name}: {self.count} x {each}{where}"

    def may_run_on(self, node: "Node") -> bool:
        """Whether the node has the labels. Ray's other conditions, `!value` and `in(…)`, are left for Ray to decide."""
        plain = {label: value for label, value in self.labels.items() if not value.startswith(("!", "in("))}
        return all(node.labels.get(label) == value for label, value in plain.items())


@dataclass(frozen=True)
class Node:
    """A node, or one that the autoscaler may still add."""

    name: str
    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        labels = "".join(f", {label}={value}" for label, value in self.labels.items())
        return f"{self.name}: {self.gpus:g} GPUs, {self.cpus:g} CPUs{labels}"


def left_over(needs: list[Need], nodes: list[Node]) -> list[Need]:
    """What does not fit, placing the largest first on the fullest node that still has room; [] when all does.

    A pool without GPUs goes to nodes without GPUs where it can, as a replica with GPUs has no such choice.
    """
    cpus, gpus = [node.cpus for node in nodes], [node.gpus for node in nodes]
    missing = []
    for need in sorted(needs, key=lambda need: (need.gpus, need.cpus), reverse=True):
        for placed in range(need.count):
            room = [
                at
                for at, node in enumerate(nodes)
                if cpus[at] + 1e-6 >= need.cpus and gpus[at] + 1e-6 >= need.gpus and need.may_run_on(node)
            ]
            if not room:
                missing.append(replace(need, count=need.count - placed))
                break
            at = min(room, key=lambda at: (gpus[at], cpus[at]))
            cpus[at] -= need.cpus
            gpus[at] -= need.gpus
    return missing


def refusal(needs: list[Need], nodes: list[Node], why: str) -> ConfigError | None:
    """The error for needs that do not fit, which says what each asks for and what there is; None when they fit."""
    missing = left_over(needs, nodes)
    if not missing:
        return None
    asked = "; ".join(map(str, needs))
    there = "; ".join(map(str, nodes)) or "none"
    short = ", ".join(f"{need.count} of {need.name}" for need in missing)
    return ConfigError(f"the pools do not fit {why}: {short} have no place. Asked for: {asked}. Nodes: {there}")


def wait_until_placeable(needs: list[Need], wait_s: float, announce: Callable[[str], None]) -> None:
    """Return when the needs fit onto the cluster's nodes.

    On a cluster that can grow, asks the autoscaler for what is needed and waits, saying so, up to `wait_s` seconds.
    Raises ConfigError at once for what exceeds even the node types that are declared, and when the wait is over.
    """
    if not left_over(needs, live_nodes()):
        return
    possible = [*live_nodes(), *declared_nodes()]
    error = refusal(
        needs, possible, "even a cluster that has grown as far as it may" if declared_nodes() else "on this cluster"
    )
    if error:
        raise error
    each = [need for need in needs for _ in range(need.count)]
    request_resources(
        bundles=[{"CPU": need.cpus, "GPU": need.gpus} for need in each],
        bundle_label_selectors=[dict(need.labels) for need in each],
    )
    announce(f"waiting up to {wait_s:g} s for nodes: {'; '.join(map(str, left_over(needs, live_nodes())))}")
    deadline = time.monotonic() + wait_s
    while left_over(needs, live_nodes()):
        if time.monotonic() > deadline:
            raise (
                refusal(needs, live_nodes(), f"on this cluster after {wait_s:g} s (run.wait_for_resources_s)")
                or AssertionError
            )
        time.sleep(POLL_S)


def live_nodes() -> list[Node]:
    """The cluster's nodes with all that they have, used or not."""
    return [
        Node(
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            {label: value for label, value in node["Labels"].items() if not label.startswith("ray.io/")},
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def declared_nodes() -> list[Node]:
    """Nodes that the autoscaler's configuration would let it add to those there are now."""
    config = ray._private.state.state.get_cluster_config()
    if config is None:
        return []
    num_live = len(live_nodes())
    return [
        Node(
            f"{group.name} (to be added)",
            group.resources.get("CPU", 0),
            group.resources.get("GPU", 0),
            dict(group.labels),
        )
        for group in config.node_group_configs
        for _ in range(max(0, int(group.max_count) - num_live if group.max_count > 0 else 0))
    ]
