"""Candidates: what both pools make of an engine's completion, of a failure, and of a model's thinking."""

from pathlib import Path
from typing import Any

from actors.contract import RowError
from actors.engines.base import Completion, EngineConfig, Messages
from actors.engines.by_url import is_url

DEPENDENT = "response_failed"
"""Cause of an aligned candidate whose response had failed before."""


def made(completion: Completion, reasoning_end: str | None, **candidate: Any) -> dict[str, Any]:
    """A candidate, its thinking apart from its text. Raises RowError `empty_answer` where it is all thinking."""
    reasoning, text = completion.reasoning, completion.text.strip()
    if reasoning is None:
        reasoning, text = split_reasoning(text, reasoning_end)
    if not text:
        raise RowError("empty_answer", "the model's answer has no text")
    return {
        **candidate,
        "text": text,
        "reasoning": reasoning,
        "status": "ok",
        "error": None,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_tokens": completion.num_tokens,
    }


def failed(error: RowError, **candidate: Any) -> dict[str, Any]:
    """A candidate that could not be made."""
    return {
        **candidate,
        "text": "",
        "reasoning": None,
        "status": "failed",
        "error": str(error),
        "finish_reason": None,
        "num_prompt_tokens": None,
        "num_tokens": None,
    }


def lost(responses: list[dict[str, Any]], aligned: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The problem of a row none of whose candidates survived both pools; None where one did.

    It is that of the first candidate which failed by itself in the last pool that any of them reached.
    """
    if any(candidate["status"] == "ok" for candidate in aligned):
        return None
    for stage, candidates in (("aligner", aligned), ("policy", responses)):
        for candidate in candidates:
            if candidate["status"] == "failed":
                error = RowError.parse(candidate["error"])
                if error.cause != DEPENDENT:
                    return _problem(stage, error)
    return _problem("policy", RowError("no_candidate", ""))


def _problem(stage: str, error: RowError) -> dict[str, Any]:
    told = {"cause": error.cause, "message": error.message, "attempts": error.attempts}
    return {"stage": stage, "error_class": "RowError", **told}


def split_reasoning(text: str, end: str | None) -> tuple[str | None, str]:
    """(thinking, answer), both stripped. A text that opens its thinking and never ends it has no answer."""
    if end is None:
        return None, text.strip()
    start = end.replace("/", "")
    if end in text:
        thinking, _, answer = text.partition(end)
        return thinking.strip().removeprefix(start).strip(), answer.strip()
    if text.lstrip().startswith(start) and start != end:
        return text.strip().removeprefix(start).strip(), ""
    return None, text.strip()


def model_label(config: EngineConfig) -> str:
    """How responses name their model: the name of its folder, a hub id or the provenance label, as configured."""
    if is_url(config.model):
        return config.model.rstrip("/").rpartition("/")[2]
    return Path(config.model).name if Path(config.model).is_absolute() else config.model


def as_messages(prompt: list[dict[str, str]] | None) -> Messages:
    """A prompt of the unit table as (role, content) pairs."""
    return tuple((message["role"], message["content"]) for message in prompt or ())
