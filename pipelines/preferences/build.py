"""Building a unit: corpus rows to ranked candidates, to the rows of a strategy, to those of a trainer, committed."""

import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actors.contract import ConfigError
from pipelines.corpus.commit import write_unit
from pipelines.corpus.read import Span, Unreadable, read_rows
from pipelines.corpus.schema import SOURCE
from pipelines.corpus.shards import shard_record
from pipelines.corpus.storage import Storage
from pipelines.corpus.units import Unit
from pipelines.preferences import checks, schema
from pipelines.preferences.arrow import whole
from pipelines.preferences.exporters import EXPORTERS
from pipelines.preferences.exporters.columns import ROLE, lists, message
from pipelines.preferences.filters import benchmarks_of, prompt_keys, prompt_texts, split_of
from pipelines.preferences.picks import Made, candidates
from pipelines.preferences.ranked import Ints, rank
from pipelines.preferences.semantic import semantic_weights
from pipelines.preferences.settings import BuildPreferencesConfig
from pipelines.preferences.source import COLUMNS, PublishedCorpus, partition_of
from pipelines.preferences.strategies import STRATEGIES


@dataclass(frozen=True)
class Builder:
    """Builds and commits units. Everything it needs travels with it, so that any node can build.

    Attributes:
        source: the corpus.
        output: the output root.
        benchmarks: digest of the benchmark files, which each process reads for itself; None where there are none.
        run: number of the run record.
        fingerprint: digest of the run's fingerprint.
    """

    config: BuildPreferencesConfig
    source: PublishedCorpus
    output: Storage
    benchmarks: str | None
    run: int
    fingerprint: str

    def build_spans(self, spans: list[Span], duplicates: Mapping[str, Ints]) -> Iterator[pa.Table]:
        """Build every unit of the spans. Yields a row for each: done (its name), rows (prompts in), dropped, made
        (rows out).

        Args:
            duplicates: by unit name, which of its prompts are not the first of the corpus, counted from its first row.
        """
        columns = [*COLUMNS, *self.config.input.keep_columns]
        for span in spans:
            for unit, rows in read_rows(self.source, columns, span):
                if isinstance(rows, Unreadable):
                    raise ConfigError(f"{span.shard.listed.path} is damaged ({rows.message}); restore it and run again")
                yield self.build(unit, span, rows, duplicates.get(unit.name, np.empty(0, np.int64)))

    def build(self, unit: Unit, span: Span, rows: pa.Table, duplicates: Ints) -> pa.Table:
        """Build and commit one unit."""
        table, facts = self.made(unit, span, rows, duplicates)
        facts |= {
            "unit": unit.name, "shard": shard_record(span.shard), "num_rows": unit.num_rows, "run": self.run,
            "fingerprint": self.fingerprint, "committed_at": time.time(), "by": f"{socket.gethostname()}:{os.getpid()}",
            "nonce": os.urandom(8).hex(),
        }  # fmt: skip
        write_unit(self.output, unit, table, facts)
        num_made = sum(facts["made"].values())
        told = {"done": named(span, unit), "rows": unit.num_rows, "dropped": facts["num_quarantined"], "made": num_made}
        return pa.Table.from_pylist([told])

    def made(self, unit: Unit, span: Span, rows: pa.Table, duplicates: Ints) -> tuple[pa.Table, dict[str, Any]]:
        """The unit file's table, one row per prompt with a list of what was made of it, and what it counts."""
        build, keep = self.config.build, self.config.input.keep_columns
        texts = prompt_texts(rows["prompt"])
        split = split_of(prompt_keys(texts), self.config.prompts, build.seed)
        causes = np.full(rows.num_rows, "", object)
        benchmarks = benchmarks_of(self.config.prompts, self.config.site.storage_options)
        if benchmarks is not None:
            if benchmarks.digest != self.benchmarks:
                raise ConfigError(
                    "prompts.decontaminate: the files differ from node to node; put them on shared storage"
                )
            causes[benchmarks.touched(rows["prompt"])] = "contaminated"
        causes[duplicates] = "duplicate_prompt"
        used = np.flatnonzero(causes == "")
        ranked = rank(rows.take(pa.array(used)), partition_of(span.shard.listed.path), build, keep)
        made = STRATEGIES[build.strategy](ranked.table, build)
        causes[used] = np.where(ranked.causes != "", ranked.causes, made.causes)
        dataset = _dataset(ranked.table, made, split.take(pa.array(used)), self.config)
        found = candidates(ranked.table)
        export = self.config.export
        exported = EXPORTERS[export].convert(dataset) if export else dataset.drop_columns(["split"])
        lists = _nested(exported, used[made.row], rows.num_rows)
        dropped = Counter(causes[causes != ""].tolist())
        made_by_split = {each["values"]: each["counts"] for each in dataset["split"].value_counts().to_pylist()}
        facts = {
            "num_quarantined": dropped.total(), "causes": dict(dropped), "made": made_by_split,
            "unused": dict(ranked.unused), "num_candidates": len(found.values), "models": models(dataset),
            "checks": checks.facts(build.strategy, dataset, found, made, build.seed),
        }  # fmt: skip
        return _unit_table(rows, span, unit, split, causes, lists), facts


def named(span: Span, unit: Unit) -> str:
    """A unit as a person finds it: the part, and rows of it."""
    return f"{span.shard.listed.path} rows {unit.start} to {unit.stop}"


def _dataset(ranked: pa.Table, made: Made, split: pa.Array, config: BuildPreferencesConfig) -> pa.Table:
    """What a strategy made, with the columns that all strategies have in common; as `schema.STRATEGIES`."""
    row = pa.array(made.row)
    columns = {"prompt_id": ranked["prompt_id"].take(row), "prompt": ranked["prompt"].take(row), **made.columns}
    columns |= {"split": split.take(row), "partition": ranked["partition"].take(row)}
    build, weighed = config.build, schema.WEIGHED.get(config.build.strategy)
    if build.semantic_encoder is not None and weighed is not None:
        columns["weight"] = semantic_weights(
            build.semantic_encoder, columns["prompt"], columns[weighed], build.semantic_alpha
        )
    elif weighed is not None:
        columns["weight"] = pa.repeat(1.0, len(row))
    if build.system_prompt:
        columns["prompt"] = _after_system(whole(columns["prompt"]), build.system_prompt)
    kept = config.input.keep_columns
    columns |= {name: ranked[name].take(row) for name in kept}
    wanted = schema.STRATEGIES[build.strategy]
    order = [*wanted.names, *kept]
    return pa.table({name: columns[name] for name in order}).cast(
        pa.schema([*wanted, *(ranked.schema.field(name) for name in kept)])
    )


def _after_system(prompts: pa.ListArray, text: str) -> pa.ListArray:
    """Each chat, with a system message before it where it begins with none."""
    turns, counts = prompts.flatten(), np.asarray(prompts.value_lengths(), np.int32)
    starts = np.cumsum(counts) - counts
    lacks = np.asarray(pc.not_equal(pc.struct_field(turns, ROLE).take(pa.array(starts)), "system"))
    order = np.insert(np.arange(len(turns)), starts[lacks], len(turns))
    told = pa.concat_arrays([turns, message(pa.array([text]), "system")])
    return lists(counts + lacks, told.take(pa.array(order)))


def models(made: pa.Table) -> dict[str, dict[str, int]]:
    """How many texts are each model's, by the column that names models."""
    columns = {name: whole(made[name]) for name in schema.MODELS if name in made.column_names}
    flat = {name: column.flatten() if pa.types.is_list(column.type) else column for name, column in columns.items()}
    return {name: dict(Counter(column.to_pylist())) for name, column in flat.items()}


def output_columns(config: BuildPreferencesConfig, kept_types: Mapping[str, str]) -> dict[str, str]:
    """The columns of the dataset's parts and their types."""
    made = schema.STRATEGIES[config.build.strategy].empty_table()
    made = EXPORTERS[config.export].convert(made) if config.export else made.drop_columns(["split"])
    return {**{field.name: str(field.type) for field in made.schema}, **kept_types}


def _nested(table: pa.Table, row: npt.NDArray[np.int64], num_rows: int) -> pa.ListArray:
    """The table's rows as a list of structs for each of `num_rows` rows; `row` (ascending) says for which."""
    offsets = np.searchsorted(row, np.arange(num_rows + 1)).astype(np.int32)
    columns = [whole(column) for column in table.columns]
    structs = pa.StructArray.from_arrays(columns, fields=list(table.schema.remove_metadata()))
    return pa.ListArray.from_arrays(pa.array(offsets), structs)


def _unit_table(
    rows: pa.Table, span: Span, unit: Unit, split: pa.Array, causes: npt.NDArray[np.object_], lists: pa.ListArray
) -> pa.Table:
    num_rows = rows.num_rows
    source = pa.StructArray.from_arrays(
        [
            pa.repeat(span.shard.listed.path, num_rows),
            pa.repeat(pa.scalar(span.row_group, pa.int32()), num_rows),
            pa.array(range(unit.start, unit.stop), pa.int64()),
        ],
        fields=list(SOURCE),
    )
    return pa.table(
        {
            "prompt_id": rows["prompt_id"],
            "source": source,
            "status": pa.array(np.where(causes == "", "ok", "dropped")),
            "cause": pa.array(causes, pa.string()),
            "split": split,
            "made": lists,
        }
    )
