"""Names that a config may misspell: rewards and policies, which the corpus's own rows know."""

import difflib
from collections.abc import Iterator, Sequence

import pyarrow.compute as pc

from actors.contract import ConfigError
from pipelines.preferences.settings import BuildConfig
from pipelines.preferences.source import PublishedCorpus


def refuse_unknown(source: PublishedCorpus, build: BuildConfig) -> None:
    """Raise ConfigError for a reward or a policy of the config that no row of the corpus has: nothing would come of it.

    Reads the names alone, part after part until all were seen: mostly those of the first rows.
    """
    key = "build.reward_weights" if build.reward is None else "build.reward"
    _refuse(key, list(build.weights), "reward", _names(source, "rewards", "name"), "score it with score_corpus.py")
    _refuse("build.models", build.models, "policy", _names(source, "responses", "model"), "it is empty")


def _refuse(key: str, wanted: Sequence[str], what: str, found: Iterator[set[str]], without: str) -> None:
    seen: set[str] = set()
    while not seen.issuperset(wanted):
        names = next(found, None)
        if names is None:
            name = next(each for each in wanted if each not in seen)
            near = difflib.get_close_matches(name, seen, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            there = f"there are: {', '.join(sorted(seen))}" if seen else f"it has none: {without}"
            raise ConfigError(f"{key}: the corpus has no {what} {name!r}; {hint}{there}")
        seen |= names


def _names(source: PublishedCorpus, column: str, field: str) -> Iterator[set[str]]:
    """The different values of a field of the lists in a column, some rows at a time."""
    for listed in source.listing():
        for batch in source.batches(listed, [f"{column}.list.element.{field}"]):
            if column in batch.schema.names:  # corpora of earlier versions have no `rewards`
                yield set(pc.unique(batch[column].flatten().field(field)).drop_null().to_pylist())
