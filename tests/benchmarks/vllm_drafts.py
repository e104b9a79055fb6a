"""Measures what drafts gain inside vLLM: the engine with `decoder: auto` and `parallel` against plain vLLM.

    python tests/benchmarks/vllm_drafts.py [overlap | correction] [--model FOLDER]
    python tests/benchmarks/vllm_drafts.py overlap --batches 4 --overlaps 0 1 --repeats 1  # three minutes

overlap: drafts are the model's own answers, of which runs of 12 tokens are replaced by others' at random; p is the
chance of a run to be left. Beside each ratio stands the limit 1 / (1 - p + p / s), s being the ratio at p = 1,
which is therefore always measured.
correction: recipes whose prompt holds the answer that is its draft, also with vLLM's own `ngram` and `suffix`, where
numba and arctic-inference are installed, which these need.

A ratio is of tokens/s, in turn on the same rows, the median of the repeats with its range. "agree" counts the texts
that are equal: in float32 that is all; in bfloat16 another batch shape parts where two tokens are as likely.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from actors.engines import build_engine
from actors.engines.base import Completion, DraftingConfig, Engine, Request
from actors.engines.prompts import encode_draft, load_tokenizer
from actors.recipes import RecipeConfig, aligner_input
from tests.benchmarks.decode_vs_generate import QUESTIONS, SUBJECTS
from tests.benchmarks.drafts import RUN

PARTS = ("overlap", "correction")
NGRAM = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
SUFFIX = {"method": "suffix", "num_speculative_tokens": 8}


@dataclass(frozen=True)
class Ran:
    rate: float  # tokens/s
    made: list[Completion]


def run(engine: Engine, requests: list[Request]) -> Ran:
    async def make() -> list[Completion]:
        return await asyncio.gather(*map(engine.generate, requests))

    begin = time.perf_counter()
    made = asyncio.run(make())
    seconds = time.perf_counter() - begin
    return Ran(sum(completion.num_tokens or 0 for completion in made) / seconds, made)


def in_turn(engines: dict[str, Engine], requests: list[Request], repeats: int) -> dict[str, list[Ran]]:
    """Every engine on the same requests, one after the other; the first round, which reads the prompts, is dropped."""
    ran: dict[str, list[Ran]] = {name: [] for name in engines}
    for turn in range(repeats + 1):
        for name, engine in engines.items():
            found = run(engine, requests)
            if turn:
                ran[name].append(found)
    return ran


def ratios(ran: dict[str, list[Ran]], name: str) -> list[float]:
    return sorted(ours.rate / plain.rate for ours, plain in zip(ran[name], ran["plain"], strict=True))


def told(ran: dict[str, list[Ran]], name: str) -> str:
    found = ratios(ran, name)
    made, plain = ran[name][-1].made, ran["plain"][-1].made
    drafted = [one for one in made if one.iterations]
    steps, accepted = sum(one.iterations or 0 for one in drafted), sum(one.accepted or 0 for one in drafted)
    share = f"{1 + accepted / steps:.2f} tokens a step" if drafted else "no drafts"
    agree = sum(one.text == other.text for one, other in zip(made, plain, strict=True))
    rate = statistics.median(each.rate for each in ran[name])
    return (
        f"{name} {statistics.median(found):.2f}x ({found[0]:.2f} to {found[-1]:.2f}), {rate:.0f} tokens/s, {share},"
        f" agree {agree}/{len(made)}"
    )


def make_draft(tokenizer: Any, answer: str, others: list[int], overlap: float, generator: random.Random) -> str:
    tokens = encode_draft(tokenizer, answer)
    for start in range(0, len(tokens), RUN):
        if generator.random() >= overlap:
            num = len(tokens[start : start + RUN])
            tokens[start : start + num] = generator.choices(others, k=num)
    return str(tokenizer.decode(tokens))


def measure_overlaps(args: argparse.Namespace, batch: int, engines: dict[str, Engine], chats: list[Request]) -> None:
    tokenizer = load_tokenizer(args.model)
    answers = [completion.text for completion in run(engines["plain"], chats).made]
    others = [token for answer in answers for token in encode_draft(tokenizer, answer)]
    gains: dict[str, float] = {}
    for overlap in sorted({1.0, *args.overlaps}, reverse=True):
        generator = random.Random(0)
        requests = [
            Request(chat.prompt, chat.seed, make_draft(tokenizer, answer, others, overlap, generator))
            for chat, answer in zip(chats, answers, strict=True)
        ]
        ran = in_turn(engines, requests, args.repeats)
        rate = statistics.median(each.rate for each in ran["plain"])
        print(f"{args.dtype}, batch {batch}, overlap {overlap:.0%}: plain {rate:.0f} tokens/s", flush=True)
        for name in engines:
            if name != "plain":
                gain = statistics.median(ratios(ran, name))
                gains.setdefault(name, gain)  # the greatest overlap comes first
                limit = 1 / (1 - overlap + overlap / gains[name])
                print(f"  {told(ran, name)}; limit {limit:.2f}x, {gain / limit:.2f} of it", flush=True)


def measure_correction(args: argparse.Namespace, batch: int, engines: dict[str, Engine], chats: list[Request]) -> None:
    answers = [completion.text for completion in run(engines["plain"], chats).made]
    for recipe in args.recipes:
        requests = []
        for chat, answer in zip(chats, answers, strict=True):
            assert not isinstance(chat.prompt, str)
            prompt = aligner_input(RecipeConfig(recipe=recipe), chat.prompt, answer)
            requests.append(Request(prompt, chat.seed, answer))
        ran = in_turn(engines, requests, args.repeats)
        rate = statistics.median(each.rate for each in ran["plain"])
        print(f"{args.dtype}, batch {batch}, recipe {recipe}: plain {rate:.0f} tokens/s", flush=True)
        for name in engines:
            if name != "plain":
                print(f"  {told(ran, name)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, help="all of them, where none is named")
    parser.add_argument("--model", default=str(Path("~/.cache/burnish/SmolLM2-135M-Instruct").expanduser()))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 64], help="requests at the same time")
    parser.add_argument("--overlaps", nargs="+", type=float, default=[0, 0.25, 0.5, 0.75, 0.9, 1])
    parser.add_argument("--decoders", nargs="+", default=["auto", "parallel"])
    parser.add_argument("--recipes", nargs="+", default=["rewrite"], choices=["rewrite", "aligner", "metaaligner"])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    parts = [args.part] if args.part else PARTS
    questions = [question.format(subject) for subject in SUBJECTS for question in QUESTIONS]  # 96

    def start(batch: int, decoder: Any, **engine_kwargs: Any) -> Engine:
        config = DraftingConfig(
            engine="vllm", model=args.model, dtype=args.dtype, device=args.device, max_num_seqs=batch, decoder=decoder,
            max_tokens=args.max_tokens, max_model_len=args.max_model_len, engine_kwargs=engine_kwargs,
        )  # fmt: skip
        return build_engine(config, args.threads)

    for batch in args.batches:
        chats = [Request((("user", question),), seed) for seed, question in enumerate(questions[: max(16, batch)])]
        engines = {"plain": start(batch, "greedy")} | {decoder: start(batch, decoder) for decoder in args.decoders}
        if "overlap" in parts:
            measure_overlaps(args, batch, engines, chats)
        if "correction" in parts:
            for name, speculative_config, needs in (("ngram", NGRAM, "numba"), ("suffix", SUFFIX, "arctic_inference")):
                if find_spec(needs):
                    engines[name] = start(batch, "greedy", speculative_config=speculative_config)
                else:
                    print(f"{name} is not measured: {needs} is not installed")
            measure_correction(args, batch, engines, chats)
        for engine in engines.values():
            engine.close()


if __name__ == "__main__":
    main()
