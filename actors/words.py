"""The words of a text in any language: what rules count, and what makes two prompts alike."""

import regex

_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese, which are written without spaces between words."""

_CHARACTERS = regex.compile(rf"(?:[{_UNSPACED}]\p{{M}}*)+")
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[^\W{_UNSPACED}]+")  # regex, as re's \w has no vowel signs and accents


def words(text: str) -> list[str]:
    """Runs of letters, digits and their marks, without what stands between them; in a script that puts no spaces
    between words, characters."""
    found: list[str] = _WORD.findall(text)
    return found


def is_unspaced(text: str) -> bool:
    """Whether all of it is in a script without spaces between words."""
    return _CHARACTERS.fullmatch(text) is not None
