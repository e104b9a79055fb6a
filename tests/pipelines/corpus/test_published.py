"""A published corpus as input: its finished partitions alone, each part once, every column as it was."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.contract import REWARDS, ConfigError, unpack, with_columns
from pipelines.corpus import schema
from pipelines.corpus.commit import Committer
from pipelines.corpus.means import mean_rewards
from pipelines.corpus.plan import Plan
from pipelines.corpus.publish import OutputConfig, publish
from pipelines.corpus.published import CorpusConfig, CorpusInput
from pipelines.corpus.read import read_spans
from pipelines.corpus.shards import Input, InputConfig
from pipelines.corpus.storage import Storage
from tests.pipelines.corpus.fabricate import (
    check_exactly_once,
    manifests_of,
    plan_of,
    read_rows_of,
    run_plan,
    write_shard,
)

OUT = OutputConfig(root="out")
ALL = CorpusConfig(path="corpus")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return tmp_path / "prompts"


@pytest.fixture
def corpus(output: Storage) -> Storage:
    return output


@pytest.fixture
def scored(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "scored"))


def night(prompts: Path, corpus: Storage, number: int, keep: list[str] | None = None, num_rows: int = 6) -> None:
    """Align and publish one shard, the third row of which is quarantined."""
    columns = {"prompt": [f"prompt {number}.{row}" for row in range(num_rows)], "topic": [f"t{number}"] * num_rows}
    write_shard(prompts / f"night-{number}.parquet", pa.table(columns | {"size": list(range(num_rows))}), 4)
    source = Input(str(prompts))
    config = InputConfig(path=str(prompts), keep_columns=["topic"] if keep is None else keep)
    plan = plan_of(source, config, corpus, unit_rows=2)
    fails = lambda prompt: "engine_crash" if prompt.endswith(".2") else None  # noqa: E731
    run_plan(plan, source, config, corpus, fails=fails, run=number)
    assert publish(corpus, OUT).partitions == (number,)


def open_corpus(corpus: Storage) -> CorpusInput:
    return CorpusInput(corpus.url, corpus.fs.raw.storage_options if not corpus.is_local else None)


def plan_scores(corpus: Storage, scored: Storage, **more: Any) -> tuple[CorpusInput, CorpusConfig, Plan]:
    source = open_corpus(corpus)
    config = replace(ALL, keep_columns=source.kept_columns(ALL.keep_columns))
    return source, config, plan_of(source, config, scored, unit_rows=2, **more)  # type: ignore[arg-type]


def score(corpus: Storage, scored: Storage, **more: Any) -> int:
    """Score what is not scored, by the length of the prompt; rows that were."""
    source, config, plan = plan_scores(corpus, scored, **more)
    committer = Committer(scored, source, tuple(config.keep_columns), run=1, fingerprint="s" * 16)
    for packed in read_spans(source, config, list(plan.spans)):
        unit = unpack(packed)
        rewards = [
            [*(before or []), {"name": "r", "response": [1.0], "aligned": [float(len(prompt[-1]["content"]))]}]
            if prompt
            else None
            for prompt, before in zip(unit["prompt"].to_pylist(), unit["rewards"].to_pylist(), strict=True)
        ]
        committer(with_columns(packed, {"rewards": pa.array(rewards, REWARDS)}))
    return plan.num_rows


def rows(output: Storage) -> list[dict[str, Any]]:
    return [row for each in manifests_of(output) for part in each["corpus"] for row in table(output, part["path"])]


def table(output: Storage, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_rows_of(output, path).to_pylist()
    return found


def test_a_scored_corpus_has_the_same_rows_and_columns_and_its_rewards(
    prompts: Path, corpus: Storage, scored: Storage
) -> None:
    night(prompts, corpus, 1)
    assert score(corpus, scored) == 5
    publish(scored, OUT)
    before, after = rows(corpus), rows(scored)
    assert [{**row, "rewards": None} for row in after] == before
    assert [row["source"]["row"] for row in after] == [0, 1, 3, 4, 5], "where the prompts were, not where the corpus is"
    assert after[0]["rewards"] == [{"name": "r", "response": [1.0], "aligned": [10.0]}]
    assert manifests_of(scored)[0]["rewards"] == {"r": {"num_candidates": 5, "response": 1.0, "aligned": 10.0}}


def test_a_scored_corpus_can_be_scored_by_more(
    prompts: Path, local_output: Storage, scored: Storage, tmp_path: Path
) -> None:
    night(prompts, local_output, 1)
    score(local_output, scored)
    publish(scored, OUT)
    more = Storage(str(tmp_path / "more"))
    assert score(scored, more) == 5
    publish(more, OUT)
    assert [len(row["rewards"]) for row in rows(more)] == [2] * 5
    assert [row["source"] for row in rows(more)] == [row["source"] for row in rows(local_output)]


def test_a_users_own_column_called_rewards_is_not_taken_for_ours() -> None:
    columns = pa.schema([*schema.CORPUS.remove(schema.CORPUS.get_field_index("rewards")), ("rewards", pa.float64())])
    assert str(ALL.refusal(columns, {})).startswith("wrong_type: 'rewards' is double")


def test_every_night_scores_the_new_partitions_alone(prompts: Path, corpus: Storage, scored: Storage) -> None:
    night(prompts, corpus, 1)
    score(corpus, scored)
    publish(scored, OUT)
    assert score(corpus, scored) == 0
    night(prompts, corpus, 2)
    _, _, plan = plan_scores(corpus, scored)
    assert (plan.num_shards, plan.num_finished, plan.num_rows) == (2, 1, 5)
    score(corpus, scored)
    publish(scored, OUT)
    assert [row["prompt_id"] for row in rows(scored)] == [row["prompt_id"] for row in rows(corpus)]


def test_an_interrupted_scoring_goes_on_where_it_was(prompts: Path, corpus: Storage, scored: Storage) -> None:
    night(prompts, corpus, 1)
    assert score(corpus, scored, limit=1) == 2
    before = scored.sizes("units")
    assert score(corpus, scored) == 3
    assert before.items() <= scored.sizes("units").items()
    publish(scored, OUT)
    assert len(rows(scored)) == 5


def test_a_partition_without_success_is_not_there_yet(prompts: Path, corpus: Storage, scored: Storage) -> None:
    night(prompts, corpus, 1)
    night(prompts, corpus, 2)
    corpus.delete(["corpus/run=000002/_SUCCESS"])
    assert [listed.path for listed in open_corpus(corpus).listing()] == ["corpus/run=000001/part-00000.parquet"]
    corpus.delete(["corpus/run=000001/_SUCCESS"])
    with pytest.raises(ConfigError, match="holds no published partition"):
        open_corpus(corpus).listing()


def test_what_is_no_corpus_is_refused_by_what_it_is(
    prompts: Path, local_output: Storage, scored: Storage, tmp_path: Path
) -> None:
    night(prompts, local_output, 1)
    scored.create("preferences/run=000001/plan.json", b"{}")
    (tmp_path / "empty").mkdir()
    root = local_output.url
    for path, told in {
        str(tmp_path / "nowhere"): "does not exist",
        str(tmp_path / "empty"): "holds no corpus: name the output.root of align_corpus.py or score_corpus.py",
        str(prompts): "holds Parquet files, but no corpus: align_corpus.py makes one of prompts",
        str(prompts / "night-1.parquet"): "is a file, or lies below one: name a folder",
        f"{root}/corpus": f"lies inside a corpus: name its root, input.path={root}",
        f"{root}/corpus/run=000001/": f"lies inside a corpus: name its root, input.path={root}",
        scored.url: "holds a preference dataset, no corpus: name the corpus that it was built from",
    }.items():
        with pytest.raises(ConfigError) as refused:
            CorpusInput(path).kept_columns(["*"])
        assert told in str(refused.value)


def test_columns_that_differ_between_partitions_must_be_named(prompts: Path, corpus: Storage, scored: Storage) -> None:
    night(prompts, corpus, 1)
    night(prompts, corpus, 2, keep=["size", "topic"])
    with pytest.raises(ConfigError, match=r"run=000001: topic; run=000002: size, topic.*input.keep_columns"):
        open_corpus(corpus).kept_columns(["*"])
    source = open_corpus(corpus)
    named = CorpusConfig(path="corpus", keep_columns=["topic"])
    assert source.kept_columns(["topic"]) == ["topic"]
    shards, bad, types = source.footers(source.listing(), named, {})
    assert (len(shards), bad, types) == (2, [], {"topic": "string"})
    _, (missing,), _ = source.footers(source.listing(), CorpusConfig(path="corpus", keep_columns=["size"]), {})
    assert missing.path.startswith("corpus/run=000001/") and missing.missing == "size"


def test_a_corpus_from_before_there_were_rewards_can_be_scored(
    prompts: Path, local_output: Storage, scored: Storage
) -> None:
    night(prompts, local_output, 1)
    folder = Path(local_output.url) / "corpus" / "run=000001"
    part, manifest = folder / "part-00000.parquet", json.loads((folder / "manifest.json").read_bytes())
    sink = io.BytesIO()
    pq.write_table(pq.ParquetFile(part).read().drop_columns(["rewards"]), sink)
    part.write_bytes(sink.getvalue())
    record = {"num_bytes": len(sink.getvalue()), "sha256": hashlib.sha256(sink.getvalue()).hexdigest()}
    manifest["corpus"][0] |= record
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert score(local_output, scored) == 5
    publish(scored, OUT)
    assert all(len(row["rewards"]) == 1 for row in rows(scored))


def test_damaged_rows_of_a_corpus_are_quarantined_and_the_others_scored(
    prompts: Path, local_output: Storage, scored: Storage
) -> None:
    night(prompts, local_output, 1)
    (listed,) = open_corpus(local_output).listing()
    path = Path(local_output.url) / listed.path
    metadata = pq.read_metadata(path).row_group(0)
    start = metadata.column(0).dictionary_page_offset or metadata.column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    assert score(local_output, scored) == 5
    publish(scored, OUT)
    check_exactly_once(scored, [(listed.path, row) for row in range(5)])
    assert manifests_of(scored)[0]["causes"] == {"unreadable_row_group": 5}


def test_the_corpus_itself_is_no_output(prompts: Path, local_output: Storage) -> None:
    night(prompts, local_output, 1)
    with pytest.raises(ConfigError, match="take another"):
        open_corpus(local_output).refuse_own_output(Storage(f"{local_output.url}/"))


def test_means_are_over_candidates_that_have_both_scores(local_output: Storage) -> None:
    rewards: list[Any] = [
        None,
        [
            {"name": "a", "response": [1.0, 3.0, None], "aligned": [2.0, 6.0, 100.0]},
            {"name": "b", "response": [None], "aligned": [1.0]},
        ],
        [{"name": "a", "response": [5.0], "aligned": [1.0]}],
    ]

    def write(path: Path) -> None:
        pq.write_table(pa.table({"rewards": pa.array(rewards, REWARDS)}), path)

    local_output.create_file("part.parquet", write)
    assert mean_rewards(local_output, [{"path": "part.parquet"}]) == {
        "a": {"num_candidates": 3, "response": 3.0, "aligned": 3.0}
    }
