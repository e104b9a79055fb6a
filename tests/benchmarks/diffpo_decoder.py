"""Times the parallel decoder against what there was before it: DiffPO's own algorithm, and transformers' `generate`.

    python tests/benchmarks/diffpo_decoder.py                                        # a quarter of an hour on two cores
    python tests/benchmarks/diffpo_decoder.py generate --dtypes bfloat16 --batches 1 --json figures.jsonl
    python tests/benchmarks/diffpo_decoder.py plot --json figures.jsonl --plot diffpo_decoder.svg
    python tests/benchmarks/diffpo_decoder.py --random 8b --dtypes bfloat16 --json figures.jsonl            # on a GPU

official: a faithful rendering of the published inference (one row at a time, no cache, every position of prompt and
block forwarded, turned into probabilities and compared in each iteration, until the whole block stands still) against
ours at batch 32. Both begin with the policy's answers, sampled at temperature 1, and make the same tokens; neither ends
at an end-of-sequence token, which spares the published algorithm its useless tail.

generate: drafts that are right in whole runs of 12 tokens, the overlap being the share of right runs. Beside the ratio
of generate's seconds to ours stands the limit: what an oracle could reach that knows which tokens of the draft stand
right where they are, on step costs that are measured in the same run, of rows with equally many positions. It neither
realigns a draft nor guesses by the model's own predictions, so where texts part it can be outrun.
"plain" is our own loop without drafts, than which poor ones must not make it slower by more than a tenth.

refilled: our own loop with such drafts against the same without, where a row that ends leaves its slot to another, as
in a job: up to four times as many rows as slots, of half to all of the tokens. A batch that is not refilled, as those
above, takes as long as its row with the poorest draft.

The sides take turns in one process; medians over the repeats are printed, with their range. "agree" counts the rows
whose tokens are those of `generate`: in float32 that should be all; in bfloat16 another shape of a forward rounds
differently, and two tokens that are nearly as likely change places. A draft made of the one continuation is then wrong
for the other: the limit knows that, the overlap that is printed does not.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from actors.decoding.cost import StepCost
from actors.decoding.forward import ATTENTION, Forward
from actors.decoding.loop import DecodeLoop, Row
from actors.decoding.sampling import greedy
from actors.engines.base import EngineConfig
from actors.engines.prompts import encode_prompt, load_tokenizer
from actors.engines.torch_model import load_model
from tests.benchmarks.decode_vs_generate import QUESTIONS, SUBJECTS, generate
from tests.benchmarks.drafts import Costs, Tokens, shortest_s, spoil

NUM_PROMPTS = len(SUBJECTS) * len(QUESTIONS)  # 96
OVERLAPS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
ROWS_OF_ONE = 2
"""Rows of the comparison at batch 1, one after the other: twenty runs, of which each overlap is a whole number."""
MOST_POSITIONS = 1024
"""Of a forward whose cost is measured; more of them cost as much more as the last ones did."""
SWEEPS = 2
"""Of all shapes, before each repeat."""
SIZES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 4096},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""Of random models; the larger two are those of Llama 3."""


@dataclass(frozen=True)
class Subject:
    """What is measured: one model twice, with our attention and with transformers' own, and prompts for it."""

    name: str
    ours: Any
    theirs: Any
    prompts: Tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["official", "generate"], help="official, generate, refilled, plot")
    parser.add_argument("--model", type=Path, default=Path("~/.cache/burnish/SmolLM2-135M-Instruct").expanduser())
    parser.add_argument("--random", choices=SIZES, help="a random Llama of this size instead, built on the device")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--overlaps", nargs="+", type=float, default=OVERLAPS)
    parser.add_argument("--max-tokens", type=int, default=120, help="of each row against generate")
    parser.add_argument("--official-tokens", type=int, default=64, help="of each row, and in the official block")
    parser.add_argument("--block-size", type=int, default=64, help="most positions of a row in one of our forwards")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="where figures are added, one a line, and read from by plot")
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_suffix(".svg"), help="where plot draws")
    args = parser.parse_args()
    parts = {"official": against_official, "generate": against_generate, "refilled": while_refilled}
    if unknown := set(args.parts) - {*parts, "plot"}:
        raise SystemExit(f"no part is called {unknown.pop()}: they are {', '.join(parts)} and plot")
    if "plot" in args.parts and args.json is None:
        raise SystemExit("plot draws what was measured before: name the file with --json")
    torch.set_num_threads(args.threads)
    if max(args.batches) > NUM_PROMPTS:
        raise SystemExit(f"there are {NUM_PROMPTS} prompts: batches must be at most as large")
    for dtype in args.dtypes if set(args.parts) - {"plot"} else []:
        subject = random_subject(args, dtype) if args.random else real_subject(args, dtype)
        for part, measure in parts.items():
            if part in args.parts:
                measure(subject, args, partial(record, args.json, part=part, model=subject.name, dtype=dtype))
    if "plot" in args.parts:
        from tests.benchmarks.draw import draw

        lines = args.json.read_text().splitlines()
        args.plot.write_text(draw(map(json.loads, lines)))


def record(file: Path | None, **figures: Any) -> None:
    if file is not None:
        with file.open("a") as lines:
            lines.write(json.dumps(figures) + "\n")


# --- what is measured -----------------------------------------------------------------------------------------------


def real_subject(args: argparse.Namespace, dtype: str) -> Subject:
    if not args.model.is_dir():
        raise SystemExit(f"no model at {args.model}: give a folder with --model")
    tokenizer = load_tokenizer(str(args.model))
    questions = [question.format(subject) for subject in SUBJECTS for question in QUESTIONS]
    ours = load_model(EngineConfig(model=str(args.model), dtype=dtype, device=args.device))
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype)).to(ours.device).eval()
    prompts = [encode_prompt(tokenizer, (("user", question),)) for question in questions]
    return Subject(args.model.name, ours, theirs, prompts)


def random_subject(args: argparse.Namespace, dtype: str) -> Subject:
    """A Llama whose layers are random and whose next token is sure.

    The logits are read off the embedding of another token, so that one of them stands out. Otherwise no two shapes of a
    forward in bfloat16 would agree for long, and drafts could not be right: the speed is measured here, not the text.
    """
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if args.device == "auto" else args.device)
    shape = {**SIZES[args.random], "rope_theta": 500000.0, "max_position_embeddings": 8192, "pad_token_id": 0}

    def build(attention: str) -> Any:
        torch.manual_seed(0)
        with device, torch.no_grad():
            model: Any = AutoModelForCausalLM.from_config(
                LlamaConfig(**shape), dtype=getattr(torch, dtype), attn_implementation=attention
            )
            embeddings = model.model.embed_tokens.weight.normal_(std=4.0)
            model.lm_head.weight.copy_(embeddings[torch.randperm(len(embeddings))])
        return model.eval()

    draws = torch.Generator().manual_seed(0)
    lengths = torch.randint(24, 64, (NUM_PROMPTS,), generator=draws).tolist()
    prompts = [torch.randint(3, shape["vocab_size"], (length,), generator=draws).tolist() for length in lengths]
    return Subject(f"random Llama {args.random}", build(ATTENTION), build("sdpa"), prompts)


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """What it took, and its result."""
    begin = now()
    result = run()
    return now() - begin, result


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def decode(
    subject: Subject,
    prompts: Tokens,
    max_tokens: int | Sequence[int],
    batch: int,
    drafts: Tokens | None = None,
    **settings: Any,
) -> Tokens:
    """Our decode loop with `batch` slots, where rows end at `max_tokens` alone. Without drafts one token a step.

    Each run's loop is new: it has not learned yet how good such drafts are.
    """
    loop = DecodeLoop(Forward(subject.ours), str, eos=(), max_num_seqs=batch, kv_cache_tokens=1 << 20, **settings)
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    rows = [
        Row(tuple(prompt), limit, seed=number, draft=drafts[number] if drafts else None)
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    for row in rows:
        loop.submit(row)
    while loop.busy:
        loop.step()
    return [row.tokens for row in rows]


def parallel(subject: Subject, block_size: int, batch: int) -> dict[str, Any]:
    """What makes `decode` use its drafts: an adaptive block, on costs that are measured as an engine measures them."""
    most = subject.ours.config.max_position_embeddings
    return {"block_size": block_size, "cost": StepCost.measure(Forward(subject.ours), batch, block_size, most)}


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f}x ({min(values):.2f} to {max(values):.2f})"


def equal(left: Tokens, right: Tokens) -> int:
    return sum(map(list.__eq__, left, right))


# --- against the published algorithm --------------------------------------------------------------------------------


@torch.inference_mode()
def official(model: Any, prompt: list[int], guess: list[int]) -> tuple[list[int], int]:
    """DiffPO's published inference on one row and one block: (its tokens, how many iterations they took)."""
    device = model.device
    prefix, block = torch.tensor([prompt], device=device), torch.tensor([guess], device=device)
    iteration, settled = 0, False
    while not settled:
        iteration += 1
        logits = model(torch.cat([prefix, block], dim=1), use_cache=False).logits
        update = torch.softmax(logits, dim=-1)[:, len(prompt) - 1 : -1].argmax(-1)
        settled = torch.equal(update, block)
        block = update
    return block[0].tolist(), iteration


def against_official(subject: Subject, args: argparse.Namespace, keep: Callable[..., None]) -> None:
    batch, length = 32, args.official_tokens
    prompts = subject.prompts[:batch]
    want = generate(subject.theirs, prompts, length, batch, eos=None)
    if args.random:  # too sure of itself to be sampled
        guesses = spoil(want, 0.0, subject.ours.config.vocab_size, seed=0)
    else:
        guesses = decode(subject, prompts, length, batch, temperature=1.0)
    settings = parallel(subject, args.block_size, batch)
    their_rates, our_rates, iterations, agree = [], [], [], 0
    for row in range(args.repeats):
        their_s, (tokens, num) = seconds(partial(official, subject.theirs, prompts[row], guesses[row]))
        our_s, made = seconds(partial(decode, subject, prompts, length, batch, guesses, **settings))
        their_rates.append(length / their_s)
        our_rates.append(batch * length / our_s)
        iterations.append(num)
        agree += tokens == want[row]
    ratios = [ours / theirs for ours, theirs in zip(our_rates, their_rates, strict=True)]
    theirs, ours = statistics.median(their_rates), statistics.median(our_rates)
    print(
        f"{subject.name}, {subject.ours.dtype}, batch {batch}, {length} tokens each: {spread(ratios)} the official"
        f" algorithm; {ours:.0f} tokens/s against {theirs:.1f} at {statistics.mean(iterations):.0f} iterations a block;"
        f" agree {equal(made, want)}/{batch}, official {agree}/{len(ratios)},"
        f" which ran on the first of these rows, one a turn",
        flush=True,
    )
    keep(
        batch=batch, ratio=statistics.median(ratios), lowest=min(ratios), highest=max(ratios), tokens_per_s=ours,
        official=theirs, agree=equal(made, want), rows=batch,
    )  # fmt: skip


# --- against generate -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def step_costs(model: Any, batch: int, block: int, context: int) -> Costs:
    """Seconds of a forward and the choice of its tokens, once each, with `context` tokens of each row in the cache.

    Up to `batch` positions it is one of so many rows, as when others have ended; beyond it, several of each row.
    """
    forward = Forward(model)
    forward.cache.resize(batch, context + 2 * block, used=0)

    def step(rows: int, width: int) -> list[int]:
        logits = forward(0, [[1] * width] * rows, [context] * rows, [width] * rows)
        assert logits is not None
        tokens: list[int] = greedy(logits).tolist()
        return tokens

    shapes = [(1 << n, 1) for n in range(batch.bit_length()) if 1 << n < batch] + [(batch, 1)]
    widths = [1 << n for n in range(1, block.bit_length() + 1)]  # a prompt may come on top of a block
    shapes += [(batch, width) for width in widths if batch * width <= MOST_POSITIONS]
    step(1, 1)  # warm up
    return {rows * width: seconds(partial(step, rows, width))[0] for rows, width in shapes}


@torch.inference_mode()
def prefill_s(model: Any, prompts: Tokens) -> float:
    """Seconds of the forward that puts prompts into the cache, but for their last tokens."""
    forward = Forward(model)
    forward.cache.resize(len(prompts), max(map(len, prompts)), used=0)
    none = [0] * len(prompts)
    return seconds(partial(forward, 0, [prompt[:-1] for prompt in prompts], none, none))[0]


def against_generate(subject: Subject, args: argparse.Namespace, keep: Callable[..., None]) -> None:
    vocabulary, length = subject.ours.config.vocab_size, args.max_tokens
    generate(subject.theirs, subject.prompts[:4], 8, 4, eos=None)  # warm up
    decode(subject, subject.prompts[:4], 8, 4)
    for batch in args.batches:
        prompts = subject.prompts[: max(batch, ROWS_OF_ONE)]
        groups = [slice(first, first + batch) for first in range(0, len(prompts), batch)]
        context = int(statistics.mean(map(len, prompts))) + length // 2
        settings = parallel(subject, args.block_size, batch)
        answers = decode(subject, prompts, length, batch)
        drafts = {overlap: spoil(answers, overlap, vocabulary, seed=batch) for overlap in args.overlaps}
        their_times: list[float] = []
        plain_times: list[float] = []
        our_times: dict[float, list[float]] = {overlap: [] for overlap in args.overlaps}
        made: dict[float, Tokens] = {}
        sweeps: list[Costs] = []
        all_prefills: list[list[float]] = []
        for _ in range(args.repeats):  # the limit's costs, too: they are those of the same minutes
            sweeps += [step_costs(subject.ours, batch, args.block_size, context) for _ in range(SWEEPS)]
            all_prefills.append([prefill_s(subject.ours, prompts[group]) for group in groups])
            their_s, want = seconds(partial(generate, subject.theirs, prompts, length, batch, eos=None))
            their_times.append(their_s)
            plain_times.append(seconds(partial(decode, subject, prompts, length, batch))[0])
            for overlap, guesses in drafts.items():
                our_s, made[overlap] = seconds(partial(decode, subject, prompts, length, batch, guesses, **settings))
                our_times[overlap].append(our_s)
        costs = {total: statistics.median(sweep[total] for sweep in sweeps) for total in sweeps[0]}
        prefills = [statistics.median(times) for times in zip(*all_prefills, strict=True)]
        told = " ".join(f"{total}:{1000 * cost:.0f}" for total, cost in sorted(costs.items()))
        print(f"{subject.name}, {subject.ours.dtype}, batch {batch}; milliseconds by positions: {told}", flush=True)
        num, their_s, plain_s = len(prompts) * length, statistics.median(their_times), statistics.median(plain_times)
        for overlap, guesses in drafts.items():
            tokens, our_s, limit_s = made[overlap], statistics.median(our_times[overlap]), 0.0
            for group, before_s in zip(groups, prefills, strict=True):
                # The prompts go through a forward of their own, or along with the first step.
                least_s = partial(shortest_s, tokens[group], guesses[group], costs, args.block_size - 1)
                num_before = sum(len(prompt) - 1 for prompt in prompts[group])
                limit_s += min(before_s + least_s(), least_s(num_before=num_before))
            ratios = [theirs / ours for theirs, ours in zip(their_times, our_times[overlap], strict=True)]
            agree = equal(tokens, want)
            print(
                f"  {overlap:4.0%} overlap: {spread(ratios)} generate, {plain_s / our_s:.2f}x plain; limit"
                f" {their_s / limit_s:.2f}x, {limit_s / our_s:.0%} of it; {num / our_s:.0f} tokens/s against"
                f" {num / their_s:.0f}; agree {agree}/{len(want)}",
                flush=True,
            )
            keep(
                batch=batch, overlap=overlap, ratio=statistics.median(ratios), lowest=min(ratios), highest=max(ratios),
                tokens_per_s=num / our_s, limit=num / limit_s, generate=num / their_s, plain=num / plain_s,
                agree=agree, rows=len(want),
            )  # fmt: skip


# --- in a job -------------------------------------------------------------------------------------------------------


def while_refilled(subject: Subject, args: argparse.Namespace, keep: Callable[..., None]) -> None:
    vocabulary = subject.ours.config.vocab_size
    for batch in args.batches:
        prompts = subject.prompts[: 4 * batch]
        lengths = [args.max_tokens - number * 7 % (args.max_tokens // 2) for number in range(len(prompts))]
        settings = parallel(subject, args.block_size, batch)
        answers = decode(subject, prompts, lengths, batch)
        drafts = {overlap: spoil(answers, overlap, vocabulary, seed=batch) for overlap in args.overlaps}
        ratios: dict[float, list[float]] = {overlap: [] for overlap in args.overlaps}
        agree: dict[float, int] = {}
        for _ in range(args.repeats):
            plain_s, _ = seconds(partial(decode, subject, prompts, lengths, batch))
            for overlap, guesses in drafts.items():
                our_s, made = seconds(partial(decode, subject, prompts, lengths, batch, guesses, **settings))
                ratios[overlap].append(plain_s / our_s)
                agree[overlap] = equal(made, answers)
        print(f"{subject.name}, {subject.ours.dtype}, {len(prompts)} rows in {batch} slots", flush=True)
        for overlap, found in ratios.items():
            print(f"  {overlap:4.0%} overlap: {spread(found)} plain; agree {agree[overlap]}/{len(prompts)}", flush=True)
            keep(
                batch=batch, overlap=overlap, ratio=statistics.median(found), lowest=min(found), highest=max(found),
                agree=agree[overlap], rows=len(prompts),
            )  # fmt: skip


if __name__ == "__main__":
    main()
