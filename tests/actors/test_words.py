"""What counts as a word, in scripts with spaces between words and without."""

import pytest

from actors.words import words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Don't say 3.5 – say it, twice!", ["Don", "t", "say", "3", "5", "say", "it", "twice"]),
        ("की का", ["की", "का"]),  # a vowel sign is all that tells them apart
        ("उसकी किताब", ["उसकी", "किताब"]),
        ("مَرْحَبًا بِكَ", ["مَرْحَبًا", "بِكَ"]),
        ("cafe\u0301 noir", ["cafe\u0301", "noir"]),
        ("한국어는 쉽다", ["한국어는", "쉽다"]),
        ("天空是蓝色的。", ["天", "空", "是", "蓝", "色", "的"]),
        ("𠀀𠀁", ["𠀀", "𠀁"]),
        ("カタカナとhello", ["カ", "タ", "カ", "ナ", "と", "hello"]),
        ("ภาษาที่ดี", ["ภ", "า", "ษ", "า", "ที่", "ดี"]),
        ("?! …", []),
    ],
)
def test_words_are_runs_of_letters_and_their_marks_or_single_characters(text: str, found: list[str]) -> None:
    assert words(text) == found
