"""The keys of build_preferences: what is documented, what is refused, and what a preset chooses."""

from pathlib import Path
from typing import get_args

import pytest

from actors.contract import ConfigError
from pipelines.config import compose, presets
from pipelines.preferences.schema import STRATEGIES
from pipelines.preferences.settings import BuildPreferencesConfig, Strategy
from pipelines.reference import reference_yaml

CONF = Path(__file__).resolve().parents[3] / "conf"


def composed(*arguments: str) -> BuildPreferencesConfig:
    given = ["input.path=in", "output.root=out", *arguments]
    return compose(BuildPreferencesConfig, given, prog="", description="", groups=("build", "site"))[0]


def test_the_documented_config_is_the_schema() -> None:
    assert (CONF / "build_preferences.yaml").read_text() == reference_yaml(BuildPreferencesConfig)


def test_every_strategy_has_a_schema_and_a_preset_of_its_name() -> None:
    assert set(get_args(Strategy)) == set(STRATEGIES) == set(presets("build"))
    for name in STRATEGIES:
        assert composed(f"build={name}", "build.reward=quality").build.strategy == name


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["build=unpaired"], "strategy=unpaired ranks candidates by a reward"),
        (["build.prefer=best_worst"], "strategy=pairs with prefer=best_worst ranks candidates by a reward"),
        (["build.reward=a", "build.reward_weights={b: 1}"], "exclude each other"),
        (["build.min_margin=0.1"], "no effect without a reward"),
        (["build.candidates=response"], "leaves nothing to compare"),
        (["export=csv"], "export=csv is unknown; there are: "),
        (["build=ranked", "build.reward=a", "export=trl"], "export=trl takes curriculum or pairs"),
        (["prompts.test_fraction=0.5", "prompts.validation_fraction=0.5"], "leave nothing for split `train`"),
        (["build.require_finish=[stopp]"], "build.require_finish.0 expects one of stop, length, got 'stopp'"),
        (["input.keep_columns=[margin]"], "keep_columns may not name margin"),
        (["build=ranked", "build.reward=a", "build.semantic_encoder=e"], "no effect with strategy=ranked: it is for"),
        (["build=unpaired", "build.reward=a", "build.max_length_ratio=2"], "no effect with strategy=unpaired: it is"),
        (["build=ranked", "build.reward=a", "build.prefer=best_worst"], "strategy=ranked: it is for pairs, steps"),
        (["build.threshold=0.5"], "threshold has no effect with strategy=pairs: it is for unpaired"),
        (["build.num_phases=2"], "num_phases has no effect with strategy=pairs: it is for curriculum"),
        (["build.semantic_alpha=2"], "semantic_alpha has no effect without a semantic_encoder"),
        (["prompts.overlap=0.5"], "overlap has no effect with dedup=exact"),
        (["prompts.ngram=8"], "ngram has no effect without files in decontaminate"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(*arguments)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
