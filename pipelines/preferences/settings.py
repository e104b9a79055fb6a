"""Every key of the build_preferences job."""

from dataclasses import dataclass
from typing import Literal, get_args

from actors.contract import ConfigError, is_set, option, refuse_unless, section
from pipelines.corpus.publish import OutputConfig
from pipelines.preferences import schema
from pipelines.preferences.exporters import EXPORTERS
from pipelines.settings import SiteConfig

Strategy = Literal["pairs", "unpaired", "ranked", "curriculum", "triple", "steps", "refinement", "trajectory"]
WITHOUT_REWARD = ("pairs", "steps", "refinement")
"""Strategies that can go by what was aligned instead of by a reward."""

_READ_BY = {
    "prefer": ("pairs", "steps"),
    "max_length_ratio": tuple(name for name in get_args(Strategy) if name != "unpaired"),
    "threshold": ("unpaired",),
    "num_phases": ("curriculum",),
    "semantic_encoder": tuple(schema.WEIGHED),
}
"""Keys that some strategies read: set for another, they would be silently without effect."""


@dataclass(frozen=True)
class CorpusConfig:
    """The corpus that the preferences are built from."""

    path: str = option("???", "output root of align_corpus or score_corpus; only published partitions are read")
    keep_columns: list[str] = option(
        [],
        'columns of the corpus carried along unchanged; ["*"]: all that there are besides those of every corpus',
        changes_rows=True,
    )

    def __post_init__(self) -> None:
        made = {name for columns in schema.STRATEGIES.values() for name in columns.names}
        taken = sorted(set(self.keep_columns) & {*made, *schema.RANKED.names, *schema.CANDIDATE.names})
        if taken:
            raise ConfigError(
                f"keep_columns may not name {', '.join(taken)}, which has a meaning of its own here: name those to keep"
            )
        if len(set(self.keep_columns)) < len(self.keep_columns):
            raise ConfigError("keep_columns names a column twice")


@dataclass(frozen=True)
class BuildConfig:
    """What is made of a prompt's candidates."""

    strategy: Strategy = option("pairs", "what is made of a prompt", changes_rows=True)
    prefer: Literal["aligned", "best_worst", "best_random"] = option(
        "aligned",
        "`pairs`, `steps`: the best aligned answer that is better than its response over that, or the best of all "
        "candidates over the worst, or over a random one that is worse",
        changes_rows=True,
    )
    reward: str | None = option(
        None,
        "reward of the corpus that ranks the candidates; null: none, and what was aligned counts as better",
        changes_rows=True,
    )
    reward_weights: dict[str, float] = option(
        {}, "in place of `reward`: rewards by name, with the weight of each in their sum", changes_rows=True
    )
    candidates: Literal["all", "response", "aligned"] = option(
        "all", "which of the policies' responses and their aligned texts are candidates", changes_rows=True
    )
    require_finish: list[Literal["stop", "length"]] = option(
        ["stop"],
        "finish reasons of usable candidates; stored texts, which have none, count as stop; empty: any",
        changes_rows=True,
    )
    models: list[str] = option([], "policies whose candidates are used; empty: all", changes_rows=True)
    exclude_models: list[str] = option([], "policies whose candidates are not used", changes_rows=True)
    single_policy: bool = option(
        False,
        "of each prompt use only candidates of one policy: that of the best candidate with another to compare it with",
        changes_rows=True,
    )
    min_margin: float = option(
        0.0,
        "least difference of rewards between chosen and rejected, or (`unpaired`) between an answer and the threshold; "
        "ties are never used",
        changes_rows=True,
    )
    max_length_ratio: float | None = option(
        None,
        "most that the longer side may have of the shorter's tokens (characters where one is stored); not `unpaired`",
        changes_rows=True,
    )
    length_slope: float = option(
        0.0,
        "reward taken away per token, or per character where texts of a prompt are stored, which have no count: with "
        "the slope that the report tells for that unit, what is left is the reward that length does not explain. For a "
        "dataset with prompts of both no one slope is right",
        changes_rows=True,
    )
    threshold: float | None = option(
        None, "`unpaired`: reward from which on an answer is desirable; null: the mean of its prompt", changes_rows=True
    )
    num_phases: int = option(
        3, "`curriculum`: most pairs of a prompt, spread from the largest margin to the smallest", changes_rows=True
    )
    semantic_encoder: str | None = option(
        None, "strategies that compare two answers: folder of a sentence encoder that weights rows; null: all weigh 1"
    )
    semantic_alpha: float = option(
        1.0, "the weight is exp(-alpha * (1 - cosine of prompt and better answer))", changes_rows=True
    )
    system_prompt: str | None = option(
        None,
        "system message for prompts that have none: a corpus's do not hold the `policy.system_prompt` that they were "
        "answered under",
        changes_rows=True,
    )
    seed: int = option(0, "of random rejected answers, splits and bootstrap intervals", changes_rows=True)

    def __post_init__(self) -> None:
        for key, readers in _READ_BY.items():
            if self.strategy not in readers and is_set(self, key):
                raise ConfigError(f"{key} has no effect with strategy={self.strategy}: it is for {', '.join(readers)}")
        if self.semantic_encoder is None and is_set(self, "semantic_alpha"):
            raise ConfigError("semantic_alpha has no effect without a semantic_encoder")
        if self.reward is not None and self.reward_weights:
            raise ConfigError("reward and reward_weights exclude each other: name one reward, or weights of several")
        if self.needs_reward and not self.weights:
            raise ConfigError(
                f"reward: strategy={self.strategy}{f' with prefer={self.prefer}' if self.strategy == 'pairs' else ''} "
                f"ranks candidates by a reward of the corpus: name it; without one there are prefer=aligned of "
                f"{', '.join(WITHOUT_REWARD)}"
            )
        if not self.weights and (self.min_margin or self.length_slope):
            raise ConfigError("min_margin and length_slope have no effect without a reward")
        if self.candidates != "all" and self.compares_aligned:
            raise ConfigError(
                f"candidates={self.candidates} leaves nothing to compare: what is aligned is compared with responses"
            )
        refuse_unless(self, "0 or more", "min_margin")
        refuse_unless(self, "1 or more", "max_length_ratio", "num_phases")

    @property
    def weights(self) -> dict[str, float]:
        """Rewards that count, with the weight of each in their sum; {} where there is none."""
        return {self.reward: 1.0} if self.reward is not None else self.reward_weights

    @property
    def prefers_aligned(self) -> bool:
        return self.strategy in ("pairs", "steps") and self.prefer == "aligned"

    @property
    def compares_aligned(self) -> bool:
        """Whether what is aligned is compared with its own response, and with nothing else."""
        return self.strategy == "refinement" or self.prefers_aligned

    @property
    def needs_reward(self) -> bool:
        return not self.compares_aligned


@dataclass(frozen=True)
class PromptsConfig:
    """Which prompts are used, and in which split."""

    dedup: Literal["none", "exact", "near"] = option(
        "exact",
        "of prompts that are the same but for case and white space (near: or whose word triples overlap by `overlap`) "
        "only the first of the corpus is used, whatever comes of it: the index knows prompts, not answers",
        changes_rows=True,
    )
    overlap: float = option(
        0.8, "`near`: Jaccard similarity of word triples from which on prompts count as the same", changes_rows=True
    )
    decontaminate: list[str] = option(
        [],
        "benchmark files (.parquet, .jsonl, .json, .txt) that every node can read: prompts are dropped of which a "
        "message shares `ngram` words in a row with a text in them; of shorter texts all words from 8 on; those of 4 "
        "to 7 words where a message is nothing else; still shorter ones tell nothing",
    )
    ngram: int = option(
        13,
        "words in a row that count as contamination (characters, in scripts without spaces between words)",
        changes_rows=True,
    )
    test_fraction: float = option(0.0, "share of prompts in split `test`, by a hash of their text", changes_rows=True)
    validation_fraction: float = option(0.0, "share of prompts in split `validation`, likewise", changes_rows=True)

    def __post_init__(self) -> None:
        if not 0 < self.overlap <= 1:
            raise ConfigError(f"overlap must be above 0 and at most 1, got {self.overlap}")
        if self.dedup != "near" and is_set(self, "overlap"):
            raise ConfigError(f"overlap has no effect with dedup={self.dedup}: it is for near")
        refuse_unless(self, "1 or more", "ngram")
        if not self.decontaminate and is_set(self, "ngram"):
            raise ConfigError("ngram has no effect without files in decontaminate")
        for name in ("test_fraction", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.test_fraction + self.validation_fraction >= 1:
            raise ConfigError("test_fraction and validation_fraction leave nothing for split `train`")


@dataclass(frozen=True)
class DatasetConfig(OutputConfig):
    """Where the dataset goes and how it is cut."""

    title: str = option("Preference dataset", "title of the dataset card")
    jsonl: bool = option(False, "write each part as JSON lines too")


@dataclass(frozen=True)
class BuildRunConfig:
    """How the job goes about it."""

    unit_rows: int = option(8192, "most prompts of a unit: what is built and committed at once; 32 MiB at most")
    num_workers: int = option(0, "units built at the same time, a CPU each; 0: as many as the cluster has CPUs")
    accept_changes: bool = option(
        False,
        "apply a changed config to new partitions, but for what decides columns, rewards and splits; go on with a "
        "corpus that was moved",
    )
    lease_ttl_s: float = option(30.0, "seconds of silence after which another job on the same root counts as dead")
    stall_minutes: float = option(30.0, "end with exit code 4 after so long without a unit built or a part indexed")

    def __post_init__(self) -> None:
        refuse_unless(self, "more than 0", "unit_rows", "lease_ttl_s", "stall_minutes")
        refuse_unless(self, "0 or more", "num_workers")


@dataclass(frozen=True)
class BuildPreferencesConfig:
    """The build_preferences job."""

    input: CorpusConfig = section(CorpusConfig, "where the corpus is")
    output: DatasetConfig = section(DatasetConfig, "where the dataset goes")
    build: BuildConfig = section(BuildConfig, "what is made of a prompt's candidates")
    prompts: PromptsConfig = section(PromptsConfig, "which prompts are used, and in which split")
    export: str | None = option(
        None, f"format of a trainer: {', '.join(sorted(EXPORTERS))}; null: the strategy's own columns",
        changes_rows=True,
    )  # fmt: skip
    run: BuildRunConfig = section(BuildRunConfig, "how the job goes about it")
    site: SiteConfig = section(SiteConfig, "where the job runs")

    def __post_init__(self) -> None:
        if self.export is None:
            return
        if self.export not in EXPORTERS:
            raise ConfigError(f"export={self.export} is unknown; there are: {', '.join(sorted(EXPORTERS))}")
        fitting = EXPORTERS[self.export].strategies
        if self.build.strategy not in fitting:
            raise ConfigError(
                f"export={self.export} takes {' or '.join(sorted(fitting))}, and build.strategy is "
                f"{self.build.strategy}"
            )
        taken = sorted(EXPORTERS[self.export].names & set(self.input.keep_columns))
        if taken:
            raise ConfigError(f"keep_columns may not name {', '.join(taken)}: export={self.export} gives it a meaning")
