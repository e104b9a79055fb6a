"""The unit table's packed form, seeds, and bounds of config keys."""

import pickle
from types import SimpleNamespace

import pyarrow as pa
import pytest

from actors.contract import ConfigError, RowError, candidate_seed, label, pack, refuse_unless, unpack, with_columns


def unit_of(num_rows: int) -> pa.Table:
    return pa.table(
        {
            "prompt_id": [f"p{row}" for row in range(num_rows)],
            "prompt": pa.array([[{"role": "user", "content": "x"}]] * num_rows),
            "kept": pa.chunked_array([[1.5] * (num_rows // 2), [2.5] * (num_rows - num_rows // 2)], pa.float64()),
        }
    )


@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_a_packed_unit_is_one_row_and_unpacks_to_the_same_table(num_rows: int) -> None:
    packed = pack(unit_of(num_rows), unit="u", shard="s")
    assert packed.num_rows == 1
    assert unpack(packed).equals(unit_of(num_rows).combine_chunks())
    assert (label(packed, "unit"), label(packed, "shard")) == ("u", "s")


def test_a_kept_column_may_be_called_like_an_argument() -> None:
    assert unpack(pack(pa.table({"rows": [1, 2]}), unit="u")).column_names == ["rows"]


def test_a_sliced_unit_packs_only_its_slice() -> None:
    assert unpack(pack(unit_of(7).slice(2, 3), unit="u")).equals(unit_of(7).slice(2, 3).combine_chunks())


def test_two_units_in_one_call_are_refused() -> None:
    two = pa.concat_tables([pack(unit_of(2), unit="a"), pack(unit_of(2), unit="b")])
    with pytest.raises(ValueError, match="one unit at a time, got 2"):
        unpack(two)


def test_a_column_is_added_and_replaced() -> None:
    packed = with_columns(pack(unit_of(3), unit="u"), {"new": pa.array([1, 2, 3])})
    packed = with_columns(packed, {"new": pa.array([4, 5, 6])})
    assert unpack(packed)["new"].to_pylist() == [4, 5, 6]


def test_seeds_differ_by_run_stage_candidate_and_prompt_and_by_nothing_else() -> None:
    seeds = {
        candidate_seed(run, prompt, number, stage)
        for run in (0, 1)
        for prompt in ("a", "b", "1")
        for number in (0, 1, 11)
        for stage in ("policy", "aligner")
    }
    assert len(seeds) == 36
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert candidate_seed(0, "a", 0, "policy") == 1591865592449251193  # another value would be another corpus


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RowError("prompt_too_long", "9 tokens: too many"), "prompt_too_long: 9 tokens: too many"),
        (
            RowError("engine_crash", "(2 attempts): died\nand died", 3),
            "engine_crash (3 attempts): (2 attempts): died\nand died",
        ),
        (RowError("no_candidate", ""), "no_candidate: "),
    ],
)
def test_a_row_error_is_read_back_from_its_text(error: RowError, text: str) -> None:
    assert str(error) == text
    found = RowError.parse(text)
    assert (found.cause, found.message, found.attempts) == (error.cause, error.message, error.attempts)
    assert pickle.loads(pickle.dumps(error)).attempts == error.attempts


@pytest.mark.parametrize(
    ("bound", "least", "below"),
    [("more than 0", 0.5, 0), ("0 or more", 0, -0.5), ("1 or more", 1, 0.5), ("at least 1", 1, 0)],
)
def test_a_number_out_of_its_bound_is_refused(bound: str, least: float, below: float) -> None:
    refuse_unless(SimpleNamespace(one=least, none=None), bound, "one", "none")
    with pytest.raises(ConfigError, match=f"^two must be {bound}, got {below}$"):
        refuse_unless(SimpleNamespace(one=least, two=below), bound, "one", "two")
