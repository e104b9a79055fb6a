"""The job in one process, without Ray: what is built once, what resumes, what is refused, and what is published."""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import job as every_job
from pipelines.build_preferences import main
from pipelines.corpus.plan import Plan
from pipelines.corpus.storage import Storage
from pipelines.preferences import schema
from pipelines.preferences.build import Builder
from pipelines.preferences.picks import Made
from pipelines.preferences.settings import BuildConfig
from pipelines.preferences.strategies import STRATEGIES
from pipelines.preferences.strategies.pairs import pairs
from tests.pipelines.preferences import examples
from tests.pipelines.preferences.fabricate import Row, candidate, damage, publish_corpus, row, table

pytestmark = pytest.mark.usefixtures("in_this_process")


def rows(first: int = 0, count: int = 40) -> list[Row]:
    return [
        row(
            f"Tell me of number {number}.", [f"It is {number}."], [f"It is {number}, which is nice."],
            q=([number % 5], [number % 3 + 2]),
        )
        for number in range(first, first + count)
    ]  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    some = rows()
    return publish_corpus(tmp_path / "corpus", table(some[:20]), table(some[20:]), row_group_size=8)


def job(corpus: Path, root: Path | str, *more: str) -> list[str]:
    return [f"input.path={corpus}", f"output.root={root}", "build.reward=q", "run.unit_rows=4", *more]


def manifests(root: Path) -> list[dict[str, Any]]:
    found = sorted(root.glob("preferences/run=*/_SUCCESS"))
    return [json.loads((path.parent / "manifest.json").read_text()) for path in found]


def published(root: Path, split: str = "") -> list[Row]:
    """The rows of every published part whose name begins so, checked against the manifest."""
    made: list[Row] = []
    for manifest in manifests(root):
        num_rows = 0
        for part in manifest["preferences"]:
            path = root / part["path"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == part["sha256"]
            found = pq.read_table(path, partitioning=None).to_pylist()
            num_rows += len(found)
            made += found if path.name.startswith(split) else []
        dropped = sum(pq.read_metadata(root / part["path"]).num_rows for part in manifest["dropped"])
        assert num_rows == manifest["num_made"] == sum(manifest["made"].values())
        assert manifest["num_rows"] == manifest["num_ok"] + manifest["num_quarantined"]
        assert dropped == manifest["num_quarantined"] == sum(manifest["causes"].values())
    return made


def test_every_prompt_is_built_or_dropped_with_its_cause(corpus: Path, tmp_path: Path) -> None:
    assert main(job(corpus, tmp_path / "out")) == 0
    (manifest,) = manifests(tmp_path / "out")
    lost = sum(number % 3 + 2 < number % 5 for number in range(40))
    tied = sum(number % 3 + 2 == number % 5 for number in range(40))
    assert manifest["causes"] == {"aligned_lost": lost, "tie": tied}
    made = published(tmp_path / "out")
    assert [each["prompt"][0]["content"] for each in made] == [
        f"Tell me of number {number}." for number in range(40) if number % 3 + 2 > number % 5
    ]
    assert made[0].keys() == set(schema.STRATEGIES["pairs"].names) - {"split"}
    dropped = pq.read_table(tmp_path / "out" / manifest["dropped"][0]["path"], partitioning=None).to_pylist()
    assert (dropped[0]["shard"], dropped[0]["row"]) == ("corpus/run=000001/part-00000.parquet", 3)
    assert [each["cause"] for each in dropped[:3]] == ["aligned_lost", "aligned_lost", "aligned_lost"]
    assert not list((tmp_path / "out/units").iterdir())


def test_an_answer_that_was_cut_is_not_chosen_however_good_it_looks(tmp_path: Path) -> None:
    cut = candidate("The best of all, but", finish_reason="length")
    failed = candidate("Half of", status="failed", error="engine_crash: it died", finish_reason=None)
    asked = row("p", [cut, "Good.", "Bad."], [failed, "Better.", "Worse."], q=([9, 2, 1], [None, 3, 0]))
    corpus = publish_corpus(tmp_path / "corpus", table([asked]))
    chosen = {}
    for name, more in {"default": [], "any": ["build.require_finish=[]"]}.items():
        assert main(job(corpus, tmp_path / name, "build.prefer=best_worst", *more)) == 0
        (made,) = published(tmp_path / name)
        (manifest,) = manifests(tmp_path / name)
        chosen[name] = (made["chosen"], made["rejected"], manifest["unused"])
    assert chosen == {
        "default": ("Better.", "Worse.", {"unfinished": 1, "failed": 1}),
        "any": ("The best of all, but", "Worse.", {"failed": 1}),
    }


@pytest.mark.parametrize("where", ["local", "s3"])
def test_only_new_partitions_are_built_and_prompts_of_old_ones_are_known(
    where: str, corpus: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    more: list[str] = []
    root = str(tmp_path / "out")
    if where == "s3":
        endpoint = request.getfixturevalue("s3_endpoint")
        root, more = f"s3://testbucket/{tmp_path.name}/out", [f"site.storage_options={{endpoint_url: '{endpoint}'}}"]
    if where == "s3":
        store = Storage(f"s3://testbucket/{tmp_path.name}/corpus", {"endpoint_url": endpoint})
        for path in sorted(corpus.rglob("*")):
            if path.is_file():
                store.put(str(path.relative_to(corpus)), path.read_bytes())
    given = job(Path("corpus"), root, *more)
    given[0] = f"input.path={store.url if where == 's3' else corpus}"
    assert main(given) == 0
    publish_corpus(corpus, table([*rows(38, 4), *rows(38, 4)]), number=2)
    if where == "s3":
        for path in sorted((corpus / "corpus/run=000002").iterdir()):
            store.put(str(path.relative_to(corpus)), path.read_bytes())
    output = Storage(root, {"endpoint_url": endpoint} if where == "s3" else {}, partitions="preferences")
    before = {name: output.sizes(f"preferences/{name}") for name in output.folders("preferences")}
    assert main(given) == 0
    assert main(given) == 0
    assert {name: output.sizes(f"preferences/{name}") for name in before} == before
    assert output.folders("preferences") == ["run=000001", "run=000002"]
    manifest = json.loads(output.read("preferences/run=000002/manifest.json"))
    assert manifest["num_rows"] == 8
    assert manifest["causes"]["duplicate_prompt"] == 6, "two of run 1, and four of its own"


@pytest.mark.parametrize("keep", ["[topic, score]", '["*"]'])
def test_kept_columns_go_along_whatever_they_hold(keep: str, tmp_path: Path) -> None:
    some = table(rows(count=3), topic=["", None, "c"], score=[float("nan"), 1.0, 2.0])
    corpus = publish_corpus(tmp_path / "corpus", some)
    assert main(job(corpus, tmp_path / "out", f"input.keep_columns={keep}", "build=unpaired")) == 0
    made = published(tmp_path / "out")
    assert np.isnan(made[0]["score"])
    assert [(each["prompt"][0]["content"][-2], each["topic"]) for each in made] == [
        ("0", ""), ("0", ""), ("1", None), ("1", None), ("2", "c"), ("2", "c")
    ]  # fmt: skip


def test_a_system_prompt_stands_before_the_prompts_that_have_none(tmp_path: Path) -> None:
    own = row([("system", "Be kind."), ("user", "Who?")], ["a"], ["b"], q=([1], [2]))
    turns = row([("user", "Who?"), ("assistant", "Me."), ("user", "Why?")], ["a"], ["b"], q=([1], [2]))
    corpus = publish_corpus(tmp_path / "corpus", table([own, turns, *rows(count=8)]))
    more = ["export=trl", "prompts.test_fraction=0.4"]
    made = {}
    for name, system in {"without": [], "with": ["build.system_prompt=Be brief."]}.items():
        assert main(job(corpus, tmp_path / name, *more, *system)) == 0
        made[name] = {split: published(tmp_path / name, split) for split in ("train", "test")}
    assert made["without"]["train"] and made["without"]["test"]
    brief = {"role": "system", "content": "Be brief."}
    assert made["with"] == {
        split: [
            {**each, "prompt": each["prompt"] if each["prompt"][0]["role"] == "system" else [brief, *each["prompt"]]}
            for each in found
        ]
        for split, found in made["without"].items()
    }
    prompts = [each["prompt"] for found in made["with"].values() for each in found]
    assert [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}] in prompts
    assert [brief, *turns["prompt"]] in prompts


def test_unpublished_partitions_are_not_read(corpus: Path, tmp_path: Path) -> None:
    publish_corpus(corpus, table(rows(100, 4)), number=2)
    (corpus / "corpus/run=000002/_SUCCESS").unlink()
    (corpus / "corpus/run=000001/part-99999.parquet").write_bytes(b"another writer's, in no manifest")
    assert main(job(corpus, tmp_path / "out")) == 0
    (manifest,) = manifests(tmp_path / "out")
    assert manifest["num_rows"] == 40


def test_a_job_that_dies_goes_on_where_it_was_and_makes_the_same_dataset(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["prompts.test_fraction=0.3", "build.prefer=best_random", "output.keep_units=true"]
    assert main(job(corpus, tmp_path / "whole", *more)) == 0
    build, done = Builder.build, []

    def dies(self: Builder, *arguments: Any) -> pa.Table:
        if len(done) == 4:
            raise RuntimeError("power is gone")
        done.append(arguments[0])
        return build(self, *arguments)

    monkeypatch.setattr(Builder, "build", dies)
    with pytest.raises(RuntimeError):
        main(job(corpus, tmp_path / "out", *more))
    assert len(list((tmp_path / "out/units").iterdir())) == 4
    assert not manifests(tmp_path / "out")
    assert main(job(corpus, tmp_path / "out", *more, "build.seed=1")) == 2, "units wait to be published"
    again = []
    monkeypatch.setattr(Builder, "build", lambda self, *given: again.append(given[0]) or build(self, *given))
    assert main(job(corpus, tmp_path / "out", *more, "run.unit_rows=3")) == 0
    assert not {(each.shard, each.start) for each in again} & {(each.shard, each.start) for each in done}
    assert published(tmp_path / "out") == published(tmp_path / "whole")


def test_another_config_is_refused_unless_it_is_for_what_is_new(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(job(corpus, tmp_path / "out")) == 0
    assert main(job(corpus, tmp_path / "out", "build.min_margin=1")) == 2
    assert "build.min_margin was 0.0 and is 1.0" in capsys.readouterr().err
    files = sorted((tmp_path / "out/preferences").rglob("*.*"))
    assert main(job(corpus, tmp_path / "out", "run.num_workers=7", "output.jsonl=true")) == 0
    assert "output.jsonl=true is for new partitions, and run=000001 has no JSON lines" in capsys.readouterr().err
    assert sorted((tmp_path / "out/preferences").rglob("*.*")) == files, "what is published stays as it is"
    publish_corpus(corpus, table(rows(40, 10)), number=2)
    new = ["build.min_margin=1", "run.accept_changes=true", "output.jsonl=true"]
    assert main(job(corpus, tmp_path / "out", *new)) == 0
    assert [path.parent.name for path in (tmp_path / "out/preferences").rglob("*.jsonl")] == ["run=000002"]
    capsys.readouterr()
    assert main(job(corpus, tmp_path / "out", *new[:2])) == 0
    assert "JSON lines" not in capsys.readouterr().err
    margins = [min(each["margin"] for each in published(tmp_path / "out") if each["partition"] == at) for at in (1, 2)]
    assert margins[1] >= 1


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("build.strategy=unpaired", "build.strategy was 'pairs' and is 'unpaired'. Rows made so do not go together"),
        ("export=trl", "export was None and is 'trl'. "),
        ("build.reward=r", "build.reward was 'q' and is 'r'. "),
        ("build.reward=null", "build.reward was 'q' and is None. "),
        ("input.keep_columns=[topic]", "input.keep_columns was [] and is ['topic']. "),
        ("prompts.test_fraction=0.5", "prompts.test_fraction was 0.3 and is 0.5. "),
        ("build.seed=1", "build.seed was 0 and is 1. "),
    ],
)
def test_what_decides_columns_rewards_and_splits_is_never_changed(
    more: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = [{**each, "rewards": [*each["rewards"], {**each["rewards"][0], "name": "r"}]} for each in rows()]
    corpus = publish_corpus(tmp_path / "corpus", table(some, topic=["a"] * len(some)))
    split = ["prompts.dedup=none", "prompts.test_fraction=0.3"]
    assert main(job(corpus, tmp_path / "out", *split)) == 0
    publish_corpus(corpus, table(some[:9], topic=["a"] * 9), number=2)
    for accept in ([], ["run.accept_changes=true"]):
        assert main(job(corpus, tmp_path / "out", *split, more, *accept)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line
        assert line.endswith("take another output.root")
    assert len(manifests(tmp_path / "out")) == 1


def test_splits_may_change_where_no_prompt_comes_twice(corpus: Path, tmp_path: Path) -> None:
    assert main(job(corpus, tmp_path / "out", "prompts.test_fraction=0.3")) == 0
    publish_corpus(corpus, table(rows(20, 40)), number=2)
    changed = ["prompts.test_fraction=0.6", "build.seed=1"]
    none = ["prompts.dedup=none", "prompts.test_fraction=0.3", "run.accept_changes=true"]
    assert main(job(corpus, tmp_path / "out", *none)) == 2, "nor after it was not so"
    assert main(job(corpus, tmp_path / "out", *changed)) == 2, "not without being told to"
    assert main(job(corpus, tmp_path / "out", *changed, "run.accept_changes=true")) == 0
    train, test = (
        [each["prompt"][0]["content"] for each in published(tmp_path / "out", split)] for split in ("train", "test")
    )
    assert len({*train, *test}) == len(train) + len(test) > 20


def test_no_prompt_is_in_two_splits(tmp_path: Path) -> None:
    some = [{**each, "prompt_id": str(number)} for number, each in enumerate([*rows(count=30), *rows(count=30)])]
    corpus = publish_corpus(tmp_path / "corpus", table(some[:35]), table(some[35:]))
    more = ["prompts.test_fraction=0.3", "prompts.validation_fraction=0.2", "prompts.dedup=none", "build=unpaired"]
    assert main(job(corpus, tmp_path / "out", *more)) == 0
    prompts = {
        split: {each["prompt"][0]["content"] for each in published(tmp_path / "out", split)}
        for split in ("train", "validation", "test")
    }
    assert all(prompts.values())
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values()))
    assert len(published(tmp_path / "out")) == 2 * 2 * len(set.union(*prompts.values()))


def test_the_dataset_loads_by_split_through_its_card(corpus: Path, tmp_path: Path) -> None:
    assert main(job(corpus, tmp_path / "out", "prompts.test_fraction=0.3", "export=trl", "output.jsonl=true")) == 0
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=cache)
    assert {split: rows.to_list() for split, rows in loaded.items()} == {
        split: published(tmp_path / "out", split) for split in ("train", "test")
    }
    dropped = datasets.load_dataset(str(tmp_path / "out"), "dropped", split="train", cache_dir=cache)
    assert set(dropped["cause"]) == {"aligned_lost", "tie"}


def test_a_dataset_without_rows_says_why_and_does_not_load_what_was_dropped(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(job(corpus, tmp_path / "out", "build.min_margin=9")) == 0
    better = sum(number % 3 + 2 > number % 5 for number in range(40))
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"no rows came out: {better} of 40 prompts were dropped as small_margin: lower build.min_margin"
    cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match="data_files are invalid"):
        datasets.load_dataset(str(tmp_path / "out"), cache_dir=cache)
    assert len(datasets.load_dataset(str(tmp_path / "out"), "dropped", split="train", cache_dir=cache)) == 40


def test_a_reward_that_is_no_number_stops_the_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = row("p", ["a"], ["b"], q=([float("nan")], [1.0]))
    corpus = publish_corpus(tmp_path / "corpus", table([*rows(), broken]))
    assert main(job(corpus, tmp_path / "out")) == 3
    assert "whose reward is not finite; nothing is published" in capsys.readouterr().err
    assert not (tmp_path / "out/preferences").exists()


NUM_UNITS = 6  # of the corpus's row groups
NUM_BETTER = sum(number % 3 + 2 > number % 5 for number in range(40))


def empty(side: str, columns: dict[str, pa.Array]) -> pa.Array:
    return pa.array(["", *columns[side].to_pylist()[1:]])


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (lambda columns: {"rejected": empty("rejected", columns)}, f"{NUM_UNITS} rows with an empty side"),
        (lambda columns: {"chosen": empty("chosen", columns)}, f"{NUM_UNITS} rows with an empty side"),
        (lambda columns: {"rejected": columns["chosen"]}, f"{NUM_BETTER} pairs of equal texts"),
        (
            lambda columns: {"chosen_reward": columns["rejected_reward"], "rejected_reward": columns["chosen_reward"]},
            f"{NUM_BETTER} rows whose better side has the lower reward",
        ),
    ],
)
def test_a_mistake_of_a_strategy_is_found_and_nothing_is_published(
    mistake: Callable[[dict[str, pa.Array]], dict[str, pa.Array]],
    told: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def mistaken(ranked: pa.Table, build: BuildConfig) -> Made:
        made = pairs(ranked, build)
        return made._replace(columns={**made.columns, **mistake(made.columns)})

    monkeypatch.setitem(STRATEGIES, "pairs", mistaken)
    assert main(job(corpus, tmp_path / "out", "run.unit_rows=64", "export=trl")) == 3
    assert f"{told}; nothing is published" in capsys.readouterr().err
    assert not (tmp_path / "out/preferences").exists()


@examples.needs_hh_harmless
def test_real_pairs_come_through_the_job(tmp_path: Path) -> None:
    """The 1,400 pairs of HH-RLHF, each chosen answer as what was aligned from the rejected one."""
    real = pq.read_table(examples.EVAL_DATA / "hh_harmless_pairs.parquet").to_pylist()
    known = {"finish_reason": None, "num_tokens": None}  # as what is stored
    some = [
        row(
            [(turn["role"], turn["content"]) for turn in each["prompt"]],
            [candidate(each["rejected"], **known)], [candidate(each["chosen"], **known)], str(number),
        )
        for number, each in enumerate(real)
    ]  # fmt: skip
    corpus = publish_corpus(tmp_path / "corpus", table(some[:700]), table(some[700:]), row_group_size=128)
    given = [f"input.path={corpus}", f"output.root={tmp_path / 'out'}", "run.unit_rows=128", "export=trl"]
    assert main(given) == 0
    wanted, asked = {}, set()
    for number, each in enumerate(real):
        prompt = "\n".join(" ".join(f"{turn['role']}: {turn['content']}".lower().split()) for turn in each["prompt"])
        chosen, rejected = (" ".join(each[side].split()) for side in ("chosen", "rejected"))
        if prompt not in asked and chosen and rejected and chosen != rejected:
            wanted[str(number)] = {
                "prompt": each["prompt"],
                **{side: [{"role": "assistant", "content": each[side]}] for side in ("chosen", "rejected")},
            }
        asked.add(prompt)
    assert len(wanted) > 1300
    made = published(tmp_path / "out")
    assert {
        each["prompt_id"]: {name: each[name] for name in ("prompt", "chosen", "rejected")} for each in made
    } == wanted
    assert len(made) == len(wanted)
    (manifest,) = manifests(tmp_path / "out")
    longer = [len(each["chosen"][0]["content"]) - len(each["rejected"][0]["content"]) for each in made]
    assert manifest["report"]["mean_chosen_minus_rejected_characters"] == pytest.approx(sum(longer) / len(longer))


def test_a_dataset_of_a_trainer_has_its_columns_in_parquet_and_in_json_lines(corpus: Path, tmp_path: Path) -> None:
    assert main(job(corpus, tmp_path / "out", "export=trl", "output.jsonl=true")) == 0
    (manifest,) = manifests(tmp_path / "out")
    made = published(tmp_path / "out")
    assert made[0]["chosen"] == [{"role": "assistant", "content": "It is 0, which is nice."}]
    (lines,) = manifest["jsonl"]
    assert [json.loads(line) for line in (tmp_path / "out" / lines["path"]).read_text().splitlines()] == made


def test_a_damaged_unit_is_built_again(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(job(corpus, tmp_path / "whole")) == 0
    build = Builder.build

    def build_damaged(self: Builder, *arguments: Any) -> pa.Table:
        report = build(self, *arguments)
        path = Path(self.output.path(arguments[0].path))
        if arguments[0].start == 4:
            monkeypatch.setattr(Builder, "build", build)
            path.write_bytes(path.read_bytes()[:-20] + b"x" * 20)
        return report

    monkeypatch.setattr(Builder, "build", build_damaged)
    assert main(job(corpus, tmp_path / "out")) == 0
    assert published(tmp_path / "out") == published(tmp_path / "whole")


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda path: path.unlink(), "it is gone; restore it"),
        (lambda path: path.write_bytes(b"short"), "has 5 bytes, and its manifest says"),
        (damage, "is damaged"),
    ],
)
def test_a_part_that_is_not_what_its_manifest_says_stops_the_job(
    break_it: Callable[[Path], Any], told: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it(corpus / "corpus/run=000001/part-00001.parquet")
    for dedup in ("none", "exact"):
        assert main(job(corpus, tmp_path / dedup, f"prompts.dedup={dedup}")) in (2, 3)
        assert told in capsys.readouterr().err
        assert not manifests(tmp_path / dedup)


def test_near_duplicates_and_contaminated_prompts_are_dropped(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "benchmark.txt").write_text("Tell me of number 12\n")
    asked = "Please tell me in a few plain words how the pump in the cellar of this house works"
    some = [row(text, ["a"], ["b"], q=([1], [2])) for text in (asked, f"{asked} today")]
    publish_corpus(corpus, table(some), number=2)
    more = ["prompts.dedup=near", f"prompts.decontaminate=[{tmp_path / 'benchmark.txt'}]"]
    assert main(job(corpus, tmp_path / "out", *more)) == 0
    (manifest,) = manifests(tmp_path / "out")
    assert (manifest["causes"]["contaminated"], manifest["causes"]["duplicate_prompt"]) == (1, 1)
    assert [each["prompt"][0]["content"] for each in published(tmp_path / "out")][-1] == asked
    (tmp_path / "other.txt").write_text("Tell me of number 13\n")
    more[1] = f"prompts.decontaminate=[{tmp_path / 'other.txt'}]"
    assert main(job(corpus, tmp_path / "out", *more)) == 2, "another benchmark is another dataset"
    assert [line for line in capsys.readouterr().out.splitlines() if "benchmark" in line] == [
        "benchmarks: 1 texts in 1 files"
    ]


def test_a_task_that_hangs_ends_the_job_with_4_and_what_is_missing_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build, codes, ended = Builder.build, [], threading.Event()

    def hangs(self: Builder, *arguments: Any) -> pa.Table:
        if arguments[0].start == 8:
            monkeypatch.setattr(Builder, "build", build)
            capsys.readouterr()
            ended.clear()
            assert ended.wait(20), "the job hangs in silence"
        return build(self, *arguments)

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(Builder, "build", hangs)
    monkeypatch.setattr("pipelines.progress.POLL_S", 0.05)
    monkeypatch.setattr("pipelines.progress.os._exit", end)
    assert main(job(corpus, tmp_path / "out", "run.stall_minutes=0.005")) == 0, "this process goes on"
    assert set(codes) == {4}
    told = capsys.readouterr().err.splitlines()
    part = "corpus/run=000001/part-00000.parquet"
    missing = [
        f"{part} rows 8 to 12",
        f"{part} rows 12 to 16",
        f"{part} rows 16 to 20",
        f"{part[:-9]}1.parquet rows 0 to 4",
    ]
    assert told[:3] == [
        "error: nothing has moved for 0.0 minutes (run.stall_minutes); giving up",
        f"  2 of 10 are done; the first that are not: {'; '.join(missing)}",
        "  what is committed is kept; the same command resumes",
    ]


def test_what_is_no_corpus_is_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(job(tmp_path / "none", tmp_path / "out")) == 2
    assert f"input.path '{tmp_path / 'none'}' does not exist" in capsys.readouterr().err
    assert main(job(corpus, corpus)) == 2
    assert "is the corpus that is read" in capsys.readouterr().err
    assert main(job(corpus, tmp_path / "out", "input.keep_columns=[topik]")) == 2
    assert "keep_columns: no shard has that column" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_the_root_of_another_corpus_is_left_as_it_is(
    flags: list[str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = publish_corpus(tmp_path / "other", table(rows(3)))
    before = sorted(other.rglob("*"))
    assert main([*job(corpus, other), *flags]) == 2
    told = capsys.readouterr().err
    assert told == f"error: output.root '{other}' holds a corpus: take another folder for a preference dataset\n"
    assert sorted(other.rglob("*")) == before


def test_what_another_job_made_before_this_one_got_the_lease_is_not_made_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, planned, others = job(corpus, tmp_path / "out"), every_job.Job.planned, [main]

    def overtaken(self: every_job.Job[Any], limit: int | None) -> Plan:
        plan = planned(self, limit)
        if others:
            assert others.pop()(arguments) == 0
        return plan

    monkeypatch.setattr(every_job.Job, "planned", overtaken)
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("nothing new: ")
    assert [path.name for path in (tmp_path / "out/runs").iterdir()] == ["000001.json"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            ["build.reward=qualiti"],
            "build.reward: the corpus has no reward 'qualiti'; did you mean quality? there are: ",
        ),
        (["build.reward=x"], "build.reward: the corpus has no reward 'x'; there are: q, quality"),
        (
            ["build.reward=null", "build.reward_weights={q: 1, r: 2}"],
            "build.reward_weights: the corpus has no reward 'r'",
        ),
        (
            ["build.models=[smal]"],
            "build.models: the corpus has no policy 'smal'; did you mean small? there are: large, ",
        ),
        (
            ["build.models=[small, aligner]"],
            "build.models: the corpus has no policy 'aligner'; there are: large, small",
        ),
    ],
)
def test_a_reward_or_policy_that_the_corpus_does_not_have_is_refused_before_any_work(
    more: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        table([row(policy, [candidate("a", model=policy)], ["b"], **{name: ([0], [1])})])
        for policy, name in (("small", "q"), ("large", "quality"))
    ]
    corpus = publish_corpus(tmp_path / "corpus", *parts)
    for flags in (["--dry-run"], []):
        assert main([*job(corpus, tmp_path / "out"), *more, *flags]) == 2
        assert told in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("units/*")) and not manifests(tmp_path / "out")
    known = ["build.reward=null", "build.reward_weights={q: 1, quality: 2}", "build.models=[large, small]"]
    assert main([*job(corpus, tmp_path / "out"), *known]) == 0


def test_a_reward_of_a_corpus_without_any_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = table([row("p", ["a"], ["b"])])
    for name, unscored in (("null", scored), ("none", scored.drop_columns(["rewards"]))):
        corpus = publish_corpus(tmp_path / name, unscored)
        assert main(job(corpus, tmp_path / f"out-{name}")) == 2
        assert "the corpus has no reward 'q'; it has none: score it with score_corpus.py" in capsys.readouterr().err


def test_a_corpus_that_was_made_anew_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(job(corpus, tmp_path / "out")) == 0
    shutil.rmtree(corpus)
    publish_corpus(corpus, table(rows(5)))
    assert main(job(corpus, tmp_path / "out")) == 2
    assert "the corpus has been made anew; take another output.root" in capsys.readouterr().err


def test_a_dry_run_tells_and_writes_nothing(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*job(corpus, tmp_path / "out"), "--dry-run"]) == 0
    assert "to build: 40 prompts in 10 units" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
