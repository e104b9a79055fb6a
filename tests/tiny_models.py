"""Tiny random models, built on the spot, whose outputs differ from prompt to prompt."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A preference is a pair of answers to one prompt: the chosen and the rejected.",
    "How many tokens does a model make in a second, and how many does it throw away?",
    "Two cores, one batch: rows come and go, but what they say must stay the same.",
    "Give me three reasons why the sky is blue and one why it is not, in plain words.",
    "system user assistant You are a helpful assistant. END Stop. Naïve café, 東京, 10 % of 2,500.",
    "Every answer ends, some with a full stop and others because nobody had room for another word.",
    "Readers of long reports often wonder whether anything between the first and last page was read.",
]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # with the default every prompt gets one repeated token, and no test could fail
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 512 tokens with ChatML's special tokens and template; adds no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny_llama(folder: Path) -> Path:
    return _build(folder, LlamaConfig, {})


def assert_answers_differ(folder: Path) -> Path:
    """The folder of a model. Raises AssertionError where its greedy answers, of 16 tokens, do not tell prompts apart.

    For the fixtures: no comparison of texts could fail then.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = torch.randint(3, model.config.vocab_size, (64, 24), generator=torch.Generator().manual_seed(0))
    made = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=16, do_sample=False)
    assert len({tuple(answer) for answer in made[:, prompts.shape[1] :].tolist()}) >= 60
    return folder


def build_tiny_tied_llama(folder: Path) -> Path:
    """One matrix for embeddings and logits, which makes it repeat itself."""
    return _build(folder, LlamaConfig, {"tie_word_embeddings": True})


def build_tiny_gemma2(folder: Path) -> Path:
    """Alternating sliding and full attention, scores and logits capped hard enough to matter."""
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 32}
    return _build(folder, Gemma2Config, {"sliding_window": 16, **caps})


def build_tiny_qwen2(folder: Path) -> Path:
    """Full attention below, sliding attention above."""
    return _build(folder, Qwen2Config, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1})


def build_tiny_mistral(folder: Path) -> Path:
    """Sliding attention in every layer, without `layer_types`."""
    return _build(folder, MistralConfig, {"sliding_window": 16})


def build_tiny_reward(folder: Path, **extra: object) -> Path:
    """A llama with a head of one label; `extra` are values of its config."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, **(SHAPE | extra))
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _build(folder: Path, config_class: type[PreTrainedConfig], extra: dict[str, object]) -> Path:
    tokenizer = build_tokenizer()
    config = config_class(vocab_size=len(tokenizer), **(SHAPE | extra))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
