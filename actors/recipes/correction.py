"""Inputs of correction-style aligners: the answer is put into the aligner's prompt, to be edited there."""

import functools

from jinja2 import StrictUndefined, Template, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from actors.contract import ConfigError, RowError
from actors.engines.base import Messages

DEFAULT_TEMPLATE = """\
Improve a draft answer: make it more helpful, more correct and harmless.
{% if history %}
Conversation so far:
{% for message in history %}{{ message.role }}: {{ message.content }}
{% endfor %}{% endif %}
Question:
{{ question }}

Draft answer:
{{ answer }}

Write the improved answer to the question, in the language of the question. Keep what is already good. \
Write only the answer itself: no introduction, no comment on the draft or on what was changed."""

DEFAULT_ASPECTS = [
    "Instruction following: the response should follow the instructions of the query",
    "Honesty: the response should not tell lies",
    "Truthfulness: the response should actively making known all the full truth of a matter",
    "Helpfulness: the response should provide useful resources and suggestions to the user",
]
"""What MetaAligner-UltraFeedback was trained on, to the letter (its authors' `all_aspects`); not to be corrected."""

VARIABLES = {"question", "history", "messages", "answer"}
PROBES: tuple[Messages, ...] = (
    (("user", "a"),),
    (("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")),
)

# Values are never compiled, so `{{ }}` in a prompt or an answer stays text; the sandbox guards against the template.
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
del _ENVIRONMENT.globals["lipsum"], _ENVIRONMENT.filters["random"]  # a resumed run must render the same text


def rewrite(template: str | None, messages: Messages, answer: str) -> Messages:
    """One user message that asks an instruct model for a better answer; a null template is `DEFAULT_TEMPLATE`.

    The prompt's system message is not the aligner's: it stands in `history`, as the first of what the answer's policy
    was told. So it cannot override the request to rewrite, and aligners without a system role (Gemma 2) work too.

    Raises:
        RowError: `recipe_failed`, the template cannot be rendered for this row.
    """
    try:
        return (("user", _render(DEFAULT_TEMPLATE if template is None else template, messages, answer)),)
    except Exception as error:  # a template is a user's program: it may raise anything
        raise RowError("recipe_failed", f"template: {type(error).__name__}: {error}") from error


def check_template(template: str) -> None:
    """Raise ConfigError unless the template reads `answer`, no unknown variable, and renders short and long chats."""
    try:
        names = meta.find_undeclared_variables(_ENVIRONMENT.parse(template)) - set(_ENVIRONMENT.globals)
        if unknown := sorted(names - VARIABLES):
            raise ConfigError(f"template reads unknown {', '.join(unknown)}; there are {', '.join(sorted(VARIABLES))}")
        if "answer" not in names:
            raise ConfigError("template must read {{ answer }}")
        for messages in PROBES:
            _render(template, messages, "e")
    except ConfigError:
        raise
    except Exception as error:  # as above
        line = f", line {error.lineno}" if hasattr(error, "lineno") else ""
        message = " ".join(str(error).split())
        raise ConfigError(f"template cannot be rendered{line}: {type(error).__name__}: {message}") from error


def aligner(messages: Messages, answer: str) -> str:
    """Text for PKU Aligner (Ji et al., arXiv 2402.02416), as on the card of `aligner/aligner-7b-v1.0`."""
    return (
        "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more helpful and "
        f"harmless: {flatten(messages)} | {answer} ASSISTANT:"
    )


def metaaligner(aspects: list[str], messages: Messages, answer: str) -> str:
    """Text for MetaAligner (Yang et al., arXiv 2403.17141), UltraFeedback models; the space at its end is theirs."""
    return (
        "You are an assistant to human. You will be provided with a query and an answer. Consider the query, then "
        f"edit the answer to improve it considering these aspects: {'; '.join(aspects)} | "
        f"Query: {flatten(messages)} | Answer: {answer} | Edit: "
    )


def flatten(messages: Messages) -> str:
    """A chat as the one text that these aligners know as the question.

    A single user message is its content, exactly. Anything longer is `System: ... Human: ... Assistant: ... Human: ...`
    with one space between, the form of multi-turn queries in MetaAligner's examples. Neither model family was
    trained on system messages; they are kept rather than lost.
    """
    if len(messages) == 1:
        return messages[0][1]
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    return " ".join(f"{names[role]}: {content}" for role, content in messages)


def _render(template: str, messages: Messages, answer: str) -> str:
    chat = [{"role": role, "content": content} for role, content in messages]
    return _compile(template).render(question=chat[-1]["content"], history=chat[:-1], messages=chat, answer=answer)


@functools.cache
def _compile(template: str) -> Template:
    return _ENVIRONMENT.from_string(template)
