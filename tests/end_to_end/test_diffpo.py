"""A DiffPO aligner through the real command line: its fixed point is its own greedy answer, made once per prompt; by a
number of iterations each response becomes an answer of its own."""

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from actors.engines.base import DraftingConfig, EngineConfig, Request
from actors.engines.torch_engine import TorchEngine
from tests.end_to_end.conftest import Reference
from tests.end_to_end.jobs import CommandLine, CompletedJob, Row, manifests, partition

NOTE = "The aligned text does not depend on the response"


@dataclass(frozen=True)
class Denoised:
    """A run of `job` whose aligner's recipe is diffpo."""

    completed: CompletedJob
    card: str
    pace: dict[str, Any]
    rows: list[Row]


@pytest.fixture(scope="module")
def denoised(command_line: CommandLine, job: list[str], new_folder: Callable[[], Path]) -> Denoised:
    return finished(command_line, job, new_folder() / "output")


@pytest.fixture(scope="module")
def iterated(command_line: CommandLine, job: list[str], new_folder: Callable[[], Path]) -> Denoised:
    return finished(command_line, job, new_folder() / "output", "aligner.max_iterations=2", "aligner.block_size=16")


def finished(command_line: CommandLine, job: list[str], root: Path, *more: str) -> Denoised:
    command = [*job, f"output.root={root}", "aligner.recipe=diffpo", "run.task_mib=1", *more]
    completed = command_line.run(*command).expect(0)
    pace = json.loads((root / "runs" / "000001-pace.json").read_bytes())
    rows = [row for manifest in manifests(root) for row in partition(root, manifest, "corpus")]
    return Denoised(completed, (root / "README.md").read_text(), pace, rows)


def chat_of(row: Row) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in row["prompt"])


def answers(config: EngineConfig, requests: list[Request]) -> list[str]:
    """What an engine makes of them in this process."""

    async def answer() -> list[str]:
        made = await asyncio.gather(*map(engine.generate, requests))
        return [completion.text.strip() for completion in made]

    engine = TorchEngine(config, num_threads=1)
    try:
        return asyncio.run(answer())
    finally:
        engine.close()


def greedy_answers(model: Path, rows: list[Row]) -> list[str]:
    """What the aligner's model answers to the prompts by itself, one token at a time."""
    config = EngineConfig(model=str(model), max_tokens=16, dtype="float32", device="cpu")
    return answers(config, [Request(chat_of(row), seed=0) for row in rows])


def well(row: Row) -> list[Row]:
    """The aligned candidates of a row but for those whose response had failed."""
    return [each for each in row["aligned"] if each["status"] == "ok"]


def test_the_fixed_point_is_the_greedy_answer_to_the_prompt(denoised: Denoised, tiny_llama: Path) -> None:
    texts = [{each["text"] for each in well(row)} for row in denoised.rows]
    assert texts == [{text} for text in greedy_answers(tiny_llama, denoised.rows)]
    assert len(set.union(*texts)) == 36


def test_every_candidate_has_an_entry_of_its_own(denoised: Denoised, reference: Reference) -> None:
    for row, other in zip(denoised.rows, reference.rows, strict=True):
        assert row["responses"] == other["responses"]
        for each, response in zip(row["aligned"], row["responses"], strict=True):
            assert each["status"] == response["status"]
            assert each["changed"] == (each["text"] != response["text"] if each["status"] == "ok" else None)
        assert [each["seed"] for each in row["aligned"]] == [each["seed"] for each in other["aligned"]]


def test_what_candidates_share_was_made_once(denoised: Denoised) -> None:
    assert sum(len(well(row)) for row in denoised.rows) > 64
    num_tokens = sum(well(row)[0]["num_tokens"] for row in denoised.rows)
    assert denoised.pace["pools"]["aligner"]["num_tokens"] == num_tokens
    assert all(each["iterations"] is each["accepted"] is None for row in denoised.rows for each in well(row)[1:])


def test_the_summary_and_the_card_say_that_no_response_matters(denoised: Denoised, reference: Reference) -> None:
    assert f"\nnote: {NOTE}" in denoised.completed.stdout
    assert f"\n{NOTE}" in denoised.card
    assert NOTE not in reference.completed.stdout + (reference.root / "README.md").read_text()


def test_what_the_decoder_took_is_recorded_and_summed_up(denoised: Denoised) -> None:
    made = [well(row)[0] for row in denoised.rows]
    assert all(1 <= each["iterations"] <= each["num_tokens"] + 2 for each in made)
    assert all(0 <= each["accepted"] <= each["num_tokens"] for each in made)
    mean = sum(each["num_tokens"] for each in made) / sum(each["iterations"] for each in made)
    assert f"\naligner: {mean:.2f} tokens per forward pass and answer, " in denoised.completed.stdout
    (bins,) = re.findall(r"^aligner: answers by forward passes: (.*)$", denoised.completed.stdout, re.MULTILINE)
    assert sum(int(part.partition(" in ")[0]) for part in bins.split(", ")) == 36


def test_a_number_of_iterations_makes_of_each_response_what_the_engine_alone_does(
    iterated: Denoised, denoised: Denoised, tiny_llama: Path
) -> None:
    pairs = [
        (row, response["text"], each)
        for row in iterated.rows
        for response, each in zip(row["responses"], row["aligned"], strict=True)
        if each["status"] == "ok"
    ]
    config = DraftingConfig(
        model=str(tiny_llama), max_tokens=16, block_size=16, max_iterations=2, dtype="float32", device="cpu"
    )
    expected = answers(config, [Request(chat_of(row), 0, response) for row, response, _ in pairs])
    assert [each["text"] for _, _, each in pairs] == expected
    assert all(1 <= each["iterations"] <= 2 for _, _, each in pairs)
    assert any(len({each["text"] for each in well(row)}) > 1 for row in iterated.rows), "responses matter"
    assert [[each["text"] for each in well(row)] for row in iterated.rows] != [
        [each["text"] for each in well(row)] for row in denoised.rows
    ]


def test_where_responses_matter_no_note_says_that_they_do_not(iterated: Denoised) -> None:
    assert NOTE not in iterated.completed.stdout + iterated.card
