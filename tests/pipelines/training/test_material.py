"""What is held out is never trained on, nothing is cut, and every pair that is neither has a cause."""

from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.contract import ConfigError, RowError
from actors.training.reward_settings import Pair, RewardTrainingConfig
from pipelines.reference import reference_yaml
from pipelines.settings import SiteConfig
from pipelines.training.material import Material, digest_of, gather
from pipelines.training.pairs import Preference, is_held_out, prompt_key
from pipelines.training.reward_settings import PairsConfig, RewardModelConfig, RewardRunConfig, TrainRewardConfig

CONF = Path(__file__).resolve().parents[3] / "conf"


def encode(each: Preference) -> Pair:
    """A token for each character; what is longer than 50 the model could not read."""
    if len(each.chosen) > 50:
        raise RowError("prompt_too_long", "…")
    return Pair(prompt_key(each.prompt), array("i", map(ord, each.chosen)), array("i", map(ord, each.rejected)))


def write(path: Path, prompts: list[str], length: int = 4) -> Path:
    chosen = [prompt[-2:].rjust(length, "a") for prompt in prompts]
    columns = {"prompt": prompts, "chosen": chosen, "rejected": ["b"] * len(prompts)}
    pq.write_table(pa.table(columns), path)
    return path


def material(path: Path, limit: int | None = None, **given: Any) -> Material:
    training = RewardTrainingConfig(max_tokens=20, seed=given.pop("seed", 0))
    return gather(PairsConfig(str(path), **given), training, SiteConfig(), encode, limit)


def names(pairs: list[Pair]) -> list[str]:
    return [pair.prompt for pair in pairs]


def keys(*numbers: int) -> list[str]:
    return [prompt_key((("user", f"prompt {number}"),)) for number in numbers]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """60 prompts, twice each."""
    return write(tmp_path / "pairs.parquet", [f"prompt {number % 60}" for number in range(120)])


def test_the_documented_config_is_the_schema() -> None:
    assert (CONF / "train_reward.yaml").read_text() == reference_yaml(TrainRewardConfig)


def test_a_share_of_the_prompts_is_held_out(pairs: Path) -> None:
    found = material(pairs, test_fraction=0.25)
    expected = {key for key in keys(*range(60)) if is_held_out(key, 0.25)}
    assert set(names(found.held_out)) == expected and len(found.held_out) == 2 * len(expected) > 10
    assert set(names(found.train)) == {*keys(*range(60))} - expected
    assert (len(found.train) + len(found.held_out), found.left_out.total()) == (120, 0)
    (file,) = found.files
    assert (file["path"], file["num_bytes"]) == ("pairs.parquet", pairs.stat().st_size)


def test_what_another_file_holds_out_is_not_trained_on(pairs: Path, tmp_path: Path) -> None:
    test = write(tmp_path / "test.parquet", ["prompt 3", "Prompt  7", "another"])
    found = material(pairs, test_path=str(test))
    assert names(found.held_out) == [*keys(3, 7), prompt_key((("user", "another"),))]
    assert not set(names(found.train)) & {*keys(3, 7)}
    assert (len(found.train), found.left_out) == (116, Counter(held_out_prompt=4))
    assert [file["path"] for file in found.files] == ["pairs.parquet", "test.parquet"]


def test_long_pairs_are_held_out_but_not_trained_on(tmp_path: Path) -> None:
    for name, length in (("short", 4), ("long", 30), ("unreadable", 51)):
        write(tmp_path / f"{name}.parquet", [f"prompt {number}" for number in range(60)], length)
    found = material(tmp_path, test_fraction=0.25)
    held_out = sum(is_held_out(key, 0.25) for key in keys(*range(60)))
    assert sorted(len(pair.chosen) for pair in found.held_out) == [4] * held_out + [30] * held_out
    assert {len(pair.chosen) for pair in found.train} == {4}
    assert found.left_out == Counter(too_long=60 - held_out, prompt_too_long=60)


def test_a_limit_draws_pairs_by_the_seed_and_leaves_those_that_are_held_out(pairs: Path) -> None:
    whole, some, other = material(pairs), material(pairs, 20), material(pairs, 20, seed=1)
    assert some.held_out == whole.held_out
    assert len(some.train) == 20 and some.left_out["beyond_limit"] == len(whole.train) - 20
    assert names(some.train) != names(whole.train)[:20] and names(some.train) != names(other.train)
    assert digest_of(material(pairs, 20).train) == digest_of(some.train) != digest_of(other.train)


def test_the_digest_is_of_the_texts(pairs: Path, tmp_path: Path) -> None:
    prompts = [f"prompt {number % 60}" for number in range(120)]
    found = [
        digest_of(material(path).train)
        for path in (pairs, write(tmp_path / "same.parquet", prompts), write(tmp_path / "longer.parquet", prompts, 5))
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("length", "test_fraction", "told"),
    [
        (51, 0.1, r"is to train on \(left out: 60 prompt_too_long\)$"),
        (30, 0.1, r"is to train on \(left out: [0-9]+ too_long\)$"),
        (4, 1e-9, r"is held out \(left out: none\)$"),
    ],
)
def test_nothing_to_train_on_or_to_be_held_to_is_a_mistake(
    tmp_path: Path, length: int, test_fraction: float, told: str
) -> None:
    write(tmp_path / "pairs.parquet", [f"prompt {number}" for number in range(60)], length)
    with pytest.raises(ConfigError, match=told):
        material(tmp_path, test_fraction=test_fraction)


@pytest.mark.parametrize(
    "values",
    [
        {"num_epochs": 0}, {"batch_size": 0}, {"batch_tokens": 0}, {"max_tokens": 0}, {"learning_rate": 0.0},
        {"head_learning_rate": -1.0}, {"weight_decay": -0.1}, {"warmup_fraction": 1.0}, {"num_layers": -1},
        {"num_workers": -1}, {"checkpoint_s": -1.0}, {"num_threads": 0},
    ],
)  # fmt: skip
def test_values_that_mean_nothing_are_refused(values: dict[str, Any]) -> None:
    (name,) = values
    config = RewardRunConfig() if hasattr(RewardRunConfig(), name) else RewardTrainingConfig()
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        replace(config, **values)


def test_sections_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^test_fraction must be between 0 and 1, got 1\.0$"):
        PairsConfig("p", test_fraction=1.0)
    with pytest.raises(ConfigError, match=r"^test_fraction has no effect with test_path$"):
        PairsConfig("p", test_path="q", test_fraction=0.2)
    with pytest.raises(ConfigError, match=r"^root must be a folder"):
        RewardModelConfig("s3://bucket/reward")
