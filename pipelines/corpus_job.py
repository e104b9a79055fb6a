"""The job that makes a corpus: units stream through the pools of a config, and are published with their quarantine."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pipelines import report
from pipelines.corpus import scored
from pipelines.corpus.plan import Plan
from pipelines.corpus.publish import CORPUS, Published, publish
from pipelines.corpus.runs import digest, latest_pace
from pipelines.corpus.shards import Input
from pipelines.corpus.storage import Storage
from pipelines.job import Job
from pipelines.settings import JobConfig, fingerprint, notes
from pipelines.stream import connect, nodes_told, stream


class CorpusJob(Job[JobConfig]):
    """Prompts, or a corpus that is there, become a corpus: align_corpus and score_corpus, by their config."""

    def __init__(self, config: JobConfig, source: Input, output: Storage) -> None:
        super().__init__(config, source, config.input, output)
        self.retry_quarantined = config.run.retry_quarantined

    def fingerprint(self, kept_types: Mapping[str, str]) -> dict[str, Any]:
        return fingerprint(self.config, kept_types)

    def told(self, plan: Plan) -> dict[str, Any]:
        bad_shards = [{"path": shard.path, "reason": shard.reason} for shard in plan.bad_shards]
        return {"bad_shards": bad_shards, "notes": notes(self.config)}

    def despite(self, plan: Plan) -> str | None:
        return "input.on_bad_shard=skip does the other shards" if self.config.input.on_bad_shard == "fail" else None

    def connect(self) -> None:
        connect(self.config)

    def make(self, plan: Plan, run: int, made_of: str) -> None:
        stream(self.config, self.source, self.output, plan, run, made_of)

    def publish(self, plan: Plan) -> Published:
        return publish(
            self.output,
            self.config.output,
            replace(CORPUS, refusal=partial(scored.refusal, most=self.config.run.max_unscored_fraction)),
            max_quarantined_fraction=self.config.run.max_quarantined_fraction,
            accept_quarantined=self.config.run.accept_quarantined,
            bad_shards=plan.bad_shards,
        )

    def print_dry_run(self, plan: Plan) -> None:
        made_of = digest(self.fingerprint(plan.kept_types))
        nodes = nodes_told(self.config) if plan.num_units else []
        report.print_dry_run(self.config, self.source, plan, made_of, latest_pace(self.output), nodes)

    def print_summary(self, plan: Plan, published: Published) -> None:
        report.print_summary(self.config, self.output, plan, published)
