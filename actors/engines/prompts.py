"""How a prompt becomes the token ids that a model reads: chat template once, one BOS, and no tokens by injection."""

import functools
import re
from collections.abc import Iterable
from itertools import takewhile

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from actors.contract import ConfigError, RowError
from actors.engines.base import Messages

PAD = "\t \t"  # white space that no template writes, around a placeholder: gone when the template trims


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id. Raises ConfigError where there is none; never runs the model's code."""
    try:
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(load_failure("tokenizer", model, error)) from error


def load_failure(what: str, model: str, error: Exception) -> str:
    """One line for a user whose `model` cannot be loaded."""
    reason = str(error).strip().split("\n")[0]
    return f"no {what} at {model!r}: set `model` to a folder with safetensors and a tokenizer, or a hub id ({reason})"


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Messages | str, *, to_answer: bool = True) -> list[int]:
    """Token ids of a prompt.

    A chat goes through the tokenizer's chat template once, up to where the answer begins, or, without `to_answer`, to
    the end of the answer that is its last message; control tokens are those that the template writes. Raw text gets the
    tokenizer's own, such as a BOS. What a message or a raw text says is text: strings in it that look like control
    tokens are read as plain characters. Where the template refuses a system message (Gemma 2's does), it becomes the
    beginning of the first user message, with an empty line after it.

    Raises:
        RowError: `invalid_roles` when the template refuses the chat; `special_token_text` when a message with
            strings of control tokens cannot be kept apart from the template.
        ConfigError: a chat, but the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return _ids(tokenizer, prompt, add_special_tokens=True, plain=True)
    prompt, rendered = _render_any(tokenizer, prompt, to_answer)
    control_ids = set(_controls(tokenizer, str(tokenizer.chat_template)).values())
    if any(control_ids.intersection(_ids(tokenizer, content)) for _, content in prompt):
        return _encode_guarded(tokenizer, prompt, rendered, to_answer)
    return _ids(tokenizer, rendered)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts behind an assistant's message; None where it puts none.

    An answer ends there whatever the generation config says: fine-tunes come with one that knows nothing but the end of
    sequence, while their turns end otherwise (Gemma 2's with `<end_of_turn>`, Llama 3's with `<|eot_id|>`).

    Raises ConfigError where the template is broken.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        rendered = _render(tokenizer, (("user", "question"), ("assistant", "placeholder")), to_answer=False)
    except RowError:
        return None
    _, found, rest = rendered.rpartition("placeholder")
    specials = _specials(tokenizer)
    match = _any_of(specials).match(rest.lstrip()) if found and specials else None
    return specials[match.group()] if match else None


def encode_draft(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of an answer as a model would make it: nothing in it is read as a special token, and none is added."""
    return _ids(tokenizer, text, plain=True)


def check_room(ids: list[int], max_tokens: int, limit: int) -> None:
    """Raises RowError `empty_prompt`, or `prompt_too_long` where prompt and answer exceed `limit` tokens."""
    if not ids:
        raise RowError("empty_prompt", "the prompt has no tokens")
    if len(ids) + max_tokens > limit:
        message = f"{len(ids)} prompt tokens + {max_tokens} max_tokens exceed the model's {limit}"
        raise RowError("prompt_too_long", message)


def check_words(ids: list[int], num_words: int) -> None:
    """Raises RowError `rejected_by_engine` for a token that the tokenizer knows and the model, of so many, does not."""
    if max(ids, default=0) >= num_words:
        raise RowError("rejected_by_engine", f"token {max(ids)} is not one of the model's {num_words}")


def before_unknown(draft: Iterable[int], num_words: int) -> list[int]:
    """A draft up to the first token that the model does not know, and so can neither read nor say."""
    return list(takewhile(lambda token: token < num_words, draft))


def render_prompt(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """What a model that is given `ids` reads, special tokens visible."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _ids(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False, plain: bool = False
) -> list[int]:
    """Tokenize; `plain` reads special-token strings as characters."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=plain)
    return list(encoded["input_ids"])


def _render_any(tokenizer: PreTrainedTokenizerBase, chat: Messages, to_answer: bool) -> tuple[Messages, str]:
    """The chat as the template takes it, and its text; a system message is folded into the user's where it must be."""
    try:
        return chat, _render(tokenizer, chat, to_answer=to_answer)
    except RowError:
        if [role for role, _ in chat[:2]] != ["system", "user"]:
            raise
    folded = (("user", f"{chat[0][1]}\n\n{chat[1][1]}"), *chat[2:])
    return folded, _render(tokenizer, folded, to_answer=to_answer)


def _render(tokenizer: PreTrainedTokenizerBase, chat: Messages, *, to_answer: bool = True) -> str:
    """The chat as text; `to_answer` goes on to where the answer begins."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{tokenizer.name_or_path!r} has no chat template: choose a model with one or a recipe that writes raw text"
        )
    messages = [{"role": role, "content": content} for role, content in chat]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_answer))
    except TemplateSyntaxError as error:
        raise ConfigError(f"the chat template of {tokenizer.name_or_path!r} is broken: {error.message}") from error
    except TemplateError as error:
        raise RowError("invalid_roles", f"the model's chat template refuses this chat: {error.message}") from error


def _encode_guarded(tokenizer: PreTrainedTokenizerBase, prompt: Messages, rendered: str, to_answer: bool) -> list[int]:
    """As `encode_prompt` for a chat in whose contents strings of control tokens occur.

    Renders the template around placeholders, so that it is known which characters are its own; control tokens are
    honoured in those alone. Everything between two of them is tokenized in one piece, as the tokenizer itself would.
    """
    name = "placeholder"
    while any(name in content for _, content in prompt):
        name += "x"
    placeholders = tuple((role, f"{PAD}{name}{i}z{PAD}") for i, (role, _) in enumerate(prompt))
    held = _render(tokenizer, placeholders, to_answer=to_answer)
    # Split into: template, pad kept on the left, message number, pad kept on the right, template, …
    fields = re.split(f"({PAD})?{name}([0-9]+)z({PAD})?", held)
    parts = [(fields[0], False)]  # text, whether it is a message's
    for left, number, right, template in zip(fields[1::4], fields[2::4], fields[3::4], fields[4::4], strict=True):
        content = prompt[int(number)][1]
        content = content if left else content.lstrip()
        parts += [(content if right else content.rstrip(), True), (template, False)]
    faithful = "".join(text for text, _ in parts) == rendered  # no template that takes contents apart
    if not faithful or _encode_parts(tokenizer, [(held, False)]) != _ids(tokenizer, held):
        raise RowError("special_token_text", "a message holds special-token text that cannot be told from the template")
    ids = _encode_parts(tokenizer, parts)
    written = set(_controls(tokenizer, str(tokenizer.chat_template)).values())
    if sum(i in written for i in ids) != sum(i in written for i in _ids(tokenizer, held)):
        raise RowError("special_token_text", "a message holds special-token text that this tokenizer cannot take apart")
    return ids


def _encode_parts(tokenizer: PreTrainedTokenizerBase, parts: list[tuple[str, bool]]) -> list[int]:
    """Token ids of texts one after the other; control tokens are honoured where a text is not a message's."""
    controls, specials = _controls(tokenizer, str(tokenizer.chat_template)), _specials(tokenizer)
    pattern, in_content = _any_of(controls), _any_of(controls.keys() - specials.keys())
    ids: list[int] = []
    pieces = [""]
    for text, is_content in parts:
        end = 0
        for match in (in_content if is_content else pattern).finditer(text):
            if is_content:  # the tokenizer would read it as it is: cut in two behind its first character
                pieces[-1] += text[end : match.start() + 1]
                pieces.append("")
                end = match.start() + 1
                continue
            pieces[-1] += text[end : match.start()]
            ids += [i for piece in pieces for i in _ids(tokenizer, piece, plain=True)]
            ids.append(controls[match.group()])
            pieces, end = [""], match.end()
        pieces[-1] += text[end:]
    return ids + [i for piece in pieces for i in _ids(tokenizer, piece, plain=True)]


def _specials(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Special tokens by their text."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


@functools.lru_cache(4)
def _controls(tokenizer: PreTrainedTokenizerBase, template: str) -> dict[str, int]:
    """The tokens that steer a chat, by their text: special ones, and others that `template`, the tokenizer's, writes.

    Fine-tunes that have added `<|im_start|>` and its like do not always call them special.
    """
    controls = _specials(tokenizer)
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    for chat in ((("user", "a"),), (("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"))):
        try:
            found = set(_ids(tokenizer, _render(tokenizer, chat)))
        except RowError:  # no system message here
            continue
        controls |= {added[i]: i for i in found & added.keys() if added[i].strip()}
    return controls


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the texts; nothing where there is none."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")
