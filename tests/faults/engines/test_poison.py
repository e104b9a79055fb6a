"""A row that kills what it runs in, every time, through the command line: that row alone is quarantined, and soon.

What is compared with is known beforehand: the deadly engine answers in capitals.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.jobs import CommandLine, by_place, corpus, quarantine, write_shard

UNIT_ROWS, NUM_UNITS = 8, 3


def poison(unit_rows: int) -> int:
    """The row that kills, in the second unit."""
    return unit_rows + 5


def arguments(tmp_path: Path, model: Path, word: str, unit_rows: int = UNIT_ROWS) -> list[str]:
    """A job of three units, in the second of which a row holds `word`."""
    numbers = range(NUM_UNITS * unit_rows)
    texts = [f"{word} {row}" if row == poison(unit_rows) else f"row {row}" for row in numbers]
    write_shard(tmp_path / "in" / "a.parquet", {"prompt": texts, "other": texts}, row_group_size=unit_rows)
    return [
        f"input.path={tmp_path / 'in'}",
        f"output.root={tmp_path / 'out'}",
        f"policy.model={model}",
        "aligner=identity",
        f"run.unit_rows={unit_rows}",
    ]


def check(root: Path, word: str, unit_rows: int = UNIT_ROWS) -> None:
    """Every row is there exactly once, as it should be, and no note is left."""
    rows, killer = by_place(corpus(root)), poison(unit_rows)
    assert [row["source"]["row"] for row in rows] == [row for row in range(NUM_UNITS * unit_rows) if row != killer]
    assert [row["aligned"][0]["text"] for row in rows] == [f"ROW {row['source']['row']}" for row in rows]
    (bad,) = quarantine(root)
    assert (bad["source"]["row"], bad["stage"], bad["cause"], bad["attempts"]) == (killer, "policy", "engine_crash", 3)
    assert json.loads(bad["input"]) == {"prompt": f"{word} {killer}", "other": f"{word} {killer}"}
    assert not list((root / "attempts").glob("*"))


def deaths(model: Path) -> list[int]:
    """How many requests were running at each death."""
    return [int(line.split()[0]) for line in (model / "deaths").read_text().splitlines()]


@pytest.mark.parametrize(
    ("word", "unit_rows"), [("KILL-ENGINE", 256), pytest.param("KILL-ACTOR", 8, marks=pytest.mark.long)]
)
def test_a_row_that_kills_every_time_is_quarantined_alone(
    word: str, unit_rows: int, command_line: CommandLine, model: Path, tmp_path: Path
) -> None:
    completed = command_line.run(*arguments(tmp_path, model, word, unit_rows)).expect(0)
    assert f"{NUM_UNITS * unit_rows - 1} ok + 1 quarantined (1 engine_crash)" in completed.stdout
    check(tmp_path / "out", word, unit_rows)
    assert deaths(model)[-3:] == [1, 1, 1]
    halvings = (2 * unit_rows).bit_length() - 1  # of two units, which ran beside each other
    assert len(deaths(model)) <= 2 + halvings + 3  # with others, their units, halves of them, alone
    owners = (model / "starts").read_text().split()
    if word == "KILL-ENGINE":
        assert len(owners) == len(deaths(model)) + 1
        assert len(set(owners)) == 1, "the actor was lost"
    else:
        assert len(set(owners)) > 3


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
        (note,) = (tmp_path / "out" / "attempts").glob(f"*-{UNIT_ROWS:010d}-*.json")  # of the second unit
        found.append(json.loads(note.read_text())["policy"])
    smallest = [min(len(group) for group in each["groups"] if poison(UNIT_ROWS) - UNIT_ROWS in group) for each in found]
    assert smallest == sorted(smallest, reverse=True)
    assert smallest[-1] < smallest[0]
    command_line.run(*command).expect(0)
    check(tmp_path / "out", word)
    assert deaths(model).count(1) <= 3 + len(found)  # one more for each job that was killed before it could note one
