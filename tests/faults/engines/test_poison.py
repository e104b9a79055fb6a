"""A row that kills what it runs in, every time, through the command line: that row alone is quarantined, and soon.

What is compared with is known beforehand: the deadly engine answers in capitals.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.jobs import CommandLine, by_place, corpus, quarantine, write_shard

NUM_ROWS, UNIT_ROWS, POISON = 24, 8, 13


def arguments(tmp_path: Path, model: Path, word: str) -> list[str]:
    """A job of three units, in the second of which a row holds `word`."""
    texts = [f"{word} {row}" if row == POISON else f"row {row}" for row in range(NUM_ROWS)]
    write_shard(tmp_path / "in" / "a.parquet", {"prompt": texts, "other": texts}, row_group_size=UNIT_ROWS)
    return [
        f"input.path={tmp_path / 'in'}",
        f"output.root={tmp_path / 'out'}",
        f"policy.model={model}",
        "aligner=identity",
        f"run.unit_rows={UNIT_ROWS}",
    ]


def check(root: Path, word: str) -> None:
    """Every row is there exactly once, as it should be, and no note is left."""
    rows = by_place(corpus(root))
    assert [row["source"]["row"] for row in rows] == [row for row in range(NUM_ROWS) if row != POISON]
    assert [row["aligned"][0]["text"] for row in rows] == [f"ROW {row['source']['row']}" for row in rows]
    (bad,) = quarantine(root)
    assert (bad["source"]["row"], bad["stage"], bad["cause"], bad["attempts"]) == (POISON, "policy", "engine_crash", 3)
    assert json.loads(bad["input"]) == {"prompt": f"{word} {POISON}", "other": f"{word} {POISON}"}
    assert not list((root / "attempts").glob("*"))


def deaths(model: Path) -> list[int]:
    """How many requests were running at each death."""
    return [int(line.split()[0]) for line in (model / "deaths").read_text().splitlines()]


@pytest.mark.parametrize("word", ["KILL-ENGINE", "KILL-ACTOR"])
def test_a_row_that_kills_every_time_is_quarantined_alone(
    word: str, command_line: CommandLine, model: Path, tmp_path: Path
) -> None:
    completed = command_line.run(*arguments(tmp_path, model, word)).expect(0)
    assert "23 ok + 1 quarantined (1 engine_crash)" in completed.stdout
    check(tmp_path / "out", word)
    assert deaths(model)[-3:] == [1, 1, 1]
    assert len(deaths(model)) <= 2 + 4 + 3  # with others, their unit, its halves, alone


@pytest.mark.long
@pytest.mark.parametrize("word", ["KILL-ENGINE", "KILL-ACTOR"])
def test_a_job_that_is_killed_in_between_takes_up_the_search_where_it_was(
    word: str, command_line: CommandLine, model: Path, tmp_path: Path
) -> None:
    command = arguments(tmp_path, model, word)
    found: list[dict[str, Any]] = []
    for num_deaths in (2, 4, 6):
        running = command_line.start(*command)
        running.until(
            lambda least=num_deaths: (model / "deaths").exists() and len(deaths(model)) >= least, "it killed again"
        )
        running.process.kill()
        running.process.wait()
        (note,) = (tmp_path / "out" / "attempts").glob(f"*-{UNIT_ROWS:010d}-*.json")
        found.append(json.loads(note.read_text())["policy"])
    smallest = [min(len(group) for group in each["groups"] if POISON - UNIT_ROWS in group) for each in found]
    assert smallest == sorted(smallest, reverse=True)
    assert smallest[-1] < smallest[0]
    command_line.run(*command).expect(0)
    check(tmp_path / "out", word)
    assert deaths(model).count(1) <= 3 + len(found)  # one more for each job that was killed before it could note one
