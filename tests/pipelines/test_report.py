"""The summary's lines on rewards."""

import pytest

from pipelines.report import print_rewards


def test_rewards_are_told_before_and_after_with_what_is_missing_and_how_far_a_judge_went_by_the_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_rewards(
        {
            "rewards": {
                "m": {"num_candidates": 4, "response": 0.5, "aligned": 0.75},
                "judge": {"num_candidates": 20, "response": 0.5, "aligned": 0.6125},
            },
            "unscored": {
                "m: reward_failed": {"prompt_id": "p7", "message": "the score is nan"},
                "m: prompt_too_long": {"prompt_id": "p8", "message": "9 tokens"},
                "lost: engine_crash": {"prompt_id": "p9", "message": "it died"},
                "judge: unreadable_verdict": {"prompt_id": "p1", "message": "the judge gave no verdict: 'Hm'"},
            },
            "reward_notes": {
                "m: scored": 9,
                "m: prompt_too_long": 2,
                "m: reward_failed": 1,
                "lost: engine_crash": 3,
                "judge: judged_first": 24,
                "judge: judged_second": 14,
                "judge: judged_tie": 2,
                "judge: judged_by_position": 5,
                "judge: unreadable_verdict": 1,
            },
        }
    )
    assert capsys.readouterr().out.splitlines() == [
        "reward judge: 0.5 -> 0.6125 (+0.113) over 20 candidates; texts without a score: 1 unreadable_verdict",
        "reward judge: the first without a score is unreadable_verdict of p1: the judge gave no verdict: 'Hm'",
        "reward judge: asked in both orders, the answer shown first won 24 of 40 times and lost 14; 25.0% of the pairs "
        "went by the place alone",
        "reward lost: no candidate has both scores; texts without a score: 3 engine_crash",
        "reward lost: the first without a score is engine_crash of p9: it died",
        "reward m: 0.5 -> 0.75 (+0.25) over 4 candidates; texts without a score: 2 prompt_too_long, 1 reward_failed",
        "reward m: the first without a score is prompt_too_long of p8: 9 tokens",
    ]
