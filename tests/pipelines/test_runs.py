"""Run records, fingerprints and which differences between two runs are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from actors.aligner import AlignerConfig
from actors.contract import ConfigError
from actors.policy import PolicyConfig
from actors.reward import RewardConfig
from pipelines.corpus.publish import OutputConfig, publish
from pipelines.corpus.published import CorpusConfig
from pipelines.corpus.runs import check_fingerprint, create_run, digest, latest_run, making_run
from pipelines.corpus.shards import InputConfig
from pipelines.corpus.state import read_state
from pipelines.corpus.storage import Storage
from pipelines.reference import reference_yaml
from pipelines.settings import AlignCorpusConfig, RunConfig, ScoreCorpusConfig, SiteConfig, fingerprint, rewards
from tests.pipelines.corpus.fabricate import commit_units, fake_shard

CONF = Path(__file__).resolve().parents[2] / "conf"


RULES = RewardConfig(model="r", rules={"length": 1.0})


def config(**sections: object) -> AlignCorpusConfig:
    return AlignCorpusConfig(
        **{
            "input": InputConfig(path="/in", response_column="response"),
            "output": OutputConfig(root="/out"),
            "policy": PolicyConfig(model="p", engine="stored"),
            "aligner": AlignerConfig(model="a", engine="stored"),
            **sections,
        }
    )


def test_the_documented_config_is_the_schema() -> None:
    assert (CONF / "align_corpus.yaml").read_text() == reference_yaml(AlignCorpusConfig)
    assert (CONF / "score_corpus.yaml").read_text() == reference_yaml(ScoreCorpusConfig)


@pytest.mark.parametrize(
    "other",
    [
        config(policy=PolicyConfig(model="q", engine="stored")),
        config(policy=PolicyConfig(model="p", engine="stored", temperature=0.5)),
        config(policy=PolicyConfig(model="p", engine="stored", num_candidates=2)),
        config(policies=[PolicyConfig(model="p", engine="stored")]),
        config(aligner=AlignerConfig(model="a", engine="stored", recipe="aligner")),
        config(aligner=AlignerConfig(model="a", engine="stored", template="{{ answer }}")),
        config(run=RunConfig(seed=1)),
        config(reward=RULES),
        config(rewards=[RULES]),
        config(input=InputConfig(path="/in", response_column="response", keep_columns=["x"])),
    ],
)
def test_what_can_change_a_row_is_in_the_fingerprint(other: AlignCorpusConfig) -> None:
    assert digest(fingerprint(other, {})) != digest(fingerprint(config(), {}))


@pytest.mark.parametrize(
    "other",
    [
        config(
            policy=PolicyConfig(model="p", engine="stored", replicas=8, num_gpus=1, units_in_flight=9, max_num_seqs=1)
        ),
        config(run=RunConfig(unit_rows=1, task_mib=3, stall_minutes=1, accept_quarantined=True)),
        config(site=SiteConfig(ray_address="auto", storage_options={"x": 1})),
        config(input=InputConfig(path="/elsewhere", response_column="response")),
        config(output=OutputConfig(root="/elsewhere", part_mib=1)),
    ],
)
def test_what_cannot_change_a_row_is_not(other: AlignCorpusConfig) -> None:
    assert digest(fingerprint(other, {})) == digest(fingerprint(config(), {}))


@pytest.mark.parametrize(
    ("other", "changes"),
    [
        (RewardConfig(model="r", rules={"length": 0.5}), True),
        (RewardConfig(model="other", rules={"length": 1.0}), True),
        (RewardConfig(model="r", rules={"length": 1.0}, name="renamed"), True),
        (RewardConfig(model="r", rules={"length": 1.0}, replicas=3, num_cpus=2), False),
    ],
)
def test_what_can_change_a_reward_is_in_the_fingerprint(other: RewardConfig, changes: bool) -> None:
    assert (fingerprint(config(reward=other), {}) != fingerprint(config(reward=RULES), {})) == changes


def test_kept_types_are_in_the_fingerprint() -> None:
    assert fingerprint(config(), {"x": "int64"}) != fingerprint(config(), {"x": "string"})


def test_run_records_are_numbered_and_never_replaced(tmp_path: Path) -> None:
    output = Storage(str(tmp_path))
    assert latest_run(output) is None
    assert [create_run(output, {"name": name}) for name in ("a", "b")] == [1, 2]
    assert latest_run(output) == {"number": 2, "name": "b"}


def test_a_change_is_refused_while_units_wait_and_needs_consent_after(tmp_path: Path) -> None:
    before, now = {"policy.temperature": 0.0, "gone": 1}, {"policy.temperature": 0.7, "new": 2}

    def check(*, unpublished: bool, published: bool, accept: bool) -> None:
        check_fingerprint(before, now, has_unpublished=unpublished, has_published=published, accept_changes=accept)

    check(unpublished=False, published=False, accept=False)
    check(unpublished=False, published=True, accept=True)
    for accept in (False, True):
        with pytest.raises(ConfigError, match=r"policy\.temperature was 0\.0 and is 0\.7"):
            check(unpublished=True, published=True, accept=accept)
    with pytest.raises(ConfigError, match=r"gone was 1 and is '\(not there\)'; new was .* run\.accept_changes=true"):
        check(unpublished=False, published=True, accept=False)


def test_rewards_need_no_first_one_but_one_there_must_be() -> None:
    alone = ScoreCorpusConfig(input=CorpusConfig(path="/in"), output=OutputConfig(root="/out"), rewards=[RULES])
    assert rewards(alone) == {"reward": RULES}
    with pytest.raises(ConfigError, match="reward: nothing scores; name a reward, as in reward=rules"):
        replace(alone, rewards=[])


def test_stored_answers_need_a_column() -> None:
    with pytest.raises(ConfigError, match=r"input\.response_column must name the column of the answers"):
        config(input=InputConfig(path="/in"))


@pytest.mark.parametrize("name", ["secret", "key", "aws_session_token", "password"])
def test_secrets_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"storage_options.{name}: secrets do not go into a config"):
        SiteConfig(storage_options={name: "hunter2"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: SiteConfig(storage_options={"client_kwargs": {"aws_secret_access_key": "hunter2"}}),
        lambda: SiteConfig(storage_options={"endpoint_url": "https://me:hunter2@store.example.com"}),
        lambda: InputConfig(path="https://store.example.com/a.parquet?X-Amz-Signature=hunter2"),
        lambda: OutputConfig(root="s3://me:hunter2@bucket/out"),
        lambda: PolicyConfig(model="m", engine="vllm", engine_kwargs={"hf_token": "hunter2"}),
        lambda: PolicyConfig(model="s3://b/m", model_storage_options={"secret": "hunter2"}),
        lambda: SiteConfig(storage_options={"s3_additional_kwargs": {"SSECustomerKey": "hunter2"}}),
        lambda: SiteConfig(storage_options={"accountKey": "hunter2"}),
        lambda: SiteConfig(storage_options={"client_kwargs": {"headers": {"X-Api-Key": "hunter2"}}}),
        lambda: SiteConfig(storage_options={"client_kwargs": {"headers": {"Authorization": "hunter2"}}}),
    ],
)
def test_secrets_are_refused_wherever_they_hide_and_are_not_repeated(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError) as refusal:
        make()
    assert "hunter2" not in str(refusal.value)


def test_what_only_sounds_like_a_secret_is_taken() -> None:
    SiteConfig(storage_options={"config_kwargs": {"max_pool_connections": 50}, "anon": True, "token": None})
    PolicyConfig(model="m", engine="vllm", engine_kwargs={"override_generation_config": {"eos_token_id": 5}})
    InputConfig(path="abfs://container@account.dfs.core.windows.net/prompts")


def test_a_run_that_made_nothing_is_not_what_the_rows_were_made_by(tmp_path: Path) -> None:
    output = Storage(str(tmp_path / "out"))
    assert making_run(output, read_state(output)) is None
    create_run(output, {"fingerprint": {"policy.model": "a"}})
    create_run(output, {"fingerprint": {"policy.model": "ended before its first commit"}})
    commit_units(output, fake_shard())
    assert making_run(output, read_state(output)) == {"number": 1, "fingerprint": {"policy.model": "a"}}
    publish(output, OutputConfig(root=output.url))
    assert making_run(output, read_state(output)) == {"number": 1, "fingerprint": {"policy.model": "a"}}
