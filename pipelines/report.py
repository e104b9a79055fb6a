"""What the job prints besides its progress: the dry run's plan, bad shards, and the summary at the end."""

import math
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq

from actors.candidates import as_messages, split_reasoning
from actors.contract import RowError
from actors.engines.base import OPENAI, Messages
from actors.engines.footprint import footprint
from actors.policy import policy_prompt
from actors.pool import PoolConfig
from actors.recipes import aligner_input
from actors.reward import RewardConfig
from actors.rewards import judge
from pipelines import estimate
from pipelines.corpus import scored
from pipelines.corpus.plan import Plan
from pipelines.corpus.publish import Published
from pipelines.corpus.read import read_checked
from pipelines.corpus.shards import Input
from pipelines.corpus.state import manifests
from pipelines.corpus.storage import Storage
from pipelines.estimate import Tokens
from pipelines.progress import PoolTotals, Tally
from pipelines.settings import AlignCorpusConfig, JobConfig, notes, pools, rewards

SHOWN_ROWS = 2
EACH = 8


def say(text: str) -> None:
    """A line for the person, apart from what the job prints as its result."""
    print(text, file=sys.stderr, flush=True)


def count(number: int, noun: str) -> str:
    """`1 unit`, `2 units`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def print_bad_shards(plan: Plan, advice: str) -> None:
    for shard in plan.bad_shards:
        say(f"error: shard {shard.path}: {shard.reason}")
    say(f"error: nothing was done; {advice}")


def print_throughput(
    totals: dict[str, PoolTotals], tally: Tally, seconds: float, *, startup_s: float = 0.0, is_aligning: bool
) -> None:
    """Rows and tokens per second of each pool, and what aligning did. The seconds are those since all engines were up;
    what a pool has done before them counts, too.

    Args:
        seconds: of the whole job.
        startup_s: of these, until every pool had an engine.
    """
    running_s = max(seconds - startup_s, 1e-9)
    for name, pool in totals.items():
        tokens = f", {pool.num_tokens / running_s:.0f} tokens/s" if pool.has_tokens else ""
        print(f"{name}: {pool.num_rows / running_s:.2f} rows/s{tokens}")
    changed = tally.num_changed / tally.num_candidates if tally.num_candidates else 0.0
    told = f"; {changed:.1%} of answers changed" if is_aligning else ""
    startup = f" ({startup_s:.1f} s of them start-up)" if startup_s else ""
    print(f"made: {count(tally.num_units, 'unit')}, {count(tally.num_rows, 'row')} in {seconds:.1f} s{startup}{told}")
    if is_aligning and tally.iterations:
        _print_decoding(tally)


def _print_decoding(tally: Tally) -> None:
    """What a forward pass of a parallel decoder brought, and how many an answer took; above EACH by powers of 2."""
    num_passes = sum(number * count for number, count in tally.iterations.items())
    accepted = tally.num_accepted / max(1, tally.num_decoded)
    print(
        f"aligner: {tally.num_decoded / num_passes:.2f} tokens per forward pass and answer, "
        f"{accepted:.1%} of them accepted guesses"
    )
    answers: Counter[tuple[int, int]] = Counter()
    for number, count in tally.iterations.items():
        power = 1 << (number - 1).bit_length()
        answers[(number, number) if number <= EACH else (power // 2 + 1, power)] += count
    bins = [
        f"{number} in {low}" + (f"-{high}" if high > low else "") for (low, high), number in sorted(answers.items())
    ]
    print(f"aligner: answers by forward passes: {', '.join(bins)}")


def print_summary(config: JobConfig, output: Storage, plan: Plan, published: Published) -> None:
    """Counts, where the corpus is, and two of its rows, each by its first candidate that came through."""
    for shard in plan.bad_shards:
        say(f"warning: shard {shard.path} was skipped: {shard.reason}")
    if published.withheld:
        say(f"error: {published.withheld}")
        return
    found = manifests(output)
    partitions = "1 partition" if len(found) == 1 else f"{len(found)} partitions"
    new = [manifest for manifest in found if manifest["number"] in published.partitions]
    if not new:
        num_rows = sum(manifest["num_ok"] for manifest in found)
        print(f"nothing new: {num_rows} rows in {partitions} at {output.url}/corpus")
        return
    for manifest in new:
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(manifest["causes"].items()))
        print(
            f"published: run={manifest['number']:06d}: {manifest['num_rows']} rows in = {manifest['num_ok']} ok + "
            f"{manifest['num_quarantined']} quarantined{f' ({causes})' if causes else ''}"
        )
        print_rewards(manifest)
    print(f"corpus: {output.url}/corpus ({sum(each['num_ok'] for each in found)} rows in {partitions})")
    for note in notes(config):
        print(f"note: {note}")
    for manifest in new[-1:]:
        _print_rows(output, manifest)


def print_rewards(manifest: Mapping[str, Any]) -> None:
    """Each reward before aligning and after it, over the candidates that have both scores, and what has none."""
    notes: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for told, count in sorted(manifest["reward_notes"].items()):
        name, _, note = told.rpartition(": ")
        notes[name][note] = count
    unscored = scored.failures(manifest)
    for name in sorted({*manifest["rewards"], *notes}):
        found = manifest["rewards"].get(name)
        line = f"reward {name}: no candidate has both scores"
        if found:
            before, after = found["response"], found["aligned"]
            line = f"reward {name}: {before:.4g} -> {after:.4g} ({after - before:+.3g})"
            line += f" over {found['num_candidates']} candidates"
        causes = unscored.get(name, {})
        missing = [f"{count} {cause}" for cause, count in causes.items()]
        print(line + (f"; texts without a score: {', '.join(missing)}" if missing else ""))
        if causes:
            print(f"reward {name}: the first without a score is {scored.first_failure(manifest, name)}")
        first, second, tie, by_position = (notes[name].get(note, 0) for note in judge.NOTES)
        if num_verdicts := first + second + tie:
            print(
                f"reward {name}: asked in both orders, the answer shown first won {first} of {num_verdicts} times and "
                f"lost {second}; {by_position / (num_verdicts / 2):.1%} of the pairs went by the place alone"
            )


def _print_rows(output: Storage, manifest: dict[str, Any]) -> None:
    if not manifest["corpus"]:
        return
    with output.fs.open(output.path(manifest["corpus"][0]["path"])) as file:
        columns = ["prompt_id", "prompt", "responses", "aligned", "rewards"]
        batch = next(pq.ParquetFile(file).iter_batches(SHOWN_ROWS, columns=columns))
    for row in batch.to_pylist():
        number = next(number for number, each in enumerate(row["aligned"]) if each["status"] == "ok")
        print(f"\n{row['prompt_id']}")
        _print_text("prompt", row["prompt"][-1]["content"])
        _print_text("response", row["responses"][number]["text"])
        _print_text("aligned", row["aligned"][number]["text"])
        if row["rewards"]:
            scores = [(each["name"], each["response"][number], each["aligned"][number]) for each in row["rewards"]]
            _print_text("rewards", ", ".join(f"{name} {_score(one)} -> {_score(two)}" for name, one, two in scores))


def _score(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _print_text(name: str, text: str) -> None:
    short = textwrap.shorten(text, 400, placeholder=" …")
    print(textwrap.fill(short, 116, initial_indent=f"  {name:9}", subsequent_indent=" " * 11))


# --- the dry run ----------------------------------------------------------------------------------------------------


def print_dry_run(
    config: JobConfig, source: Input, plan: Plan, made_of: str, pace: Mapping[str, Any] | None, nodes: list[str]
) -> None:
    """The plan, the pools, what the rows may take, and the first prompts exactly as each model will see them.

    Nothing is written or started.

    Args:
        made_of: digest of the fingerprint that the job would have.
        pace: of the last run on the root, if there is one.
        nodes: lines that say what would run where.
    """
    print(
        f"input: {count(plan.num_shards, 'shard')}, {plan.num_finished} of them finished; "
        f"{count(plan.num_done_rows, 'row')} done"
    )
    units, rows = count(plan.num_units, "unit"), count(plan.num_rows, "row")
    print(f"to do: {units}, {rows}, in {count(len(plan.spans), 'row group')}")
    for shard in plan.bad_shards:
        print(f"bad shard: {shard.path}: {shard.reason}")
    known = pace if pace and pace["digest"] == made_of else None
    sampled = estimate.sample(source, config.input, plan) if isinstance(config, AlignCorpusConfig) else []
    for name, pool in pools(config).items():
        each = f"{pool.num_gpus} GPUs, {pool.num_cpus:g} CPUs each"
        grows = f" to {pool.most_replicas}" if pool.most_replicas > pool.replicas else ""
        at = f" at {pool.base_url or OPENAI}" if pool.engine == "openai" else ""
        print(f"{name}: {pool.replicas}{grows} x {pool.engine} {pool.model}{at} ({each})")
        if pool.engine in ("stored", "rules"):
            continue
        if name in rewards(config):
            if found := footprint(pool):
                print(f"{name}: memory per rank: {_size(found.weight_bytes)} weights")
            continue
        assert isinstance(config, AlignCorpusConfig)
        tokens = estimate.tokens(config, name, sampled, plan.num_rows)
        if pool.engine != "openai":
            print(f"{name}: {_memory(pool, tokens)}")
        if plan.num_rows:
            _print_tokens(name, pool, tokens, plan.num_rows, known)
    for line in nodes:
        print(line)
    if plan.num_rows:
        _print_cost(config, plan.num_rows, pace, known)
    for note in notes(config):
        print(f"note: {note}")
    for row in _first_prompts(config, source, plan):
        if isinstance(config, AlignCorpusConfig):
            _print_as_seen(config, row)
        _print_as_scored(config, row)


def _memory(pool: PoolConfig, tokens: Tokens) -> str:
    """What weights and KV cache take of each rank's memory; activations and the libraries' own memory come on top."""
    found = footprint(pool)
    text = "GPU memory per rank: " if pool.num_gpus else "memory per rank: "
    if found is None:
        return text + "unknown until the model is on this machine"
    text += f"{_size(found.weight_bytes)} weights"
    if found.token_bytes is None:
        return text + " + a KV cache of unknown size: the weights do not show a K and a V of every layer"
    on_gpu = pool.engine == "vllm" and pool.num_gpus > 0  # there kv_cache_tokens does not count
    bound = found.cache_tokens(pool)
    if tokens.lengths:
        length = min(tokens.lengths[-1] + pool.max_tokens, found.max_len or math.inf)
        num_tokens = min(pool.max_num_seqs * length, math.inf if on_gpu else bound)
        text += f" + {_size(found.token_bytes * num_tokens)} KV cache for {pool.max_num_seqs} sequences"
        text += f" as long as the longest here, {length} tokens"
    most = f"{_size(found.token_bytes * bound)} ({bound} tokens)"
    if pool.engine == "torch":
        return f"{text}; at most {most}"
    return f"{text}; vllm sets aside " + ("gpu_memory_utilization of the GPU for both" if on_gpu else f"about {most}")


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _print_tokens(name: str, pool: PoolConfig, found: Tokens, num_rows: int, pace: Mapping[str, Any] | None) -> None:
    if found.lengths:
        mean = sum(found.lengths) / len(found.lengths)
        basis = f"estimated from {found.num_rows} of {num_rows} rows" if found.num_rows < num_rows else "every row read"
        print(
            f"{name}: prompts of {mean:.0f} tokens on average, 50% up to {found.quantile(0.5)}, 95% up to "
            f"{found.quantile(0.95)}, the longest {found.lengths[-1]}; {found.num_prompt_tokens} in all ({basis}"
            f"{'; answers yet to be made count as max_tokens' if found.is_bound else ''})"
        )
    made = f"{name}: at most {found.num_answers * pool.max_tokens} generated tokens"
    made += f" ({found.num_answers} answers of at most {pool.max_tokens})"
    if pace:
        mean = pace["pools"][name]["num_tokens"] / pace["num_rows"]
        made += f"; about {mean * num_rows:.0f} at the {mean:.0f} a row of run {pace['run']}"
    print(made)
    if found.num_too_long:
        print(
            f"{name}: {found.num_too_long} of {len(found.lengths)} prompts {'may ' if found.is_bound else ''}leave no "
            f"room for max_tokens={pool.max_tokens}; their candidates fail (prompt_too_long)"
        )
    if found.num_failed:
        print(f"{name}: {found.num_failed} of {found.num_rows} rows do not make a prompt")


def _print_cost(
    config: JobConfig, num_rows: int, pace: Mapping[str, Any] | None, known: Mapping[str, Any] | None
) -> None:
    price = config.plan.gpu_hour_price
    if known is None:
        why = f"run {pace['run']} had another config" if pace else "no run on this root has come to its end"
        print(f"time{' and cost' if price is not None else ''}: unknown, as {why}; --limit N makes N rows and measures")
        return
    then = {name: pool["num_gpus"] for name, pool in known["pools"].items()}
    alike = all(
        pool.replicas * pool.num_gpus <= then[name] <= pool.most_replicas * pool.num_gpus
        for name, pool in pools(config).items()
    )
    seconds = estimate.seconds_at(known, num_rows)
    print(
        f"time: about {seconds / 3600:.2g} hours, estimated from the {known['num_rows']} rows of run {known['run']}"
        + ("" if alike else f", which had other GPUs: {', '.join(f'{name} {n}' for name, n in then.items())}")
    )
    hours = estimate.gpu_hours_at(known, num_rows)
    if not any(hours.values()):
        print("GPU-hours: none, as no pool held a GPU then")
        return
    for name, each in [*hours.items(), ("in all", sum(hours.values()))]:
        cost = ""
        if price is not None:
            cost = f", cost {each * price:.2f}, {each * price / num_rows * 1000:.3g} per 1,000 rows"
        print(f"{name}: about {each:.3g} GPU-hours{cost}")


def _first_prompts(config: JobConfig, source: Input, plan: Plan) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for span in plan.spans:
        for _, unit in read_checked(source, config.input, span):
            names = [
                name for name in ("prompt_id", "prompt", "stored", "responses", "problem") if name in unit.column_names
            ]
            rows.extend(row for row in unit.select(names).to_pylist() if row["problem"] is None)
            if len(rows) >= SHOWN_ROWS:
                return rows[:SHOWN_ROWS]
    return rows


def _print_as_seen(config: AlignCorpusConfig, row: dict[str, Any]) -> None:
    for name in ("policy", "aligner"):
        try:
            text = _seen_by(config, name, row)
        except RowError as error:
            text = f"(not at all: {error})"
        print(f"\n{row['prompt_id']} as the {name} sees it:")
        print(textwrap.indent(text, "  "))
    if config.aligner.recipe == "diffpo":
        print(f"\n{row['prompt_id']}, where the aligner begins:")
        print(textwrap.indent(_answer(config, row), "  "))


def _print_as_scored(config: JobConfig, row: dict[str, Any]) -> None:
    """What each reward model reads of the row's first answer; rules read it as it is."""
    if isinstance(config, AlignCorpusConfig):
        answer = _answer(config, row)
    else:
        answer = next((each["text"] for each in row["responses"] if each["status"] == "ok"), "")
    for name, reward in rewards(config).items():
        if reward.engine == "rules":
            continue
        try:
            text = _seen_by_reward(reward, as_messages(row["prompt"]), answer)
        except RowError as error:
            text = f"(not at all: {error})"
        print(f"\n{row['prompt_id']} as the {name} sees it:")
        print(textwrap.indent(text, "  "))


def _seen_by_reward(reward: RewardConfig, prompt: Messages, answer: str) -> str:
    if reward.engine == "openai":
        return judge.question(reward, prompt, answer, "(another text of the row)")
    from actors.engines.prompts import encode_prompt, render_prompt

    tokenizer = estimate.tokenizer(reward)
    return render_prompt(tokenizer, encode_prompt(tokenizer, (*prompt, ("assistant", answer)), to_answer=False))


def _seen_by(config: AlignCorpusConfig, name: str, row: dict[str, Any]) -> str:
    if name == "policy":
        return as_seen(config.policy, policy_prompt(config.policy, row["prompt"]))
    return as_seen(config.aligner, aligner_input(config.aligner, as_messages(row["prompt"]), _answer(config, row)))


def _answer(config: AlignCorpusConfig, row: dict[str, Any]) -> str:
    """The first answer that the aligner is given, its thinking apart; a stand-in for one that is yet to be made."""
    if not row.get("stored"):
        return "(the policy's answer)"
    return split_reasoning(row["stored"][0], config.policy.reasoning_end)[1]


def as_seen(pool: PoolConfig, prompt: Messages | str) -> str:
    """The prompt's tokens, decoded again with special tokens visible; the chat as it is where they are not known."""
    if pool.engine in ("stored", "openai"):
        return prompt if isinstance(prompt, str) else "\n".join(f"{role}: {content}" for role, content in prompt)
    from actors.engines.prompts import encode_prompt, render_prompt

    tokenizer = estimate.tokenizer(pool)
    return render_prompt(tokenizer, encode_prompt(tokenizer, prompt))
