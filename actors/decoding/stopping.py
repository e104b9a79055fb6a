"""Where an answer ends by a stop string: one that may begin in, or be among, the tokens that it kept of a draft."""

from bisect import bisect_left
from collections.abc import Callable, Collection


def cut(text: str, stops: Collection[str]) -> str | None:
    """The text before the first stop string; None where there is none."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else None


def until_stop(
    decode: Callable[[list[int]], str], reserved: list[int], tokens: list[int], stops: Collection[str]
) -> tuple[int, str] | None:
    """(how many of `tokens` it took, behind the reserved ones, to a stop string; the text before it); None where there
    is none. That is where an answer ends which is looked at after every token."""

    def text(num: int) -> str:
        return decode([*reserved, *tokens[:num]])

    if not stops or cut(text(len(tokens)), stops) is None:
        return None
    num = bisect_left(range(len(tokens)), True, key=lambda num: cut(text(num), stops) is not None)
    before = cut(text(num), stops)
    assert before is not None
    return num, before
