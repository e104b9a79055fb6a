"""Times the decode loop against transformers' `generate`: same model, prompts, lengths and greedy decoding.

    python tests/benchmarks/decode_vs_generate.py --model FOLDER
    python tests/benchmarks/decode_vs_generate.py --batches 8 --dtypes float32 --max-tokens 32 --repeats 1  # a minute

A ratio is generate's seconds over the loop's, so above 1 the loop is faster; both run in turn, in one process, and the
median over the repeats is printed with its range. "agree" counts the rows whose tokens are equal: in float32 that
should be all; in bfloat16 two orders of summation part where two tokens are nearly as likely.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from transformers import AutoModelForCausalLM

from actors.decoding.forward import Forward
from actors.decoding.loop import DecodeLoop, Row
from actors.engines.base import EngineConfig
from actors.engines.prompts import encode_prompt, load_tokenizer
from actors.engines.torch_model import load_model

SUBJECTS = ["tides", "bread", "glass", "rainbows", "bees", "money", "rust", "sleep", "chess", "echoes", "maps", "snow"]
QUESTIONS = [
    "What is the first thing a child should know about {}?",
    "Explain {} in one sentence.",
    "Write a short poem about {}, and then say in plain words what it means and why you chose those images.",
    "List three facts about {}.",
    "A friend of mine claims that nobody understands {}. I disagree, but I lack arguments. Please give me two that I"
    " could use over dinner without sounding like a textbook, and one that would end the conversation politely.",
    "Is it true that {} were different a hundred years ago? Answer yes or no.",
    "Compare {} with something from everyday life.",
    "{}: why?",
]

Tokens = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("~/.cache/burnish/SmolLM2-135M-Instruct").expanduser())
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[1, 8, 32], help="rows of the equal-length comparison"
    )
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--refill-tokens", type=int, default=128, help="most tokens of a row in the refill comparison")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    args = parser.parse_args()
    if not args.model.is_dir():
        raise SystemExit(f"no model at {args.model}: give a folder with --model")
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(str(args.model))
    questions = [question.format(subject) for subject in SUBJECTS for question in QUESTIONS]  # 96
    prompts = [encode_prompt(tokenizer, (("user", question),)) for question in questions]
    for dtype in args.dtypes:
        config = EngineConfig(model=str(args.model), dtype=dtype, device=args.device)
        ours = load_model(config)
        theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype)).to(ours.device).eval()
        eos = ours.generation_config.eos_token_id
        generate(theirs, prompts[:4], 8, 4, eos=None)  # warm up
        decode(ours, prompts[:4], 8, 4, eos=None)
        for batch in args.batches:
            compare(
                f"{dtype}, batch {batch}, {args.max_tokens} tokens each",
                partial(generate, theirs, prompts[:batch], args.max_tokens, batch, eos=None),
                partial(decode, ours, prompts[:batch], args.max_tokens, batch, eos=None),
                args.repeats,
            )
        compare(
            f"{dtype}, 96 prompts through 32 slots, up to {args.refill_tokens} tokens",
            partial(generate, theirs, prompts, args.refill_tokens, 32, eos=eos),
            partial(decode, ours, prompts, args.refill_tokens, 32, eos=eos),
            args.repeats,
        )


def compare(name: str, run_theirs: Callable[[], Tokens], run_ours: Callable[[], Tokens], repeats: int) -> None:
    """Run both in turn and print the ratio of their times."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        want = run_theirs()
        middle = time.perf_counter()
        got = run_ours()
        times.append((middle - start, time.perf_counter() - middle))
    ratios = sorted(theirs / ours for theirs, ours in times)
    num = sum(map(len, got))
    print(
        f"{name}: {statistics.median(ratios):.2f}x generate ({ratios[0]:.2f} to {ratios[-1]:.2f});"
        f" {num / statistics.median(ours for _, ours in times):.0f} tokens/s against"
        f" {sum(map(len, want)) / statistics.median(theirs for theirs, _ in times):.0f};"
        f" agree {sum(map(list.__eq__, want, got))}/{len(got)}",
        flush=True,
    )


@torch.inference_mode()
def generate(model: Any, prompts: Tokens, max_tokens: int, batch: int, eos: int | list[int] | None) -> Tokens:
    """`generate` on batches of `batch` prompts, padded on the left; with eos None every row makes max_tokens."""
    model.generation_config.eos_token_id = eos
    ends = {eos} if isinstance(eos, int) else set(eos or [])
    answers = []
    for first in range(0, len(prompts), batch):
        chunk = prompts[first : first + batch]
        width = max(map(len, chunk))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in chunk], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in chunk], device=model.device)
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=model.config.pad_token_id
        )
        for tokens in made[:, width:].tolist():
            end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
            answers.append(tokens[:end])
    return answers


def decode(model: Any, prompts: Tokens, max_tokens: int, batch: int, eos: int | list[int] | None) -> Tokens:
    """The decode loop with `batch` slots."""
    ends = [eos] if isinstance(eos, int) else eos or []
    loop = DecodeLoop(Forward(model), str, eos=ends, max_num_seqs=batch, kv_cache_tokens=1 << 20)
    rows = [Row(tuple(prompt), max_tokens, seed=0) for prompt in prompts]
    for row in rows:
        loop.submit(row)
    while loop.busy:
        loop.step()
    return [row.tokens for row in rows]


if __name__ == "__main__":
    main()
