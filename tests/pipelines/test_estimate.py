"""What a dry run reckons: tokens against exact counts, samples against the whole, time and cost against arithmetic."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.aligner import AlignerConfig
from actors.board import Board, Snapshot
from actors.contract import ConfigError
from actors.engines.prompts import load_tokenizer
from actors.policy import PolicyConfig
from pipelines import estimate, report
from pipelines.corpus.plan import Plan
from pipelines.corpus.publish import OutputConfig
from pipelines.corpus.runs import create_run, latest_pace, latest_run, write_pace
from pipelines.corpus.shards import Input, InputConfig
from pipelines.corpus.storage import Storage
from pipelines.settings import AlignCorpusConfig, PlanConfig
from tests.pipelines.corpus.fabricate import plan_of

PACE = {
    "run": 3,
    "digest": "d",
    "num_rows": 500,
    "seconds": 160.0,
    "startup_s": 60.0,
    "pools": {"policy": {"num_gpus": 4, "num_tokens": 50_000}, "aligner": {"num_gpus": 2, "num_tokens": 5000}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.tiny_models import build_tiny_llama

    return str(build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama"))


def config_of(model: str, **sections: Any) -> AlignCorpusConfig:
    return AlignCorpusConfig(
        **{
            "input": InputConfig(path="in"),
            "output": OutputConfig(root="out"),
            "policy": PolicyConfig(model=model, max_tokens=16),
            "aligner": AlignerConfig(model=model, max_tokens=8, template="{{ question }} {{ answer }}"),
            **sections,
        }
    )


def row(text: str | None, stored: list[str] | None = None) -> dict[str, Any]:
    prompt = None if text is None else [{"role": "user", "content": text}]
    return {"prompt": prompt, "stored": stored, "problem": "null_prompt" if text is None else None}


def count(model: str, text: str) -> int:
    """Tokens of a chat of one message, by the tokenizer alone."""
    tokenizer = load_tokenizer(model)
    whole = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return len(tokenizer(whole, add_special_tokens=False)["input_ids"])


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_a_policy_reads_a_prompt_once_and_answers_it_often(model: str) -> None:
    texts = [f"How {'very ' * number}much?" for number in range(20)]
    policy = PolicyConfig(model=model, max_tokens=16, num_candidates=3)
    found = estimate.tokens(config_of(model, policy=policy), "policy", [*map(row, texts), row(None)], 21)
    lengths = [count(model, text) for text in texts]
    assert found.lengths == tuple(sorted(lengths))
    assert (found.num_prompt_tokens, found.num_answers, found.num_rows) == (sum(lengths), 60, 21)
    assert (found.quantile(0.5), found.quantile(0.95)) == (sorted(lengths)[9], sorted(lengths)[18])
    assert (found.is_bound, found.num_too_long, found.num_failed) == (False, 0, 0)


def test_a_sample_is_scaled_to_the_plan(model: str) -> None:
    found = estimate.tokens(config_of(model), "policy", [row("How?"), row(None)], 1000)
    assert (found.num_prompt_tokens, found.num_answers) == (500 * count(model, "How?"), 500)


def test_stored_answers_are_counted_as_the_aligner_will_see_them(model: str) -> None:
    rows = [row("How?", ["So.", "<think>Well.</think> Like that."]), row("Why?", ["", "Because it is."]), row("Who?")]
    policy = PolicyConfig(model="label", engine="stored")
    config = config_of(model, policy=policy, input=InputConfig(path="in", response_column="response"))
    found = estimate.tokens(config, "aligner", rows, 3)
    lengths = [count(model, text) for text in ("How? So.", "How? Like that.", "Why? Because it is.")]
    assert found.num_prompt_tokens == sum(lengths)
    assert found.num_answers == 3
    assert not found.is_bound


@pytest.mark.parametrize("answer", ["{{ answer }}", "{{ answer }} {{ answer }}"])
def test_no_answer_makes_the_aligners_prompt_longer_than_the_bound(answer: str, model: str) -> None:
    aligner = AlignerConfig(model=model, max_tokens=8, template="{{ question }} " + answer)
    policy = PolicyConfig(model=model, max_tokens=16, num_candidates=2)
    config = config_of(model, policy=policy, policies=[replace(policy, num_candidates=1)], aligner=aligner)
    found = estimate.tokens(config, "aligner", [row("How?")], 1)
    assert (len(found.lengths), found.num_answers, found.is_bound) == (3, 3, True)
    longest = "ß" * 8  # 16 tokens: two bytes a character, which this tokenizer has not learnt to join
    assert count(model, longest) - count(model, "") == 16
    actual = count(model, f"How? {answer.replace('{{ answer }}', longest)}")
    assert actual <= found.lengths[0] <= actual + 8
    assert found.num_prompt_tokens == sum(found.lengths)


@pytest.mark.parametrize(("max_iterations", "num_answers"), [(None, 1), (6, 3)])
def test_a_diffpo_aligner_reads_the_chat_alone_and_once(
    max_iterations: int | None, num_answers: int, model: str
) -> None:
    aligner = AlignerConfig(model=model, max_tokens=8, recipe="diffpo", max_iterations=max_iterations)
    policy = PolicyConfig(model=model, max_tokens=16, num_candidates=2)
    config = config_of(model, policy=policy, policies=[replace(policy, num_candidates=1)], aligner=aligner)
    found = estimate.tokens(config, "aligner", [row("How?"), row(None)], 2)
    assert (found.lengths, found.num_prompt_tokens) == ((count(model, "How?"),), count(model, "How?"))
    assert (found.num_answers, found.is_bound) == (num_answers, False)


def test_a_prompt_without_answers_asks_nothing_of_a_diffpo_aligner(model: str) -> None:
    policy = PolicyConfig(model="label", engine="stored")
    aligner = AlignerConfig(model=model, max_tokens=8, recipe="diffpo")
    config = config_of(model, policy=policy, aligner=aligner, input=InputConfig(path="in", response_column="response"))
    assert estimate.tokens(config, "aligner", [row("How?", [""]), row("Why?", ["So."])], 2).num_answers == 1


def test_prompts_without_room_are_counted_and_left_out(model: str) -> None:
    long = "How? " * 300
    found = estimate.tokens(config_of(model), "policy", [row("How?"), row(long)], 2)
    assert (found.num_too_long, found.num_answers, found.num_prompt_tokens) == (1, 1, count(model, "How?"))
    assert found.lengths[-1] == count(model, long)


def test_a_row_that_makes_no_prompt_is_counted(model: str) -> None:
    aligner = AlignerConfig(model=model, max_tokens=8, template="{{ answer }}{{ 1 // (question | length - 4) }}")
    found = estimate.tokens(config_of(model, aligner=aligner), "aligner", [row("How?"), row("Where?")], 2)
    assert (found.num_failed, found.num_answers) == (1, 1)


def test_of_an_endpoint_only_what_it_makes_is_known() -> None:
    policy = PolicyConfig(model="gpt", engine="openai", num_candidates=2, max_tokens=10)
    found = estimate.tokens(config_of("m", policy=policy), "policy", [row("How?")], 7)
    assert (found.lengths, found.num_prompt_tokens, found.num_answers) == ((), 0, 14)


# --- the sample -----------------------------------------------------------------------------------------------------


def shards(folder: Path, num_shards: int, num_rows: int, text: Callable[[int], str]) -> tuple[Input, Plan]:
    folder.mkdir()
    for shard in range(num_shards):
        texts = [text(number) for number in range(shard * num_rows, (shard + 1) * num_rows)]
        pq.write_table(pa.table({"prompt": texts}), folder / f"{shard:03}.parquet", row_group_size=num_rows // 2)
    source = Input(str(folder))
    return source, plan_of(source, InputConfig(path=str(folder)), Storage(str(folder.parent / "out")), unit_rows=64)


def texts_of(rows: list[dict[str, Any]]) -> list[str]:
    return [row["prompt"][0]["content"] for row in rows]


def test_few_rows_are_all_read(tmp_path: Path) -> None:
    source, plan = shards(tmp_path / "in", 4, 100, str)
    rows = estimate.sample(source, InputConfig(path=""), plan)
    assert sorted(map(int, texts_of(rows))) == list(range(400))


def test_of_many_rows_a_bounded_sample_speaks_for_all(tmp_path: Path) -> None:
    """Shards whose rows grow: the first would mislead, as would the first of each where they are not spread."""
    source, plan = shards(tmp_path / "in", 100, 200, str)
    rows = estimate.sample(source, InputConfig(path=""), plan)
    numbers = list(map(int, texts_of(rows)))
    assert len(set(numbers)) == len(numbers) == estimate.SAMPLE_ROWS
    assert sum(numbers) / len(numbers) == pytest.approx(sum(range(20_000)) / 20_000, rel=0.05)
    some = numbers[:200]  # any part of it does too, so that it may be cut short
    assert sum(some) / len(some) == pytest.approx(10_000, rel=0.15)


def test_a_sample_that_takes_too_long_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    source, plan = shards(tmp_path / "in", 2, 100, str)
    monkeypatch.setattr(estimate, "SAMPLE_S", -1.0)
    rows = estimate.sample(source, InputConfig(path=""), plan)
    assert len(rows) == 50
    found = estimate.tokens(config_of(model), "policy", rows, 200)
    assert (found.num_rows, found.num_answers) == (1, 200)


# --- time and cost --------------------------------------------------------------------------------------------------


def test_a_job_takes_its_start_and_then_so_long_per_row() -> None:
    assert estimate.seconds_at(PACE, 500) == 160
    assert estimate.seconds_at(PACE, 500_000) == 60 + 100_000
    assert estimate.gpu_hours_at(PACE, 17_700) == {"policy": 4.0, "aligner": 2.0}  # 60 s + 3540 s


def test_the_pace_of_the_last_run_is_found(local_output: Storage) -> None:
    assert latest_pace(local_output) is None
    for rows in (10, 20):
        run = create_run(local_output, {"name": rows})
        write_pace(local_output, run, {"num_rows": rows})
    create_run(local_output, {"name": "not at its end"})
    assert latest_pace(local_output) == {"run": 2, "num_rows": 20}
    assert latest_run(local_output) == {"number": 3, "name": "not at its end"}


def test_the_board_knows_since_when_every_pool_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("actors.board.time.monotonic", lambda: now[0])
    board = Board()
    assert board.running_s() == 0
    for at, pool, replica, state in [
        (1.0, "policy", "a", "starting"), (5.0, "policy", "a", "running"), (6.0, "aligner", "b", "starting"),
    ]:  # fmt: skip
        now[0] = at
        board.report(pool, replica, Snapshot(state=state))
    assert board.running_s() == 0
    for at, replica in [(20.0, "b"), (30.0, "c"), (40.0, "b")]:
        now[0] = at
        board.report("aligner", replica, Snapshot(state="running", num_rows=int(at)))
    assert board.running_s() == 20


def told(config: AlignCorpusConfig, folder: Path, pace: Any, capsys: pytest.CaptureFixture[str]) -> str:
    source, plan = shards(folder / "in", 1, 200, lambda _: "How?")
    report.print_dry_run(config, source, plan, "d", pace, [])
    return capsys.readouterr().out


@pytest.fixture
def hosted() -> AlignCorpusConfig:
    """Pools that need no model here, with the GPUs of PACE."""
    return config_of(
        "gpt",
        policy=PolicyConfig(model="gpt", engine="openai", num_gpus=4, max_tokens=100),
        aligner=AlignerConfig(model="gpt", engine="openai", num_gpus=2, max_tokens=100),
        plan=PlanConfig(gpu_hour_price=2.5),
    )


def test_a_pool_that_may_grow_is_alike_with_any_number_of_its_replicas(
    hosted: AlignCorpusConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = replace(hosted.policy, num_gpus=1, replicas=2, max_replicas=8)
    text = told(replace(hosted, policy=policy), tmp_path, PACE, capsys)
    assert "policy: 2 to 8 x openai gpt" in text
    assert "which had other GPUs" not in text


def test_time_and_cost_at_the_pace_of_the_last_run(
    hosted: AlignCorpusConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = told(hosted, tmp_path, PACE, capsys).splitlines()  # 200 rows: 60 s + 40 s
    made = "at most 20000 generated tokens (200 answers of at most 100)"
    assert f"policy: {made}; about 20000 at the 100 a row of run 3" in lines
    assert f"aligner: {made}; about 2000 at the 10 a row of run 3" in lines
    assert "time: about 0.028 hours, estimated from the 500 rows of run 3" in lines
    assert "policy: about 0.111 GPU-hours, cost 0.28, 1.39 per 1,000 rows" in lines
    assert "aligner: about 0.0556 GPU-hours, cost 0.14, 0.694 per 1,000 rows" in lines
    assert "in all: about 0.167 GPU-hours, cost 0.42, 2.08 per 1,000 rows" in lines


def test_without_a_price_there_are_hours_and_no_cost(
    hosted: AlignCorpusConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(replace(hosted, plan=PlanConfig(), aligner=replace(hosted.aligner, replicas=4)), tmp_path, PACE, capsys)
    assert "in all: about 0.167 GPU-hours\n" in text
    assert "of run 3, which had other GPUs: policy 4, aligner 2\n" in text
    assert "cost" not in text


def test_on_cpus_alone_there_are_hours_and_no_cost(
    hosted: AlignCorpusConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pools = {name: {"num_gpus": 0, "num_tokens": 5} for name in ("policy", "aligner")}
    text = told(hosted, tmp_path, {**PACE, "pools": pools}, capsys)
    assert "time: about 0.028 hours" in text
    assert "GPU-hours: none, as no pool held a GPU then\n" in text
    assert "cost" not in text


@pytest.mark.parametrize(
    ("pace", "why"), [(None, "no run on this root has come to its end"), ({**PACE, "digest": "e"}, "run 3 had another")]
)
def test_without_a_measured_run_no_cost_is_invented(
    pace: Any, why: str, hosted: AlignCorpusConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(hosted, tmp_path, pace, capsys)
    (line,) = [line for line in text.splitlines() if "cost" in line]
    assert line.startswith(f"time and cost: unknown, as {why}")
    assert "GPU-hours" not in text


def test_a_negative_price_is_refused() -> None:
    with pytest.raises(ConfigError, match="gpu_hour_price must be 0 or more, got -1"):
        PlanConfig(gpu_hour_price=-1)


def test_memory_is_told_for_each_kind_of_pool(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In bfloat16 a token takes 2 (K and V) x 2 layers x 2 heads x 32 x 2 bytes = 512 bytes; half on either of 2."""
    aligner = AlignerConfig(model=model, engine="vllm", num_gpus=2, tensor_parallel_size=2, max_num_seqs=4)
    policy = PolicyConfig(model=model, max_tokens=100, max_num_seqs=8, kv_cache_tokens=1000)
    further = PolicyConfig(model=model, max_tokens=100, max_num_seqs=1)
    config = config_of(model, policy=policy, policies=[further], aligner=aligner)
    lines = [line for line in told(config, tmp_path, None, capsys).splitlines() if "memory" in line]
    length = count(model, "How?") + 100
    assert 8 * length < 1000
    seqs = "KV cache for {} sequences as long as the longest here, {} tokens"
    assert lines == [
        f"policy: memory per rank: 321 KiB weights + {8 * length / 2:.3g} KiB {seqs.format(8, length)}; "
        "at most 500 KiB (1000 tokens)",
        f"policy_2: memory per rank: 321 KiB weights + {length / 2:.3g} KiB {seqs.format(1, length)}; "
        "at most 256 KiB (512 tokens)",
        f"aligner: GPU memory per rank: 161 KiB weights + 512 KiB {seqs.format(4, 512)}; vllm sets aside "
        "gpu_memory_utilization of the GPU for both",
    ]


def test_a_prompt_that_cannot_be_made_is_shown_with_its_reason(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aligner = AlignerConfig(model=model, max_tokens=8, template="{{ answer }}{{ 1 // (question | length - 4) }}")
    text = told(config_of(model, aligner=aligner), tmp_path, None, capsys)
    assert "aligner: 200 of 200 rows do not make a prompt\n" in text
    assert "as the aligner sees it:\n  (not at all: recipe_failed: template: ZeroDivisionError" in text


@pytest.mark.parametrize("max_iterations", [None, 6])
def test_the_draft_of_a_diffpo_aligner_is_shown_below_its_prompt(
    max_iterations: int | None, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aligner = AlignerConfig(model=model, max_tokens=8, recipe="diffpo", max_iterations=max_iterations)
    text = told(config_of(model, aligner=aligner), tmp_path, None, capsys)
    seen = r"as the aligner sees it:\n  <\|im_start\|>user\n  How\?<\|im_end\|>\n  <\|im_start\|>assistant\s+\S+, "
    assert len(re.findall(seen + r"where the aligner begins:\n  \(the policy's answer\)\n", text)) == 2
    assert ("note: The aligned text does not depend on the response" in text) == (max_iterations is None)


def test_a_stored_answer_is_shown_as_the_aligner_is_given_it(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(
        pa.table({"prompt": ["How?"], "response": [["<think>Hm.</think>So.", "So?"]]}), tmp_path / "a.parquet"
    )
    given = InputConfig(path=str(tmp_path), response_column="response")
    aligner = AlignerConfig(model=model, max_tokens=8, recipe="diffpo", max_iterations=6)
    config = config_of(model, policy=PolicyConfig(model="label", engine="stored"), aligner=aligner, input=given)
    source = Input(given.path)
    plan = plan_of(source, given, Storage(str(tmp_path / "out")))
    report.print_dry_run(config, source, plan, "d", None, [])
    assert capsys.readouterr().out.endswith(", where the aligner begins:\n  So.\n")
