"""The job that makes a preference dataset: units of a published corpus are ranked, built, exported and published."""

from collections.abc import Mapping
from typing import Any

from pipelines.cluster import join_or_start
from pipelines.corpus.plan import Plan
from pipelines.corpus.publish import Published, publish
from pipelines.corpus.storage import Storage
from pipelines.job import Job
from pipelines.preferences import report
from pipelines.preferences.build import Builder, output_columns
from pipelines.preferences.dataset import preferences
from pipelines.preferences.exporters import EXPORTERS
from pipelines.preferences.filters import benchmarks_of
from pipelines.preferences.fingerprint import fingerprint, fixed
from pipelines.preferences.names import refuse_unknown
from pipelines.preferences.settings import BuildPreferencesConfig
from pipelines.preferences.source import PublishedCorpus, shard_config
from pipelines.preferences.stream import build_all


class PreferencesJob(Job[BuildPreferencesConfig]):
    """A published corpus becomes a preference dataset."""

    source: PublishedCorpus

    def __init__(self, config: BuildPreferencesConfig, source: PublishedCorpus, output: Storage) -> None:
        super().__init__(config, source, shard_config(config.input.path, config.input.keep_columns), output)
        found = benchmarks_of(config.prompts, config.site.storage_options)
        self._benchmarks = found.digest if found else None
        files = EXPORTERS[config.export].files(config.build.strategy) if config.export else {}
        self._kind = preferences(jsonl=config.output.jsonl, files=files)

    def fingerprint(self, kept_types: Mapping[str, str]) -> dict[str, Any]:
        return fingerprint(self.config, kept_types, self._benchmarks)

    def fixed(self) -> frozenset[str]:
        return fixed(self.config)

    def planned(self, limit: int | None) -> Plan:
        plan = super().planned(limit)
        if plan.num_units:
            refuse_unknown(self.source, self.config.build)
        return plan

    def told(self, plan: Plan) -> dict[str, Any]:
        return {"columns": output_columns(self.config, plan.kept_types), "notes": self.source.notes()}

    def despite(self, plan: Plan) -> str | None:
        return "these parts of the corpus cannot be read as the others can"

    def connect(self) -> None:
        join_or_start(self.config.site.ray_address, self.config.run.num_workers)

    def make(self, plan: Plan, run: int, made_of: str) -> None:
        report.print_benchmarks(self.config)
        build_all(self.config, Builder(self.config, self.source, self.output, self._benchmarks, run, made_of), plan)

    def publish(self, plan: Plan) -> Published:
        return publish(self.output, self.config.output, self._kind)

    def print_dry_run(self, plan: Plan) -> None:
        report.print_dry_run(self.config, plan)

    def print_summary(self, plan: Plan, published: Published) -> None:
        report.print_summary(self.output, published, jsonl=self.config.output.jsonl)
