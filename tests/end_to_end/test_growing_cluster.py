"""A cluster that starts with a head alone, and how Ray's autoscaler grows it.

Its groups are those of conf/cluster/rayjob.yaml. Its nodes are processes of this machine with logical CPUs and GPUs,
and the engines echo.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from tests.end_to_end.conftest import OBJECT_STORE_BYTES, RayHead, free_ports, start_head
from tests.end_to_end.jobs import CommandLine, corpus, write_shard

CLUSTER = Path(__file__).resolve().parents[2] / "conf" / "cluster"
HEAD_TYPE = "ray.head.default"  # as the provider of such nodes calls it
SEEN = """
import collections, json, ray
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.experimental.internal_kv import internal_kv_get_gcs_client

ray.init(logging_level="ERROR")
nodes = [node["Labels"].get("burnish", "none") for node in ray.nodes()]
asked = get_cluster_resource_state(internal_kv_get_gcs_client()).cluster_resource_constraints
print(json.dumps([collections.Counter(nodes), sum(len(each.resource_requests) for each in asked)]))
"""


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())["spec"]
    return loaded


@pytest.fixture(scope="module")
def growing_head(spec: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    cluster = {"metadata": {"name": "burnish", "namespace": "default"}, "spec": spec["rayClusterSpec"]}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    for group in config["available_node_types"].values():
        group["resources"].pop("memory")  # which this machine does not have
        group["resources"]["object_store_memory"] = OBJECT_STORE_BYTES
    config["head_node_type"] = HEAD_TYPE
    config["available_node_types"][HEAD_TYPE] = config["available_node_types"].pop("headgroup")
    (port,) = free_ports(1)
    config["provider"] = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": f"127.0.0.1:{port}",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "foreground_node_launch": True,
    }
    path = tmp_path_factory.mktemp("growing") / "autoscaling.yaml"
    path.write_text(json.dumps(config))
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": HEAD_TYPE,
    }
    with start_head(["--num-cpus=0", f"--autoscaling-config={path}"], environment, gcs_port=port) as head:
        yield head


@pytest.fixture(scope="module")
def growing_command_line(growing_head: RayHead, new_folder: Callable[[], Path]) -> Iterator[CommandLine]:
    with CommandLine(growing_head.environment, growing_head.raylet, new_folder) as jobs:
        yield jobs


def seen(head: RayHead) -> tuple[dict[str, int], int]:
    """The cluster's nodes by their label, and how many things the autoscaler is asked to have room for."""
    completed = subprocess.run(
        [sys.executable, "-c", SEEN], env=head.environment, capture_output=True, text=True, check=True, timeout=60
    )
    nodes, asked = json.loads(completed.stdout.splitlines()[-1])
    return nodes, asked


@pytest.mark.long
def test_the_manifests_cluster_grows_to_what_the_pools_need_and_no_further(
    spec: dict[str, Any], growing_head: RayHead, growing_command_line: CommandLine, tmp_path: Path
) -> None:
    texts = [f"Text {number}." for number in range(20)]
    write_shard(tmp_path / "prompts.parquet", {"id": texts, "prompt": texts, "response": texts})
    _, _, *entrypoint = shlex.split(spec["entrypoint"].replace("/etc/burnish", str(CLUSTER)))
    job = [
        *entrypoint, f"input.path={tmp_path / 'prompts.parquet'}", f"output.root={tmp_path / 'output'}",
        "input.response_column=response", "policy=stored", "policy.model=stored", "policy.replicas=5",
        "policy.num_gpus=1", "aligner=identity", "aligner.model=identity", "aligner.replicas=1",
        "aligner.tensor_parallel_size=1", "run.unit_rows=2", "run.wait_for_resources_s=200",
    ]  # fmt: skip

    refused = growing_command_line.run(*job, "policy.replicas=17").expect(2)
    assert "not even with all the nodes that the autoscaler may add. Asked for: policy: 17 x 1 GPUs" in refused.stderr
    dry = growing_command_line.run(*job, "--dry-run").expect(0)
    assert "waits up to 200 s for nodes: aligner: 1 x 4 GPUs and 16 CPUs, on nodes with burnish=aligner" in dry.stdout
    assert seen(growing_head) == ({"none": 1}, 0), "what is refused, or asked about, brings no node"

    completed = growing_command_line.run(*job, limit_s=300).expect(0)
    assert "waiting up to 200 s for nodes: aligner: 1 x 4 GPUs" in completed.stderr
    assert sorted(row["prompt_id"] for row in corpus(tmp_path / "output")) == sorted(texts)
    assert seen(growing_head) == ({"none": 1, "policy": 2, "aligner": 1}, 0)

    late = growing_command_line.run(
        *job, f"output.root={tmp_path / 'late'}", "policy.replicas=16", "run.wait_for_resources_s=0"
    ).expect(5)
    assert "the pools do not fit after 0 s (run.wait_for_resources_s): no place for 8 of policy" in late.stderr
