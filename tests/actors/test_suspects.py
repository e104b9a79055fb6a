"""Rows that kill what they run in, again and again: found and failed across lives of the actor and of the job."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

import actors.pool
from actors.contract import PROBLEM, PROMPT, TransientError, pack, unpack
from actors.engines.base import Completion, EngineConfig, EngineStats, Request
from actors.engines.hosted import MAX_STARTS, HostedEngine
from actors.policy import PolicyConfig, PolicyStage
from actors.suspects import Note
from tests.actors.test_stages import Kept, Reports


class Death(BaseException):
    """The end of the actor."""


class Deadly(HostedEngine):
    """In the actor's own process: what kills it kills the actor. Says how many requests ran beside each."""

    def __init__(self, kills: Callable[[str], bool], dying: Callable[[], None]) -> None:
        self.kills, self.dying = kills, dying
        self.asked, self.crowds = list[str](), list[int]()
        self.num_running = 0
        self._harmless = Request("Hello", 0)

    async def generate(self, request: Request) -> Completion:
        text = request.prompt if isinstance(request.prompt, str) else request.prompt[-1][1]
        self.num_running += 1
        await asyncio.sleep(0)
        self.asked.append(text)
        self.crowds.append(self.num_running)
        if self.kills(text):
            self.dying()
            raise Death
        await asyncio.sleep(0.001)
        self.num_running -= 1
        return Completion(text.upper(), "stop", 1, 1)

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0)


class Lives:
    """One actor after the other, given the same units, until one of them comes through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kills: Callable[[str], bool], notes: Kept) -> None:
        self.notes, self.kills, self.num_deaths = notes, kills, 0
        self.engines: list[Deadly] = []
        self.in_flight: tuple[str, ...] = ()
        monkeypatch.setattr(actors.pool, "Reporter", Reports)
        monkeypatch.setattr(actors.pool, "build_engine", self._build)
        monkeypatch.setattr(actors.pool, "units_before", lambda board, pool: self.in_flight)

    def _build(self, config: EngineConfig, *arguments: Any) -> Deadly:
        self.engines.append(Deadly(self.kills, self._dying))
        return self.engines[-1]

    def _dying(self) -> None:
        self.in_flight = tuple(self.stage._units)

    def live(self, *units: Any) -> list[list[dict[str, Any]]]:
        """Raises Death."""

        async def through(stage: PolicyStage, unit: Any) -> list[dict[str, Any]]:
            (made,) = [made async for made in stage(unit)]
            rows: list[dict[str, Any]] = unpack(made).to_pylist()
            return rows

        async def all_through() -> list[list[dict[str, Any]]]:
            self.stage = stage = PolicyStage(
                PolicyConfig(model="m", max_num_seqs=64), run_seed=7, name="policy", board=None, sharers=1,
                notes=self.notes, max_attempts=3,
            )  # fmt: skip
            tasks = [asyncio.ensure_future(through(stage, unit)) for unit in units]
            return list(await asyncio.gather(*tasks))

        return asyncio.run(all_through())

    def until_through(self, *units: Any, most: int = 100) -> list[list[dict[str, Any]]]:
        for _ in range(most):
            with contextlib.suppress(Death):
                return self.live(*units)
            self.num_deaths += 1
        raise AssertionError(f"the actor died {most} times")


def unit(name: str, num_rows: int, *poison: int) -> pa.Table:
    texts = [f"poison {row}" if row in poison else f"{name}{row}" for row in range(num_rows)]
    chats = pa.array([[{"role": "user", "content": text}] for text in texts], PROMPT)
    ids = [f"id-{name}{row}" for row in range(num_rows)]
    return pack(pa.table({"prompt_id": ids, "prompt": chats, "problem": pa.nulls(num_rows, PROBLEM)}), unit=name)


def is_poison(text: str) -> bool:
    return "poison" in text


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["responses"][0]["text"] or row["responses"][0]["error"] for row in rows]


CRASH = "engine_crash (3 attempts): the engine died 3 times while it ran this request alone"


def well(name: str, num_rows: int, *poison: int) -> list[str]:
    """What becomes of the rows of `unit`."""
    return [CRASH if row in poison else f"{name}{row}".upper() for row in range(num_rows)]


@pytest.fixture
def notes() -> Kept:
    return Kept()


def test_a_row_that_kills_its_actor_fails_alone_and_its_neighbours_are_answered(
    monkeypatch: pytest.MonkeyPatch, notes: Kept
) -> None:
    lives = Lives(monkeypatch, is_poison, notes)
    made = lives.until_through(unit("a", 256, 17), unit("b", 256))
    assert [texts(rows) for rows in made] == [well("a", 256, 17), well("b", 256)]
    assert lives.num_deaths == 1 + 8 + 3  # with both units, the unit alone and its halves, the row alone
    assert {unit for unit, _ in notes.notes} == {"a"}, "the verdict is kept, should the unit have to be redone"


def test_two_rows_that_kill_are_both_found(monkeypatch: pytest.MonkeyPatch, notes: Kept) -> None:
    (rows,) = Lives(monkeypatch, is_poison, notes).until_through(unit("a", 16, 3, 12))
    assert texts(rows) == well("a", 16, 3, 12)


def test_suspects_run_alone_and_ever_fewer_at_once(monkeypatch: pytest.MonkeyPatch, notes: Kept) -> None:
    lives = Lives(monkeypatch, is_poison, notes)
    lives.until_through(unit("a", 8, 5), unit("b", 8))
    assert max(lives.engines[0].crowds) == 16
    assert all(max(engine.crowds) <= 8 for engine in lives.engines[1:])
    beside = [engine.crowds[engine.asked.index("poison 5")] for engine in lives.engines[:-1]]
    assert beside[2:] == sorted(beside[2:], reverse=True)
    assert beside[-3:] == [1, 1, 1]


def test_a_job_that_is_killed_in_between_goes_on_with_what_is_noted(
    monkeypatch: pytest.MonkeyPatch, notes: Kept
) -> None:
    lives = Lives(monkeypatch, is_poison, notes)
    with pytest.raises(Death):
        lives.live(unit("a", 16, 9))
    rows: list[dict[str, Any]] = []
    for _ in range(4 + 3 + 1):  # the actor dies of it and is started again, and then the job is killed
        with contextlib.suppress(Death):
            (rows,) = lives.live(unit("a", 16, 9))
            break
        lives.in_flight = ()  # the next job's board is new,
        notes.at_start = dict(notes.notes)  # and it has read the notes
    assert texts(rows) == well("a", 16, 9)


def test_a_verdict_is_remembered_when_the_unit_is_redone(monkeypatch: pytest.MonkeyPatch, notes: Kept) -> None:
    lives = Lives(monkeypatch, is_poison, notes)
    lives.until_through(unit("a", 4, 2))
    notes.at_start = dict(notes.notes)
    lives.in_flight = ()
    (rows,) = lives.live(unit("a", 4, 2))
    assert texts(rows) == well("a", 4, 2)
    assert "poison 2" not in lives.engines[-1].asked


def test_deaths_from_outside_condemn_nobody_and_leave_no_note(monkeypatch: pytest.MonkeyPatch, notes: Kept) -> None:
    countdown = iter([False] * 5 + [True] + [False] * 10_000)
    lives = Lives(monkeypatch, lambda text: next(countdown), notes)
    made = lives.until_through(unit("a", 8), unit("b", 8))
    assert [texts(rows) for rows in made] == [well("a", 8), well("b", 8)]
    assert lives.num_deaths == 1
    assert not notes.notes


def test_without_a_death_nothing_is_written(monkeypatch: pytest.MonkeyPatch, notes: Kept) -> None:
    Lives(monkeypatch, is_poison, notes).live(unit("a", 8), unit("b", 8))
    assert not notes.written


def test_an_actor_that_dies_of_everything_is_an_outage_and_condemns_nobody(
    monkeypatch: pytest.MonkeyPatch, notes: Kept
) -> None:
    lives = Lives(monkeypatch, lambda text: True, notes)
    with pytest.raises(TransientError, match="dies of harmless requests too, 3 times over"):
        lives.until_through(unit("a", 8), most=1 + MAX_STARTS + 1)
    assert not any(note["kills"] for note in notes.written)
    lives.kills = lambda text: False  # the node is well again
    lives.in_flight = ()
    notes.at_start = dict(notes.notes)
    (rows,) = lives.live(unit("a", 8))
    assert texts(rows) == well("a", 8)
    assert not notes.notes


def test_notes_that_are_lost_or_spoilt_do_no_harm(monkeypatch: pytest.MonkeyPatch, notes: Kept) -> None:
    spoilt = [None, "x", {}, {"groups": [[0, 1], [1]], "running": True, "kills": {}, "num_proofs": 0}]
    lives = Lives(monkeypatch, is_poison, notes)
    for note in spoilt:
        with pytest.raises(Death):
            lives.live(unit("a", 4, 1))
        notes.notes = {("a", "policy"): note}
    (rows,) = lives.until_through(unit("a", 4, 1))
    assert texts(rows) == well("a", 4, 1)


@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_every_death_parts_the_rows_further_until_none_that_kills_is_left(num_rows: int) -> None:
    note = Note.of(num_rows)
    num_deaths = 0
    while note.groups:
        note = note.trying(note.groups[0]).after_death(3)
        assert Note.parse(note.as_json(), num_rows) == note
        num_deaths += 1
    assert note.kills == dict.fromkeys(range(num_rows), 3)
    assert num_deaths == 3 * num_rows + num_rows - 1


@pytest.mark.parametrize("groups", [[[1, "a"]], [[[0]], [1]], [0, 1], None, [[0], [0, 1]]])
def test_a_note_that_a_person_has_edited_is_none(groups: Any) -> None:
    assert Note.parse({**Note.of(2).as_json(), "groups": groups}, 2) is None
