"""Mistakes that an exporter could make, each made on purpose: the tests of what it makes must find every one."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines.preferences.exporters import EXPORTERS
from tests.pipelines.preferences import test_exporters as expected

Change = Callable[[pa.Table], pa.Table]


def put(table: pa.Table, **columns: Any) -> pa.Table:
    """The table with other values in these columns."""
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.chunked_array(values, table.schema.field(at).type))
    return table


def each(table: pa.Table, change: Callable[[Any], Any], *names: str) -> pa.Table:
    """The table with every value of these columns changed."""
    return put(table, **{name: [[change(value) for value in table[name].to_pylist()]] for name in names})


def sides(table: pa.Table) -> list[str]:
    return [name for name in ("chosen", "rejected", "completion") if name in table.column_names]


# --- mistakes with what it is given ---------------------------------------------------------------------------------


def sides_swapped(table: pa.Table) -> pa.Table:
    return put(table, chosen=table["rejected"].chunks, rejected=table["chosen"].chunks)


def one_side_twice(table: pa.Table) -> pa.Table:
    return put(table, rejected=table["chosen"].chunks)


def last_turn_lost(table: pa.Table) -> pa.Table:
    return each(table, lambda chat: chat[:-1] or chat, "prompt")


def system_message_lost(table: pa.Table) -> pa.Table:
    return each(table, lambda chat: [turn for turn in chat if turn["role"] != "system"], "prompt")


def turns_in_another_order(table: pa.Table) -> pa.Table:
    return each(table, lambda chat: chat[::-1], "prompt")


def answer_cut(table: pa.Table) -> pa.Table:
    return each(table, lambda text: text[:-1], *sides(table))


def answer_of_another_row(table: pa.Table) -> pa.Table:
    shifted = {name: table[name].to_pylist() for name in sides(table)}
    return put(table, **{name: [[texts[-1], *texts[:-1]]] for name, texts in shifted.items()})


def kept_column_lost(table: pa.Table) -> pa.Table:
    return table.drop_columns(["topic"])


def policies_lost(table: pa.Table) -> pa.Table:
    return table.drop_columns([name for name in table.column_names if name.endswith("policy")])


def rewards_swapped(table: pa.Table) -> pa.Table:
    return put(table, chosen_reward=table["rejected_reward"].chunks, rejected_reward=table["chosen_reward"].chunks)


def margin_turned_round(table: pa.Table) -> pa.Table:
    return each(table, lambda margin: -margin, "margin")


def label_turned_round(table: pa.Table) -> pa.Table:
    return put(table, label=pc.invert(table["label"]).chunks)


def prefix_lost(table: pa.Table) -> pa.Table:
    return each(table, lambda text: "", "prefix")


def whole_answers_for_steps(table: pa.Table) -> pa.Table:
    return put(prefix_lost(table), chosen=table["full_chosen"].chunks, rejected=table["full_rejected"].chunks)


def chosen_for_best(table: pa.Table) -> pa.Table:
    return put(table, best=table["chosen"].chunks)


GIVEN: dict[str, list[Change]] = {
    "pairs": [
        sides_swapped, one_side_twice, last_turn_lost, system_message_lost, turns_in_another_order, answer_cut,
        answer_of_another_row, kept_column_lost, policies_lost, rewards_swapped, margin_turned_round,
    ],
    "unpaired": [
        label_turned_round, last_turn_lost, system_message_lost, turns_in_another_order, answer_cut,
        answer_of_another_row, kept_column_lost, policies_lost,
    ],
    "steps": [sides_swapped, one_side_twice, prefix_lost, whole_answers_for_steps, answer_of_another_row],
    "triple": [chosen_for_best, sides_swapped, one_side_twice],
}  # fmt: skip


# --- mistakes with what it makes ------------------------------------------------------------------------------------


def answers_of_the_user(table: pa.Table) -> pa.Table:
    """Another role for the assistant's messages."""
    roles = {"assistant": "user", "gpt": "human"}

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(item) for item in value]
        if isinstance(value, dict):
            return {name: roles.get(text, text) for name, text in value.items()}
        return value

    rows = [{name: renamed(value) for name, value in row.items()} for row in table.to_pylist()]
    return pa.Table.from_pylist(rows, schema=table.schema)


def column_of_another_name(table: pa.Table) -> pa.Table:
    name = next(name for name in ("chosen", "completion", "conversations") if name in table.column_names)
    return table.rename_columns([f"{other}s" if other == name else other for other in table.column_names])


MADE: list[Change] = [answers_of_the_user, column_of_another_name]
NONE: Change = lambda table: table  # noqa: E731


def check(export: str, strategy: str) -> None:
    """The test of what the exporter makes of the strategy's examples."""
    if strategy == "steps":
        expected.test_steps_follow_what_both_have_in_common(export)
    elif strategy == "triple":
        expected.test_triple_has_its_best_answer_as_reference()
    else:
        expected.test_row_is_what_the_trainer_reads(export, strategy)


def cases() -> list[Any]:
    found = [(export, strategy) for export, strategy in expected.CASES if strategy in GIVEN]
    given = [(*case, change, NONE) for case in found for change in GIVEN[case[1]]]
    made = [(*case, NONE, change) for case in found if case in expected.MADE for change in MADE]
    return [
        pytest.param(*case, id="-".join([*case[:2], *(change.__name__ for change in case[2:] if change is not NONE)]))
        for case in [*given, *made]
    ]


@pytest.mark.parametrize(("export", "strategy", "before", "after"), cases())
def test_the_comparison_finds(
    export: str, strategy: str, before: Change, after: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(export, strategy)
    right = EXPORTERS[export]
    wrong = right._replace(convert=lambda table: after(right.convert(before(table))))
    monkeypatch.setitem(EXPORTERS, export, wrong)
    with pytest.raises(AssertionError):
        check(export, strategy)
