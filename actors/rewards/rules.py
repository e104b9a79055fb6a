"""Rewards that need no model: what can be told of a text by rules, and functions of the user's own.

Each rule is a function `(prompt, response) -> float` in [0, 1], 1 where nothing is amiss. They catch what is wrong on
the surface; none of them knows whether an answer is right or helpful.
"""

import hashlib
import importlib
import inspect
import itertools
import math
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from actors.contract import ConfigError, RowError
from actors.engines.base import Completion, EngineStats, Request
from actors.words import is_unspaced, words

if TYPE_CHECKING:
    from actors.reward import RewardConfig

Prompt = list[dict[str, str]]
"""A chat as {role, content}: system (optional, first), then user and assistant in turn, user last."""
Rule = Callable[[Prompt, str], float]

VERSION = 3
"""Raised when a rule of this module comes to score a text otherwise."""

SHORT_WORDS, LONG_WORDS = 20, 400
GRAM = 3
LEAST_LETTERS, STEM_LETTERS = 4, 6
"""Shorter words than the first tell little of what a text is about; words that begin alike for the second are one."""
REFUSES_WITHIN = 200
TELLING_BYTES = 20
"""Letters, in bytes of UTF-8, from which on the language of a text is told with some certainty."""

_REFUSAL = re.compile(
    r"\b(?:i(?:['’]m| am) (?:sorry|afraid|unable|not able)|i (?:can(?:['’]t|not)|won['’]t|will not|must decline)"
    r"|i(?:['’]m| am) (?:just )?an? (?:ai|artificial intelligence|language model)|as an? (?:ai|language model)"
    r"|(?:unfortunately|sorry|apologies|apologize),? (?:but )?i\b)",
    re.IGNORECASE,
)
_TEMPLATE = re.compile(
    r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</?s>|^(?:#+ *)?(?:Human|User|Assistant) *:",
    re.IGNORECASE | re.MULTILINE,
)
_FENCE = re.compile(r"^ {0,3}(`{3,}(?=[^`\n]*$)|~{3,})", re.MULTILINE)
"""Backticks with others behind them on the line are code within a line (CommonMark 0.31, 4.5)."""
_GOES_ON = {*",;:/\\@#&、，；：", "Ps", "Pi", "Pd"}
"""Marks, and categories of them (Unicode), that no text ends with."""
_LIST_ITEM = re.compile(r"\s*(?:[-*+•]|\d+[.)])\s|\s*\|.*\|\s*$|\s*#{1,6} ")


def length(prompt: Prompt, response: str) -> float:
    """1 from SHORT_WORDS to LONG_WORDS words; less in proportion where there are fewer, or the more there are."""
    num_words = len(words(response))
    return min(1.0, num_words / SHORT_WORDS, LONG_WORDS / max(1, num_words))


def repetition(prompt: Prompt, response: str) -> float:
    """Distinct-3: different runs of three words over all of them (Li et al., 2016, https://arxiv.org/abs/1510.03055)."""
    found = words(response.lower())
    grams = [tuple(found[at : at + GRAM]) for at in range(len(found) - GRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def refusal(prompt: Prompt, response: str) -> float:
    """0 where the first REFUSES_WITHIN characters hold an English phrase of refusing, else 1."""
    return 0.0 if _REFUSAL.search(response[:REFUSES_WITHIN]) else 1.0


def language(prompt: Prompt, response: str) -> float:
    """1 where the response is in the language of the user's last message, or either is too short to tell; else 0.

    Code, and a translation that was asked for, are in another language too: it cannot know.
    """
    from py3langid import classify  # its model takes a moment to load

    asked = prompt[-1]["content"]
    if min(_letter_bytes(asked), _letter_bytes(response)) < TELLING_BYTES:
        return 1.0
    return float(classify(asked)[0] == classify(response)[0])


def format(prompt: Prompt, response: str) -> float:
    """Share of these that hold: code fences are closed; nothing of a chat template is in it; it ends as a text ends,
    with a mark that ends a sentence, a closing quote or bracket, an emoji, code, or in a list, table or heading."""
    text = response.rstrip()
    fences = _FENCE.findall(text)
    closed = len(fences) % 2 == 0
    ended = bool(text) and (_ends(text[-1]) or _LIST_ITEM.match(text.rsplit("\n", 1)[-1]) is not None)
    return (closed + (_TEMPLATE.search(text) is None) + ended) / 3


def relevance(prompt: Prompt, response: str) -> float:
    """Share of the words of the user's last message that the response takes up: words of LEAST_LETTERS and more, each
    by its first STEM_LETTERS (in scripts without spaces: pairs of characters). 1 where the message has none.

    What answers in other words is taken to be beside the point, and an echo to be to it: of two answers that one model
    gives, the better is told more often than not; of two models it tells nothing.
    """
    asked = _stems(prompt[-1]["content"])
    return len(asked & _stems(response)) / len(asked) if asked else 1.0


RULES: dict[str, Rule] = {
    "length": length,
    "repetition": repetition,
    "refusal": refusal,
    "language": language,
    "format": format,
    "relevance": relevance,
}


def rule_of(name: str) -> Rule:
    """A rule by its name, or the function that `module:function` names. Raises ConfigError where there is none."""
    if name in RULES:
        return RULES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"rules.{name}: there is no such rule; there are {', '.join(RULES)} and module:function")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"rules.{name}: cannot be imported ({error}); PYTHONPATH must lead to it") from error
    if not callable(found):
        raise ConfigError(f"rules.{name}: {attribute} is not a function (prompt, response) -> float")
    function: Rule = found
    return function


def rules_identity(weights: dict[str, float]) -> str:
    """16 hex digits over what the rules are: the version of this module's own, the source file of each other one."""
    found = hashlib.sha256(f"{VERSION}".encode())
    for name in sorted(set(weights) - set(RULES)):
        path = inspect.getsourcefile(inspect.unwrap(rule_of(name)))
        found.update(name.encode() + (Path(path).read_bytes() if path else b""))
    return found.hexdigest()[:16]


class RuleEngine:
    """Scores a chat's last message by a weighted sum of rules; one call at a time, here in the actor."""

    def __init__(self, config: "RewardConfig") -> None:
        self._rules = [(name, weight, rule_of(name)) for name, weight in config.rules.items() if weight]

    async def generate(self, request: Request) -> Completion:
        """Raises RowError `reward_failed` where a function raises, or returns anything but a finite number."""
        assert not isinstance(request.prompt, str)
        prompt = [{"role": role, "content": content} for role, content in request.prompt[:-1]]
        response = request.prompt[-1][1]
        score = math.fsum(weight * _asked(name, rule, prompt, response) for name, weight, rule in self._rules)
        return Completion("", None, None, None, score=score)

    def stats(self) -> EngineStats:
        return EngineStats(num_tokens=0, num_running=0, num_waiting=0)

    def close(self) -> None:
        """Nothing is held."""


def _asked(name: str, rule: Rule, prompt: Prompt, response: str) -> float:
    try:
        score = float(rule(prompt, response))
    except Exception as error:
        raise RowError("reward_failed", f"{name}: {type(error).__name__}: {error}") from error
    if not math.isfinite(score):
        raise RowError("reward_failed", f"{name} returned {score}")
    return score


def _ends(mark: str) -> bool:
    category = unicodedata.category(mark)
    return category[0] in "PS" and not {mark, category} & _GOES_ON


def _stems(text: str) -> set[str]:
    found = words(text.lower())
    pairs = {pair for pair in map("".join, itertools.pairwise(found)) if is_unspaced(pair)}
    return pairs | {word[:STEM_LETTERS] for word in found if len(word) >= LEAST_LETTERS}


def _letter_bytes(text: str) -> int:
    return len("".join(filter(str.isalpha, text)).encode())
