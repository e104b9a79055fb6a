"""Rules: what each of them finds, how they add up, and what a user's function may do wrong."""

import asyncio
import sys
from pathlib import Path

import pytest

from actors.contract import ConfigError, RowError
from actors.engines.base import Request
from actors.reward import RewardConfig
from actors.rewards import rules
from actors.rewards.rules import RULES, RuleEngine, rules_identity

WHOLE = (
    "The sky is blue because air scatters short waves of light more than long ones, and so the blue light reaches us "
    "from every side of the sky."
)
ASKED = [
    {"role": "system", "content": "Antworte knapp."},
    {"role": "user", "content": "Why is the sky so blue by day, and not red?"},
]


@pytest.mark.parametrize("name", RULES)
def test_a_whole_answer_is_well_by_every_rule(name: str) -> None:
    assert RULES[name](ASKED, WHOLE) == 1.0


@pytest.mark.parametrize(
    ("name", "response", "score"),
    [
        ("length", "", 0.0),
        ("length", "five words, and no more", 0.25),
        ("length", "天空是蓝色的因为空气", 0.5),  # ten characters count as ten words
        ("length", "word " * 800, 0.5),
        ("repetition", "again and again and again and again", 2 / 5),  # "again and again", "and again and"
        ("repetition", "Two words", 1.0),
        ("repetition", "की का कि की का के", 1.0),  # which differ in their vowel signs alone
        ("refusal", "I'm sorry, but I can't help with that.", 0.0),
        ("refusal", "As an AI language model, I have no taste.", 0.0),
        ("refusal", f"{WHOLE} {WHOLE} I cannot say more.", 1.0),  # an answer with a limit is no refusal
        ("refusal", "Sorry is a word.", 1.0),
        ("language", "Der Himmel ist blau, weil die Luft kurze Wellen stärker streut.", 0.0),
        ("language", "天空是蓝色的，因为空气散射短波。", 0.0),
        ("language", "Himmelblau.", 1.0),  # too short to tell
        ("format", "Use this:\n```python\nx = 1\n", 1 / 3),  # a fence that is open, and an end that is none
        ("format", "Use this:\n```python\nprint(1)\n```", 1.0),
        ("format", "It is blue.<|im_end|>", 2 / 3),
        ("format", "It is blue.\nHuman: And at night?", 2 / 3),
        ("format", "It is blue because the", 2 / 3),
        ("format", "It is blue because,", 2 / 3),
        ("format", "He said (", 2 / 3),
        ("format", "These are the reasons:", 2 / 3),
        ("format", "He said “yes”", 1.0),
        ("format", "**It is blue**", 1.0),
        ("format", "它是蓝色的。", 1.0),
        ("format", "```x = 1``` is code.", 1.0),  # within a line
        ("format", "~~~\nx\n~~~", 1.0),
        ("format", "- air\n- light", 1.0),
        ("format", "", 2 / 3),
    ],
)
def test_what_a_rule_finds(name: str, response: str, score: float) -> None:
    assert RULES[name](ASKED, response) == pytest.approx(score)


@pytest.mark.parametrize(
    ("asked", "response", "score"),
    [
        (
            "How do magnets attract iron?",
            "Magnetic fields pull at it.",
            1 / 3,
        ),  # "magnet", of that and "attrac", "iron"
        ("How do magnets attract iron?", "", 0.0),
        ("How so?", "By air.", 1.0),  # nothing to take up
        ("天空为什么是蓝色的", "天空是蓝色的。", 1 / 2),  # 天空, 是蓝, 蓝色 and 色的, of eight pairs
        ("天空为什么是蓝色的", "我喜欢吃苹果。", 0.0),
    ],
)
def test_an_answer_takes_up_the_words_of_the_question(asked: str, response: str, score: float) -> None:
    assert RULES["relevance"]([{"role": "user", "content": asked}], response) == pytest.approx(score)


def score(config: RewardConfig, response: str) -> float | None:
    prompt = tuple((message["role"], message["content"]) for message in ASKED)
    return asyncio.run(RuleEngine(config).generate(Request((*prompt, ("assistant", response)), 0))).score


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of a user's, to be edited."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    path = tmp_path / "my_rewards.py"
    path.write_text(
        "def turns(prompt, response):\n    return len(prompt) + (prompt[-1]['role'] == 'user') / 2\n"
        "def broken(prompt, response):\n    raise KeyError('nothing')\n"
        "def endless(prompt, response):\n    return float('inf')\n"
        "VALUE = 1\n"
    )
    return path


def test_rules_and_functions_add_up_by_their_weights(functions: Path) -> None:
    config = RewardConfig(model="r", rules={"length": 0.5, "refusal": 0.25, "format": 0.0, "my_rewards:turns": -2})
    assert score(config, "I cannot do that") == pytest.approx(0.5 * 4 / 20 - 2 * 2.5)


@pytest.mark.parametrize(("name", "told"), [("broken", "KeyError: 'nothing'"), ("endless", "returned inf")])
def test_what_a_function_does_wrong_is_that_texts_fault(functions: Path, name: str, told: str) -> None:
    with pytest.raises(RowError, match=f"reward_failed: my_rewards:{name}.*{told}"):
        score(RewardConfig(model="r", rules={f"my_rewards:{name}": 1}), WHOLE)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lenght", "no such rule; there are length, "),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("my_rewards:missing", "has no attribute 'missing'"),
        ("my_rewards:VALUE", "is not a function"),
    ],
)
def test_a_rule_that_is_not_there_is_a_mistake(functions: Path, name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        RuleEngine(RewardConfig(model="r", rules={name: 1}))


def test_the_identity_of_rules_follows_the_code_of_the_users_functions(
    functions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"length": 1.0, "my_rewards:turns": 1.0}
    before = rules_identity(weights)
    assert rules_identity(weights) == before
    functions.write_text(functions.read_text().replace("len(prompt)", "2"))
    after = rules_identity(weights)
    assert after != before
    monkeypatch.setattr(rules, "VERSION", rules.VERSION + 1)
    assert rules_identity(weights) != after


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "rules must give one rule a weight"),
        ({"rules": {"length": 0.0}}, "rules must give one rule a weight"),
        ({"engine": "torch", "model": "m", "rules": {"length": 1.0}}, "rules has no effect with engine=torch"),
        ({"engine": "torch", "model": "m", "temperature": 0.5}, "temperature has no effect with engine=torch"),
        ({"rules": {"length": 1.0}, "tensor_parallel_size": 2}, "tensor_parallel_size has no effect"),
        ({"rules": {"length": 1.0}, "criterion": "short"}, "criterion has no effect with engine=rules"),
    ],
)
def test_keys_without_effect_are_refused(keys: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        RewardConfig(**{"model": "m", **keys})  # type: ignore[arg-type]
