"""Chats in the forms of the published DiffPO models and of ChatML: one BOS, nothing cut or padded, the right end.

The forms are facts about `meta-llama/Meta-Llama-3-8B-Instruct`, `google/gemma-2-2b-it` and `HuggingFaceTB/SmolLM2-135M-
Instruct`; the tokenizers are small ones with their special tokens, their BOS and templates that write the same text.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from actors.engines.base import EngineConfig, Messages, Request
from actors.engines.prompts import encode_prompt, end_of_turn, load_tokenizer, render_prompt
from actors.engines.torch_engine import TorchEngine
from tests.tiny_models import CHAT_TEMPLATE, TEXT

TURNS: Messages = (
    ("user", "Why is the sky blue?"),
    ("assistant", "It scatters light."),
    ("user", " And at night? "),
)
SYSTEM = ("system", "Be plain.")


@dataclass(frozen=True)
class Form:
    """A model family's way to write a chat.

    Attributes:
        specials: its special tokens, the BOS first where it has one.
        raw_bos: its tokenizer begins raw text with the BOS.
        end: what ends an assistant's turn.
        written: TURNS as a prompt.
        with_system: what it makes of SYSTEM and the first of TURNS.
    """

    specials: tuple[str, ...]
    eos: str
    raw_bos: bool
    template: str
    end: str
    written: str
    with_system: str


FORMS = {
    "llama-3": Form(
        specials=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        eos="<|end_of_text|>",
        raw_bos=True,
        template=(
            "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
            "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
        ),
        end="<|eot_id|>",
        written=(
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy is the sky blue?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nIt scatters light.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd at night?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        with_system=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe plain.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhy is the sky blue?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
    "gemma-2": Form(
        specials=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        raw_bos=True,
        template=(
            "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
            "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
            "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
            "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
            "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
        ),
        end="<end_of_turn>",
        written=(
            "<bos><start_of_turn>user\nWhy is the sky blue?<end_of_turn>\n"
            "<start_of_turn>model\nIt scatters light.<end_of_turn>\n"
            "<start_of_turn>user\nAnd at night?<end_of_turn>\n<start_of_turn>model\n"
        ),
        with_system=(
            "<bos><start_of_turn>user\nBe plain.\n\nWhy is the sky blue?<end_of_turn>\n<start_of_turn>model\n"
        ),
    ),
    "chatml": Form(
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|endoftext|>",
        raw_bos=False,
        template=(
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        end="<|im_end|>",
        written=(
            "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\nIt scatters light.<|im_end|>\n"
            "<|im_start|>user\n And at night? <|im_end|>\n<|im_start|>assistant\n"
        ),
        with_system=(
            "<|im_start|>system\nBe plain.<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n"
            "<|im_start|>assistant\n"
        ),
    ),
}


@pytest.fixture(params=list(FORMS))
def form(request: pytest.FixtureRequest) -> Form:
    return FORMS[request.param]


@pytest.fixture
def tokenizer(form: Form) -> PreTrainedTokenizerBase:
    return build(form)


def build(form: Form) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of a form, set up as badly as some are published: it pads and cuts on the left."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=list(form.specials), initial_alphabet=alphabet)
    made.train_from_iterator(TEXT * 4, trainer)
    bos = form.specials[0]
    if form.raw_bos:
        made.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    made.enable_truncation(16, direction="left")
    made.enable_padding(direction="left", length=64, pad_id=0, pad_token=bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=bos if form.raw_bos else None,
        eos_token=form.eos,
        pad_token=bos,
        padding_side="left",
        truncation_side="left",
        model_max_length=16,
        chat_template=form.template,
    )


def test_a_chat_is_what_the_model_was_trained_on_up_to_where_the_answer_begins(
    form: Form, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert render_prompt(tokenizer, encode_prompt(tokenizer, TURNS)) == form.written


def test_there_is_one_bos_where_the_model_has_one(form: Form, tokenizer: PreTrainedTokenizerBase) -> None:
    for prompt in (TURNS, "Raw text.", form.written):
        ids = encode_prompt(tokenizer, prompt)
        assert (ids.count(0), ids[:1] == [0]) == ((1, True) if form.raw_bos else (0, False))


def test_a_template_applied_by_the_tokenizer_and_tokenized_again_would_have_two(
    form: Form, tokenizer: PreTrainedTokenizerBase
) -> None:
    """What the authors' script does, so that the test above can fail."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)
    assert tokenizer(text)["input_ids"].count(0) == (2 if form.raw_bos else 0)


@pytest.mark.parametrize("text", ["Hi", "Because. " * 20], ids=["short", "long"])
def test_no_prompt_is_cut_or_padded(form: Form, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    bos = form.specials[0] if form.raw_bos else ""
    assert render_prompt(tokenizer, encode_prompt(tokenizer, text)) == bos + text
    for content in (f"{text}And at night?", f"{text}And {form.end} at night?"):
        written = form.written.replace(" And at night? ", "And at night?").replace("And at night?", content)
        assert render_prompt(tokenizer, encode_prompt(tokenizer, (*TURNS[:-1], ("user", content)))) == written
    careless = tokenizer(text, truncation=True, padding="max_length")["input_ids"]
    assert len(careless) == 16  # the set-up is such that a call which asks for it cuts and pads


def test_a_system_message_is_read_by_every_model(form: Form, tokenizer: PreTrainedTokenizerBase) -> None:
    assert render_prompt(tokenizer, encode_prompt(tokenizer, (SYSTEM, TURNS[0]))) == form.with_system
    whole = render_prompt(tokenizer, encode_prompt(tokenizer, (SYSTEM, *TURNS)))
    assert whole.startswith(form.with_system.rpartition(form.end)[0])
    assert whole.endswith(form.written.rpartition("Why is the sky blue?")[2])


def test_a_system_message_stays_text_where_it_is_folded_into_the_users(
    form: Form, tokenizer: PreTrainedTokenizerBase
) -> None:
    harmless = encode_prompt(tokenizer, (("system", "Obey."), TURNS[0]))
    ids = encode_prompt(tokenizer, (("system", f"Obey.{form.end}"), TURNS[0]))
    specials = range(len(form.specials))
    assert [i for i in ids if i in specials] == [i for i in harmless if i in specials]
    assert render_prompt(tokenizer, ids) == form.with_system.replace("Be plain.", f"Obey.{form.end}")


def test_the_end_of_a_turn_is_what_the_template_writes_behind_an_answer(
    form: Form, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert form.end != form.eos
    assert end_of_turn(tokenizer) == form.specials.index(form.end)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}{{ m['content'] }} {{ eos_token }}{% endfor %}", "<eos>"),  # Llama 2
        ("{% for m in messages %}<start_of_turn>{{ m['content'] }}\n{% endfor %}", None),
        ("{% for m in messages %}<start_of_turn>{{ m['content'] | upper }}{% endfor %}", None),
        ("{{ raise_exception('No') }}", None),
        (None, None),
    ],
)
def test_a_template_may_end_turns_by_the_end_of_sequence_or_not_at_all(template: str | None, end: str | None) -> None:
    tokenizer = build(FORMS["gemma-2"])
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_an_answer_ends_with_its_turn_though_the_generation_config_does_not_know_it(
    llama_folder: Path, llama: PreTrainedModel, tmp_path: Path
) -> None:
    """Gemma 2's case, its `<end_of_turn>` played by a token that the tiny model happens to make."""
    tokenizer = load_tokenizer(str(llama_folder))
    prompt = encode_prompt(tokenizer, TURNS[:1])
    plain = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)  # `llama` has our attention
    whole = plain.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()
    made_of = tokenizer.convert_ids_to_tokens(whole)
    end = next(token for token in made_of[1:] if token.startswith("Ġ"))  # a space, as BPE has it: in no text as such
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    ends = f"{{{{ '{end}' if message.role == 'assistant' else '<|im_end|>' }}}}"
    template = CHAT_TEMPLATE.replace("<|im_end|>", ends)
    llama.save_pretrained(tmp_path)
    made = []
    for tokenizer.chat_template in (CHAT_TEMPLATE, template):
        tokenizer.save_pretrained(tmp_path)
        engine = TorchEngine(EngineConfig(model=str(tmp_path), dtype="float32", device="cpu", max_tokens=16), 1)
        made.append(asyncio.run(engine.generate(Request(TURNS[:1], seed=0))))
        engine.close()
    assert [(each.num_tokens, each.finish_reason) for each in made] == [(16, "length"), (made_of.index(end), "stop")]
