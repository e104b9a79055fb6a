"""What became of scoring: counts, the first of each failure, and when so many failures are not published."""

from typing import Any

import pyarrow as pa
import pytest

from actors.contract import REWARD_NOTES
from pipelines.corpus.card import corpus_card
from pipelines.corpus.scored import failures, noted, refusal, summed


def note(reward: str, note: str, message: str | None = None) -> dict[str, str | None]:
    return {"reward": reward, "note": note, "message": message}


def unit(*notes: list[dict[str, str | None]] | None) -> dict[str, Any]:
    ids = [f"p{number}" for number in range(len(notes))]
    return noted(pa.table({"prompt_id": ids, "reward_notes": pa.array(notes, REWARD_NOTES)}))


FAILED = note("m: 2", "reward_failed", "f: ValueError: line\nbreak \x1b[31mred")
UNITS = [
    unit(None, [note("m: 2", "scored"), FAILED], [note("m: 2", "reward_failed", "another")]),
    unit([note("m: 2", "prompt_too_long", "9 tokens"), note("judge", "scored"), note("judge", "judged_tie")]),
]


def test_notes_are_counted_and_the_first_failure_of_each_cause_is_kept_in_one_line() -> None:
    assert UNITS[0] == {
        "reward_notes": {"m: 2: scored": 1, "m: 2: reward_failed": 2},
        "unscored": {"m: 2: reward_failed": {"prompt_id": "p1", "message": "f: ValueError: line break \\x1b[31mred"}},
    }
    told = summed([*UNITS, unit([FAILED]), {}])
    assert told["reward_notes"]["m: 2: reward_failed"] == 3
    assert told["unscored"]["m: 2: reward_failed"]["prompt_id"] == "p1"
    assert failures(told) == {"m: 2": {"reward_failed": 3, "prompt_too_long": 1}}, "the most frequent first"


def test_a_corpus_that_is_not_scored_has_no_notes() -> None:
    assert noted(pa.table({"prompt_id": ["p"]})) == {"reward_notes": {}, "unscored": {}}
    assert summed([{}]) == {"reward_notes": {}, "unscored": {}}


@pytest.mark.parametrize(("most", "is_refused"), [(0.5, True), (0.74, True), (0.75, False), (1.0, False)])
def test_a_plan_is_refused_where_more_of_the_texts_have_no_score(most: float, is_refused: bool) -> None:
    told = refusal(summed(UNITS), most)
    assert (told is not None) == is_refused
    if told:
        assert told.startswith(
            f"reward m: 2: 3 of 4 texts have no score, more than run.max_unscored_fraction={most:g} allows; nothing is "
            "published. The first is reward_failed of p1: f: ValueError"
        )


def test_the_card_tells_what_was_not_scored_beside_the_means() -> None:
    manifest: dict[str, Any] = dict.fromkeys(("num_ok", "num_quarantined", "num_repeated_ids"), 3)
    manifest |= {"number": 1, "corpus": [], "quarantine": [], "finished_shards": [], "fingerprints": []}
    means = {"judge": {"num_candidates": 2, "response": 0.5, "aligned": 0.75}}
    card = corpus_card("t", [manifest | {"rewards": means} | summed(UNITS)], None)
    assert "| run=000001 | judge | 2 | 0.5 | 0.75 | 0 |" in card.splitlines()
    assert "| run=000001 | m: 2 | 0 | | | 2 reward_failed, 1 prompt_too_long |" in card.splitlines()


def test_a_reward_that_scored_nothing_is_refused_by_any_share_but_1() -> None:
    plan = summed([unit([note("r", "scored")], [note("s", "reward_failed", "no")])])
    assert str(refusal(plan, 0.99)).startswith("reward s: 1 of 1 texts have no score")
    assert refusal(plan, 1.0) is None
