"""The policy and aligner stages on packed units, with a scripted engine: candidates, failures, provenance."""

import asyncio
import json
from typing import Any

import pyarrow as pa
import pytest

from actors.aligner import AlignerConfig, AlignerStage
from actors.candidates import lost, split_reasoning
from actors.contract import PROBLEM, PROMPT, ConfigError, RowError, TransientError, candidate_seed, pack, unpack
from actors.engines.base import Completion, EngineConfig, EngineStats, Request
from actors.policy import PolicyConfig, PolicyStage
from actors.pool import ModelStage

PROBLEM_ROW = {"stage": "read", "cause": "null_prompt", "error_class": "InputError", "message": "m", "attempts": 1}


class Scripted:
    """Repeats the last message and its seed; a prompt that says `fail` is an error of that request."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        text = request.prompt if isinstance(request.prompt, str) else request.prompt[-1][1]
        if "fail" in text and not ("once" in text and request.seed % 2):
            raise RowError("prompt_too_long", "9 prompt tokens")
        if "blank" in text:
            return Completion("  \n", "stop", 1, 1, iterations=1, accepted=0)
        decoded = {} if request.draft is None else {"iterations": 2, "accepted": 1}
        return Completion(f" {text} [{request.seed}] ", "stop", 5, 3, **decoded)

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0)

    def close(self) -> None: ...


class Told:
    def __await__(self) -> Any:
        return iter(())


class Reports:
    def __init__(self, *arguments: Any) -> None: ...

    def report(self) -> Any:
        return Told()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scripted = Scripted()

    def build(config: EngineConfig, *arguments: Any) -> Any:
        from actors.engines import StoredEngine

        return StoredEngine(config) if config.engine == "stored" else scripted

    monkeypatch.setattr("actors.pool.build_engine", build)
    monkeypatch.setattr("actors.pool.Reporter", Reports)
    monkeypatch.setattr("actors.pool.units_before", lambda board, pool: ())
    return scripted


class Kept:
    """Notes in memory."""

    def __init__(self) -> None:
        self.notes: dict[tuple[str, str], Any] = {}
        self.at_start: dict[tuple[str, str], Any] = {}
        self.written: list[Any] = []

    def read(self, unit: str, stage: str) -> Any | None:
        return self.notes.get((unit, stage))

    def found(self, unit: str, stage: str) -> Any | None:
        return self.at_start.get((unit, stage))

    def write(self, unit: str, stage: str, note: Any) -> None:
        self.notes[unit, stage] = json.loads(json.dumps(note))
        self.written.append(self.notes[unit, stage])

    def forget(self, unit: str, stage: str) -> None:
        self.notes.pop((unit, stage), None)


def policy(**keys: Any) -> PolicyStage:
    first = keys.pop("first_candidate", 0)
    return PolicyStage(PolicyConfig(model="m", **keys), first_candidate=first, name="policy", **shared())


def aligner(**keys: Any) -> AlignerStage:
    return AlignerStage(AlignerConfig(model="a", **keys), name="aligner", **shared())


def shared() -> dict[str, Any]:
    return {"run_seed": 7, "board": None, "sharers": 1, "notes": Kept(), "max_attempts": 3}


def unit_of(prompts: list[str | None], **columns: Any) -> pa.Table:
    chats = [None if prompt is None else [{"role": "user", "content": prompt}] for prompt in prompts]
    return pack(
        pa.table(
            {
                "prompt_id": [f"id-{prompt}" for prompt in prompts],
                "prompt": pa.array(chats, PROMPT),
                "problem": pa.array([PROBLEM_ROW if prompt is None else None for prompt in prompts], PROBLEM),
                **columns,
            }
        ),
        unit="u",
    )


def run(packed: pa.Table, *stages: ModelStage) -> list[dict[str, Any]]:
    async def through() -> pa.Table:
        unit = packed
        for stage in stages:
            (unit,) = [made async for made in stage(unit)]
        return unit

    rows: list[dict[str, Any]] = unpack(asyncio.run(through())).to_pylist()
    return rows


def test_every_candidate_is_kept_with_its_own_seed_and_each_is_aligned(engine: Scripted) -> None:
    (row,) = run(unit_of(["hello"]), policy(num_candidates=3), aligner())
    seeds = [candidate_seed(7, "id-hello", number, "policy") for number in range(3)]
    assert [response["seed"] for response in row["responses"]] == seeds
    assert [response["text"] for response in row["responses"]] == [f"hello [{seed}]" for seed in seeds]
    assert [(each["finish_reason"], each["num_prompt_tokens"], each["num_tokens"]) for each in row["responses"]] == [
        ("stop", 5, 3)
    ] * 3
    assert len(row["aligned"]) == 3
    assert all(each["changed"] and each["status"] == "ok" and each["model"] == "a" for each in row["aligned"])
    assert row["problem"] is None


def test_a_failed_candidate_stays_beside_its_siblings_and_the_row_goes_on(engine: Scripted) -> None:
    (row,) = run(unit_of(["fail once"]), policy(num_candidates=6), aligner(engine="stored"))
    statuses = [response["status"] for response in row["responses"]]
    assert {"ok", "failed"} == set(statuses)
    assert [each["status"] for each in row["aligned"]] == statuses
    failed = [response for response in row["responses"] if response["status"] == "failed"]
    assert failed[0]["error"] == "prompt_too_long: 9 prompt tokens"
    assert row["problem"] is None


def test_a_row_none_of_whose_candidates_survives_has_the_first_ones_cause(engine: Scripted) -> None:
    rows = run(unit_of(["fail", "hello", None]), policy(num_candidates=2), aligner())
    assert rows[0]["problem"] == {
        "stage": "policy",
        "cause": "prompt_too_long",
        "error_class": "RowError",
        "message": "9 prompt tokens",
        "attempts": 1,
    }
    assert rows[1]["problem"] is None
    assert rows[2]["problem"] == PROBLEM_ROW
    assert rows[2]["responses"] == rows[2]["aligned"] == []


def test_a_problem_row_costs_no_request(engine: Scripted) -> None:
    run(unit_of([None, None]), policy(), aligner())
    assert engine.requests == []


def test_an_answer_that_fails_at_the_aligner_is_the_aligners_problem(engine: Scripted) -> None:
    stored = pa.array([["please fail"]], pa.list_(pa.string()))
    (row,) = run(unit_of(["hello"], stored=stored), policy(engine="stored"), aligner())
    assert row["responses"][0]["status"] == "ok"
    assert row["problem"]["stage"] == "aligner"


def test_an_answer_without_text_is_a_failure(engine: Scripted) -> None:
    (row,) = run(unit_of(["blank"]), policy(), aligner())
    assert row["problem"]["cause"] == "empty_answer"


def test_stored_answers_are_candidates_and_missing_ones_are_problems(engine: Scripted) -> None:
    stored = pa.array([["one", "two"], ["", "x"], None, []], pa.list_(pa.string()))
    rows = run(unit_of(["a", "b", "c", "d"], stored=stored), policy(engine="stored"), aligner(engine="stored"))
    assert [[each["text"] for each in row["aligned"] if each["status"] == "ok"] for row in rows] == [
        ["one", "two"],
        ["x"],
        [],
        [],
    ]
    assert [row["problem"] and row["problem"]["cause"] for row in rows] == [None, None, *["missing_response"] * 2]
    assert not any(each["changed"] for row in rows for each in row["aligned"])


def test_a_second_policy_appends_and_one_surviving_candidate_of_either_saves_the_row(engine: Scripted) -> None:
    stored = pa.array([["kept"]], pa.list_(pa.string()))
    first, second = policy(num_candidates=2), policy(engine="stored", first_candidate=2)
    (row,) = run(unit_of(["fail"], stored=stored), first, second, aligner(engine="stored"))
    assert [response["status"] for response in row["responses"]] == ["failed", "failed", "ok"]
    assert row["responses"][2]["seed"] == candidate_seed(7, "id-fail", 2, "policy")
    assert row["problem"] is None


def test_the_system_prompt_is_for_prompts_without_one(engine: Scripted) -> None:
    run(unit_of(["hello"]), policy(system_prompt="be kind"))
    assert engine.requests[0].prompt == (("system", "be kind"), ("user", "hello"))


def test_text_does_not_depend_on_how_rows_are_cut_into_units(engine: Scripted) -> None:
    prompts: list[str | None] = [f"prompt {number}" for number in range(6)]
    whole = run(unit_of(prompts), policy(num_candidates=2), aligner())
    cut = [
        row
        for at in (0, 2, 3)
        for row in run(unit_of(prompts[at : at + 1 + at % 3]), policy(num_candidates=2), aligner())
    ]
    by_id = {row["prompt_id"]: row for row in whole}
    assert cut
    assert all(by_id[row["prompt_id"]] == row for row in cut)


def test_a_seed_that_depended_on_the_position_would_be_caught(
    engine: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1000))
    monkeypatch.setattr("actors.policy.candidate_seed", lambda *arguments: next(calls))
    prompts: list[str | None] = ["a", "b", "c"]
    whole = run(unit_of(prompts), policy())
    cut = [row for prompt in prompts for row in run(unit_of([prompt]), policy())]
    assert whole != cut


def test_an_aligners_thinking_is_kept_apart_too(engine: Scripted) -> None:
    (row,) = run(unit_of(["hello"]), policy(), aligner(template="<think>let me see</think>{{ answer }}"))
    assert row["aligned"][0]["reasoning"] == "let me see"
    assert row["aligned"][0]["text"].startswith("hello [")


def test_what_a_parallel_decoder_took_is_kept_of_the_answers_it_made(engine: Scripted) -> None:
    stored = pa.array([["one", "blank"]], pa.list_(pa.string()))
    (row,) = run(unit_of(["hello"], stored=stored), policy(engine="stored"), aligner(template="{{ answer }}"))
    assert [(each["status"], each["iterations"], each["accepted"]) for each in row["aligned"]] == [
        ("ok", 2, 1),
        ("failed", None, None),
    ]
    assert [request.draft for request in engine.requests] == ["one", "blank"]


# --- diffpo -----------------------------------------------------------------------------------------------------------


def aligned_by_diffpo(stored: list[str], **keys: Any) -> list[dict[str, Any]]:
    """The aligned candidates of one prompt that has these answers."""
    answers = pa.array([stored], pa.list_(pa.string()))
    (row,) = run(unit_of(["hello"], stored=answers), policy(engine="stored"), aligner(recipe="diffpo", **keys))
    found: list[dict[str, Any]] = row["aligned"]
    assert [each["seed"] for each in found] == [
        candidate_seed(7, "id-hello", number, "aligner") for number in range(len(stored))
    ]
    return found


def test_a_text_that_no_response_can_change_is_made_once_a_prompt(engine: Scripted) -> None:
    seeds = [candidate_seed(7, "id-hello", number, "aligner") for number in range(4)]
    text = f"hello [{seeds[1]}]"
    aligned = aligned_by_diffpo(["", "one", text, "three"])
    assert [(request.prompt, request.seed, request.draft) for request in engine.requests] == [
        ((("user", "hello"),), seeds[1], "one")
    ]
    assert [(each["text"], each["changed"]) for each in aligned] == [
        ("", None),
        (text, True),
        (text, False),
        (text, True),
    ]
    assert [(each["iterations"], each["accepted"], each["num_tokens"]) for each in aligned] == [
        (None, None, None),
        (2, 1, 3),
        (None, None, 3),
        (None, None, 3),
    ]


def test_a_text_that_cannot_be_made_fails_all_that_would_share_it(engine: Scripted) -> None:
    stored = pa.array([["one", "two"]], pa.list_(pa.string()))
    (row,) = run(unit_of(["fail"], stored=stored), policy(engine="stored"), aligner(recipe="diffpo"))
    assert [(each["error"], each["changed"]) for each in row["aligned"]] == [
        ("prompt_too_long: 9 prompt tokens", None)
    ] * 2
    assert (row["problem"]["stage"], row["problem"]["cause"], len(engine.requests)) == ("aligner", "prompt_too_long", 1)


@pytest.mark.parametrize("keys", [{"max_iterations": 3}, {"num_reserved": 1}])
def test_every_response_is_decoded_where_it_can_change_the_text(engine: Scripted, keys: dict[str, Any]) -> None:
    aligned = aligned_by_diffpo(["one", "two"], **keys)
    assert [request.draft for request in engine.requests] == ["one", "two"]
    assert [each["iterations"] for each in aligned] == [2, 2]


def test_stored_answers_stay_as_they_are_whatever_the_recipe(engine: Scripted) -> None:
    assert [each["text"] for each in aligned_by_diffpo(["one", "two"], engine="stored")] == ["one", "two"]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"max_iterations": 3}, "max_iterations is read by recipe=diffpo only; with recipe=rewrite it must be null"),
        ({"num_reserved": 3}, "num_reserved is read by recipe=diffpo only; with recipe=rewrite it must be 0"),
        (
            {"random_reserved": True, "recipe": "aligner"},
            "random_reserved is read by recipe=diffpo only; with recipe=aligner it must be false",
        ),
        (
            {"recipe": "diffpo", "temperature": 0.7},
            "recipe=diffpo decodes greedily: temperature must be 0, got 0.7",
        ),
        (
            {"recipe": "diffpo", "engine": "openai", "num_reserved": 1},
            "num_reserved has no effect with engine=openai: it is for torch and vllm",
        ),
        (
            {"recipe": "diffpo", "num_reserved": 8, "max_tokens": 8},
            "num_reserved must be at most max_tokens - 1 = 7, got 8",
        ),
        (
            {"recipe": "diffpo", "random_reserved": True},
            "random_reserved draws from 0 to num_reserved: set num_reserved to 1 or more",
        ),
        (
            {"recipe": "diffpo", "max_iterations": 3, "temperature": 0.7},
            "max_iterations decodes greedily: temperature must be 0, got 0.7",
        ),
        (
            {"recipe": "diffpo", "engine": "vllm", "max_iterations": 6},
            "max_iterations=6 needs engine=torch: vllm can only decode until nothing changes; set max_iterations to "
            "null",
        ),
        (
            {"recipe": "diffpo", "decoder": "greedy", "max_iterations": 6},
            "max_iterations needs a parallel decoder: set decoder to auto, or max_iterations to null",
        ),
        (
            {"decoder": "parallel", "engine": "openai"},
            "decoder=parallel has no effect with engine=openai: it is for torch and vllm",
        ),
        (
            {"decoder": "parallel", "temperature": 0.7},
            "decoder=parallel decodes greedily: set temperature to 0, or decoder to auto",
        ),
    ],
)
def test_keys_of_a_decoder_that_would_have_no_effect_are_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        AlignerConfig(model="a", **keys)
    assert str(error.value) == told


def test_the_cause_of_a_lost_row_is_that_of_the_candidate_that_went_furthest() -> None:
    def candidate(status: str, error: str | None) -> dict[str, Any]:
        return {"status": status, "error": error}

    responses = [candidate("failed", "empty_answer: "), candidate("ok", None)]
    aligned = [candidate("failed", "response_failed: "), candidate("failed", "prompt_too_long: 9 tokens")]
    found = lost(responses, aligned)
    assert found is not None
    assert (found["stage"], found["cause"], found["message"]) == ("aligner", "prompt_too_long", "9 tokens")
    found = lost(responses[:1], aligned[:1])
    assert found is not None
    assert (found["stage"], found["cause"]) == ("policy", "empty_answer")


@pytest.mark.parametrize(
    ("text", "end", "expected"),
    [
        ("<think>a b</think> answer ", "</think>", ("a b", "answer")),
        ("a b</think>answer", "</think>", ("a b", "answer")),
        ("<think>never ends", "</think>", ("never ends", "")),
        (" plain ", "</think>", (None, "plain")),
        ("<think>a</think>b", None, (None, "<think>a</think>b")),
        ("x<|end|>y", "<|end|>", ("x", "y")),
    ],
)
def test_reasoning_is_kept_apart(text: str, end: str | None, expected: tuple[str | None, str]) -> None:
    assert split_reasoning(text, end) == expected


def test_after_an_engines_error_nothing_more_of_the_unit_is_asked(
    engine: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    async def generate(request: Request) -> Completion:
        asked.append(len(asked))
        await asyncio.sleep(0)
        if len(asked) > 10:
            raise TransientError("the endpoint is out")
        return Completion("yes", "stop", 1, 1)

    monkeypatch.setattr(engine, "generate", generate)

    async def through() -> None:
        stage = policy(max_num_seqs=2)
        with pytest.raises(TransientError):
            await anext(stage(unit_of([str(number) for number in range(100)])))
        await asyncio.sleep(0.05)

    asyncio.run(through())
    assert 10 < len(asked) <= 14


def test_rows_count_as_they_are_made_and_not_with_their_unit(engine: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit may take half an hour: the time left is told from what is done of it."""
    stage = policy(max_num_seqs=2)
    seen: list[int] = []

    async def generate(request: Request) -> Completion:
        await asyncio.sleep(0)
        seen.append(stage._now().num_rows)
        return Completion("yes", "stop", 1, 1)

    monkeypatch.setattr(engine, "generate", generate)
    run(unit_of([str(number) for number in range(20)]), stage)
    assert seen == sorted(seen)
    assert len(set(seen)) > 4
    assert stage._now().num_rows == 20


@pytest.mark.usefixtures("engine")
def test_a_mistake_found_by_the_engine_is_told_with_the_first_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray prints what a constructor raises, and its retries, before anyone here can make one line of it."""

    def build(config: EngineConfig, *arguments: Any) -> Any:
        raise ConfigError("the model is wrong")

    monkeypatch.setattr("actors.pool.build_engine", build)
    stage = policy()
    with pytest.raises(ConfigError, match="the model is wrong"):
        run(unit_of(["a"]), stage)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"engine": "torch", "num_gpus": 2},
            r"num_gpus=2 does not go with tensor_parallel_size=1: .* set num_gpus=1 or tensor_parallel_size=2$",
        ),
        (
            {"engine": "vllm", "num_gpus": 1, "tensor_parallel_size": 2},
            r"num_gpus=1 does not go with .*; set num_gpus=2 or tensor_parallel_size=1$",
        ),
    ],
)
def test_a_replica_has_as_many_gpus_as_shards(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(model="m", **keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"engine": "torch", "num_gpus": 1},
        {"engine": "vllm", "num_gpus": 4, "tensor_parallel_size": 4},
        {"engine": "vllm", "tensor_parallel_size": 2},  # processes on a CPU
        {"engine": "stored", "num_gpus": 2},  # without a model it is for the user to say why
        {"engine": "openai", "num_gpus": 2},
    ],
)
def test_gpus_that_go_with_the_shards_or_hold_no_model_are_taken(keys: dict[str, Any]) -> None:
    assert PolicyConfig(model="m", **keys).num_gpus == keys.get("num_gpus", 0)
