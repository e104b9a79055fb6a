"""Each strategy: what it makes of ranked candidates, and why it makes nothing."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.preferences import strategies
from pipelines.preferences.picks import normal
from pipelines.preferences.ranked import rank
from pipelines.preferences.settings import BuildConfig
from pipelines.preferences.strategies.steps import part
from tests.pipelines.preferences.fabricate import Row, candidate, row, table

FOUR = row("four", ["worst", "better"], ["best", "good"], q=([1, 3], [7, 4]))
WRITTEN = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(["Yes", "No", ".", "!", "。", "？", "」", " ", "  ", "\n", "\u3000", "\0", "é"]), max_size=12
).map("".join)
TIED = row("tied", ["a", "b"], ["c", "d"], q=([2, 2], [2, 2]))
SAME = row("same", ["one  text"], ["one text\n"], q=([1], [2]))
LOST = row("lost", ["a"], ["b"], q=([2], [1]))
LONE = row("lone", ["a"], [{**FOUR["aligned"][0], "status": "failed"}], q=([2], [None]))


def made(strategy: str, *rows: Row, **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows that a strategy makes, with `row`, and the causes of the prompts."""
    build = BuildConfig(**{"strategy": strategy, "reward": "q", **options})
    found = rank(table(list(rows)), 1, build, [])
    result = strategies.STRATEGIES[strategy](found.table, build)
    columns = {"row": result.row.tolist(), **{name: column.to_pylist() for name, column in result.columns.items()}}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], [*result.causes]


def sides(rows: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(each[name] for name in names) for each in rows]


@pytest.mark.parametrize("name", strategies.STRATEGIES)
def test_a_strategy_is_a_short_file(name: str) -> None:
    assert len((Path(strategies.__file__).parent / f"{name}.py").read_text().splitlines()) <= 40


def test_pairs_prefer_what_is_aligned_to_its_own_response() -> None:
    rows, causes = made("pairs", FOUR, TIED, SAME, LOST, LONE)
    (pair,) = rows
    assert (pair["chosen"], pair["rejected"], pair["margin"]) == ("best", "worst", 6)
    assert (pair["chosen_kind"], pair["rejected_kind"]) == ("aligned", "response")
    assert (pair["chosen_model"], pair["rejected_model"]) == ("aligner", "policy")
    assert causes == ["", "tie", "same_text", "aligned_lost", "one_candidate"]


def test_every_text_tells_whose_answer_it_is_whatever_made_it() -> None:
    both = [candidate(text, model=policy) for text, policy in (("worst", "small"), ("better", "large"))]
    four = {**FOUR, "responses": both}
    (pair,), _ = made("pairs", four, prefer="best_worst", candidates="aligned")
    assert [pair[f"chosen_{name}"] for name in ("model", "policy", "kind")] == ["aligner", "small", "aligned"]
    assert [pair[f"rejected_{name}"] for name in ("model", "policy", "kind")] == ["aligner", "large", "aligned"]
    hardest = made("curriculum", four)[0][-1]
    assert (hardest["chosen_policy"], hardest["rejected_policy"], hardest["rejected_model"]) == (
        "small", "large", "aligner"
    )  # fmt: skip
    (triple,), _ = made("triple", four)
    assert sides([triple], "best_policy", "chosen_policy", "rejected_policy") == [("small", "large", "small")]
    assert sides([triple], "best_kind", "chosen_model", "rejected_model") == [("aligned", "aligner", "small")]
    (step,), _ = made("steps", four)
    assert sides([step], "chosen_model", "chosen_policy", "rejected_policy", "rejected_kind") == [
        ("aligner", "small", "small", "response")
    ]
    (better,), _ = made("refinement", four)
    assert sides([better], "response_model", "response_policy", "response_kind") == [("small", "small", "response")]
    assert sides([better], "improved_model", "improved_policy", "improved_kind") == [("aligner", "small", "aligned")]
    assert sides(made("unpaired", four)[0], "completion", "model", "policy", "kind") == [
        ("best", "aligner", "small", "aligned"), ("good", "aligner", "large", "aligned"),
        ("better", "large", "large", "response"), ("worst", "small", "small", "response"),
    ]  # fmt: skip
    (listed,), _ = made("ranked", four)
    assert listed["models"] == ["aligner", "aligner", "large", "small"]
    assert listed["policies"] == ["small", "large", "large", "small"]
    (path,), _ = made("trajectory", four)
    assert [path[name] for name in ("models", "policies", "kinds")] == [
        listed[name][::-1] for name in ("models", "policies", "kinds")
    ]
    assert listed["kinds"] == ["aligned", "aligned", "response", "response"]


def test_the_best_aligned_answer_whose_response_is_there_is_compared() -> None:
    cut = {**FOUR["responses"][0], "finish_reason": "length"}
    rows, _ = made("pairs", {**FOUR, "responses": [cut, FOUR["responses"][1]]})
    assert sides(rows, "chosen", "rejected") == [("good", "better")]


def test_the_next_aligned_answer_is_taken_where_the_best_may_not_be_used() -> None:
    unchanged = row("p", ["one", "a"], ["one ", "b"], q=([5, 1], [5, 3]))
    lost = row("q", ["a", "b"], ["c", "d"], q=([9, 1], [8, 2]))
    never = row("r", ["a", "b"], ["a", "d"], q=([9, 1], [9, 1]))
    rows, causes = made("pairs", unchanged, FOUR, lost, never)
    assert sides(rows, "row", "chosen", "rejected", "margin") == [
        (0, "b", "a", 2),
        (1, "best", "worst", 6),
        (2, "d", "b", 1),
    ]
    assert causes == ["", "", "", "same_text"]
    assert sides(made("refinement", unchanged)[0], "improved", "response") == [("b", "a")]
    assert sides(made("steps", unchanged)[0], "chosen", "rejected") == [("b", "a")]


def test_pairs_without_a_reward_have_no_margin() -> None:
    rows, causes = made("pairs", LOST, SAME, reward=None)
    assert sides(rows, "chosen", "rejected", "margin") == [("b", "a", None)]
    assert causes == ["", "same_text"]


def test_pairs_of_the_best_and_the_worst_take_whatever_they_are() -> None:
    rows, causes = made("pairs", FOUR, TIED, LOST, LONE, prefer="best_worst")
    assert sides(rows, "row", "chosen", "rejected") == [(0, "best", "worst"), (2, "a", "b")]
    assert causes == ["", "tie", "", "one_candidate"]


def test_a_random_rejected_answer_goes_by_the_seed_and_the_prompt_alone() -> None:
    many = [{**FOUR, "prompt_id": f"p{number}"} for number in range(40)]
    rows, _ = made("pairs", *many, prefer="best_random")
    assert {each["rejected"] for each in rows} == {"worst", "better", "good"}
    assert {each["chosen"] for each in rows} == {"best"}
    backwards, _ = made("pairs", *reversed(many), prefer="best_random")
    assert [each["rejected"] for each in backwards] == [each["rejected"] for each in reversed(rows)]
    other, _ = made("pairs", *many, prefer="best_random", seed=1)
    assert [each["rejected"] for each in other] != [each["rejected"] for each in rows]


def test_a_random_rejected_answer_is_one_that_can_be_rejected() -> None:
    same = ["best", "best\n", "Best of all."]  # the best itself, and one that is as good
    rewards = ([9, 8.9, 9, 1, 2], [9, 9, 9, 1, 2])
    many = [
        row("p", [*same, "low", "lower"], [*same, "low ", "lower "], f"p{number}", q=rewards) for number in range(40)
    ]
    rows, causes = made("pairs", *many, prefer="best_random", min_margin=0.2)
    assert set(causes) == {""}
    assert {each["rejected"].strip() for each in rows} == {"low", "lower"}
    tied = row("t", ["a", "b", "a"], ["c", "d", "a"], q=([2, 2, 1], [2, 2, 1]))
    assert made("pairs", tied, prefer="best_random")[1] == ["tie"]
    near = row("n", ["a", "b"], ["c", "d"], q=([2, 1], [2, 2]))
    assert made("pairs", near, prefer="best_random", min_margin=1.5)[1] == ["small_margin"]


def test_the_worst_answer_is_the_worst_other_text() -> None:
    doubled = row("p", ["good", "bad"], ["good ", "bad"], q=([5, 2], [1, 2]))
    assert sides(made("pairs", doubled, prefer="best_worst")[0], "chosen", "rejected", "margin") == [("good", "bad", 3)]


def test_a_margin_is_not_too_small_by_rounding() -> None:
    exact = row("p", ["a"], ["b"], q=([0.2], [0.3]))
    assert made("pairs", exact, min_margin=0.1)[1] == [""]
    assert made("pairs", exact, min_margin=0.1000001)[1] == ["small_margin"]
    assert made("unpaired", exact, min_margin=0.1, threshold=0.3)[1] == [""]


def test_margins_and_lengths_that_are_too_small_or_too_large_are_refused() -> None:
    assert made("pairs", FOUR, min_margin=6.0)[1] == [""]
    assert made("pairs", FOUR, min_margin=6.5)[1] == ["small_margin"]
    long = row("long", ["one two three"], ["one"], q=([1], [2]))
    assert made("pairs", long, max_length_ratio=3.0)[1] == [""]
    assert made("pairs", long, max_length_ratio=2.9)[1] == ["length_ratio"]


def test_lengths_that_were_not_counted_alike_are_not_compared() -> None:
    stored = candidate("ten chars.", num_tokens=None, finish_reason=None)
    aligned = candidate("twelve chars", num_tokens=2)
    mixed = row("mixed", [stored], [aligned], q=([1], [2]))
    assert made("pairs", mixed, max_length_ratio=1.2)[1] == [""]
    assert made("pairs", mixed, max_length_ratio=1.1)[1] == ["length_ratio"]
    assert made("pairs", mixed, length_slope=0.25)[0][0]["margin"] == 1 - 0.25 * 2


def test_curriculum_goes_from_the_largest_margin_to_the_smallest() -> None:
    rows, causes = made("curriculum", FOUR, TIED, LOST)
    assert sides(rows, "row", "phase", "chosen", "rejected", "margin") == [
        (0, 1, "best", "worst", 6), (0, 2, "best", "better", 4), (0, 3, "best", "good", 3), (2, 1, "a", "b", 1)
    ]  # fmt: skip
    assert causes == ["", "tie", ""]
    assert sides(made("curriculum", FOUR, num_phases=2, min_margin=4.0)[0], "phase", "margin") == [(1, 6), (2, 4)]


def test_curriculum_spreads_its_phases_from_the_easiest_pair_to_the_hardest() -> None:
    many = row("p", ["0", "1", "2", "3"], ["4", "5", "6", "7"], q=([0, 1, 2, 3], [4, 5, 6, 7]))

    def rejected(**options: Any) -> list[str]:
        rows, _ = made("curriculum", many, **options)
        assert [each["phase"] for each in rows] == list(range(1, len(rows) + 1))
        assert {each["chosen"] for each in rows} == {"7"}
        return [each["rejected"] for each in rows]

    assert rejected() == ["0", "3", "6"]
    assert rejected(min_margin=3.0) == ["0", "2", "4"]
    assert rejected(num_phases=1) == ["0"]
    assert rejected(num_phases=2) == ["0", "6"]
    assert rejected(num_phases=20) == ["0", "1", "2", "3", "4", "5", "6"]


def test_triple_takes_the_best_the_second_and_the_worst() -> None:
    two_best = row("two", ["a", "b"], ["c", "d"], q=([2, 2], [1, 0]))
    rows, causes = made("triple", FOUR, two_best, LOST)
    assert sides(rows, "row", "best", "chosen", "rejected") == [(0, "best", "good", "worst")]
    assert sides(rows, "best_reward", "chosen_reward", "rejected_reward", "margin") == [(7, 4, 1, 3)]
    assert causes == ["", "tie", "one_candidate"]


def test_unpaired_labels_go_by_a_threshold_or_by_the_mean_of_the_prompt() -> None:
    rows, causes = made("unpaired", FOUR, TIED)
    assert sides(rows, "completion", "label") == [("best", True), ("good", True), ("better", False), ("worst", False)]
    assert causes == ["", "tie"]
    rows, causes = made("unpaired", FOUR, TIED, threshold=4.0)
    assert sides(rows, "completion", "label")[:4] == [
        ("best", True), ("good", True), ("better", False), ("worst", False)
    ]  # fmt: skip
    assert causes == ["", ""]
    assert sides(made("unpaired", FOUR, threshold=4.0, min_margin=2.0)[0], "completion") == [("best",), ("worst",)]


def test_a_lone_answer_is_no_tie_with_itself() -> None:
    assert made("unpaired", LONE) == ([], ["one_candidate"])
    assert made("unpaired", LONE, threshold=1.0)[1] == [""]


def test_ranked_has_every_text_once_with_its_rank() -> None:
    doubled = row("doubled", ["a", "b", "a "], ["c", "d", "e"], q=([1, 5, 5], [5, 3, 3]))
    rows, causes = made("ranked", doubled, TIED, LONE)
    (one,) = rows
    assert list(zip(one["completions"], one["rewards"], one["ranks"], strict=True)) == [
        ("c", 5, 1), ("b", 5, 1), ("a ", 5, 1), ("d", 3, 4), ("e", 3, 4)
    ]  # fmt: skip
    assert causes == ["", "tie", "one_candidate"]


def test_trajectory_rises_and_takes_one_text_of_each_reward() -> None:
    stairs = row("stairs", ["a", "b"], ["c", "d"], q=([1, 1], [0, 2]))
    rows, causes = made("trajectory", stairs, FOUR, TIED)
    assert sides(rows, "row", "states", "rewards") == [
        (0, ["c", "a", "d"], [0, 1, 2]), (1, ["worst", "better", "good", "best"], [1, 3, 4, 7])
    ]  # fmt: skip
    assert causes == ["", "", "tie"]


def test_refinement_is_a_response_and_what_was_aligned_from_it() -> None:
    rows, causes = made("refinement", FOUR, LOST)
    assert sides(rows, "response", "improved", "response_reward", "improved_reward", "margin") == [
        ("worst", "best", 1, 7, 6)
    ]
    assert causes == ["", "aligned_lost"]
    assert sides(made("refinement", LOST, reward=None)[0], "improved", "margin") == [("b", None)]


def test_steps_part_where_the_sentences_do() -> None:
    one = "Add 3.5 and 2. That is 5.5. So double it."
    other = "Add 3.5 and 2.  That is 6. So double it."
    rows, causes = made(
        "steps", row("p", [other], [one], q=([0], [1])), row("q", ["Yes."], ["Yes. More."], q=([0], [1]))
    )
    assert sides(rows, "prefix", "chosen", "rejected", "full_chosen", "full_rejected", "margin") == [
        ("Add 3.5 and 2. ", "That is 5.5. ", "That is 6. ", one, other, 1)
    ]
    assert causes == ["", "no_step"]
    assert part("a", "b") == ("", "a", "b")


def test_steps_part_where_texts_differ_in_more_than_white_space() -> None:
    rows, causes = made("steps", row("p", ["Hello world. No."], ["Hello  world. Yes, and so on."]), reward=None)
    assert sides(rows, "prefix", "chosen", "rejected") == [("Hello  world. ", "Yes, and so on.", "No.")]
    assert causes == [""]
    assert part("\nA. B", "A. C") == ("\nA. ", "B", "C")
    assert part("一加一。是二！所以。", "一加一。是三！所以。") == ("一加一。", "是二！", "是三！")
    assert part("他说「好。」我走了。", "他说「好。」我没走。") == ("他说「好。」", "我走了。", "我没走。")
    assert part("यह है। हाँ।", "यह है। नहीं।") == ("यह है। ", "हाँ।", "नहीं।")


@given(WRITTEN, WRITTEN)
def test_steps_of_any_two_texts_begin_them_and_differ(one: str, other: str) -> None:
    prefix, chosen, rejected = part(one, other)
    assert one.startswith(prefix + chosen)
    mine, others, chosen_is, rejected_is = normal(pa.array([one, other, chosen, rejected])).to_pylist()
    assert mine == others or chosen_is != rejected_is
    assert others.replace(" ", "").startswith((normal(pa.array([prefix]))[0].as_py() + rejected_is).replace(" ", ""))
