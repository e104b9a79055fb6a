"""Shards, answers and commits made up for tests: what the stages between reading and committing would have done."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from actors.contract import ALIGNED_LIST, PROBLEM, RESPONSES, unpack, with_columns
from pipelines.corpus import schema
from pipelines.corpus.commit import Committer, write_unit
from pipelines.corpus.plan import Plan, make_plan
from pipelines.corpus.read import Span, read_spans
from pipelines.corpus.shards import Input, InputConfig, Listed, Shard, shard_record
from pipelines.corpus.state import read_state
from pipelines.corpus.storage import Storage
from pipelines.corpus.units import Unit

Row = tuple[str, int]
"""(shard path, row): what identifies an input row in the corpus."""


# --- shards ---------------------------------------------------------------------------------------------------------


def write_shard(path: Path, table: pa.Table | int, row_group_size: int | None = None, **options: Any) -> Path:
    """A Parquet shard; an int stands for that many well prompts."""
    if isinstance(table, int):
        table = pa.table({"prompt": [f"{path.stem} prompt {row}" for row in range(table)]})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size or max(1, table.num_rows), **options)
    return path


def only_shard(source: Input, config: InputConfig) -> Shard:
    shards, bad, _ = source.footers(source.listing(), config, {})
    assert not bad, bad
    (shard,) = shards
    return shard


def whole_groups(shard: Shard) -> list[Span]:
    """Every row group of a shard as a span of one unit."""
    spans, first = [], 0
    for group, num_rows in enumerate(shard.row_groups):
        if num_rows:
            spans.append(Span(shard, group, (Unit(shard.key, first, first + num_rows),)))
        first += num_rows
    return spans


# --- the job, without models ----------------------------------------------------------------------------------------


def answer(packed: pa.Table, version: str = "v1", fails: Callable[[str], str | None] = lambda prompt: None) -> pa.Table:
    """The packed unit with responses and aligned texts; a prompt for which `fails` names a cause gets that problem."""
    unit = unpack(packed)
    responses: list[Any] = []
    aligned: list[Any] = []
    problems: list[Any] = []
    for prompt, problem in zip(unit["prompt"].to_pylist(), unit["problem"].to_pylist(), strict=True):
        cause = None if problem else fails(prompt[-1]["content"])
        if cause:
            problem = {
                "stage": "policy", "cause": cause, "error_class": "RowError", "message": f"{cause}!", "attempts": 2
            }  # fmt: skip
        problems.append(problem)
        if problem:
            responses.append(None)
            aligned.append(None)
            continue
        response = _response(f"{version}: {prompt[-1]['content']}")
        responses.append([response])
        aligned.append([{**response, "text": f"better {response['text']}", "changed": True}])
    columns = {"responses": pa.array(responses, RESPONSES), "aligned": pa.array(aligned, ALIGNED_LIST)}
    return with_columns(packed, {**columns, "problem": pa.array(problems, PROBLEM)})


def _response(text: str) -> dict[str, Any]:
    return {
        "text": text, "reasoning": None, "model": "fabricated", "status": "ok", "error": None, "finish_reason": "stop",
        "num_prompt_tokens": 3, "num_tokens": 4, "seed": 5,
    }  # fmt: skip


def plan_of(
    source: Input, config: InputConfig, output: Storage, *, unit_rows: int = 4, limit: int | None = None, **more: Any
) -> Plan:
    return make_plan(source, config, output, read_state(output), unit_rows=unit_rows, limit=limit, **more)


def run_plan(
    plan: Plan,
    source: Input,
    config: InputConfig,
    output: Storage,
    *,
    version: str = "v1",
    fails: Callable[[str], str | None] = lambda prompt: None,
    run: int = 1,
) -> list[bool]:
    """Read, answer and commit every unit of a plan; whether each commit won."""
    committer = Committer(output, source, tuple(config.keep_columns), run=run, fingerprint="f" * 16)
    packed = [answer(unit, version, fails) for unit in read_spans(source, config, list(plan.spans))]
    return [committer(unit)["won"][0].as_py() for unit in packed]


# --- units without a shard ------------------------------------------------------------------------------------------


def fake_shard(path: str = "prompts.parquet", row_groups: Iterable[int] = (12,)) -> Shard:
    """A shard version that is only talked about."""
    return Shard(Listed(path, 1, "tag"), hashlib.sha256(path.encode()).hexdigest()[:12], tuple(row_groups))


def unit_table(
    shard: Shard, unit: Unit, quarantined: Iterable[int] = (), version: str = "v1", cause: str = "engine_crash"
) -> pa.Table:
    """A unit file's rows; `quarantined` are rows of the shard."""
    bad = set(quarantined)
    rows = []
    for row in range(unit.start, unit.stop):
        response = _response(f"{version} of {row}")
        problem = {"stage": "policy", "cause": cause, "error_class": "E", "message": "gone", "attempts": 3}
        rows.append(
            {
                "prompt_id": f"{shard.listed.path}#{row}",
                "prompt": [{"role": "user", "content": f"prompt {row}"}],
                "responses": None if row in bad else [response],
                "aligned": None if row in bad else [{**response, "changed": False}],
                "source": {"shard": shard.listed.path, "row_group": 0, "row": row},
                "status": "quarantined" if row in bad else "ok",
                "problem": problem if row in bad else None,
                "input": json.dumps({"prompt": f"prompt {row}"}) if row in bad else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=schema.UNIT)


def commit_unit(
    output: Storage,
    shard: Shard,
    unit: Unit,
    quarantined: Iterable[int] = (),
    version: str = "v1",
    cause: str = "engine_crash",
    *,
    run: int = 1,
    fingerprint: str = "f" * 16,
) -> bool:
    """Commit a made-up unit as `Committer` would."""
    table = unit_table(shard, unit, quarantined, version, cause)
    causes = Counter(problem["cause"] for problem in table["problem"].to_pylist() if problem)
    facts = {
        "unit": unit.name, "shard": shard_record(shard), "num_rows": unit.num_rows, "causes": dict(causes),
        "num_quarantined": sum(causes.values()), "run": run, "fingerprint": fingerprint, "nonce": f"{version}",
    }  # fmt: skip
    return write_unit(output, unit, table, facts)


def commit_units(output: Storage, shard: Shard, unit_rows: int = 4, quarantined: Iterable[int] = ()) -> list[Unit]:
    """Commit a whole made-up shard."""
    units, first = [], 0
    for num_rows in shard.row_groups:
        for start in range(first, first + num_rows, unit_rows):
            units.append(Unit(shard.key, start, min(start + unit_rows, first + num_rows)))
        first += num_rows
    for unit in units:
        assert commit_unit(output, shard, unit, [row for row in quarantined if unit.start <= row < unit.stop])
    return units


def rows_of(*shards: Shard) -> list[Row]:
    return [(shard.listed.path, row) for shard in shards for row in range(shard.num_rows)]


# --- what is published ----------------------------------------------------------------------------------------------


def read_rows_of(output: Storage, path: str) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(output.read(path)), page_checksum_verification=True).read()


def sources(table: pa.Table) -> list[Row]:
    return [(where["shard"], where["row"]) for where in table["source"].to_pylist()]


def manifests_of(output: Storage) -> list[dict[str, Any]]:
    """The manifests of finished partitions, which must be numbered 1, 2, … and all be finished."""
    names = output.folders("corpus")
    assert names == [f"run={number:06d}" for number in range(1, len(names) + 1)]
    assert all(output.exists(f"corpus/{name}/_SUCCESS") for name in names)
    return [json.loads(output.read(f"corpus/{name}/manifest.json")) for name in names]


def card_header(output: Storage) -> dict[str, Any]:
    _, header, _ = output.read("README.md").decode().split("---\n", 2)
    parsed: dict[str, Any] = yaml.safe_load(header)
    return parsed


def check_published(output: Storage) -> tuple[list[Row], list[Row]]:
    """(ok rows, quarantined rows) of the whole corpus, after checking that manifests, files and card say the same."""
    ok: list[Row] = []
    quarantined: list[Row] = []
    listed: dict[str, list[str]] = {"corpus": [], "quarantine": []}
    for manifest in manifests_of(output):
        counts = {}
        causes: Counter[str] = Counter()
        for kind, rows in (("corpus", ok), ("quarantine", quarantined)):
            folder = f"{kind}/run={manifest['number']:06d}"
            names = [name for name in output.sizes(folder) if name.endswith(".parquet")]
            assert [part["path"] for part in manifest[kind]] == [f"{folder}/{name}" for name in names]
            counts[kind] = 0
            for part in manifest[kind]:
                data = output.read(part["path"])
                table = read_rows_of(output, part["path"])
                assert (len(data), hashlib.sha256(data).hexdigest()) == (part["num_bytes"], part["sha256"])
                assert table.num_rows == part["num_rows"]
                assert table.column_names[: len(schema.CORPUS.names)] == (
                    schema.CORPUS.names if kind == "corpus" else schema.QUARANTINE.names[: len(schema.CORPUS.names)]
                )
                counts[kind] += table.num_rows
                rows += sources(table)
                listed[kind].append(part["path"])
                if kind == "quarantine":
                    causes.update(table["cause"].to_pylist())
        assert (manifest["num_ok"], manifest["num_quarantined"]) == (counts["corpus"], counts["quarantine"])
        assert manifest["num_rows"] == sum(counts.values())
        assert manifest["causes"] == dict(causes)
        assert manifest["num_rows"] == sum(stop - start for each in manifest["rows"] for start, stop in each["ranges"])
    if listed["corpus"] or listed["quarantine"]:
        configs = {config["config_name"]: config["data_files"] for config in card_header(output)["configs"]}
        assert configs.get("default", []) == listed["corpus"]
        assert configs.get("quarantine", []) == listed["quarantine"]
    return ok, quarantined


def check_exactly_once(output: Storage, expected: list[Row], *, num_units_left: int | None = 0) -> None:
    """Rows in = ok + quarantined, each exactly once."""
    ok, quarantined = check_published(output)
    assert Counter(ok + quarantined) == Counter(expected)
    if num_units_left is not None:
        assert len(output.sizes("units")) == num_units_left
