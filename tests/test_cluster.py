"""cluster.yaml: what Ray's own launcher says of it, and what must never be open."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).resolve().parents[1] / "cluster.yaml"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CLUSTER.read_text())
    return loaded


def test_rays_launcher_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_only_ssh_is_open_and_not_to_the_world(cluster: dict[str, Any]) -> None:
    (rule,) = cluster["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert all(not each["CidrIp"].endswith("/0") for each in rule["IpRanges"])
    assert any("--dashboard-host=127.0.0.1" in command for command in cluster["head_start_ray_commands"])


def test_every_node_starts_ray_with_token_authentication(cluster: dict[str, Any]) -> None:
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert all("RAY_AUTH_MODE=token" in command for command in commands if "ray start" in command)
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_the_gpu_groups_carry_the_labels_that_the_pools_select(cluster: dict[str, Any]) -> None:
    groups = cluster["available_node_types"]
    assert groups["policy"]["labels"] == {"burnish": "policy"}
    assert groups["aligner"]["labels"] == {"burnish": "aligner"}
    assert groups["policy"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in groups["aligner"]["node_config"]
    assert groups["head"]["resources"] == {"CPU": 0}
    text = CLUSTER.read_text()
    assert "policy.label_selector.burnish=policy" in text
    assert "aligner.label_selector.burnish=aligner" in text


def test_nodes_install_what_this_checkout_pins(cluster: dict[str, Any]) -> None:
    assert any("-c conf/constraints.txt" in command for command in cluster["setup_commands"])
